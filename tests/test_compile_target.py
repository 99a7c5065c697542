"""The released size, compiled for an H200 that is not there: memory, and what the loop copies.

XLA compiles for a GPU from a description of it, so what the 26B program would need can be read without the device. A
subprocess does it, since JAX must be told before it starts. Without the CUDA build of JAX the tests are skipped.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CONTEXT = 4096
LARGE = 100_000_000  # bytes
RECORDS = ("default", "nothing")
FORMS = ("int8", "fp8")
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  device_memory_size: 150754820096
  l2_cache_size: 62914560
  dnn_version: "9.28.0"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
"""


# --- in the subprocess


def compiled_loop(record_name: str, form: str | None):
    """The denoising loop of the release, batch 1, context 4,096, for one H200; its weights packed if asked."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from dgemma_jax.config import ModelConfig, SamplerConfig
    from dgemma_jax.diffusion import loop, noise, sampler
    from dgemma_jax.diffusion.trajectory import Record
    from dgemma_jax.nn import cache as kv
    from dgemma_jax.nn import quantized, transformer

    config, settings = ModelConfig(), SamplerConfig()
    record = Record() if record_name == "default" else Record.nothing()
    model = transformer.abstract(config)
    if form:
        model = quantized.quantized(model, form)
    cache = jax.eval_shape(lambda: kv.empty(config, 1, CONTEXT, jnp.bfloat16))

    def before():
        keys, none = noise.row_keys(jnp.zeros(1, jnp.uint32)), jnp.zeros(1, bool)
        return sampler.start(keys, jnp.zeros(1, jnp.int32), none, config.canvas_length, model)

    state = jax.eval_shape(before)
    buffers = jax.eval_shape(
        lambda m, s, c: loop.empty_buffers(m, s, c, settings, None, record), model, state, cache
    )
    index = jax.ShapeDtypeStruct((), jnp.int32)
    topology = topologies.get_topology_desc("h200", "cuda", topology="1x1x1", target_config=H200)
    chip = jax.sharding.SingleDeviceSharding(topology.devices[0])
    arrays = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), (model, state, cache, buffers, index)
    )
    model, state, cache, buffers, index = arrays
    traced = loop._while.trace(model, state, cache, buffers, settings, None, index, index, record=record)
    return model, traced.lower(lowering_platforms=("cuda",)).compile()


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


def arrays_of(shape: str) -> list[tuple[int, int]]:
    """(elements, bytes) of each array of a printed shape."""
    found = []
    for kind, sizes in re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", shape):
        count = math.prod(int(size) for size in sizes.split(",") if size)
        bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
        found.append((count, count * bits // 8))
    return found


def main(record_name: str, form: str | None = None) -> None:
    import jax

    model, program = compiled_loop(record_name, form)
    memory = program.memory_analysis()
    large = [
        [elements, size, operation, shape]
        for shape, operation in results_in_loops(program.as_text())
        for elements, size in arrays_of(shape)
        if size >= LARGE
    ]
    sizes = sorted({math.prod(x.shape) for x in jax.tree.leaves(model)})
    print(
        json.dumps(
            {
                "jax": jax.__version__,
                "temporaries": memory.temp_size_in_bytes,
                "arguments": memory.argument_size_in_bytes,
                "large": large,
                "weights": sizes,
            }
        )
    )


# --- in the test


def missing() -> str | None:
    """Why programs for a GPU cannot be compiled here, or None."""
    for cuda in (13, 12):
        try:
            importlib.metadata.version(f"jax-cuda{cuda}-plugin")
            importlib.metadata.version(f"jax-cuda{cuda}-pjrt")
        except importlib.metadata.PackageNotFoundError:
            continue
        return None
    return "the CUDA build of JAX is not installed (pip install 'jax[cuda13]'; no GPU is needed)"


@functools.cache
def figures(record_name: str, form: str | None = None) -> dict:
    if reason := missing():
        pytest.skip(reason)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, __file__, record_name, *([form] if form else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("record_name", RECORDS)
def test_loop_needs_little_memory_beside_weights_and_cache(record_name):
    found = figures(record_name)
    assert 50e9 < found["arguments"] < 52e9  # the whole model is there
    assert found["temporaries"] <= 0.5e9, found


@pytest.mark.slow
@pytest.mark.parametrize("record_name", RECORDS)
def test_loop_writes_nothing_as_large_as_a_weight(record_name):
    """All that is large in a step are logits and probabilities, [256, V]."""
    found = figures(record_name)
    from dgemma_jax.config import ModelConfig

    logits = ModelConfig().canvas_length * ModelConfig().vocab_size
    assert logits not in found["weights"]
    assert {elements for elements, *_ in found["large"]} <= {logits}, found["large"]
    assert not [row for row in found["large"] if row[2] in ("copy", "transpose")], found["large"]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_packed_weights_stay_packed(form):
    """The conversion is part of the products: half the memory, and no unpacked copy in the loop or before it."""
    found = figures("nothing", form)
    assert 25e9 < found["arguments"] < 26.5e9
    assert found["temporaries"] <= 0.5e9, found
    from dgemma_jax.config import ModelConfig

    logits = ModelConfig().canvas_length * ModelConfig().vocab_size
    assert {elements for elements, *_ in found["large"]} <= {logits}, found["large"]


@pytest.mark.slow
def test_four_bits_fit_an_l4():
    """Groups are unpacked a few weights at a time, which costs speed and 5.4 GB: 19.5 of its 24 GB in all."""
    found = figures("nothing", "int4")
    assert found["arguments"] < 14.5e9 and found["arguments"] + found["temporaries"] < 0.92 * 24e9, found


def test_reading_of_programs():
    text = """
%inner (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %c = f32[4]{0} copy(%p)
}

%body (s: (f32[4], s32[])) -> (f32[4], s32[]) {
  %s = (f32[4]{0}, s32[]) parameter(0)
  %a = f32[4]{0} get-tuple-element(%s), index=0
  %b = (bf16[2,8]{1,0}, pred[3]{0}) fusion(%a), kind=kLoop, calls=%inner
  %d = f32[4]{0} call(%a), to_apply=%inner
  ROOT %t = (f32[4]{0}, s32[]) tuple(%d, %a)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %outside = f32[4]{0} copy(%x)
  ROOT %w = (f32[4]{0}, s32[]) while(%outside), condition=%other, body=%body
}
"""
    assert results_in_loops(text) == [("(bf16[2,8]{1,0}, pred[3]{0})", "fusion"), ("f32[4]{0}", "copy")]
    assert arrays_of("(bf16[2,8]{1,0}, pred[3]{0})") == [(16, 32), (3, 3)]


if __name__ == "__main__":
    main(*sys.argv[1:])
