"""Finished chunks of a long sweep, one small file each, so that a sweep that was cut off goes on after them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from interp import array_files
from interp.fingerprint import fingerprint

_KIND = "chunk of a sweep"


class Chunks:
    """A directory of chunks of one sweep.

    Args:
        directory: None keeps nothing.
        bundle: its weights and edits are part of what tells sweeps apart.
        *settings: whatever else is.
    """

    def __init__(self, directory: str | Path | None, bundle: Any, *settings: Any) -> None:
        self.directory = None if directory is None else Path(directory)
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.sweep = fingerprint(bundle, *settings)

    def kept(self, group: int, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The chunk as it was kept, or else computed, and kept.

        Raises:
            ValueError: the file is of another sweep.
        """
        return self.all_kept(group, name, lambda: {"values": compute()})["values"]

    def all_kept(self, group: int, name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The same of a chunk of several arrays."""
        if self.directory is None:
            return compute()
        path = self.directory / f"{group}-{name}.npz"
        if path.exists():
            arrays, about = array_files.read(path, _KIND)
            if about["sweep"] != self.sweep:
                raise ValueError(
                    f"{self.directory} holds chunks of another sweep (other weights, prompts or settings); "
                    "give an empty directory"
                )
            return arrays
        values = compute()
        about = {"kind": _KIND, "sweep": self.sweep}
        part = array_files.write(path.with_suffix(".part.npz"), values, about)
        os.replace(part, path)  # a file is there whole or not at all
        return values


def words(metric: Any) -> str:
    """A text that tells metrics apart: their kind and their data; a function by its name."""
    leaves, structure = jax.tree.flatten(metric)
    if leaves and leaves[0] is metric:
        return f"{metric.__module__}.{getattr(metric, '__qualname__', type(metric).__qualname__)}"
    data = hashlib.sha256()
    for leaf in leaves:
        data.update(np.asarray(leaf).tobytes())
    return f"{structure} {data.hexdigest()}"
