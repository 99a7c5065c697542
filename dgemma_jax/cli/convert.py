"""`dgemma convert`: a checkpoint in another format, dtype or number of bits."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dgemma_jax.cli import common


def add(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "convert",
        help="write a checkpoint in another format or dtype",
        description="Write a checkpoint in another format or dtype.",
    )
    command.add_argument("source", help="an embedded model, a checkpoint directory or a hub id")
    command.add_argument("dest", help="the directory to write")
    command.add_argument("--format", choices=("hf", "orbax"), default="hf", help="layout of the new one (hf)")
    command.add_argument("--dtype", help="bfloat16, float32 or float16; by default as stored")
    command.add_argument("--quantize", choices=common.FORMS, help="weights in few bits (orbax only)")
    command.set_defaults(run=run)
    return command


def run(args: argparse.Namespace) -> None:
    from dgemma_jax.bundle import convert

    convert(args.source, args.dest, format=args.format, dtype=args.dtype, quantize=args.quantize)
    print(f"wrote {args.dest}", file=sys.stderr)
