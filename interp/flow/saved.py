"""Results that can be kept: the arrays of a dataclass in one `.npz` file, its other fields as JSON beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Self

import numpy as np

from interp import array_files


class Saved:
    """A dataclass of arrays, mappings of arrays, numbers, texts and tuples of these."""

    def save(self, path: str | Path) -> Path:
        """Write one `.npz` file."""
        arrays, about = {}, {"kind": type(self).__name__}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                arrays[field.name] = value
            elif isinstance(value, dict):
                arrays |= {f"{field.name}/{name}": array for name, array in value.items()}
            else:
                about[field.name] = value
        return array_files.write(path, arrays, about)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds another result.
        """
        arrays, about = array_files.read(path, cls.__name__)
        own: dict[str, Any] = {name: _tuples(value) for name, value in about.items() if name != "kind"}
        for name, array in arrays.items():
            field, _, key = name.partition("/")
            if key:
                own.setdefault(field, {})[key] = array
            else:
                own[field] = array
        return cls(**own)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
