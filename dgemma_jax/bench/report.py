"""What a benchmark leaves: times of alternated runs, where and when they were taken, a table, a JSON file."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that was timed.

    Attributes:
        task: what is computed; the rows of a task do the same work.
        name: who computes it.
        seconds: of each run, in order.
        compile_seconds: what the first call cost beyond a later one; None where nothing is compiled.
        goal: largest share of the fastest peer's time that is aimed for; None for peers.
    """

    task: str
    name: str
    seconds: tuple[float, ...]
    compile_seconds: float | None = None
    goal: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The rows of a benchmark, and what is needed to judge them.

    Attributes:
        title: one line.
        rows: in the order of the table.
        settings: sizes and numbers of runs.
        about: date, machine, versions; from `surroundings`.
    """

    title: str
    rows: tuple[Row, ...]
    settings: Mapping[str, Any]
    about: Mapping[str, Any]

    def ratio(self, row: Row) -> float | None:
        """Median over the median of the fastest peer of the same task; None for a peer or without one."""
        peers = [other.median for other in self.rows if other.task == row.task and other.goal is None]
        return row.median / min(peers) if peers and row.goal is not None else None

    def __str__(self) -> str:
        lines = [self.title, ", ".join(f"{k} {v}" for k, v in self.about.items() if k != "versions")]
        lines += [", ".join(f"{k} {v}" for k, v in self.about.get("versions", {}).items()), ""]
        head = ("task", "by", "median ms", "best ms", "worst ms", "compile s", "x peer", "goal")
        table = [head]
        for row in self.rows:
            ratio, compile_s = self.ratio(row), row.compile_seconds
            table.append(
                (
                    row.task, row.name, *(f"{1e3 * t:.1f}" for t in (row.median, min(row.seconds), max(row.seconds))),
                    "" if compile_s is None else f"{compile_s:.1f}", "" if ratio is None else f"{ratio:.2f}",
                    "" if row.goal is None else f"<= {row.goal:g}",
                )
            )  # fmt: skip
        widths = [max(len(line[column]) for line in table) for column in range(len(head))]
        for line in table:
            cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", "utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what `save` wrote."""
        fields = json.loads(Path(path).read_text("utf-8"))
        rows = tuple(Row(**row | {"seconds": tuple(row["seconds"])}) for row in fields.pop("rows"))
        return cls(rows=rows, **fields)


def surroundings(*packages: str, threads: int) -> dict[str, Any]:
    """Date, kind of machine and versions of the named packages."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "source"
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, {platform.system()} {platform.machine()}, {memory_gib():.0f} GiB",
        "threads": threads,
        "versions": versions,
    }


def processor() -> str:
    """The name the processor gives itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def memory_gib() -> float:
    """Size of the main memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return float("nan")


def alternate(
    contestants: Mapping[str, Callable[[], Any]], runs: int, pause: float = 0.05,
    first: Mapping[str, float] | None = None,
) -> tuple[dict[str, tuple[float, ...]], dict[str, float]]:  # fmt: skip
    """Seconds of `runs` calls of each, taken in turns so that a change of the machine's speed meets all alike.

    Each call must return only when its work is done. Between calls there is a pause, in which the threads of the
    one before go to sleep. Python's collector of cycles rests meanwhile, as in `timeit`.

    Returns:
        Seconds of the timed calls by name, and of a first call that is not counted among them.
    """
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        if first is None:
            first = {name: timed(call, pause) for name, call in contestants.items()}
        taken: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(runs):
            names = list(contestants) if turn % 2 == 0 else list(contestants)[::-1]
            for name in names:
                taken[name].append(timed(contestants[name], pause))
    finally:
        if collects:
            gc.enable()
    return {name: tuple(seconds) for name, seconds in taken.items()}, dict(first)


def timed(call: Callable[[], Any], pause: float = 0.05) -> float:
    """Seconds of one call, after a pause."""
    time.sleep(pause)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def keep_threads(threads: int) -> None:
    """Confine the process to this many processors, so that every library uses as many threads. Call it first."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
