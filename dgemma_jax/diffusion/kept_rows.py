"""Finished generations of a long job, one file each, so that a job that was cut off goes on after them.

    job.json          what the results depend on; written first
    rows/000017.npz   the result of prompt 17 (`Generation.load` reads it); there whole or not at all
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dgemma_jax.diffusion.generate import Generation
from dgemma_jax.weight_sums import weight_sums


@dataclasses.dataclass(frozen=True)
class KeptRows:
    """A directory of results that belong together."""

    directory: Path

    @classmethod
    def claim(cls, directory: str | Path, model: Any, about: Mapping[str, str]) -> KeptRows:
        """The directory for this job, new or as it was left.

        Raises:
            ValueError: it holds another job; says what differs.
        """
        kept = cls(Path(directory))
        job = {name: _digest(text) for name, text in about.items()}
        job["model"] = _digest(repr((weight_sums(model), str(jax.tree.structure(model)))))
        path = kept.directory / "job.json"
        if path.exists():
            there = json.loads(path.read_text("utf-8"))
            differing = sorted(name for name in {*job, *there} if job.get(name) != there.get(name))
            if differing:
                raise ValueError(f"{directory} holds results of another job ({', '.join(differing)} differ); give "
                                 "another directory")  # fmt: skip
        elif (kept.directory / "rows").exists():
            raise ValueError(f"{directory} holds rows without job.json; give another directory")
        else:
            kept.directory.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(job, indent=1) + "\n", "utf-8")
            os.replace(part, path)
        (kept.directory / "rows").mkdir(exist_ok=True)
        return kept

    @property
    def numbers(self) -> set[int]:
        """Prompts whose results are there."""
        return {int(path.stem) for path in (self.directory / "rows").glob("*.npz") if path.stem.isdigit()}

    def load(self, number: int) -> Generation:
        return Generation.load(self._path(number))

    def save(self, number: int, result: Generation) -> None:
        path = self._path(number)
        part = result.save(path.with_suffix(f".{os.getpid()}.part.npz"))
        os.replace(part, path)

    def _path(self, number: int) -> Path:
        return self.directory / "rows" / f"{number:06d}.npz"


def _digest(text: str) -> str:
    """16 hexadecimal digits; where functions lie in memory is left out."""
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()[:16]
