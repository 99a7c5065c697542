"""Weights on a mesh: every device holds its slice, and the whole is what an unsharded load gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P
import test_weights_hf
from test_weights_hf import bundle_of, random_model
from test_weights_orbax import googles, one_scalar, write
from pathlib import Path
from dgemma_jax import bundle as bundles
from dgemma_jax.config import ModelConfig
from dgemma_jax.weights import hf

def assert_same(one, other):  # but for the mesh, which the models know
    test_weights_hf.assert_same(jax.tree.leaves(one), jax.tree.leaves(other))

out = Path(sys.argv[1])
config = ModelConfig.tiny(num_experts=8)
model = one_scalar(random_model(config=config))
bundles.save(bundle_of(model, config), out / "hf", max_shard_size=20_000)
bundles.save(bundle_of(model, config), out / "orbax", "orbax")
write(out / "google", googles(model))

def mesh(shape, names, kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))

def check(place, dtype, m):
    whole = bundles.load(out / place, dtype, config=config)
    split = bundles.load(out / place, dtype, mesh=m, config=config)
    assert_same(whole.model, split.model)
    layer, shape = split.model.layers[0], dict(m.shape)
    tensor = shape.get("tensor", 1)
    expert = shape.get("expert", 1) * tensor  # experts lie along both
    for weight, axis, parts in [
        (layer.experts.gate_up, 0, expert), (layer.experts.down, 0, expert), (split.model.embedder.table, 0, tensor),
        (layer.mlp.gate, 0, tensor), (layer.mlp.down, 1, tensor), (split.model.self_conditioning.up, 0, tensor),
        (layer.attention.q, 0, tensor if tensor < 8 else 1), (layer.attention.o, 1, tensor if tensor < 8 else 1),  # 4 heads do not divide by 8
        (layer.attention.k, 0, tensor if tensor < 8 else 1), (layer.input_norm.weight, 0, 1),  # nor 2 key heads
    ]:
        for shard in weight[...].addressable_shards:
            assert shard.data.shape[axis] * parts == weight.shape[axis], (place, weight.shape, shard.data.shape)

three = mesh((2, 2, 2), ("data", "expert", "tensor"))
meshes = [three, mesh((8,), ("tensor",))]
for place in ("hf", "orbax", "google"):
    check(place, None, three)
check("hf", None, meshes[1])
check("hf", None, mesh((4, 2), ("expert", "data")))
check("hf", None, mesh((2, 2, 2), ("data", "expert", "tensor"), AxisType.Explicit))
hf._ON_HOST = 0
check("hf", "bfloat16", three)
m = meshes[0]
split = bundles.load(out / "hf", mesh=m)
bundles.save(split, out / "hf2"); bundles.save(split, out / "orbax2", "orbax")
assert_same(model, bundles.load(out / "hf2").model)
assert_same(model, bundles.load(out / "orbax2").model)
# in few bits: packed as they are read, saved, and read again, each device its slice
for form in ("int8", "int4"):
    packed = bundles.load(out / "hf", mesh=m, quantize=form)
    bundles.save(packed, out / form, "orbax")
    again = bundles.load(out / form, mesh=m)
    assert_same(bundles.load(out / "hf", quantize=form).model, packed.model)
    assert_same(packed.model, again.model)
    values = again.model.layers[0].experts.down.values[...]
    assert {s.data.shape[0] for s in values.addressable_shards} == {2}, form
    assert {s.data.shape[0] for s in again.model.embedder.table.scale[...].addressable_shards} == {config.vocab_size // 2}
with pytest.raises(ValueError, match=r"axes \\['model'\\]; name each axis one of"):
    bundles.load(out / "hf", mesh=mesh((8,), ("model",)))

# each device reads its slice only
calls = []
real = jax.make_array_from_callback
def spy(shape, sharding, fetch):
    return real(shape, sharding, lambda index: calls.append((shape, fetch(index).shape)) or fetch(index))
jax.make_array_from_callback = spy
bundles.load(out / "hf", mesh=meshes[1])
experts = [part for shape, part in calls if shape == (8, 32, 32)]
assert experts and all(part == (1, 32, 32) for part in experts), experts
print("equal")
"""


@pytest.mark.slow
def test_sharded_load_equals_unsharded_load_on_eight_devices(tmp_path):
    here = Path(__file__).parent
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM, str(tmp_path)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip().endswith("equal")
