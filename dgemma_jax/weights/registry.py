"""Models by name: those that come with the package, and the release."""

from __future__ import annotations

import dataclasses
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
# Checkpoints lie in the installed package, or in a clone at the root of the repository.
EMBEDDED = ("nano", "nano-backdoor")
_PLACES = (_PACKAGE / "_checkpoints", _PACKAGE.parent / "checkpoints")


@dataclasses.dataclass(frozen=True)
class Release:
    """A model on the hub, pinned to a revision."""

    repo: str
    revision: str


RELEASES = {
    "google/diffusiongemma-26B-A4B-it": Release(
        "google/diffusiongemma-26B-A4B-it", "f7f5b7f5fa82ffc52addd066915886d497f5517b"
    ),
}


def names() -> list[str]:
    """Every name that `load` knows."""
    return [*EMBEDDED, *RELEASES]


def embedded(name: str) -> Path | None:
    """The directory of an embedded model, or None if the name is not one of them.

    Raises:
        ValueError: the name is known, its files are not there.
    """
    if name not in EMBEDDED:
        return None
    for place in _PLACES:
        if (place / name / "config.json").is_file():
            return place / name
    raise ValueError(f"the embedded model {name!r} is in neither of {[str(p / name) for p in _PLACES]}; reinstall")
