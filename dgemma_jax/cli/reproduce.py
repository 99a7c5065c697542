"""`dgemma reproduce`: the tables and figures of the two papers, the commands that make them, and what came out."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any


def add(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "reproduce",
        help="values of the two papers beside ours",
        description="List each table and figure of a paper with its command, the paper's value, ours where it has "
        "been made, and the tolerance. Opaque serial depth needs no weights and is computed at once.",
    )
    command.add_argument("paper", metavar="PAPER", help="2606.20560 or 2606.14620")
    command.add_argument("--results", type=Path, metavar="DIR", help="where the listed commands wrote their results")
    command.add_argument("--no-compute", action="store_true", help="only list: compute nothing")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run)
    return command


def run(args: argparse.Namespace) -> None:
    import interp

    found = interp.reproduce(args.paper, args.results, compute=not args.no_compute)
    print(json.dumps(dataclasses.asdict(found), ensure_ascii=False) if args.json else found)
