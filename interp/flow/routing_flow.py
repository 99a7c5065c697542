"""Which experts the positions go to, step by step: how they change, and how evenly they are used."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from interp.activations import Activations
from interp.captures import capture
from interp.flow.saved import Saved


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertFlow(Saved):
    """Attributes:
    weights: [R, L, B, C, E] weights that were really used, zero for experts that were not chosen.
    valid: [R, B] bool, the row took the step.
    """

    weights: np.ndarray
    valid: np.ndarray

    @property
    def load(self) -> np.ndarray:
        """[R, L, E] share of choices that fall on each expert."""
        chosen = (self.weights != 0) & self.valid[:, None, :, None, None]
        count = chosen.sum((2, 3))
        return count / np.maximum(count.sum(-1, keepdims=True), 1)

    def spread(self) -> np.ndarray:
        """[R, L] exp of the entropy of the load: how many experts are used evenly."""
        load = self.load
        return np.exp(-np.sum(np.where(load > 0, load * np.log(np.where(load > 0, load, 1)), 0), -1))

    def moved(self, where: np.ndarray | None = None) -> np.ndarray:
        """[R - 1, L] mean 1 - Jaccard of the experts of a position at consecutive steps: 0 the same, 1 all others.

        Args:
            where: [R, B, C] bool, positions that count by the later step (`trajectory.accepted[0]`); None for all.
        """
        chosen = self.weights != 0
        both, either = (chosen[1:] & chosen[:-1]).sum(-1), (chosen[1:] | chosen[:-1]).sum(-1)
        use = np.broadcast_to((self.valid[1:] & self.valid[:-1])[:, None, :, None], both.shape)
        use = use if where is None else use & where[1:, None]
        count = use.sum((2, 3))
        far = ((1 - both / np.maximum(either, 1)) * use).sum((2, 3))
        return np.where(count > 0, far / np.maximum(count, 1), np.nan)

    def null(self, seed: int = 0) -> np.ndarray:
        """[R - 1, L] `moved` when each position is compared with another position of its row at random."""
        order = np.random.default_rng(seed).permutation(self.weights.shape[3])
        mixed = self.weights.copy()
        mixed[1::2] = mixed[1::2, :, :, order]
        return dataclasses.replace(self, weights=mixed).moved()

    def __repr__(self) -> str:
        steps, layers, *_, experts = self.weights.shape
        return (
            f"routing over {steps} step(s) in {layers} layer(s): {np.nanmean(self.spread()):.1f} of {experts} experts "
            f"in even use" + (f", {np.nanmean(self.moved()):.0%} change from step to step" if steps > 1 else "")
        )


def expert_flow(bundle: Any, prompts: Any, layers: str = "*", steps: Any = None, **options: Any) -> ExpertFlow:
    """The routing of every position at every step of one block.

    Args:
        layers: which, "*" or a number as text.
        steps: as for `interp.capture`.
        **options: of `interp.capture` (seed, sampler, memory_limit, ...).
    """
    return flow_of(capture(bundle, prompts, f"layers.{layers}.router_weights", steps, **options))


def flow_of(acts: Activations) -> ExpertFlow:
    """The same of captured "layers.*.router_weights", of one block."""
    return ExpertFlow(np.moveaxis(acts.stack("layers.*.router_weights"), 0, 1), acts.valid)
