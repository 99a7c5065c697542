"""Sets of activations on disk: what probes and autoencoders are trained on.

A set is a directory: `manifest.json`, and a folder a shard with one `.npy` file a site and one a column. A shard is
there whole or not at all, so that a collection that was killed goes on where it stopped. Files are memory-mapped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from interp.activations import readable

MANIFEST = "manifest.json"
PROMPT, CANVAS = 0, 1  # entries of the column `place`
COLUMNS = {
    "row": np.int32, "step": np.int32, "position": np.int32, "token": np.int32, "answer": np.int32,
    "accepted": np.bool_, "noise": np.float32, "place": np.int8,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ActivationSet:
    """N activations of each site, and where each comes from.

    Attributes:
        directory: where it lies.
        about: the manifest: sites, settings, number of prompts.
        columns: [N] arrays. row: number of the prompt. step: -1 in a prompt. position: in the prompt or on the
            canvas. token: what was fed in there. answer: what stands there in the end, -1 in a prompt. accepted: the
            step's sampler kept the position (not fluid). noise: share of the canvas fed in that was noise. place:
            `PROMPT` or `CANVAS`.
        shards: the folders, in order.
        starts: [shards + 1] where each begins.
    """

    directory: Path
    about: Mapping[str, Any]
    columns: dict[str, np.ndarray]
    shards: tuple[Path, ...]
    starts: np.ndarray

    @classmethod
    def load(cls, directory: str | Path) -> ActivationSet:
        """Open what `interp.collect_activations` wrote, finished or not.

        Raises:
            ValueError: the directory is not such a set.
        """
        directory = Path(directory)
        if not (directory / MANIFEST).exists():
            raise ValueError(f"{directory} has no {MANIFEST}: it is no set of activations")
        about = json.loads((directory / MANIFEST).read_text("utf-8"))
        shards = tuple(sorted(path for path in directory.glob("shard-*") if path.suffix != ".part"))
        parts = {name: [np.load(shard / f"{name}.npy") for shard in shards] for name in COLUMNS}
        columns = {
            name: np.concatenate(found) if found else np.zeros(0, COLUMNS[name]) for name, found in parts.items()
        }
        starts = np.cumsum([0, *(len(found) for found in parts["row"])])
        return cls(directory, about, columns, shards, starts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def sites(self) -> tuple[str, ...]:
        """Full names."""
        return tuple(self.about["sites"])

    @property
    def is_whole(self) -> bool:
        """Every prompt was run."""
        return len(self.shards) == self.about["shards"]

    def where(self, **chosen: Any) -> np.ndarray:
        """Numbers of the samples whose columns have these values: `where(step=[0, 1], accepted=False)`."""
        keep = np.ones(len(self), bool)
        for name, wanted in chosen.items():
            if name not in self.columns:
                raise ValueError(f"there is no column {name!r}; there are {', '.join(self.columns)}")
            keep &= np.isin(self.columns[name], np.atleast_1d(wanted))
        return np.flatnonzero(keep)

    def values(self, site: str, which: Any = None) -> np.ndarray:
        """Activations [n, ...] of the samples with these numbers, in their order; None for all of them."""
        if site not in self.about["sites"]:
            raise ValueError(f"{site!r} was not collected; there are {', '.join(self.sites)}")
        which = np.arange(len(self)) if which is None else np.asarray(which)
        if len(which) and not (which.min() >= 0 and which.max() < len(self)):
            raise ValueError(f"samples go from 0 to {len(self) - 1}, asked for {which.min()} to {which.max()}")
        shape, dtype = self.about["sites"][site]
        found = np.zeros((len(which), *shape), np.dtype(getattr(ml_dtypes, dtype, dtype)))
        shard = np.searchsorted(self.starts, which, "right") - 1
        for number in np.unique(shard):
            own = shard == number
            found[own] = self.mapped(site, int(number))[which[own] - self.starts[number]]
        return found

    def mapped(self, site: str, shard: int) -> np.ndarray:
        """One shard of a site as a memory map [n, ...]."""
        array = np.load(self.shards[shard] / f"{site}.npy", mmap_mode="r")
        return array.view(ml_dtypes.bfloat16) if self.about["sites"][site][1] == "bfloat16" else array

    def batches(self, site: str, size: int, seed: int = 0, which: Any = None) -> Iterator[tuple[np.ndarray, ...]]:
        """Endless batches (values [size, ...], their numbers [size]), in a new random order at each pass.

        Raises:
            ValueError: fewer samples than one batch.
        """
        which = np.arange(len(self)) if which is None else np.asarray(which)
        if len(which) < size:
            raise ValueError(f"a batch of {size} is asked for, {len(which)} samples are there")
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(which)
            for first in range(0, len(order) - size + 1, size):
                chosen = order[first : first + size]
                yield self.values(site, chosen), chosen

    def noise_by_step(self) -> np.ndarray:
        """[R] mean share of noise in the canvas fed into each step; a step without samples has that before it."""
        step, noise = self.columns["step"], self.columns["noise"]
        found, last = [], 1.0
        for number in range(int(step.max(initial=0)) + 1):
            own = noise[step == number]
            last = float(own.mean()) if len(own) else last
            found.append(last)
        return np.asarray(found, np.float32)

    def __repr__(self) -> str:
        kinds = [(shape, np.dtype(getattr(ml_dtypes, dtype, dtype))) for shape, dtype in self.about["sites"].values()]
        size = float(sum(np.prod(shape) * dtype.itemsize for shape, dtype in kinds)) * len(self)
        accepted = self.columns["accepted"][self.columns["place"] == CANVAS]
        prompts, steps = len(np.unique(self.columns["row"])), np.unique(self.columns["step"]).tolist()
        lines = [
            f"{len(self)} activations of {len(self.sites)} sites, {readable(size)}, {prompts} prompts, "
            f"{len(self.shards)} of {self.about['shards']} shards",
            f"steps {steps}, {accepted.sum()} of {len(accepted)} on the canvas accepted",
        ]
        return "\n".join(lines + [f"{name}  {dtype}{shape}" for name, (shape, dtype) in self.about["sites"].items()])


def write_shard(path: Path, sites: Mapping[str, np.ndarray], columns: Mapping[str, Sequence[Any]]) -> None:
    """Write one shard, whole or not at all."""
    import shutil

    part = path.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, array in sites.items():
        np.save(part / f"{name}.npy", array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array)
    for name, dtype in COLUMNS.items():
        np.save(part / f"{name}.npy", np.asarray(columns[name], dtype))
    part.rename(path)
