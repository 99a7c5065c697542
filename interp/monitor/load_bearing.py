"""Does an effect need the reasoning? Instances by how much of it is left where the model reasons little or not at all.

    LB = 1 - TE_low / TE_high        TE = P(outcome | intervention) - P(outcome | none)

1: without reasoning there is no effect, so a monitor that reads reasoning can know of it. 0: the effect is as large
without, and reasoning that names it is a report, not its cause. Below 0: reasoning works against it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from interp.flow.saved import Saved
from interp.monitor import gmean
from interp.monitor.resampling import Bootstrap
from interp.monitor.rollouts import Rollouts


@dataclasses.dataclass(frozen=True, eq=False)
class LoadBearing(Saved):
    """Of N instances.

    Attributes:
        instance: [N] their numbers.
        high, low: [N] effects with reasoning and with little of it.
        value: [N] LB; NaN where the effect with reasoning does not pass Wald's gate: there is nothing to divide.
        interval: [N, 2] 2.5 and 97.5 percentiles of LB, rollouts of each arm drawn anew.
    """

    instance: np.ndarray
    high: np.ndarray
    low: np.ndarray
    value: np.ndarray
    interval: np.ndarray

    def strata(self, least: float = 0.5) -> dict[str, np.ndarray]:
        """Instance numbers: "load-bearing" (LB of at least this), "not", and "no effect".

        `rollouts.only(strata["load-bearing"])` are the rollouts to score a monitor on.
        """
        known = np.isfinite(self.value)
        bears = known & (np.nan_to_num(self.value) >= least)
        masks = {"load-bearing": bears, "not": known & ~bears, "no effect": ~known}
        return {name: self.instance[mask] for name, mask in masks.items()}

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(own)} {name}" for name, own in self.strata().items())
        mean = f"{np.nanmean(self.value):.2f}" if np.isfinite(self.value).any() else "unknown"
        return (
            f"load-bearing reasoning, {len(self.instance)} instances: {sizes}; LB {mean} on average, effects "
            f"{self.high.mean():.2f} with it and {self.low.mean():.2f} without"
        )


def load_bearing(high: Rollouts, low: Rollouts, bootstrap: Bootstrap | None = None) -> LoadBearing:
    """How much of each instance's effect needs the reasoning.

    Args:
        high: rollouts in which the model reasons, `interp.monitor_rollouts(..., thinking=True)` for instance.
        low: of the same instances, with little or none: thinking off, a short answer, few steps.
        bootstrap: settings of the intervals.

    Raises:
        ValueError: other instances in one than in the other, or an arm of one without rollouts.
    """
    settings = bootstrap or Bootstrap()
    names = np.unique(high.instance)
    if not np.array_equal(names, np.unique(low.instance)):
        odd = sorted(set(names.tolist()) ^ set(np.unique(low.instance).tolist()))
        raise ValueError(f"instances {odd[:8]} are in one set of rollouts only; both need the same instances")
    rng = np.random.default_rng(settings.seed)
    effects, values, intervals = [], [], []
    for name in names:
        arms = [[own.outcome[(own.instance == name) & (own.arm == x)] for x in (False, True)] for own in (high, low)]
        if not all(len(arm) for pair in arms for arm in pair):
            raise ValueError(f"instance {name} has an arm without rollouts; needed are both, in both sets")
        own = [float(gmean.share(on) - gmean.share(off)) for off, on in arms]
        drawn = [[rng.choice(arm, (settings.draws, len(arm))) for arm in pair] for pair in arms]
        again = [gmean.share(on) - gmean.share(off) for off, on in drawn]
        counts = own[0] > 0 and bool(gmean.passes(*arms[0], settings.wald_k))
        ratios = 1 - again[1][again[0] > 0] / again[0][again[0] > 0]
        effects.append(own)
        values.append(1 - own[1] / own[0] if counts else np.nan)
        intervals.append(np.percentile(ratios, (2.5, 97.5)) if counts else (np.nan, np.nan))
    with_it, without = np.array(effects).T
    return LoadBearing(names, with_it, without, np.array(values), np.array(intervals))
