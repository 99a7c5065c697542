"""A direction seen from the model's denoising field: what a push along it does to S and to the logits, by noise level.

A denoiser's mean of the clean canvas gives the score (Tweedie), and S is that mean in the space of embeddings. The
field is S - E(canvas): where the step wants the canvas to go. For a push e along u in the residual of one layer,

    d S / d e  and  d logits / d e  at e = 0,  exactly, by one forward-mode derivative of the compiled step
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax import progress
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import noise, sampler
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.nn.placement import with_experts
from interp import array_files
from interp.editing import edit
from interp.features.projection import orthonormal_rows
from interp.rows import Rows, run_of
from interp.steering import Push


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DenoisingField:
    """Response to a push of one residual norm along a direction, by noise level; means over prompts and positions.

    Attributes:
        levels: Q noise levels.
        field: [Q, D] S - E(canvas), the way the step wants the canvas to go.
        soft: [Q, D] d S / d e.
        logits: [Q, V] d logits / d e, before temperature.
        strength: [Q] mean length of d S / d e at a position.
        cosine: [Q] mean cosine of d S / d e and the field at a position: does the push go where the step goes anyway?
    """

    levels: tuple[float, ...]
    field: np.ndarray
    soft: np.ndarray
    logits: np.ndarray
    strength: np.ndarray
    cosine: np.ndarray

    def words(self, tokenizer: Any, count: int = 5) -> list[tuple[list[str], list[str]]]:
        """By level, the tokens that the push makes likelier and those that it makes less likely."""
        found = []
        for row in self.logits:
            order = np.argsort(-row)
            ends = (order[:count], order[::-1][:count])
            found.append(tuple([tokenizer.decode([int(t)]) for t in ids] for ids in ends))
        return found

    def save(self, path: Any) -> Any:
        """Write one `.npz` file."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return array_files.write(path, arrays, {"kind": "denoising field", "levels": self.levels})

    @classmethod
    def load(cls, path: Any) -> DenoisingField:
        """Read what `save` wrote."""
        arrays, about = array_files.read(path, "denoising field")
        return cls(**arrays, levels=tuple(about["levels"]))

    def plot(self) -> Any:
        """Strength and cosine by noise level."""
        import matplotlib.pyplot as plt

        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
        left.plot(self.levels, self.strength, "o-")
        left.set(xlabel="noise level", ylabel="length of dS/de")
        right.plot(self.levels, self.cosine, "o-")
        right.set(xlabel="noise level", ylabel="cosine with the field", ylim=(-1, 1))
        plt.close(figure)  # a notebook shows what is returned, once
        return figure

    def __repr__(self) -> str:
        rows = zip(self.levels, self.strength, self.cosine, strict=True)
        shown = ", ".join(f"{level:.2g}: {size:.3g} ({cosine:+.2f})" for level, size, cosine in rows)
        return f"denoising field along a direction; length of dS/de (cosine with the field) by noise level: {shown}"


def denoising_field(
    bundle: Any, direction: Any, layer: int, prompts: Any, answers: Any = None, *,
    levels: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0), seed: int = 0, settings: SamplerConfig | None = None,
    show: bool | None = None,
) -> DenoisingField:  # fmt: skip
    """Push the canvas residual of one layer along a direction, and differentiate what the step says.

    Args:
        direction: [D], any length.
        layer: whose "resid_post" is pushed, at every position, in units of its own norm.
        answers: [B, C] ids, which are corrupted; by default the model's own answers.
        levels: noise levels in 0..1. Noise is the same for all levels, so that curves are smooth.

    Raises:
        ValueError: a layer or level out of range, a direction of another width.
    """
    model, tokenizer, default = inputs.parts(bundle)
    model = with_experts(model, "dense")  # the response is taken in forward mode
    settings = default if settings is None else settings
    ids, length = inputs.to_ids(prompts, tokenizer, model.config.vocab_size), model.config.canvas_length
    if not 0 <= layer < model.config.num_layers or not len(levels) or not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"layer must be in 0..{model.config.num_layers - 1} and levels in 0..1: {layer}, {levels!r}")
    unit_D = orthonormal_rows(bundle, direction)[0, 0]
    seeds = list(range(seed, seed + len(ids)))
    if answers is None:
        answers = dg.generate(bundle, ids, seeds, settings, length, dg.Record.nothing()).tokens[:, :length]
    if np.shape(answers) != (len(ids), length):
        raise ValueError(f"answers has shape {np.shape(answers)}; needed is {(len(ids), length)}")
    one_step = settings.replace(max_denoising_steps=1, early_stop=False)
    start, keys = run_of(bundle, ids, [0], seed=seeds, sampler=one_step).at(0), noise.row_keys(np.asarray(seeds))
    on_L = jnp.zeros(model.config.num_layers).at[layer].set(1)
    names = ("field", "soft", "logits", "strength", "cosine")
    parts = []
    with progress.bar("denoising field", len(levels), show, "levels") as done:
        for level in levels:
            told = _response(model, unit_D, on_L, start, one_step, np.asarray(answers), keys, jnp.float32(level))
            parts.append([np.asarray(part) for part in told])
            done(1)
    arrays = {name: np.stack(values) for name, values in zip(names, zip(*parts, strict=True), strict=True)}
    return DenoisingField(levels=tuple(map(float, levels)), **arrays)


@jax.jit
def _response(model, unit_D, layers_L, rows: Rows, settings, clean_BC, keys_B, level):
    corrupt = jax.vmap(lambda key, row: noise.corrupt(key, row[None], level[None], model.config.vocab_size)[0])
    state = rows.state.replace(canvas=corrupt(keys_B, clean_BC))

    def step(size):
        pushed = edit(model, "layers.*.resid_post", Push(unit_D * size), layers=layers_L, per_layer=False)
        _, view = sampler.denoise_step(pushed, state, rows.cache, settings)
        return view.next_soft.astype(jnp.float32), view.logits

    (soft_BCD, _), (dsoft_BCD, dlogits_BCV) = jax.jvp(step, (jnp.float32(0),), (jnp.float32(1),))
    field_BCD = soft_BCD - model.embedder.lookup(state.canvas).astype(jnp.float32)
    length_BC, size_BC = (jnp.linalg.norm(x, axis=-1) for x in (field_BCD, dsoft_BCD))
    cosine_BC = jnp.sum(field_BCD * dsoft_BCD, -1) / jnp.maximum(length_BC * size_BC, 1e-20)
    means = (field_BCD.mean((0, 1)), dsoft_BCD.mean((0, 1)), dlogits_BCV.mean((0, 1)))
    return *means, size_BC.mean(), cosine_BC.mean()
