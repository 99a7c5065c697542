"""Leaves of a model tree by short paths: `("layers", 3, "attention", "q")`. Works on any pytree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

Path = tuple[str | int, ...]


def leaves(tree: Any) -> dict[Path, Any]:
    """Every leaf by its path, in the order of the tree."""
    return {short(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def replace(tree: Any, values: Mapping[Path, Any]) -> Any:
    """The same tree with every leaf taken from `values`."""
    return jax.tree.unflatten(jax.tree.structure(tree), [values[path] for path in leaves(tree)])


def short(key_path: tuple[Any, ...]) -> Path:
    """A JAX key path as names and indices, without the `value` of a parameter box."""
    parts = []
    for key in key_path:
        for attribute in ("name", "idx", "key"):
            if hasattr(key, attribute):
                parts.append(getattr(key, attribute))
                break
        else:
            parts.append(str(key))
    return tuple(parts[:-1] if parts[-1:] == ["value"] else parts)


def dotted(path: Path) -> str:
    """`layers.3.attention.q`."""
    return ".".join(map(str, path))
