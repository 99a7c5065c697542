"""`dgemma bottleneck`: accuracy and loop rate against what one step may hand to the next."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from dgemma_jax.cli import common


def add(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "bottleneck",
        help="accuracy and loop rate through token bottlenecks",
        description="Answer prompts through token bottlenecks of several widths, under several samplers, and grade "
        "the answers. Prints a table; writes it, a plot and all answers. Run it again to go on or to add rungs.",
    )
    common.add_generation(command)
    command.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='JSONL, {"prompt": ..., "answer": ..., "group": ...} a line; by default the tasks of the embedded models',
    )
    command.add_argument(
        "--count", type=int, default=40, metavar="N", help="prompts of each task of the embedded models (40)"
    )
    command.add_argument("--k", type=common.listed(int), metavar="K,..", help="tokens kept (0,1,2,4,8,16,32,64)")
    command.add_argument("--p", type=common.listed(float), metavar="P,..", help="least probabilities (0.1 to 0.001)")
    command.add_argument(
        "--samplers", type=common.listed(str), default=["default", "gentle"], metavar="S,..",
        help="default, gentle, matched: gentle in as many steps as default (default,gentle)",
    )  # fmt: skip
    command.add_argument("--grade", choices=("exact", "contains"), default="exact", help="how answers are met (exact)")
    command.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each prompt (1)")
    command.add_argument("--batch", type=int, metavar="N", help="answers at a time; by default what fits")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results are written")
    command.set_defaults(run=run)
    return command


def run(args: argparse.Namespace) -> None:
    import interp

    if getattr(interp, "__dist__", None) != "dgemma-jax":
        raise ValueError(f"{interp.__file__} is another package named interp and hides ours; run from elsewhere")
    from interp.bottleneck_arms import PS
    from interp.questions import GRADERS

    questions = None if args.prompts is None else interp.Questions.read(args.prompts)
    bundle = common.load(args)
    if questions is None:
        questions = interp.Questions.for_organism(bundle, args.count)
    grade = GRADERS[args.grade]
    bundle = bundle.with_sampler(common.sampler(args, bundle))
    study = interp.bottleneck_study(
        bundle, questions, lambda number, text: grade(text, questions.answers[number]),
        ks=args.k, ps=PS if args.p is None else args.p,
        samplers=interp.samplers_of(bundle, args.samplers), seed=args.seed, repeats=args.seeds, batch=args.batch,
        max_new_tokens=args.max_new_tokens, resume=args.out / "arms",
    )  # fmt: skip
    print(study.table())
    for path in write(study, args.out):
        print(f"written  {path}")


def write(study: Any, directory: Path) -> list[Path]:
    """Table (CSV and JSON, all prompts and each group), plot and answers; says where."""
    names = [None, *dict.fromkeys(study.groups)] if len(set(study.groups)) > 1 else [None]
    rows = [row for name in names for row in study.rows(name)]
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"bottleneck.{kind}" for kind in ("csv", "json", "png")]
    with paths[0].open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    paths[1].write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    study.plot().savefig(paths[2], dpi=150)
    return [*paths, study.save(directory / "bottleneck.npz")]
