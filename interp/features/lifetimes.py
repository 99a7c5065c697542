"""What features do over denoising steps, and which contexts they like.

Stability: Jaccard index of a position's k strongest features between consecutive steps while it is fluid. Drift: one
minus the index against the step at which it was first accepted, afterwards. Both as in DLM-Scope, arXiv 2602.05859,
with accepted positions in place of unmasked ones.
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
from dgemma_jax.diffusion import prompts as inputs
from interp import array_files
from interp.editing import rewrapped
from interp.features.activation_sets import ActivationSet
from interp.features.sae import SAE
from interp.taps import tapped


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FeatureLife:
    """Features over R denoising steps, means over prompts and canvas positions.

    Attributes:
        activation: [R, F] mean activation.
        active: [R, F] share of positions where it is active.
        stability: [R] Jaccard index with the step before, over fluid positions; NaN at step 0.
        drift: [R] one minus the index with the step of first acceptance, over positions accepted earlier.
        prompts: [R] how many took the step.
    """

    activation: np.ndarray
    active: np.ndarray
    stability: np.ndarray
    drift: np.ndarray
    prompts: np.ndarray

    @property
    def rise(self) -> np.ndarray:
        """[F] first step at which a feature has half of its largest mean activation; -1 if it is never active."""
        most = self.activation.max(0)
        return np.where(most > 0, (self.activation >= most / 2).argmax(0), -1)

    def save(self, path: Any) -> Any:
        """Write one `.npz` file."""
        return array_files.write(path, vars(self), {"kind": "feature life"})

    @classmethod
    def load(cls, path: Any) -> FeatureLife:
        """Read what `save` wrote."""
        return cls(**array_files.read(path, "feature life")[0])

    def plot(self, features: Sequence[int] | None = None) -> Any:
        """Activation of features over steps (by default the ten strongest), and stability and drift beside it."""
        import matplotlib.pyplot as plt

        shown = np.argsort(-self.activation.max(0))[:10] if features is None else np.atleast_1d(features)
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        for feature in shown:
            left.plot(self.activation[:, feature], label=str(feature))
        left.set(xlabel="step", ylabel="mean activation")
        left.legend(title="feature", fontsize=7)
        right.plot(self.stability, label="stability while fluid")
        right.plot(self.drift, label="drift after acceptance")
        right.set(xlabel="step", ylabel="Jaccard index", ylim=(0, 1))
        right.legend()
        plt.close(figure)  # a notebook shows what is returned, once
        return figure

    def __repr__(self) -> str:
        steps, features = self.activation.shape
        alive = int((self.rise >= 0).sum())
        took = self.prompts.tolist()
        return f"life of {features} features over {steps} steps, {alive} ever active; prompts by step {took}"


def feature_life(
    bundle: Any, sae: SAE, site: str, prompts: Any, *, k: int = 16, noise: Any = None, batch: int = 16, seed: int = 0,
    sampler: SamplerConfig | None = None, show: bool | None = None,
) -> FeatureLife:  # fmt: skip
    """Encode the activations of real runs, step by step inside the compiled loop.

    Args:
        site: full name of the site that the autoencoder reads.
        k: strongest features of a position that its sets hold.
        noise: [R] noise level by step, for an autoencoder conditioned on noise.
        batch: prompts at a time; prompt i runs under seed `seed + i`.

    Raises:
        ValueError: no such site, or one of another width.
    """
    model, tokenizer, default = inputs.parts(bundle)
    sampler = default if sampler is None else sampler
    ids = inputs.to_ids(prompts, tokenizer, model.config.vocab_size)
    watched, infos = tapped(model, site)
    if len(infos) != 1 or infos[0].shape[-1] != sae.w_enc.shape[0]:
        raise ValueError(f"{site!r} must be one site of width {sae.w_enc.shape[0]}; it is {[i.name for i in infos]}")
    record = dataclasses.replace(dg.Record.nothing(), accepted=True)
    batch, k = min(batch, len(ids)), min(k, sae.num_features)
    total = _Sums(sampler.max_denoising_steps, sae.num_features)
    with progress.bar("feature life", len(ids), show, "prompts") as done:
        for first in range(0, len(ids), batch):
            rows = [min(r, len(ids) - 1) for r in range(first, first + batch)]  # the last repeated: one program
            fresh = min(batch, len(ids) - first)
            run = dg.generate(
                rewrapped(bundle, watched), [ids[r] for r in rows], [seed + r for r in rows], sampler,
                model.config.canvas_length, record,
            ).trajectory  # fmt: skip
            for step in range(int(run.num_steps.max())):
                level = None if noise is None else jnp.float32(noise[min(step, len(noise) - 1)])
                told = _seen(sae, jnp.asarray(run.sites[infos[0].name][0, step]), level, k)
                told = [np.asarray(t)[:fresh] for t in told]
                total.add(step, told, run.accepted[0, :, :fresh], run.valid[0, step, :fresh])
            total.end_of_batch()
            done(fresh)
    return total.result()


@jax.jit(static_argnums=3)
def _seen(sae, x_BCD, level, k):
    """Means over positions [B, F] of activation and of being active; the k strongest [B, C, k], -1 if not active."""
    z_BCF = sae.encode(x_BCD, level)
    value, index = jax.lax.top_k(z_BCF, k)
    return z_BCF.mean(1), (z_BCF > 0).mean(1), jnp.where(value > 0, index, -1)


class _Sums:
    """Running sums over batches of prompts."""

    def __init__(self, steps: int, features: int) -> None:
        self.activation, self.active = np.zeros((steps, features)), np.zeros((steps, features))
        self.prompts, self.pairs = np.zeros(steps, int), np.zeros((2, 2, steps))  # (stability, drift) x (sum, count)
        self.end_of_batch()

    def end_of_batch(self) -> None:
        self.before: np.ndarray | None = None
        self.accepted_as: np.ndarray | None = None

    def add(self, step: int, told: list[np.ndarray], accepted_RBC: np.ndarray, took_B: np.ndarray) -> None:
        mean_BF, active_BF, sets_BCk = told
        self.activation[step] += mean_BF[took_B].sum(0)
        self.active[step] += active_BF[took_B].sum(0)
        self.prompts[step] += took_B.sum()
        earlier_BC = accepted_RBC[:step].any(0) if step else np.zeros(accepted_RBC.shape[1:], bool)
        if self.before is not None:
            for at, (other, where) in enumerate(((self.before, ~earlier_BC), (self.accepted_as, earlier_BC))):
                where = where & took_B[:, None]
                index = jaccard(sets_BCk, other)
                self.pairs[at, :, step] += (index * where).sum(), where.sum()
        fresh_BC = ~earlier_BC & accepted_RBC[step]
        kept = sets_BCk if self.accepted_as is None else self.accepted_as
        self.accepted_as = np.where(fresh_BC[..., None], sets_BCk, kept)
        self.before = sets_BCk

    def result(self) -> FeatureLife:
        steps = max(1, int((self.prompts > 0).sum()))
        count = np.maximum(self.prompts, 1)[:steps, None]
        mean = np.where(self.pairs[:, 1], self.pairs[:, 0] / np.maximum(self.pairs[:, 1], 1), np.nan)[:, :steps]
        return FeatureLife(
            activation=self.activation[:steps] / count, active=self.active[:steps] / count, stability=mean[0],
            drift=1 - mean[1], prompts=self.prompts[:steps],
        )  # fmt: skip


def jaccard(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[..] |A and B| / |A or B| of sets written as [.., k] different numbers, -1 for none; 1 for two empty sets."""
    both = ((left[..., :, None] == right[..., None, :]) & (left[..., :, None] >= 0)).sum((-1, -2))
    either = (left >= 0).sum(-1) + (right >= 0).sum(-1) - both
    return np.where(either, both / np.maximum(either, 1), 1.0)


@dataclasses.dataclass(frozen=True)
class Context:
    """One place where a feature is strong: the columns of an `ActivationSet`, and how strong."""

    row: int
    step: int
    position: int
    token: int
    answer: int
    accepted: bool
    activation: float


def top_contexts(
    sae: SAE, found: ActivationSet, site: str, features: Sequence[int], count: int = 10, *, at_once: int = 4096
) -> dict[int, list[Context]]:
    """The samples of a set at which features are strongest, strongest first.

    Args:
        count: contexts a feature; fewer where it is active at fewer.
        at_once: samples encoded at a time.
    """
    features = [int(f) for f in features]
    strengths = []
    for first in range(0, len(found), at_once):
        which = np.arange(first, min(first + at_once, len(found)))
        padded_which = np.concatenate([which, np.full(at_once - len(which), which[-1])])
        x_ND = jnp.asarray(found.values(site, padded_which), jnp.float32).reshape(at_once, -1)
        level = None if sae.shift is None else jnp.asarray(found.columns["noise"][padded_which])
        strengths.append(np.asarray(_of(sae, x_ND, level, jnp.asarray(features)))[: len(which)])
    strength_NF = np.concatenate(strengths)
    names = ("row", "step", "position", "token", "answer", "accepted")
    return {
        feature: [
            Context(*(found.columns[name][n].item() for name in names), float(strength_NF[n, column]))
            for n in np.argsort(-strength_NF[:, column], kind="stable")[:count] if strength_NF[n, column] > 0
        ]
        for column, feature in enumerate(features)
    }  # fmt: skip


@jax.jit
def _of(sae, x_ND, level, features):
    return sae.encode(x_ND, level)[:, features]
