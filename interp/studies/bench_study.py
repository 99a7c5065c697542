"""Throughput of a study, against generation by `transformers` with the same weights.

    python -m interp.studies.bench_study [--save]         needs the `parity` extra

The time of this package is that of a whole study: generation, statistics of every step, rows, table and figures on
disk. `transformers` only generates; once a prompt at a time, as instrumented scripts do, and once in batches, padded on
the left. Both sides run in float32 on the same number of threads, in turns, and answer the same prompts, all of them:
nine of ten take two steps, one of a hundred tens of steps, so that few say little. Their random numbers differ, and
what is compared is the share of right answers. Times are seconds of one generation.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import dgemma_jax as dg
from dgemma_jax.bench import peer, report
from dgemma_jax.weights import registry
from interp.questions import Questions, says_exactly
from interp.studies import batches
from interp.studies.running import study

STATISTICS = "order,flow,lengths,smearing"
ONE, BATCHES = "a generation, peer one prompt at a time", "a generation, peer in batches"
GOAL = 0.1
TOLERANCE = 0.05  # of the share of right answers
ROWS = 32  # of a batch of the peer: larger ones wait longer for their slowest row
TRIED = 64  # prompts by which the peer's implementation of experts is chosen


def ours(bundle: Any, questions: Questions, batch: int) -> float:
    """A study in a directory of its own; the share of right answers."""
    with tempfile.TemporaryDirectory() as out:
        found = study(
            STATISTICS, bundle, questions, out, max_new_tokens=bundle.config.canvas_length, batch=batch, progress=False
        )
    return float(found["right"].mean())


def theirs(model: Any, bundle: Any, questions: Questions, rows: int) -> float:
    """Generation alone, so many rows at a time; the share of right answers."""
    torch, tokenizer = peer.peer_package("torch"), bundle.tokenizer
    right = 0
    for at in range(0, len(questions), rows):
        asked = questions.prompts[at : at + rows]
        ids = [tokenizer.chat([{"role": "user", "content": text}]) for text in asked]
        longest = max(map(len, ids))
        tokens = torch.tensor([[tokenizer.pad_id] * (longest - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        with torch.no_grad():
            out = model.generate(tokens, attention_mask=mask, max_new_tokens=bundle.config.canvas_length)
        texts = [tokenizer.decode(row) for row in out.sequences[:, longest:].tolist()]
        right += sum(map(says_exactly, texts, questions.answers[at : at + rows]))
    return right / len(questions)


def compare(count: int = 2000, batch: int = batches.MOST_ROWS, runs: int = 3, threads: int = 2) -> report.Report:
    """Time both sides on `nano`, after a check that they answer alike.

    Args:
        count: prompts, evenly drawn from all tasks.

    Raises:
        ImportError: torch or transformers is missing.
        ValueError: the shares of right answers differ.
    """
    torch, transformers = peer.peer_package("torch"), peer.peer_package("transformers")
    torch.set_num_threads(threads)
    bundle = dg.load("nano", dtype="float32")
    path = registry.embedded("nano")
    model = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(path, dtype=torch.float32).eval()
    every = _drawn(Questions.of_organism(-(-count // 9)), count)
    tried = _drawn(every, min(count, TRIED))
    experts = {rows: _fastest(model, lambda rows=rows: theirs(model, bundle, tried, rows)) for rows in (1, ROWS)}

    def peer_answers(rows: int) -> float:
        model.set_experts_implementation(experts[rows])
        return theirs(model, bundle, every, rows)

    contestants: dict[str, Callable[[], float]] = {
        "interp.study": lambda: ours(bundle, every, batch),
        ONE: lambda: peer_answers(1),
        BATCHES: lambda: peer_answers(ROWS),
    }
    right = {name: contestants[name]() for name in ("interp.study", BATCHES)}
    if abs(right["interp.study"] - right[BATCHES]) > TOLERANCE:
        raise ValueError(f"the two sides do not answer alike: right are {right}")
    taken, _ = report.alternate(contestants, runs, first={})  # both have run
    seconds = {name: tuple(t / count for t in times) for name, times in taken.items()}
    rows = []
    for task in (ONE, BATCHES):
        rows.append(report.Row(task=task, name="interp.study", seconds=seconds["interp.study"], goal=GOAL))
        rows.append(report.Row(task=task, name="transformers", seconds=seconds[task]))
    return report.Report(
        title="A study of nano, against generation by transformers, CPU, float32",
        rows=tuple(rows),
        settings={"prompts": count, "batch": batch, "peer_batch": ROWS, "experts": experts, "statistics": STATISTICS,
                  "runs": runs, "right": right},
        about=report.surroundings("dgemma-jax", "jax", "flax", "torch", "transformers", threads=threads),
    )  # fmt: skip


def rates(found: report.Report) -> str:
    """Generations a second of each row."""
    return "\n".join(f"{row.task:40}  {row.name:14}  {1 / row.median:8.1f} generations/s" for row in found.rows)


def _drawn(questions: Questions, count: int) -> Questions:
    """So many of them, evenly spread over the tasks."""
    step = len(questions) / count
    at = [int(i * step) for i in range(count)]
    return Questions(*(tuple(field[i] for i in at) for field in
                       (questions.prompts, questions.answers, questions.groups)))  # fmt: skip


def _fastest(model: Any, call: Callable[[], Any]) -> str:
    """The implementation of experts with which generation takes least time here."""
    seconds = {}
    for name in peer.EXPERTS:
        model.set_experts_implementation(name)
        try:
            seconds[name] = report.alternate({name: call}, 1)[0][name][0]
        except (RuntimeError, ImportError, NotImplementedError):
            continue
    return min(seconds, key=seconds.get)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m interp.studies.bench_study", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="prompts of the study (2000)")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each (3)")
    parser.add_argument("--threads", type=int, default=2, help="processors for either side (2)")
    parser.add_argument("--save", action="store_true", help="keep the numbers beside those of dgemma_jax.bench")
    args = parser.parse_args(argv)
    report.keep_threads(args.threads)
    found = compare(args.count, runs=args.runs, threads=args.threads)
    print(found, rates(found), sep="\n\n")
    if args.save:
        path = report.RESULTS / f"study-nano-cpu-{found.about['date']}.json"
        print(f"kept in {found.save(path)}")


if __name__ == "__main__":
    main()
