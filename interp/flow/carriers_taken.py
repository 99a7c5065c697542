"""Which carrier holds the information: the canvas or S, at accepted and at fluid positions.

Between two steps of a block only these two flow. At positions that the sampler accepted the canvas token is a sample
of the model's own; elsewhere it is noise, and S alone remembers. One carrier by itself can therefore look inert
(`methods.md` section 10.2). Taken away here is each, and both, at the positions of each kind; what changes is read
at these positions and at all others.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import dgemma_jax as dg
from dgemma_jax.nn.functional import of
from dgemma_jax.progress import bar
from interp import intervals
from interp.flow.recorded import at_last, kept, run_of_block
from interp.flow.removal import blank_soft, noise_tokens, padded_rows, prompts_that_fit, without
from interp.flow.saved import Saved

CARRIERS = ("canvas", "soft", "both")
PLACES = ("accepted", "fluid")
READ = ("there", "elsewhere")


@dataclasses.dataclass(frozen=True, eq=False)
class CarrierSplit(Saved):
    """Effects of taking a carrier away before a step.

    Attributes:
        divergence: [R, 3, 2, 2, B] D(plain || without), nats, mean over positions: by carrier (canvas, soft, both),
            by the kind of positions it is taken from (accepted, fluid), and read there or elsewhere. NaN where there
            are no such positions, or the row took no such step.
        steps: [R], which steps these are; the carriers are those fed into them.
        blank: what S was replaced by.
    """

    divergence: np.ndarray
    steps: tuple[int, ...]
    blank: str

    def mean(self) -> np.ndarray:
        """[3, 2, 2] over steps and rows."""
        flat = np.moveaxis(self.divergence, 0, -2).reshape(3, 2, 2, -1)
        there = np.isfinite(flat)
        return np.where(there.any(-1), np.nansum(flat, -1) / np.maximum(there.sum(-1), 1), np.nan)

    def table(self) -> str:
        """The means as text."""
        mean, lines = self.mean(), [f"{'taken':>8}  {'at':>8}  {'there':>9}  {'elsewhere':>9}   (nats a position)"]
        for c, carrier in enumerate(CARRIERS):
            for p, place in enumerate(PLACES):
                lines.append(f"{carrier:>8}  {place:>8}  {mean[c, p, 0]:9.4f}  {mean[c, p, 1]:9.4f}")
        return "\n".join(lines)

    def plot(self) -> Any:
        """Bars with 95 % intervals over rows; returns the figure."""
        from matplotlib.figure import Figure

        with np.errstate(invalid="ignore"):
            there = np.isfinite(self.divergence)
            by_row = np.where(there.any(0), np.nansum(self.divergence, 0) / np.maximum(there.sum(0), 1), np.nan)
        middle, (low, high) = self.mean(), intervals.of_means(by_row)
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        for axes, (r, read) in zip(figure.subplots(1, 2, sharey=True), enumerate(READ), strict=True):
            for p, place in enumerate(PLACES):
                span = np.abs(np.stack([low, high])[:, :, p, r] - middle[:, p, r])
                axes.bar(np.arange(3) + 0.4 * p, middle[:, p, r], 0.36, yerr=span, label=f"taken at {place}")
            axes.set_xticks(np.arange(3) + 0.2, CARRIERS)
            axes.set_title(f"read {read}")
        figure.axes[0].set_ylabel("nats a position")
        figure.axes[0].legend(frameon=False, fontsize="small")
        return figure

    def __repr__(self) -> str:
        return f"taken away before steps {list(self.steps)}, {self.divergence.shape[-1]} row(s)\n{self.table()}"


def carrier_split(
    bundle: Any, trajectory: dg.Trajectory, steps: Any = None, block: int = 0, *, blank: str = "uniform", seed: int = 0,
    rows_at_once: int | None = None, progress: bool | None = None,
) -> CarrierSplit:  # fmt: skip
    """Take the canvas, S or both away before each step, at the accepted or at the fluid positions.

    Args:
        bundle: the model of the run.
        trajectory: of `record=dg.Record(soft=True)`.
        steps: which, from 1 on; None for all.
        blank: what replaces S: "uniform" (that of the uniform distribution) or "zero".
        seed: of the tokens that replace the canvas.
        rows_at_once: seven times the prompts of a chunk; by default what fits into memory.

    Raises:
        ValueError: step 0 (nothing has crossed yet) or one that no row took.
    """
    run, model = run_of_block(trajectory, block), of(bundle)
    accepted_RBC = kept(trajectory, "accepted")[0][block]
    chosen = list(run.steps[1:]) if steps is None else [int(s) for s in np.atleast_1d(steps)]
    if not chosen or min(chosen) < 1 or max(chosen) not in run.steps:
        raise ValueError(f"steps={chosen}: needed are some of 1..{run.steps[-1]}; into step 0 nothing crosses")
    final_BC = at_last(trajectory, kept(trajectory, "argmax")[0])[block]
    noise, empty = noise_tokens(run, model, seed), blank_soft(bundle, blank)
    prompts = accepted_RBC.shape[1]
    at_once = prompts_that_fit(model, run, 7, rows_at_once)
    found = np.full((len(chosen), 3, 2, 2, prompts), np.nan)
    chunks = padded_rows(prompts, at_once)
    with bar("carriers", len(chosen) * len(chunks), progress) as done:
        for number, step in enumerate(chosen):
            for rows in chunks:
                place = np.stack([accepted_RBC[step - 1, rows], ~accepted_RBC[step - 1, rows]])
                none = np.zeros_like(place)
                canvas = np.concatenate([none[:1], place, none, place])
                soft = np.concatenate([none[:1], none, place, place])
                _, kl = without(
                    model, run.at(step)[rows], run.sampler, canvas, soft, final_BC[rows], noise[step, rows], empty
                )
                kl = np.asarray(kl[1:], float).reshape(3, 2, *place.shape[1:])
                found[number][..., rows] = np.stack([_mean(kl, place), _mean(kl, ~place)], 2)
                done(1)
    found = np.where(trajectory.valid[block, chosen][:, None, None, None], found, np.nan)
    return CarrierSplit(found, tuple(chosen), blank)


def _mean(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """[3, 2, B] of [3, 2, B, C] over positions; NaN where there are none."""
    count = where.sum(-1)
    return np.where(count > 0, (values * where).sum(-1) / np.maximum(count, 1), np.nan)
