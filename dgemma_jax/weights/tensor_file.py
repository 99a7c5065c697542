"""One safetensors file, read through a memory map and written a tensor at a time.

The format is eight bytes of header length, a JSON header, then the raw arrays. Arrays that are read are
views of the file: nothing is copied until it is used.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the format


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a file: its storage type by the format's name, its shape and its bytes."""

    file: Path
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> np.dtype | None:
        """The NumPy type, or None for one that this package does not read."""
        return DTYPES.get(self.dtype_name)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def read_header(file: Path) -> dict[str, Entry]:
    """Every array of the file by name.

    Raises:
        ValueError: the file is truncated or not a safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length.to_bytes(8, "little") == b"version ":
            raise ValueError(f"{file} is a Git LFS pointer, not the file; run `git lfs pull`")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"{file} is truncated or no safetensors file: {size} bytes, header said to have {length}")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            base = 8 + length
            entries = {name: _entry(file, base, fields) for name, fields in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{file} has a damaged header ({error}); fetch it again") from error
    needed = max((e.stop for e in entries.values()), default=base)
    if needed > size:
        raise ValueError(f"{file} is truncated: {size} bytes, its header describes {needed}; fetch it again")
    for name, e in entries.items():
        if e.dtype is not None and e.nbytes != math.prod(e.shape) * e.dtype.itemsize:
            raise ValueError(f"{file}: {name} {e.dtype_name} {e.shape} has {e.nbytes} bytes; the file is damaged")
    return entries


def _entry(file: Path, base: int, fields: Mapping[str, Any]) -> Entry:
    start, stop = fields["data_offsets"]
    if not 0 <= start <= stop:
        raise ValueError(f"data_offsets {start}, {stop}")
    return Entry(file, fields["dtype"], tuple(map(int, fields["shape"])), base + start, base + stop)


class Reader:
    """Views of arrays in memory-mapped files; each file is mapped once, on first use."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def __call__(self, entry: Entry) -> np.ndarray:
        """The stored array, read-only, not copied."""
        if entry.file not in self._maps:
            with entry.file.open("rb") as stream:
                self._maps[entry.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        count = math.prod(entry.shape)
        if not count:
            return np.zeros(entry.shape, entry.dtype)
        return np.frombuffer(self._maps[entry.file], entry.dtype, count, entry.start).reshape(entry.shape)


def header_bytes(arrays: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    """The start of a file holding these arrays in this order, `__metadata__` included as PyTorch writes it."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in arrays.items():
        stop = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(file: Path, described: Mapping[str, tuple[np.dtype, tuple[int, ...]]], arrays: Iterable[np.ndarray]) -> None:
    """Write the described arrays, taking one at a time from `arrays`; on disk when it returns."""
    with file.open("wb") as stream:
        stream.write(header_bytes(described))
        for (name, (dtype, shape)), array in zip(described.items(), arrays, strict=True):
            if array.dtype != dtype or array.shape != shape:
                raise AssertionError(f"{name}: described as {dtype} {shape}, got {array.dtype} {array.shape}")
            stream.write(np.ascontiguousarray(array).reshape(array.size).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
