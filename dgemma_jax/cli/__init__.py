"""The `dgemma` command. One file per subcommand; each has `add(commands)` and imports what it needs when it runs.

Answers and results go to stdout, everything about them to stderr. A mistake of the user is one message and
exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import dgemma_jax
from dgemma_jax.cli import (
    audit,
    bench,
    bottleneck,
    common,
    convert,
    depth,
    explain,
    export,
    faithfulness,
    generate,
    harden,
    info,
    reproduce,
    study,
    train,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = parser().parse_args(argv)
    if args.no_compile_cache:
        common.forget_compiled_programs()
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"dgemma: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dgemma: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="dgemma", description="DiffusionGemma in JAX, with its inside open.")
    top.add_argument("--version", action=_Version)
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (explain, generate, bottleneck, faithfulness, study, depth, audit, harden, reproduce, info,
                   convert, export, train, bench):  # fmt: skip
        command = module.add(commands)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.add_argument("--no-compile-cache", action="store_true", help="compile anew, and keep nothing")
    return top


class _Version(argparse.Action):
    """Prints the version; looked up only then."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"dgemma {dgemma_jax.__version__}")
        parser.exit()
