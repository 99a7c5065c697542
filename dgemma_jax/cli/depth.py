"""`dgemma depth`: how long a model can think between two points that a person could read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dgemma_jax.cli import common, info


def add(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "depth",
        help="opaque serial depth of a model's programs",
        description="Trace a model without its weights and print the longest path of operations between points that "
        "can be read: of one causal pass, and of blocks of denoising steps.",
    )
    command.add_argument("model", nargs="?", default="nano", help="name, directory or released hub id (nano)")
    command.add_argument("--context", type=int, metavar="N", help="tokens before the canvas; by default all it holds")
    command.add_argument(
        "--steps", type=common.listed(int), default=[1, 48], metavar="T,..", help="denoising steps (1,48)"
    )
    command.add_argument(
        "--cuts", type=common.listed(str), default=["cache"], metavar="C,..",
        help="what can be read: canvas, S, cache, or globs of sites (cache)",
    )  # fmt: skip
    command.add_argument(
        "--experts", default="sorted", help="sorted, as published; or dense, scan, blocks, auto: our own (sorted)"
    )
    command.add_argument("--sampler", choices=("default", "google", "gentle"), default="default", help="(default)")
    command.add_argument("--costs", choices=("circuit", "public"), default="circuit", help="table of costs (circuit)")
    command.add_argument("--canvases", type=int, default=1, metavar="N", help="denoised together in a step (1)")
    command.add_argument("--path", action="store_true", help="show the longest path by site")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--out", type=Path, metavar="FILE", help="write all depths and paths as JSON")
    command.set_defaults(run=run)
    return command


def run(args: argparse.Namespace) -> None:
    import interp
    from dgemma_jax.config import SamplerConfig
    from interp.depth.costs import TABLES

    samplers = {"default": SamplerConfig, "google": SamplerConfig.google, "gentle": SamplerConfig.gentle}
    found = interp.model_depth(
        info.config_of(args.model), context=args.context, steps=args.steps, cuts=args.cuts,
        sampler=samplers[args.sampler](), experts=args.experts, costs=TABLES[args.costs],
        canvases=args.canvases,
    )  # fmt: skip
    print(json.dumps(found.rows()) if args.json else found)
    if args.path:
        for program in (found.causal, *found.steps.values()):
            print(f"\n{program}")
    if args.out is not None:
        print(f"written  {found.save(args.out)}")
