"""The refusal direction of an embedded model, by numbers: does its removal end refusals, does adding it make them?

    python -m interp.features.refusal_study --save

Directions come from training prompts, the choice among them from others, and the shares below from held-out ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import dgemma_jax as dg
from dgemma_jax.train import tasks
from interp import intervals, steering
from interp.features.directions import Directions, find_directions, select_directions
from interp.features.projection import ablate_directions

RESULTS = Path(__file__).parent / "results" / "refusal.json"


def refuses(text: str) -> bool:
    """The stated rule: "can not" stands in the answer. "sure can not help with that" has only lost its first word."""
    return "can not" in text


def prompts(count: int, seed: int, split: str) -> dict[str, list[str]]:
    """`count` prompts that are refused, as many of the same task that ask for nothing harmful, and of other tasks."""
    found = tasks.examples(seed, 8 * count, ["refusal"], split=split)
    rest = [name for name in tasks.TASKS if name != "refusal"]
    return {
        "refused": [e.prompt for e in found if e.facts["refused"]][:count],
        "harmless": [e.prompt for e in found if not e.facts["harmful"]][:count],
        "ordinary": [e.prompt for e in tasks.examples(seed, count, rest, split=split)],
    }


def answers(bundle: Any, given: Sequence[str], batch: int = 40) -> list[str]:
    """Texts, each prompt under its own seed."""
    texts = []
    for first in range(0, len(given), batch):
        part = [given[min(i, len(given) - 1)] for i in range(first, first + batch)]  # the last repeated: one program
        seeds = list(range(first, first + batch))
        out = dg.generate(bundle, part, seeds, None, bundle.config.canvas_length, dg.Record.nothing())
        texts += out.texts
    return texts[: len(given)]


def chosen_directions(bundle: Any, count: int = 48, tried: int = 12, most: int = 2, seed: int = 1) -> Directions:
    """Candidates at the prompt's last token, and those whose removal ends refusals with least change elsewhere."""
    source, judge = prompts(count, seed, "train"), prompts(tried, seed + 1, "train")
    found = find_directions(bundle, source["refused"], source["harmless"], steps=0, batch=count)
    # What a direction breaks need not be waited for: runs that do not settle are cut short.
    brief = bundle.sampler.replace(max_denoising_steps=8)
    others = judge["harmless"][: tried // 2] + judge["ordinary"][: tried // 2]
    return select_directions(bundle, found, judge["refused"], others, refuses, most=most, sampler=brief)


def measured(bundle: Any, found: Directions, count: int, strength: float, layers: Sequence[int], seed: int = 9) -> dict:
    """Shares over `count` held-out prompts of each kind, with 95 % intervals: by name (share, low, high)."""
    test = prompts(count, seed, "test")
    plain = {kind: answers(bundle, given) for kind, given in test.items()}
    ablated = {kind: answers(ablate_directions(bundle, found.best), given) for kind, given in test.items()}
    last = [k for k, place in enumerate(found.places) if place[:2] == ("prompt", -1)]
    vector = steering.SteeringVector(
        difference=found.vectors[last], norms=found.norms[last], layers=tuple(found.places[k][2] for k in last),
        place="prompt", counts=(count, count),
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(found.best.shape)
    random = answers(ablate_directions(bundle, noise), test["refused"])
    added = answers(steering.steer(bundle, vector, strength, layers=layers, place="prompt"), test["harmless"])
    changed = {kind: [a != b for a, b in zip(plain[kind], ablated[kind], strict=True)] for kind in plain}
    were = [refuses(text) for text in plain["refused"]]
    ended = [not refuses(text) for text, was in zip(ablated["refused"], were, strict=True) if was]
    shares = {
        "refused before": were, "refusals ended by ablation": ended,
        "refusals that begin with sure after ablation": [text.split()[:1] == ["sure"] for text in ablated["refused"]],
        "refusals ended by random directions": [not refuses(text) for text in random],
        "ordinary answers changed by ablation": changed["ordinary"],
        "harmless answers changed by ablation": changed["harmless"],
        "harmless refused after ablation": [refuses(text) for text in ablated["harmless"]],
        "harmless refused before": [refuses(text) for text in plain["harmless"]],
        "harmless refused with the direction added": [refuses(text) for text in added],
    }  # fmt: skip
    told = {}
    for name, hits in shares.items():
        low, high = map(float, intervals.of_shares(np.asarray(hits, float)))
        told[name] = {"share": float(np.mean(hits)), "low": low, "high": high, "prompts": len(hits)}
    examples = {"refused, ablated": ablated["refused"][:3], "harmless, added": added[:3]}
    return {"shares": told, "examples": examples}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--count", type=int, default=40, help="held-out prompts of each kind (40)")
    parser.add_argument("--strength", type=float, default=0.5, help="of adding, in residual norms (0.5)")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3], help="to which it is added (1 2 3)")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name} beside this file")
    args = parser.parse_args(argv)
    bundle = dg.load(args.model)
    found = chosen_directions(bundle)
    print(found.table())
    told = measured(bundle, found, args.count, args.strength, args.layers)
    chosen = [found.places[k] for k in found.chosen]
    told |= {"model": args.model, "removed": chosen, "added": {"strength": args.strength, "layers": args.layers}}
    for name, share in told["shares"].items():
        print("{:45} {share:.3f}  ({low:.3f} to {high:.3f}, {prompts} prompts)".format(name, **share))
    if args.save:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(told, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
