"""Browse the sites of a model and select them. The only user of Penzai.

A site is a module that returns its input, under a name from a closed list (`dgemma_jax.nn.sites`). Its full
name is `layers.<i>.<name>` inside a layer and `<name>` elsewhere. What is put in its place is a subclass of
`Site`, so that it can be found, and replaced, again.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from penzai import pz

from dgemma_jax.nn.embedder import SoftEmbed
from dgemma_jax.nn.functional import of
from dgemma_jax.nn.sites import Site, SiteInfo, describe
from dgemma_jax.nn.transformer import Layer


class Sites(Sequence[SiteInfo]):
    """Sites of a model; prints as a table with one line for layers that are alike."""

    def __init__(self, infos: Iterable[SiteInfo]) -> None:
        self._infos = tuple(infos)

    def __getitem__(self, index: Any) -> Any:
        found = self._infos[index]
        return Sites(found) if isinstance(index, slice) else found

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def names(self) -> tuple[str, ...]:
        """Full names."""
        return tuple(info.name for info in self._infos)

    def matching(self, pattern: str) -> Sites:
        """Those whose full name matches a glob; a ValueError names the nearest if none does."""
        found = _match(pattern, self.names)
        return Sites(info for info in self if info.name in found)

    def __repr__(self) -> str:
        groups: dict[str, dict[SiteInfo, list[int]]] = {}  # by folded name, then by all but the layer
        for info in self:
            alike = groups.setdefault(fold(info.name), {}).setdefault(dataclasses.replace(info, name=""), [])
            alike.extend(_layer(info.name))
        rows = [("site", "shape", "dtype", "layers", "meaning")]
        for name, group in groups.items():
            for info, layers in group.items():
                rows.append((name, _shape(info), info.dtype, _ranges(layers), info.meaning))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([f"{len(self)} sites", *lines])


def sites(model: Any) -> Sites:
    """Every site of a model: name, axes, shape, dtype and meaning, layers in order. Needs no weights.

    Args:
        model: a model, a bundle, or `dgemma_jax.nn.transformer.abstract(config)`.
    """
    model = of(model)
    own = str(model.dtype)
    return Sites(
        dataclasses.replace(info, dtype=own) if info.dtype == "compute" else info for info in describe(model.config)
    )


def at(model: Any, pattern: str) -> pz.Selection:
    """The sites whose full name matches, as a Penzai selection of the model.

    `interp.at(model, "layers.17.resid_post").set(edit)` and `.apply(function)` give an edited model; the
    original stays as it is. Put subclasses of `Site` there. The selection runs through the tree
    alphabetically, not in the order of the computation: `.get_by_path()` says what is where.

    Args:
        model: a model, or a bundle (the selection is then in its model).
        pattern: a full name or a glob: "logits", "layers.17.resid_post", "layers.*.router_probs",
            "layers.[0-3].resid_*".

    Raises:
        ValueError: nothing matches; the message lists near names.
    """
    found = every(model)
    names = {path: full_name(path, site) for path, site in found.get_by_path().items()}
    wanted = _match(pattern, names.values())
    return found.where(lambda path, _: names[path] in wanted, with_keypath=True)


def every(model: Any) -> pz.Selection:
    """All sites."""
    return pz.select(of(model)).at_instances_of(Site)


def full_name(path: Sequence[Any], site: Site) -> str:
    """The full name of the site that a model has at this JAX key path."""
    in_layer = len(path) > 1 and getattr(path[0], "name", None) == "layers"
    return f"layers.{path[1].idx}.{site.name}" if in_layer else site.name


def placed(model: Any) -> dict[str, Site]:
    """What stands at every site, by full name, in the order of `sites`."""
    found = {full_name(path, site): site for path, site in every(model).get_by_path().items()}
    return {info.name: found[info.name] for info in sites(model)}


def layers(model: Any) -> pz.Selection:
    """The layers."""
    return pz.select(of(model)).at_instances_of(Layer)


def soft_embedding(model: Any) -> pz.Selection:
    """The module that makes S of a distribution."""
    found = pz.select(of(model)).at_instances_of(SoftEmbed)
    if found.count() != 1:
        raise ValueError(f"the model has {found.count()} soft embeddings, 1 is expected")
    return found


def named(array: Any, names: Sequence[str]) -> pz.nx.NamedArray:
    """A view with named axes, for display; axes without a name stay positional, at the end."""
    array = jax.numpy.asarray(array)
    return pz.nx.wrap(array, *[name or None for name in names], *[None] * (array.ndim - len(names)))


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that match a glob, in their order; a ValueError names the nearest if none does."""
    names = list(names)
    found = _match(pattern, names)
    return [name for name in names if name in found]


def _match(pattern: str, names: Iterable[str]) -> set[str]:
    """The names that match; raises if none does."""
    names = list(names)
    found = set(fnmatch.filter(names, pattern))
    if found:
        return found
    folded = list(dict.fromkeys(map(fold, names)))
    if fold(pattern) in folded:  # the name is right, the layer is not
        near = [name for name in names if fold(name) == fold(pattern)][-1:]
    else:
        near = difflib.get_close_matches(fold(pattern), folded, n=4) or folded[:4]
    layers = 1 + max((i for name in names for i in _layer(name)), default=-1)
    raise ValueError(
        f"no site matches {pattern!r}; near it: {', '.join(near)} ({layers} layers; interp.sites(model) lists all)"
    )


def _layer(name: str) -> list[int]:
    """The layer of a full name: one number or none."""
    return [int(name.split(".")[1])] if name.startswith("layers.") else []


def layer_ranges(names: Iterable[str]) -> str:
    """The layers of full names: "0-3,5"."""
    return _ranges(i for name in names for i in _layer(name))


def fold(name: str) -> str:
    """The full name with `*` for the layer."""
    return ".".join(["layers", "*", *name.split(".")[2:]]) if name.startswith("layers.") else name


def _shape(info: SiteInfo) -> str:
    """`[B, T, D=2816]`."""
    sizes = (a if a in (s, "1") else f"{a}={s}" for a, s in zip(info.axes, info.shape, strict=True))
    return f"[{', '.join(sizes)}]"


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 as "0-2,5"."""
    runs = itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    bounds = ([n for _, n in run] for _, run in runs)
    return ",".join(f"{b[0]}-{b[-1]}" if len(b) > 1 else str(b[0]) for b in bounds)
