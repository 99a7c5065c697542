"""The benchmark of sweeps runs, and both sides find the same effects. Nothing here is timed."""

import pytest

from dgemma_jax.bench import peer, report
from interp import bench_patching

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def case():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return bench_patching.mid(peer.Sizes.tiny(), positions=3)


def test_it_compares_the_same_sweep(case):
    found = bench_patching.compare(case, "tiny", runs=1, threads=1)
    assert found.settings["interventions"] == 3 * 2 and found.settings["largest_difference"] <= 2e-3
    assert [row.task for row in found.rows[::2]] == [bench_patching.ONE, bench_patching.ROWS]
    assert all(found.ratio(row) > 0 for row in found.rows[::2])
    assert bench_patching.rates(found).count("a second") == len(found.rows) == 4
    assert isinstance(found, report.Report)


def test_other_effects_are_refused(case, monkeypatch):
    wrong = {bench_patching.ONE: lambda: 1 + bench_patching.ours(case)[bench_patching.SITE][..., 0]}
    monkeypatch.setattr(bench_patching, "hooked", lambda case: wrong)
    with pytest.raises(ValueError, match="effects differ"):
        bench_patching.compare(case, "tiny", runs=1, threads=1)
