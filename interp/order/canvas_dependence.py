"""Which position of the canvas another one rests on: measured by taking it away, not by when it came.

Order in time says what was written first; a text is written out of order in the sense of causes if earlier
positions rest on later ones. Each position is taken from the canvas and from S before a step, and the fall of the
log-probability of the final token is read at all others.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax.nn.functional import of
from dgemma_jax.progress import bar
from interp.flow.recorded import run_of_block
from interp.flow.removal import blank_soft, noise_tokens, without
from interp.flow.saved import Saved
from interp.rows import that_fit

SHUFFLES = 500


@dataclasses.dataclass(frozen=True, eq=False)
class Dependence(Saved):
    """Attributes:
    loss: [R, B, C, C] nats: fall of log p(final token at j) when position i is taken away, [.., i, j]. 0 at i = j.
    steps: [R], before which steps.
    """

    loss: np.ndarray
    steps: tuple[int, ...]

    def backward(self, where: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Share of the dependence that runs from later to earlier positions, and its null.

        Args:
            where: [B, C] bool, the positions that count (`content(...)[block]`).
            seed: of the null, the same share with positions in random order: 1/2 on average.

        Returns:
            [R, B] sum of |loss| on earlier positions / sum on all; and [R, B] the p-value, two-sided, of as far a
            deviation from 1/2 under random order. NaN with fewer than two positions.
        """
        share = np.full(self.loss.shape[:2], np.nan)
        p_value = share.copy()
        rng = np.random.default_rng(seed)
        for step, row in np.ndindex(share.shape):
            at = np.flatnonzero(where[row])
            if len(at) < 2:
                continue
            weight = np.abs(self.loss[step, row][np.ix_(at, at)])
            weight = weight * ~np.eye(len(at), dtype=bool)
            total = max(weight.sum(), 1e-30)
            share[step, row] = np.tril(weight, -1).sum() / total
            orders = rng.permuted(np.tile(np.arange(len(at)), (SHUFFLES, 1)), axis=1)
            later = orders[:, :, None] > orders[:, None, :]
            drawn = (weight * later).sum((1, 2)) / total
            far = np.abs(drawn - 0.5) >= abs(share[step, row] - 0.5) - 1e-12
            p_value[step, row] = (1 + far.sum()) / (1 + SHUFFLES)
        return share, p_value

    def plot(self, step: int = 0, row: int = 0) -> Any:
        """A heat map, position taken away against position read; returns the figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.6, 4), layout="constrained")
        axes = figure.subplots()
        size = np.abs(self.loss[step, row]).max() or 1.0
        image = axes.imshow(self.loss[step, row], cmap="RdBu_r", vmin=-size, vmax=size)
        axes.set(xlabel="read at", ylabel="taken away", title=f"before step {self.steps[step]}")
        figure.colorbar(image, label="nats lost")
        return figure

    def __repr__(self) -> str:
        return f"dependence of {self.loss.shape[-1]} positions on each other before steps {list(self.steps)}"


def dependence(
    bundle: Any, trajectory: dg.Trajectory, steps: Any, block: int = 0, *, positions: Any = None, seed: int = 0,
    blank: str = "uniform", rows_at_once: int | None = None, progress: bool | None = None,
) -> Dependence:  # fmt: skip
    """Take every position away before each of some steps, and read all others.

    Args:
        bundle: the model of the run.
        trajectory: of `record=dg.Record(soft=True)`.
        steps: from 1 on; every row took them.
        positions: which are taken away, a list; None for all. The others lose nothing (0).
        seed: of the tokens that replace the canvas.
        blank: what replaces S, "uniform" or "zero".
        rows_at_once: interventions times rows in a call.

    Raises:
        ValueError: a step that not every row took, or step 0, into which nothing crosses.
    """
    run, model = run_of_block(trajectory, block), of(bundle)
    chosen = [int(s) for s in np.atleast_1d(steps)]
    taken = int(trajectory.num_steps[block].min())
    if not chosen or min(chosen) < 1 or max(chosen) >= taken:
        raise ValueError(f"steps={chosen}: needed are some of 1..{taken - 1}, which every row took")
    final_BC = trajectory.committed[block]
    rows, length = final_BC.shape
    sources = np.arange(length) if positions is None else np.unique(np.atleast_1d(positions))
    noise, empty = noise_tokens(run, model, seed), blank_soft(bundle, blank)
    size = min(that_fit(model, run, rows, rows_at_once) - 1, len(sources))
    if size < 1:
        raise ValueError(f"rows_at_once={rows_at_once}: needed are at least {2 * rows} for {rows} row(s)")
    loss = np.zeros((len(chosen), rows, length, length))
    parts = [sources[i : i + size] for i in range(0, len(sources), size)]
    with bar("dependence", len(chosen) * len(parts), progress) as done:
        for number, step in enumerate(chosen):
            at = run.at(step)
            for part in parts:
                away = np.zeros((size + 1, rows, length), bool)
                away[np.arange(1, len(part) + 1), :, part] = True
                logp, _ = without(model, at, run.sampler, away, away, final_BC, jnp.asarray(noise[step]), empty)
                logp = np.asarray(logp, float)
                fall = (logp[:1] - logp[1 : len(part) + 1]) * ~away[1 : len(part) + 1]
                loss[number][:, part] = fall.swapaxes(0, 1)
                done(1)
    return Dependence(loss, tuple(chosen))
