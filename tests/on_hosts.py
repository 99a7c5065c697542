"""One of two processes on this machine, two devices each. `python on_hosts.py PROCESS PORT DIRECTORY`; see test_hosts."""

import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import tensorstore

import dgemma_jax as dg
import interp
from dgemma_jax import hosts
from dgemma_jax.weights import orbax

STUDY = dict(seeds=2, batch=2, max_new_tokens=8)
PROMPTS = ["copy : a b", "sort : c a b d e", "copy : a", "reverse : b c"]


def bytes_read():
    """By Orbax, so far."""
    found = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for one in found for value in one["values"])


def load(directory, mesh):
    """Each process reads its own half of the experts; all find out what one has seen."""
    fetched, real = {}, jax.make_array_from_callback

    def spy(shape, sharding, fetch):
        def told(index):
            part = fetch(index)
            fetched.setdefault(shape, {})[len(fetched), str(index)] = part.nbytes
            return part

        return real(shape, sharding, told)

    jax.make_array_from_callback = spy
    bundle = dg.load(directory / "hf", mesh=mesh)
    jax.make_array_from_callback = real
    experts = bundle.model.layers[0].experts.gate_up
    assert set(fetched[experts.shape].values()) == {experts.size * 4 // 2}
    assert len({index for _, index in fetched[experts.shape]}) == 1, "the other half was read too"
    assert {shard.data.shape[0] for shard in experts[...].addressable_shards} == {3}
    try:
        dg.load(directory / "bad", mesh=mesh)
    except ValueError as error:
        assert "non-finite" in str(error)
    else:
        raise AssertionError("infinities of the other process were loaded")

    orbax.CHUNK = 1 << 12
    dg.save(bundle, directory / "orbax", "orbax")

    def read(mesh):
        before = bytes_read()
        again = dg.load(directory / "orbax", mesh=mesh)
        return again, bytes_read() - before

    again, some = read(mesh)
    _, every = read(hosts.mesh({"data": 4}))
    print("read", some, "of", every, flush=True)
    for a, b in zip(jax.tree.leaves(bundle.model), jax.tree.leaves(again.model), strict=True):
        for one, other in zip(a.addressable_shards, b.addressable_shards, strict=True):
            np.testing.assert_array_equal(one.data, other.data)
    return bundle


def main(process, port, directory):
    hosts.start(f"localhost:{port}", 2, process, timeout=120)
    assert jax.process_count() == 2 and len(jax.local_devices()) == 2 and len(jax.devices()) == 4
    mesh = hosts.mesh({"data": 2, "expert": 2})  # rows over the hosts
    assert {d.process_index for d in hosts.mesh({"expert": 2}).devices.flat} == {process}, "a mesh of this host"
    bundle = load(directory, hosts.mesh({"expert": 2, "tensor": 2}))
    for each in (bundle, dg.load(directory / "hf", mesh=mesh)):
        out = dg.generate(each, [[5, 6, 7], [9, 10]], seed=[3, 4], max_new_tokens=9)
        np.save(directory / f"tokens-{process}.npy", out.tokens)
        assert (out.tokens == np.load(directory / "alone.npy")).all()
    found = interp.study("order", bundle, PROMPTS, directory / "together", **STUDY, progress=False)
    assert len(found) == 8 and not found.missing
    # each a model and a share of its own, with one directory
    own = dg.load(directory / "hf")
    found = interp.study("order", own, PROMPTS, directory / "shared", **STUDY, progress=False)
    print("shared", len(found), found.missing, flush=True)


def alone(directory, host, kill):
    """One of two hosts that know nothing of each other; ends in the midst of its second part if told to."""
    from interp.studies import columns

    replace, left = os.replace, 2

    def interrupted(part, path):
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(part, path)

    if kill:
        columns.os = type("os", (), {"replace": staticmethod(interrupted)})
    bundle = dg.load(directory / "hf")
    found = interp.study("order", bundle, PROMPTS, directory / "split", **STUDY, hosts=2, host=host, progress=False)
    print(len(found), found.missing)


if __name__ == "__main__":
    if sys.argv[1] == "alone":
        alone(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "kill")
    else:
        main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
