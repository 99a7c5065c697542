"""What a saliency gives: scores with error bars, saved, compared and drawn."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from interp import array_files

_ARRAYS = ("scores", "stderr", "places", "token_units", "interactions", "interactions_stderr", "kept")
_KIND = "saliency"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Saliency:
    """How much each of U units drives a target.

    A positive score: the unit raises the target. Scores of a path add up to `on - off`.

    Attributes:
        scores: [U] in units of the target (nats for a log-probability).
        stderr: [U] standard errors; NaN where the method has none.
        units: [U] names.
        kinds: [U] kind of each unit.
        places: [U, 2] layer and position of each; -1 where it has none.
        on, off: the target with all units on, and with all off (mean over the baselines drawn).
        evaluations: of the target; a gradient counts as one.
        method, target, baseline: in words.
        scope: "step", "window" or "generation", what was explained.
        step: the denoising step explained, or the first of those.
        tokens: [T] the prompt, token by token.
        token_units: [T] unit of each token of the prompt, -1 for none.
        interactions, interactions_stderr: [U, U] of pairs, or None.
        kept: [U] bool, units that are enough for the target, of a method that chooses; else None.
    """

    scores: np.ndarray
    stderr: np.ndarray
    units: tuple[str, ...]
    kinds: tuple[str, ...]
    places: np.ndarray
    on: float
    off: float
    evaluations: int
    method: str = ""
    target: str = ""
    baseline: str = ""
    scope: str = "step"
    step: int = 0
    tokens: tuple[str, ...] = ()
    token_units: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, int))
    interactions: np.ndarray | None = None
    interactions_stderr: np.ndarray | None = None
    kept: np.ndarray | None = None

    @property
    def completeness_gap(self) -> float:
        """|sum of scores - (on - off)|, in units of the target: 0 where all of the difference is given out."""
        return abs(float(self.scores.sum()) - (self.on - self.off))

    def top(self, count: int = 10) -> list[tuple[str, float, float]]:
        """Units by size of score: (name, score, standard error)."""
        order = np.argsort(-np.abs(self.scores), kind="stable")[:count]
        return [(self.units[i], float(self.scores[i]), float(self.stderr[i])) for i in order]

    def compare(self, other: Saliency, count: int = 5) -> dict[str, float]:
        """How well two maps of the same units agree.

        Returns:
            "rank_correlation" (Spearman), "correlation" (Pearson), "same_top" (share of the `count` largest by size
            that both have), "largest_difference" (in units of the target), "largest_z" (the same in standard errors
            of the difference; NaN without them).

        Raises:
            ValueError: the units differ.
        """
        if self.units != other.units:
            raise ValueError(f"the maps have other units: {len(self.units)} and {len(other.units)} of them")
        gap = np.abs(self.scores - other.scores)
        with np.errstate(divide="ignore", invalid="ignore"):
            z = gap / np.hypot(self.stderr, other.stderr)
        count = min(count, len(gap))
        tops = [set(np.argsort(-np.abs(one.scores), kind="stable")[:count]) for one in (self, other)]
        return {
            "rank_correlation": rank_correlation(self.scores, other.scores),
            "correlation": _correlation(self.scores, other.scores),
            "same_top": len(tops[0] & tops[1]) / count,
            "largest_difference": float(gap.max()),
            "largest_z": float(np.nanmax(z)) if np.isfinite(z).any() else float("nan"),
        }

    def plot(self, most: int = 30) -> Any:
        """Bars with error bars, largest first; a heat map where units are layer x position. A matplotlib figure."""
        from interp.masking import drawings

        return drawings.draw(self, most)

    def save(self, path: Any) -> Any:
        """Write one `.npz` file."""
        arrays = {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _ARRAYS}
        return array_files.write(path, arrays, {"kind": _KIND} | rest)

    @classmethod
    def load(cls, path: Any) -> Saliency:
        """Read what `save` wrote."""
        arrays, about = array_files.read(path, _KIND)
        about.pop("kind")
        words = {name: tuple(about.pop(name)) for name in ("units", "kinds", "tokens")}
        return cls(**arrays, **words, **about)

    def _repr_html_(self) -> str:
        from interp.masking import drawings

        return drawings.page(self)

    def __repr__(self) -> str:
        lines = [
            f"{self.method} of {self.target}: {self.on:.4g} with all {len(self.units)} units on, {self.off:.4g} with "
            f"all off ({self.baseline}); {self.scope} {self.step}, {self.evaluations} evaluations, completeness gap "
            f"{self.completeness_gap:.2g}"
        ]
        lines += [f"{score:+9.4f} ± {error:.4f}  {name}" for name, score, error in self.top()]
        return "\n".join(lines)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, ties by mean rank."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return _correlation(ranks(one), ranks(other))


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    size = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / size) if size > 0 else float("nan")
