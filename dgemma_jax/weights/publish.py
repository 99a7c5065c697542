"""A checkpoint appears all at once: written beside its place, moved there, `config.json` last."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dgemma_jax.weights import settings

ORBAX = "weights"  # the folder of the arrays in this package's Orbax layout
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


@contextlib.contextmanager
def staged(directory: Path, leader: bool = True) -> Iterator[Path]:
    """An empty folder to write to; when the block ends well, what is in it replaces the old checkpoint.

    Until then the old checkpoint stays as it is; while files are moved the directory has no `config.json`.
    Files that are no part of a checkpoint are kept. Only the leader of several processes moves and deletes.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; give a directory")
    stage = directory / ".partial"
    if leader:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
    try:
        yield stage
        if leader:
            _move(stage, directory)
    finally:
        if leader:
            shutil.rmtree(stage, ignore_errors=True)


def _move(stage: Path, directory: Path) -> None:
    (directory / settings.CONFIG).unlink(missing_ok=True)
    for pattern in (*_WEIGHTS, settings.GENERATION, settings.SAMPLER):
        for old in directory.glob(pattern):
            old.unlink()
    if (directory / ORBAX / "_METADATA").is_file():
        shutil.rmtree(directory / ORBAX)
    for new in sorted(stage.iterdir(), key=lambda file: file.name == settings.CONFIG):
        os.replace(new, directory / new.name)
