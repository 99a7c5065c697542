"""`dgemma harden`: finetune against the attacks that an audit found, and audit again."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dgemma_jax.cli import audit, common


def add(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "harden",
        help="finetune against the attacks of an audit",
        description="Teach a model to refuse what got around its refusals in an audit, keep its other answers, write "
        "the new checkpoint, audit it, and print a table of before and after.",
    )
    command.add_argument("audit", type=Path, metavar="DIR", help="that `dgemma audit` wrote")
    common.add_generation(command, tokens=None)
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the checkpoint, audits in it")
    command.add_argument(
        "--test", type=Path, metavar="FILE", help="JSONL of held-out prompts to compare on; by default those trained on"
    )
    audit.add_rule(command)
    command.add_argument("--train-steps", type=int, default=150, metavar="N", help="optimiser steps (150)")
    command.add_argument("--rows", type=int, default=32, metavar="N", help="examples a step (32)")
    command.add_argument("--rate", type=float, default=3e-4, help="largest learning rate (0.0003)")
    command.add_argument("--rank", type=int, metavar="R", help="LoRA of this rank; by default all weights are trained")
    command.set_defaults(run=run)
    return command


def run(args: argparse.Namespace) -> None:
    import dgemma_jax as dg
    import interp
    from interp.safety.findings import in_words
    from interp.safety.hardening import comparable, compared, prompts_of

    bundle, before = common.load(args), interp.AuditReport.load(args.audit)
    attacks, ordinary = interp.training_pairs(before)
    print(f"{len(attacks)} attacks, {len(ordinary)} prompts that are to stay", file=sys.stderr)
    hardened = interp.harden(
        bundle, attacks, ordinary, steps=args.train_steps, rows=args.rows, rate=args.rate, rank=args.rank,
        seed=args.seed,
    )  # fmt: skip
    dg.save(hardened, args.out)
    options = dict(
        rule=_rule(args, before), parts=before.data["manifest"]["parts"], seed=args.seed,
        sampler=common.sampler(args, bundle), max_new_tokens=args.max_new_tokens,
    )  # fmt: skip
    asked = prompts_of(before) if args.test is None else args.test
    after = interp.audit(hardened, asked, args.out / "audit-after", **options)
    if args.test is not None or not comparable(before, after):
        before = interp.audit(bundle, asked, args.out / "audit-before", **options)
    lines = compared(before, after)
    for title, old, new in lines:
        print(f"{title:40}  {in_words(old):>28}  ->  {in_words(new)}")
    table = [{"title": title, "before": old, "after": new} for title, old, new in lines]
    (args.out / "hardening.json").write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    print(f"written  {args.out}, audited in {args.out / 'audit-after'}", file=sys.stderr)


def _rule(args: argparse.Namespace, before: Any) -> Any:
    """What the options state, or else the rule of the audit."""
    from interp.safety.verdicts import Rule

    told = before.data["manifest"].get("rule")
    return audit.rule_of(args) if args.refuses or args.complies or told is None else Rule.of_data(told)
