"""The benchmarks run, and say what they measured. Nothing here is timed."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest

from dgemma_jax.bench import lines, peer, report, table, throughput


def sample() -> report.Report:
    rows = (
        report.Row(task="step", name="dgemma_jax", seconds=(0.02, 0.01, 0.04), compile_seconds=1.5, goal=1.0),
        report.Row(task="step", name="peer, one way", seconds=(0.05, 0.04, 0.06)),
        report.Row(task="step", name="peer, another", seconds=(0.08, 0.01, 0.09)),
        report.Row(task="alone", name="dgemma_jax", seconds=(1.0,), goal=0.6),
    )
    return report.Report(title="T", rows=rows, settings={"runs": 3}, about=report.surroundings("jax", threads=2))


def test_ratio_is_to_the_fastest_peer_of_the_same_task():
    found = sample()
    assert [found.ratio(row) for row in found.rows] == [pytest.approx(0.02 / 0.05), None, None, None]


def test_table_names_everything():
    table = str(sample())
    for part in ("peer, one way", "20.0", "1.5", "0.40", "<= 1", "threads 2", "jax "):
        assert part in table, part


def test_report_survives_a_file(tmp_path):
    found = sample()
    path = found.save(tmp_path / "deep" / "r.json")
    assert report.Report.load(path) == found
    assert {"date", "machine", "threads", "versions"} <= json.loads(path.read_text())["about"].keys()


def test_contestants_take_turns():
    calls: list[str] = []
    runners = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds, first = report.alternate(runners, runs=3, pause=0)
    assert calls == list("ab" + "ab" + "ba" + "ab")
    assert {k: len(v) for k, v in seconds.items()} == {"a": 3, "b": 3} and first.keys() == seconds.keys()


def test_slow_and_broken_peers_are_left_out(capsys):
    def broken():
        raise NotImplementedError("no such kernel")

    calls = {"quick": lambda: time.sleep(0.01), "slow": lambda: time.sleep(0.2), "broken": broken}
    assert peer.worth_timing(calls) == ["quick"]
    said = capsys.readouterr().out
    assert "slow: 0.2 s" in said and "broken: no such kernel" in said


def test_missing_peer_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"dgemma-jax\[parity\]"):
        peer.compare(peer.Sizes.tiny(), runs=1)


def test_kept_results_can_be_read():
    """Each says when, where and with what it was measured; those of timed runs are reports."""
    for path in report.RESULTS.glob("*.json"):
        kept = json.loads(path.read_text())
        assert {"date", "machine", "versions"} <= set(kept["about"]), path.name
        if "rows" in kept:
            found = report.Report.load(path)
            assert all(row.seconds for row in found.rows) and str(found)


def test_kept_runs_of_dgemma_bench_can_be_read():
    for path in report.RESULTS.glob("bench-*.jsonl"):
        found = lines.read(path)
        assert {"date", "machine", "device", "versions", "load"} <= found.header.keys(), path.name
        assert found.items and table.ceilings(found) and table.results(found).row_count >= len(found.items)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_peer_benchmark_runs(capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found = peer.compare(peer.Sizes.tiny(), runs=1, threads=1)
    ours = [row for row in found.rows if row.name == "dgemma_jax"]
    assert [row.task for row in ours] == [peer.STEP, f"{peer.GENERATION}, 2 steps"]
    assert all(found.ratio(row) > 0 for row in ours)


def test_some_batches_are_drawn_evenly():
    assert throughput.drawn(list(range(32)), 4) == [4, 12, 20, 28]
    assert throughput.drawn([3, 1, 2], 3) == [3, 1, 2]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_peer_is_timed_by_the_prompts_it_answered():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    job = throughput.random_job(peer.Sizes.tiny(), 6, blocks=1, longest=10)
    seconds, work, _ = throughput.compare(job, (2,), (2,), "eager", answered=3, runs=1)
    ours, theirs = work.values()
    assert (ours.prompts, theirs.prompts) == (6, 4)  # whole batches
    assert all(0 < done.needed <= done.computed and done.tokens for done in (ours, theirs))
    assert all(len(taken) == 1 and taken[0] > 0 for taken in seconds.values())


@pytest.mark.parity
def test_both_sides_compute_the_same_on_the_same_weights():
    """The weights that are handed over are the peer's: equal logits, and equal texts token by token."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    import dgemma_jax as dg

    model = peer.random_peer(peer.Sizes.tiny(), seed=3)
    bundle = peer.shared(model, steps=2)
    prompts = [[7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [20, 21]]
    expected = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(5):
            cache = transformers.DynamicCache(config=model.config.get_text_config(decoder=True))
            with torch.no_grad():
                hidden = model.model.encoder(input_ids=torch.tensor([text]), past_key_values=cache).last_hidden_state
                scores = hidden[0, -1] @ model.model.decoder.embed_tokens.weight.T
            text.append(int(scores.argmax()))
        expected.append(text[len(prompt) :])
        canvas = np.arange(8)[None] + 30
        with torch.no_grad():
            logits = model(decoder_input_ids=torch.tensor(canvas), past_key_values=cache).logits
        ours = dg.denoise(bundle, canvas, dg.prefill(bundle, [text[:-1]]).cache)
        np.testing.assert_allclose(ours, logits.numpy(), atol=1e-4)
    bundle = bundle.with_sampler(eos_token_ids=())
    np.testing.assert_array_equal(dg.autoregress(bundle, prompts, 5).tokens, expected)
