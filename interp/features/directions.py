"""A behaviour's direction: candidates by place, step and layer, and the choice among them by what their removal does.

    r = mean(h | positive) - mean(h | negative)        at a token of the prompt, or on the canvas at one step

A difference of means says what differs, not what is used: each candidate is taken out of the whole residual stream,
in the prompt and on the canvas, and the one that stops the behaviour and changes other answers least is chosen.
Arditi et al. 2024, arXiv 2406.11717. Which behaviour it is, a function of the text says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import dgemma_jax as dg
from dgemma_jax import progress
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.nn.functional import of
from interp import array_files, steering
from interp.affine_lens import chosen_layers
from interp.features.pooling import pool_residuals
from interp.features.projection import ablate_directions

Shows = Callable[[str], bool]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Directions:
    """K candidate directions, and, once they were tried, their effects.

    Attributes:
        vectors: [K, D] differences of means.
        places: K of (place, at, layer): ("prompt", -1, 3) is the last token in layer 3, ("canvas", 0, 3) step 0.
        norms: [K] mean norm of the residuals there; on the canvas, of their mean over positions.
        still, changed: [K] share of the positive prompts that still show the behaviour without the direction, and of
            the negative ones whose answer changed; None before `select_directions`.
        chosen: numbers of those chosen, the best first; several are removed together.
    """

    vectors: np.ndarray
    places: tuple[tuple[str, int, int], ...]
    norms: np.ndarray
    still: np.ndarray | None = None
    changed: np.ndarray | None = None
    chosen: tuple[int, ...] = ()

    @property
    def best(self) -> np.ndarray:
        """[n, D], the chosen ones."""
        if not self.chosen:
            raise ValueError("no direction is chosen yet: call interp.select_directions")
        return self.vectors[list(self.chosen)]

    def save(self, path: Any) -> Any:
        """Write one `.npz` file."""
        arrays = {name: getattr(self, name) for name in ("vectors", "norms", "still", "changed")}
        arrays = {name: array for name, array in arrays.items() if array is not None}
        return array_files.write(path, arrays, {"kind": "directions", "places": self.places, "chosen": self.chosen})

    @classmethod
    def load(cls, path: Any) -> Directions:
        """Read what `save` wrote."""
        arrays, about = array_files.read(path, "directions")
        places = tuple((place, at, layer) for place, at, layer in about["places"])
        return cls(**arrays, places=places, chosen=tuple(about["chosen"]))

    def table(self, most: int = 12) -> str:
        """Candidates as text, those first whose removal does best."""
        tried = self.still is not None
        order = np.argsort(self.still + self.changed, kind="stable") if tried else np.arange(len(self.vectors))
        lines = ["place   token or step  layer  length  still  changed"]
        for k in order[:most]:
            place, at, layer = self.places[k]
            effect = f"{self.still[k]:5.2f}  {self.changed[k]:7.2f}" if tried else "    -        -"
            length = np.linalg.norm(self.vectors[k]) / max(self.norms[k], 1e-30)
            lines.append(f"{place:6}  {at:13}  {layer:5}  {length:6.2f}  {effect}{'  *' if k in self.chosen else ''}")
        return "\n".join(lines)

    def plot(self) -> Any:
        """Shares still showing the behaviour and answers changed, by candidate."""
        import matplotlib.pyplot as plt

        if self.still is None:
            raise ValueError("nothing was tried yet: call interp.select_directions")
        figure, axes = plt.subplots(figsize=(2 + 0.25 * len(self.vectors), 3.2), layout="constrained")
        at = np.arange(len(self.vectors))
        axes.bar(at - 0.2, self.still, 0.4, label="still shows the behaviour")
        axes.bar(at + 0.2, self.changed, 0.4, label="other answers changed")
        axes.set_xticks(at, [f"{p[0]} {n} L{layer}" for p, n, layer in self.places], rotation=90, fontsize=7)
        axes.set(ylabel="share of prompts", ylim=(0, 1))
        axes.legend()
        plt.close(figure)  # a notebook shows what is returned, once
        return figure

    def __repr__(self) -> str:
        chosen = ", ".join(f"{place} {at}, layer {layer}" for place, at, layer in (self.places[k] for k in self.chosen))
        return f"{len(self.vectors)} directions of width {self.vectors.shape[1]}; chosen: {chosen or 'none yet'}"


def find_directions(
    bundle: Any, positive: Any, negative: Any, layers: Any = None, *, positions: Sequence[int] = (-1,),
    steps: int | None = None, batch: int = 16, seed: int = 0, sampler: SamplerConfig | None = None,
    show: bool | None = None,
) -> Directions:  # fmt: skip
    """Differences of means between two sets of prompts: at tokens of the prompt, and on the canvas at each step.

    Args:
        bundle: a bundle or a model, edited or not.
        positive, negative: prompts that show the behaviour and that do not; need not be of equal number.
        layers: an integer, slice, list or mask; None for all.
        positions: of the prompt, from its end.
        steps: the first so many steps of the canvas, each over the prompts that took it; None for all, 0 for none.
        batch: prompts at a time.

    Raises:
        ValueError: no such layer or position.
    """
    layers = chosen_layers(of(bundle), layers)
    vectors, places, norms = [], [], []
    for at in positions:
        found = steering.steering_vector(bundle, positive, negative, layers, positions=at, batch=batch, show=show)
        vectors += list(found.difference)
        norms += list(found.norms)
        places += [("prompt", int(at), layer) for layer in layers]
    if steps != 0:
        pooled = [
            pool_residuals(bundle, prompts, layers, steps=steps, batch=batch, seed=seed, sampler=sampler, show=show)
            for prompts in (positive, negative)
        ]
        for step in range(min(len(part.valid) for part in pooled)):
            took = [part.valid[step, 0] for part in pooled]
            if not (took[0].any() and took[1].any()):
                break
            x = [part.canvas[:, step, 0][:, on] for part, on in zip(pooled, took, strict=True)]  # [L, n, D]
            vectors += list(x[0].mean(1) - x[1].mean(1))
            norms += list(sum(np.linalg.norm(part, axis=-1).mean(1) for part in x) / 2)
            places += [("canvas", step, layer) for layer in layers]
    return Directions(
        vectors=np.asarray(vectors, np.float32), places=tuple(places), norms=np.asarray(norms, np.float32)
    )


def select_directions(
    bundle: Any, found: Directions, positive: Any, negative: Any, shows: Shows, *, most: int = 1,
    rows: int | None = None, seed: int = 0, sampler: SamplerConfig | None = None, max_new_tokens: int | None = None,
    show: bool | None = None,
) -> Directions:  # fmt: skip
    """Try every candidate, as rows of a batch, and choose: least behaviour left plus least change elsewhere.

    Args:
        found: candidates; those of no length are passed over.
        positive, negative: prompts to try them on; best other ones than those they come from.
        shows: whether a text shows the behaviour, for instance `lambda text: text.startswith("i can not")`.
        most: directions chosen, one after the other: the second is the one that helps most beside the first, and so
            on; fewer if none helps.
        rows: of a batch; by default all prompts under four candidates at a time.

    Raises:
        ValueError: no prompt shows the behaviour to begin with, texts without a tokenizer.
    """
    model, tokenizer, _ = inputs.parts(bundle)
    if tokenizer is None:
        raise ValueError("texts are judged, so a tokenizer is needed: give a bundle")
    sets = [inputs.to_ids(prompts, tokenizer, model.config.vocab_size) for prompts in (positive, negative)]
    ids, count = sets[0] + sets[1], len(sets[0])
    length = of(bundle).config.canvas_length if max_new_tokens is None else max_new_tokens

    def texts(edited: Any, times: int) -> list[list[str]]:
        out = dg.generate(
            edited, ids * times, list(range(seed, seed + len(ids))) * times, sampler, length, dg.Record.nothing()
        )
        return [out.texts[i * len(ids) : (i + 1) * len(ids)] for i in range(times)]

    plain = texts(bundle, 1)[0]
    base = np.mean([shows(text) for text in plain[:count]])
    if not base:
        raise ValueError(f"no positive prompt shows the behaviour; the first answer is {plain[0]!r}")
    alive = np.flatnonzero(np.linalg.norm(found.vectors, axis=-1) > 0)
    at_once = max(1, (rows or 4 * len(ids)) // len(ids))
    still, changed = np.full(len(found.vectors), base), np.zeros(len(found.vectors))
    chosen: list[int] = []
    best, told = np.inf, None
    with progress.bar("directions", most * len(alive), show, "candidates") as done:
        for _ in range(most):
            for first in range(0, len(alive), at_once):
                group = [int(k) for k in alive[first : first + at_once]]
                padded = group + [group[-1]] * (at_once - len(group))
                spans = np.stack([found.vectors[[*chosen, k]] for k in padded])  # [n, chosen + 1, D]
                answers = texts(ablate_directions(bundle, spans.repeat(len(ids), 0), sampler=sampler), at_once)
                for k, said in zip(group, answers, strict=False):
                    still[k] = np.mean([shows(text) for text in said[:count]])
                    changed[k] = np.mean([a != b for a, b in zip(said[count:], plain[count:], strict=True)] or [0])
                done(len(group))
            told = (still.copy(), changed.copy()) if told is None else told  # each one alone
            score = np.where(np.isin(np.arange(len(still)), alive), still + changed, np.inf)
            if score.min() >= best:
                break
            best = score.min()
            chosen.append(int(score.argmin()))
    return dataclasses.replace(found, still=told[0], changed=told[1], chosen=tuple(chosen))
