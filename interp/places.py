"""Places that a sweep visits, and the edit that sends every row of a batch to a place of its own.

A target is what one program sweeps: sites that are alike but for the layer, or a carrier. Its places are all
combinations of layer, position, head and expert. Where a row acts is data, so any number of places share the program.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dgemma_jax.diffusion.sampler import State
from dgemma_jax.nn.cache import KVCache, LayerCache, slot_positions
from dgemma_jax.nn.functional import of
from interp import surgery
from interp.editing import put
from interp.edits import Edit

ROUNDED = ("canvas_embed", "token_embed")  # products; one that nothing looks at may go into the next sum unrounded
Leave = Callable[[str, jax.Array], None]
OVER = {"position": "T", "head": "NK", "expert": "E"}
_HANDED_ON = {"canvas": "canvas", "soft_embed": "soft", "soft_probs": "soft"}  # sites behind the logits; carriers


@nnx.dataclass(eq=False)
class Take(Edit):
    """Takes `value` at one place a row.

    Attributes:
        value: [B, ...] of the site's rank, of size one along the axes in which a row takes one place.
        on: [B] bool, the row acts here.
        at: by letter of an axis, [B, n] bool: where along it. In the prompt n counts positions.
        zero: [B] int32, zeros that the compiler does not know.
        leave: called with what comes, before anything is taken; within one trace; static.
    """

    value: Any = nnx.data()
    on: Any = nnx.data()
    at: Any = nnx.data()
    zero: Any = nnx.data()
    leave: Callable[[jax.Array], None] | None = None

    def apply(self, x: jax.Array) -> jax.Array:
        if self.phase == "prefill" or self.name in ROUNDED:
            x = self._rounded(x)
        if self.leave is not None:
            self.leave(x)
        context, batch = self.context or {}, x.shape[0]
        where = self.on.reshape(-1, *[1] * (x.ndim - 1))
        for letter, mask_BN in self.at.items():
            axis = self.axes.index(letter)
            if letter == "T" and "positions" in context:
                index_BT = jnp.minimum(context["positions"], mask_BN.shape[1] - 1)
                mask_BN = jnp.take_along_axis(mask_BN, jnp.maximum(index_BT, 0), 1) & (index_BT >= 0)
            where = where & mask_BN.reshape([n if i in (0, axis) else 1 for i, n in enumerate(x.shape)])
        value = jnp.broadcast_to(self.here(self.value, x), (batch, *x.shape[1:]))
        return jnp.where(where, value.astype(x.dtype), x)

    def _rounded(self, x: jax.Array) -> jax.Array:
        """The same numbers, rounded: the compiler cannot carry a product on to the next sum as it is. It costs time."""
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        bits = jnp.dtype(f"int{8 * x.dtype.itemsize}")
        zero = self.zero.astype(bits).reshape(-1, *[1] * (x.ndim - 1))
        return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, bits) ^ zero, x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What one program sweeps.

    Attributes:
        name: folded name of the sites, or of the carrier.
        kind: "site", "prompt" (a site of the prompt pass), "cache", "canvas" or "soft".
        sites: full names, in the order of `layers`; empty for a carrier.
        layers: their numbers; empty without layers.
        axes: letters of a value, T for positions of either kind.
        shape: sizes for them as in `SiteInfo`; empty for a carrier.
        dtype: of a site.
        swept: letters along which places lie: L, T, and N, K or E.
    """

    name: str
    kind: str
    sites: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    axes: str
    shape: tuple[int | str, ...] = ()
    dtype: str = ""
    swept: str

    @property
    def shown(self) -> str:
        """`swept` as `EffectMap` has it, P for positions of the prompt."""
        return self.swept.replace("T", "P") if self.kind in ("prompt", "cache") else self.swept

    def places(self, index: Mapping[str, Sequence[int]]) -> np.ndarray:
        """[n, letters of `swept`] all places, the last letter fastest."""
        numbers = [self.layers if a == "L" else index[a] for a in self.shown]
        return np.array(list(itertools.product(*numbers)), int).reshape(-1, len(numbers))


def targets(model: Any, sites: str | Sequence[str], phase: str, over: Sequence[str]) -> list[Target]:
    """The targets of some patterns and carriers, in the order of `interp.sites`, carriers first.

    Args:
        sites: patterns as for `interp.at`, and "canvas", "soft" (S), "cache" as they are fed into a step.
        phase: of the sites, "denoise" or "prefill".
        over: of "position", "head" and "expert": along which of their axes places lie, beside layers. An axis left
            out is patched as a whole.

    Raises:
        ValueError: no such site, a site of another phase, one behind the logits, an axis that none has.
    """
    if phase not in ("denoise", "prefill"):
        raise ValueError(f"phase must be 'denoise' or 'prefill', got {phase!r}")
    over = (over,) if isinstance(over, str) else tuple(over)
    if unknown := set(over) - set(OVER):
        raise ValueError(f"over has {', '.join(sorted(unknown))}; places lie over {', '.join(OVER)}")
    letters = "".join(OVER[word] for word in over)
    config = of(model).config
    named = [sites] if isinstance(sites, str) else list(sites)
    found = [_carrier(name, letters, config) for name in ("canvas", "soft", "cache") if name in named]
    patterns = [name for name in named if name not in ("canvas", "soft", "cache")]
    infos = surgery.sites(model)
    chosen = {info.name for pattern in patterns for info in infos.matching(pattern)}
    groups: dict[tuple[str, tuple], list[Any]] = {}
    for info in infos:
        if info.name in chosen:
            if carrier := _HANDED_ON.get(info.name):
                raise ValueError(f"{info.name} is handed to the next step; sweep {carrier!r}, as it is fed into one")
            if "C" in info.axes if phase == "prefill" else info.name == "token_embed":
                raise ValueError(f"{info.name} does not exist in {phase}")
            layer = info.name.split(".")[1] if "S" in info.axes else None
            slots = layer and config.is_sliding(int(layer))  # a ring has others than a full layer
            groups.setdefault((surgery.fold(info.name), info.shape, slots), []).append(info)
    for (name, *_), alike in groups.items():
        axes = alike[0].axes.replace("C", "T")
        layers = tuple(int(i.name.split(".")[1]) for i in alike if i.name.startswith("layers."))
        swept = "L" * bool(layers) + "".join(a for a in axes if a in letters)
        kind = "prompt" if phase == "prefill" else "site"
        full = tuple(info.name for info in alike)
        found.append(Target(
            name=name, kind=kind, sites=full, layers=layers, axes=axes, shape=alike[0].shape, dtype=alike[0].dtype,
            swept=swept,
        ))  # fmt: skip
    for name in {target.name for target in found if "K" in target.swept}:
        heads = {config.kv_heads(layer) for target in found if target.name == name for layer in target.layers}
        if len(heads) > 1:
            raise ValueError(f"layers of {name} have {sorted(heads)} key heads; sweep those that are alike alone")
    if not found:
        raise ValueError("no sites are given: name at least one pattern or carrier")
    for word in over:
        if not any(set(OVER[word]) & set(target.axes) for target in found):
            raise ValueError(f"none of {', '.join(t.name for t in found)} has an axis of {word}s")
    return found


def _carrier(name: str, letters: str, config: Any) -> Target:
    axes = {"canvas": "BT", "soft": "BTD", "cache": "BKTH"}[name]
    layers = tuple(range(config.num_layers)) if name == "cache" else ()
    swept = "L" * bool(layers) + "".join(a for a in "TK" if a in letters and a in axes)
    return Target(name=name, kind=name, layers=layers, axes=axes, swept=swept)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Change:
    """What every row of a batch takes, and where.

    Attributes:
        layer: [B] int32, 0 for a target without layers; -1 for a row that changes nothing.
        at: as in `Take`.
        value: [B, ...]; for the cache one for each layer, {"k", "v"}.
    """

    layer: jax.Array
    at: dict[str, jax.Array]
    value: Any

    def take(self, axes: str, layer: int, value: Any, **settings: Any) -> Take:
        """The edit of one layer."""
        zero = jnp.minimum(self.layer, -1) + 1
        return Take(value, self.layer == layer, self.at, zero, axes=axes, **settings)


def change(
    target: Target, places: np.ndarray, acts: np.ndarray, given: Any, sizes: Mapping[str, int], whole: np.ndarray
) -> Change:
    """The change that sends rows to places: all pairs to the first place, then all to the next.

    Args:
        places: [n, letters of `swept`].
        acts: [n] bool, False for a place that stands for no change.
        given: what the donors have: arrays [P, ...] by full name; [P, T, ...] for a carrier; a `KVCache`.
        sizes: how many there are along each swept letter.
        whole: [positions] bool, those that are patched together where positions are not swept.
    """
    layered = bool(target.layers)
    layers_N = np.where(acts, places[:, 0] if layered else 0, -1)
    if target.kind == "cache":
        value: Any = [
            {part: _gathered(target, getattr(entry, part), places, slots=True) for part in ("k", "v")}
            for entry in given.layers
        ]
        pairs = given.length.shape[0]
    else:
        arrays = {0: given} if not isinstance(given, Mapping) else {
            (target.layers[i] if layered else 0): given[name] for i, name in enumerate(target.sites)
        }  # fmt: skip
        value = _gathered(target, arrays, places)
        pairs = len(value) // len(places)
    at = {a: np.arange(sizes[a]) == places[:, [i]] for i, a in enumerate(target.swept) if a != "L"}
    if "T" in target.axes and "T" not in target.swept:
        at["T"] = np.broadcast_to(whole, (len(places), len(whole)))
    at = {a: np.repeat(mask, pairs, 0) for a, mask in at.items()}
    return Change(np.repeat(layers_N.astype(np.int32), pairs), at, value)


def _gathered(target: Target, arrays: Any, places: np.ndarray, slots: bool = False) -> np.ndarray:
    """[n * P, ...] the entries of each place; a position of the cache is in the slot it has in a ring."""
    rows = []
    for place in places:
        at = dict(zip(target.swept, place, strict=True))
        layer = at.pop("L", 0)
        value = np.asarray(arrays if slots else arrays[layer])
        for letter, number in at.items():
            axis = target.axes.index(letter)
            number = number % value.shape[axis] if slots else number
            value = value.take([number], axis)
        rows.append(value)
    return np.concatenate(rows)


def changed(
    target: Target, change: Change, model: Any, state: State, cache: KVCache, leave: Leave | None = None
) -> tuple[Any, State, KVCache]:
    """What goes into a step, with the change made. Traced.

    Args:
        leave: called with the full name of each of the target's sites and what comes there, unchanged.
    """
    if target.kind in ("canvas", "soft"):
        take = change.take(target.axes, 0, change.value)
        return model, state.replace(**{target.kind: take(getattr(state, target.kind))}), cache
    if target.kind == "cache":
        layers = []
        for number, entry in enumerate(cache.layers):
            positions = slot_positions(cache.length, entry.k.shape[2])
            context = {"positions": positions, "aligned": True}
            own = {
                part: change.take(target.axes, number, value, context=context)(getattr(entry, part))
                for part, value in change.value[number].items()
            }
            layers.append(LayerCache(**own))
        return model, state, cache.replace(layers=layers)
    return edited(target, change, model, leave), state, cache


def edited(target: Target, change: Change, model: Any, leave: Leave | None = None) -> Any:
    """The model with the change at the target's sites. `leave`: see `changed`."""
    phase = "prefill" if target.kind == "prompt" else "denoise"
    takes = {}
    for i, name in enumerate(target.sites):
        layer = target.layers[i] if target.layers else 0
        own = None if leave is None else functools.partial(leave, name)
        takes[name] = change.take(target.axes, layer, change.value, name=name.split(".")[-1], phase=phase, leave=own)
    return put(model, takes)
