"""Reading the weights of a Hugging Face directory: a tensor at a time, from a memory map, straight to its devices."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.weights import finite, hf_keys, problems, progress, settings, tensor_file
from dgemma_jax.weights import tree as trees
from dgemma_jax.weights.hf_keys import Layout
from dgemma_jax.weights.tensor_file import Entry

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ON_HOST = 1 << 20  # smaller arrays are cast and turned by NumPy: a compile costs more


def find(directory: Path) -> dict[str, Entry]:
    """Every array of the checkpoint by its stored name; headers only are read.

    Raises:
        ValueError: no weights, missing or damaged files, or quantised weights.
    """
    if (directory / SINGLE).is_file():
        entries = tensor_file.read_header(directory / SINGLE)
    elif (directory / INDEX).is_file():
        entries = _sharded(directory)
    else:
        raise ValueError(
            f"{directory} has neither {SINGLE} nor {INDEX}; it holds {problems.listing(directory)}. "
            "Weights are read from safetensors files only"
        )
    text = {key: e for key, e in entries.items() if not hf_keys.not_used_yet(key)}
    schemes = {hf_keys.quantisation(key) for key in text} - {None}
    packed = {e.dtype_name for e in text.values() if e.dtype_name in ("U8", "I8", "U32", "F4", "F8_E4M3", "F8_E5M2")}
    if schemes or packed:
        raise settings.quantised(", ".join(sorted(schemes) or sorted(packed)), directory)
    return entries


def _sharded(directory: Path) -> dict[str, Entry]:
    try:
        places = json.loads((directory / INDEX).read_text("utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory / INDEX} is damaged ({error!r}); fetch it again") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{INDEX} names files outside of its directory: {outside}")
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        raise ValueError(f"{directory} lacks {len(absent)} of the {len(names)} shards that {INDEX} names: {absent}")
    shards = {name: tensor_file.read_header(directory / name) for name in names}
    lost = [f"{key} ({name})" for key, name in places.items() if key not in shards[name]]
    if lost:
        raise ValueError(f"{INDEX} names arrays that their shard does not hold: {problems.counted(lost)}")
    unnamed = [f"{key} ({name})" for name, shard in shards.items() for key in shard if places.get(key) != name]
    if unnamed:
        raise ValueError(f"shards hold arrays that {INDEX} does not place there: {problems.counted(unnamed)}")
    return {key: shards[name][key] for key, name in places.items()}


def stored_dtype(entries: Mapping[str, Entry]) -> np.dtype:
    """The type of the embedding table, which a load without `dtype` gives to all weights; warns if they differ."""
    table = entries.get(hf_keys.key_of(("embedder", "table"))[0])
    if table is None or table.dtype is None:
        return np.dtype(jnp.bfloat16)  # what is wrong is said by `load_hf`
    others = {e.dtype_name for key, e in entries.items() if e.dtype and hf_keys.path_of(key)} - {table.dtype_name}
    if others:
        warnings.warn(
            f"weights are stored as {table.dtype_name} and {', '.join(sorted(others))}; "
            f"all are loaded as {table.dtype}: give `dtype` to choose",
            stacklevel=3,
        )
    return table.dtype


def load_hf(
    directory: str | Path,
    tree: Any,
    *,
    shardings: Mapping[trees.Path, jax.sharding.Sharding] | None = None,
    check_finite: bool = True,
    progress_bar: bool | None = None,
    packer: Any = None,
) -> Any:
    """The tree with the weights of the checkpoint, each in the dtype of the leaf it replaces.

    Host memory stays near one tensor; with shardings each device is given its own slice of the file, and a process
    reads the slices of its own devices alone (arrays below a megabyte whole).

    Args:
        directory: holds `model.safetensors`, or shards and their index.
        tree: the model, abstract or real; only shapes and dtypes of its leaves are used.
        shardings: by path of the leaf; a leaf without one goes to the default device.
        check_finite: look at every number, also after the cast.
        progress_bar: None shows one for a gigabyte or more.
        packer: a `nn.quantized.Packer`: packs weights as they come.

    Raises:
        ValueError: names every missing, unexpected, wrongly shaped or non-finite array at once.
    """
    directory = Path(directory)
    entries, leaves, reader = find(directory), trees.leaves(tree), tensor_file.Reader()
    sources = _match(directory, entries, leaves, reader)
    loaded: dict[trees.Path, Any] = {}
    packed: dict[trees.Path, Any] = {}
    fine: dict[trees.Path, bool] = {}
    total = sum(entry.nbytes for entry, _ in sources.values())
    with progress.bar(f"Loading {directory.name}", total, progress_bar) as advance:
        for path, (entry, layout) in sources.items():
            where = (shardings or {}).get(path)
            loaded[path], fine[path] = _place(reader(entry), layout, leaves[path], where, check_finite)
            if packer is not None and packer.wants(path):
                packed[path], loaded[path] = packer.pack(path, loaded[path]), leaves[path]
            advance(entry.nbytes)
    good = finite.everywhere(list(fine.values()), (shardings or {}).values())
    problems.check_finite(directory, [trees.dotted(path) for path, one in zip(fine, good, strict=True) if not one])
    tree = trees.replace(tree, loaded)
    return packer.install(tree, packed) if packed else tree


def _match(
    directory: Path, entries: Mapping[str, Entry], leaves: Mapping[trees.Path, Any], reader: tensor_file.Reader
) -> dict[trees.Path, tuple[Entry, Layout]]:
    """The stored array of every leaf; raises with everything that does not fit."""
    keys = {path: hf_keys.key_of(path) for path in leaves if hf_keys.key_of(path)}
    stand_in = _stand_ins(directory, entries, [key for key, _ in keys.values()])
    missing, misshaped, strange, sources = [], [], [], {}
    for path, (key, layout) in keys.items():
        entry, needed = entries.get(stand_in.get(key, key)), layout.stored_shape(leaves[path].shape)
        if entry is None:
            missing.append(key)
        elif entry.shape != needed:
            misshaped.append(f"{key}: got {list(entry.shape)}, needed {list(needed)}")
        elif entry.dtype is None:
            strange.append(f"{key}: {entry.dtype_name}")
        else:
            sources[path] = entry, layout
    known = {key for key, _ in keys.values()}
    rest = [key for key in entries if key not in known and not hf_keys.not_used_yet(key)]
    unexpected = [key for key in rest if hf_keys.tied_to(key) not in entries]
    untied = [
        f"{key} and {twin}"
        for key in rest
        if (twin := hf_keys.tied_to(key)) in entries and not _same(entries[key], entries[twin], reader)
    ]
    problems.check(
        directory,
        {
            "not in the format": [trees.dotted(path) for path in leaves if path not in keys],
            "missing": missing,
            "unexpected": unexpected,
            "of the wrong shape": misshaped,
            f"of a type other than {', '.join(tensor_file.DTYPES)}": strange,
            "tied, yet not equal": untied,
        },
    )
    return sources


def _stand_ins(directory: Path, entries: Mapping[str, Entry], keys: Iterable[str]) -> dict[str, str]:
    """The decoder's layer scalars for the encoder's, if the checkpoint has none of the latter."""
    twins = {key: twin for key in keys if (twin := hf_keys.decoder_scalar(key))}
    if not twins or any(key in entries for key in twins) or not all(twin in entries for twin in twins.values()):
        return {}
    warnings.warn(
        f"{directory} has no layer scalars of the causal pass; those of the denoising pass are used for both",
        stacklevel=4,
    )
    return twins


def _same(one: Entry, other: Entry, reader: tensor_file.Reader) -> bool:
    same_kind = (one.dtype_name, one.shape) == (other.dtype_name, other.shape) and one.dtype is not None
    return same_kind and np.array_equal(finite.bits(reader(one)), finite.bits(reader(other)))


def _place(
    stored: np.ndarray, layout: Layout, leaf: Any, sharding: jax.sharding.Sharding | None, check: bool
) -> tuple[jax.Array, bool]:
    """The leaf's array on its devices, and whether it is finite (True if not looked at)."""
    dtype, good = np.dtype(leaf.dtype), True

    def fetch(index: Any = ...) -> np.ndarray:
        nonlocal good
        part = ready[index]
        if check and not finite.on_host(part):
            good = False
        # An array on a CPU may be the NumPy array itself: one that stays must not be the file.
        return np.array(part) if plain and "cpu" in _platforms(sharding) else part

    turned = layout.from_stored(stored, leaf.shape)
    plain = stored.dtype == dtype and layout is not Layout.SWAPPED
    if plain or stored.nbytes < _ON_HOST:
        with np.errstate(over="ignore"):  # it is looked for in the result
            ready = turned if plain else np.ascontiguousarray(turned).astype(dtype)
        return _put(fetch, ready.shape, sharding), good
    # Large arrays are turned and cast on the device; until then they lie as in the file.
    swap = layout is Layout.SWAPPED
    ready = stored if swap else turned
    raw = _put(fetch, ready.shape, _swapped(sharding) if swap else sharding)
    array = _turn(swap, dtype, sharding)(raw)
    if check and stored.dtype != dtype:
        good = good and bool(finite.on_device(array))
    return array, good


def _put(fetch: Any, shape: tuple[int, ...], sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(fetch())
    return jax.make_array_from_callback(shape, sharding, fetch)


def _platforms(sharding: jax.sharding.Sharding | None) -> set[str]:
    if sharding is not None:
        return {device.platform for device in sharding.device_set}
    device = jax.config.jax_default_device
    return {jax.default_backend() if device is None else getattr(device, "platform", device)}


@functools.lru_cache
def _turn(swap: bool, dtype: np.dtype, sharding: jax.sharding.Sharding | None) -> Any:
    return jax.jit(lambda x: (x.swapaxes(1, 2) if swap else x).astype(dtype), out_shardings=sharding)


def _swapped(sharding: jax.sharding.Sharding | None) -> jax.sharding.Sharding | None:
    if sharding is None or sharding.is_fully_replicated:
        return sharding
    e, f, d = (*sharding.spec, None, None, None)[:3]
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(e, d, f))
