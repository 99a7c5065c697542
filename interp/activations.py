"""Captured activations: arrays by site name, with what is needed to read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from interp import array_files, surgery

WORDS = {
    "J": "block", "R": "step", "B": "row", "T": "position", "C": "position", "D": "width", "N": "head",
    "K": "key_head", "H": "head_width", "F": "unit", "E": "expert", "V": "token", "S": "key", "1": "one",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Activations(Mapping[str, np.ndarray]):
    """Captured values by full site name: `acts["layers.3.resid_post"]` is [R, B, C, D].

    With several blocks there is an axis J in front; captured prompts have no axis R. Entries where `valid` is False
    were not run, or are padding (zeros in a generation).

    Attributes:
        arrays: numpy arrays by name.
        axes: letters of each array's axes; those that a reduction made are left out.
        steps: [R], which steps these are; empty for prompts.
        valid: [R, B] or [J, R, B] bool, the row took this step; [B, T] for prompts.
        texts: the answers, None without a tokenizer; empty for prompts.
        tokens: [B, J * C] ids of the answers; [B, T] ids for prompts.
        seeds: of the rows.
    """

    arrays: dict[str, np.ndarray]
    axes: dict[str, str]
    steps: tuple[int, ...]
    valid: np.ndarray
    texts: tuple[str | None, ...]
    tokens: np.ndarray
    seeds: tuple[int, ...]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise KeyError(f"{name!r} was not captured; captured are {', '.join(self.arrays)}")
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def stack(self, pattern: str = "*") -> np.ndarray:
        """The arrays of equal shape that match, [L, ...], in the order of the layers."""
        names = surgery.matching(pattern, self.arrays)
        shapes = {self.arrays[n].shape for n in names}
        if len(shapes) > 1:
            raise ValueError(f"{pattern!r} has shapes {sorted(shapes)}; only equal ones can be stacked")
        return np.stack([self.arrays[n] for n in names])

    def named(self) -> dict[str, Any]:
        """Views with named axes ("step", "row", "position", "width", ...) for display by treescope."""
        return {n: surgery.named(a, [WORDS[letter] for letter in self.axes[n]]) for n, a in self.arrays.items()}

    def save(self, path: Any) -> Any:
        """Write one `.npz` file."""
        arrays = {f"sites/{n}": a for n, a in self.arrays.items()}
        about = {
            "kind": "activations",
            "axes": self.axes,
            "steps": self.steps,
            "texts": self.texts,
            "seeds": self.seeds,
        }
        return array_files.write(path, arrays | {"valid": self.valid, "tokens": self.tokens}, about)

    @classmethod
    def load(cls, path: Any) -> Activations:
        """Read what `save` wrote."""
        arrays, about = array_files.read(path, "activations")
        return cls(
            arrays={n.removeprefix("sites/"): a for n, a in arrays.items() if n.startswith("sites/")},
            axes=about["axes"], steps=tuple(about["steps"]), valid=arrays["valid"],
            texts=tuple(about["texts"]), tokens=arrays["tokens"], seeds=tuple(about["seeds"]),
        )  # fmt: skip

    def __repr__(self) -> str:
        total = sum(a.nbytes for a in self.arrays.values())
        lines = [f"{len(self)} sites, {readable(total)}, steps {list(self.steps)}"]
        lines += [f"{name}  {self.axes[name]}  {a.dtype}{list(a.shape)}" for name, a in self.arrays.items()]
        return "\n".join(lines)


def readable(count: float) -> str:
    """1536 as "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"
