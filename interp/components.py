"""The components that studies switch off or replace one by one: heads, experts, MLPs, experts together, layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dgemma_jax.config import ModelConfig
from dgemma_jax.nn.functional import of
from interp import surgery
from interp.gates import table

# What a component writes, by sites without the layer.
OUTPUTS = {
    "heads": ("attn_z",),
    "experts": ("expert_out",),
    "attention": ("attn_out",),
    "mlp": ("mlp_out",),
    "moe": ("moe_out",),
    "layers": ("attn_out", "mlp_out", "moe_out"),
    "embeddings": ("resid_pre",),  # of layer 0 alone
}
_UNIT = {"heads": "N", "experts": "E"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Components:
    """All components of one kind, in a row: component i of `shape` is that at `np.unravel_index(i, shape)`.

    Attributes:
        what: one of `OUTPUTS`.
        sites: that are edited, without the layer.
        axes: of the row of components: L, then T if positions are taken one by one, then N or E.
        index: numbers along each axis, by letter.
        positions: [C] bool, canvas positions that take part.
        ranks: letters of each site's shape, by full name.
    """

    what: str
    sites: tuple[str, ...]
    axes: str
    index: dict[str, list[int]]
    positions: np.ndarray
    ranks: dict[str, str]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(self.index[a]) for a in self.axes)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def masks(self, chosen: np.ndarray, config: ModelConfig) -> dict[str, np.ndarray]:
        """Where components [I] act: bool [I, C or 1, ...] by full site name; a negative number acts nowhere."""
        real = chosen >= 0
        at = dict(zip(self.axes, np.unravel_index(np.maximum(chosen, 0), self.shape), strict=True))
        numbers = {a: np.asarray(self.index[a])[i] for a, i in at.items()}
        where_IC = self.positions[None]
        if "T" in numbers:
            where_IC = numbers["T"][:, None] == np.arange(config.canvas_length)
        units = {"N": config.num_heads, "E": config.num_experts}
        found = {}
        for name, letters in self.ranks.items():
            on_I = real & (numbers["L"] == int(name.split(".")[1]))
            mask = (on_I[:, None] & where_IC).reshape(len(chosen), -1, *[1] * (len(letters) - 2))
            if (letter := _UNIT.get(self.what)) is not None:
                one = numbers[letter][:, None] == np.arange(units[letter])
                mask = mask & one.reshape(len(chosen), 1, -1, *[1] * (len(letters) - 3))
            found[name] = mask
        return found


def components(
    model: Any, what: str, *, sites: tuple[str, ...] | None = None, layers: Any = None, positions: Any = None,
    each_position: bool = False,
) -> Components:  # fmt: skip
    """The components of a model.

    Args:
        what: one of `OUTPUTS`.
        sites: edited in place of those it writes to.
        layers, positions: which; None for all.
        each_position: components at each position are told apart.

    Raises:
        ValueError: no such kind, layer or position.
    """
    if what not in OUTPUTS:
        raise ValueError(f"there are no components {what!r}; there are {', '.join(OUTPUTS)}")
    model = of(model)
    config = model.config
    on = np.asarray(table(layers, config.num_layers, "layers")) > 0
    if what == "embeddings":
        on &= np.arange(config.num_layers) == 0
    at = np.asarray(table(positions, config.canvas_length, "positions")) > 0
    if not on.any() or not at.any():
        raise ValueError(f"layers={layers!r} and positions={positions!r} leave no {what}")
    index = {"L": np.flatnonzero(on).tolist()}
    if each_position:
        index["T"] = np.flatnonzero(at).tolist()
    if what in _UNIT:
        index[_UNIT[what]] = list(range(config.num_heads if what == "heads" else config.num_experts))
    sites = OUTPUTS[what] if sites is None else sites
    names = {f"layers.{layer}.{site}" for layer in index["L"] for site in sites}
    ranks = {info.name: info.axes for info in surgery.sites(model) if info.name in names}
    return Components(what=what, sites=sites, axes="".join(index), index=index, positions=at, ranks=ranks)


@dataclasses.dataclass(frozen=True)
class Series:
    """Components of several kinds, one kind after the other."""

    parts: tuple[Components, ...]

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def sites(self) -> tuple[str, ...]:
        """Full names of all that are edited."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.ranks))

    def masks(self, chosen: np.ndarray, config: ModelConfig) -> dict[str, np.ndarray]:
        """Where components [I] act: bool [I, C or 1, ...] by full site name; a negative number acts nowhere."""
        found: dict[str, np.ndarray] = {}
        first = 0
        for part in self.parts:
            own = np.where((chosen >= first) & (chosen < first + part.count), chosen - first, -1)
            for name, mask in part.masks(own, config).items():
                found[name] = found[name] | mask if name in found else mask
            first += part.count
        return found

    def split(self, effects: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays [R, *shape, B] by kind of one [R, count, B]."""
        pieces = np.split(effects, np.cumsum([part.count for part in self.parts])[:-1], 1)
        return {
            part.what: piece.reshape(len(piece), *part.shape, piece.shape[-1])
            for part, piece in zip(self.parts, pieces, strict=True)
        }


def kinds(what: str | Sequence[str]) -> list[str]:
    """One or several kinds as a list without repetitions."""
    return list(dict.fromkeys([what] if isinstance(what, str) else what))
