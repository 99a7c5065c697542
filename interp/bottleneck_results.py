"""What the token-bottleneck study found: outcomes by arm, sampler, prompt and seed; as a table, a plot and a file.

| outcome | means |
|---|---|
| correct | graded right |
| wrong | ended by itself, graded wrong |
| capped | the budget of tokens was used up |
| looping | the same, and at least half of its 8-grams of tokens are repeats (dup8 >= 0.5) |

Source of the four outcomes and of dup8: the study of `methods.md` section 9.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dgemma_jax.config import SamplerConfig
from interp import array_files, intervals

OUTCOMES = ("correct", "wrong", "capped", "looping")
LOOP_FROM = 0.5


def dup8(ids: Sequence[int], n: int = 8) -> float:
    """Share of the n-grams of tokens that repeat an earlier one; 0 for fewer than 2n tokens.

    >>> round(dup8([7] * 100), 3), dup8(range(100))
    (0.989, 0.0)
    """
    ids = tuple(ids)
    grams = [ids[i : i + n] for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(ids) >= 2 * n else 0.0


def outcome(is_right: bool, has_ended: bool, ids: Sequence[int]) -> int:
    """Index into `OUTCOMES` of one answer; `ids` up to its end token."""
    if is_right:
        return 0
    return 1 if has_ended else 3 if dup8(ids) >= LOOP_FROM else 2


@dataclasses.dataclass(frozen=True)
class Arm:
    """One rung: k or p of the bottleneck; k = 0 is the most likely token alone, neither is no bottleneck."""

    k: int | None = None
    p: float | None = None

    def __str__(self) -> str:
        if self.k is None and self.p is None:
            return "none"
        return f"p={self.p:g}" if self.k is None else f"k={self.k}"


NONE = Arm()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BottleneckStudy:
    """Outcomes of A arms under M samplers on N prompts with S seeds each. Arm 0 has no bottleneck.

    Attributes:
        arms: [A] the rungs.
        samplers: [M] settings by name.
        groups: [N] the group of each prompt.
        outcomes: [A, M, N, S] indices into `OUTCOMES`.
        ended: [A, M, N, S] bool, by an end token; the others used up `max_new_tokens`.
        steps: [A, M, N, S] denoising steps of an answer.
        blocks: [A, M, N, S] blocks of an answer.
        converged: [A, M, N, S] how many of these stopped by themselves; the others hit the cap on steps.
        tokens: [A, M, N, S, L] answers, padding after the end token.
        about: seed, max_new_tokens, vocab_size.
    """

    arms: tuple[Arm, ...]
    samplers: dict[str, SamplerConfig]
    groups: tuple[str, ...]
    outcomes: np.ndarray
    ended: np.ndarray
    steps: np.ndarray
    blocks: np.ndarray
    converged: np.ndarray
    tokens: np.ndarray
    about: dict[str, Any]

    def share(self, outcome: str) -> np.ndarray:
        """Share of this outcome over the seeds of each prompt, [A, M, N]."""
        if outcome not in OUTCOMES:
            raise ValueError(f"outcome must be one of {', '.join(OUTCOMES)}, got {outcome!r}")
        return (self.outcomes == OUTCOMES.index(outcome)).mean(-1)

    @property
    def accuracy(self) -> np.ndarray:
        """[A, M] share of answers that are right."""
        return self.share("correct").mean(-1)

    @property
    def loop_rate(self) -> np.ndarray:
        """[A, M] share of answers that loop."""
        return self.share("looping").mean(-1)

    def rows(self, group: str | None = None) -> list[dict[str, Any]]:
        """One flat record for each sampler and arm, of all prompts or of one group; for a CSV file or a data frame.

        Counts of the four outcomes; `accuracy`, `loop_rate` and `steps_per_block` with 95 % intervals over prompts
        (`.._low`, `.._high`); `difference` of the accuracy from the arm without a bottleneck, paired by prompt and
        seed; `ended`: share of answers that ended; `at_step_cap`: share of blocks that hit the cap on steps.
        """
        if group is not None and group not in self.groups:
            raise ValueError(f"no group {group!r}; there are {', '.join(dict.fromkeys(self.groups))}")
        own = np.array([group is None or name == group for name in self.groups])
        right, loops = self.share("correct")[..., own], self.share("looping")[..., own]
        steps, blocks = self.steps[:, :, own].sum(-1), self.blocks[:, :, own].sum(-1)
        measured = {
            "accuracy": (right, intervals.of_shares), "difference": (right - right[:1], intervals.of_differences),
            "loop_rate": (loops, intervals.of_shares), "steps_per_block": (steps / blocks, intervals.of_means),
        }  # fmt: skip
        bounds = {name: (values.mean(-1), *of(values)) for name, (values, of) in measured.items()}
        found = []
        for m, sampler in enumerate(self.samplers):
            for a, arm in enumerate(self.arms):
                codes = self.outcomes[a, m, own]
                row = {"sampler": sampler, "arm": str(arm), "k": arm.k, "p": arm.p, "group": group or "all"}
                row |= {"prompts": int(own.sum()), "seeds": codes.shape[-1]}
                row |= {name: int((codes == number).sum()) for number, name in enumerate(OUTCOMES)}
                for name, parts in bounds.items():
                    keys = (name, f"{name}_low", f"{name}_high")
                    row |= {key: float(part[a, m]) for key, part in zip(keys, parts, strict=True)}
                row["ended"] = float(self.ended[a, m, own].mean())
                row["at_step_cap"] = float(1 - self.converged[a, m, own].sum() / blocks[a, m].sum())
                found.append(row)
        return found

    def table(self) -> str:
        """All samplers and arms as text, and the accuracy of each group."""
        return "\n\n".join([self._title(), *map(_aligned, self._tables())])

    def _title(self) -> str:
        return f"{len(self.groups)} prompts, {self.outcomes.shape[-1]} seed(s) each; 95 % intervals over prompts"

    def _tables(self) -> list[list[list[str]]]:
        """Tables of words, heads first: of all prompts, and of the groups if there are several."""
        head = ["sampler", "arm", *OUTCOMES, "accuracy", "against none", "loop rate", "steps/block", "at step cap"]
        lines = [head]
        for row in self.rows():
            counts = [str(row[name]) for name in OUTCOMES]
            spans = [_span(row, name) for name in ("accuracy", "difference", "loop_rate", "steps_per_block")]
            lines.append([row["sampler"], row["arm"], *counts, *spans, f"{row['at_step_cap']:.3f}"])
        names = list(dict.fromkeys(self.groups))
        if len(names) == 1:
            return [lines]
        right, groups = self.share("correct"), [["accuracy of", "", *names]]
        for m, sampler in enumerate(self.samplers):
            for a, arm in enumerate(self.arms):
                means = [right[a, m, [g == name for g in self.groups]].mean() for name in names]
                groups.append([sampler, str(arm), *(f"{mean:.2f}" for mean in means)])
        return [lines, groups]

    def plot(self) -> Any:
        """Accuracy and loop rate against k and p, samplers side by side, with intervals; a matplotlib figure."""
        from matplotlib.figure import Figure

        rows = self.rows()
        names = list(self.samplers)
        figure = Figure(figsize=(1.5 + 3.5 * len(names), 5), layout="constrained")
        axes = figure.subplots(2, len(names), sharex=True, sharey="row", squeeze=False)
        rungs = [arm for arm in self.arms if arm != NONE]
        order = sorted((a for a in rungs if a.k is not None), key=lambda a: a.k)
        order += sorted((a for a in rungs if a.k is None), key=lambda a: -a.p)
        gap = {False: 0, True: 0.6}  # between the rungs of k and those of p
        places = [number + gap[arm.k is None] for number, arm in enumerate(order)]
        for column, name in enumerate(names):
            own = {row["arm"]: row for row in rows if row["sampler"] == name}
            for line, what in enumerate(("accuracy", "loop_rate")):
                axis = axes[line, column]
                plain = own[str(NONE)]
                axis.axhspan(plain[f"{what}_low"], plain[f"{what}_high"], color="0.88", lw=0)
                axis.axhline(plain[what], color="0.4", lw=1, ls="--", label="no bottleneck")
                for kind, colour, label in ((False, "C0", "k tokens kept"), (True, "C1", "tokens of p or more kept")):
                    part = [(x, own[str(a)]) for x, a in zip(places, order, strict=True) if (a.k is None) == kind]
                    if part:
                        middle = np.array([row[what] for _, row in part])
                        low, high = (np.array([row[f"{what}_{end}"] for _, row in part]) for end in ("low", "high"))
                        reach = np.maximum([middle - low, high - middle], 0)
                        axis.errorbar(
                            [x for x, _ in part], middle, reach, color=colour, marker="o", ms=4, capsize=2, label=label
                        )
                axis.set_ylim(-0.03, 1.03)
                axis.spines[["top", "right"]].set_visible(False)
            settings = self.samplers[name]
            axes[0, column].set_title(
                f"{name}: {settings.max_denoising_steps} steps, temperature {settings.t_max:g} to {settings.t_min:g},\n"
                f"entropy bound {settings.entropy_bound:g} nats", fontsize=9,
            )  # fmt: skip
            axes[1, column].set_xticks(places, [str(arm) for arm in order], rotation=60, fontsize=8)
        axes[0, 0].set_ylabel("accuracy")
        axes[1, 0].set_ylabel("loop rate")
        axes[0, 0].legend(fontsize=8, loc="lower right")
        return figure

    def save(self, path: str | Path) -> Path:
        """Write one `.npz` file."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        about = {
            "arms": [[arm.k, arm.p] for arm in self.arms], "groups": list(self.groups), "about": self.about,
            "samplers": {name: dataclasses.asdict(sampler) for name, sampler in self.samplers.items()},
        }  # fmt: skip
        return array_files.write(path, arrays, {"kind": "bottleneck study"} | about)

    @classmethod
    def load(cls, path: str | Path) -> BottleneckStudy:
        """Read what `save` wrote."""
        arrays, about = array_files.read(path, "bottleneck study")
        samplers = {
            name: SamplerConfig(**fields | {"eos_token_ids": tuple(fields["eos_token_ids"])})
            for name, fields in about["samplers"].items()
        }
        arms = tuple(Arm(k, p) for k, p in about["arms"])
        return cls(arms=arms, samplers=samplers, groups=tuple(about["groups"]), about=about["about"], **arrays)

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        def line(cells: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        tables = (line(head, "th") + "".join(line(cells, "td") for cells in rest) for head, *rest in self._tables())
        return f"<p>{self._title()}</p>" + "".join(f"<table>{table}</table>" for table in tables)


_ARRAYS = ("outcomes", "ended", "steps", "blocks", "converged", "tokens")


def _span(row: dict[str, Any], name: str) -> str:
    digits = 1 if name == "steps_per_block" else 3
    sign = "+" if name == "difference" else ""
    middle, low, high = (format(row[key], f"{sign}.{digits}f") for key in (name, f"{name}_low", f"{name}_high"))
    return f"{middle} [{low}, {high}]"


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for line in lines:
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        texts.append("  ".join(cells).rstrip())
    return "\n".join(texts)
