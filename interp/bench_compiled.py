"""What an intervention costs on the released model, as compiled for a GPU that is not there. Compiled, not run.

`python -m interp.bench_compiled [--target h200] [--save]`; see `dgemma_jax.bench.compiled`. A step at batch 8, context
4,096, bfloat16, with the experts in the form for this chip:

| program | is |
|---|---|
| step-8 | the plain step, for comparison |
| captures-8 | the same with the residuals of all layers as outputs |
| sweep-8 | a step of `interp.patch_sweep`: a row takes a residual at a place of its own, early layers need not run |

Times are not seen.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dgemma_jax.bench import compiled, report, targets

PROGRAMS = ("step-8", "captures-8", "sweep-8")
ROWS = 8


def build(target: str, name: str, config: Any = None) -> tuple[Any, tuple, dict]:
    """A jitted function, its arguments and keywords, on shapes alone."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import SingleDeviceSharding

    import dgemma_jax as dg
    import interp
    from dgemma_jax.bench import programs
    from dgemma_jax.diffusion import noise, sampler
    from dgemma_jax.nn import cache as kv
    from dgemma_jax.nn import transformer
    from dgemma_jax.nn.placement import with_experts
    from interp import later_layers, places, sweeps, taps

    config = config or dg.ModelConfig()
    model = with_experts(transformer.abstract(config), "mosaic" if target in targets.GPUS else "dense")
    state = jax.eval_shape(lambda m: sampler.start(
        noise.row_keys(jnp.zeros(ROWS, jnp.uint32)), jnp.zeros(ROWS, jnp.int32), jnp.zeros(ROWS, bool),
        config.canvas_length, m,
    ), model)  # fmt: skip
    cache = jax.eval_shape(lambda: kv.empty(config, ROWS, programs.CONTEXT, jnp.bfloat16))
    settings, metric = dg.SamplerConfig(), interp.LogitDifference(positions=0, tokens=7, others=8)
    goal = change = begin = None
    if name == "sweep-8":
        (goal,) = places.targets(model, "layers.*.resid_post", "denoise", ("position",))
        change = places.Change(
            jax.ShapeDtypeStruct((ROWS,), jnp.int32),
            {"T": jax.ShapeDtypeStruct((ROWS, config.canvas_length), bool)},
            jax.ShapeDtypeStruct((ROWS, 1, config.embed_dim), jnp.bfloat16),
        )
        begin = jax.eval_shape(lambda m: later_layers.Beginning.anew(m, 1), model)
    if name == "captures-8":
        model = taps.tapped(model, ["layers.*.resid_post"])[0]

    @jax.jit
    def step(model, state, cache, settings):
        after, view = sampler.denoise_step(model, state, cache, settings)
        return after, view.sites

    chip = SingleDeviceSharding(targets.devices(target)[0])
    laid = [programs.laid(x, chip) for x in (model, state, cache)]
    if name != "sweep-8":
        return step, (*laid, settings), {}
    metric = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.asarray(x).dtype), metric)
    own, begin, metric = (programs.laid(x, chip) for x in (change, begin, metric))
    leaves, tree = jax.tree.flatten(laid[0])
    given = (leaves, *laid[1:], settings, None, own, begin, metric)
    # A sweep reads as many steps of the donor as `sweeps.READ` allows; here all rows, which is the most there can be.
    return sweeps._metric, given, {"tree": tree, "goal": goal, "pairs": 1, "read": ROWS}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m interp.bench_compiled", description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=targets.GPUS, default="h200")
    parser.add_argument("--save", action="store_true", help="add to the file of the day beside the other compiled ones")
    parser.add_argument("--one", choices=PROGRAMS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print(json.dumps(compiled.read(options.target, options.one, *build(options.target, options.one))))
        return
    if reason := targets.missing(options.target):
        raise SystemExit(f"nothing can be compiled for {options.target} here: {reason}")
    settings = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | targets.environment(options.target)
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(compiled.ROOT), os.environ.get("PYTHONPATH")]))
    today, found = datetime.date.today().isoformat(), []
    for name in PROGRAMS:
        command = [sys.executable, "-m", "interp.bench_compiled", "--target", options.target, "--one", name]
        done = subprocess.run(command, env=settings, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} does not compile for {options.target}:\n{done.stderr[-4000:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: compiled in {found[-1]['compile_seconds']} s", file=sys.stderr)
        if options.save:
            path = Path(report.RESULTS) / f"compiled-not-run-{today}.jsonl"
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"what": "compiled, not run", "date": today} | found[-1]) + "\n")
    print(compiled.table(found))


if __name__ == "__main__":
    main()
