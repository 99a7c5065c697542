"""The progress bar of a long load or save."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

SHOWN_FROM = 1_000_000_000  # bytes


@contextlib.contextmanager
def bar(title: str, total: int, show: bool | None) -> Iterator[Callable[[int], None]]:
    """A function to call with the bytes just done. `show=None` draws the bar for a gigabyte or more."""
    if not (total >= SHOWN_FROM if show is None else show):
        yield lambda done: None
        return
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns) as live:
        task = live.add_task(title, total=total)
        yield lambda done: live.advance(task, done)
