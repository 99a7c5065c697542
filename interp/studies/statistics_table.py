"""What a study can measure: statistics by name, each with what it needs recorded and the columns that it leaves.

A column has one entry a generation. Blocks of one answer are joined: counts are summed over them, other numbers are
means over the blocks that ran. Columns [n, R] have one entry a denoising step, NaN where no block took it.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

import dgemma_jax as dg
from dgemma_jax.nn.functional import of
from interp.flow.acceptance import settled_fraction, transitions
from interp.flow.identity_classes import token_identity
from interp.flow.recorded import Specials, content
from interp.flow.step_curves import of_rows
from interp.flow.step_divergences import divergences
from interp.monitor.rollouts import VIEWS, drafts_of, last_line
from interp.order.degenerate_loops import find_loops
from interp.order.intermediate import intermediate_tokens
from interp.order.lengths import length_estimate, watch_length
from interp.order.order_measures import commit_order
from interp.order.sequence_smears import sequence_smear
from interp.order.token_smears import smeared_tokens
from interp.studies.columns import Columns

PAPER_P = 0.03  # threshold of arXiv 2606.20560; as many candidates as can exceed it are recorded


@dataclasses.dataclass(frozen=True)
class Statistic:
    """One line of the table.

    Attributes:
        about: a sentence for people.
        measure: (bundle, generation) to columns of its rows.
        top_k, ends, soft: what the record must keep: candidates, the mass of end tokens, S.
        arms: which keys of a prompt are run.
    """

    about: str
    measure: Callable[[Any, dg.Generation], Columns]
    top_k: int = 0
    ends: bool = False
    soft: bool = False
    arms: tuple[str, ...] = ("prompt",)


def of_generation(bundle: Any, out: dg.Generation) -> Columns:
    """What every study keeps."""
    run = out.trajectory
    own = content(run, Specials.of(bundle))
    return {
        "text": [text or "" for text in out.texts], "tokens": own.sum((0, 2)), "steps": np.asarray(out.num_steps),
        "blocks": (run.num_steps > 0).sum(0), "ended": np.array([r == "eos" for r in out.stop_reason]),
        "tokens per forward": np.asarray(out.tokens_per_forward, float),
        "entropy": _joined(of_rows(run.entropy.mean(-1), run.valid)),
    }  # fmt: skip


def _joined(values: np.ndarray, sums: bool = False) -> np.ndarray:
    """[B, ...] of [J, ..., B]: sums or means over the blocks that have a value; rows first."""
    there = np.isfinite(values)
    count = there.sum(0)
    total = np.where(there, values, 0).sum(0)
    return np.moveaxis(np.where(count > 0, total / (1 if sums else np.maximum(count, 1)), np.nan), -1, 0)


def _order(bundle: Any, out: dg.Generation) -> Columns:
    found = commit_order(out.trajectory, Specials.of(bundle))
    sums = {"given up", "calls"}
    columns = {f"order/{name}": _joined(v, name in sums) for name, v in found.values.items()}
    return columns | {"order/never accepted": found.missing.sum(0)}


def _flow(bundle: Any, out: dg.Generation) -> Columns:
    run = out.trajectory
    curves = transitions(run).values | settled_fraction(run, content(run, Specials.of(bundle))).values
    return {f"flow/{name}": _joined(v) for name, v in curves.items()}


def _identity(bundle: Any, out: dg.Generation) -> Columns:
    columns, neighbors = {}, min(50, of(bundle).config.vocab_size - 1)
    for name, choice in (("top 8", {"k": 8}), (f"p above {PAPER_P}", {"p": PAPER_P})):
        found = token_identity(bundle, out.trajectory, **choice, neighbors=neighbors, progress=False)
        columns[f"identity/{name}"] = found.counts.sum(0).swapaxes(0, 1)
    return columns


def _lengths(bundle: Any, out: dg.Generation) -> Columns:
    """The first block alone: its estimate, and what it came out as."""
    own = content(out.trajectory, Specials.of(bundle))
    estimate = length_estimate(out.trajectory)["length"]
    return {"lengths/estimate": _joined(estimate[:1]), "lengths/final": own[0].sum(-1)}


def _smearing(bundle: Any, out: dg.Generation) -> Columns:
    run = out.trajectory
    blocks, steps, rows = run.valid.shape
    smeared = np.zeros((blocks, steps, rows))
    for block, step, row, *_ in smeared_tokens(run):
        smeared[block, step, row] += 1
    found = [sequence_smear(run, Specials.of(bundle), block) for block in range(blocks)]
    # Chance: the text in place, and the same tokens in random order beside it.
    chance = [(f.spacing[..., f.spacing.shape[-1] // 2] > f.floor) & (f.null > f.floor) for f in found]
    return {
        "smearing/positions": _joined(of_rows(smeared, run.valid)),
        "smearing/token": (smeared > 0).any((0, 1)),
        "smearing/spacing": np.any([f.is_smeared.any(0) for f in found], 0),
        "smearing/spacing by chance": np.any([c.any(0) for c in chance], 0),
        "smearing/meaning": np.any([f.is_split.any(0) for f in found], 0),
    }


def _intermediate(bundle: Any, out: dg.Generation) -> Columns:
    run = out.trajectory
    found = intermediate_tokens(run, positions=content(run, Specials.of(bundle)))
    rows: list[list[Any]] = [[] for _ in out.texts]
    tokenizer = getattr(bundle, "tokenizer", None)
    for token in found:
        said = tokenizer.token(token.token) if tokenizer else f"#{token.token}"
        rows[token.row].append([token.block, token.position, said, token.first, token.last, round(token.peak, 4)])
    return {
        "intermediate/count": np.array([len(row) for row in rows]),
        "intermediate/tokens": [json.dumps(row, ensure_ascii=False) for row in rows],
    }


def _loops(bundle: Any, out: dg.Generation) -> Columns:
    found = find_loops(out.trajectory, Specials.of(bundle))
    return {
        "loops/dup8": found.dup8, "loops/dup8 by chance": found.null, "loops/is loop": found.is_loop,
        "loops/run comes back": (found.period > 0).any(0),
    }  # fmt: skip


def _divergences(bundle: Any, out: dg.Generation) -> Columns:
    run = out.trajectory
    found = [divergences(bundle, run, block, progress=False).values for block in range(len(run.num_steps))]
    return {f"divergence/{name}": _joined(np.concatenate([f[name] for f in found])) for name in found[0]}


def _monitor(bundle: Any, out: dg.Generation) -> Columns:
    if getattr(bundle, "tokenizer", None) is None:
        raise ValueError("monitors read texts: give a bundle with a tokenizer")
    drafts = [drafts_of(out, row, bundle.tokenizer) for row in range(len(out.texts))]
    read = [(last_line(text or ""), text or "", *both) for text, both in zip(out.texts, drafts, strict=True)]
    return {f"monitor/{view}": [row[i] for row in read] for i, view in enumerate(VIEWS)}


STATISTICS: dict[str, Statistic] = {
    "order": Statistic("order of commits: tau-b and its control, un-accepts, entropy at commit, confidence", _order),
    "flow": Statistic("transitions of acceptance, settled share, entropy, step by step", _flow),
    "identity": Statistic(
        "likely tokens: final, adjacent, similar, other; the top 8 and p > 0.03", _identity, top_k=int(1 / PAPER_P) + 1
    ),
    "lengths": Statistic("the length that each step expects, against the one that came out", _lengths, ends=True),
    "smearing": Statistic("tokens at several places at once; two texts at once", _smearing, top_k=8),
    "intermediate": Statistic("tokens that were likely and did not stay", _intermediate, top_k=2),
    "loops": Statistic("texts and runs that go in circles", _loops),
    "divergence": Statistic(
        "divergence of each step from the one before and from the last; steps run again", _divergences, soft=True
    ),
    "monitorability": Statistic(
        'g-mean² of monitors over two arms; prompts need an "intervention" and an "answer"', _monitor, top_k=4,
        arms=("prompt", "intervention"),
    ),
}  # fmt: skip


def chosen(name: str | Sequence[str]) -> dict[str, Statistic]:
    """The statistics of one name, several ("order,flow"), or "all" but monitorability.

    Raises:
        ValueError: a name that is not in the table, or monitorability with others.
    """
    names = [part.strip() for part in name.split(",")] if isinstance(name, str) else list(name)
    if names == ["all"]:
        names = [name for name in STATISTICS if name != "monitorability"]
    unknown = [name for name in names if name not in STATISTICS]
    if unknown or not names:
        raise ValueError(f"no statistic {', '.join(map(repr, unknown))}; there are {', '.join(STATISTICS)}, and all")
    if len({STATISTICS[name].arms for name in names}) > 1:
        raise ValueError("monitorability runs every prompt in two arms: give it a study of its own")
    return {name: STATISTICS[name] for name in dict.fromkeys(names)}


def record_for(bundle: Any, statistics: Iterable[Statistic]) -> dg.Record:
    """One record with what all of them need."""
    every = list(statistics)
    top = min(max(s.top_k for s in every), of(bundle).config.vocab_size)
    ends = any(s.ends for s in every)
    soft = any(s.soft for s in every)
    return dg.Record(tokens=soft, top_k=top, soft=soft, fn=watch_length(bundle) if ends else None)


def measured(bundle: Any, out: dg.Generation, statistics: Iterable[Statistic]) -> Columns:
    """All columns of a generation."""
    columns = of_generation(bundle, out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of rows without content are NaN
        for statistic in statistics:
            columns |= statistic.measure(bundle, out)
    return columns
