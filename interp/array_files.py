"""One `.npz` file of arrays with a JSON text `about` beside them; bfloat16 survives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np


def write(path: str | Path, arrays: dict[str, Any], about: dict[str, Any]) -> Path:
    """Write the file and say where; the suffix `.npz` is added if it lacks."""
    path = Path(path)
    path = path if path.suffix == ".npz" else path.with_name(f"{path.name}.npz")
    plain, narrow = {}, []
    for name, array in arrays.items():
        array = np.asarray(array)
        if array.dtype == ml_dtypes.bfloat16:
            narrow.append(name)
            array = array.view(np.uint16)
        plain[name] = array
    text = json.dumps(about | {"bfloat16": narrow})
    np.savez_compressed(path, about=np.array(text), **plain)
    return path


def read(path: str | Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and `about` of a file that `write` made, whose about says `kind`.

    Raises:
        ValueError: the file holds something else.
    """
    path = Path(path)
    if not path.exists() and path.suffix != ".npz":
        path = path.with_name(f"{path.name}.npz")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    about = json.loads(str(arrays.pop("about"))) if "about" in arrays else {}
    if about.get("kind") != kind:
        raise ValueError(f"{path} holds {about.get('kind') or 'arrays of another program'}, not {kind}")
    for name in about.pop("bfloat16"):
        arrays[name] = arrays[name].view(ml_dtypes.bfloat16)
    return arrays, about
