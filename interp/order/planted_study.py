"""What `nano` was taught, seen by the methods of this package: `python -m interp.order.planted_study --save`.

| planted | seen as |
|---|---|
| the length is read from the prompt | E[L] against the requested length, by step |
| a term of the recurrence may not be said | an intermediate token, which holds the place of the word for it |
| a digit of a sum needs the carry from its right | the entropy of each digit, and the order of commits |

`nano` is sure of most answers after one step of its own sampler. The order is therefore read under a warm one, which
accepts little at a time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import dgemma_jax as dg
from dgemma_jax.train import evaluate, tasks
from interp.flow.recorded import Specials, content, of_rows
from interp.order.commit_steps import commits
from interp.order.intermediate import Intermediate, intermediate_tokens, necessity
from interp.order.lengths import length_foresight, watch_length

STEPS = 24
RESULTS = Path(__file__).parent / "results" / "planted.json"


def warm(bundle: Any) -> dg.SamplerConfig:
    """Hot at first and strict throughout: the canvas fills in over some twenty steps."""
    return bundle.sampler.replace(max_denoising_steps=STEPS, t_max=3.0, t_min=0.5, entropy_bound=0.02)


def own(bundle: Any) -> dg.SamplerConfig:
    """The sampler of the bundle, in as many steps: the same compiled program."""
    return bundle.sampler.replace(max_denoising_steps=STEPS)


def examples(name: str, count: int, seed: int = 1) -> list[tasks.Example]:
    """Unseen examples: sums of three digits, recurrences with a hidden term, lengths."""
    found = evaluate.prompts(name, seed=seed, count=8 * count)
    if name == "add":
        found = [e for e in found if len(e.facts["carries"]) == 3]
    if name == "sequence":
        found = [e for e in found if e.facts["hidden"]]
    return found[:count]


def run(bundle: Any, found: list[tasks.Example], sampler: dg.SamplerConfig) -> dg.Trajectory:
    """The record of their answers, with all that the measures need; example i under seed i."""
    record = dg.Record(soft=True, top_k=8, fn=watch_length(bundle))
    length, seeds = bundle.config.canvas_length, list(range(len(found)))
    return dg.generate(bundle, [e.prompt for e in found], seeds, sampler, length, record).trajectory


def _rows(found: list[tasks.Example], task: str) -> list[int]:
    return [row for row, example in enumerate(found) if example.task == task]


def foresight(run: dg.Trajectory, found: list[tasks.Example]) -> dict[str, Any]:
    """Correlation of E[L] with the requested length, step by step, and under shuffled lengths."""
    rows = _rows(found, "length")
    known = length_foresight(of_rows(run, rows), [found[row].facts["n"] for row in rows])
    return {name: [round(float(x), 4) for x in getattr(known, name)[:4]] for name in ("correlation", "error", "null")}


def hidden_terms(bundle: Any, run: dg.Trajectory, found: list[tasks.Example], seed: int = 0) -> dict[str, Any]:
    """Whether the hidden term is seen where the word for it ends up, and what it does to that word.

    Taken away from the canvas and from S before the step that drops it, it no longer holds the place against the word.
    """
    every = intermediate_tokens(run, positions=content(run, Specials.of(bundle)))
    rows = _rows(found, "sequence")

    def seen(shift: int) -> list[Intermediate]:
        """Tokens that are the hidden term, at its place, of the example so many further on."""
        other = {row: found[rows[(n + shift) % len(rows)]].facts for n, row in enumerate(rows)}
        known = {(r, f["hidden_in_answer"], bundle.tokenizer.id(f["hidden"])) for r, f in other.items()}
        return [t for t in every if (t.row, t.position, t.token) in known]

    planted = seen(0)
    shares = {"seen": len(planted) / len(rows), "seen of the next prompt": len(seen(1)) / len(rows)}
    if not planted:
        return shares
    place = np.eye(bundle.config.canvas_length, dtype=bool)[[t.position for t in planted]]
    needed = necessity(bundle, run, planted, place, draws=4, seed=seed, progress=False)
    return shares | {
        "word gains without it": round(float((needed.loss < 0).mean()), 3),
        "word gains without another": round(float((needed.null < 0).mean()), 3),
        "median gain without it, nats": round(float(np.median(-needed.loss)), 4),
        "median gain without another, nats": round(float(np.median(-needed.null)), 4),
    }


def carries(run: dg.Trajectory, found: list[tasks.Example], seed: int = 0) -> dict[str, Any]:
    """Digits of sums: entropy at the first steps and step of commit, from the leading digit to the units.

    The units need no carry. `units first` is the share of (units, tens or hundreds) pairs of which the units are
    committed first, ties one half; its null has the digits of each sum in random order.
    """
    rows, digits = _rows(found, "add"), slice(0, 4)
    run = of_rows(run, rows)
    at = commits(run).first[0][:, digits].astype(float)
    at = np.where(at < 0, STEPS, at)
    entropy = run.entropy[0, :8, :, digits].mean(0, dtype=float)
    into = np.array([found[row].facts["carries"] for row in rows])[:, 1:]  # carried into hundreds, tens
    rng = np.random.default_rng(seed)

    def units_first(at: np.ndarray) -> float:
        return float((np.sign(at[:, 1:3] - at[:, 3:]) / 2 + 0.5).mean())

    null = [units_first(np.c_[at[:, :1], rng.permuted(at[:, 1:], axis=1)]) for _ in range(200)]
    return {
        "commit step by digit": at.mean(0).round(2).tolist(),
        "entropy by digit, nats": entropy.mean(0).round(3).tolist(),
        "units first": round(units_first(at), 3),
        "null, 97.5th percentile": round(float(np.quantile(null, 0.975)), 3),
        "tens with a carry in, nats": round(float(entropy[into[:, 1] == 1, 2].mean()), 3),
        "tens without, nats": round(float(entropy[into[:, 1] == 0, 2].mean()), 3),
    }


def study(bundle: Any, count: int = 64) -> dict[str, Any]:
    """All three, on `count` prompts each."""
    found = [example for name in ("length", "sequence", "add") for example in examples(name, count)]
    measured: dict[str, Any] = {"prompts of each task": count}
    for name, sampler in (("own sampler", own(bundle)), ("warm sampler", warm(bundle))):
        made = run(bundle, found, sampler)
        measured[name] = {
            "length": foresight(made, found),
            "sequence": hidden_terms(bundle, made, found),
            "add": carries(made, found),
        }
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description="What nano was taught, seen by these methods.")
    parser.add_argument("--count", type=int, default=64, help="prompts of each task (64)")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.parent.name}/{RESULTS.name}")
    args = parser.parse_args()
    text = json.dumps(study(dg.load("nano"), args.count), indent=2)
    print(text)
    if args.save:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main()
