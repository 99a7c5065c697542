"""How everything that is wrong with a checkpoint is said at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path


def counted(names: Iterable[str], at_most: int = 40, separator: str = ", ") -> str:
    """The names, the tail of a long list as a number."""
    names = list(names)
    more = [f"and {len(names) - at_most} more"] if len(names) > at_most else []
    return separator.join([*names[:at_most], *more])


def listing(directory: Path) -> str:
    """The names in a directory."""
    return counted(sorted(p.name for p in directory.iterdir()), 12) or "nothing"


def check(directory: Path, found: Mapping[str, list[str]], advice: str = "") -> None:
    """Raise a `ValueError` with every kind of problem that has names under it."""
    lines = [f"{kind} ({len(names)}): {counted(names, separator='; ')}" for kind, names in found.items() if names]
    if lines:
        raise ValueError(
            "\n  ".join([f"the weights in {directory} do not fit the model:", *lines, *filter(None, [advice])])
        )


def check_finite(directory: Path, bad: list[str]) -> None:
    """Raise a `ValueError` if any weight is named."""
    if bad:
        raise ValueError(f"{directory} gives non-finite values in {counted(bad)}; check_finite=False loads them anyway")
