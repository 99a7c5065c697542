"""`dgemma bench`: what it counts, what it keeps, how it goes on. Nothing here is timed."""

from __future__ import annotations

import io
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dgemma_jax.bench import items, lines, roofline, run, table, work
from dgemma_jax.bench.items import Contestant, Item
from dgemma_jax.config import ModelConfig
from dgemma_jax.nn import transformer

TINY = work.Work.of("tiny")


# --- what a machine must do at the least


def test_the_roofline_of_the_release():
    """GB, TFLOP and ms on an H200 (4.3 TB/s, 788 TFLOP/s) as calculated by hand, activations left out here."""
    config = ModelConfig()
    cases = [
        (roofline.step(config, 1, 4096, 2), 55.6, 2.66, 13.6),
        (roofline.step(config, 8, 4096, 2), 80.8, 21.3, 34.5),
        (roofline.prefill(config, 1, 256, 4096, 2), 50.8, 1.9, 12.3),
        (roofline.prefill(config, 1, 1024, 0, 2), 54, 6.6, 16.2),
    ]
    for parts, gigabytes, teraflops, milliseconds in cases:
        assert sum(p.bytes for p in parts) / 1e9 == pytest.approx(gigabytes, rel=0.17)
        assert sum(p.bytes for p in parts) / 1e9 <= gigabytes
        assert sum(p.flops for p in parts) / 1e12 == pytest.approx(teraflops, rel=0.06)
        assert 1e3 * roofline.seconds(parts, 4.3e12, 788e12) == pytest.approx(milliseconds, rel=0.07)


def test_parts_of_the_roofline():
    assert roofline.seconds([roofline.Part(10, 1), roofline.Part(1, 30)], 5, 10) == 2 + 3
    one, few = (roofline.experts(ModelConfig(), tokens, 2) for tokens in (1, 4096))
    assert few.bytes == pytest.approx(16 * one.bytes, rel=1e-6)  # 8 of 128 experts, and all of them
    assert few.flops == 4096 * one.flops
    ring = [sum(p.bytes for p in roofline.step(ModelConfig(), 1, n, 2)) for n in (4096, 8192)]
    assert ring[1] - ring[0] == 5 * 2 * 4096 * 2 * 512 * 2  # only full layers hold more than a window


def test_random_models_are_of_their_size_and_dtype():
    config = ModelConfig.tiny(embed_dim=64, expert_dim=32, num_experts=8)
    model = work.random_model(config, "bfloat16", seed=1)
    like = transformer.abstract(config, jnp.bfloat16)
    assert jax.tree.structure(model) == jax.tree.structure(like)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(model)] == [(x.shape, x.dtype) for x in jax.tree.leaves(like)]
    layer = model.layers[0]
    for weight, inputs in ((layer.attention.o, 4 * 8), (layer.experts.down, 32), (layer.mlp.gate, 64)):
        assert float(jnp.std(weight[...].astype(jnp.float32))) * inputs**0.5 == pytest.approx(1, rel=0.1)
    assert (np.asarray(layer.denoise_scalar[...]) == 1).all()


def test_the_work_fits_the_model():
    config = ModelConfig.tiny(max_position_embeddings=40)
    fitted = work.Work.of("medium", config, "bfloat16")
    assert fitted.contexts == fitted.prefills == (28,) and fitted.dtype == "bfloat16"
    assert work.Work.of("release").contexts[0] == 4096
    config, dtype = run._of_model("nano")
    assert config.canvas_length == 24 and dtype == "float32"
    with pytest.raises(ValueError, match="unknown size 'large'; known are tiny, medium, release"):
        work.Work.of("large")


# --- items


@pytest.mark.heavy
def test_parts_of_a_step_are_those_of_the_model():
    lab = items.Lab(TINY)
    (head,) = items.head(lab)
    assert head.call().shape == (1, 8, TINY.config.vocab_size)
    (soft,) = items.soft_embedding(lab)
    assert soft.call().shape == (1, 8, 32)
    forms = {c.name: c.call() for c in items.experts(lab, 8) if c.name in ("dense", "blocks")}
    np.testing.assert_allclose(forms["dense"], forms["blocks"], atol=1e-5)
    (near,) = items.attention(lab, "sliding_attention", 16)
    (far,) = items.attention(lab, "full_attention", 32)
    assert near.call().shape == far.call().shape == (1, 8, 32) and far.at == {"context": 32}


@pytest.mark.slow
def test_every_item_runs(tmp_path):
    """At the tiny size, in this process, with captures; the file then holds a row for each contestant."""
    import interp

    settings = run.Settings(out=tmp_path / "r.jsonl", size="tiny", runs=2, item_seconds=0)
    run.measure(settings, "own", interp.capture)
    found = lines.read(settings.out)
    assert list(found.items) == [item.name for item in items.items(TINY)]
    failed = [(item, row) for item, row in table.rows(found) if "error" in row and row["by"] not in ("mosaic", "ragged")]
    assert not failed
    assert [row["by"].split(",")[0] for row in found.items["generation"]] == ["diffusion"] * 3 + ["autoregression"]
    assert all(row["tokens"] == 8 for row in found.items["generation"])


# --- the file of results


def test_a_line_that_was_cut_off_is_left_out_and_overwritten(tmp_path):
    path = tmp_path / "deep" / "r.jsonl"
    assert lines.read(path).header is None
    lines.append(path, {"header": {"size": "tiny"}})
    lines.append(path, {"item": "a", "rows": [], "peak_gb": 1.5})
    with open(path, "ab") as file:
        file.write(b'{"item": "b", "ro')
    assert list(lines.read(path).items) == ["a"] and lines.read(path).peak_gb == {"a": 1.5}
    lines.append(path, {"begin": "c", "by": "x"})
    assert lines.read(path).begun == ("c", "x")
    path.write_text('{"header": {}}\n{"ite\n{"item": "a", "rows": []}\n')
    with pytest.raises(ValueError, match=r"r.jsonl, line 2: no line of benchmark results"):
        lines.read(path)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """`measure` over three items that need no model; `calls` says which ran."""
    calls: list[str] = []

    def contestant(name, fail=False):
        def call():
            calls.append(name)
            if fail:
                raise RuntimeError("no such kernel\nand more")

        return Contestant(name=name, call=call, work=[roofline.Part(1, 1)])

    def broken(_):
        raise MemoryError("too large")

    built = [
        Item(items.COPY, lambda _: [contestant("copy")]),
        Item("pair", lambda _: [contestant("good"), contestant("bad", fail=True)]),
        Item("broken", broken),
    ]
    monkeypatch.setattr(items, "items", lambda work: built)

    def measure(**options):
        calls.clear()
        settings = run.Settings(**{"out": tmp_path / "r.jsonl", "size": "tiny", "runs": 3} | options)
        run.measure(settings, "own")
        return lines.read(settings.out), list(calls)

    return measure


def test_results_are_kept_item_by_item_and_a_second_run_goes_on(fake, tmp_path):
    found, calls = fake()
    assert list(found.items) == [items.COPY, "pair", "broken"] and calls.count("good") == 1 + 3
    good, bad = found.items["pair"]
    assert len(good["seconds"]) == 3 and bad["error"] == "RuntimeError: no such kernel"
    assert found.items["broken"] == [{"by": "", "error": "MemoryError: too large"}]
    assert {"date", "device", "machine", "versions", "load"} <= found.header.keys()
    path = tmp_path / "r.jsonl"
    kept = path.read_bytes()
    assert fake()[1] == [] and path.read_bytes() == kept
    path.write_bytes(b"".join(line for line in kept.splitlines(True) if b'"item": "pair"' not in line))
    lines.append(path, {"died": "pair", "by": "good", "why": "the process died: signal SIGABRT"})
    found, calls = fake()
    assert calls == ["bad"] and "SIGABRT" in found.items["pair"][0]["error"]


def test_what_is_chosen_and_what_is_refused(fake, tmp_path):
    assert list(fake(only=("broken",))[0].items) == [items.COPY, "broken"]  # ceilings always
    assert fake(out=tmp_path / "late.jsonl", deadline=time.time() - 1)[0].items == {}
    with pytest.raises(ValueError, match=r"no item's name contains \['nothing'\]; items are: .*pair"):
        fake(only=("nothing",))
    path = tmp_path / "r.jsonl"
    header, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps({"header": json.loads(header)["header"] | {"size": "release"}}) + "\n" + rest)
    with pytest.raises(ValueError, match="results of another run .size: release, now tiny.; give another --out"):
        fake()


DYING = """
import os, sys
from pathlib import Path
from dgemma_jax.bench import lines
out, stage = Path(sys.argv[1]), sys.argv[3]
found = lines.read(out)
if found.header is None:
    lines.append(out, {"header": {"items": ["a", "b"]}})
if stage == "own" and not found.died:
    lines.append(out, {"begin": "a", "by": "risky"})
    os.abort()
if stage == "own":
    lines.append(out, {"item": "a", "rows": [{"by": "risky", "error": found.died["a", "risky"]}]})
else:
    lines.append(out, {"item": "b", "rows": []})
"""


def test_a_process_that_dies_loses_what_it_tried_and_nothing_else(tmp_path):
    out, said = tmp_path / "r.jsonl", []
    run.run(run.Settings(out=out), [sys.executable, "-c", DYING, str(out)], lambda *state: said.append(state))
    found = lines.read(out)
    assert list(found.items) == ["a", "b"]
    assert found.items["a"][0]["error"] == "the process died: signal SIGABRT"
    assert said[-1] == (2, 2, "")
    with pytest.raises(RuntimeError, match="ended with code 3 before it timed anything"):
        run.run(run.Settings(out=out), [sys.executable, "-c", "raise SystemExit(3)"], lambda *_: None)


def test_a_process_ends_at_the_deadline(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    began = time.time()
    run.run(run.Settings(out=tmp_path / "r.jsonl", deadline=began + 1), command, lambda *_: None)
    assert time.time() - began < 20


# --- the tables


def row(by, *seconds, **fields):
    return {"by": by, "seconds": list(seconds), "first": 1.0, "count": 1, "tokens": None, "at": {}, "work": []} | fields


@pytest.fixture
def results():
    found = lines.Lines({"date": "2026-11-22", "size": "tiny", "versions": {"jax": "1"}}, {}, {}, None)
    found.items.update(
        {
            items.COPY: [row("x + 1", 2.0, 1.0, work=[[100, 0]])],
            items.MATMUL: [row("x @ x", 1.0, work=[[0, 50]])],
            "step, batch 1": [row("in the loop", 4.0, count=2, at={"batch": 1, "context": 16}, work=[[100, 0], [0, 50]])],
            "step, batch 2": [row("in the loop", 6.0, count=2, at={"batch": 2, "context": 16})],
            "step, context 32": [row("in the loop", 5.0, count=2, at={"batch": 1, "context": 32})],
            "experts, 8 tokens": [{"by": "mosaic", "error": "no [sm90]"}],
            "generation": [
                row("diffusion, 2 steps", 2.0, 2.0, tokens=8, at={"steps": 2}),
                row("diffusion, 2 steps, all residuals captured", 3.0, tokens=8),
                row("autoregression, same weights", 5.0, tokens=8),
            ],
            "against transformers, step": [row("dgemma_jax", 1.0), row("transformers, eager", 4.0)],
        }
    )
    return found


def shown(renderable):
    console = Console(width=200, file=io.StringIO())
    console.print(renderable)
    return [" ".join(line.replace("│", " ").split()) for line in console.file.getvalue().splitlines()]


def test_times_stand_beside_the_least_that_the_ceilings_allow(results):
    assert table.ceilings(results) == (100, 50)
    body = shown(table.results(results))
    assert "step, batch 1 in the loop 2000 2000 1 5e-08 2.5e-11 1000 50%" in body  # a second each, of two steps
    assert "experts, 8 tokens mosaic no [sm90]" in body
    assert "generation diffusion, 2 steps 2000 2000 1 4" in body
    assert table.ceilings(lines.Lines({}, {}, {}, None)) is None and "size tiny" in table.title(results)


def test_scaling_and_ratios(results):
    body = shown(table.scaling(results))
    for line in (
        "step batch 1 2000 1.00", "step batch 2 3000 1.50", "step context 16 2000 1.00", "step context 32 2500 1.25",
        "generation steps 2 2000 1.00", "generation no captures 2000 1.00", "generation all residuals 3000 1.50",
    ):  # fmt: skip
        assert line in body, (line, body)
    assert table.ratios(results) == [
        "diffusion, 2 steps: 2.50 x the tokens/s of autoregression",
        "against transformers, step: 4.00 x the speed of transformers, eager",
    ]
