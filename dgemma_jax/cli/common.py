"""What several commands share: the options of a generation, and the cache of compiled programs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgemma_jax.bundle import Bundle
    from dgemma_jax.config import SamplerConfig

FORMS = ("int8", "int4", "fp8")  # of `nn.packed`, which would import JAX


def add_generation(command: argparse.ArgumentParser, tokens: int | None = 256) -> None:
    """The options that say what generates, and how; `tokens`: by default at most, None one canvas."""
    command.add_argument(
        "--model", default="nano", metavar="M", help="an embedded model, a checkpoint directory or a hub id (nano)"
    )
    command.add_argument("--dtype", help="bfloat16, float32 or float16; by default as stored")
    command.add_argument("--quantize", choices=FORMS, help="pack the large weights as they are read")
    command.add_argument("--seed", type=int, default=0, help="equal seeds give equal answers (0)")
    most = f"at most this many tokens ({'one canvas' if tokens is None else tokens})"
    command.add_argument("--max-new-tokens", type=int, default=tokens, metavar="N", help=most)
    command.add_argument("--steps", type=int, metavar="N", help="at most this many denoising steps a block")


def add_devices(command: argparse.ArgumentParser) -> None:
    """The options that say on which devices and hosts a model lies."""
    command.add_argument(
        "--mesh", type=mesh, metavar="AXIS=N,..",
        help="lay the model over devices: rows over data, experts over expert, all else over tensor (data=2,expert=4)",
    )  # fmt: skip
    command.add_argument(
        "--distributed", action="store_true", help="one of many processes, as Slurm, GKE or a TPU pod tells it"
    )
    command.add_argument("--coordinator", metavar="HOST:PORT", help="the same, told here: address of process 0")
    command.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    command.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0 on")


def pair(text: str) -> tuple[str, str]:
    """Reads "name=value"."""
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"needed is NAME=VALUE, got {text!r}")
    return name, value


def mesh(text: str) -> dict[str, int]:
    """Reads "data=2,expert=4"."""
    try:
        return {name: int(size) for name, size in map(pair, text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"needed is AXIS=N with commas between, got {text!r}") from error


def start_hosts(args: argparse.Namespace) -> None:
    """Join the other processes, if the options say that there are any; before a device is asked for."""
    told = (args.coordinator, args.processes, args.process)
    if args.distributed or any(x is not None for x in told):
        from dgemma_jax import hosts

        hosts.start(*told)


def speaks() -> bool:
    """Whether this is the process that prints, where several run one generation."""
    import jax

    return jax.process_index() == 0


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Reads "1,2,4"; an empty text is an empty list."""

    def read(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",") if part]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"needed are values with commas between, got {text!r}") from error

    return read


def load(args: argparse.Namespace) -> Bundle:
    """The model of the options."""
    from dgemma_jax.bundle import load

    keep_compiled_programs()
    laid = None
    if getattr(args, "mesh", None) is not None:
        from dgemma_jax import hosts

        laid = hosts.mesh(args.mesh)
    return load(args.model, dtype=args.dtype, quantize=args.quantize, mesh=laid)


def sampler(args: argparse.Namespace, bundle: Bundle) -> SamplerConfig:
    """The model's own sampler with what the options change."""
    return bundle.sampler if args.steps is None else bundle.sampler.replace(max_denoising_steps=args.steps)


def keep_compiled_programs() -> None:
    """Let JAX keep compiled programs on disk, so that the second run starts at once."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # the user's own choice is left alone
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def forget_compiled_programs() -> None:
    """Neither read nor keep compiled programs, in this process and in those it starts."""
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # JAX's own switch, read when it is imported
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_enable_compilation_cache", False)


def cache_directory() -> Path:
    """Where this platform keeps what may be deleted."""
    if path := os.environ.get("XDG_CACHE_HOME"):
        base = Path(path)
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path.home() / ".cache"
    return base / "dgemma-jax"
