"""`dgemma bench`: a benchmark of `dgemma_jax.bench`."""

from __future__ import annotations

import argparse
from typing import Any

NAMES = ("peer",)


def add(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser("bench", help="run a benchmark", description="Run a benchmark and print its table.")
    command.add_argument("name", choices=NAMES, help="peer: a step and a generation against transformers")
    command.add_argument("options", nargs=argparse.REMAINDER, help="options of the benchmark; --help lists them")
    command.set_defaults(run=run)
    return command


def run(args: argparse.Namespace) -> None:
    import importlib

    importlib.import_module(f"dgemma_jax.bench.{args.name}").main(args.options)
