"""`dgemma audit`: why a model refuses, what gets around it, and whether something was planted."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dgemma_jax.cli import common


def add(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "audit",
        help="safety audit of a model on a file of prompts",
        description='Audit a model on a JSONL file of {"prompt", "label", "group", "pair", "phrase", "right"} and '
        "write a page, its numbers and a table. The same command goes on where it was cut off.",
    )
    command.add_argument("prompts", type=Path, metavar="FILE", help="JSONL; all fields but prompt may be left out")
    common.add_generation(command, tokens=None)
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the report goes")
    command.add_argument(
        "--against", metavar="M", help="a trusted checkpoint: also compare with it, and search for triggers"
    )
    add_rule(command)
    command.add_argument("--sae", type=Path, metavar="DIR", help="an autoencoder of SAELens: which features are shared")
    command.add_argument("--sae-site", metavar="NAME", help="that it reads; by default what its directory names")
    command.add_argument("--synonyms", type=Path, metavar="FILE", help="JSON, word -> words of the same meaning")
    command.add_argument(
        "--parts", type=common.listed(str), metavar="A,B", help="of words, variants, jailbreaks, detectors (all)"
    )
    command.add_argument("--batch", type=int, default=32, metavar="N", help="prompts at a time (32)")
    command.set_defaults(run=run)
    return command


def add_rule(command: argparse.ArgumentParser) -> None:
    """The options that say what a refusal is."""
    command.add_argument(
        "--refuses",
        action="append",
        metavar="TEXT",
        help="a text that holds this refuses, and refusals open with it; may be given several times",
    )
    command.add_argument("--complies", metavar="REGEX", help="what the whole of a complying answer matches")


def rule_of(args: argparse.Namespace) -> Any:
    """The `interp.safety.verdicts.Rule` that the options state."""
    from interp.safety.verdicts import Rule

    phrases = {} if not args.refuses else {"phrases": tuple(text.lower() for text in args.refuses)}
    return Rule(**phrases, complies=args.complies)


def run(args: argparse.Namespace) -> None:
    import interp
    from dgemma_jax.bundle import load
    from interp.safety.audits import PARTS

    bundle = common.load(args)
    report = interp.audit(
        bundle, args.prompts, args.out, rule=rule_of(args), seed=args.seed, batch=args.batch,
        synonyms=None if args.synonyms is None else json.loads(args.synonyms.read_text("utf-8")),
        reference=None if args.against is None else load(args.against, dtype=args.dtype),
        sampler=common.sampler(args, bundle), max_new_tokens=args.max_new_tokens,
        sae=args.sae, sae_site=args.sae_site, parts=PARTS if args.parts is None else args.parts,
    )  # fmt: skip
    print(report)
    print(f"written  {args.out / 'audit.html'}", file=sys.stderr)
