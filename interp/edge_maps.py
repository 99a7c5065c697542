"""Scores of the edges of a computation, from senders to receivers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from interp import array_files


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EdgeMap:
    """How far a sender's change moves a metric through one receiver.

    Attributes:
        scores: [R, senders, receivers, B] float32, in the units of the metric; 0 where there is no edge.
        senders, receivers: names, in the order of the computation; a head as "layers.2.attn_z.0".
        steps: [R].
        base, donor: [R, B] metric of the run that was changed, and of the run that gave the values.
        method: in words.
    """

    scores: np.ndarray
    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    steps: list[int]
    base: np.ndarray
    donor: np.ndarray
    method: str = ""

    def __post_init__(self) -> None:
        shape = (len(self.steps), len(self.senders), len(self.receivers), self.base.shape[-1])
        if self.scores.shape != shape:
            raise ValueError(f"scores has shape {self.scores.shape}; steps, senders, receivers and rows make {shape}")

    def __getitem__(self, edge: tuple[str, str]) -> np.ndarray:
        """[R, B] scores of the edge (sender, receiver)."""
        for name, known in zip(edge, (self.senders, self.receivers), strict=True):
            if name not in known:
                raise KeyError(f"{name!r} is none of {', '.join(known)}")
        return self.scores[:, self.senders.index(edge[0]), self.receivers.index(edge[1])]

    @property
    def size(self) -> int:
        """Edges that take effect at some step in some row."""
        return int(np.count_nonzero(self.scores.any((0, 3))))

    def top(self, count: int = 10) -> list[tuple[str, str, int, float]]:
        """The edges with the largest mean score over rows, by size: (sender, receiver, step, score)."""
        mean = self.scores.mean(-1)
        found = []
        for at in np.argsort(-np.abs(mean), None)[:count]:
            step, sender, receiver = np.unravel_index(at, mean.shape)
            found.append((self.senders[sender], self.receivers[receiver], self.steps[step], float(mean.flat[at])))
        return found

    def plot(self) -> Any:
        """A heat map of senders by receivers, the mean over rows, one for each step; returns the figure."""
        from matplotlib.figure import Figure

        mean = self.scores.mean(-1)
        limit = max(float(np.abs(mean).max()), 1e-12)
        tall, wide = (0.16 * len(names) for names in (self.senders, self.receivers))
        figure = Figure((2 + wide, (1.6 + tall) * len(mean)), layout="constrained")
        for axes, scores, step in zip(figure.subplots(len(mean), squeeze=False)[:, 0], mean, self.steps, strict=True):
            image = axes.imshow(scores, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
            axes.set_xticks(range(len(self.receivers)), self.receivers, rotation=90, fontsize=6)
            axes.set_yticks(range(len(self.senders)), self.senders, fontsize=6)
            axes.set_title(f"step {step}", fontsize=9)
            figure.colorbar(image, ax=axes, label="score")
        return figure

    def save(self, path: Any) -> Any:
        """Write one `.npz` file."""
        about = {n: getattr(self, n) for n in ("senders", "receivers", "steps", "method")} | {"kind": "edge map"}
        return array_files.write(path, {n: getattr(self, n) for n in ("scores", "base", "donor")}, about)

    @classmethod
    def load(cls, path: Any) -> EdgeMap:
        """Read what `save` wrote."""
        arrays, about = array_files.read(path, "edge map")
        names = {name: tuple(about[name]) for name in ("senders", "receivers")}
        return cls(**arrays, **names, steps=about["steps"], method=about["method"])

    def __repr__(self) -> str:
        lines = [f"{self.method or 'edges'}: {self.size} edges, steps {self.steps}, {self.base.shape[-1]} row(s)"]
        lines += [f"{score:+.4g}  {s} -> {r}  step {step}" for s, r, step, score in self.top(5)]
        return "\n".join(lines)
