"""`dgemma faithfulness`: whether maps of saliency can be believed, all methods on the same cases."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dgemma_jax.cli import common


def add(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "faithfulness",
        help="test methods of saliency against the model",
        description="Make maps of what in a prompt drove a prediction, by all methods, and test them: insertion and "
        "deletion of what they name, exact patches, shuffled weights, other targets, planted causes. Prints a table.",
    )
    command.add_argument("model", nargs="?", default="nano", help="name, directory or hub id (nano)")
    command.add_argument("--dtype", help="bfloat16, float32 or float16; by default as stored")
    command.add_argument("--quantize", choices=common.FORMS, help="pack the large weights as they are read")
    command.add_argument("--cases", type=int, default=20, metavar="N", help="of each task of the small models (20)")
    command.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='JSONL, {"prompt": ..., "target": words of the answer} a line; needed for models without planted tasks',
    )
    command.add_argument("--methods", type=common.listed(str), metavar="M,..", help="by default all that rank")
    command.add_argument("--budget", type=int, default=256, metavar="N", help="evaluations of a map (256)")
    command.add_argument("--sanity", type=int, default=2, metavar="N", help="cases put to shuffled weights as well (2)")
    command.add_argument("--seed", type=int, default=0, help="(0)")
    command.add_argument("--keep", type=Path, metavar="DIR", help="keeps finished cases: the same call goes on")
    command.add_argument("--out", type=Path, metavar="FILE", help="write all numbers (.npz) and the curves (.png)")
    command.set_defaults(run=run)
    return command


def run(args: argparse.Namespace) -> None:
    import interp

    cases: Any = args.cases
    if args.prompts is not None:
        from interp.json_lines import json_objects

        cases = [(line["prompt"], line["target"]) for _, line in json_objects(args.prompts, "prompt", "target")]
    found = interp.faithfulness(
        common.load(args), cases, args.methods, budget=args.budget, sanity_cases=args.sanity, seed=args.seed,
        keep=args.keep,
    )
    print(found)
    if args.out is not None:
        path = found.save(args.out)
        found.plot().savefig(Path(path).with_suffix(".png"), dpi=150)
        print(f"written  {path}")
