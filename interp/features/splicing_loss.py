"""What splicing an autoencoder in costs the model, by noise level.

    L_t = E[sum over corrupted positions of nll] / (C t)        and 1 / (1 - t) for those left clean

A level t corrupts each position with probability t, so dividing by C t is a mean over corrupted positions. Weights
as in DLM-Scope, arXiv 2602.05859; an autoencoder in an early layer may lower the loss.
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
from dgemma_jax.nn.functional import of
from interp import array_files
from interp.editing import edit
from interp.edits import Zero
from interp.features.feature_edits import splice_sae
from interp.features.sae import SAE
from interp.rows import Rows, run_of

PARTS = ("corrupted", "clean")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SplicedLoss:
    """Weighted losses in nats by noise level and part of the canvas, [Q, 2]: corrupted positions, then clean ones.

    Attributes:
        levels: Q noise levels.
        plain: of the model as it is.
        spliced: with the reconstruction at the site.
        zeroed: with zeros at the site.
    """

    levels: tuple[float, ...]
    plain: np.ndarray
    spliced: np.ndarray
    zeroed: np.ndarray

    @property
    def recovered(self) -> np.ndarray:
        """[Q, 2] share kept of the gap between zeros and the model itself; NaN where there is no gap."""
        gap = self.zeroed - self.plain
        return (self.zeroed - self.spliced) / np.where(np.abs(gap) > 1e-6, gap, np.nan)

    def save(self, path: Any) -> Any:
        """Write one `.npz` file."""
        arrays = {name: getattr(self, name) for name in ("plain", "spliced", "zeroed")}
        return array_files.write(path, arrays, {"kind": "spliced loss", "levels": self.levels})

    @classmethod
    def load(cls, path: Any) -> SplicedLoss:
        """Read what `save` wrote."""
        arrays, about = array_files.read(path, "spliced loss")
        return cls(**arrays, levels=tuple(about["levels"]))

    def __repr__(self) -> str:
        lines = ["noise  positions  plain  spliced  zeroed  recovered"]
        for q, level in enumerate(self.levels):
            for at, part in enumerate(PARTS):
                losses = f"{self.plain[q, at]:5.2f}  {self.spliced[q, at]:7.2f}  {self.zeroed[q, at]:6.2f}"
                lines.append(f"{level:5.2f}  {part:9}  {losses}  {self.recovered[q, at]:9.2f}")
        return "\n".join(lines)


def spliced_loss(
    bundle: Any, sae: SAE, site: str, prompts: Any, answers: Any = None, *,
    levels: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9), batch: int = 16, seed: int = 0,
    settings: SamplerConfig | None = None, show: bool | None = None,
) -> SplicedLoss:  # fmt: skip
    """Loss of the model's answers, corrupted, with and without an autoencoder at a site. One step each, S = 0.

    Args:
        site: full name; its layer is run once as it is, once spliced, once with zeros.
        answers: [B, C] ids; by default the model's own answers.
        levels: noise levels in 0..1, each with every prompt. A conditioned autoencoder is taken at each of them.
        settings: of the sampler, for the answers.

    Raises:
        ValueError: levels outside 0..1, answers of another shape, an autoencoder of another width.
    """
    model, tokenizer, default = inputs.parts(bundle)
    settings = default if settings is None else settings
    ids, length = inputs.to_ids(prompts, tokenizer, model.config.vocab_size), model.config.canvas_length
    if not len(levels) or not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"levels must be in 0..1, got {levels!r}")
    if answers is not None and np.shape(answers) != (len(ids), length):
        raise ValueError(f"answers has shape {np.shape(answers)}; needed is {(len(ids), length)}")
    one_step, batch = settings.replace(max_denoising_steps=1, early_stop=False), min(batch, len(ids))
    zeroed = of(edit(bundle, site, Zero(), sampler=one_step))
    spliced = [of(splice_sae(bundle, sae.at_level(level), site, sampler=one_step)) for level in levels]
    sums, counts = np.zeros((3, len(levels), 2)), np.zeros((len(levels), 2))
    with progress.bar("spliced loss", len(ids), show, "prompts") as done:
        for first in range(0, len(ids), batch):
            rows = [min(r, len(ids) - 1) for r in range(first, first + batch)]  # the last repeated: one program
            fresh, given = min(batch, len(ids) - first), [ids[r] for r in rows]
            if answers is None:
                out = dg.generate(bundle, given, [seed + r for r in rows], settings, length, dg.Record.nothing())
                clean = out.tokens[:, :length]
            else:
                clean = np.asarray(answers)[rows]
            start = run_of(bundle, given, [0], seed=0, sampler=one_step).at(0)
            keys = noise.row_keys(np.asarray([seed + r for r in rows]))
            on = np.arange(batch) < fresh
            for q, level in enumerate(levels):
                for at, own in enumerate((model, spliced[q], zeroed)):
                    nats, count = _losses(own, start, one_step, clean, keys, jnp.float32(level), on)
                    sums[at, q] += np.asarray(nats)
                counts[q] += np.asarray(count)
            done(fresh)
    # Means over the positions that were drawn: the weights 1 / t and 1 / (1 - t), without their sampling error.
    losses = np.where(counts, sums / np.maximum(counts, 1), np.nan)
    return SplicedLoss(levels=tuple(map(float, levels)), plain=losses[0], spliced=losses[1], zeroed=losses[2])


@jax.jit
def _losses(model, rows: Rows, settings, clean_BC, keys_B, level, on_B):
    """Summed nats [2] of corrupted and of clean positions, and how many there are [2]."""
    corrupt = jax.vmap(lambda key, row: noise.corrupt(key, row[None], level[None], model.config.vocab_size)[0])
    canvas_BC = corrupt(keys_B, clean_BC)
    state = rows.state.replace(canvas=canvas_BC)
    _, view = sampler.denoise_step(model, state, rows.cache, settings)
    logp_BCV = jax.nn.log_softmax(view.logits, -1)
    nats_BC = -jnp.take_along_axis(logp_BCV, clean_BC[..., None], -1)[..., 0]
    is_BCP = jnp.stack([canvas_BC != clean_BC, canvas_BC == clean_BC], -1) * on_B[:, None, None]
    return jnp.einsum("bc,bcp->p", nats_BC, is_BCP.astype(jnp.float32)), is_BCP.sum((0, 1))
