"""The game that asks the model: a mask is one row of a batch, and any number of masks is one compiled program.

    mask -> prompt embeddings -> prefill -> cache, canvas, S, sites -> step (or steps) -> target
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import loop
from dgemma_jax.diffusion.generate import PREFILL_CHUNK, bucket
from dgemma_jax.diffusion.sampler import State, denoise_step
from dgemma_jax.nn.cache import KVCache, LayerCache, slot_positions
from dgemma_jax.nn.functional import of
from interp.editing import put
from interp.edits import Patch
from interp.gates import Gate
from interp.kept_chunks import Chunks
from interp.masking.replacements import Pool
from interp.masking.units import Units
from interp.rows import Rows, measured, of_step

READS = ("logits", "tokens")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given:
    """All that a row of the game needs beside its mask; data.

    Attributes:
        run: one row, before the step explained.
        starts: [k, C] canvases that rows start from, by draw.
        tokens, valid: [1, T] the prompt, padded.
        cells: which unit each cell belongs to, by place; see `Units`.
        pool: what stands in at each place, by draw.
        first: [R + 1] 1 at the step explained.
        sampler: settings of the run.
    """

    run: Rows
    starts: jax.Array
    tokens: jax.Array
    valid: jax.Array
    cells: dict[str, jax.Array]
    pool: Pool
    first: jax.Array
    sampler: SamplerConfig

    @classmethod
    def of(
        cls, run: Rows, starts: jax.Array, ids: Sequence[int], units: Units, pool: Pool, sampler: SamplerConfig
    ) -> Given:
        """Everything on the device, the prompt padded to one of few lengths."""
        more = (0, bucket(len(ids)) - len(ids))
        cells = {
            place: np.pad(own, more, constant_values=-1) if place in ("token_embed", "cache") else own
            for place, own in units.cells.items()
        }
        if "token_embed" in pool and np.issubdtype(pool["token_embed"].dtype, np.integer):
            pool = pool | {"token_embed": np.pad(pool["token_embed"], [(0, 0), more])}
        at = np.arange(sampler.max_denoising_steps + 1) == int(run.state.step.max())
        return cls(
            run=run, starts=starts, tokens=jnp.asarray(np.pad(np.asarray([ids], np.int32), [(0, 0), more])),
            valid=jnp.asarray(np.pad(np.ones((1, len(ids)), bool), [(0, 0), more])),
            cells=jax.tree.map(jnp.asarray, cells), pool=jax.tree.map(jnp.asarray, pool),
            first=jnp.asarray(at, jnp.float32), sampler=sampler,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MaskedGame:
    """A target of the model as a function of masks over units.

    Attributes:
        bundle: a bundle or a model, edited or not.
        units: what is switched.
        given: see `Given`.
        draws: of baselines.
        metric: as data (`interp.rows.as_data`).
        reads: whether the metric is given "logits" [n, C, V] of the last step or "tokens" [n, C] after it.
        limit: the step after which the target is read; None reads the step explained.
        rows_at_once, gradients_at_once: rows of a compiled call.
        keep: finished calls.
    """

    bundle: Any
    units: Units
    given: Given
    draws: int
    metric: Any
    reads: str = "logits"
    limit: int | None = None
    rows_at_once: int = 64
    gradients_at_once: int = 8
    keep: Chunks | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self.units.names

    @property
    def on_varies(self) -> bool:
        return len(self.given.starts) > 1

    def values(self, masks: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """[n] the target of masks [n, U] under draws [n]."""

        def one(masks: np.ndarray, draws: np.ndarray) -> np.ndarray:
            if self.limit is None:
                return np.asarray(_stepped(of(self.bundle), self.given, masks, draws, self.metric, reads=self.reads))
            return self._run(masks, draws)

        return self._chunks(one, masks, draws, self.rows_at_once, "values")

    def gradients(self, masks: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] the target, and [n, U] its derivative in relaxed masks.

        Raises:
            ValueError: what is explained has no derivative: tokens, or several steps.
        """
        if self.limit is not None or self.reads == "tokens":
            raise ValueError("sampled tokens have no derivative: explain one step (scope='step') and its logits")

        def one(masks: np.ndarray, draws: np.ndarray) -> np.ndarray:
            values, grads = _differentiated(of(self.bundle), self.given, masks, draws, self.metric)
            return np.concatenate([np.asarray(values)[:, None], np.asarray(grads)], 1)

        found = self._chunks(one, masks, draws, self.gradients_at_once, "gradients")
        return found[:, 0], found[:, 1 : 1 + len(self.units)]

    def _chunks(self, one, masks, draws, size, name) -> np.ndarray:
        """Calls of one shape; columns up to one of few widths, and at least one more, which is always on."""
        masks, draws = np.asarray(masks, np.float32), np.asarray(draws, np.int32)
        wide = np.ones((len(masks), bucket(len(self.units) + 1)), np.float32)
        wide[:, : len(self.units)] = masks
        found = []
        for at in range(0, len(wide), size):
            part, own = wide[at : at + size], draws[at : at + size]
            rows = len(part)
            fill = [(0, size - rows), (0, 0)]
            part, own = np.pad(part, fill, constant_values=1), np.pad(own, fill[0])
            call = functools.partial(one, part, own)
            if self.keep is None:
                found.append(call()[:rows])
            else:
                which = hashlib.sha256(part.tobytes() + own.tobytes()).hexdigest()[:20]
                found.append(self.keep.kept(0, f"{name}-{which}", call)[:rows])
        return np.concatenate(found).astype(np.float64)

    def _run(self, masks: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """The target after several steps."""
        given, model, quiet = self.given, of(self.bundle), dg.Record.nothing()
        edits, state, cache, pinned = _begun(model, given, masks, draws)
        args = (put(model, edits), state, cache)
        buffers = loop.empty_buffers(*args, given.sampler, pinned, quiet)
        first = int(np.argmax(np.asarray(given.first)))
        state, _ = loop.compiled(
            *args, buffers, given.sampler, pinned, quiet, first=first, limit=self.limit
        )
        return np.asarray(_read(args[0], state, cache, given.sampler, pinned, self.metric, reads=self.reads))


@functools.partial(jax.jit, static_argnames="reads")
def _stepped(model, given, masks, draws, metric, *, reads) -> jax.Array:
    return _target(model, given, masks, draws, metric, reads)


@jax.jit
def _differentiated(model, given, masks, draws, metric) -> tuple[jax.Array, jax.Array]:
    def total(masks: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = _target(model, given, masks, draws, metric, "logits")
        return values.sum(), values

    grads, values = jax.grad(total, has_aux=True)(masks)
    return values, grads


def _target(model, given, masks, draws, metric, reads) -> jax.Array:
    edits, state, cache, pinned = _masked(model, given, masks, draws)
    return _measured(put(model, edits), state, cache, given.sampler, pinned, metric, reads)


@jax.jit
def _begun(model, given, masks, draws) -> tuple[dict[str, Patch], State, KVCache, jax.Array | None]:
    return _masked(model, given, masks, draws)


@functools.partial(jax.jit, static_argnames="reads")
def _read(model, state, cache, sampler, pinned, metric, *, reads) -> jax.Array:
    return _measured(model, state, cache, sampler, pinned, metric, reads)


def _measured(model, state, cache, sampler, pinned, metric, reads) -> jax.Array:
    after, view = denoise_step(model, state, cache, sampler, pinned)
    count = len(after.argmax)
    found = of_step(metric, model, view, count) if reads == "logits" else measured(metric, after.argmax, count)
    return found[:, 0].astype(jnp.float32)


def _masked(model, given, masks_NU, draws_N) -> tuple[dict[str, Patch], State, KVCache, jax.Array | None]:
    """Edits at sites, the state and the cache of rows under masks. Cells of no unit read the last column, always on."""
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(masks_NU), *x.shape[1:])), given.run)
    off = {place: 1 - masks_NU[:, cells] for place, cells in given.cells.items()}

    def instead(place: str) -> Any:
        """What stands in at a place, by row; embeddings for tokens."""
        mine = jax.tree.map(lambda x: x[draws_N % x.shape[0]], given.pool[place])
        tokens = not isinstance(mine, list) and jnp.issubdtype(mine.dtype, jnp.integer)
        return model.embedder.lookup(mine) if tokens else mine

    state, cache = rows.state.replace(canvas=given.starts[draws_N % len(given.starts)]), rows.cache
    edits = {name: _patch(name, instead(name), off[name]) for name in off if name.startswith("layers.")}
    if "token_embed" in off:
        cache = _prefilled(model, given, cache, instead("token_embed"), off["token_embed"])
    if "cache" in off:
        cache = cache.replace(layers=_mixed(cache, instead("cache"), off["cache"]))
    if "canvas" in off:  # embeddings, not tokens, so that it has a derivative; at the step explained alone
        edits["canvas_embed"] = _patch("canvas_embed", instead("canvas"), off["canvas"][..., None], given.first)
    if "soft" in off:
        share = off["soft"][..., None]
        state = state.replace(soft=((1 - share) * state.soft + share * instead("soft")).astype(state.soft.dtype))
    return edits, state, cache, rows.pinned


def _patch(name: str, value: jax.Array, off: jax.Array, steps: jax.Array | None = None) -> Patch:
    always = jnp.ones(1, jnp.float32)
    gate = Gate(jnp.float32(1), always if steps is None else steps, always, always, {}, None, off)
    phase = "prefill" if name == "token_embed" else "denoise"
    axes = "BTD" if value.ndim == 3 else "BT" + "?" * (value.ndim - 2)  # of these only T is read
    return Patch(value, name=name.split(".")[-1], axes=axes, phase=phase, gate=gate)


def _prefilled(model, given, like, value, off_NT) -> KVCache:
    """The cache after the masked prompt, in pieces that bound the memory of attention scores."""
    rows, length = off_NT.shape
    cache = KVCache(jax.tree.map(jnp.zeros_like, like.layers), jnp.zeros_like(like.length))
    for at in range(0, length, PREFILL_CHUNK):
        piece = slice(at, at + PREFILL_CHUNK)
        patch = _patch("token_embed", value, off_NT[:, piece, None])
        tokens, valid = (jnp.broadcast_to(x[:, piece], (rows, x[:, piece].shape[1]))
                         for x in (given.tokens, given.valid))  # fmt: skip
        cache = dg.prefill(put(model, {"token_embed": patch}), tokens, valid, cache).cache
    return cache


def _mixed(cache: KVCache, others: list[LayerCache], off_NT: jax.Array) -> list[LayerCache]:
    """Cached keys and values, those of positions that are off from the others."""

    def mix(own_NKSH: jax.Array, other_NKSH: jax.Array) -> jax.Array:
        at_NS = slot_positions(cache.length, own_NKSH.shape[2])
        share_NS = jnp.take_along_axis(off_NT, jnp.clip(at_NS, 0, off_NT.shape[1] - 1), 1) * (at_NS >= 0)
        share = share_NS[:, None, :, None]
        return ((1 - share) * own_NKSH + share * other_NKSH).astype(own_NKSH.dtype)

    return jax.tree.map(mix, cache.layers, others)
