"""What probes found: held-out accuracy beside its controls, calibration, a table and heat maps."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from interp import array_files, intervals


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Probes:
    """Linear probes of C cells in each of L layers: steps x classes of positions in this order, then the prompt's end.

    Attributes:
        labels: names of the K classes.
        layers: L of them.
        steps: R.
        classes: of positions, P of them; C = R P + 1.
        method: "ridge" or "logistic".
        truth: [N] class of each prompt.
        test: [N] bool, held out.
        valid: [C, N] bool, there was something to read.
        scores: [L, C, N, K].
        weights, biases: [L, C, D, K] and [L, C, K]; `scores = x weights + biases`.
        shuffled, random: [L, C] mean held-out accuracy with shuffled labels, and along random directions.
    """

    labels: tuple[Any, ...]
    layers: tuple[int, ...]
    steps: int
    classes: tuple[str, ...]
    method: str
    truth: np.ndarray
    test: np.ndarray
    valid: np.ndarray
    scores: np.ndarray
    weights: np.ndarray
    biases: np.ndarray
    shuffled: np.ndarray
    random: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        """[L, R, P] on held-out prompts; NaN where none had such positions at the step."""
        return self._cells()[:, :-1].reshape(len(self.layers), self.steps, len(self.classes))

    @property
    def at_prompt(self) -> np.ndarray:
        """[L] held-out accuracy at the prompt's last token."""
        return self._cells()[:, -1]

    @property
    def chance(self) -> float:
        """Share of the most frequent label among the held-out prompts."""
        return float(np.bincount(self.truth[self.test]).max() / self.test.sum())

    def right(self) -> np.ndarray:
        """[L, C, N] 1 where a probe is right, 0 where it is wrong, NaN where it was trained or had nothing to read."""
        right = (self.scores.argmax(-1) == self.truth).astype(float)
        return np.where(self.valid & self.test, right, np.nan)

    def _cells(self) -> np.ndarray:
        right = self.right()
        counted = np.isfinite(right).sum(-1)
        return np.where(counted, np.nansum(right, -1) / np.maximum(counted, 1), np.nan)

    def probabilities(self) -> np.ndarray:
        """[L, C, N, K] what the probes claim: softmax of the scores, or for ridge the scores clipped to 0..1."""
        if self.method == "logistic":
            shifted = np.exp(self.scores - self.scores.max(-1, keepdims=True))
            return shifted / shifted.sum(-1, keepdims=True)
        clipped = np.clip(self.scores, 1e-6, 1)
        return clipped / clipped.sum(-1, keepdims=True)

    def reliability(self, layer: int, cell: int, bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(claimed, true, count), each [bins]: mean confidence, accuracy and number of the held-out answers in a bin.

        Args:
            layer: its number in the model.
            cell: step * P + class; -1 is the prompt's end.
        """
        at = self.layers.index(layer)
        right = self.right()[at, cell]
        claimed = self.probabilities()[at, cell].max(-1)
        on = np.isfinite(right)
        place = np.minimum((claimed[on] * bins).astype(int), bins - 1)
        count = np.bincount(place, minlength=bins)
        sums = [np.bincount(place, weights=values[on], minlength=bins) for values in (claimed, right)]
        claimed, true = (np.where(count, total / np.maximum(count, 1), np.nan) for total in sums)
        return claimed, true, count

    def calibration_error(self, layer: int, cell: int, bins: int = 10) -> float:
        """Expected calibration error, 0 to 1: sum over bins of count / n |accuracy - confidence|."""
        claimed, true, count = self.reliability(layer, cell, bins)
        return float(np.nansum(count * np.abs(claimed - true)) / max(count.sum(), 1))

    def over_steps(self, kind: str = "all") -> np.ndarray:
        """[L] held-out accuracy of the whole block: log-probabilities summed over the steps a prompt took."""
        cells = self._of_class(kind)
        logp = np.where(self.valid[cells][..., None], np.log(self.probabilities()[:, cells]), 0).sum(1)
        right = (logp.argmax(-1) == self.truth) & self.valid[cells].any(0)
        return right[:, self.test].mean(-1)

    def direction(self, layer: int, step: int | None, kind: str = "all", label: int = -1) -> np.ndarray:
        """[D] of length 1, along which a class is read; `step` None is the prompt's end."""
        cell = -1 if step is None else self._of_class(kind)[step]
        weights = self.weights[self.layers.index(layer), cell]
        found = weights[:, label] - weights.mean(-1)
        return found / np.maximum(np.linalg.norm(found), 1e-30)

    def _of_class(self, kind: str) -> np.ndarray:
        if kind not in self.classes:
            raise ValueError(f"these probes have the classes {self.classes}, not {kind!r}")
        return np.arange(self.steps) * len(self.classes) + self.classes.index(kind)

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary a layer and cell, with a 95 % interval over prompts."""
        right, cells = self.right(), self._cells()
        found = []
        for at, layer in enumerate(self.layers):
            for cell in range(cells.shape[1]):
                step, kind = divmod(cell, len(self.classes))
                is_prompt = cell == cells.shape[1] - 1
                low, high = intervals.of_shares(right[at, cell])
                found.append({
                    "layer": layer, "step": None if is_prompt else step,
                    "positions": "prompt" if is_prompt else self.classes[kind], "accuracy": float(cells[at, cell]),
                    "low": float(low), "high": float(high), "shuffled": float(self.shuffled[at, cell]),
                    "random": float(self.random[at, cell]), "calibration error": self.calibration_error(layer, cell),
                    "prompts": int(np.isfinite(right[at, cell]).sum()),
                })  # fmt: skip
        return found

    def table(self, most: int = 12) -> str:
        """The best cells, as text."""
        rows = sorted(self.rows(), key=lambda row: -np.nan_to_num(row["accuracy"], nan=-1))[:most]
        lines = ["layer  step  positions  accuracy  95 % interval  shuffled  random  ECE"]
        for row in rows:
            step = "-" if row["step"] is None else str(row["step"])
            lines.append(
                f"{row['layer']:5}  {step:>4}  {row['positions']:9}  {row['accuracy']:8.2f}  {row['low']:.2f} to "
                f"{row['high']:.2f}   {row['shuffled']:8.2f}  {row['random']:6.2f}  {row['calibration error']:.2f}"
            )
        return "\n".join(lines)

    def plot(self) -> Any:
        """Heat maps of held-out accuracy, layer x step, one a class of positions; the prompt's end comes last."""
        import matplotlib.pyplot as plt

        figure, grid = plt.subplots(
            1, len(self.classes), figsize=(1.5 + 3.2 * len(self.classes), 3.2), squeeze=False, layout="constrained"
        )
        for place, kind in zip(grid[0], range(len(self.classes)), strict=True):
            values = np.concatenate([self.accuracy[:, :, kind], self.at_prompt[:, None]], 1)
            image = place.imshow(values, aspect="auto", origin="lower", vmin=0, vmax=1, cmap="viridis")
            place.set(title=f"{self.classes[kind]} positions", xlabel="step", ylabel="layer")
            place.set_xticks(range(self.steps + 1), [*map(str, range(self.steps)), "prompt"])
            place.set_yticks(range(len(self.layers)), self.layers)
        figure.colorbar(image, ax=grid, label=f"held-out accuracy (most frequent label: {self.chance:.2f})")
        plt.close(figure)  # a notebook shows what is returned, once
        return figure

    def save(self, path: Any) -> Any:
        """Write one `.npz` file."""
        about = {"labels": self.labels, "layers": self.layers, "steps": self.steps, "classes": self.classes}
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return array_files.write(path, arrays, about | {"kind": "probes", "method": self.method})

    @classmethod
    def load(cls, path: Any) -> Probes:
        """Read what `save` wrote."""
        arrays, about = array_files.read(path, "probes")
        lists = {name: tuple(about[name]) for name in ("labels", "layers", "classes")}
        return cls(**arrays, **lists, steps=about["steps"], method=about["method"])

    def __repr__(self) -> str:
        cells = self._cells()
        layer, cell = np.unravel_index(np.nanargmax(cells), cells.shape)
        step, kind = divmod(int(cell), len(self.classes))
        where = "the prompt's end" if cell == cells.shape[1] - 1 else f"step {step}, {self.classes[kind]} positions"
        return (
            f"{self.method} probes of {len(self.labels)} labels, {len(self.layers)} layers, {self.steps} steps: best "
            f"{cells[layer, cell]:.2f} in layer {self.layers[layer]} at {where} (shuffled "
            f"{self.shuffled[layer, cell]:.2f}, random direction {self.random[layer, cell]:.2f}, most frequent label "
            f"{self.chance:.2f}), {int(self.test.sum())} prompts held out"
        )
