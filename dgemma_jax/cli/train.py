"""`dgemma train`: make an embedded organism anew."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from dgemma_jax.cli import common


def add(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "train", help="make an embedded organism anew", description="Train an embedded organism from seeded data."
    )
    command.add_argument("name", help="nano or nano-backdoor")
    command.add_argument("--out", type=Path, help="directory of the result (default: the name)")
    command.add_argument("--base", help="organism to start from, for those that start from one")
    command.add_argument("--steps", type=int, help="optimiser steps, other than the recipe's")
    command.add_argument("--seed", type=int, help="seed of weights, data and noise, other than the recipe's")
    command.add_argument("--fresh", action="store_true", help="do not go on from an interrupted run")
    command.set_defaults(run=run)
    return command


def run(args: argparse.Namespace) -> None:
    from dgemma_jax.train.recipes import SHARDS

    # Before the first array: data parallel over virtual CPU devices uses the cores better than one device does.
    flag = f"--xla_force_host_platform_device_count={SHARDS}"
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), flag]).strip()

    common.keep_compiled_programs()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dgemma_jax.train import organisms

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task("", total=None)

        def report(step: int, steps: int, parts: dict) -> None:
            said = f"loss {parts['loss']:.3f}, right tokens {parts['accuracy']:.1%}"
            bar.update(task, completed=step, total=steps, description=said)

        out = args.out or Path(args.name)
        _, reached = organisms.make(
            args.name, out, base=args.base, steps=args.steps, seed=args.seed, resume=not args.fresh, report=report
        )
    for name, share in reached.items():
        print(f"{name:10} {share:7.1%} exact")
    print(f"written to {out}")
