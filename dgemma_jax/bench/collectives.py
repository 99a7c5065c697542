"""What devices of a mesh tell each other in one denoising step: the collectives of the compiled program.

Only shapes are given, so a model of any size can be asked about, on virtual devices too.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dgemma_jax.config import ModelConfig, SamplerConfig
from dgemma_jax.diffusion import noise
from dgemma_jax.diffusion import sampler as sampling
from dgemma_jax.nn import meshes, transformer
from dgemma_jax.weights import sharding
from dgemma_jax.weights import tree as trees

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_CALL = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\((.*)")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: one of `KINDS`.
        nbytes: of its result on each device.
        where: the operation it came from, as the compiler names it.
    """

    kind: str
    nbytes: int
    where: str


def listed(compiled: Any) -> list[Collective]:
    """The collectives of a compiled function, in the order of its text; each stands once, also within a loop."""
    found = []
    for line in compiled.as_text().splitlines():
        call = _CALL.search(line)
        if call is None:
            continue
        result, kind, started, _ = call.groups()
        sizes = [math.prod(map(int, filter(None, dims.split(",")))) * max(1, int(bits or 8) // 8)
                 for bits, dims in _ARRAY.findall(result)]  # fmt: skip
        if started and kind != "all-reduce":  # the operands stand before the results
            sizes = sizes[len(sizes) // 2 :]
        name = _NAME.search(line)
        found.append(Collective(kind, sum(sizes), name.group(1) if name else ""))
    return found


def totals(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """{kind: (how many, bytes)}."""
    found = list(found)
    alike = {kind: [one.nbytes for one in found if one.kind == kind] for kind in KINDS}
    return {kind: (len(sizes), sum(sizes)) for kind, sizes in alike.items() if sizes}


def of_step(
    config: ModelConfig, mesh: Mesh, rows: int = 1, context: int = 256, dtype: Any = jnp.bfloat16
) -> list[Collective]:
    """The collectives of one denoising step of a model on a mesh. Nothing is allocated.

    Args:
        rows: prompts.
        context: tokens that the cache can hold.
    """
    mesh = sharding.check(mesh, config)
    model = sharding.on_mesh(transformer.abstract(config, jnp.dtype(dtype)), mesh)
    where = sharding.shardings(model, mesh)
    model = trees.replace(model, {p: _lying(x, where[p]) for p, x in trees.leaves(model).items()})
    cache = jax.eval_shape(lambda: meshes.empty_cache(config, rows, context, dtype, None))
    cache = jax.tree.map(_lying, cache, meshes.cache_shardings(cache, mesh))

    def start() -> sampling.State:
        zero = jnp.zeros(rows, jnp.int32)
        return sampling.start(noise.row_keys(jnp.arange(rows)), zero, zero.astype(bool), config.canvas_length, model)

    spec = PartitionSpec("data" if rows % meshes.ways(mesh) == 0 and "data" in mesh.shape else None)
    state = jax.tree.map(lambda x: _lying(x, NamedSharding(mesh, spec)), jax.eval_shape(start))
    step = jax.jit(lambda model, state, cache: sampling.denoise_step(model, state, cache, SamplerConfig())[0])
    return listed(step.lower(model, state, cache).compile())


def _lying(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def table(found: Sequence[Collective]) -> str:
    """The totals as text."""
    return "\n".join(f"{kind:20} {count:4} {size / 1e6:10.2f} MB" for kind, (count, size) in totals(found).items())
