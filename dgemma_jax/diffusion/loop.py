"""The denoising of one block: the same step in a compiled `while_loop` and in a Python loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import noise
from dgemma_jax.diffusion.sampler import State, denoise_step
from dgemma_jax.diffusion.trajectory import Record, StepView
from dgemma_jax.nn import functional, meshes
from dgemma_jax.nn.cache import KVCache

Buffers = dict[str, Any]  # by field of `Trajectory`: pytrees [R, B, ...]


def recorded(record: Record, before: State, after: State, view: StepView, sampler: SamplerConfig) -> Buffers:
    """What the record keeps of one step, pytrees [B, ...]."""
    kept: Buffers = {"valid": ~before.done, "temperature": noise.temperature(before.step, sampler)}
    if record.tokens:
        kept["tokens"] = after.canvas
    if record.argmax:
        kept["argmax"] = after.argmax
    if record.accepted:
        kept["accepted"] = view.accepted
    if record.entropy:
        kept["entropy"] = view.entropy
    if record.top_k:
        top, kept["top_ids"] = jax.lax.top_k(view.shaped_logits, record.top_k)
        kept["top_probs"] = jnp.exp(top - jax.nn.logsumexp(view.shaped_logits, -1, keepdims=True))
    if record.soft:
        kept["soft"] = after.soft
    if record.fn is not None:
        kept["fn"] = record.fn(view)
    if view.sites:
        kept["sites"] = view.sites
    return kept


@functools.partial(jax.jit, static_argnames="record", inline=True)  # traced once for `_zeros` and for the loop
def _step(model, state, cache, sampler, pinned, record) -> tuple[State, Buffers]:
    after, view = denoise_step(model, state, cache, sampler, pinned)
    return after, recorded(record, state, after, view, sampler)


def empty_buffers(
    model: Any, state: State, cache: KVCache, sampler: SamplerConfig, pinned: Any, record: Record
) -> Buffers:
    """Zeros for `max_denoising_steps` steps of what the record keeps.

    Captured sites have slots for the kept steps and one more, which takes the others; `slot` [R] says where.
    """
    total = sampler.max_denoising_steps
    chosen = range(total) if record.site_steps is None else record.site_steps
    buffers = _zeros(model, state, cache, sampler, pinned, record=record, kept=len(chosen))
    if "sites" in buffers:
        slot = np.full(total, len(chosen), np.int32)
        slot[list(chosen)] = np.arange(len(chosen))
        buffers["slot"] = jnp.asarray(slot)
    return buffers


@functools.partial(jax.jit, static_argnames=("record", "kept"))  # only the first block of a run traces the model here
def _zeros(model, state, cache, sampler, pinned, *, record, kept) -> Buffers:
    _, shapes = _step.eval_shape(model, state, cache, sampler, pinned, record)  # as `body` calls it: one trace
    steps = {name: kept + 1 if name == "sites" else sampler.max_denoising_steps for name in shapes}
    zeros = {n: jax.tree.map(lambda s, n=n: jnp.zeros((steps[n], *s.shape), s.dtype), shapes[n]) for n in shapes}
    batch = state.canvas.shape[0]
    lay = functools.partial(meshes.rows, mesh=meshes.of(model), axis=1)
    return jax.tree.map(lambda x: lay(x) if x.shape[1:2] == (batch,) else x, zeros)


def _write(buffers: Buffers, index: jax.Array, kept: Buffers) -> Buffers:
    """Put one step into the buffers; rows that did not take it stay zero."""
    took = kept["valid"]

    def put(at: jax.Array, buffer: jax.Array, value: jax.Array) -> jax.Array:
        per_row = value.ndim and value.shape[0] == took.shape[0]
        mask = took.reshape(-1, *[1] * (value.ndim - 1)) if per_row else True
        return buffer.at[at].set(jnp.where(mask, value, jnp.zeros_like(value)))

    places = {name: buffers["slot"][index] if name == "sites" else index for name in kept}
    return buffers | {n: jax.tree.map(functools.partial(put, places[n]), buffers[n], kept[n]) for n in kept}


def fetched(buffers: Buffers) -> Buffers:
    """The buffers on the host, as `Trajectory` has them: without the slot for steps that are not kept."""
    host = meshes.to_host(buffers)
    if "slot" in host:
        slot = host.pop("slot")
        host["site_steps"] = np.flatnonzero(slot < len(jax.tree.leaves(host["sites"])[0]) - 1)
        host["sites"] = jax.tree.map(lambda a: a[:-1], host["sites"])
    return host


@functools.partial(jax.jit, static_argnames="record")
def _while(model, state, cache, buffers, sampler, pinned, index, limit, least=None, *, record):
    model = functional.of(model)

    def going(carry):
        index, state, _ = carry
        goes_on = jnp.any(~state.done) if least is None else jnp.sum(~state.done) >= least
        return (index < limit) & goes_on

    def body(carry):
        index, state, buffers = carry
        state, kept = _step(model, state, cache, sampler, pinned, record)
        return index + 1, state, _write(buffers, index, kept)

    return jax.lax.while_loop(going, body, (index, state, buffers))


@functools.partial(jax.jit, static_argnames="record")
def _once(model, state, cache, buffers, sampler, pinned, index, *, record):
    after, kept = _step(model, state, cache, sampler, pinned, record)
    return after, _write(buffers, index, kept)


def compiled(
    model: Any, state: State, cache: KVCache, buffers: Buffers, sampler: SamplerConfig, pinned: Any, record: Record,
    *, first: int, limit: int, draft: Callable[[State, Buffers, int], None] | None = None, every: int = 1,
    program: Callable = _while,
) -> tuple[State, Buffers]:  # fmt: skip
    """Denoise from step `first` until all rows are done or step `limit`, in one compiled loop.

    With a `draft` function the loop returns to Python after every `every` steps; `limit` is data, so there is
    still one compile. `program` is the loop itself, if it comes from elsewhere.
    """
    index = first
    while index < limit and not meshes.to_host(state.done).all():
        stop = limit if draft is None else min(index + every, limit)
        taken, state, buffers = program(
            model, state, cache, buffers, sampler, pinned, np.int32(index), np.int32(stop), record=record
        )
        index = int(taken)
        if draft is not None:
            draft(state, buffers, index - 1)
    return state, buffers


def some(
    model: Any, state: State, cache: KVCache, buffers: Buffers, sampler: SamplerConfig, record: Record, *, least: int
) -> tuple[jax.Array, State, Buffers]:  # fmt: skip
    """The same loop for rows that are at steps of their own: until fewer than `least` go on, or the buffers are full.

    Returns:
        Steps taken, which are the first of the buffers; the state; the buffers. Nothing is waited for.
    """
    limit = np.int32(buffers["valid"].shape[0])
    return _while(model, state, cache, buffers, sampler, None, np.int32(0), limit, np.int32(least), record=record)


def python(
    model: Any, state: State, cache: KVCache, buffers: Buffers, sampler: SamplerConfig, pinned: Any, record: Record,
    *, first: int, limit: int, draft: Callable[[State, Buffers, int], None] | None = None, every: int = 1,
) -> tuple[State, Buffers]:  # fmt: skip
    """The twin of `compiled`: the same step called from Python, where anything may happen in between."""
    index = first
    while index < limit and not meshes.to_host(state.done).all():
        state, buffers = _once(model, state, cache, buffers, sampler, pinned, np.int32(index), record=record)
        index += 1
        is_last = index >= limit or meshes.to_host(state.done).all()
        if draft is not None and (is_last or (index - first) % every == 0):
            draft(state, buffers, index - 1)
    return state, buffers
