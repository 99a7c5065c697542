"""`dgemma study`: statistics of how answers come about, over thousands of prompts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dgemma_jax.cli import common


def add(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "study",
        help="statistics of many answers: order, flow, lengths, smearing, ...",
        description="Answer every prompt and keep statistics of how each answer came about: one row a generation, a "
        "summary table, figures and a manifest. Run it again to go on after an interruption.",
    )
    common.add_generation(command)
    command.add_argument("name", nargs="?", help="statistics with commas between, or all; --list shows them")
    command.add_argument("--list", action="store_true", help="show the statistics and stop")
    command.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help='JSONL, {"prompt": ..., "id": ..., "answer": ..., "group": ...} a line, all but the prompt optional; by '
        "default the tasks of the embedded models",
    )  # fmt: skip
    command.add_argument(
        "--count", type=int, default=40, metavar="N", help="prompts of each task of the embedded models (40)"
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="where the study is written")
    command.add_argument("--seeds", type=int, default=1, metavar="N", help="generations of each prompt (1)")
    command.add_argument("--batch", type=int, metavar="N", help="generations at a time; by default what fits")
    command.add_argument("--grade", choices=("exact", "contains"), default="exact", help="how answers are met (exact)")
    command.add_argument(
        "--monitor", type=common.pair, action="append", default=[], metavar="NAME=REGEX",
        help="for monitorability, several times; by default a probe on the words",
    )  # fmt: skip
    command.add_argument("--no-early-stop", action="store_true", help="take all steps of every block")
    common.add_devices(command)
    command.add_argument("--hosts", type=int, metavar="N", help="share the prompts among so many hosts, with one --out")
    command.add_argument("--host", type=int, metavar="I", help="which of them this is, from 0 on")
    command.add_argument("--parquet", action="store_true", help="write the rows as Parquet too; needs pyarrow")
    command.set_defaults(run=run)
    return command


def run(args: argparse.Namespace) -> None:
    import interp

    if getattr(interp, "__dist__", None) != "dgemma-jax":
        raise ValueError(f"{interp.__file__} is another package named interp and hides ours; run from elsewhere")
    from interp.studies.statistics_table import STATISTICS, chosen

    if args.list:
        width = max(map(len, STATISTICS))
        print("\n".join(f"{name:{width}}  {one.about}" for name, one in STATISTICS.items()))
        return
    if args.name is None or args.out is None:
        raise ValueError("needed are a NAME (see --list) and --out DIR")
    chosen(args.name)
    common.start_hosts(args)
    prompts = None if args.prompts is None else interp.StudyPrompts.of(args.prompts)
    bundle = common.load(args)
    if prompts is None:
        prompts = interp.StudyPrompts.of(interp.Questions.for_organism(bundle, args.count))
    sampler = common.sampler(args, bundle)
    found = interp.study(
        args.name, bundle, prompts, args.out, seeds=args.seeds, seed=args.seed,
        sampler=sampler.replace(early_stop=False) if args.no_early_stop else sampler,
        max_new_tokens=args.max_new_tokens, batch=args.batch, grade=args.grade, monitors=dict(args.monitor),
        hosts=args.hosts, host=args.host,
    )  # fmt: skip
    for said in found.manifest["prompts"]["broken"]:
        print(f"left out  {said}", file=sys.stderr)
    if found.missing:
        print(f"{found}\nthe last host writes the study; for one that was lost, run its share again")
        return
    print(found, found.table(), sep="\n\n")
    if args.parquet:
        found.to_parquet(args.out / "generations.parquet")
    print(f"\nwritten  {args.out}")
