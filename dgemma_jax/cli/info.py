"""`dgemma info`: what a model is made of and what it needs, without loading weights."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma_jax.cli import common

if TYPE_CHECKING:
    from dgemma_jax.config import ModelConfig


def add(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "info",
        help="sizes, memory and sites of a model",
        description="Describe a model without loading weights: a name, or a directory with a config.json.",
    )
    command.add_argument("model", nargs="?", default="nano", help="name, directory or released hub id (nano)")
    shown = command.add_mutually_exclusive_group()
    shown.add_argument("--tensors", action="store_true", help="print only a JSON object: checkpoint tensor to shape")
    shown.add_argument("--sites", action="store_true", help="list the named places that interp can read and edit")
    command.add_argument(
        "--mesh", type=common.mesh, metavar="AXIS=N,..", help="what each device of such a mesh needs (data=2,expert=4)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run)
    return command


def run(args: argparse.Namespace) -> None:
    config = config_of(args.model)
    if args.tensors:
        print(json.dumps(tensors(config)))
    elif args.sites:
        import interp
        from dgemma_jax.nn.transformer import abstract

        listed = interp.sites(abstract(config))
        print(json.dumps([dataclasses.asdict(site) for site in listed]) if args.json else listed)
    else:
        facts = describe(args.model, config, args.mesh)
        print(json.dumps(facts) if args.json else "\n".join(lines(facts)))


def config_of(source: str) -> ModelConfig:
    """The configuration of an embedded model, of the release (built in) or of a directory."""
    from dgemma_jax.config import ModelConfig
    from dgemma_jax.weights import orbax, registry, settings

    directory = registry.embedded(source) or Path(source).expanduser()
    if directory.is_dir():
        return (orbax if orbax.root(directory) else settings).read_config(directory)
    if source in registry.RELEASES:
        return ModelConfig()
    raise ValueError(f"{source!r} is no directory and none of {', '.join(registry.names())}")


def tensors(config: ModelConfig) -> dict[str, list[int]]:
    """Name and stored shape of every checkpoint tensor that a model of this configuration reads."""
    from dgemma_jax.nn.transformer import abstract
    from dgemma_jax.weights import hf_keys, tree

    found = {}
    for path, leaf in tree.leaves(abstract(config)).items():
        key, layout = hf_keys.key_of(path)
        found[key] = list(layout.stored_shape(leaf.shape))
    return found


def describe(name: str, config: ModelConfig, mesh: dict[str, int] | None = None) -> dict[str, Any]:
    """Everything that `dgemma info` says, as plain values; bytes are of one row."""
    from dgemma_jax import memory
    from dgemma_jax.weights import registry

    fields = dataclasses.asdict(config)
    fields.pop("vision")
    contexts = {k: n for k, n in memory.CONTEXTS.items() if n <= config.max_position_embeddings}
    contexts = contexts or {str(config.max_position_embeddings): config.max_position_embeddings}
    smallest = min(contexts.values())
    return {
        "model": name,
        "config": fields,
        "vision": config.vision is not None or name in registry.RELEASES,
        "parameters": {
            "total": config.num_parameters,
            "active": memory.active_parameters(config),
            **memory.parameters(config),
        },
        "bytes": {
            "weights": {kind: memory.weight_bytes(config, kind) for kind in ("float32", "bfloat16", *common.FORMS)},
            "cache_per_token": memory.cache_bytes_per_token(config),
            "cache": {name: memory.cache_bytes(config, tokens) for name, tokens in contexts.items()},
            "logits": memory.logits_bytes(config),
        },
        "devices": {
            "tokens": smallest,
            **{dtype: memory.devices_needed(config, dtype, smallest) for dtype in ("bfloat16", *common.FORMS)},
        },
        "mesh": None if mesh is None else {"axes": mesh, "bytes": on_each_device(config, mesh, contexts)},
    }


def on_each_device(config: ModelConfig, axes: dict[str, int], contexts: dict[str, int]) -> dict[str, dict[str, int]]:
    """Bytes on the fullest device, by format: of the weights, and in all with one row of a context on each of `data`.

    Raises:
        ValueError: axes that have no rule or do not divide the model.
    """
    import jax

    from dgemma_jax import memory
    from dgemma_jax.weights import sharding

    sharding.check_sizes(axes, config)
    mesh, rows = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes)), axes.get("data", 1)

    def of(kind: str) -> dict[str, int]:
        each = {said: memory.needed(config, kind, rows, tokens, mesh).total for said, tokens in contexts.items()}
        return {"weights": memory.needed(config, kind, mesh=mesh).weights, **each}

    return {kind: of(kind) for kind in ("bfloat16", *common.FORMS)}


def lines(facts: dict[str, Any]) -> Iterable[str]:
    """The facts as text."""
    from dgemma_jax.memory import amount

    config, size = facts["config"], facts["bytes"]
    counts = dict(facts["parameters"])
    total, active = counts.pop("total"), counts.pop("active")
    kinds = config["layer_types"]
    sliding = sum(kind == "sliding_attention" for kind in kinds)
    yield f"{facts['model']}: {total:,} parameters, {active:,} active a token"
    window, width, hidden = (f"{config[key]:,}" for key in ("sliding_window", "embed_dim", "hidden_dim"))
    yield f"layers     {len(kinds)}: {sliding} sliding (window {window}), {len(kinds) - sliding} full"
    yield f"widths     residual {width}, dense MLP {hidden}, expert {config['expert_dim']:,}"
    yield f"experts    {config['experts_per_token']} of {config['num_experts']}"
    yield f"canvas     {config['canvas_length']} tokens of a vocabulary of {config['vocab_size']:,}"
    yield f"context    {config['max_position_embeddings']:,} tokens"
    yield f"images     {'in the checkpoint, not used yet' if facts['vision'] else 'no'}"
    yield ""
    yield from table([("parameters", "", ""), *((part, f"{n:,}", f"{n / total:.1%}") for part, n in counts.items())])
    yield ""
    yield from table(
        [
            ("memory", "", ""),
            *((f"weights {dtype}", amount(n), "") for dtype, n in size["weights"].items()),
            ("cache, a token", amount(size["cache_per_token"]), "past the window; bfloat16, one row"),
            *((f"cache, {name} tokens", amount(n), "") for name, n in size["cache"].items()),
            ("logits", amount(size["logits"]), "one float32 [C, V]; a step holds up to three"),
        ]
    )
    yield ""
    if facts["mesh"] is not None:
        axes, sizes = facts["mesh"]["axes"], facts["mesh"]["bytes"]
        named = ", ".join(f"{axis}={n}" for axis, n in axes.items())
        yield f"on each device of {named}, with one row on it (calculated)"
        heads = ("weights", *(f"{said} tokens" for said in next(iter(sizes.values())) if said != "weights"))
        yield from table([("", *heads), *((kind, *map(amount, own.values())) for kind, own in sizes.items())])
        yield ""
    devices = dict(facts["devices"])
    yield f"devices that hold one row of {devices.pop('tokens'):,} tokens (calculated)"
    names = devices["bfloat16"]
    yield from table([("", *devices), *((name, *(str(devices[dtype][name]) for dtype in devices)) for name in names)])


def table(rows: list[tuple[str, ...]]) -> Iterable[str]:
    """Aligned columns: the second is flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, second, *rest in rows:
        others = (cell.ljust(width) for cell, width in zip(rest, widths[2:], strict=True))
        yield "  ".join([first.ljust(widths[0]), second.rjust(widths[1]), *others]).rstrip()
