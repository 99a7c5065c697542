"""Edit what crosses from the prompt to the canvas: cached keys and values."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dgemma_jax.diffusion.moment import Moment
from dgemma_jax.nn.cache import KVCache, LayerCache, slot_positions
from interp.edits import Edit
from interp.gates import Gate, table


def edit_cache(
    target: Any, edit: Edit, *, layers: Any = None, positions: Any = None, rows: Any = None, heads: Any = None,
    parts: tuple[str, ...] = ("k", "v"),
) -> Any:  # fmt: skip
    """The cache, or moment, with its cached keys and values edited: what the canvas reads of the prompt.

    `Patch(donor)`, where the donor is a cache or a moment of as many tokens, takes the donor's entries. Zeroed keys
    still draw attention (their score is 0); to cut attention itself, patch "attn_scores" with the lowest float.

    Args:
        target: a `KVCache`, a `Moment` or a `Prefill`.
        edit: any edit; values broadcast against [B, K, P, H], P being absolute positions.
        layers, rows, heads: which; heads are key heads, counted in each layer.
        positions: absolute positions of tokens. Sliding layers hold the last `sliding_window - 1` only.
        parts: keys "k", values "v".
    """
    cache = target if isinstance(target, KVCache) else target.cache
    on = table(layers, len(cache.layers), "layers")
    tables = dict(rows=table(rows, cache.length.shape[0], "rows"), positions=table(positions, None, "prompt positions"))
    if not set(parts) <= {"k", "v"} or not parts:
        raise ValueError(f"parts must be of 'k' and 'v', got {parts!r}")
    donor = _donor(edit, cache)
    entries = []
    for number, entry in enumerate(cache.layers):
        new = {}
        for part in parts:
            own = edit if donor is None else dataclasses.replace(edit, value=getattr(donor.layers[number], part))
            new[part] = _edited(own, getattr(entry, part), cache.length, on[number], tables, heads, donor is not None)
        entries.append(LayerCache(new.get("k", entry.k), new.get("v", entry.v)))
    changed = cache.replace(layers=entries)
    if isinstance(target, KVCache):
        return changed
    return target.replace(cache=changed) if isinstance(target, Moment) else dataclasses.replace(target, cache=changed)


def _donor(edit: Edit, cache: KVCache) -> KVCache | None:
    value = getattr(edit, "value", None)
    donor = value if isinstance(value, KVCache) else getattr(value, "cache", None)
    if donor is None:
        return None
    shapes = [jax.tree.map(jnp.shape, c.layers) for c in (donor, cache)]
    concrete = not any(isinstance(c.length, jax.core.Tracer) for c in (donor, cache))
    if shapes[0] != shapes[1] or (concrete and not (donor.length == cache.length).all()):
        lengths = f"{donor.length} and {cache.length}" if concrete else "other shapes"
        raise ValueError(f"the donor's cache does not fit: tokens a row {lengths}; prompts of equal length are needed")
    return donor


def _edited(edit, old_BKSH, length_B, on, tables, heads, aligned) -> jax.Array:
    """One array of a cache edited; slots play the part of positions."""
    is_off = not isinstance(on, jax.core.Tracer) and float(on) == 0
    axes = {"T": tables["positions"], "K": table(False if is_off else heads, old_BKSH.shape[1], "heads")}
    none = jnp.ones(1, jnp.float32)
    context = {"positions": slot_positions(length_B, old_BKSH.shape[2]), "length": length_B, "aligned": aligned}
    changes = {
        name: jnp.asarray(getattr(edit, name), old_BKSH.dtype if rank is None else jnp.float32)
        for name, rank in edit.VALUES.items() if getattr(edit, name) is not None
    }  # fmt: skip
    gate = Gate(on, none, none, tables["rows"], axes)
    return dataclasses.replace(edit, axes="BKTH", phase="prefill", gate=gate, context=context, **changes)(old_BKSH)
