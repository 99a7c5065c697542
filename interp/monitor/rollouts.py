"""Rollouts for a monitor: what a model did with and without an intervention, and what there is to read of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import dgemma_jax as dg
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion.trajectory import Record
from dgemma_jax.progress import bar
from interp import array_files
from interp.questions import contains

# What a monitor may read: the answer alone; the whole text; every draft of the canvas; the candidates of every place.
VIEWS = ("answer", "text", "canvases", "top tokens")


@dataclasses.dataclass(frozen=True)
class MonitorCase:
    """One instance: a prompt with and without the intervention, and the outcome that it aims at.

    Attributes:
        baseline, intervention: prompts, as for `dg.generate`.
        target: the outcome; it occurred if the grade of the answer against it says so.
    """

    baseline: Any
    intervention: Any
    target: str


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Generations to be judged, R rows.

    Attributes:
        instance: [R] int, which case.
        arm: [R] bool, with the intervention.
        outcome: [R] bool, y.
        views: by name, what there is to read of each row, R texts.
    """

    instance: np.ndarray
    arm: np.ndarray
    outcome: np.ndarray
    views: dict[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        for name, kind in (("instance", int), ("arm", bool), ("outcome", bool)):
            object.__setattr__(self, name, np.asarray(getattr(self, name)).astype(kind))
        sizes = {len(a) for a in (self.instance, self.arm, self.outcome, *self.views.values())}
        if len(sizes) != 1 or sizes == {0}:
            raise ValueError(
                f"instance, arm, outcome and every view need one entry a rollout; sizes are {sorted(sizes)}"
            )
        if "answer" not in self.views:
            raise ValueError("the view 'answer' is needed: a monitor that reads the answer alone is the baseline")

    def __len__(self) -> int:
        return len(self.instance)

    def __repr__(self) -> str:
        arms = {name: self.outcome[self.arm == x] for x, name in ((True, "with"), (False, "without"))}
        rates = ", ".join(f"{own.mean():.2f} {name}" for name, own in arms.items() if len(own))
        count, views = len(np.unique(self.instance)), ", ".join(self.views)
        return f"{len(self)} rollouts of {count} instances; outcome {rates} the intervention; views {views}"

    def only(self, instances: Sequence[int]) -> Rollouts:
        """Those of some instances, by their numbers."""
        unknown = sorted(set(map(int, instances)) - set(self.instance.tolist()))
        if unknown or not len(instances):
            raise ValueError(f"instances {unknown or 'none'}: give some of {np.unique(self.instance).tolist()}")
        rows = np.isin(self.instance, instances)
        views = {name: tuple(texts[row] for row in np.flatnonzero(rows)) for name, texts in self.views.items()}
        return Rollouts(self.instance[rows], self.arm[rows], self.outcome[rows], views)

    def save(self, path: str | Path) -> Path:
        """Write to an `.npz` file and say where."""
        arrays = {name: getattr(self, name) for name in ("instance", "arm", "outcome")}
        return array_files.write(path, arrays, {"kind": "Rollouts", "views": self.views})

    @classmethod
    def load(cls, path: str | Path) -> Rollouts:
        """Read what `save` wrote."""
        arrays, about = array_files.read(path, "Rollouts")
        return cls(**arrays, views={name: tuple(texts) for name, texts in about["views"].items()})


def last_line(text: str) -> str:
    """The last line with anything on it."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def monitor_rollouts(
    bundle: Any, cases: Sequence[MonitorCase], *, samples: int = 30, seed: int = 0, batch: int = 32,
    grade: Callable[[str, str], bool] = contains, answer_of: Callable[[str], str] = last_line, top: int = 4,
    sampler: SamplerConfig | None = None, max_new_tokens: int = 256, thinking: bool = False,
    progress: bool | None = None,
) -> Rollouts:  # fmt: skip
    """Generate `samples` answers in each arm of each case, and keep what monitors may read.

    Args:
        bundle: a bundle with a tokenizer, edited or not.
        cases: the instances.
        samples: rollouts of each arm; 30 in the official runs. Rollout i of both arms has the same seed.
        seed: of the first rollout.
        batch: generations at a time; the last batch is filled up, so that there is one compile.
        grade: (answer, target) to whether the outcome occurred.
        answer_of: the part of a text that is the answer.
        top: candidates of each place that the view "top tokens" shows.
        sampler, max_new_tokens, thinking: as for `dg.generate`.
        progress: a bar; by default in a terminal.

    Raises:
        ValueError: no case, samples, batch or top below 1, a bundle without tokenizer.
    """
    if not cases or min(samples, batch, top) < 1:
        raise ValueError(f"needed are cases and samples, batch, top >= 1; got {len(cases)}, {samples}, {batch}, {top}")
    tokenizer = inputs.parts(bundle)[1]
    if tokenizer is None:
        raise ValueError("monitors read texts: give a bundle with a tokenizer")
    rows = [(i, x, s) for i in range(len(cases)) for x in (False, True) for s in range(samples)]
    views: dict[str, list[str]] = {name: [] for name in VIEWS}
    record = dataclasses.replace(Record.nothing(), argmax=True, top_k=top)
    with bar("rollouts", len(rows), progress) as advance:
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            filled = part + [part[-1]] * (batch - len(part))
            out = dg.generate(
                bundle, [cases[i].intervention if x else cases[i].baseline for i, x, _ in filled],
                [seed + s for *_, s in filled], sampler, max_new_tokens, record, thinking=thinking,
            )  # fmt: skip
            for row in range(len(part)):
                text = out.texts[row]
                drafts, tops = drafts_of(out, row, tokenizer)
                for name, read in zip(VIEWS, (answer_of(text), text, drafts, tops), strict=True):
                    views[name].append(read)
            advance(len(part))
    instance, arm, _ = map(np.array, zip(*rows, strict=True))
    outcome = [grade(answer, cases[i].target) for i, answer in zip(instance, views["answer"], strict=True)]
    return Rollouts(instance, arm, np.array(outcome), {name: tuple(texts) for name, texts in views.items()})


def drafts_of(out: Any, row: int, tokenizer: Any) -> tuple[str, str]:
    """A line a step: the likeliest text, and the candidates of every place; steps that repeat a line are left out.

    A draft is read up to its end token, as the answer is: what lies behind it is noise.
    """
    run, ends = out.trajectory, out.sampler.eos_token_ids
    drafts, tops = [], []
    for block, step in np.argwhere(run.valid[:, :, row]):
        ids = run.argmax[block, step, row]
        stop = np.flatnonzero(np.isin(ids, ends))
        size = stop[0] if len(stop) else len(ids)
        drafts.append(tokenizer.decode(ids[:size]))
        tops.append(" ".join(tokenizer.decode(place) for place in run.top_ids[block, step, row, :size]))
    return "\n".join(dict.fromkeys(drafts)), "\n".join(dict.fromkeys(tops))
