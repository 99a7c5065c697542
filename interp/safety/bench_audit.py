"""How many prompts an audit gets through, and what of its time is compilation.

    python -m interp.safety.bench_audit [--prompts N] [--mid] [--out DIR] [--save]

`nano` on planted prompts, all parts; or a random model of the size of `dgemma_jax.bench.peer` with the same prompts, a
cap of 4 steps and a rule of no meaning, which is about throughput alone. First a few prompts, which compile every
program, then the others. Processor seconds are those of the process, all threads: on a shared machine they say more
than the clock. With --out the audit keeps its parts: the same command made again goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dgemma_jax as dg
from dgemma_jax.bench import report
from dgemma_jax.bench.peer import Sizes
from interp.safety.audits import audit
from interp.safety.planted_prompts import RULE, SYNONYMS, planted_prompts
from interp.safety.verdicts import Rule

RESULTS = Path(__file__).parent / "results" / "throughput.json"
WARM = 64  # prompts of the first audit


def _by_length(text: str) -> bool:
    return len(text) % 2 == 0


def mid(sizes: Sizes | None = None) -> dg.Bundle:
    """A random model of the size of the benchmarks, with the vocabulary of `nano` and a canvas of 64."""
    sizes, nano = sizes or Sizes(), dg.load("nano")
    layers = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(sizes.num_layers)]
    config = dataclasses.replace(
        nano.config, embed_dim=sizes.embed_dim, hidden_dim=sizes.hidden_dim,
        layer_types=tuple(layers), num_heads=sizes.num_heads, num_kv_heads=sizes.num_kv_heads,
        num_global_kv_heads=sizes.num_global_kv_heads, head_dim=sizes.head_dim,
        global_head_dim=sizes.global_head_dim, num_experts=sizes.num_experts,
        experts_per_token=sizes.experts_per_token, expert_dim=sizes.expert_dim, canvas_length=64,
    )  # fmt: skip
    sampler = nano.sampler.replace(max_denoising_steps=4)
    return dg.Bundle(config, dg.nn.transformer.initialize(config), nano.tokenizer, sampler)


def timed(bundle: Any, count: int, rule: Rule, out: Path | None, seed: int) -> dict[str, Any]:
    """One audit: {"prompts", "processor_seconds", "seconds"}."""
    cpu, wall = time.process_time(), time.time()
    audit(bundle, planted_prompts(count, seed, None), out, rule=rule, synonyms=SYNONYMS, seed=seed)
    spent = {"processor_seconds": round(time.process_time() - cpu, 1), "seconds": round(time.time() - wall, 1)}
    return {"prompts": count} | spent


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256, metavar="N", help="of the second audit (256)")
    parser.add_argument("--warm", type=int, default=WARM, metavar="N", help=f"of the first, 0 for none ({WARM})")
    parser.add_argument("--mid", action="store_true", help="a random model of middle size")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the second audit keeps its parts")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name} in results")
    args = parser.parse_args(argv)
    bundle, rule = (mid(), Rule(opens=RULE.opens, judge=_by_length)) if args.mid else (dg.load("nano"), RULE)
    told = {"first": timed(bundle, args.warm, rule, None, 1)} if args.warm else {}
    print(json.dumps(told), flush=True)
    told["audit"] = timed(bundle, args.prompts, rule, args.out, 2)
    told["prompts_a_processor_second"] = round(args.prompts / told["audit"]["processor_seconds"], 2)
    about = report.surroundings("jax", "jaxlib", threads=os.cpu_count() or 1)
    found = {"mid" if args.mid else "nano": told | {"about": about}}
    print(json.dumps(found, indent=1))
    if args.save:
        kept = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(kept | found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
