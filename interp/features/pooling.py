"""What probes read: residuals of real runs by layer, step and class of positions, one vector a prompt.

A block is not decided in one pass and no position of its canvas stands for it, so positions are averaged: over all,
over those that the step's sampler accepted, over the others (fluid), and the last token of the prompt beside them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax import progress
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.nn.functional import of
from interp import array_files
from interp.affine_lens import chosen_layers
from interp.captures import capture_prompt
from interp.editing import rewrapped
from interp.taps import tapped

CLASSES = ("all", "accepted", "fluid")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Pooled:
    """One vector a prompt, layer, step and class of positions.

    Attributes:
        canvas: [L, R, P, N, D] float32 means over positions of P classes; zeros where `valid` is False.
        valid: [R, P, N] bool: the prompt took the step, and had a position of the class.
        prompt: [L, N, D] residuals of the causal pass at the prompt's last token.
        layers: L of them.
        texts: the answers, None without a tokenizer.
    """

    canvas: np.ndarray
    valid: np.ndarray
    prompt: np.ndarray
    layers: tuple[int, ...]
    texts: tuple[str | None, ...]

    def save(self, path: Any) -> Any:
        """Write one `.npz` file."""
        arrays = {"canvas": self.canvas, "valid": self.valid, "prompt": self.prompt}
        return array_files.write(path, arrays, {"kind": "pooled residuals", "layers": self.layers, "texts": self.texts})

    @classmethod
    def load(cls, path: Any) -> Pooled:
        """Read what `save` wrote."""
        arrays, about = array_files.read(path, "pooled residuals")
        return cls(**arrays, layers=tuple(about["layers"]), texts=tuple(about["texts"]))

    def __repr__(self) -> str:
        layers, steps, _, prompts, width = self.canvas.shape
        took = self.valid[:, 0].sum(1).tolist()
        return f"residuals of {prompts} prompts, {layers} layers, {steps} steps, width {width}; prompts by step {took}"


def pool_residuals(
    bundle: Any, prompts: Any, layers: Any = None, *, steps: int | None = None, batch: int = 32, seed: int = 0,
    sampler: SamplerConfig | None = None, show: bool | None = None,
) -> Pooled:  # fmt: skip
    """Run prompts for one block and average their residuals over classes of positions, inside the compiled loop.

    Args:
        bundle: a bundle or a model, edited or not.
        prompts: as for `dg.generate`; prompt i runs under seed `seed + i`.
        layers: an integer, slice, list or mask; None for all.
        steps: the first so many steps are kept; by default as many as the longest run took.
        batch: prompts at a time.

    Raises:
        ValueError: no such layer.
    """
    model, tokenizer, default = inputs.parts(bundle)
    if batch < 1 or (steps is not None and steps < 1):
        raise ValueError(f"batch and steps must be at least 1, got {batch} and {steps}")
    sampler = default if sampler is None else sampler
    layers = chosen_layers(model, layers)
    ids = inputs.to_ids(prompts, tokenizer, model.config.vocab_size)
    names = [f"layers.{layer}.resid_post" for layer in layers]
    watched = rewrapped(bundle, tapped(model, names)[0])
    # The sites themselves need not be kept: one step of them is the least that a record can ask for.
    record = dataclasses.replace(dg.Record.nothing(), fn=_means, site_steps=(0,))
    batch = min(batch, len(ids))
    canvas, valid, prompt, texts = [], [], [], []
    with progress.bar("residuals", len(ids), show, "prompts") as done:
        for first in range(0, len(ids), batch):
            rows = [min(r, len(ids) - 1) for r in range(first, first + batch)]  # the last repeated: one program
            fresh = min(batch, len(ids) - first)
            given, seeds = [ids[r] for r in rows], [seed + r for r in rows]
            out = dg.generate(watched, given, seeds, sampler, of(bundle).config.canvas_length, record)
            told, took = out.trajectory.fn, out.trajectory.valid[0]
            x_LRBPD = np.stack([told["means"][name][0] for name in names])
            canvas.append(x_LRBPD[:, :, :fresh].swapaxes(2, 3))
            valid.append((told["some"][0] & took[..., None])[:, :fresh].swapaxes(1, 2))
            acts = capture_prompt(bundle, given, names)
            last = acts.valid.sum(1) - 1
            prompt.append(acts.stack()[:, np.arange(batch), last][:, :fresh].astype(np.float32))
            texts += out.texts[:fresh]
            done(fresh)
    valid_RPN = np.concatenate(valid, -1)
    kept = steps or int(valid_RPN.any((1, 2)).sum())
    return Pooled(
        canvas=np.concatenate(canvas, 3)[:, :kept].astype(np.float32), valid=valid_RPN[:kept],
        prompt=np.concatenate(prompt, 1), layers=layers, texts=tuple(texts),
    )  # fmt: skip


def _means(view: Any) -> dict[str, Any]:
    """{"means": by site [B, P, D], "some": [B, P] bool}, by class of positions."""
    every = jnp.ones_like(view.accepted)
    of_class_BPC = jnp.stack([every, view.accepted, ~view.accepted], 1).astype(jnp.float32)
    count_BP = of_class_BPC.sum(-1)

    def mean(x_BCD: jax.Array) -> jax.Array:
        return jnp.einsum("bpc,bcd->bpd", of_class_BPC, x_BCD.astype(jnp.float32)) / jnp.maximum(count_BP, 1)[..., None]

    return {"means": {name: mean(x) for name, x in view.sites.items()}, "some": count_BP > 0}
