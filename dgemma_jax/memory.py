"""Whether a model fits: bytes of weights, cache and temporaries on each device, calculated from shapes.

Nothing is allocated or compiled. Temporaries are an estimate: a denoising step of the release holds 1.5 arrays [C, V]
of float32 for one row and 2.6 for each of eight (compiled for an H200).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dgemma_jax.config import ModelConfig
from dgemma_jax.nn import cache, meshes, quantized, transformer
from dgemma_jax.nn.packed import FORMS
from dgemma_jax.weights import sharding, tree

CONTEXTS = {"4k": 4096, "32k": 32_768, "256k": 262_144}
# Memory of one device in GB of 1e9 bytes, as sold.
DEVICES = {
    "T4": 16,
    "TPU v5e": 16,
    "L4, RTX 4090": 24,
    "TPU v6e": 32,
    "A100 40 GB": 40,
    "A100, H100 80 GB": 80,
    "TPU v5p": 95,
    "H200": 141,
    "B200": 192,
}
USABLE = 0.92  # share of a device that a program gets
DTYPES = ("float32", "bfloat16", "float16")
KINDS = ("bfloat16", "fp8", "int8", "int4")  # from large to small; what is proposed where something does not fit
LOGITS_HELD = 2.6  # float32 arrays [C, V] a row alive at once in a denoising step


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes on the fullest device."""

    weights: int
    cache: int = 0
    temporaries: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.temporaries

    def __str__(self) -> str:
        parts = [("weights", self.weights), ("cache", self.cache), ("temporaries", self.temporaries)]
        return f"{amount(self.total)} ({', '.join(f'{name} {amount(n)}' for name, n in parts if n)})"


def needed(
    config: ModelConfig, kind: str = "bfloat16", batch: int = 1, context: int = 0, mesh: Mesh | None = None
) -> Need:
    """What generation needs on each device.

    Args:
        kind: a dtype, or "int8", "int4", "fp8": packed weights, all else in bfloat16.
        batch: rows at once.
        context: tokens a row can hold, prompt and answer; 0 counts the weights alone.
        mesh: any of the axes "data", "expert", "tensor"; None is one device. An `AbstractMesh` will do.
    """
    compute = jnp.dtype(kind if kind in DTYPES else "bfloat16")
    return with_rows(weight_bytes(config, kind, _axes(mesh)), config, compute, batch, context, mesh)


def with_rows(weights: int, config: ModelConfig, dtype: Any, batch: int, context: int, mesh: Mesh | None) -> Need:
    """What rows need beside the bytes of the weights."""
    if not context:
        return Need(weights)
    rows = -(-batch // meshes.ways(mesh))
    return Need(weights, rows * _cache(config, context, jnp.dtype(dtype), meshes.ways(mesh, "tensor")),
                math.ceil(rows * LOGITS_HELD * logits_bytes(config)))  # fmt: skip


def _axes(mesh: Any) -> tuple[tuple[str, int], ...]:
    return () if mesh is None else tuple(mesh.shape.items())


@functools.cache
def weight_bytes(config: ModelConfig, kind: str, axes: tuple[tuple[str, int], ...] = ()) -> int:
    """Bytes of all weights in a dtype, or in a packed format with the rest in bfloat16, on each device of a mesh.

    Args:
        axes: names and sizes of the axes of the mesh; none is one device.
    """
    model = transformer.abstract(config, jnp.dtype(kind if kind in DTYPES else "bfloat16"))
    if kind not in DTYPES:
        model = quantized.quantized(model, kind)
    return _sum(sharding.shapes(model, dict(axes)).values(), (x.dtype for x in jax.tree.leaves(model)))


def _sum(shapes: Iterable[tuple[int, ...]], dtypes: Iterable[Any]) -> int:
    """Bytes, two values of int4 to a byte."""
    bits = (4 if dtype == jnp.int4 else 8 * dtype.itemsize for dtype in dtypes)
    return sum(math.prod(shape) * each for shape, each in zip(shapes, bits, strict=True)) // 8


@functools.cache
def _cache(config: ModelConfig, tokens: int, dtype: Any, ways: int = 1) -> int:
    shapes = jax.eval_shape(lambda: cache.empty(config, 1, tokens, dtype).layers)
    return sum(x.size * x.dtype.itemsize // (1 if x.shape[1] % ways else ways) for x in jax.tree.leaves(shapes))


def cache_bytes(config: ModelConfig, tokens: int, dtype: str = "bfloat16") -> int:
    """Bytes of the key-value cache of one row that can hold `tokens`."""
    return _cache(config, tokens, jnp.dtype(dtype))


def cache_bytes_per_token(config: ModelConfig, dtype: str = "bfloat16") -> int:
    """Bytes that one more token costs once the sliding layers are full."""
    full = config.sliding_window
    return cache_bytes(config, full + 1, dtype) - cache_bytes(config, full, dtype)


def logits_bytes(config: ModelConfig) -> int:
    """Bytes of one float32 array [C, V] of one row."""
    return config.canvas_length * config.vocab_size * 4


@functools.cache
def parameters(config: ModelConfig) -> dict[str, int]:
    """Number of parameters by part of the model."""
    owners = {
        "embedder": "embedding",
        "self_conditioning": "self-conditioning",
        "attention": "attention",
        "mlp": "dense MLP",
        "router": "router",
        "experts": "experts",
    }
    found = dict.fromkeys([*owners.values(), "norms, scalars"], 0)
    for path, leaf in tree.leaves(transformer.abstract(config)).items():
        owner = path[2] if path[0] == "layers" else path[0]
        found[owners.get(owner, "norms, scalars")] += math.prod(leaf.shape)
    return found


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token meets: all but the experts not chosen."""
    idle = 1 - config.experts_per_token / config.num_experts
    return config.num_parameters - round(idle * parameters(config)["experts"])


def devices_needed(config: ModelConfig, kind: str, context: int) -> dict[str, int]:
    """How many of each accelerator hold one row, the weights spread evenly."""
    total = needed(config, kind, context=context).total
    return {name: math.ceil(total / (size * 1e9 * USABLE)) for name, size in DEVICES.items()}


def limit(devices: Iterable[Any]) -> int | None:
    """Bytes that programs may take on the smallest of these devices; None where they do not say (CPU)."""
    own = [device for device in devices if device.process_index == jax.process_index()]
    said = [(device.memory_stats() or {}).get("bytes_limit") for device in own]
    return min(said) if said and None not in said else None


def check_load(config: ModelConfig, kind: str, mesh: Mesh | None) -> None:
    """Raise a `ValueError` if the weights do not fit their devices; says what would."""
    devices = [_default_device()] if mesh is None else mesh.devices.flat
    room = limit(devices)
    need = None if room is None else needed(config, kind, mesh=mesh)
    if need is not None and need.total > room:
        raise ValueError(f"the weights in {kind} need {need} on each device, which has {amount(room)}; "
                         f"{_proposed(config, kind, mesh, room)}")  # fmt: skip


def check_generate(model: Any, batch: int, context: int) -> None:
    """Raise a `ValueError` if rows do not fit beside the model's weights; says what would. Before compiling."""
    mesh, config = meshes.of(model), model.config
    leaves = [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array)]
    room = limit(leaves[0].sharding.device_set) if leaves else None
    if room is None:
        return
    weights = _sum((x.sharding.shard_shape(x.shape) for x in leaves), (x.dtype for x in leaves))
    need = with_rows(weights, config, model.dtype, batch, context, mesh)
    if need.total <= room:
        return
    own = with_rows(weights, config, model.dtype, meshes.ways(mesh), context, mesh)
    rows = max(0, room - weights) // (own.total - weights) * meshes.ways(mesh)
    fits = f"{rows} rows at once fit" if rows else "not even one row fits"
    kind = quantized.packed_form(model) or str(model.dtype)
    raise ValueError(f"{batch} rows of {context} tokens need {need} on each device, which has {amount(room)}; {fits}; "
                     f"{_proposed(config, kind, mesh, room, batch, context)}")  # fmt: skip


def _proposed(
    config: ModelConfig, kind: str, mesh: Mesh | None, room: int, batch: int = 1, context: int = 0
) -> str:  # fmt: skip
    """What would fit instead, in words: fewer bits, more devices."""
    now, found = needed(config, kind, mesh=mesh).total, []
    for other in KINDS:
        need = needed(config, other, batch, context, mesh)
        if need.weights < now and need.total <= room:
            found.append(f"quantize={other!r} needs {amount(need.total)}" if other in FORMS
                         else f"dtype={other!r} needs {amount(need.total)}")  # fmt: skip
    for axis in ("expert", "tensor", *(["data"] if batch > 1 else [])):
        for size in (2, 4, 8, 16):
            wide = jax.sharding.AbstractMesh((size,), (axis,))
            try:
                sharding.check_sizes(wide.shape, config)
            except ValueError:
                continue
            need = needed(config, kind, batch, context, wide)
            if (mesh is None or size > mesh.size) and need.total <= room:
                found.append(f"a mesh of {axis}={size} needs {amount(need.total)} on each device")
                break
    return "what fits: " + "; ".join(found) if found else "no smaller form of it fits: take larger devices"


def _default_device() -> Any:
    device = jax.config.jax_default_device
    return device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0]


def amount(count: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
