"""The refusal feature of an audit: found on one half of the prompts, tried on the other, and taken out or put in.

Three interventions on every prompt, as rows of one batch:

inside    the feature's directions are taken out of the whole residual stream
outside   as many other directions: those along which the same residuals vary most apart from what tells refused from
          answered prompts. What this changes, any damage of that size may change
added     the feature is added in the prompt, in the layers where its removal works
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.config import SamplerConfig
from dgemma_jax.nn.functional import of
from interp import steering
from interp.captures import capture_prompt
from interp.editing import rewrapped
from interp.features.directions import Directions, find_directions, select_directions
from interp.features.projection import ablate_directions, orthonormal_rows
from interp.safety.verdicts import REFUSAL, Rule

ARMS = ("inside", "outside", "added")
_AT_ONCE = 16  # prompts of a compiled call: always as many, so that few programs are compiled


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RefusalFeature:
    """A feature that refusals share, and what it is compared with.

    Attributes:
        found: the directions, chosen by their effect.
        others: [n, D] as many directions, orthogonal to it, for the comparison.
        resting: mean activation of answered prompts, at the prompt's last token.
        refusing: the same of refused ones.
    """

    found: Directions
    others: np.ndarray
    resting: float
    refusing: float

    @property
    def layers(self) -> tuple[int, ...]:
        """Where it is added: from the first layer that was chosen to the middle of the model, or to the last chosen.

        One layer is enough to take a direction out everywhere, and too little to put it in: later layers undo a push.
        """
        chosen = [self.found.places[k][2] for k in self.found.chosen]
        last = max(place[2] for place in self.found.places)
        middle = min((last + 1) // 2, last - 1)  # a push of the prompt in the last layer reaches nothing
        return tuple(range(min(chosen), max(*chosen, middle) + 1))

    @property
    def place(self) -> tuple[int, np.ndarray]:
        """(layer, direction [D] of length 1) of the best one: where its activation is read."""
        best = self.found.chosen[0]
        return self.found.places[best][2], self.found.vectors[best] / np.linalg.norm(self.found.vectors[best])

    def share(self, activation: Any) -> Any:
        """Activations on a scale from 0 (answered prompts) to 1 (refused ones)."""
        return (np.asarray(activation) - self.resting) / ((self.refusing - self.resting) or 1.0)

    def arms(self, bundle: Any, rows: Sequence[str], strength: float, sampler: SamplerConfig | None = None) -> Any:
        """The model or bundle of a batch, each of its rows under one of `ARMS`."""
        own, other = orthonormal_rows(bundle, self.found.best)[0], orthonormal_rows(bundle, self.others)[0]
        spans = np.stack([other if arm == "outside" else own for arm in rows])
        is_out = np.array([arm != "added" for arm in rows], np.float32)
        is_in = np.array([strength * (arm == "added") for arm in rows], np.float32)
        edited = ablate_directions(bundle, spans, rows=is_out, sampler=sampler)
        return steering.steer(edited, self.vector(), is_in, layers=list(self.layers), place="prompt")

    def vector(self) -> steering.SteeringVector:
        """Differences of means at the prompt's last token, by layer."""
        last = [k for k, place in enumerate(self.found.places) if place[:2] == ("prompt", -1)]
        return steering.SteeringVector(
            difference=self.found.vectors[last], norms=self.found.norms[last],
            layers=tuple(self.found.places[k][2] for k in last), place="prompt", counts=(0, 0),
        )  # fmt: skip

    def activations(self, bundle: Any, prompts: Sequence[Any]) -> np.ndarray:
        """[N] at the prompt's last token, in units of the residual."""
        layer, unit = self.place
        return last_residuals(bundle, prompts, [layer])[:, 0] @ unit


def rows_of_models(models: Sequence[Any], chosen: Sequence[int]) -> Any:
    """The model, or bundle, whose row i is edited as in `models[chosen[i]]`; they differ by values of rows alone.

    Cheaper than to edit anew for every batch.
    """
    rows = np.arange(len(chosen))

    def mixed(*leaves: Any) -> Any:
        if all(leaf is leaves[0] for leaf in leaves):
            return leaves[0]
        stacked = np.stack([np.asarray(leaf) for leaf in leaves])
        if (stacked == stacked[0]).all():
            return leaves[0]
        own = stacked[0].copy()
        own[rows] = stacked[np.asarray(chosen), rows]
        return jnp.asarray(own)

    return rewrapped(models[0], jax.tree.map(mixed, *map(of, models)))


def last_residuals(bundle: Any, prompts: Sequence[Any], layers: Sequence[int]) -> np.ndarray:
    """[N, L, D] residuals of the causal pass at each prompt's last token."""
    names, found = [f"layers.{layer}.resid_post" for layer in layers], []
    for first in range(0, len(prompts), _AT_ONCE):
        part = list(prompts[first : first + _AT_ONCE])
        acts = capture_prompt(bundle, part + part[-1:] * (_AT_ONCE - len(part)), names)
        last = acts.valid.sum(1) - 1
        found.append(acts.stack()[:, np.arange(_AT_ONCE), last].swapaxes(0, 1)[: len(part)].astype(np.float32))
    return np.concatenate(found)


def find_refusal_feature(
    bundle: Any, refused: Sequence[Any], answered: Sequence[Any], rule: Rule, *, most: int = 2, tried: int = 12,
    found: Directions | None = None, seed: int = 0, sampler: SamplerConfig | None = None, show: bool | None = None,
) -> RefusalFeature:  # fmt: skip
    """The feature of refused against answered prompts, chosen by what its removal does.

    Args:
        refused, answered: prompts, at least 2 of each. The last `tried` of each serve for the choice; directions come
            from the others where there are three times as many, else from all.
        most: directions removed together at most.
        found: directions already chosen: then only what they are compared with is made.

    Raises:
        ValueError: too few prompts.
    """
    if min(len(refused), len(answered)) < 2:
        raise ValueError(f"a direction needs 2 prompts of each kind; {len(refused)} refused, {len(answered)} answered")
    # Of few prompts all serve for both: a choice by one or two of them picks any layer.
    back = [tried if len(side) >= 3 * tried else 0 for side in (refused, answered)]
    source = [list(side)[: len(side) - n] for side, n in zip((refused, answered), back, strict=True)]
    judge = [list(side)[-tried:] for side in (refused, answered)]
    if found is None:
        settings = sampler or getattr(bundle, "sampler", None)
        # What a direction breaks need not be waited for: runs that do not settle are cut short.
        brief = settings and settings.replace(max_denoising_steps=min(settings.max_denoising_steps, 8))
        found = find_directions(bundle, *source, steps=0, batch=32, sampler=sampler, show=show)
        found = select_directions(
            bundle, found, *judge, lambda text: rule(text) == REFUSAL, most=most, seed=seed, sampler=brief, show=show
        )
    layer = found.places[found.chosen[0]][2]
    rows = [last_residuals(bundle, side, [layer])[:, 0] for side in source]
    unit = found.vectors[found.chosen[0]] / np.linalg.norm(found.vectors[found.chosen[0]])
    return RefusalFeature(
        found=found, others=_other_directions(rows, found.best, of(bundle).config.embed_dim),
        resting=float((rows[1] @ unit).mean()), refusing=float((rows[0] @ unit).mean()),
    )  # fmt: skip


def _other_directions(sides: list[np.ndarray], best: np.ndarray, width: int) -> np.ndarray:
    """[n, D] orthogonal to `best` [n, D], along which residuals vary most around the mean of their own side."""
    within = np.concatenate([side - side.mean(0) for side in sides]).astype(np.float64)
    basis = np.linalg.qr(best.T.astype(np.float64))[0]
    within -= within @ basis @ basis.T
    found = np.linalg.svd(np.concatenate([within, 1e-6 * np.eye(width)]), full_matrices=False)[2][: len(best)]
    found -= found @ basis @ basis.T  # where nothing varies, the filling may point along it
    return (found / np.linalg.norm(found, axis=-1, keepdims=True)).astype(np.float32)
