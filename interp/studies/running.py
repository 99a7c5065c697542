"""A study: statistics of thousands of generations, in batches, that goes on where it was cut off.

The directory of a study:

| file | content |
|---|---|
| manifest.json | model, prompts, sampler, settings, versions; written first |
| parts/00000.npz, ... | the rows of each part, written when it is done; they may go when the study is finished |
| generations.npz | all rows, in the order of the prompts (`interp.studies.columns` says how to read it) |
| summary.json, summary.txt, figures/*.png | what is made of them |

Which rows make a part depends on the prompts and settings alone, and a file is there whole or not at all. A study
that was killed and run again leaves the same bytes as one that was not, and so does one that many hosts made. A row
that has finished makes room for the next (`dg.stream`), of the next part too where rows are of like length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import dgemma_jax as dg
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion.generate import blocks_for, bucket
from dgemma_jax.nn.functional import of
from dgemma_jax.progress import bar
from interp.questions import GRADERS
from interp.studies import batches, columns, manifest, statistics_table
from interp.studies.hosts import Share
from interp.studies.prompt_files import StudyPrompt, StudyPrompts
from interp.studies.results import ROWS, Study

BATCHES_A_PART = 8  # at most; a study has eight parts before they grow


@dataclasses.dataclass(frozen=True)
class _Row:
    """A generation to be made."""

    prompt: StudyPrompt
    arm: str
    ids: list[int]
    seed: int


def study(
    name: str, bundle: Any, prompts: Any, out: str | Path, *, seeds: int = 1, seed: int = 0,
    sampler: dg.SamplerConfig | None = None, max_new_tokens: int = 256, batch: int | None = None,
    grade: str = "exact", monitors: Mapping[str, str] | None = None, thinking: bool = False,
    hosts: int | None = None, host: int | None = None, progress: bool | None = None,
) -> Study:  # fmt: skip
    """Generate an answer to every prompt and keep statistics of how each came about.

    Args:
        name: statistics of `interp.studies.statistics_table.STATISTICS`, with commas between, or "all".
        bundle: a bundle with a tokenizer, edited or not; weights may lie on a mesh (`dg.load(mesh=)`).
        prompts: a JSONL file, `interp.Questions`, or a list (see `interp.studies.prompt_files`). Lines that are none,
            and prompts that the model cannot take, are left out and named in the manifest.
        out: directory of the study. Run it again with the same arguments to go on.
        seeds: generations of each prompt, under seed, seed + 1, ...
        sampler, max_new_tokens, thinking: as for `dg.generate`.
        batch: generations at a time; by default what fits. An interruption loses the parts, of one to eight batches
            each, that have a row running: no more than is made while the longest generation runs.
        grade: how an answer is met, "exact" or "contains"; prompts without answer are not graded.
        monitors: regular expressions by name, for the statistic "monitorability"; by default a probe.
        hosts, host: of how many this is which, all with the same `out`, see `interp.studies.hosts`; by default as
            `jax.distributed` says. The host that comes last gives the whole study, others what is there by then.
        progress: a bar; by default in a terminal.

    Raises:
        ValueError: an unknown statistic or grade, no usable prompt, a directory that holds another study.
    """
    chosen = statistics_table.chosen(name)
    if seeds < 1 or (batch is not None and batch < 1) or grade not in GRADERS:
        raise ValueError(f"needed are seeds >= 1, batch >= 1, grade of {', '.join(GRADERS)}; got {seeds=}, {batch=}, "
                         f"{grade=}")  # fmt: skip
    out = Path(out)
    share = Share.of(bundle, hosts, host)
    arms = next(iter(chosen.values())).arms
    given, ids = _usable(bundle, StudyPrompts.of(prompts), arms, max_new_tokens, thinking)
    rows = [
        _Row(prompt, arm, ids[prompt.id][arm], seed + n) for prompt in given.prompts for arm in arms
        for n in range(seeds)
    ]  # fmt: skip
    sampler = inputs.parts(bundle)[2] if sampler is None else sampler
    size = batches.that_fit(bundle, len(rows)) if batch is None else min(len(rows), batch)
    settings = {
        "statistics": list(chosen), "seeds": seeds, "seed": seed, "max_new_tokens": max_new_tokens, "batch": size,
        "grade": grade, "monitors": dict(monitors or {}), "thinking": thinking,
    }  # fmt: skip
    about = manifest.described(bundle, given, sampler, settings)
    if share.writes:
        manifest.claim(out, about)
        if share.hosts == 1:
            manifest.clear(out)
    if not (out / ROWS).exists():
        plan = batches.planned([len(row.ids) for row in rows], _part(len(rows), size))
        paths = [out / "parts" / f"{number:05d}.npz" for number in range(len(plan))]
        mine, absent = share.mine(range(len(plan))), share.absent(paths)
        if share.writes:
            manifest.clear(out, mine)
            (out / "parts").mkdir(exist_ok=True)
        with bar(f"study {name}", sum(len(plan[number]) for number in mine), progress, "generations") as done:
            done(sum(len(plan[number]) for number in mine if number not in absent))
            todo = {number: [rows[i] for i in plan[number]] for number in mine if number in absent}
            room = _room(bundle, [[len(rows[i].ids) for i in part] for part in plan], max_new_tokens)
            asked = {"sampler": sampler, "max_new_tokens": max_new_tokens}
            for number, part in _measured(bundle, todo, room, size, asked, chosen.values(), grade, done):
                if share.writes:
                    columns.write(paths[number], part)
        share.meet()
        there = [number for number in range(len(plan)) if paths[number].exists()]
        is_last = share.together or len(there) == len(plan) or (out / ROWS).exists()  # or just joined
        if not is_last:
            return _so_far(about, [paths[n] for n in there], [plan[n] for n in there], len(rows))
        if share.writes and not (out / ROWS).exists():
            parts = [columns.read(path) for path in paths]
            columns.write(out / ROWS, columns.joined(parts, np.argsort(np.concatenate(plan))))
        share.meet()
    found = Study.load(out)
    if share.writes:
        found.save(out)
    return found


def _room(bundle: Any, lengths: list[list[int]], max_new_tokens: int) -> list[int]:
    """Tokens that the rows of each part of the whole plan have room for, whichever of the parts are yet to be made."""
    config = of(bundle).config
    longest = [max(own) for own in lengths]
    return batches.shared([bucket(n + blocks_for(n, max_new_tokens, config) * config.canvas_length) for n in longest])


def _measured(
    bundle: Any, parts: Mapping[int, list[_Row]], room: list[int], size: int, asked: Mapping[str, Any],
    statistics: Collection[Any], grade: str, done: Callable[[int], None],
) -> Iterator[tuple[int, columns.Columns]]:  # fmt: skip
    """Numbers of parts and their columns, each when its last row is measured.

    Parts that have room for as many tokens share a stream: the first rows of one run beside the last of another.
    """
    record = statistics_table.record_for(bundle, statistics)
    for numbers in batches.runs(list(parts), [room[number] for number in parts]):
        owner = [number for number in numbers for _ in parts[number]]
        rows = [row for number in numbers for row in parts[number]]
        given = [rows[i] for i in batches.filled(np.arange(len(rows)), size)]
        ids, seeds = [row.ids for row in given], [row.seed for row in given]
        found: dict[int, dict[int, columns.Columns]] = {}  # by part, by its first row: batches come in any order
        stream = dg.stream(bundle, ids, seeds, record=record, rows=size, capacity=room[numbers[0]], **asked)
        for at, results in batches.together(stream, size, len(rows)):
            whole, number = batches.filled(np.arange(len(at)), size), owner[at[0]]
            some = dg.collected([results[i] for i in whole])
            told = _said([rows[at[i]] for i in whole], some, grade)
            told |= statistics_table.measured(bundle, some, statistics)
            part = found.setdefault(number, {})
            part[at[0]] = {name: values[: len(at)] for name, values in told.items()}
            done(len(at))
            if sum(len(one["id"]) for one in part.values()) == len(parts[number]):
                yield number, columns.joined([part[i] for i in sorted(part)], np.arange(len(parts[number])))
                del found[number]


def _part(count: int, size: int) -> int:
    """Rows of a part: whole batches, more of them the longer the study is."""
    return size * max(1, min(BATCHES_A_PART, -(-count // size) // 8))


def _so_far(about: dict[str, Any], paths: list[Path], plan: list[np.ndarray], count: int) -> Study:
    """The study of the rows that hosts have made by now, in the order of the prompts."""
    nothing: columns.Columns = {"id": [], "group": [], "arm": [], "seed": np.zeros(0, int), "right": np.zeros(0)}
    order = np.argsort(np.concatenate(plan)) if plan else np.zeros(0, int)
    rows = columns.joined([columns.read(path) for path in paths], order) if paths else nothing
    return Study(rows, about, missing=count - len(order))


def _said(part: list[_Row], made: dg.Generation, grade: str) -> columns.Columns:
    """What a row is, and whether it is right (NaN without an answer)."""
    right = [
        float("nan") if row.prompt.answer is None else float(GRADERS[grade](text or "", row.prompt.answer))
        for row, text in zip(part, made.texts, strict=True)
    ]
    return {
        "id": [row.prompt.id for row in part], "group": [row.prompt.group for row in part],
        "arm": [row.arm for row in part], "seed": np.array([row.seed for row in part]), "right": np.array(right),
    }  # fmt: skip


def _usable(
    bundle: Any, given: StudyPrompts, arms: tuple[str, ...], max_new_tokens: int, thinking: bool
) -> tuple[StudyPrompts, dict[str, dict[str, list[int]]]]:
    """The prompts that the model can take, and the ids of each arm."""
    model, tokenizer, _ = inputs.parts(bundle)
    config = model.config
    room = config.max_position_embeddings - -(-max_new_tokens // config.canvas_length) * config.canvas_length
    ids, broken = {}, list(given.broken)
    for prompt in given.prompts:
        try:
            if len(arms) > 1 and (prompt.intervention is None or prompt.answer is None):
                raise ValueError('a study of two arms needs "intervention" and "answer"')
            own = {
                arm: inputs.to_ids([getattr(prompt, arm)], tokenizer, config.vocab_size, thinking)[0] for arm in arms
            }
            longest = max(map(len, own.values()))
            if longest > room:
                raise ValueError(f"{longest} tokens, and the context has room for {room} beside the answer")
            ids[prompt.id] = own
        except (ValueError, KeyError, TypeError) as error:
            broken.append(f"line {prompt.line}: {error}")
    if not ids:
        raise ValueError("no prompt is usable: " + "; ".join(broken[:5]))
    return StudyPrompts(tuple(p for p in given.prompts if p.id in ids), tuple(broken)), ids
