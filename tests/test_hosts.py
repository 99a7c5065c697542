"""Many hosts, as processes of this machine: one model over two, and a study whose prompts are shared out."""

import itertools
import re
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
from on_hosts import PROMPTS, STUDY
from test_meshes import HERE, finished, on_devices

import dgemma_jax as dg
import interp
from dgemma_jax.weights import tree as trees
from interp.studies.hosts import Share

PROGRAM = HERE / "on_hosts.py"


def files(directory):
    kept = [p for p in sorted(directory.rglob("*")) if p.is_file()]
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in kept}


@pytest.fixture(scope="module")
def hf(organism, tmp_path_factory):
    """The model under the name that the processes have for it, which a manifest keeps."""
    return Path(shutil.copytree(organism, tmp_path_factory.mktemp("model") / "hf"))


@pytest.fixture(scope="module")
def bundle(hf):
    return dg.load(hf)


@pytest.fixture(scope="module")
def whole(bundle, tmp_path_factory):
    """The study as one process makes it."""
    out = tmp_path_factory.mktemp("whole")
    interp.study("order", bundle, PROMPTS, out, **STUDY, progress=False)
    return out


def test_parts_are_dealt_out_once(bundle):
    shares = [Share.of(bundle, 3, host).mine(range(8)) for host in range(3)]
    assert sorted(itertools.chain(*shares)) == list(range(8)) and max(map(len, shares)) == 3
    assert Share.of(bundle) == Share(0, 1) and Share.of(bundle).writes
    for bad in ((3, None), (None, 0), (3, 3), (0, 0)):
        with pytest.raises(ValueError, match="needed are hosts >= 1 and host in"):
            Share.of(bundle, *bad)


@pytest.mark.heavy
def test_hosts_share_a_study_and_a_lost_one_is_made_good(bundle, whole, tmp_path, monkeypatch):
    """Host 1 dies in its second part. Host 0 gives what is there; host 1 again makes that part alone, and joins all."""
    made, real = [], dg.stream
    monkeypatch.setattr("interp.studies.running.dg.stream", lambda *a, **k: made.append(len(a[1])) or real(*a, **k))

    def host(number):
        return interp.study("order", bundle, PROMPTS, tmp_path, **STUDY, hosts=2, host=number, progress=False)

    lost = host(1)
    assert (len(lost), lost.missing) == (4, 4) and not (tmp_path / "summary.txt").exists()
    assert "4 are yet to be made" in repr(lost)
    with pytest.raises(ValueError, match="no whole study"):
        lost.save(tmp_path / "elsewhere")
    (tmp_path / "parts" / "00003.npz").rename(tmp_path / "parts" / "00003.abcd.part.npz")  # half way
    (tmp_path / "parts" / "00000.abcd.part.npz").write_bytes(b"")  # host 0 is at work
    assert host(0).missing == 2 and sum(made) == 8
    assert not (tmp_path / "parts" / "00000.abcd.part.npz").exists()
    assert host(1).missing == 0 and sum(made) == 10
    assert files(tmp_path) == files(whole)


@pytest.mark.slow
def test_a_killed_host_is_run_again(hf, whole, tmp_path):
    (tmp_path / "hf").symlink_to(hf)

    def host(number, how="go"):
        return on_devices(1, PROGRAM, "alone", tmp_path, number, how)

    both = [host(0), host(1, "kill")]
    finished(both[0])
    both[1].communicate(timeout=600)
    assert both[1].returncode == -signal.SIGKILL
    parts = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "split" / "parts").glob("0000?.npz")}
    assert len(parts) == 3
    assert finished(host(1)).split() == ["8", "0"]
    again = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "split" / "parts").glob("0000?.npz")}
    assert parts.items() < again.items() and files(tmp_path / "split") == files(whole)


@pytest.mark.slow
def test_two_processes_hold_one_model(hf, bundle, whole, tmp_path):
    (tmp_path / "hf").symlink_to(hf)
    leaves = trees.leaves(bundle.model)
    place = ("layers", 0, "experts", "gate_up")
    broken = leaves | {place: leaves[place].at[-1, 0, 0].set(np.inf)}  # lies with process 1
    dg.save(bundle.with_model(trees.replace(bundle.model, broken)), tmp_path / "bad", check_finite=False)
    alone = dg.generate(bundle, [[5, 6, 7], [9, 10]], seed=[3, 4], max_new_tokens=9)
    np.save(tmp_path / "alone.npy", alone.tokens)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [on_devices(2, PROGRAM, process, port, tmp_path) for process in (0, 1)]
    said = [finished(process, 900) for process in both]
    together, one = (interp.Study.load(where) for where in (tmp_path / "together", whole))
    assert together["text"] == one["text"] and together["id"] == one["id"]  # floats are summed in another order
    assert files(tmp_path / "shared") == files(whole)
    experts = sum(layer.experts.gate_up.nbytes + layer.experts.down.nbytes for layer in bundle.model.layers)
    for text in said:
        some, every = map(int, re.search(r"read (\d+) of (\d+)", text).groups())
        assert every - some > 0.25 * experts, "half of them; small pieces are read with their neighbours"
