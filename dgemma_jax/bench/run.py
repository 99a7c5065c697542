"""`dgemma bench`: every item in a process that may die, each result on disk as soon as it is there.

A process times item after item and adds a line to the file for each; one that dies takes nothing with it but what it
was trying, and the next goes on after that. The same file given again goes on too.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dgemma_jax.bench import lines, report

# Processes of their own, with what the GPU's memory is told: the second shares it with torch.
STAGES = {"own": ("XLA_PYTHON_CLIENT_MEM_FRACTION", ".95"), "peer": ("XLA_PYTHON_CLIENT_PREALLOCATE", "false")}
SAME = ("size", "model", "dtype", "device", "versions")  # of the header, for results to belong together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to time, and how long.

    Attributes:
        out: the file of results.
        size: one of `work.SIZES`; None takes "release" on an accelerator and "medium" on CPU.
        model: where weights come from; None makes random ones.
        only: parts of the names of items; empty takes all. Ceilings are always measured.
        deadline: seconds since the epoch after which nothing is begun; None has no end.
        runs: timed calls of each contestant, at most.
        item_seconds: what an item may take beyond its first calls and one timed one of each, about.
    """

    out: Path
    size: str | None = None
    model: str | None = None
    only: tuple[str, ...] = ()
    deadline: float | None = None
    runs: int = 7
    item_seconds: float = 20.0

    @property
    def is_over(self) -> bool:
        return self.deadline is not None and time.time() >= self.deadline


def measure(settings: Settings, stage: str, capture: Any = None) -> None:
    """Time what the file does not hold yet, in this process.

    Raises:
        ValueError: the file holds results of something else, or there is no such item.
    """
    import jax

    from dgemma_jax.bench import items, peer_items
    from dgemma_jax.bench.work import Work

    size = settings.size or ("medium" if jax.default_backend() == "cpu" else "release")
    work = Work.of(size, *_of_model(settings.model))
    plan = {"own": items.items(work), "peer": [] if settings.model else peer_items.items(work)}
    ceilings = {items.COPY, items.MATMUL}
    names = [item.name for part in plan.values() for item in part]
    unknown = [text for text in settings.only if not any(text in name for name in names)]
    if unknown:
        raise ValueError(f"no item's name contains {unknown}; items are: {'; '.join(names)}")

    def wanted(name: str) -> bool:
        return name in ceilings or not settings.only or any(text in name for text in settings.only)

    header = _header(size, settings.model, work.dtype, [name for name in names if wanted(name)])
    found = lines.read(settings.out)
    if found.header is None:
        lines.append(settings.out, {"header": header})
    else:
        _check_same(settings.out, found.header, header)
    lab = items.Lab(work, settings.model, capture) if stage == "own" else peer_items.PeerLab(work)
    parent = os.getppid()
    for item in plan[stage]:
        is_over = settings.is_over or os.getppid() != parent  # who started this process is gone: nobody waits for it
        if wanted(item.name) and item.name not in found.items and not is_over:
            rows = time_item(item, lab, settings, found.died)
            lines.append(settings.out, {"item": item.name, "rows": rows} | _memory())


def time_item(item: Any, lab: Any, settings: Settings, died: dict[tuple[str, str], str]) -> list[dict[str, Any]]:
    """A row a contestant; what fails has its error in place of times. A benchmark goes on, whatever fails."""

    def begin(who: str) -> None:
        lines.append(settings.out, {"begin": item.name, "by": who})

    if (item.name, "") in died:
        return [{"by": "", "error": died[item.name, ""]}]
    begin("")
    try:
        contestants = {c.name: c for c in item.build(lab)}
    except Exception as error:
        return [{"by": "", "error": _one_line(error)}]
    rows = {name: {"by": name, "count": c.count, "tokens": c.tokens, "at": c.at} for name, c in contestants.items()}
    first: dict[str, float] = {}
    for name, contestant in contestants.items():
        if (item.name, name) in died:
            rows[name]["error"] = died[item.name, name]
            continue
        begin(name)
        try:
            first[name] = report.timed(contestant.call)
        except Exception as error:
            rows[name]["error"] = _one_line(error)
    begin("")
    calls = {name: contestants[name].call for name in first}
    if not calls:
        return list(rows.values())
    seconds, _ = report.alternate(calls, 1, first=first)
    once = sum(sum(taken) for taken in seconds.values())
    more = min(settings.runs - 1, max(1 if once < 2 * settings.item_seconds else 0, int(settings.item_seconds / once)))
    later, _ = report.alternate(calls, more, first=first)
    for name, taken in seconds.items():
        rows[name] |= {"seconds": [*taken, *later[name]], "first": first[name], "work": contestants[name].work}
    return list(rows.values())


def run(settings: Settings, command: Sequence[str], say: Callable[[int, int, str], None]) -> None:
    """Run `command` with a stage until all items are in the file or the time is over.

    Args:
        command: starts `measure` in a process, given "--stage" and one of `STAGES`.
        say: called with the number of finished items, of all, and what is being timed.

    Raises:
        RuntimeError: the process ended before it tried anything.
    """
    for stage, (option, value) in STAGES.items():
        while not settings.is_over:
            before = lines.read(settings.out) if settings.out.exists() else None
            code = _watched([*command, "--stage", stage], {option: value} | dict(os.environ), settings, say)
            if code == 0 or settings.is_over:
                break
            found = lines.read(settings.out)
            if found.begun is None or (before and before == found):
                raise RuntimeError(f"the timing process ended with code {code} before it timed anything")
            item, who = found.begun
            lines.append(settings.out, {"died": item, "by": who, "why": f"the process died: {_reason(code)}"})


def _watched(
    command: Sequence[str], environment: dict[str, str], settings: Settings, say: Callable[[int, int, str], None]
) -> int:
    """The exit code of the command; at the deadline it is ended."""
    with subprocess.Popen(command, env=environment) as process:
        try:
            while process.poll() is None:
                time.sleep(0.3)
                _tell(settings.out, say)
                if settings.is_over:
                    process.kill()
        finally:
            process.kill()
    _tell(settings.out, say)
    return process.returncode


def _tell(out: Path, say: Callable[[int, int, str], None]) -> None:
    found = lines.read(out)
    if found.header is not None:
        say(len(found.items), len(found.header["items"]), ", ".join(filter(None, found.begun or ())))


def _reason(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def _of_model(source: str | None) -> tuple[Any, ...]:
    """Configuration and dtype of a checkpoint, without its weights."""
    if source is None:
        return ()
    from dgemma_jax.bundle import locate
    from dgemma_jax.weights import hf, orbax, settings

    directory = locate(source)
    if packed := settings.read_packed(directory):
        raise ValueError(f"{source} holds weights in {packed['form']}; the benchmark runs on plain ones")
    if orbax.root(directory) is not None:
        return orbax.read_config(directory), str(orbax.stored_dtype(directory))
    return settings.read_config(directory), str(hf.stored_dtype(hf.find(directory)))


def _header(size: str, model: str | None, dtype: str, names: list[str]) -> dict[str, Any]:
    import jax

    about = report.surroundings("dgemma-jax", "jax", "jaxlib", "flax", "torch", "transformers", threads=os.cpu_count())
    about["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return about | dict(size=size, model=model, dtype=dtype, device=device, load=load, items=names)


def _check_same(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    other = [f"{key}: {old.get(key)}, now {new[key]}" for key in SAME if old.get(key) != new[key]]
    if other:
        raise ValueError(f"{out} holds results of another run ({'; '.join(other)}); give another --out")


def _memory() -> dict[str, float]:
    """Most bytes that the device has held so far, in GB, where it says."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return {"peak_gb": stats["peak_bytes_in_use"] / 1e9} if "peak_bytes_in_use" in stats else {}
