"""A model with what belongs to it: configuration, tokenizer, sampler; loaded from and saved to a directory."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax import memory, weights
from dgemma_jax.config import ModelConfig, SamplerConfig
from dgemma_jax.nn import placement, quantized, transformer
from dgemma_jax.weights import finite, hf, hub, orbax, problems, registry, settings, sharding
from dgemma_jax.weights import tree as trees

if TYPE_CHECKING:
    from dgemma_jax.text.tokenizer import Tokenizer

FORMATS = ("hf", "orbax")
_DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """A model and what belongs to it. Nothing in it is ever changed.

    Attributes:
        config: sizes of the model.
        model: the parameters, a pytree; possibly edited.
        tokenizer: None if the directory has none.
        sampler: how `generate` samples unless told otherwise.
        source: where it was loaded from, or None.
    """

    config: ModelConfig
    model: transformer.Transformer = dataclasses.field(repr=False)
    tokenizer: Tokenizer | None = None
    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)
    source: str | None = None

    def with_model(self, model: Any) -> Bundle:
        """The same bundle around another (edited, trained) model."""
        return dataclasses.replace(self, model=model)

    def with_sampler(self, sampler: SamplerConfig | None = None, **changes: Any) -> Bundle:
        """The same bundle with another sampler, or some of its options changed."""
        return dataclasses.replace(self, sampler=(sampler or self.sampler).replace(**changes))

    def on(self, mesh: jax.sharding.Mesh) -> Bundle:
        """The same bundle laid over a mesh, as `load(mesh=)` does: all that takes it then runs there."""
        return self.with_model(sharding.placed(self.model, sharding.check(mesh, self.config)))

    def quantized(self, form: str) -> Bundle:
        """The same bundle with its large weights in "int8", "int4" or "fp8"; see `nn.quantized`."""
        return self.with_model(quantized.quantized(self.model, form))

    def with_experts(self, form: str | None = None, layout: str | None = None) -> Bundle:
        """The same bundle with its experts run in another form or lying otherwise; see `nn.placement`."""
        return self.with_model(placement.with_experts(self.model, form, layout))

    def check_finite(self) -> Bundle:
        """This bundle, if all weights are finite; looks once at each model object.

        Raises:
            ValueError: names the leaves that hold an infinity or NaN.
        """
        if id(self.model) in _FINITE and _FINITE[id(self.model)]() is self.model:
            return self
        found = trees.leaves(self.model)
        floats = {p: x for p, x in found.items() if jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize > 1}
        good = _all_finite(list(floats.values()))
        bad = [trees.dotted(path) for path, fine in zip(floats, good, strict=True) if not fine]
        if bad:
            raise ValueError(f"the model has non-finite weights in {problems.counted(bad)}")
        name = id(self.model)
        _FINITE[name] = weakref.ref(self.model, lambda _: _FINITE.pop(name, None))
        return self


# Models found finite, by identity: modules are never changed, so once is enough.
_FINITE: dict[int, weakref.ref] = {}


def _all_finite(arrays: list[jax.Array]) -> list[bool]:
    """Whether each array is finite. What lies in the host's memory is looked at there, without compiling."""
    if all(isinstance(x, np.ndarray) or _is_on_host(x) for x in arrays):
        return [finite.on_host(np.asarray(x)) for x in arrays]
    return jax.device_get(_finite_on_device(arrays))


def _is_on_host(array: jax.Array) -> bool:
    return array.is_fully_addressable and all(device.platform == "cpu" for device in array.devices())


@jax.jit
def _finite_on_device(arrays: list[jax.Array]) -> list[jax.Array]:
    return [finite.on_device(x) for x in arrays]


def load(
    source: str | Path,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    quantize: str | None = None,
    experts: str | None = None,
    revision: str | None = None,
    config: ModelConfig | None = None,
    check_finite: bool = True,
    progress: bool | None = None,
) -> Bundle:
    """The model of a name, a directory or a hub id, with its tokenizer and sampler.

    >>> bundle = load("nano")  # doctest: +SKIP

    Args:
        source: an embedded model ("nano"), a directory in the layout of Hugging Face or Orbax (this package's or
            Google's), or a hub id, which is downloaded once.
        dtype: "bfloat16", "float32" or "float16"; None keeps what is stored.
        mesh: lays weights along its axes "expert" and "tensor" and rows of a batch along "data" (any of the three);
            each process reads its own part of the files. See `weights.sharding`. The model knows its mesh: whatever
            takes the bundle runs there.
        quantize: "int8", "int4" or "fp8" packs the large weights as they are read; computed is in `dtype`.
        experts: how they run, one of `nn.moe.FORMS`; None takes what suits the device. How their weights lie follows
            the device in any case.
        revision: commit, tag or branch of a hub id; known models are pinned.
        config: for a directory without `config.json` (Google's Orbax tree), or instead of it.
        check_finite: refuse infinities and NaNs.
        progress: a bar; None shows it for a gigabyte or more.

    Raises:
        ValueError: nothing is found there, or it does not fit; the message lists all that is wrong. The weights are
            larger than the devices' memory, where these say how much they have.
    """
    wanted = None if dtype is None else float_dtype(dtype)
    quantized.check_form(quantize)
    placement.check_form(experts)
    directory = locate(source, revision)
    is_orbax = orbax.root(directory) is not None
    config = config or (orbax if is_orbax else settings).read_config(directory)
    mesh = None if mesh is None else sharding.check(mesh, config)
    packed = settings.read_packed(directory)
    if packed and quantize not in (None, packed["form"]):
        raise ValueError(f"{directory} holds weights in {packed['form']}; load them as they are, without {quantize!r}")
    if wanted is None and packed:
        wanted = float_dtype(packed["dtype"])
    if wanted is None:
        wanted = orbax.stored_dtype(directory) if is_orbax else hf.stored_dtype(hf.find(directory))
    memory.check_load(config, (packed or {}).get("form") or quantize or wanted.name, mesh)
    target = sharding.on_mesh(transformer.abstract(config, wanted), mesh)
    if packed:
        target = quantized.quantized(target, packed["form"])
    model = (weights.load_orbax if is_orbax else weights.load_hf)(
        directory,
        target,
        shardings=None if mesh is None else sharding.shardings(target, mesh),
        check_finite=check_finite,
        progress_bar=progress,
        packer=quantized.Packer(quantize) if quantize and not packed else None,
    )
    form, layout = placement.best_for(jax.tree.leaves(model)[0].devices())
    placement.place(model, experts or form, "efd" if quantized.packed_form(model) else layout)
    return Bundle(
        config=config,
        model=model,
        tokenizer=_tokenizer(directory),
        sampler=settings.read_sampler(directory, config),
        source=str(directory),
    )


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The local directory of a name, path or hub id; downloads the latter if need be."""
    if isinstance(source, str) and (embedded := registry.embedded(source)):
        return embedded
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file; give the directory that holds the checkpoint")
    if isinstance(source, str) and hub.plausible(source):
        return hub.fetch(source, revision)
    raise ValueError(
        f"{str(source)!r} is no directory, no known name ({', '.join(registry.names())}) and no hub id ('owner/name')"
    )


def float_dtype(dtype: Any) -> np.dtype:
    """The dtype named by "bfloat16", `jnp.bfloat16` and the like.

    Raises:
        ValueError: it is none that weights can have.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}") from error
    if found.name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return found


def save(bundle: Bundle, directory: str | Path, format: str = "hf", **options: Any) -> None:
    """Write the bundle so that `load` gives it back, and for "hf" so that `transformers` loads it too.

    Args:
        bundle: its model must have no edits in place: they have no name in the formats.
        directory: made if need be; a checkpoint in it is replaced.
        format: "hf" or "orbax".
        **options: of `weights.save_hf` (`dtype`, `max_shard_size`, ...) or `weights.save_orbax`.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    form = quantized.packed_form(bundle.model)
    if isinstance(bundle.model, transformer.Transformer):
        bundle = bundle.with_experts(layout="efd")  # as in the formats
    if format == "orbax":
        packed = {"form": form, "dtype": str(bundle.model.dtype)} if form else None
        weights.save_orbax(
            directory, bundle.model, bundle.config, bundle.sampler, bundle.tokenizer, packed=packed, **options
        )
        return
    if form:
        raise ValueError(f"the model's weights are in {form}, which format 'hf' has no names for; use format='orbax'")
    if "vision_from" not in options and bundle.config.vision is not None and _has_tower(bundle.source):
        options["vision_from"] = bundle.source
    weights.save_hf(directory, bundle.model, bundle.config, bundle.sampler, bundle.tokenizer, **options)


def convert(
    source: str | Path, destination: str | Path, *, format: str = "hf", dtype: Any = None,
    quantize: str | None = None, **options: Any,
) -> None:  # fmt: skip
    """Write the checkpoint at `source` in another format or dtype, or with its weights in few bits (Orbax only)."""
    if quantize is not None and format != "orbax":
        raise ValueError(f"weights in few bits are written in format 'orbax' only, got {format!r}")
    save(load(source, dtype=dtype, quantize=quantize), destination, format, **options)


def _tokenizer(directory: Path) -> Tokenizer | None:
    if not (directory / "tokenizer.json").is_file():
        return None
    from dgemma_jax.text.tokenizer import Tokenizer

    return Tokenizer.from_directory(directory)


def _has_tower(source: str | None) -> bool:
    return source is not None and any((Path(source) / name).is_file() for name in (hf.SINGLE, hf.INDEX))
