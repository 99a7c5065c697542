"""`dgemma bench`: how fast it is here, against the machine's ceilings, against autoregression and `transformers`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

from dgemma_jax.cli import common

SIZES = ("tiny", "medium", "release")  # of `bench.work`, which would import JAX


def add(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "bench", help="measure speed",
        description="Measure this machine's ceilings, then parts of a step, steps, prefill and generation, and print "
        "the times beside what the ceilings allow. Results are kept item by item; the same file goes on.",
    )  # fmt: skip
    command.add_argument("--sizes", choices=SIZES, help="of model and work: release on an accelerator, else medium")
    command.add_argument("--model", metavar="M", help="a checkpoint or name; by default random weights")
    command.add_argument("--only", type=common.listed(str), default=[], metavar="A,B", help="items with such names")
    command.add_argument("--seconds", type=float, metavar="S", help="end after this time; what is timed is kept")
    command.add_argument("--runs", type=int, default=7, metavar="N", help="timed calls of each, at most (7)")
    command.add_argument("--out", type=Path, default=Path("bench.jsonl"), metavar="FILE", help="results (bench.jsonl)")
    command.add_argument("--show", type=Path, metavar="FILE", help="only print the tables of these results")
    command.add_argument("--stage", help=argparse.SUPPRESS)  # in the process that times
    command.set_defaults(run=run)
    return command


def run(args: argparse.Namespace) -> None:
    from dgemma_jax.bench import run as bench

    if args.show:
        show(args.show)
        return
    if args.runs < 2 or (args.seconds is not None and args.seconds <= 0):
        raise ValueError(f"--runs must be at least 2 and --seconds positive, got {args.runs} and {args.seconds}")
    settings = bench.Settings(
        out=args.out, size=args.sizes, model=args.model, only=tuple(args.only), runs=args.runs,
        deadline=None if args.seconds is None else time.time() + args.seconds,
    )  # fmt: skip
    if args.stage:
        bench.measure(settings, args.stage, capture)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the timing process is ended on the way out
    command = [sys.executable, "-m", "dgemma_jax", "bench", "--out", str(args.out), "--runs", str(args.runs)]
    options = {"--sizes": args.sizes, "--model": args.model, "--only": ",".join(args.only)}
    command += [part for name, value in options.items() if value for part in (name, value)]
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=_console(sys.stderr)) as bar:
        task = bar.add_task("starting", total=None)
        bench.run(
            settings, command,
            lambda done, total, item: bar.update(task, completed=done, total=total, description=item),
        )  # fmt: skip
    show(args.out)


def capture(*args: Any, **options: Any) -> Any:
    """`interp.capture`, which the benchmark itself may not import."""
    import interp

    return interp.capture(*args, **options)


def show(path: Path) -> None:
    """Print the tables of a file of results."""
    from dgemma_jax.bench import lines, table

    found = lines.read(path)
    if found.header is None:
        raise ValueError(f"{path} holds no results of dgemma bench")
    console = _console(sys.stdout)
    console.print(table.title(found), highlight=False)
    console.print(table.results(found))
    console.print(table.scaling(found))
    for sentence in table.ratios(found):
        console.print(sentence, highlight=False)
    if rates := table.ceilings(found):
        console.print(f"ceilings: {rates[0] / 1e9:.4g} GB/s copied, {rates[1] / 1e12:.4g} TFLOP/s", highlight=False)


def _console(file: Any) -> Any:
    from rich.console import Console

    return Console(file=file) if file.isatty() else Console(file=file, width=160)
