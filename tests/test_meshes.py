"""A model on a mesh gives what it gives on one device; what does not fit is said before anything runs."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import dgemma_jax as dg
from dgemma_jax import hosts, memory
from dgemma_jax.bench import collectives
from dgemma_jax.weights import sharding

HERE = Path(__file__).parent
TINY = dg.ModelConfig.tiny(num_experts=6)


def on_devices(count, *command, env=(), **options):
    """A Python program in a process that sees so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | dict(env)
    return subprocess.Popen(
        [sys.executable, *map(str, command)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finished(process, timeout=1200):
    """Its stdout; its stderr is shown if it failed."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("part", ["generation", "rows", "studies", "steps"])
def test_on_eight_devices(part):
    assert finished(on_devices(8, HERE / "on_meshes.py", part)).strip().endswith("done")


# ---- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(("axes", "said"), [
    (dict(model=2), r"axes \['model'\]; name each axis one of"),
    (dict(expert=4), r"expert has 4 devices, which does not divide 6 experts; give it one of \[1, 2, 3, 6\]"),
    (dict(tensor=7), r"tensor has 7 devices, which divides nothing \(vocabulary 96, heads 4.*all of them: \[2\]"),
    (dict(expert=3, tensor=2, data=5), None),
])  # fmt: skip
def test_meshes_that_do_not_divide(axes, said):
    mesh = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))
    if said is None:
        return sharding.check_sizes(mesh.shape, TINY)
    with pytest.raises(ValueError, match=said):
        sharding.check(mesh, TINY)


def test_a_mesh_larger_than_the_machine():
    with pytest.raises(ValueError, match=r"needs 4096 devices; there are \d+ on 1 host"):
        hosts.mesh({"expert": 4096})
    assert dict(hosts.mesh({"data": 1}).shape) == {"data": 1}


@pytest.mark.parametrize(("given", "said"), [
    (("localhost:1", 2, None), "go together"), (("localhost:1", 2, 2), r"process must be in 0\.\.1"),
])  # fmt: skip
def test_processes_that_do_not_add_up(given, said):
    with pytest.raises(ValueError, match=said):
        hosts.start(*given)


def test_bytes_on_each_device():
    config = dg.ModelConfig()  # the release
    whole = memory.needed(config, "bfloat16")
    assert 50.4e9 < whole.total < 50.6e9 and whole.cache == 0
    mesh = jax.sharding.AbstractMesh((8,), ("tensor",))
    assert 1 < 8 * memory.needed(config, mesh=mesh).total / whole.total < 1.02  # global key heads are whole
    both = jax.sharding.AbstractMesh((4, 2), ("expert", "tensor"))
    assert memory.needed(config, mesh=both).weights < memory.needed(config, mesh=mesh).weights * 1.4
    one, eight = (memory.needed(config, batch=n, context=4096) for n in (1, 8))
    assert 8 * one.cache == eight.cache and abs(one.cache - 294e6) < 5e6
    rows = jax.sharding.AbstractMesh((8,), ("data",))
    assert memory.needed(config, batch=8, context=4096, mesh=rows) == one


def test_what_does_not_fit_is_said_before_it_is_loaded(organism, monkeypatch):
    bundle = dg.load(organism)
    room = memory.weight_bytes(bundle.config, "float32") - 1
    monkeypatch.setattr(memory, "limit", lambda devices: room)
    monkeypatch.setattr("dgemma_jax.bundle.weights.load_hf", lambda *a, **k: pytest.fail("it loads"))
    with pytest.raises(ValueError, match=r"weights in float32 need .* which has .*dtype='bfloat16' needs.*expert=2"):
        dg.load(organism, dtype="float32")
    monkeypatch.undo()
    room = memory.needed(bundle.config, "float32", 4, 16).total
    monkeypatch.setattr(memory, "limit", lambda devices: room)
    assert dg.generate(bundle, [[5, 6]], max_new_tokens=1).tokens.shape[0] == 1
    monkeypatch.setattr("dgemma_jax.diffusion.generate.prefill_prompts", lambda *a: pytest.fail("it runs"))
    with pytest.raises(ValueError, match=r"9 rows of 16 tokens need .* 4 rows at once fit; what fits: .*data=4 needs"):
        dg.generate(bundle, [[5, 6]] * 9, max_new_tokens=1)


def test_the_limit_of_devices():
    class Device:
        process_index = 0

        def __init__(self, limit):
            self.memory_stats = lambda: limit and {"bytes_limit": limit}

    assert memory.limit([Device(5), Device(3)]) == 3 and memory.limit([Device(5), Device(None)]) is None


def test_collectives_of_a_program_text():
    class Compiled:
        def as_text(self):
            return """
  %a = f32[2,8]{1,0} all-reduce(%x), replica_groups={}, metadata={op_name="jit(f)/dot"}
  %b = (bf16[4]{0}, bf16[8]{0}) all-gather-start(%y), dimensions={0}
  %c = bf16[8]{0} all-gather-done(%b)
  %d = (f32[3]{0}, s32[]) all-reduce-start(%p, %q)
  %e = f32[] add(%all-reduce.1, %x)
"""

    found = collectives.listed(Compiled())
    assert [(one.kind, one.nbytes) for one in found] == [("all-reduce", 64), ("all-gather", 16), ("all-reduce", 16)]
    assert found[0].where == "jit(f)/dot" and collectives.totals(found)["all-reduce"] == (2, 80)
