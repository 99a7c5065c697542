"""Orbax checkpoints: this package's own (`config.json` beside a folder `weights`) and Google's tree.

Arrays are restored a layer at a time, straight to their shardings.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.config import ModelConfig, SamplerConfig
from dgemma_jax.weights import finite, google, hf_keys, problems, progress, publish, settings
from dgemma_jax.weights import tree as trees

CHUNK = 16 << 20  # bytes of a stored piece, about: who reads a slice of an array reads whole pieces
_MARK = "_METADATA"  # every folder of an Orbax tree has this file


def root(directory: Path) -> Path | None:
    """The folder of the arrays: the directory itself or the one folder in it that is an Orbax tree."""
    if (directory / _MARK).is_file():
        return directory
    found = [child for child in sorted(directory.iterdir()) if (child / _MARK).is_file()]
    return found[0] if len(found) == 1 else None


def read_config(directory: Path) -> ModelConfig:
    """The `config.json` of the directory or beside it; for Google's tree without one, the sizes of the release."""
    file = _config_file(directory)
    if file is None and google.recognised(list(_arrays(directory))):
        return ModelConfig()
    return settings.read_config(file.parent if file else directory)


def _config_file(directory: Path) -> Path | None:
    files = (place / settings.CONFIG for place in (directory, directory.parent))
    return next((file for file in files if file.is_file()), None)


def stored_dtype(directory: Path) -> np.dtype:
    """The type of the embedding table."""
    arrays = _arrays(directory)
    for path in arrays:
        if path == ("embedder", "table") or google.name_of(path) == google.TABLE:
            return np.dtype(arrays[path].dtype)
    return np.dtype(jnp.bfloat16)


def save_orbax(
    directory: str | Path,
    tree: Any,
    config: ModelConfig,
    sampler: SamplerConfig | None = None,
    tokenizer: Any = None,
    *,
    dtype: Any = None,
    packed: Mapping[str, str] | None = None,
) -> None:
    """Write the weights as Orbax arrays, sharded as they are, with settings and tokenizer beside them.

    Args:
        directory: made if need be; an older checkpoint in it is replaced when the new one is whole.
        tree: the model; its leaves must be those of the format.
        config, sampler, tokenizer: as in `save_hf`.
        dtype: storage type; None keeps that of each leaf.
        packed: what `settings.read_packed` shall give back, for a model with packed weights.
    """
    leaves = trees.leaves(tree)
    parts = ("values", "scale") if packed else ()
    foreign = [
        trees.dotted(path)
        for path in leaves
        if hf_keys.key_of(path) is None and not (path[-1] in parts and hf_keys.key_of(path[:-1]))
    ]
    if foreign:
        raise ValueError(f"the format has no place for {problems.counted(foreign)}; save the model without edits")
    if dtype is not None and packed:
        raise ValueError(f"the weights are packed ({packed['form']}): they have no other storage type, got {dtype!r}")
    if dtype is not None:
        leaves = {path: leaf.astype(dtype) for path, leaf in leaves.items()}
    leader = jax.process_index() == 0
    with publish.staged(Path(directory), leader) as stage:
        with _checkpointer() as checkpointer:
            checkpointer.save((stage / publish.ORBAX).absolute(), args=_saving(leaves))
        if leader:
            stored = packed["dtype"] if packed else str(leaves[("embedder", "table")].dtype)
            settings.write(stage, config, sampler, stored, packed)
            if tokenizer is not None:
                tokenizer.save(stage)
    if jax.process_count() > 1:  # all return when the checkpoint is in its place
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("saved")


def _saving(leaves: Mapping[trees.Path, Any]) -> Any:
    """What Orbax is asked to write: large arrays in pieces, experts one by one, so that a host reads its own alone."""
    import orbax.checkpoint as ocp

    def pieces(path: trees.Path, leaf: Any) -> ocp.SaveArgs:
        if leaf.size * leaf.dtype.itemsize <= CHUNK:
            return ocp.SaveArgs()
        return ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=(0,) if "experts" in path else ())

    how = {path: pieces(path, leaf) for path, leaf in leaves.items()}
    return ocp.args.PyTreeSave(_nest(leaves), save_args=_nest(how))


def load_orbax(
    directory: str | Path,
    tree: Any,
    *,
    shardings: Mapping[trees.Path, jax.sharding.Sharding] | None = None,
    check_finite: bool = True,
    progress_bar: bool | None = None,
    packer: Any = None,
) -> Any:
    """The tree with the weights of the checkpoint, each in the dtype of the leaf it replaces.

    Arguments and errors as in `load_hf`. Google's tree is known by its names.
    """
    directory = Path(directory)
    arrays, leaves = _arrays(directory), trees.leaves(tree)
    jobs = _match(directory, arrays, leaves)
    shardings = shardings or {}
    loaded: dict[trees.Path, Any] = {}
    packed: dict[trees.Path, Any] = {}
    good: dict[trees.Path, jax.Array] = {}
    sizes = {path: int(np.prod(arrays[path].shape)) * np.dtype(arrays[path].dtype).itemsize for path in jobs}
    with progress.bar(f"Loading {directory.name}", sum(sizes.values()), progress_bar) as advance:
        for _, group in itertools.groupby(jobs, key=lambda path: _layer(jobs[path])):
            paths = list(group)
            dtypes = {path: leaves[jobs[path].parts[0].path].dtype for path in paths}
            targets = {path: _target(arrays[path], jobs[path], dtypes[path], shardings) for path in paths}
            restored = _restore(directory, targets)
            for path in paths:
                array = restored.pop(path)
                for part in jobs[path].parts:
                    shape, sharding = leaves[part.path].shape, shardings.get(part.path)
                    loaded[part.path] = _taking(jobs[path].axes, part.axes, part.half, shape, sharding)(array)
                    good[part.path] = _is_finite(loaded[part.path]) if check_finite else True
                    if packer is not None and packer.wants(part.path):
                        packed[part.path] = packer.pack(part.path, loaded[part.path])
                        loaded[part.path] = leaves[part.path]
                advance(sizes[path])
    if check_finite:
        good = jax.device_get(good)
        problems.check_finite(directory, [trees.dotted(path) for path in good if not good[path]])
    tree = trees.replace(tree, loaded)
    return packer.install(tree, packed) if packed else tree


def _is_finite(array: jax.Array) -> Any:
    return True if array.dtype.itemsize == 1 else finite.on_device(array)  # packed values have no infinities


def _match(
    directory: Path, arrays: Mapping[trees.Path, Any], leaves: Mapping[trees.Path, Any]
) -> dict[trees.Path, google.Rule]:
    """What becomes of every array that is used, layer by layer; raises with everything that does not fit."""
    theirs = google.recognised(list(arrays))
    names = {path: google.name_of(path) if theirs else trees.dotted(path) for path in arrays}
    names = {path: name for path, name in names.items() if not (theirs and google.not_used_yet(name))}
    rules = {path: google.rule_of(name) if theirs else _own(path, arrays[path].shape) for path, name in names.items()}
    fitting = {path: rule for path, rule in rules.items() if rule and all(part.path in leaves for part in rule.parts)}
    misshaped = [
        f"{names[path]}: got {list(arrays[path].shape)}, needed {list(rule.shape(leaves))}"
        for path, rule in fitting.items()
        if tuple(arrays[path].shape) != rule.shape(leaves)
    ]
    made = {part.path for rule in fitting.values() for part in rule.parts}
    problems.check(
        directory,
        {
            "missing": [trees.dotted(path) for path in leaves if path not in made],
            "unexpected": [name for path, name in names.items() if path not in fitting],
            "of the wrong shape": misshaped,
        },
        "" if _config_file(directory) else "there is no config.json with it: give its sizes with `config=`",
    )
    return dict(sorted(fitting.items(), key=lambda job: _layer(job[1])))


def _own(path: trees.Path, shape: tuple[int, ...]) -> google.Rule:
    """Our tree keeps the leaves as they are."""
    axes = "uvwxyz"[: len(shape)]
    return google.Rule(axes, (google.Part(tuple(int(p) if p.isdigit() else p for p in path), axes),))


def _layer(rule: google.Rule) -> int:
    path = rule.parts[0].path
    return path[1] if path[0] == "layers" else -1


@functools.lru_cache
def _taking(
    axes: str, order: str, half: int | None, shape: tuple[int, ...], sharding: jax.sharding.Sharding | None
) -> Any:
    """The compiled `google.take`; one for all layers."""
    if axes == order.replace("c", ""):
        return lambda array: array
    take = functools.partial(google.take, axes=axes, order=order, half=half, shape=shape)
    return jax.jit(take, out_shardings=sharding)


def _arrays(directory: Path) -> dict[trees.Path, Any]:
    """Shape and dtype of every array by its path."""
    place = root(directory)
    if place is None:
        raise ValueError(f"{directory} holds no single Orbax tree; it holds {problems.listing(directory)}")
    with _checkpointer() as checkpointer:
        metadata = checkpointer.metadata(place.absolute()).item_metadata
    if metadata is None or not jax.tree.leaves(metadata.tree, is_leaf=_is_array):
        raise ValueError(f"{place} has no readable Orbax metadata; the checkpoint is incomplete")
    flat = jax.tree_util.tree_flatten_with_path(metadata.tree, is_leaf=_is_array)[0]
    return {tuple(key.key for key in path): array for path, array in flat}


def _restore(directory: Path, targets: Mapping[trees.Path, jax.ShapeDtypeStruct]) -> dict[trees.Path, jax.Array]:
    """Only these arrays."""
    import orbax.checkpoint as ocp

    item = _nest(targets)
    arguments = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    with _checkpointer() as checkpointer:
        restored = checkpointer.restore(root(directory).absolute(), args=arguments)
    return {path: functools.reduce(lambda node, key: node[key], map(str, path), restored) for path in targets}


def _nest(values: Mapping[trees.Path, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in values.items():
        node = nested
        for key in path[:-1]:
            node = node.setdefault(str(key), {})
        node[str(path[-1])] = value
    return nested


def _target(array: Any, rule: google.Rule, dtype: Any, shardings: Mapping[trees.Path, Any]) -> jax.ShapeDtypeStruct:
    sharding = rule.sharding(shardings) or jax.sharding.SingleDeviceSharding(_default_device())
    return jax.ShapeDtypeStruct(tuple(array.shape), dtype, sharding=sharding)


def _default_device() -> jax.Device:
    return next(iter(jnp.zeros(()).devices()))


def _is_array(node: Any) -> bool:
    return hasattr(node, "shape")


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        yield checkpointer
