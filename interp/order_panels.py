"""The data of four panels of the explain page: transitions of acceptance, smearing, length expected, commit order."""

from __future__ import annotations

from typing import Any

import numpy as np

from interp.flow.acceptance import TRANSITIONS, transitions
from interp.flow.recorded import Specials
from interp.order.commit_steps import commits
from interp.order.order_measures import commit_order
from interp.order.sequence_smears import sequence_smear
from interp.order.token_smears import smeared_tokens

MEASURES = ("tau", "control", "same call", "out of order", "tokens per call", "given up")


def transitions_data(bundle: Any, generation: Any) -> dict[str, Any]:
    """`names`, and per block that was run `counts` [n, 4]: positions by what became of them since the step before."""
    run = generation.trajectory
    found = transitions(run)
    counts = np.stack([found[name] for name in TRANSITIONS], -1)
    blocks = [{"counts": counts[j, :n, 0].astype(int).tolist()} for j, n in _blocks(run)]
    return {"names": TRANSITIONS, "blocks": blocks}


def smearing_data(bundle: Any, generation: Any) -> dict[str, Any] | None:
    """Per block: `tokens` [n] lists of [position, token], tokens beside their place; texts held beside the final one.

    `spacing` [n, 7]: mean probability of the final text shifted by -3..3 positions; `null` [n] of shuffled text;
    `meaning` [n]: positions of another text. None if the record kept no candidates.
    """
    run = generation.trajectory
    if not _has_candidates(run):
        return None
    every, specials = smeared_tokens(run), _specials(bundle, generation)
    blocks = []
    for j, n in _blocks(run):
        held = sequence_smear(run, specials, j)
        blocks.append({
            "tokens": [[[at, token] for b, s, _, at, token in every if (b, s) == (j, i)] for i in range(n)],
            "spacing": np.round(held.spacing[:n, 0], 4).tolist(), "null": np.round(held.null[:n, 0], 4).tolist(),
            "meaning": held.meaning[:n, 0].astype(int).tolist(),
        })  # fmt: skip
    return {"floor": held.floor, "blocks": blocks} if blocks else None


def length_data(bundle: Any, generation: Any) -> dict[str, Any] | None:
    """Per block: `low` and `high` [n], between which the expected length lies, and the `final` one, positions.

    E[L] = sum of 1 - p(end or padding). The record holds p of the candidates; what is beyond them may be either, so
    there are two sums. None if the record kept no candidates.
    """
    run = generation.trajectory
    if not _has_candidates(run):
        return None
    closing = np.isin(run.top_ids, _specials(bundle, generation).closing)
    ended = (run.top_probs * closing).sum(-1, dtype=float)
    unknown = np.maximum(1 - run.top_probs.sum(-1, dtype=float), 0)
    high = (1 - ended).sum(-1)
    low = np.maximum(high - unknown.sum(-1), 0)
    final = ~np.isin(run.committed, _specials(bundle, generation).closing)
    return {"blocks": [
        {"low": np.round(low[j, :n, 0], 3).tolist(), "high": np.round(high[j, :n, 0], 3).tolist(),
         "final": int(final[j, 0].sum())}
        for j, n in _blocks(run)
    ]}  # fmt: skip


def commit_data(bundle: Any, generation: Any) -> dict[str, Any]:
    """Per block: `commit` and `lock` [C] steps from 1, null where none; `content` [C]; `measures` of the order."""
    run = generation.trajectory
    found, specials = commits(run), _specials(bundle, generation)
    order = commit_order(run, specials)
    blocks = []
    for j, n in _blocks(run):
        after_end = np.cumsum(np.isin(run.committed[j, 0], specials.ends)) > 0
        own = ~after_end & ~np.isin(run.committed[j, 0], specials.others)
        measures = {name: float(order[name][j, 0]) for name in MEASURES}
        blocks.append({
            "commit": [int(s) + 1 if s >= 0 else None for s in found.first[j, 0]],
            "lock": [int(s) + 1 for s in found.lock[j, 0]], "content": own.tolist(), "steps": n,
            "measures": {name: round(x, 4) if np.isfinite(x) else None for name, x in measures.items()},
        })  # fmt: skip
    return {"blocks": blocks}


def _blocks(run: Any) -> list[tuple[int, int]]:
    """Number and steps of each block that was run."""
    return [(j, int(n)) for j, n in enumerate(run.num_steps[:, 0]) if n]


def _has_candidates(run: Any) -> bool:
    return run.top_ids is not None and run.top_ids.shape[-1] > 0


def _specials(bundle: Any, generation: Any) -> Specials:
    """As `Specials.of`, from what a page knows."""
    ends, sampler = set(generation.sampler.eos_token_ids), generation.sampler
    marks = {bundle.config.bos_token_id, bundle.config.pad_token_id, sampler.pad_token_id}
    marks |= set(getattr(getattr(bundle, "tokenizer", None), "special_ids", ()))
    return Specials(tuple(sorted(ends)), tuple(sorted(marks - ends)))
