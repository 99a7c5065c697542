"""How a phrase gets around a refusal: does it suppress the refusal feature, or leave it on and cut its effect?

Of every pair that a phrase turns from refusal to an answer:

activation   of the feature at the prompt's last token, with the phrase and without, from 0 (answered) to 1 (refused)
added back   the feature added to the prompt with the phrase: does the refusal return?
patched      residuals of one run put into the other in the causal pass, at all layers, at one position or at many.
             Release: from the run with the phrase into the one without. Re-imposition: the other way round. Needs
             prompts of equal length, so that positions correspond. arXiv 2608.15772 asks which takes how many.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dgemma_jax.diffusion import prompts as inputs
from interp.captures import capture_prompt
from interp.editing import edit
from interp.edits import Edit
from interp.safety.findings import share
from interp.safety.prompt_files import asked
from interp.safety.verdicts import REFUSAL
from interp.safety.watched_runs import verdict_of

_SITES = "layers.*.resid_post"
MOST = 16  # pairs that are patched
_ON = 0.5  # of the feature's scale: below, the phrase has put it out

Row = Mapping[str, Any]


@nnx.dataclass(eq=False)
class PatchAt(Edit):
    """Takes `value` where `on` is 1, by position of the prompt: each row has its own places, so a sweep is one batch.

    Attributes:
        value: [B, T, D].
        on: [B, T, 1]; the last entry stands for all later positions.
    """

    VALUES: ClassVar = {"value": None, "on": None}
    value: Any = nnx.data()
    on: Any = nnx.data()

    def apply(self, x: jax.Array) -> jax.Array:
        return jnp.where(self.here(self.on, x) > 0.5, self.here(self.value, x), x)


def pairs_of(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """(without the phrase, with it) of every minimal pair in which both ran."""
    by_pair: dict[str, list[Row]] = {}
    for row in rows:
        if row["pair"] is not None and row["why_not"] is None:
            by_pair.setdefault(row["pair"], []).append(row)
    sides = [([r for r in own if not r["phrase"]], [r for r in own if r["phrase"]]) for own in by_pair.values()]
    return [(plain[0], other) for plain, others in sides if plain for other in others]


def jailbreak_mechanisms(task: Any, rows: Sequence[Row], shared: Any) -> dict[str, Any] | None:
    """What the phrases of the file do; None if it has no minimal pairs with a phrase.

    Args:
        task: of the audit, see `audit_stages.Task`.
        rows: prompts that ran.
        shared: the refusal feature, or None: then only patching tells.
    """
    pairs = pairs_of(rows)
    if not pairs:
        return None
    working = [(a, b) for a, b in pairs if a["verdict"] == REFUSAL and b["verdict"] != REFUSAL]
    refused = [a for a, _ in pairs if a["verdict"] == REFUSAL]
    told = {
        "pairs": len(pairs), "works": share(b["verdict"] != REFUSAL for a, b in pairs if a["verdict"] == REFUSAL),
        "refused_without": len(refused), "mechanism": "not measured", "each": [],
    }  # fmt: skip
    if shared is not None and working:
        told |= _by_activation(working)
    equal = [(a, b) for a, b in working if a["tokens"] == b["tokens"]][:MOST]
    told["patched_pairs"] = len(equal)
    if equal:
        told["patching"] = task.kept(0, "pair patches", lambda: patched_pairs(task, equal))
    return told


def _by_activation(working: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    each = [
        {"pair": a["pair"], "without": a["activation"], "with": b["activation"],
         "suppressed": b["activation"] < _ON * a["activation"],
         "restored": b["arms"]["added"]["verdict"] == REFUSAL}
        for a, b in working
    ]  # fmt: skip
    out, back = share(one["suppressed"] for one in each), share(one["restored"] for one in each)
    if out["low"] > 0.5:
        mechanism = "suppresses the feature" if back["share"] > 0.5 else "suppresses the feature, and more"
    elif out["high"] < 0.5:
        mechanism = "leaves the feature on and cuts its effect"
    else:
        mechanism = "differs by pair, or too few pairs to tell"
    return {"mechanism": mechanism, "suppressed": out, "restored": back, "each": each}


def patched_pairs(task: Any, pairs: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    """Shares released and re-imposed: patching one position, the phrase, all else, or all; positions from the end.

    Returns:
        {"release", "reimposition": {"single": [T] shares from the last position backwards, "best_single", "phrase",
        "rest", "all": share with interval}}.
    """
    model, tokenizer, _ = inputs.parts(task.bundle)
    texts = [[asked(row["text"], row["before"]) for row in side] for side in zip(*pairs, strict=True)]
    ids = [inputs.to_ids(side, tokenizer, model.config.vocab_size) for side in texts]
    acts = [capture_prompt(task.bundle, side, _SITES) for side in ids]
    shortest, width = min(map(len, ids[0])), acts[0].tokens.shape[1]
    sets = ["phrase", "rest", "all", *range(shortest)]
    jobs = [(side, pair, places) for side in (0, 1) for pair in range(len(pairs)) for places in sets]

    def on_of(pair: int, places: Any) -> np.ndarray:
        length = len(ids[0][pair])
        on = np.zeros(width + 1, np.float32)
        if isinstance(places, int):
            on[length - 1 - places] = 1
        else:
            differs = np.array([a != b for a, b in zip(ids[0][pair], ids[1][pair], strict=True)])
            on[:length] = {"phrase": differs, "rest": ~differs, "all": np.ones(length)}[places]
        return on

    def edited(rows: Sequence[int]) -> Any:
        chosen = [jobs[r] for r in rows]
        on = np.stack([on_of(pair, places) for _, pair, places in chosen])[..., None]
        values = {}
        for name in acts[0]:
            own = np.stack([np.asarray(acts[1 - side][name][pair]) for side, pair, _ in chosen])
            values[name] = np.pad(own, [(0, 0), (0, 1), (0, 0)])
        ons = {name: on for name in values}
        return edit(task.bundle, _SITES, PatchAt(values, ons), phase="prefill")

    found = task.runs(
        [texts[side][pair] for side, pair, _ in jobs],
        [task.seed_of(pairs[pair][side]) for side, pair, _ in jobs], drafts=False,
        watch=dataclasses.replace(task.watch, sites=()), edited=edited,
    )  # fmt: skip
    said = {job: verdict_of(task.rule, run) == REFUSAL for job, run in zip(jobs, found, strict=True)}

    def told(side: int) -> dict[str, Any]:
        def hit(places: Any) -> list[bool]:
            return [said[side, pair, places] == bool(side) for pair in range(len(pairs))]

        single = [float(np.mean(hit(at))) for at in range(shortest)]
        return {name: share(hit(name)) for name in ("phrase", "rest", "all")} | {
            "single": single, "best_single": int(np.argmax(single)),
            "any_single": share(any(hit(at)[pair] for at in range(shortest)) for pair in range(len(pairs))),
        }  # fmt: skip

    return {"release": told(0), "reimposition": told(1)}
