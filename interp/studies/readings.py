"""What each statistic says beyond the means of its columns: numbers for the summary, and figures."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.flow.acceptance import TRANSITIONS
from interp.flow.identity_classes import TokenIdentity
from interp.flow.step_curves import StepCurves
from interp.monitor.measure import Monitorability, monitorability
from interp.monitor.monitors import ProbeMonitor
from interp.monitor.rollouts import VIEWS, Rollouts
from interp.order.confidence_auroc import confidence
from interp.order.lengths import foresight_of
from interp.order.order_measures import CommitOrder

if TYPE_CHECKING:
    from interp.studies.results import Study

_TAKEN = ("top 8", "p above")  # the columns of "identity" start with these
_MOST_POINTS = 2000  # of a scatter


def more(study: Study, name: str) -> dict[str, Any]:
    """Numbers beyond means, as plain JSON; empty if there are none."""
    made = {"order": _confidence, "lengths": _foresight, "identity": _shares, "monitorability": _scores}.get(name)
    return made(study) if made else {}


def figures(study: Study, name: str) -> dict[str, Any]:
    """Figures by name."""
    made: dict[str, dict[str, Callable[[Study], Any]]] = {
        "generation": {"steps": _steps},
        "order": {"tau": lambda s: order_of(s).plot(s["group"], s["id"])},
        "flow": {"transitions": _transitions, "settling": _settling},
        "identity": {name: lambda s, n=name: identity_of(s, n).plot() for name in _TAKEN},
        "lengths": {"foresight": _lengths},
        "smearing": {"steps": _smears},
        "divergence": {"steps": lambda s: _curves(s, "divergence/", "nats", "divergence of steps").plot()},
        "monitorability": {"scores": lambda s: monitorability_of(s).plot()},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # steps that no row took
        return {what: draw(study) for what, draw in made.get(name, {}).items()}


def order_of(study: Study) -> CommitOrder:
    """The measures of order of all rows, to make tables and plots of."""
    names = [n for n in study.columns if n.startswith("order/") and n != "order/never accepted"]
    values = {n.removeprefix("order/"): study[n][None] for n in names}
    return CommitOrder(values, study["order/never accepted"][None])


def identity_of(study: Study, name: str) -> TokenIdentity:
    """Classes of likely tokens of all rows."""
    column = next(c for c in study.columns if c.startswith(f"identity/{name}"))
    counts = study[column].swapaxes(0, 1)[None]
    return TokenIdentity(counts, np.zeros((*counts.shape[:-1], 0), int), column.removeprefix("identity/"))


def monitorability_of(study: Study, monitors: Any = None) -> Monitorability:
    """Scores of monitors over the rows of a study of two arms; by default its own monitors."""
    given = study.manifest["settings"]["monitors"] if monitors is None else monitors
    instance = np.unique(study["id"], return_inverse=True)[1]
    views = {view: tuple(study[f"monitor/{view}"]) for view in VIEWS}
    rollouts = Rollouts(instance, np.array(study["arm"]) == "intervention", study["right"] == 1, views)
    return monitorability(rollouts, given or {"probe": ProbeMonitor()})


def _confidence(study: Study) -> dict[str, Any]:
    """AUROC of -entropy at commit for correctness, by group; where answers were graded."""
    graded = np.flatnonzero(np.isfinite(study["right"]))
    if not len(graded):
        return {}
    groups, ids = ([study[name][row] for row in graded] for name in ("group", "id"))
    found = confidence(-study["order/entropy at commit"][graded], study["right"][graded] == 1, groups, ids)
    return {"auroc of confidence": {g: [_number(x) for x in (c.auroc, c.low, c.high)] for g, c in found.items()},
            "accuracy by tertile": {g: [_number(x) for x in c.tertiles] for g, c in found.items()}}  # fmt: skip


def _foresight(study: Study) -> dict[str, Any]:
    """By group, and of all rows: what is asked is whether lengths are known, of whatever kind of text."""
    found = {}
    for group, rows in [*study.groups(), ("all", np.arange(len(study)))]:
        lengths = study["lengths/final"][rows]
        if len(rows) >= 3 and np.ptp(lengths):
            seen = foresight_of(study["lengths/estimate"][rows].T, lengths)
            found[group] = {n: [_number(x) for x in getattr(seen, n)] for n in ("correlation", "error", "null")}
    return {"by step": found}


def _shares(study: Study) -> dict[str, Any]:
    shares = {name: identity_of(study, name).shares() for name in _TAKEN}
    return {name: [[_number(x) for x in step] for step in found] for name, found in shares.items()}


def _scores(study: Study) -> dict[str, Any]:
    found = monitorability_of(study)
    rows = [{k: v if isinstance(v, str) else _number(v) for k, v in row.items()} for row in found.rows()]
    return {"positive instances": found.positives, "instances": found.total, "not reported": found.reason,
            "scores": rows}  # fmt: skip


def _number(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


def _axes(width: float = 6, height: float = 3.6, count: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, count)
    for one in np.atleast_1d(axes):
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _curves(study: Study, start: str, unit: str, about: str) -> StepCurves:
    values = {n.removeprefix(start): study[n].T[None] for n in study.columns if n.startswith(start)}
    return StepCurves(values, unit, about)


def _transitions(study: Study) -> Any:
    curves = _curves(study, "flow/", "positions", "acceptance since the step before, rows still running")
    names = [name for name in TRANSITIONS if name in curves.values]
    return StepCurves({name: curves[name] for name in names}, curves.unit, curves.about).plot()


def _settling(study: Study) -> Any:
    """Settled share and mean entropy by step, a line a group."""
    figure, (left, right) = _axes(9, 3.4, 2)
    _by_step(study, left, "flow/settled", "share settled")
    _by_step(study, right, "entropy", "mean entropy, nats")
    if np.any(study["entropy"] > 0):
        right.set_yscale("log")
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize="small", loc="outside right upper")
    return figure


def _by_step(study: Study, axes: Any, name: str, label: str) -> None:
    """Means over all rows of a group. A row that has stopped keeps its last value: means over those that still run
    would say which rows those are."""
    for group, rows in study.groups():
        values = study[name][rows]
        last = np.maximum.accumulate(np.where(np.isfinite(values), np.arange(values.shape[1]), 0), 1)
        axes.plot(range(1, values.shape[1] + 1), np.nanmean(np.take_along_axis(values, last, 1), 0), label=group)
    axes.set(xlabel="steps taken; stopped rows keep their last value", ylabel=label)
    _doublings(axes, study[name].shape[1])


def _doublings(axes: Any, most: int) -> None:
    """Steps on an axis by twos: most happens in the first of them, and few rows take many."""
    axes.set_xscale("log", base=2)
    ticks = [2**n for n in range(most.bit_length())]
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_xlim(0.9, 1.1 * most)  # there may be nothing to see


def _steps(study: Study) -> Any:
    """How many denoising steps a generation took, a row a group: median, quartiles, and generations far from them."""
    groups = list(study.groups())
    figure, axes = _axes(6, 1 + 0.35 * len(groups))
    axes.boxplot([study["steps"][rows] for _, rows in groups], orientation="horizontal", widths=0.6,
                 tick_labels=[group for group, _ in groups], medianprops={"linewidth": 2},
                 flierprops={"marker": ".", "markersize": 4, "alpha": 0.5})  # fmt: skip
    axes.set(xlabel="denoising steps of a generation")
    _doublings(axes, int(study["steps"].max()))
    axes.invert_yaxis()
    return figure


def _lengths(study: Study) -> Any:
    """Estimates of the first steps against the final length, and their correlation by step."""
    figure, (left, right) = _axes(9, 3.8, 2)
    estimate, final = study["lengths/estimate"][:_MOST_POINTS], study["lengths/final"][:_MOST_POINTS]
    spread = np.random.default_rng(0).uniform(-0.3, 0.3, len(final))
    for step in range(min(3, estimate.shape[1])):
        left.scatter(final + spread, estimate[:, step], s=5, alpha=0.4, linewidths=0, label=f"after step {step + 1}")
    left.axline((0, 0), slope=1, color="0.6", linewidth=1)
    left.set(xlabel="final length", ylabel="length that the step expects")
    left.legend(frameon=False, markerscale=2.5, fontsize="small")
    groups = _foresight(study)["by step"]
    for group, found in groups.items():
        values = np.array(found["correlation"], float)
        style = {"color": "k", "linewidth": 2} if group == "all" else {}
        right.plot(range(1, len(values) + 1), values, label=group, **style)
    right.set(xlabel="steps taken", ylabel="correlation with the final length")
    right.set_ylim(min(0, right.get_ylim()[0]), 1.05)
    if groups:
        right.legend(frameon=False, fontsize="small", ncols=2)
    else:
        right.text(0.5, 0.5, "lengths are too few,\nor all the same", ha="center", transform=right.transAxes)
    return figure


def _smears(study: Study) -> Any:
    """Positions at which a token stands that is not their own in the end, by step."""
    figure, axes = _axes()
    _by_step(study, axes, "smearing/positions", "smeared positions")
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize="small", loc="outside right upper")
    return figure
