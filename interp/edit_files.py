"""Save the edits of a model, without its weights, and put them into a model again.

One `.npz` file: arrays, and JSON that says which class stands at which site. Classes and functions are written as
import paths; loading imports their modules, so load files that you trust.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.nn.embedder import SoftEmbed
from dgemma_jax.nn.functional import of
from dgemma_jax.nn.sites import Site, is_open
from interp import array_files, surgery
from interp.bottleneck import table_sum
from interp.editing import put, rewrapped, sizes
from interp.edits import Chain, Edit
from interp.gates import Gate

_NOT_SAVED = ("context",)


def save_edits(model: Any, path: str | Path) -> Path:
    """Write the edits of a model or bundle and say where. Weights are not written.

    Raises:
        ValueError: an edit holds a function without import path (a lambda, a function in a function), or a site
            holds something that is no edit.
    """
    transformer = of(model)
    arrays: dict[str, Any] = {}
    placed = []
    for name, site in surgery.placed(transformer).items():
        for one in site.edits if isinstance(site, Chain) else [site]:
            if is_open(one):
                placed.append([name, _encode(one, arrays, name)])
    soft = surgery.soft_embedding(transformer).get()
    encoded = None if type(soft) is SoftEmbed else _encode(soft, arrays, "soft_embedding")
    return array_files.write(path, arrays, {"kind": "edits", "sites": placed, "soft_embedding": encoded})


def load_edits(model: Any, path: str | Path) -> Any:
    """The model or bundle with the edits of a file put in, after those it has.

    Raises:
        ValueError: the model lacks a site, or a site has another width than the edits were made for.
    """
    transformer = of(model)
    arrays, about = array_files.read(path, "edits")
    infos = {info.name: info for info in surgery.sites(transformer)}
    for name, encoded in about["sites"]:
        if name not in infos:
            raise ValueError(f"{path} edits {name!r}, which the model lacks")
        edit = _decode(encoded, arrays)
        if isinstance(edit, Edit):
            _check_widths(edit, infos[name])
        transformer = put(transformer, {name: edit})
    if about["soft_embedding"] is not None:
        soft = _decode(about["soft_embedding"], arrays)
        width = transformer.config.embed_dim
        if getattr(soft, "table_sum", np.zeros(width)).shape != (width,):
            raise ValueError(f"{path} has a bottleneck of width {soft.table_sum.shape[0]}, the model {width}")
        if hasattr(soft, "table_sum"):  # of this model's table
            soft = dataclasses.replace(soft, table_sum=table_sum(transformer))
        transformer = surgery.soft_embedding(transformer).set(soft)
    return rewrapped(model, transformer)


def _check_widths(edit: Edit, info: Any) -> None:
    wanted = sizes(info, batch=0, length=0, slots=0)  # 0: any
    for name in edit.VALUES:
        value = getattr(edit, name)
        shape = () if value is None else value.shape
        if shape and shape[-1] not in (1, wanted[-1]) and wanted[-1]:
            raise ValueError(f"{info.name} has width {wanted[-1]}; the saved {name} has shape {shape}")


def _encode(value: Any, arrays: dict[str, Any], where: str) -> Any:
    """JSON for a value; arrays go beside it."""
    if isinstance(value, jax.Array | np.ndarray):
        name = f"{len(arrays)}"
        arrays[name] = value
        return {"array": name}
    if isinstance(value, Site | SoftEmbed | Gate):
        if not dataclasses.is_dataclass(value):
            raise ValueError(f"{where} holds a {type(value).__name__}, which is no dataclass and cannot be saved")
        own = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name not in _NOT_SAVED}
        fields = {name: _encode(part, arrays, where) for name, part in own.items()}
        return {"class": _import_path(type(value), where), "fields": fields}
    if isinstance(value, dict):
        return {"dict": {key: _encode(part, arrays, where) for key, part in value.items()}}
    if isinstance(value, tuple | list):
        return {"tuple": [_encode(part, arrays, where) for part in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if callable(value):
        return {"function": _import_path(value, where)}
    raise ValueError(f"{where} holds a {type(value).__name__}, which cannot be saved")


def _import_path(thing: Any, where: str) -> str:
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", "")
    path = f"{module}:{name}"
    if module in (None, "__main__") or "<" in name or not name:
        raise ValueError(
            f"{where} holds {name or thing!r} of {module}, which cannot be imported: define it at the top of a module"
        )
    if _imported(path) is not thing:
        raise ValueError(f"{where} holds a function that is not the one at {path}")
    return path


def _imported(path: str) -> Any:
    module, name = path.split(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _decode(encoded: Any, arrays: dict[str, np.ndarray]) -> Any:
    (kind, content), *rest = encoded.items()
    if kind == "array":
        return jnp.asarray(arrays[content])
    if kind == "class":
        cls = _imported(content)
        fields = {name: _decode(part, arrays) for name, part in dict(rest)["fields"].items()}
        if not issubclass(cls, Site | SoftEmbed | Gate):
            raise ValueError(f"{content} is no edit")
        return cls(**fields)
    if kind == "dict":
        return {key: _decode(part, arrays) for key, part in content.items()}
    if kind == "tuple":
        return tuple(_decode(part, arrays) for part in content)
    return _imported(content) if kind == "function" else content
