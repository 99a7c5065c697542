"""The logit lens over step x layer x position: what each layer would say if it were the last one.

    lens_l = softmax(cap tanh(W norm(M_l h_l + b_l) / cap))        before temperature; `methods.md` 12.4

h_l is the residual leaving layer l, `norm` the model's final norm, W its table; M = 1, b = 0 is the plain lens, a
fitted `AffineLens` (tuned, Jacobian) is read the same way. Taps pass the residuals of a step to a reader at the
logits, inside the compiled loop of the generation, and only what the reader keeps leaves it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dgemma_jax as dg
from dgemma_jax import progress
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.nn.functional import of
from dgemma_jax.nn.sites import Site
from interp.affine_lens import AffineLens, chosen_layers
from interp.editing import put, rewrapped
from interp.gates import table
from interp.lens_readings import LensReadings
from interp.taps import Tap

_LOGITS_AT_ONCE = 16 << 20  # entries of the [B, C, V] float32 that a reader holds at a time
_LEFT = "lens"  # under which the reader leaves its results, and taps their residuals


def logit_lens(
    bundle: Any, prompts: Any, layers: Any = None, steps: Any = None, *, lens: AffineLens | None = None,
    tokens: Sequence[int] = (), top_k: int = 5, seed: int | Sequence[int] = 0, sampler: SamplerConfig | None = None,
    max_new_tokens: int | None = None, batch: int | None = None, show: bool | None = None, **options: Any,
) -> LensReadings:  # fmt: skip
    """Read every layer at every step of a generation: the same run as `dg.generate` with these arguments.

    The run is made twice: the final tokens, whose rank and probability are read, are known at its end only.

    >>> import dgemma_jax as dg, interp
    >>> model = dg.nn.transformer.initialize(dg.ModelConfig.tiny())
    >>> read = interp.logit_lens(model, [[5, 6]], steps=[0, 2], sampler=dg.SamplerConfig(max_denoising_steps=3))
    >>> read.ids.shape  # steps, layers, rows, positions, candidates
    (2, 3, 1, 12, 5)

    Args:
        bundle: a bundle or a model, edited or not.
        prompts: as for `dg.generate`, or what `dg.generate` returned: its run is then read, and made once more only.
        layers, steps: an integer, slice, list or mask; None for all. Steps that no row took are left out.
        lens: None for the plain lens; or one that was fitted (`interp.fit_tuned_lens`, `interp.fit_jacobian_lens`).
        tokens: ids whose probability is read everywhere; another choice of as many shares the compiled program.
        top_k: candidates kept.
        max_new_tokens: by default one block.
        batch: rows a run; by default all.
        show: draw a progress bar; None draws it on a terminal, if there are several runs.
        **options: further ones of `dg.generate` (canvas, pinned, soft, thinking).

    Raises:
        ValueError: no such layer, step or token; a lens without one of the layers or of another width.
    """
    if isinstance(prompts, dg.Generation):
        chosen = _checked(bundle, prompts.sampler, layers, steps, lens, tokens, top_k)
        return _joined(bundle, chosen, [_read(bundle, prompts, chosen)], len(prompts.seeds))
    model, tokenizer, default = inputs.parts(bundle)
    sampler = default if sampler is None else sampler
    chosen = _checked(bundle, sampler, layers, steps, lens, tokens, top_k)
    ids = inputs.to_ids(prompts, tokenizer, model.config.vocab_size, options.pop("thinking", False))
    seeds = inputs.to_seeds(seed, len(ids))
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1 row, got {batch}")
    length, at_once = model.config.canvas_length, min(batch or len(ids), len(ids))
    parts = []
    with progress.bar("reading", len(ids), False if at_once == len(ids) else show) as done:
        for first in range(0, len(ids), at_once):
            rows = [min(r, len(ids) - 1) for r in range(first, first + at_once)]  # the last repeated: one program
            own = {k: np.asarray(v)[rows] if np.ndim(v) > 1 and len(v) == len(ids) else v for k, v in options.items()}
            run = dg.generate(
                bundle, [ids[r] for r in rows], [seeds[r] for r in rows], sampler, max_new_tokens or length,
                dg.Record.nothing(), **own,
            )  # fmt: skip
            parts.append(_read(bundle, run, chosen))
            done(len(set(rows)))
    return _joined(bundle, chosen, parts, len(ids))


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """What is to be read."""

    layers: tuple[int, ...]
    steps: tuple[int, ...]
    lens: AffineLens | None
    tokens: tuple[int, ...]
    top_k: int


def _checked(bundle, sampler, layers, steps, lens, tokens, top_k) -> _Chosen:
    model = of(bundle)
    size = model.config.vocab_size
    layers = chosen_layers(model, layers)
    kept = np.flatnonzero(np.asarray(table(steps, sampler.max_denoising_steps, "steps")))
    if not len(kept):
        raise ValueError(f"steps={steps!r} chooses none")
    if not isinstance(top_k, int) or not 1 <= top_k <= size:
        raise ValueError(f"top_k must be an integer in 1..{size}, got {top_k!r}")
    ids = np.asarray(tokens if len(tokens) else np.zeros(0, int))
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids.size and (ids.min() < 0 or ids.max() >= size)):
        raise ValueError(f"tokens must be a list of ids in 0..{size - 1}, got {tokens!r}")
    lens = None if lens is None else lens.fitting(model, layers)
    return _Chosen(layers, tuple(map(int, kept)), lens, tuple(map(int, ids)), top_k)


def _read(bundle: Any, run: dg.Generation, chosen: _Chosen) -> dict[str, Any]:
    """Readings of a run, [J, R, L, B, C, ...], and what belongs to its rows."""
    model, finals = of(bundle), np.asarray(run.trajectory.committed)
    reader = _Reader(
        name="logits", top_k=chosen.top_k, eps=model.config.rms_norm_eps, norm=model.final_norm.weight[...],
        finals=jnp.asarray(finals), tokens=jnp.asarray(chosen.tokens, jnp.int32),
        lens=None if chosen.lens is None else dataclasses.replace(chosen.lens, method="", layers=()),
        residuals=tuple(f"{_LEFT}.{layer}" for layer in chosen.layers),
    )  # fmt: skip
    taps = {
        f"layers.{layer}.resid_post": Tap("resid_post", left, "denoise", 1)
        for layer, left in zip(chosen.layers, reader.residuals, strict=True)
    }
    record = dataclasses.replace(dg.Record.nothing(), site_steps=chosen.steps)
    tapped = rewrapped(bundle, put(model, taps | {"logits": reader}))
    again = dg.resume(tapped, run.trajectory.moment(0, 0), record=record).trajectory
    is_end = np.isin(finals, run.sampler.eos_token_ids)
    return {name: np.moveaxis(array, 3, 2) for name, array in again.sites[_LEFT].items()} | {
        "finals": finals, "inside": np.cumsum(is_end, -1) - is_end == 0, "valid": again.valid[:, list(chosen.steps)],
        "texts": run.texts, "seeds": run.seeds,
    }  # fmt: skip


def _joined(bundle: Any, chosen: _Chosen, parts: list[dict[str, Any]], rows: int) -> LensReadings:
    """One result of the runs: rows joined, those that were there twice left out."""
    blocks = max(len(part["valid"]) for part in parts)
    row_axis = {"finals": 1, "inside": 1, "valid": 2}

    def join(name: str) -> np.ndarray:
        arrays = [np.pad(p[name], [(0, blocks - len(p[name]))] + [(0, 0)] * (p[name].ndim - 1)) for p in parts]
        axis = row_axis.get(name, 3)
        array = np.concatenate(arrays, axis).take(range(rows), axis)
        return array[0] if blocks == 1 else array

    texts, seeds = ([one for part in parts for one in part[name]][:rows] for name in ("texts", "seeds"))
    arrays = {name: join(name) for name in parts[0] if name not in ("texts", "seeds")}
    taken = arrays["valid"].any(-1).reshape(-1, len(chosen.steps)).any(0)  # steps of any row, in any block
    steps = tuple(step for step, yes in zip(chosen.steps, taken, strict=True) if yes)
    for name in set(arrays) - {"finals", "inside"}:
        arrays[name] = np.compress(taken, arrays[name], int(blocks > 1))
    tokenizer = getattr(bundle, "tokenizer", None)
    seen = np.unique(np.concatenate([arrays["ids"].ravel(), arrays["finals"].ravel(), np.asarray(chosen.tokens, int)]))
    return LensReadings(
        **arrays, tokens=chosen.tokens, layers=chosen.layers, steps=steps, texts=tuple(texts),
        seeds=tuple(seeds), words={} if tokenizer is None else {int(i): tokenizer.token(int(i)) for i in seen},
        method="plain" if chosen.lens is None else chosen.lens.method,
    )  # fmt: skip


@nnx.dataclass(eq=False)
class _Reader(Site):
    """At the logits: reads what taps left of a step, leaves the readings in its place, and changes nothing."""

    top_k: int
    eps: float
    residuals: tuple[str, ...]
    norm: Any = nnx.data()
    finals: Any = nnx.data()
    tokens: Any = nnx.data()
    lens: Any = nnx.data(default=None)

    def bind(self, **context: Any) -> Any:
        if context.get("phase", "denoise") != "denoise":
            return Site(self.name)
        return _Reading(self, context) if "captured" in context else self

    def read(self, resid_LBCD: jax.Array, logits_BCV: jax.Array, embedder: Any, block_B: jax.Array) -> dict:
        """Arrays [B, L, C, ...]; a few positions at a time, of these one layer after the other."""
        layers, batch, length, _ = resid_LBCD.shape
        fitting = max(1, _LOGITS_AT_ONCE // (batch * logits_BCV.shape[-1]))
        some = max(n for n in range(1, length + 1) if length % n == 0 and n <= fitting)
        finals_BC = self.finals[jnp.minimum(block_B, self.finals.shape[0] - 1), jnp.arange(batch)]

        def part(first: jax.Array) -> dict:
            own_BTV, final_BT = (jax.lax.dynamic_slice_in_dim(a, first, some, 1) for a in (logits_BCV, finals_BC))
            own_BTV = jax.nn.log_softmax(own_BTV, -1)

            def layer(given: tuple[jax.Array, AffineLens | None]) -> dict:
                x_BTD, lens = given
                logits_BTV = lens_logits(x_BTD, lens, self.norm, self.eps, embedder)
                return _reading(logits_BTV, own_BTV, final_BT, self.tokens, self.top_k)

            return jax.lax.map(layer, (jax.lax.dynamic_slice_in_dim(resid_LBCD, first, some, 2), self.lens))

        parts = jax.lax.map(part, jnp.arange(0, length, some))  # [n, L, B, some, ...]
        return jax.tree.map(
            lambda a: jnp.moveaxis(a, 0, 2).reshape(layers, batch, length, *a.shape[4:]).swapaxes(0, 1), parts
        )


def lens_logits(x: jax.Array, lens: Any, norm: jax.Array, eps: float, embedder: Any) -> jax.Array:
    """Soft-capped logits [B, T, V] float32 of residuals [B, T, D] through the lens of one layer; None is the plain one.

    Args:
        norm: [D], weight of the final norm.
        eps: of the final norm.
    """
    wide = (x if lens is None else lens(x)).astype(jnp.float32)
    wide = wide / jnp.sqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps) * norm.astype(jnp.float32)
    return embedder.logits(wide.astype(x.dtype))


def _reading(logits_BTV, own_BTV, final_BT, tokens, top_k: int) -> dict[str, jax.Array]:
    """What is kept of a distribution, [B, T, ...]."""
    logp_BTV = jax.nn.log_softmax(logits_BTV, -1)
    top, ids = jax.lax.top_k(logp_BTV, top_k)
    final_BT1 = jnp.take_along_axis(logp_BTV, final_BT[..., None], -1)
    return {
        "ids": ids, "probs": jnp.exp(top), "entropy": -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, -1),
        "final_prob": jnp.exp(final_BT1[..., 0]), "final_rank": jnp.sum(logp_BTV > final_BT1, -1, dtype=jnp.int32),
        "kl": divergence(own_BTV, logp_BTV), "chosen": jnp.exp(logp_BTV[..., tokens]),
    }  # fmt: skip


def divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """KL(p || q) in nats over the last axis, of log-probabilities; p may rule tokens out by -inf."""
    return jnp.sum(jnp.exp(p) * (jnp.maximum(p, jnp.finfo(p.dtype).min) - q), -1)


class _Reading:
    """A reader within one trace of one pass."""

    def __init__(self, reader: _Reader, context: dict[str, Any]) -> None:
        self.reader, self.context, self.name = reader, context, reader.name

    def bind(self, **context: Any) -> _Reading:
        return self

    def __call__(self, logits: jax.Array) -> jax.Array:
        captured = self.context["captured"]
        resid_LBCD = jnp.stack([captured.pop(name) for name in self.reader.residuals])
        captured[_LEFT] = self.reader.read(resid_LBCD, logits, self.context["embedder"], self.context["block"])
        return logits
