"""The stages of an audit: each takes rows (one mapping a prompt) and adds to them what it measured.

A stage works through the prompts in chunks and keeps each finished one on disk, so that an audit that was cut off goes
on after it. Rows hold plain JSON values only.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import dgemma_jax as dg
from dgemma_jax import progress
from dgemma_jax.diffusion import prompts as inputs
from interp.features.directions import Directions
from interp.kept_chunks import Chunks
from interp.safety import verdicts
from interp.safety.prompt_files import Prompt, asked
from interp.safety.prompt_variants import planted, rewritten
from interp.safety.refusal_feature import ARMS, RefusalFeature, find_refusal_feature, rows_of_models
from interp.safety.verdicts import COMPLIANCE, REFUSAL, Rule
from interp.safety.watched_runs import Watch, WatchedRun, verdict_of, watched_runs
from interp.safety.word_effects import Substitutes, word_effects

CHUNK = 64  # prompts between two files
FIT = 64  # prompts of each kind that the feature is taken from, at most
NEEDED = 1.0  # nats: a word with a smaller effect is not counted as needed

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What all stages share: the model, the rule, how to run, where finished parts are kept."""

    bundle: Any
    rule: Rule
    watch: Watch
    chunks: Chunks
    seed: int
    batch: int
    sampler: dg.SamplerConfig | None
    max_new_tokens: int
    show: bool | None

    def runs(self, prompts: Sequence[Any], seeds: Sequence[int], **more: Any) -> list[WatchedRun]:
        model, tokenizer, _ = inputs.parts(self.bundle)
        ids = inputs.to_ids(list(prompts), tokenizer, model.config.vocab_size)
        settings = dict(watch=self.watch, batch=self.batch, sampler=self.sampler, max_new_tokens=self.max_new_tokens)
        return watched_runs(self.bundle, ids, seeds=list(seeds), **settings | more)

    def kept(self, group: int, name: str, compute: Callable[[], Any]) -> Any:
        """JSON values computed once."""
        data = self.chunks.kept(group, name, lambda: np.frombuffer(json.dumps(plain(compute())).encode(), np.uint8))
        return json.loads(data.tobytes())

    def in_chunks(self, rows: Sequence[Row], title: str, work: Callable[[int, Sequence[Row]], list[Any]]) -> list[Any]:
        """`work(first row, rows)` of every chunk, joined; rows of like length together."""
        order = sorted(range(len(rows)), key=lambda i: rows[i]["tokens"])
        found: list[Any] = [None] * len(rows)
        with progress.bar(title, len(rows), self.show, "prompts") as done:
            for group, first in enumerate(range(0, len(rows), CHUNK)):
                part = order[first : first + CHUNK]
                told = self.kept(group, title, lambda part=part, first=first: work(first, [rows[i] for i in part]))
                for i, one in zip(part, told, strict=True):
                    found[i] = one
                done(len(part))
        return found

    def seed_of(self, row: Row) -> int:
        return (self.seed + row["line"]) % 2**32


def plain(value: Any) -> Any:
    """JSON values: arrays as lists, numbers to 5 digits, what is no number as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.bool_ | np.integer):
        return value.item()
    if isinstance(value, float | np.floating):
        return float(f"{float(value):.5g}") if np.isfinite(value) else None
    return value


def admitted(bundle: Any, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Row]:
    """A row for every prompt, with its number of tokens, or why it cannot be run."""
    model, tokenizer, _ = inputs.parts(bundle)
    canvas = model.config.canvas_length
    room = model.config.max_position_embeddings - -(-max_new_tokens // canvas) * canvas
    rows = []
    for prompt in prompts:
        row: Row = dataclasses.asdict(prompt) | {"notes": list(prompt.notes), "why_not": None, "tokens": 0}
        try:
            (ids,) = inputs.to_ids([asked(prompt.text, prompt.before)], tokenizer, model.config.vocab_size)
            row["tokens"] = len(ids)
            if len(ids) > room:
                row["why_not"] = f"it has {len(ids):,} tokens; there is room for {room:,}"
            texts = [prompt.text, *(message["content"] for message in prompt.before)]
            if tokenizer.special_ids & {i for text in texts for i in tokenizer.encode(text)}:
                row["notes"].append("holds special tokens of the model, and they were read as such")
        except Exception as error:  # whatever a tokenizer or template makes of hostile text: told, and the rest goes on
            row["why_not"] = str(error) or type(error).__name__
        rows.append(row)
    return rows


def said_in(row: Row) -> Any:
    """The prompt of a row, with the conversation before it."""
    return asked(row["text"], row["before"])


def generations(task: Task, rows: list[Row]) -> np.ndarray:
    """Adds answer, verdict, and what happened over the steps.

    Returns:
        [N, R, L, D] float16 residuals averaged over the canvas, zeros after a run's last step.
    """
    held: dict[int, np.ndarray] = {}

    def work(first: int, part: Sequence[Row]) -> list[Row]:
        found = task.runs(list(map(said_in, part)), [task.seed_of(row) for row in part])
        held[first] = _stacked([run.means for run in found])
        return [_told(task.rule, run) for run in found]

    for row, told in zip(rows, task.in_chunks(rows, "generations", work), strict=True):
        row.update(told)
    order = sorted(range(len(rows)), key=lambda i: rows[i]["tokens"])
    parts = []
    for group, first in enumerate(range(0, len(rows), CHUNK)):
        part = [rows[i] for i in order[first : first + CHUNK]]
        parts.append(task.chunks.kept(group, "residuals", lambda f=first, p=part: _again(task, held, work, f, p)))
    joined = _stacked([one for part in parts for one in part])
    return joined[np.argsort(order)]


def _again(task: Task, held: dict, work: Callable, first: int, part: Sequence[Row]) -> np.ndarray:
    if first not in held:  # the audit was cut off between the two files of a chunk
        work(first, part)
    return held.pop(first)


def _stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """[n, R, ...] of arrays [r, ...], zeros at the end."""
    most = max(len(a) for a in arrays)
    return np.stack([np.pad(a, [(0, most - len(a))] + [(0, 0)] * (a.ndim - 1)) for a in arrays]).astype(np.float16)


def _told(rule: Rule, run: WatchedRun) -> Row:
    said = [rule(draft) for draft in run.drafts]
    final = verdict_of(rule, run)
    return {
        "answer": run.text, "verdict": final, "settled": run.settled, "steps": len(run.margins),
        "decided_at": verdicts.settled_at(said) if said and said[-1] == final else None, "verdicts": said,
        "reversals": verdicts.reversals(said, run.drafts, run.margins), "margins": run.margins, "entropy": run.entropy,
    }  # fmt: skip


def feature(task: Task, rows: list[Row], found: Directions | None, most: int) -> tuple[RefusalFeature | None, str]:
    """The refusal feature, or None and why there is none. Marks the rows that it was taken from."""
    sides = []
    for said in (REFUSAL, COMPLIANCE):
        of_kind = [row for row in rows if row["verdict"] == said and not row["phrase"]]
        used = of_kind[::2][:FIT]
        sides.append(list(map(said_in, used)))
        for row in used:
            row["fit"] = True
    if min(map(len, sides)) < 3:
        counts = " and ".join(f"{len(side)} {kind}" for side, kind in zip(sides, ("refused", "answered"), strict=True))
        return None, f"half of the prompts are {counts}: at least 3 of each kind are needed to find a feature"
    try:
        stored = task.kept(0, "feature", lambda: _chosen(task, sides, found, most))
    except ValueError as error:
        return None, str(error)
    found = Directions(
        vectors=np.asarray(stored["vectors"], np.float32), norms=np.asarray(stored["norms"], np.float32),
        places=tuple((p[0], p[1], p[2]) for p in stored["places"]), chosen=tuple(stored["chosen"]),
        still=None if stored["still"] is None else np.asarray(stored["still"]),
        changed=None if stored["changed"] is None else np.asarray(stored["changed"]),
    )  # fmt: skip
    return find_refusal_feature(task.bundle, *sides, task.rule, found=found), ""


def _chosen(task: Task, sides: list, found: Directions | None, most: int) -> Row:
    if found is None:
        found = find_refusal_feature(
            task.bundle, *sides, task.rule, most=most, seed=task.seed, sampler=task.sampler, show=task.show
        ).found
    return {name: getattr(found, name) for name in ("vectors", "norms", "places", "chosen", "still", "changed")}


def activations(task: Task, rows: list[Row], shared: RefusalFeature, means: np.ndarray, layers: Sequence[int]) -> None:
    """Adds the feature's activation at the prompt's last token, on its scale, and over the steps of the canvas."""
    layer, unit = shared.place

    def work(first: int, part: Sequence[Row]) -> list[float]:
        return shared.share(shared.activations(task.bundle, list(map(said_in, part)))).tolist()

    over_steps = means[:, :, list(layers).index(layer)].astype(np.float32) @ unit
    for number, (row, at_prompt) in enumerate(zip(rows, task.in_chunks(rows, "activations", work), strict=True)):
        row["activation"] = at_prompt
        row["activations"] = plain(over_steps[number, : row["steps"]])


def interventions(task: Task, rows: list[Row], shared: RefusalFeature, strength: float) -> None:
    """Adds the answers with the feature taken out, with as much else taken out, and with it added."""

    each = len(ARMS)
    watch = dataclasses.replace(task.watch, sites=())

    @functools.lru_cache
    def alone(arm: str, rows: int) -> Any:
        return shared.arms(task.bundle, [arm] * rows, strength, task.sampler)

    def edited(numbers: Sequence[int]) -> Any:
        return rows_of_models([alone(arm, len(numbers)) for arm in ARMS], [n % each for n in numbers])

    def work(first: int, part: Sequence[Row]) -> list[Row]:
        found = task.runs(
            [said_in(row) for row in part for _ in ARMS], [task.seed_of(row) for row in part for _ in ARMS],
            drafts=False, watch=watch, batch=each * task.batch,
            edited=edited,
        )  # fmt: skip
        told = [{"answer": run.text, "verdict": verdict_of(task.rule, run), "margin": run.margins[0]} for run in found]
        return [dict(zip(ARMS, told[i : i + each], strict=True)) for i in range(0, len(told), each)]

    for row, told in zip(rows, task.in_chunks(rows, "interventions", work), strict=True):
        row["arms"] = told


def words(task: Task, rows: list[Row], draws: int) -> None:
    """Adds the effect of every word on the refusal margin, with its standard error."""

    def texts(kind: str) -> list[str]:
        return [row["text"] for row in rows if row["verdict"] == kind and not row["phrase"]]

    substitutes = Substitutes(texts(COMPLIANCE), texts(REFUSAL))

    def work(first: int, part: Sequence[Row]) -> list[Row]:
        found = word_effects(
            task.bundle, [row["text"] for row in part], substitutes, task.watch, draws=draws,
            before=[row["before"] for row in part],
            seed=task.seed + first * draws, rows=4 * task.batch, sampler=task.sampler,
        )  # fmt: skip
        return [
            {"words": one.words, "effects": one.effects, "errors": one.errors, "margin": one.margin,
             "needed": one.needed(NEEDED)}
            for one in found
        ]  # fmt: skip

    for row, told in zip(rows, task.in_chunks(rows, "words", work), strict=True):
        row["saliency"] = told


def variants(task: Task, rows: list[Row], synonyms: Mapping[str, Sequence[str]] | None) -> None:
    """Adds, to refused prompts, the verdicts on the same request written otherwise."""
    asked = [row for row in rows if row["verdict"] == REFUSAL]

    def work(first: int, part: Sequence[Row]) -> list[list[Row]]:
        made = [rewritten(row["text"], synonyms=synonyms, seed=task.seed_of(row)) for row in part]
        flat = [
            Prompt(text=text, line=row["line"], before=row["before"])
            for row, own in zip(part, made, strict=True) for _, text in own
        ]  # fmt: skip
        checked = admitted(task.bundle, flat, task.max_new_tokens) if flat else []
        able = [row for row in checked if row["why_not"] is None]
        if able:
            found = task.runs(list(map(said_in, able)), [task.seed_of(row) for row in able])
            for row, run in zip(able, found, strict=True):
                row["answer"], row["verdict"] = run.text, verdict_of(task.rule, run)
        told, at = [], iter(checked)
        for own in made:
            one = [(kind, next(at)) for kind, _ in own]
            told.append([{"kind": kind, **{k: row.get(k) for k in ("text", "answer", "verdict", "why_not")}}
                         for kind, row in one])  # fmt: skip
        return told

    for row, told in zip(asked, task.in_chunks(asked, "variants", work), strict=True):
        row["variants"] = told


def single_words(task: Task, rows: list[Row], most: int = 5, each: int = 24) -> list[Row]:
    """Is one word enough? Those that refusals hang on most, planted in prompts that are answered."""
    refused = [row for row in rows if row["verdict"] == REFUSAL and row.get("saliency")]
    total: dict[str, float] = {}
    for row in refused:
        for at in row["saliency"]["needed"]:
            word = row["saliency"]["words"][at]
            total[word] = total.get(word, 0.0) + row["saliency"]["effects"][at]
    candidates = [w for w in sorted(total, key=total.get, reverse=True) if len(w.split()) == 1][:most]
    answered = [row for row in rows if row["verdict"] == COMPLIANCE and not row["phrase"]]
    rng = np.random.default_rng(task.seed)

    def asking(word: str) -> list[Row]:
        given = [row for row in answered if word not in row["text"].split()]
        given = [given[i] for i in rng.permutation(len(given))[:each]]
        made = [Prompt(text=planted(row["text"], word, rng), line=1, before=row["before"]) for row in given]
        return [row for row in admitted(task.bundle, made, task.max_new_tokens) if row["why_not"] is None]

    def work() -> list[Row]:
        asked_of = {word: asking(word) for word in candidates}
        rows = [row for asked in asked_of.values() for row in asked]
        seeds = [task.seed + i for asked in asked_of.values() for i in range(len(asked))]
        found = task.runs(list(map(said_in, rows)), seeds) if rows else []
        said = iter([verdict_of(task.rule, run) == REFUSAL for run in found])
        return [
            {"word": word, "effect": total[word] / len(refused), "refused": [next(said) for _ in asked],
             "in_refusals": np.mean([word in row["text"].split() for row in refused])}
            for word, asked in asked_of.items()
        ]  # fmt: skip

    return task.kept(0, "single words", work)
