"""Attention, sampler and prefill at the released widths, compiled for an H200 that is not there: what they write.

One layer of each kind is enough for what a layer does, and quick to compile. As in `test_compile_target`, a subprocess
does it, and without the CUDA build of JAX the tests are skipped.
"""

from __future__ import annotations

import collections
import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dgemma_jax.bench import targets
from dgemma_jax.bench.hlo import arrays_of

CANVAS, VOCABULARY, HEADS, CHUNK = 256, 262_144, 16, 1024
NEAR, FAR = 4096, 262_144  # tokens of context


# --- in the subprocess


def compiled(name: str, context: int):
    """The denoising loop, or the causal pass over a piece of prompt; and the model and the cache that it is for."""
    import jax
    import jax.numpy as jnp

    from dgemma_jax.config import FULL, SLIDING, ModelConfig, SamplerConfig
    from dgemma_jax.diffusion import loop, noise, sampler
    from dgemma_jax.diffusion.trajectory import Record
    from dgemma_jax.nn import cache as kv
    from dgemma_jax.nn import functional, transformer

    config, settings, record = ModelConfig(layer_types=(SLIDING, FULL)), SamplerConfig(), Record.nothing()
    model = transformer.abstract(config)
    cache = jax.eval_shape(lambda: kv.empty(config, 1, context, jnp.bfloat16))
    chip = jax.sharding.SingleDeviceSharding(targets.devices("h200")[0])

    def lower(traced):
        return traced.lower(lowering_platforms=("cuda",)).compile()

    def there(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), tree)

    if name == "prefill":
        tokens, valid = (jax.ShapeDtypeStruct((1, CHUNK), kind) for kind in (jnp.int32, bool))
        return lower(functional._prefill.trace(*there((model, tokens, valid, cache)))), model, cache

    def before():
        keys, none = noise.row_keys(jnp.zeros(1, jnp.uint32)), jnp.zeros(1, bool)
        return sampler.start(keys, jnp.zeros(1, jnp.int32), none, config.canvas_length, model)

    state = jax.eval_shape(before)
    buffers = jax.eval_shape(lambda m, s, c: loop.empty_buffers(m, s, c, settings, None, record), model, state, cache)
    model, state, cache, buffers, index = there((model, state, cache, buffers, jax.ShapeDtypeStruct((), jnp.int32)))
    traced = loop._while.trace(model, state, cache, buffers, settings, None, index, index, record=record)
    return lower(traced), model, cache


def results_in_loops(text: str) -> list[tuple[str, str]]:
    """(shape, operation) of everything that a `while` body writes to memory; what is fused away is left out."""
    bodies: dict[str, list[tuple[str, str, str]]] = {}
    inside = ""
    for line in text.splitlines():
        if opening := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            inside = opening[1]
            bodies[inside] = []
        elif step := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.+?) ([\w\-]+)\((.*)$", line):
            bodies[inside].append(step.groups())

    def written(name: str) -> list[tuple[str, str]]:
        found = []
        for shape, operation, rest in bodies.get(name, []):
            called = re.findall(r"(?:body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)", rest)
            called += re.findall(r"%?([\w.\-]+)", (re.findall(r"branch_computations=\{(.*?)\}", rest) or [""])[0])
            if operation in ("while", "call", "conditional", "async-start"):
                found += [step for each in called for step in written(each)]
            elif operation not in ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"):
                found.append((shape, operation))
        return found

    loops = {
        body
        for steps in bodies.values()
        for _, operation, rest in steps
        if operation == "while"
        for body in re.findall(r"body=%?([\w.\-]+)", rest)
    }
    return [step for body in sorted(loops) for step in written(body)]


def main(name: str, context: str) -> None:
    import jax

    program, model, cache = compiled(name, int(context))
    memory, text = program.memory_analysis(), program.as_text()
    found = {
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "cache": sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache.layers)),
        "weights": sorted({x.shape for x in jax.tree.leaves(model)}),
        "written": [shape for shape, _ in results_in_loops(text)],
        "products": re.findall(r"= (\S+) dot\(", text),
    }
    print(json.dumps(found))


# --- in the test


@functools.cache
def figures(name: str, context: int) -> dict:
    if reason := targets.missing("h200"):
        pytest.skip(reason)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | targets.environment("h200") | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, __file__, name, str(context)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def written(found: dict) -> collections.Counter:
    """How often a step writes an array of so many elements, by dtype."""
    arrays = [each for shape in found["written"] for each in re.findall(r"[a-z]+\d+\w*\[[\d,]*\]", shape)]
    return collections.Counter((each.split("[")[0], arrays_of(each)[0][0]) for each in arrays)


@pytest.mark.slow
def test_a_step_writes_one_array_of_canvas_and_vocabulary_in_float32():
    """The logits; the probabilities exist once too, in the dtype of the table."""
    seen = written(figures("step", NEAR))
    assert seen["f32", CANVAS * VOCABULARY] == 1 and seen["bf16", CANVAS * VOCABULARY] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("keys", [1023 + 1 + CANVAS, NEAR + CANVAS])
def test_a_step_writes_scores_once_and_weights_once(keys):
    """Keys of the sliding layer, filled up to a multiple of eight, and of the full one."""
    seen = written(figures("step", NEAR))
    assert seen["f32", HEADS * CANVAS * keys] == 1 and seen["bf16", HEADS * CANVAS * keys] == 1


@pytest.mark.slow
def test_a_step_copies_no_weight():
    """None as it is, and none turned: the output projection once was, 0.8 GB in each step of the release."""
    found = figures("step", NEAR)
    matrices = [size for size in found["weights"] if len(size) > 1]
    forms = {tuple(sorted(form)) for o, *rest in matrices for form in ((o, *rest), (o, math.prod(rest)))}
    forms |= {tuple(sorted((math.prod(rest), last))) for *rest, last in matrices}
    sizes = [
        tuple(sorted(int(n) for n in each.split(",") if n != "1"))
        for shape in found["written"]
        for each in re.findall(r"\[([\d,]+)\]", shape)
    ]
    assert (16, 512, 2816) in forms and not forms & set(sizes), forms & set(sizes)


@pytest.mark.slow
def test_products_of_one_operand_are_one():
    """XLA joins queries, keys and values (8,192 and 9,216 rows) and gate with up (4,224): no layout has to."""
    sizes = [
        set(map(int, re.search(r"\[([\d,]*)\]", shape)[1].split(","))) for shape in figures("step", NEAR)["products"]
    ]
    assert sum(8192 in each for each in sizes) == 1 and sum(9216 in each for each in sizes) == 1
    assert sum(4224 in each for each in sizes) == 3 and not any(2112 in each for each in sizes)  # self-conditioning too


@pytest.mark.slow
def test_a_step_at_the_whole_context_reads_the_cache_where_it_lies():
    found = figures("step", FAR)
    assert found["temporaries"] <= 0.6e9, found["temporaries"]
    assert max(elements for _, elements in written(found)) <= CANVAS * VOCABULARY  # a layer's cache has four times that


@pytest.mark.slow
@pytest.mark.parametrize("context", [NEAR, FAR])
def test_a_piece_of_prompt_needs_little_memory_and_writes_into_its_cache(context):
    found = figures("prefill", context)
    assert found["temporaries"] <= 1.2e9, found["temporaries"]
    assert found["aliased"] >= found["cache"]


if __name__ == "__main__":
    main(*sys.argv[1:])
