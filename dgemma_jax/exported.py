"""Compiled ahead: the programs of `generate` for fixed shapes, traced once, kept in a directory, called anywhere.

    programs = export(bundle, "nano-b1", batch=1, context=512, platforms=("cpu", "cuda"))
    load_exported("nano-b1").generate(bundle, prompt)       # the tokens of `generate`, without tracing the model

Kept is StableHLO by `jax.export`, not weights: they are arguments. XLA still compiles it for the machine at hand,
which its persistent cache does once. Three programs: the denoising loop of a block, the causal pass over a chunk of
a prompt, and over a committed block.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import generate as generation
from dgemma_jax.diffusion import loop, noise
from dgemma_jax.diffusion import sampler as sampling
from dgemma_jax.diffusion.trajectory import Record
from dgemma_jax.nn import cache as kv
from dgemma_jax.nn import functional, sites
from dgemma_jax.nn.embedder import SoftEmbed

FORMAT = 1  # of the manifest and of the programs' arguments
MANIFEST = "manifest.json"
PLATFORMS = ("cpu", "cuda", "tpu")
CHUNK = 1024
_IN_PROGRAM = ("max_denoising_steps", "stability_threshold", "early_stop", "stability")  # sampler settings, fixed


def export(
    bundle: Any, directory: str | Path, *, batch: int = 1, context: int = 4096, platforms: Sequence[str] = (),
    sampler: SamplerConfig | None = None, record: Record | None = None, chunk: int = CHUNK,
) -> Exported:  # fmt: skip
    """Trace the programs of `generate` for these shapes and keep them.

    Args:
        bundle: a bundle or a model, unedited; abstract weights do (`nn.transformer.abstract`).
        directory: made if need be; programs in it are replaced.
        batch: rows of every call.
        context: tokens a row of the cache holds: prompt and answer.
        platforms: any of "cpu", "cuda" and "tpu"; by default the one of this process.
        sampler: its number of steps and its stop test are fixed, its temperatures and thresholds are not.
        record: what the trajectory keeps; `Record.fn` cannot be kept in a file.
        chunk: prompt tokens a causal pass.

    Raises:
        ValueError: an edited model, or sizes that make no sense.
    """
    model, default = functional.of(bundle), getattr(bundle, "sampler", None)
    config, record = model.config, Record() if record is None else record
    sampler = sampler or default or SamplerConfig(eos_token_ids=config.eos_token_ids, pad_token_id=config.pad_token_id)
    platforms = tuple(platforms) or (jax_export.default_export_platform(),)
    _check_sizes(config, batch, context, chunk, platforms)
    _check_plain(model)
    if record.fn is not None:
        raise ValueError("record.fn is a Python function, which cannot be exported; leave it out")

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    model = jax.tree.map(shape, model)
    length, chunk = config.canvas_length, min(chunk, context)
    cache = jax.eval_shape(lambda: kv.empty(config, batch, context, model.dtype))
    state = jax.eval_shape(
        lambda: sampling.start(
            noise.row_keys(jnp.zeros(batch)), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool), length, model
        )
    )
    buffers = jax.eval_shape(
        lambda *a: loop.empty_buffers(*a, sampler, None, record=record), model, state, cache
    )
    scalar = jax.ShapeDtypeStruct((), jnp.int32)

    def denoise(model, state, cache, buffers, sampler, index, limit):
        return loop._while(model, state, cache, buffers, sampler, None, index, limit, record=record)

    def causal(model, tokens, valid, cache):
        return functional.prefill(model, tokens, valid, cache).cache  # without `hidden`: XLA drops the last layer's end

    def causal_arguments(size: int) -> tuple:
        tokens = jax.ShapeDtypeStruct((batch, size), jnp.int32)
        return model, tokens, jax.ShapeDtypeStruct((batch, size), bool), cache

    traced = {
        "denoise": (denoise, (model, state, cache, buffers, _settings(sampler), scalar, scalar)),
        "append": (causal, causal_arguments(length)),
        "prefill": (causal, causal_arguments(chunk)),
    }
    programs = {name: _exported(function, arguments, platforms) for name, (function, arguments) in traced.items()}
    manifest = {
        "format": FORMAT, "jax": jax.__version__, "platforms": list(platforms), "batch": batch, "context": context,
        "chunk": chunk, "model": _signature(model), "sampler": dataclasses.asdict(sampler),
        "record": {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name != "fn"},
        "buffers": {name: [list(x.shape), x.dtype.name] for name, x in buffers.items()},
    }  # fmt: skip
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)  # the last to come back: a directory is whole or not there
    for name, program in programs.items():
        (directory / f"{name}.jax").write_bytes(program.serialize())
    partial = directory / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    os.replace(partial, directory / MANIFEST)
    return Exported(manifest=_plain(manifest), programs=programs)


def load_exported(directory: str | Path) -> Exported:
    """Read what `export` wrote.

    Raises:
        ValueError: nothing is there, or it was exported by another version or for other platforms than this one.
    """
    directory = Path(directory)
    try:
        manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{directory} holds no {MANIFEST}; write it with `dgemma export`") from error
    except ValueError as error:
        raise ValueError(f"{directory / MANIFEST} is not JSON: {error}") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{directory} has format {manifest.get('format')!r}, this version reads {FORMAT}; export it again"
        )
    here = jax_export.default_export_platform()
    if here not in manifest["platforms"]:
        raise ValueError(
            f"{directory} was exported for {', '.join(manifest['platforms'])}; this process runs on {here}: export "
            f"it with platforms that include {here!r}"
        )
    programs = {}
    for name in ("denoise", "append", "prefill"):
        file = directory / f"{name}.jax"
        try:
            programs[name] = jax_export.deserialize(bytearray(file.read_bytes()))
        except Exception as error:  # whatever flatbuffers or JAX find wrong with it
            raise ValueError(
                f"{file} cannot be read by jax {jax.__version__} (exported by {manifest['jax']}): "
                f"{type(error).__name__}: {error}; export it again"
            ) from error
    return Exported(manifest=manifest, programs=programs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """Programs for fixed shapes; from `export` or `load_exported`.

    Attributes:
        manifest: what they were made for: platforms, batch, context, chunk, model, sampler, record.
        programs: `jax.export.Exported` by name.
    """

    manifest: dict[str, Any]
    programs: dict[str, jax_export.Exported] = dataclasses.field(repr=False)

    @property
    def sampler(self) -> SamplerConfig:
        settings = self.manifest["sampler"]
        return SamplerConfig(**settings | {"eos_token_ids": tuple(settings["eos_token_ids"])})

    @property
    def record(self) -> Record:
        kept = self.manifest["record"]
        return Record(**kept | {"site_steps": kept["site_steps"] and tuple(kept["site_steps"])})

    def generate(
        self, bundle: Any, prompts: Any, seed: int | Sequence[int] = 0, sampler: SamplerConfig | None = None,
        max_new_tokens: int = 256, *, canvas: Any = None, soft: Any = None,
        callback: Callable[[generation.Draft], None] | None = None, callback_every: int = 1, thinking: bool = False,
    ) -> generation.Generation:  # fmt: skip
        """`dg.generate` by these programs; the sampler is by default the exported one.

        Raises:
            ValueError: a model, a number of prompts, a length or a sampler that the programs were not made for.
        """
        sampler = self.sampler if sampler is None else sampler
        self._check(functional.of(bundle), sampler)
        run = generation.begin(
            bundle, prompts, seed, sampler, max_new_tokens, self.record, canvas, None, soft, thinking, callback_every,
            generation.Programs(self._prefill, self._buffers, self._denoise, self._append),
        )  # fmt: skip
        return generation.run_to_end(run, callback, callback_every)

    def _check(self, model: Any, sampler: SamplerConfig) -> None:
        _check_plain(model)
        for name in _IN_PROGRAM:
            own, given = getattr(self.sampler, name), getattr(sampler, name)
            if own != given:
                raise ValueError(f"the programs were exported for {name}={own!r}, got {given!r}; export them for it")
        wanted, found = self.manifest["model"], _signature(model)
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise ValueError(
                    f"the programs were exported for a model with {name} {wanted.get(name)}, this one has "
                    f"{found.get(name)}; export this model"
                )

    def _prefill(self, model: Any, ids: Sequence[Sequence[int]], num_blocks: int) -> kv.KVCache:
        batch, context, chunk = (self.manifest[name] for name in ("batch", "context", "chunk"))
        if len(ids) != batch:
            raise ValueError(f"the programs were exported for {batch} prompts a call, got {len(ids)}")
        longest, length = max(map(len, ids)), model.config.canvas_length
        if longest + num_blocks * length > context:
            raise ValueError(
                f"a prompt of {longest} tokens and {num_blocks} blocks of {length} exceed the exported context of "
                f"{context}: shorten the prompt, lower max_new_tokens, or export a longer context"
            )
        cache = kv.empty(model.config, batch, context, model.dtype)
        begin = 0
        while begin < longest:
            size, name = (chunk, "prefill") if longest - begin > length else (length, "append")
            tokens, valid = np.zeros((batch, size), np.int32), np.zeros((batch, size), bool)
            for row, prompt in enumerate(ids):
                piece = prompt[begin : begin + size]
                tokens[row, : len(piece)], valid[row, : len(piece)] = piece, True
            cache = self._call(name, model, tokens, valid, cache, like=cache)
            begin += size
        return cache

    def _append(self, model: Any, tokens: Any, valid: Any, cache: kv.KVCache) -> kv.KVCache:
        return self._call("append", model, tokens, valid, cache, like=cache)

    def _buffers(self, *_: Any) -> loop.Buffers:
        return {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in self.manifest["buffers"].items()}

    def _denoise(self, *args: Any, **options: Any) -> tuple[sampling.State, loop.Buffers]:
        return loop.compiled(*args, **options, program=self._loop)

    def _loop(self, model, state, cache, buffers, sampler, pinned, index, limit, *, record):
        arguments = (model, state, cache, buffers, _settings(sampler), index, limit)
        return self._call("denoise", *arguments, like=(index, state, buffers))

    def _call(self, name: str, *arguments: Any, like: Any) -> Any:
        """The program's result in the structure of `like`."""
        program = self.programs[name]
        leaves = [_unkeyed(leaf) for leaf in jax.tree.leaves(arguments)]
        for number, (leaf, aval) in enumerate(zip(leaves, program.in_avals, strict=True)):
            if (np.shape(leaf), leaf.dtype) != (aval.shape, aval.dtype):
                raise ValueError(
                    f"argument {number} of {name!r} is {leaf.dtype}{list(np.shape(leaf))}, exported for "
                    f"{aval.dtype}{list(aval.shape)}"
                )
        return _in_structure(self._jitted[name](*leaves), like)

    @functools.cached_property
    def _jitted(self) -> dict[str, Callable]:
        return {name: jax.jit(program.call) for name, program in self.programs.items()}


def _exported(function: Callable, arguments: Any, platforms: tuple[str, ...]) -> jax_export.Exported:
    """`function` over the leaves of its arguments, so that a file needs to know no class of ours."""
    like = jax.tree.structure(arguments)
    keyed = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(arguments)]

    def flat(*leaves: jax.Array) -> list[jax.Array]:
        typed = [jax.random.wrap_key_data(x) if is_key else x for x, is_key in zip(leaves, keyed, strict=True)]
        return [_unkeyed(leaf) for leaf in jax.tree.leaves(function(*jax.tree.unflatten(like, typed)))]

    plain = [jax.eval_shape(_unkeyed, leaf) for leaf in jax.tree.leaves(arguments)]
    return jax_export.export(jax.jit(flat), platforms=platforms)(*plain)


def _unkeyed(leaf: Any) -> jax.Array:
    """Random keys as their bits."""
    leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _in_structure(leaves: Sequence[jax.Array], like: Any) -> Any:
    old, structure = jax.tree.flatten(like)
    keyed = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in old]
    typed = [jax.random.wrap_key_data(x) if is_key else x for x, is_key in zip(leaves, keyed, strict=True)]
    return jax.tree.unflatten(structure, typed)


def _settings(sampler: SamplerConfig) -> SamplerConfig:
    """The sampler with its real settings as float32 arrays."""
    leaves, structure = jax.tree.flatten(sampler)
    return jax.tree.unflatten(structure, [jnp.float32(x) for x in leaves])


def _signature(model: Any) -> dict[str, Any]:
    """What two models must share to share a program: settings, and dtype and shape of every weight, by name."""
    found = jax.tree_util.tree_flatten_with_path(model)[0]
    weights = {f"model{jax.tree_util.keystr(path)}": f"{leaf.dtype.name}{list(leaf.shape)}" for path, leaf in found}
    return _plain(dataclasses.asdict(model.config) | {"moe": model.moe} | weights)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _check_plain(model: Any) -> None:
    if getattr(model, "mesh", None) is not None:
        raise ValueError("the model lies on a mesh; programs are exported for one device: load it without mesh")

    def contextual(node: Any) -> bool:
        return isinstance(node, sites.Contextual)

    nodes = filter(contextual, jax.tree.leaves(model, is_leaf=contextual))
    edits = sorted({type(node).__name__ for node in nodes} - {sites.Site.__name__, SoftEmbed.__name__})
    if edits:
        raise ValueError(f"the model has edits in place ({', '.join(edits)}); only unedited models are exported")


def _check_sizes(config: Any, batch: int, context: int, chunk: int, platforms: tuple[str, ...]) -> None:
    for name, value in (("batch", batch), ("context", context), ("chunk", chunk)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    if not config.canvas_length < context <= config.max_position_embeddings:
        raise ValueError(
            f"context={context} must hold a canvas of {config.canvas_length} and a prompt, and be at most "
            f"{config.max_position_embeddings}"
        )
    unknown = sorted(set(platforms) - set(PLATFORMS))
    if unknown:
        raise ValueError(f"unknown platform {unknown}; known are {', '.join(PLATFORMS)}")
