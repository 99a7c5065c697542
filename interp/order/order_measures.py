"""The order in which answers are committed, a number for each answer and a table for each regime.

Source of the measures: "Neither Parallel Nor Sequential" (arXiv 2606.14620; `methods.md` section 7). Five traps are
guarded by default; each guard can be switched off, and then warns:

| trap | guard |
|---|---|
| end tokens, committed early, make tau about -0.9 | only content counts: `specials` |
| pooling regimes turns correlations round | a row for each regime: `summary(groups)` |
| a commit can be taken back | the answers in which none was stand beside: `monotone` |
| one bin size seems special | block tau of several sizes: `bins` |
| ties | tau-b, not tau-a: `ties` |
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

import dgemma_jax as dg
from interp import intervals
from interp.flow.recorded import Specials, content
from interp.flow.saved import Saved
from interp.order import rank_order
from interp.order.commit_steps import Commits, commits

COLUMNS = (
    "tau", "monotone tau", "control", "same call", "out of order", "tokens per call", "given up", "entropy at commit",
    "calls",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class CommitOrder(Saved):
    """Measures of the order, one value for each block and row; NaN where there is none.

    Attributes:
        values: [J, B] by name, `COLUMNS` and "block tau B".
        missing: [J, B] content positions that were never accepted, and so have no part in it.
    """

    values: dict[str, np.ndarray]
    missing: np.ndarray

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.values:
            raise KeyError(f"no measure {name!r}; there are {', '.join(self.values)}")
        return self.values[name]

    def summary(
        self, groups: Sequence[str] | None = None, prompts: Sequence[Any] | None = None, *, pooled: bool = False
    ) -> dict[str, dict[str, tuple[float, float, float]]]:
        """Mean and 95 % interval (low, high) of each measure: {regime: {measure: (mean, low, high)}}.

        Args:
            groups: the regime (kind of task) of each row.
            prompts: what each row was run on; rows of one prompt under several seeds are one cluster of the bootstrap.
                By default each row is a prompt of its own.
            pooled: all rows together, whatever their regime; warns.
        """
        rows = self.missing.shape[1]
        if groups is None and not pooled:
            raise ValueError('give groups, the regime of each row (["all"] * rows if there is one), or pooled=True')
        if pooled:
            warnings.warn("pooled over regimes: correlations within regimes may be of the other sign", stacklevel=2)
        return self._intervals(list(self.values), ["all"] * rows if pooled else groups, prompts)

    def _intervals(self, names: Sequence[str], groups: Sequence[str], prompts: Sequence[Any] | None) -> dict:
        """`summary` of some measures; the mean is that over prompts of the means of their answers."""
        rows, groups = self.missing.shape[1], np.array(list(groups), object)
        prompts = np.arange(rows) if prompts is None else np.array([str(p) for p in prompts], object)
        if len(groups) != rows or len(prompts) != rows:
            raise ValueError(f"needed is one group and one prompt for each of {rows} rows")
        found = {}
        for group in dict.fromkeys(groups):
            own = groups == group
            _, number = np.unique(prompts[own], return_inverse=True)
            of_prompt = np.stack([intervals.by_prompt(self.values[name][:, own], number) for name in names])
            low, high = intervals.of_means(of_prompt)
            found[str(group)] = {
                name: (float(np.nanmean(values)) if np.isfinite(values).any() else float("nan"), float(a), float(b))
                for name, values, a, b in zip(names, of_prompt, low, high, strict=True)
            }
        return found

    def table(self, groups: Sequence[str], prompts: Sequence[Any] | None = None) -> str:
        """The summary as text, a line a regime."""
        lines = [" ".join([f"{'regime':<12}", *(f"{name:>17}" for name in COLUMNS)])]
        for group, found in self.summary(groups, prompts).items():
            cells = (f"{m:.3f} [{low:.2f},{high:.2f}]" for m, low, high in (found[name] for name in COLUMNS))
            lines.append(" ".join([f"{group:<12}", *(f"{cell:>17}" for cell in cells)]))
        return "\n".join(lines)

    def plot(self, groups: Sequence[str], prompts: Sequence[Any] | None = None) -> Any:
        """tau-b against the size of the bins, a line a regime, the block-sequential control dashed; the figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.subplots()
        blocks = [name for name in self.values if name.startswith("block tau")]
        for group, found in self._intervals(["tau", "control", *blocks], groups, prompts).items():
            sizes = {1: found["tau"]} | {int(name.split()[-1]): found[name] for name in blocks}
            middle, low, high = np.array(list(sizes.values())).T
            (line,) = axes.plot(list(sizes), middle, marker="o", label=group)
            axes.fill_between(list(sizes), low, high, alpha=0.15, color=line.get_color(), linewidth=0)
            axes.axhline(found["control"][0], color=line.get_color(), linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(sizes), map(str, sizes))
        axes.set_xlim(0.8, 1.25 * max(sizes))  # there may be nothing to see
        axes.set(xlabel="positions in a bin", ylabel="tau-b of commit and position")
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        return figure

    def __repr__(self) -> str:
        said = {name: round(float(np.nanmean(v)), 3) for name, v in self.values.items() if np.isfinite(v).any()}
        return f"commit order of {self.missing.shape[1]} row(s), means: {json.dumps(said)}"


def commit_order(
    trajectory: dg.Trajectory, specials: Specials | None, *, bins: Sequence[int] = rank_order.BINS, ties: bool = True,
    monotone: bool = True, skip: int = 0,
) -> CommitOrder:  # fmt: skip
    """Measures of the order in which content is committed.

    Args:
        trajectory: of any record with accepted, entropy and argmax (the default).
        specials: what is no content, `Specials.of(bundle)`; None counts end tokens and padding too, and warns.
        bins: sizes of the bins of block tau.
        ties: False takes tau-a; warns.
        monotone: False leaves out tau over answers without un-accepts; warns.
        skip: positions left out at the start of an answer (the header of a chat template).
    """
    found = commits(trajectory)
    if specials is None:
        warnings.warn("end tokens and padding count as content: they are committed early, at the end of the text, and "
                      "turn tau negative; give specials=Specials.of(bundle)", stacklevel=2)  # fmt: skip
        own = np.broadcast_to((trajectory.num_steps > 0)[..., None], found.first.shape).copy()
    else:
        own = content(trajectory, specials, skip)
    if not monotone:
        warnings.warn("un-accepts are not looked at: the first acceptance of a position may have been taken back",
                      stacklevel=2)  # fmt: skip
    names = [*COLUMNS, *(f"block tau {size}" for size in bins)]
    values = {name: np.full(own.shape[:2], np.nan) for name in names}
    for block, row in np.argwhere(trajectory.num_steps > 0):
        measured = _of_answer(found, own, block, row, bins, ties)
        for name, value in measured.items():
            values[name][block, row] = value
    values["calls"] = np.where(trajectory.num_steps > 0, trajectory.num_steps, np.nan)
    accepted = (own & (found.first >= 0)).sum(-1)
    values["tokens per call"] = accepted / np.maximum(trajectory.num_steps, 1)
    values["monotone tau"] = np.where(found.is_monotone & monotone, values["tau"], np.nan)
    return CommitOrder(values, (own & (found.first < 0)).sum(-1))


def _of_answer(found: Commits, own: np.ndarray, block: int, row: int, bins: Sequence[int], ties: bool) -> dict:
    place = np.flatnonzero(own[block, row] & (found.first[block, row] >= 0))
    step = found.first[block, row, place]
    same, against = rank_order.pair_shares(step, place)
    return {
        "tau": rank_order.tau(step, place, ties=ties),
        "control": rank_order.control_tau(place - place[0]) if len(place) else np.nan,
        "same call": same,
        "out of order": against,
        "given up": found.given_up[block, row],
        "entropy at commit": np.mean(found.entropy[block, row, place]) if len(place) else np.nan,
    } | {f"block tau {size}": value for size, value in rank_order.block_tau(step, place, bins).items()}
