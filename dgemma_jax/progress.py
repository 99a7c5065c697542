"""The progress bar of long work: how many of how many, and how long it will take."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(title: str, total: int, show: bool | None = None, unit: str = "") -> Iterator[Callable[..., None]]:
    """A function (done, said="") to call with the number just done and a word on what comes next.

    `show=None` draws the bar in a terminal, or a notebook that can redraw it, and not into a log.
    """
    from rich import progress as rich_progress
    from rich.console import Console

    console = Console(stderr=True)
    can_redraw = importlib.util.find_spec("ipywidgets") is not None if console.is_jupyter else console.is_terminal
    if not (can_redraw if show is None else show):
        yield lambda done, said="": None
        return
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn(unit),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console) as live:
        task = live.add_task(title, total=total)

        def advance(done: int, said: str = "") -> None:
            live.update(task, advance=done, description=f"{title}  {said}".rstrip())

        yield advance
