"""`dgemma export`: the programs of a generation, traced ahead for fixed shapes."""

from __future__ import annotations

import argparse
from typing import Any

from dgemma_jax.cli import common


def add(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "export", help="trace the programs of a generation ahead",
        description="Write the programs of `dgemma generate` for fixed shapes; `dgemma generate --exported` runs them.",
    )  # fmt: skip
    command.add_argument("directory", help="where they go; about 1 MB, without weights")
    command.add_argument("--model", default="nano", metavar="M", help="as of `dgemma generate` (nano)")
    command.add_argument("--dtype", help="as of `dgemma generate`")
    command.add_argument("--quantize", choices=common.FORMS, help="as of `dgemma generate`")
    command.add_argument("--batch", type=int, default=1, metavar="N", help="prompts a call (1)")
    command.add_argument("--context", type=int, metavar="N", help="tokens of prompt and answer (at most 4096)")
    command.add_argument("--steps", type=int, metavar="N", help="at most this many denoising steps a block")
    command.add_argument(
        "--platforms", type=common.listed(str), default=[], metavar="P,P", help="cpu, cuda, tpu (the one here)"
    )
    command.set_defaults(run=run)
    return command


def run(args: argparse.Namespace) -> None:
    from dgemma_jax.weights import registry

    bundle = weightless(args) if args.model in registry.RELEASES else common.load(args)
    from dgemma_jax.exported import export

    context = min(4096, bundle.config.max_position_embeddings) if args.context is None else args.context
    made = export(
        bundle, args.directory, batch=args.batch, context=context, platforms=args.platforms,
        sampler=common.sampler(args, bundle),
    )  # fmt: skip
    print(f"{args.directory}: batch {args.batch}, context {context}, {', '.join(made.manifest['platforms'])}")


def weightless(args: argparse.Namespace) -> Any:
    """The released model as shapes: exporting reads no weights, so none are downloaded."""
    from dgemma_jax.bundle import Bundle, float_dtype
    from dgemma_jax.config import ModelConfig
    from dgemma_jax.nn import quantized, transformer

    model = transformer.abstract(ModelConfig(), float_dtype(args.dtype or "bfloat16"))
    return Bundle(model.config, quantized.quantized(model, args.quantize) if args.quantize else model)
