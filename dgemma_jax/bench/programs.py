"""The programs of the released model whose compiled form is watched: (target, name) -> a jitted function and arguments.

Arguments have shapes only, laid on devices that need not exist. bfloat16, context 4,096.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dgemma_jax.bench import targets
from dgemma_jax.config import ModelConfig, SamplerConfig
from dgemma_jax.diffusion import loop, noise, sampler
from dgemma_jax.diffusion.trajectory import Record
from dgemma_jax.nn import cache as kv
from dgemma_jax.nn import quantized, transformer
from dgemma_jax.nn.placement import with_experts
from dgemma_jax.weights import sharding
from dgemma_jax.weights import tree as trees

CONTEXT, PREFILL_CHUNK = 4096, 1024


@dataclasses.dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
        kind: "steps" (the denoising loop; figures are those of one step), "append" (a block joins the cache, which is
            given away), "prefill" (a chunk of a prompt), "gradient" (of one step, in the soft embedding S).
        form, layout: of the experts.
        batch: rows.
        record: "nothing" or "default".
        weights: None for bfloat16, or a format of packed weights.
        spread: whether the weights are split over all chips of the target.
    """

    kind: str
    form: str
    layout: str = "efd"
    batch: int = 1
    record: str = "nothing"
    weights: str | None = None
    spread: bool = False


_GPU = {
    "steps-dense": Program("steps", "dense"),
    "steps-dense-recorded": Program("steps", "dense", record="default"),
    "steps-mosaic": Program("steps", "mosaic"),
    "steps-mosaic-8": Program("steps", "mosaic", batch=8),
    "prefill-mosaic": Program("prefill", "mosaic"),
    "append-mosaic": Program("append", "mosaic"),
    "gradient-dense": Program("gradient", "dense"),
    "gradient-mosaic": Program("gradient", "mosaic"),
    "steps-int8": Program("steps", "auto", weights="int8"),
    "steps-fp8": Program("steps", "auto", weights="fp8"),
    "steps-int4": Program("steps", "auto", weights="int4"),
}
PROGRAMS: dict[str, dict[str, Program]] = {
    "h100": _GPU,
    "h200": _GPU,
    "v5p": {"steps-ragged": Program("steps", "ragged", "edf"), "prefill-ragged": Program("prefill", "ragged", "edf")},
    "v5e-8": {"steps-dense-spread": Program("steps", "dense", spread=True)},
}


def build(target: str, name: str, config: ModelConfig | None = None) -> tuple[Any, tuple, dict]:
    """A jitted function, its arguments and its keywords, for the released model or one of other sizes."""
    program, config = PROGRAMS[target][name], config or ModelConfig()
    model = with_experts(transformer.abstract(config), program.form, program.layout)
    if program.weights:
        model = quantized.quantized(model, program.weights)
    make = {"steps": _steps, "append": _append, "prefill": _prefill, "gradient": _gradient}[program.kind]
    function, model, args, keywords = make(model, program)
    chips = targets.devices(target)
    if not program.spread:
        chip = SingleDeviceSharding(chips[0])
        return function, (laid(model, chip), *(laid(a, chip) for a in args)), keywords
    mesh = Mesh(chips, ("tensor",))  # experts lie along it too
    where, whole = sharding.shardings(model, mesh), NamedSharding(mesh, PartitionSpec())
    split = {path: laid(leaf, where[path]) for path, leaf in trees.leaves(model).items()}
    return function, (trees.replace(model, split), *(laid(a, whole) for a in args)), keywords


def laid(tree: Any, where: jax.sharding.Sharding) -> Any:
    """The shapes of a tree on devices; what is no array stays as it is."""

    def on(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) if hasattr(x, "shape") else x

    return jax.tree.map(on, tree)


def _cache(config: ModelConfig, program: Program) -> Any:
    return jax.eval_shape(lambda: kv.empty(config, program.batch, CONTEXT, jnp.bfloat16))


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _steps(model: Any, program: Program) -> tuple:
    config, settings = model.config, SamplerConfig()
    record = Record() if program.record == "default" else Record.nothing()

    def before(model: Any) -> sampler.State:
        keys, none = noise.row_keys(jnp.zeros(program.batch, jnp.uint32)), jnp.zeros(program.batch, bool)
        return sampler.start(keys, jnp.zeros(program.batch, jnp.int32), none, config.canvas_length, model)

    state, cache = jax.eval_shape(lambda: before(model)), _cache(config, program)
    buffers = jax.eval_shape(
        lambda m, s, c: loop.empty_buffers(m, s, c, settings, None, record), model, state, cache
    )
    return loop._while, model, (state, cache, buffers, settings, None, _ints(), _ints()), {"record": record}


def _causal(model: Any, program: Program, length: int) -> tuple:
    shape = (program.batch, length)

    @functools.partial(jax.jit, donate_argnums=3)
    def causal(model, tokens, valid, cache):
        return model.prefill(tokens, valid, cache).cache

    return causal, model, (_ints(*shape), jax.ShapeDtypeStruct(shape, bool), _cache(model.config, program)), {}


def _append(model: Any, program: Program) -> tuple:
    return _causal(model, program, model.config.canvas_length)


def _prefill(model: Any, program: Program) -> tuple:
    return _causal(model, program, PREFILL_CHUNK)


def _gradient(model: Any, program: Program) -> tuple:
    """Of the mean log-probability of the canvas' own tokens after one step."""
    canvas = _ints(program.batch, model.config.canvas_length)
    soft = jax.ShapeDtypeStruct((*canvas.shape, model.config.embed_dim), jnp.bfloat16)

    @jax.jit
    def gradient(model, canvas, cache, soft):
        def told(soft):
            logits = model.unembed(model.denoise(canvas, cache, soft))
            chosen = jnp.take_along_axis(logits, canvas[..., None], -1)[..., 0]
            return jnp.mean(chosen - jax.nn.logsumexp(logits, -1))

        return jax.grad(told)(soft)

    return gradient, model, (canvas, _cache(model.config, program), soft), {}
