"""Writing a Hugging Face directory that `transformers` loads: shards, index, settings, tokenizer.

`publish.py` sees to it that an interrupted save is never taken for a checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dgemma_jax.config import ModelConfig, SamplerConfig
from dgemma_jax.weights import finite, hf, hf_keys, problems, progress, publish, settings, tensor_file
from dgemma_jax.weights import tree as trees

_Stored = tuple[np.dtype, tuple[int, ...], Callable[[], np.ndarray]]  # dtype, shape, how to get it


def save_hf(
    directory: str | Path,
    tree: Any,
    config: ModelConfig,
    sampler: SamplerConfig | None = None,
    tokenizer: Any = None,
    *,
    dtype: Any = None,
    max_shard_size: float = 5e9,
    vision_from: str | Path | None = None,
    check_finite: bool = True,
    progress_bar: bool | None = None,
) -> None:
    """Write a checkpoint that `DiffusionGemmaForBlockDiffusion.from_pretrained` loads, no key missing or unexpected.

    Args:
        directory: made if need be; an older checkpoint in it is replaced, other files are kept.
        tree: the model; its leaves must be those of the format.
        config: sizes of the model.
        sampler: becomes `generation_config.json`.
        tokenizer: has `save(directory)`; its files are written byte for byte.
        dtype: storage type (bfloat16, float16 or float32); None keeps that of each leaf.
        max_shard_size: bytes; a larger checkpoint becomes several files and an index.
        vision_from: an HF directory whose image tower is copied. Without it a model with one is saved as text only,
            which is said with a warning.
        check_finite: refuse numbers that are, or by the cast become, infinite or NaN.
        progress_bar: None shows one for a gigabyte or more.
    """
    directory = Path(directory)
    if max_shard_size <= 0:
        raise ValueError(f"max_shard_size must be a positive number of bytes, got {max_shard_size}")
    arrays, table_dtype = _text(tree, dtype, check_finite)
    config = _add_vision(arrays, config, vision_from, table_dtype)
    with publish.staged(directory) as stage:
        _write_shards(stage, arrays, max_shard_size, f"Saving {directory.name}", progress_bar)
        settings.write(stage, config, sampler, str(table_dtype))
        if tokenizer is not None:
            tokenizer.save(stage)


def _text(tree: Any, dtype: Any, check_finite: bool) -> tuple[dict[str, _Stored], np.dtype]:
    """Every leaf by its stored name, and the type of the embedding table."""
    leaves = trees.leaves(tree)
    foreign = [trees.dotted(path) for path in leaves if hf_keys.key_of(path) is None]
    if foreign:
        raise ValueError(
            f"the format has no place for {problems.counted(foreign)}; save the model without edits or adapters"
        )
    wanted = None if dtype is None else np.dtype(jax.numpy.dtype(dtype))
    arrays: dict[str, _Stored] = {}
    refused = []
    for path, leaf in leaves.items():
        key, layout = hf_keys.key_of(path)
        target = wanted or np.dtype(leaf.dtype)
        if target not in tensor_file.DTYPES.values():
            refused.append(f"{trees.dotted(path)}: {target}")

        def get(leaf: Any = leaf, layout: Any = layout, target: np.dtype = target, name: str = key) -> np.ndarray:
            array = np.asarray(leaf if leaf.dtype == target else leaf.astype(target))
            if check_finite and not finite.on_host(array):
                raise ValueError(f"{name} has values that are not finite as {target}; nothing was saved")
            return np.ascontiguousarray(layout.to_stored(array))

        arrays[key] = target, layout.stored_shape(leaf.shape), get
    if refused:
        known = sorted(map(str, tensor_file.DTYPES.values()))
        raise ValueError(f"weights are stored as one of {known}, not {problems.counted(refused)}")
    return arrays, arrays[hf_keys.key_of(("embedder", "table"))[0]][0]


def _add_vision(
    arrays: dict[str, _Stored], config: ModelConfig, source: str | Path | None, dtype: np.dtype
) -> ModelConfig:
    """Adds the image tower's arrays; gives back the configuration that describes what is there."""
    if config.vision is not None and source is not None:
        entries, reader = hf.find(Path(source)), tensor_file.Reader()
        tower = {key: e for key, e in entries.items() if hf_keys.not_used_yet(key)}
        for key, entry in tower.items():
            if entry.dtype is None:
                raise ValueError(f"{key} in {source} has the type {entry.dtype_name}, which cannot be copied")
            arrays[key] = entry.dtype, entry.shape, lambda entry=entry: reader(entry)
        if tower:
            return config
    if config.vision is not None:
        warnings.warn("the image tower is not part of the model and is left out of the checkpoint", stacklevel=4)
    config = dataclasses.replace(config, vision=None)
    for key, shape in hf_keys.smallest_tower(config.embed_dim).items():
        arrays[key] = dtype, shape, lambda shape=shape: np.zeros(shape, dtype)
    return config


def _write_shards(stage: Path, arrays: Mapping[str, _Stored], limit: float, title: str, show: bool | None) -> None:
    sizes = {key: int(np.prod(shape)) * dtype.itemsize for key, (dtype, shape, _) in arrays.items()}
    shards: list[list[str]] = [[]]
    room = limit
    for key, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(key)
        room -= size
    count = len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [hf.SINGLE]
    with progress.bar(title, sum(sizes.values()), show) as advance:
        for name, keys in zip(names, shards, strict=True):
            described = {key: arrays[key][:2] for key in keys}
            tensor_file.write(stage / name, described, _fetched(arrays, keys, advance))
    if count > 1:
        places = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (stage / hf.INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _fetched(arrays: Mapping[str, _Stored], keys: list[str], advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    for key in keys:
        array = arrays[key][2]()
        yield array
        advance(array.nbytes)
