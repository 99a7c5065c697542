"""What the compiler makes of the released model for accelerators that are not there. Compiled, not run.

`python -m dgemma_jax.bench.compiled` compiles every program of `programs.py` for H100, H200, TPU v5p and eight TPU v5e,
each in a process of its own (one to three minutes on two cores), and prints a table: memory, products, launches, copies
and collectives are facts of the program; times cannot be seen. `--save` adds to the file of the day in `results/`, a
line after each, so that an interrupted run loses nothing. Needs the CUDA build of JAX (`jax[cuda13]`) or libtpu
(`jax[tpu]`), but no device.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dgemma_jax.bench import targets

COLUMNS = (
    "target", "program", "temporaries GB", "in all GB", "TFLOP", "kernels", "custom calls", "copies", "collectives",
)  # fmt: skip
ROOT = Path(__file__).parents[2]


def figures(target: str, name: str) -> dict[str, Any]:
    """Compile a program of `programs.PROGRAMS` in a new process and read it.

    Returns:
        Bytes of "arguments", "temporaries", "outputs", "aliased" and "total" on one device; "tflop", "kernels",
        "custom_calls", "copies", "collectives" and "large" of one step (of the whole, where there is no loop);
        "copies_outside" of the rest; "compile_seconds".

    Raises:
        RuntimeError: it does not compile, with the end of what was said; or the compiler is missing.
    """
    if reason := targets.missing(target):
        raise RuntimeError(f"nothing can be compiled for {target} here: {reason}")
    settings = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | targets.environment(target)
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "dgemma_jax.bench.compiled", "--one", target, name]
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} does not compile for {target}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _one(target: str, name: str) -> dict[str, Any]:
    """`figures` in this process, whose environment must be that of the target."""
    from dgemma_jax.bench import programs

    return read(target, name, *programs.build(target, name))


def read(target: str, name: str, function: Any, args: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """`figures` of a jitted function, in a process whose environment is that of the target."""
    import jax

    from dgemma_jax.bench import hlo

    start = time.perf_counter()
    lowered = function.trace(*args, **keywords).lower(lowering_platforms=(targets.platform(target),))
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    program, memory = hlo.Program(compiled.as_text()), compiled.memory_analysis()
    step, whole = program.step, program.whole
    parts = ("argument", "temp", "output", "alias")
    argument, temp, output, alias = (getattr(memory, f"{part}_size_in_bytes") for part in parts)
    # Products of TPU programs are convolutions: XLA's own count, with every loop counted once.
    flops = (compiled.cost_analysis() or {}).get("flops", 0.0) if target in targets.TPUS else step.flops
    return {
        "target": target, "program": name, "jax": jax.__version__, "device": targets.devices(target)[0].device_kind,
        "arguments": argument, "temporaries": temp, "outputs": output, "aliased": alias,
        "total": argument + temp + output - alias, "tflop": flops / 1e12, "kernels": step.kernels.total(),
        "custom_calls": dict(step.custom), "collectives": dict(step.collectives),
        "copies": step.copies, "large": [row for row in step.large if row[1] != "move"],
        "copies_outside": [] if step is whole else [row for row in whole.copies if row not in step.copies],
        "lower_seconds": round(middle - start, 1), "compile_seconds": round(end - middle, 1),
    }  # fmt: skip


def row(found: Mapping[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    copied = sum(size for size, *_ in found["copies"])
    between = ", ".join(f"{count} {kind}" for kind, count in found["collectives"].items())
    return (
        found["target"], found["program"], f"{found['temporaries'] / 1e9:.2f}", f"{found['total'] / 1e9:.2f}",
        f"{found['tflop']:.2f}", str(found["kernels"]), str(sum(found["custom_calls"].values())),
        f"{len(found['copies'])}, {copied / 1e9:.2f} GB" if copied else "0", between or "0",
    )  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *map(row, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dgemma_jax.bench.compiled", description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", choices=targets.TARGETS, default=targets.TARGETS)
    parser.add_argument("--program", nargs="+", metavar="NAME", help="names of programs.py; all of them by default")
    parser.add_argument("--save", nargs="?", type=Path, const=True, help="add to a file, by default one of the day")
    parser.add_argument("--one", nargs=2, metavar=("TARGET", "PROGRAM"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print(json.dumps(_one(*options.one)))
        return
    from dgemma_jax.bench import programs, report

    known = {name for target in options.target for name in programs.PROGRAMS[target]}
    if unknown := sorted(set(options.program or ()) - known):
        parser.error(f"no program {', '.join(unknown)} for these targets; known are {', '.join(sorted(known))}")
    today = datetime.date.today().isoformat()
    path = report.RESULTS / f"compiled-not-run-{today}.jsonl" if options.save is True else options.save
    found = []
    for target in options.target:
        if reason := targets.missing(target):
            print(f"{target} is left out: {reason}", file=sys.stderr)
            continue
        for name in options.program or programs.PROGRAMS[target]:
            if name not in programs.PROGRAMS[target]:
                continue
            found.append(figures(target, name))
            print(f"{target} {name}: compiled in {found[-1]['compile_seconds']} s", file=sys.stderr)
            if path:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"what": "compiled, not run", "date": today} | found[-1]) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
