"""One row a generation, kept by columns.

The file is a plain `.npz` (`numpy.load`, no pickles). A column of numbers is an array [n, ...] under its name. A column
of texts is two arrays: `<name>/utf8`, all texts one after the other, and `<name>/ends` [n], where each ends in it.
`to_parquet` writes the same as Parquet, where pyarrow is installed.
"""

from __future__ import annotations

import os
import secrets  # names of unfinished files: processes of many hosts may share a number
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from interp import array_files

Columns = dict[str, Any]  # arrays [n, ...], or lists of n texts

_KIND = "rows of a study"


def write(path: Path, columns: Mapping[str, Any]) -> Path:
    """Write the file; it is there whole or not at all."""
    arrays: dict[str, np.ndarray] = {}
    for name, values in columns.items():
        if isinstance(values, np.ndarray):
            arrays[name] = values
        else:
            texts = [text.encode("utf-8", "surrogatepass") for text in values]
            arrays[f"{name}/utf8"] = np.frombuffer(b"".join(texts), np.uint8)
            arrays[f"{name}/ends"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
    part = array_files.write(path.with_name(f"{path.stem}.{secrets.token_hex(4)}.part.npz"), arrays, {"kind": _KIND})
    os.replace(part, path)
    return path


def read(path: Path) -> Columns:
    """What `write` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    arrays, _ = array_files.read(path, _KIND)
    columns: Columns = {}
    for name, array in arrays.items():
        plain, _, part = name.rpartition("/")
        if part == "utf8":
            ends = arrays[f"{plain}/ends"].tolist()
            data = array.tobytes()
            spans = zip([0, *ends], ends, strict=False)
            columns[plain] = [data[a:b].decode("utf-8", "surrogatepass") for a, b in spans]
        elif part != "ends":
            columns[name] = array
    return columns


def joined(parts: Sequence[Columns], order: np.ndarray) -> Columns:
    """The parts as one, rows in an order: entry i of the result is entry `order[i]` of all parts in turn."""
    together: Columns = {}
    for name, first in parts[0].items():
        if isinstance(first, np.ndarray):
            together[name] = np.concatenate([part[name] for part in parts])[order]
        else:
            texts = [text for part in parts for text in part[name]]
            together[name] = [texts[i] for i in order]
    return together


def to_parquet(path: Path, columns: Mapping[str, Any]) -> Path:
    """Write the columns as Parquet; an array [n, a, b] becomes lists of lists.

    Raises:
        ValueError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("Parquet needs pyarrow: pip install pyarrow; the .npz file beside holds the same") from error
    table = pa.table({name: pa.array(v.tolist() if isinstance(v, np.ndarray) else v) for name, v in columns.items()})
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    pyarrow.parquet.write_table(table, part)
    os.replace(part, path)
    return path
