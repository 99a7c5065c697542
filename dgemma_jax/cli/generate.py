"""`dgemma generate`: the answer to a prompt, if wanted as it forms."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from dgemma_jax.cli import common

if TYPE_CHECKING:
    from dgemma_jax.diffusion.generate import Generation


def add(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser("generate", help="answer a prompt", description="Answer a prompt on stdout.")
    command.add_argument("prompt", help="one user turn; - reads it from stdin")
    common.add_generation(command)
    common.add_devices(command)
    command.add_argument("--exported", metavar="DIR", help="run the programs that `dgemma export` wrote there")
    command.add_argument("--watch", action="store_true", help="show the draft after every denoising step")
    command.add_argument("--json", action="store_true", help="print a JSON object instead of the text")
    command.set_defaults(run=run)
    return command


def run(args: argparse.Namespace) -> None:
    common.start_hosts(args)
    bundle = common.load(args)
    from dgemma_jax.cli.watch import Watch

    if args.exported:
        from dgemma_jax.exported import load_exported

        exported = load_exported(args.exported)
        run_it = exported.generate
        sampler = None if args.steps is None else exported.sampler.replace(max_denoising_steps=args.steps)
    else:
        from dgemma_jax.diffusion.generate import generate as run_it

        sampler = common.sampler(args, bundle)
    prompt = sys.stdin.read().strip() if args.prompt == "-" else args.prompt
    watch = Watch(bundle) if args.watch else None
    began = time.perf_counter()
    with watch or contextlib.nullcontext():
        out = run_it(
            bundle, prompt, seed=args.seed, sampler=sampler, max_new_tokens=args.max_new_tokens, callback=watch
        )
    seconds = time.perf_counter() - began
    if not common.speaks():
        return
    print(json.dumps(as_json(out)) if args.json else out.texts[0])
    print(summary(out, seconds), file=sys.stderr)


def summary(out: Generation, seconds: float) -> str:
    """One line about a generation of one row."""
    reason = {"eos": "ended by itself", "max_new_tokens": "stopped at --max-new-tokens"}[out.stop_reason[0]]
    return (
        f"{out.num_steps[0]} denoising steps, {out.tokens_per_forward[0]:.2f} tokens a step, {reason}, "
        f"{seconds:.1f} s with compiling"
    )


def as_json(out: Generation) -> dict[str, Any]:
    """A generation of one row as plain values."""
    return {
        "text": out.texts[0],
        "tokens": out.tokens[0].tolist(),
        "prompt_tokens": out.prompt_tokens[0],
        "num_steps": int(out.num_steps[0]),
        "stop_reason": out.stop_reason[0],
        "tokens_per_forward": float(out.tokens_per_forward[0]),
        "seed": out.seeds[0],
    }
