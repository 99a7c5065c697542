"""What a lens read in a run: the most likely tokens of every layer at every step, and how near the end they are."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from interp import array_files


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LensReadings:
    """Readings of step x layer x row x position, [R, L, B, C]; with several blocks there is an axis J in front.

    Probabilities are of the lens before temperature. A *final* token is what the block left behind at a position.
    Where a row did not take a step there are zeros.

    Attributes:
        ids, probs: [R, L, B, C, U] the most likely tokens and their probabilities, best first.
        entropy: [R, L, B, C] nats.
        final_prob, final_rank: [R, L, B, C] of the final token; rank 0 is the most likely.
        kl: [R, L, B, C] nats, KL(the step's own distribution || the lens); 0 at the last layer of a plain lens.
        chosen: [R, L, B, C, n] probabilities of `tokens`.
        tokens: the ids asked for.
        finals: [B, C] final tokens.
        inside: [B, C] bool, the position belongs to the answer, its end token included.
        valid: [R, B] bool, the row took this step.
        layers, steps: which these are.
        texts, seeds: of the rows.
        words: text of every id above, by id; empty without a tokenizer.
        method: of the lens.
    """

    ids: np.ndarray
    probs: np.ndarray
    entropy: np.ndarray
    final_prob: np.ndarray
    final_rank: np.ndarray
    kl: np.ndarray
    chosen: np.ndarray
    tokens: tuple[int, ...]
    finals: np.ndarray
    inside: np.ndarray
    valid: np.ndarray
    layers: tuple[int, ...]
    steps: tuple[int, ...]
    texts: tuple[str | None, ...]
    seeds: tuple[int, ...]
    words: dict[int, str]
    method: str

    @property
    def axes(self) -> str:
        """Letters of the axes of `entropy`."""
        return "JRLBC"[-self.entropy.ndim :]

    def agreement(self, *, answer_only: bool = True) -> np.ndarray:
        """Share of positions whose most likely token is already the final one, [R, L, B]; NaN where none counts.

        Args:
            answer_only: leave out what follows the end token: padding is easy and settles early.
        """
        right = self.ids[..., 0] == self.finals[..., None, None, :, :]
        counted = self._counted(self.inside if answer_only else np.ones_like(self.inside))
        return self._mean(right, counted, -1)

    def mean_kl(self) -> np.ndarray:
        """[L] mean of `kl` over blocks, steps, rows and positions; the figure that a tuned lens lowers."""
        axes = tuple(a for a in range(self.kl.ndim) if a != self.kl.ndim - 3)
        return self._mean(self.kl, self._counted(np.ones_like(self.inside)), axes)

    def top(self, step: int, layer: int, position: int, *, row: int = 0, block: int = 0) -> list[tuple[Any, float]]:
        """(text, probability) of the most likely tokens at a place, best first; ids without a tokenizer."""
        for what, number, known in (("step", step, self.steps), ("layer", layer, self.layers)):
            if number not in known:
                raise ValueError(f"{what} {number} was not read; read are {list(known)}")
        place = (self.steps.index(step), self.layers.index(layer), row, position)
        place = (block, *place) if self.entropy.ndim == 5 else place
        pairs = zip(self.ids[place].tolist(), self.probs[place].tolist(), strict=True)
        return [(self.words.get(i, i), p) for i, p in pairs]

    def _counted(self, positions: np.ndarray) -> np.ndarray:
        """[.., R, 1, B, C] bool, the places that count."""
        return self.valid[..., :, None, :, None] & positions[..., None, None, :, :]

    @staticmethod
    def _mean(values: np.ndarray, counted: np.ndarray, axes: Any) -> np.ndarray:
        counted = np.broadcast_to(counted, values.shape)
        total, count = np.where(counted, values, 0).sum(axes, dtype=np.float64), counted.sum(axes)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def plot(self, step: int | None = None, *, row: int = 0, block: int = 0) -> Any:
        """Share of final tokens by layer and step, and the probability of the final token at one step; a figure.

        Args:
            step: of the second picture; by default the first one read.
            row, block: of both.
        """
        import matplotlib.pyplot as plt

        at = 0 if step is None else self.steps.index(step)
        one = self.block(block)
        share_RL, prob_LC = one.agreement()[..., row], one.final_prob[at, :, row]
        taken = one.valid[:, row]
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(13, 1.6 + 0.33 * len(self.layers)), width_ratios=(1, 2), layout="constrained"
        )
        columns = [s for s, yes in zip(self.steps, taken, strict=True) if yes]
        shown = left.imshow(share_RL[taken].T, origin="lower", aspect="auto", vmin=0, vmax=1, cmap="viridis")
        left.set(title="share of the answer that is final", xlabel="step", ylabel="layer")
        left.set_xticks(range(len(columns)), columns)
        figure.colorbar(shown, ax=left)
        shown = right.imshow(prob_LC, origin="lower", aspect="auto", vmin=0, vmax=1, cmap="viridis")
        right.set(title=f"probability of the final token, step {self.steps[at]}", xlabel="position")
        figure.colorbar(shown, ax=right)
        for axis in (left, right):
            axis.set_yticks(range(len(self.layers)), self.layers)
        if self.words and prob_LC.size <= 400:
            right.set_xticks(range(prob_LC.shape[1]), [self.words[int(i)] for i in one.finals[row]], rotation=90)
            for (layer, position), prob in np.ndenumerate(prob_LC):
                word, ink = self.words[int(one.ids[at, layer, row, position, 0])], "black" if prob > 0.6 else "white"
                right.text(position, layer, word, ha="center", va="center", fontsize=6, color=ink)
        return figure

    def block(self, block: int) -> LensReadings:
        """The readings of one block, without the axis J."""
        if self.entropy.ndim == 4:
            if block:
                raise ValueError(f"block {block} was not read; there is one block")
            return self
        return dataclasses.replace(self, **{name: getattr(self, name)[block] for name in self._arrays()})

    @classmethod
    def _arrays(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls) if f.type == "np.ndarray"]

    def save(self, path: Any) -> Any:
        """Write one `.npz` file."""
        arrays = {name: getattr(self, name) for name in self._arrays()}
        about = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in arrays}
        about["words"] = {str(i): word for i, word in self.words.items()}
        return array_files.write(path, arrays, {"kind": "lens readings"} | about)

    @classmethod
    def load(cls, path: Any) -> LensReadings:
        """Read what `save` wrote."""
        arrays, about = array_files.read(path, "lens readings")
        about.pop("kind")
        words = {int(i): word for i, word in about.pop("words").items()}
        return cls(**arrays, words=words, **{k: tuple(v) if isinstance(v, list) else v for k, v in about.items()})

    def __repr__(self) -> str:
        share_L = np.nanmean(self.agreement().reshape(-1, len(self.layers), self.valid.shape[-1]), (0, 2))
        shown = ", ".join(f"{layer}: {share:.0%}" for layer, share in zip(self.layers, share_L, strict=True))
        return (
            f"{self.method} lens, {self.axes} {list(self.entropy.shape)}, steps {list(self.steps)}, top "
            f"{self.ids.shape[-1]}\nfinal token on top, by layer, mean over steps: {shown}"
        )
