"""The `dgemma` command: answers on stdout, facts on stderr, one line for a mistake."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import dgemma_jax as dg
from dgemma_jax import memory
from dgemma_jax.cli import common, generate, main, watch
from dgemma_jax.diffusion.generate import Draft

RELEASE = "google/diffusiongemma-26B-A4B-it"
PROMPT = "sort : d b a c"


@pytest.fixture
def dgemma(monkeypatch, capsys):
    """Runs the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(common, "keep_compiled_programs", lambda: None)

    def run(*args):
        code = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_generate_prints_the_answer_and_nothing_else(dgemma, organism):
    expected = dg.generate(dg.load(organism), PROMPT, seed=3, max_new_tokens=12)
    code, out, err = dgemma("generate", PROMPT, "--model", organism, "--seed", 3, "--max-new-tokens", 12)
    assert (code, out) == (0, expected.texts[0] + "\n")
    assert f"{expected.num_steps[0]} denoising steps" in err


def test_generate_as_json_with_fewer_steps(dgemma, organism):
    args = ("generate", PROMPT, "--model", organism, "--max-new-tokens", 12, "--steps", 2, "--json")
    code, out, _ = dgemma(*args)
    data = json.loads(out)
    assert code == 0 and data["num_steps"] == 2 and len(data["tokens"]) == 12 and data["seed"] == 0
    assert set(data) == {"text", "tokens", "prompt_tokens", "num_steps", "stop_reason", "tokens_per_forward", "seed"}


def test_generate_reads_stdin(dgemma, organism, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    code, out, err = dgemma("generate", "-", "--model", organism)
    assert (code, out) == (2, "") and "prompt 0 is empty" in err


def test_watch_changes_nothing_on_stdout(dgemma, organism):
    args = ("generate", PROMPT, "--model", organism, "--max-new-tokens", 12)
    plain, watched = dgemma(*args), dgemma(*args, "--watch")
    assert plain[:2] == watched[:2]
    assert "accepted" in watched[2] and "mean entropy" in watched[2]


def draft(bundle, words, accepted, block=0, step=0):
    ids = np.array([[bundle.tokenizer.id(word) for word in words]])
    return Draft(block, step, ids, ids, np.array([accepted]), np.full(ids.shape, 0.25), np.array([False]))


def test_the_draft_is_bright_where_accepted_and_ends_at_its_end_token(organism):
    bundle = dg.load(organism)
    accepted = [True, False, False, True, True]
    shown = watch.text(draft(bundle, ["the", "fox", "<eos>", "<eos>", "cat"], accepted), bundle)
    assert shown.plain == "the fox"
    assert [(shown.plain[s.start : s.end], s.style) for s in shown.spans if s.start < s.end] == [
        ("the", "bold"),
        (" fox", "dim"),
    ]


def test_the_view_keeps_earlier_blocks(organism):
    bundle = dg.load(organism)
    console = Console(record=True, width=60, file=io.StringIO())
    with watch.Watch(bundle, console) as view:
        view(draft(bundle, ["red", "cat"], [True, False]))
        view(draft(bundle, ["red", "dog"], [True, True], step=1))
        view(draft(bundle, ["in", "rome"], [False, True], block=1))
    last = console.export_text()
    assert "red dog" in last and "in rome" in last and "red cat" not in last
    assert "block 2  step 1  accepted 1/2  mean entropy 0.250 nats" in last


@pytest.mark.slow
def test_explain_writes_the_page_and_says_where(dgemma, organism, tmp_path):
    page = tmp_path / "new" / "report.html"
    code, out, err = dgemma("explain", "--model", organism, "--out", page, "--max-new-tokens", 12, "--seed", 1)
    assert code == 0, err
    data = json.loads(page.with_suffix(".json").read_text())
    assert data["prompt"]["text"] == "sequence 3 5 with gold for 13" and data["run"]["seed"] == 1
    facts = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split(maxsplit=1)) == 2)
    assert (facts["page"], facts["data"]) == (str(page), str(page.with_suffix(".json")))
    assert int(facts["steps"]) == data["run"]["num_steps"]
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "qwertz", "--model", "{organism}"], "not in this tokenizer's vocabulary: 'qwertz'"),
        (["generate", PROMPT, "--model", "{organism}", "--steps", "0"], "max_denoising_steps"),
        (["generate", PROMPT, "--model", "{organism}", "--seed", "-1"], "seed"),
        (["generate", PROMPT, "--model", "{organism}", "--dtype", "int3"], "dtype must be one of"),
        (["generate", PROMPT, "--model", "no such"], "no directory"),
        (["info", "nowhere/at-all"], "no directory and none of nano"),
        (["convert", "{organism}/config.json", "x"], "is a file"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(dgemma, organism, args, message):
    code, out, err = dgemma(*(arg.format(organism=organism) for arg in args))
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("dgemma: error: ") and message in err and "Traceback" not in err


def test_debug_shows_the_traceback(dgemma):
    with pytest.raises(ValueError, match="no directory"):
        dgemma("info", "nowhere/at-all", "--debug")


@pytest.mark.parametrize(
    "args", [[], ["nothing"], ["generate"], ["info", "--sites", "--tensors"], ["explain", "--out", "page.txt"]]
)
def test_usage_errors(args):
    with pytest.raises(SystemExit, match="2"):
        main(args)


def test_bench_shows_kept_results(dgemma, tmp_path):
    from dgemma_jax.bench import lines

    path = tmp_path / "r.jsonl"
    lines.append(path, {"header": {"date": "2026-11-22", "versions": {"jax": "9.9"}}})
    row = {"by": "logits", "seconds": [0.25, 0.5], "first": 1.0, "count": 1, "tokens": None, "at": {}, "work": []}
    lines.append(path, {"item": "head", "rows": [row]})
    code, out, _ = dgemma("bench", "--show", path)
    assert code == 0 and "jax 9.9" in out and "375" in out
    for args, said in (
        (("--show", tmp_path / "none"), "holds no results of dgemma bench"),
        (("--runs", 1), "--runs must be at least 2"),
        (("--seconds", 0), "--seconds positive"),
    ):
        code, _, err = dgemma("bench", *args)
        assert code == 2 and said in err


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"dgemma {dg.__version__}\n"


def test_info_names_every_text_tensor_of_the_release(dgemma):
    code, out, err = dgemma("info", RELEASE, "--tensors")
    shapes = json.loads(out)
    assert (code, err) == (0, "") and out.count("\n") == 1
    # 1,047 stored tensors, less 351 + 4 of the image tower and its projection; see the release's index.
    assert len(shapes) == 1047 - 356
    assert shapes["model.decoder.embed_tokens.weight"] == [262144, 2816]
    assert shapes["model.decoder.layers.5.self_attn.o_proj.weight"] == [2816, 8192]
    assert shapes["model.decoder.layers.4.self_attn.v_proj.weight"] == [2048, 2816]
    assert "model.decoder.layers.5.self_attn.v_proj.weight" not in shapes
    assert shapes["model.decoder.layers.29.experts.down_proj"] == [128, 2816, 704]
    assert shapes["model.encoder.language_model.layers.29.layer_scalar"] == [1]
    assert sum(np.prod(shape) for shape in shapes.values()) == 25_250_986_782 + 30  # with the encoder's scalars


def test_info_of_the_release_adds_up(dgemma):
    code, out, _ = dgemma("info", RELEASE, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["vision"]
    counts = facts["parameters"]
    total, active = counts.pop("total"), counts.pop("active")
    assert total == sum(counts.values()) == 25_250_986_812 and round(active / 1e9, 1) == 3.8
    assert facts["bytes"]["cache_per_token"] == 5 * 4096  # the sliding layers are rings
    window = 25 * 8192 * 1023
    assert facts["bytes"]["cache"] == {k: window + 20_480 * n for k, n in memory.CONTEXTS.items()}
    assert facts["bytes"]["logits"] == 268_435_456
    assert facts["devices"]["bfloat16"]["A100, H100 80 GB"] == 1 and facts["devices"]["bfloat16"]["A100 40 GB"] == 2
    assert facts["mesh"] is None
    text = dgemma("info", RELEASE)[1]
    assert "25,250,986,812 parameters" in text and "50.5 GB" in text and "not used yet" in text


def test_info_of_a_mesh(dgemma, organism):
    code, out, _ = dgemma("info", organism, "--mesh", "data=4,tensor=2", "--json")
    facts = json.loads(out)
    config = dg.ModelConfig.from_hf(json.loads((organism / "config.json").read_text()))
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "tensor"))
    tokens = min(facts["bytes"]["cache"], key=facts["bytes"]["cache"].get)
    need = memory.needed(config, "int8", 4, int(tokens), mesh)
    assert code == 0 and facts["mesh"]["bytes"]["int8"] == {"weights": need.weights, tokens: need.total}
    assert need.weights < facts["bytes"]["weights"]["int8"] < need.weights * 2
    assert "on each device of data=4, tensor=2" in dgemma("info", organism, "--mesh", "data=4,tensor=2")[1]
    assert "give it one of" in dgemma("info", organism, "--mesh", "expert=5")[2]


def test_info_needs_no_weights(dgemma, organism, tmp_path):
    (tmp_path / "config.json").write_text((organism / "config.json").read_text())
    for flags in ([], ["--json"], ["--tensors"], ["--sites"], ["--sites", "--json"]):
        code, out, err = dgemma("info", tmp_path, *flags)
        with_weights = dgemma("info", organism, *flags)[1]
        assert (code, err) == (0, "")
        assert out.replace(str(tmp_path), "") == with_weights.replace(str(organism), "")
    assert "layers.*.resid_post" in dgemma("info", tmp_path, "--sites")[1]


def test_amounts():
    assert [memory.amount(n) for n in (7, 1500, 2_000_000, 50_501_973_624)] == ["7 B", "1.5 kB", "2.0 MB", "50.5 GB"]


def test_convert_gives_the_same_model(dgemma, organism, tmp_path):
    for format in ("hf", "orbax"):
        code, out, err = dgemma("convert", organism, tmp_path / format, "--format", format, "--dtype", "bfloat16")
        assert (code, out) == (0, "") and str(tmp_path / format) in err
    hf, orbax = (dg.load(tmp_path / format) for format in ("hf", "orbax"))
    assert hf.config == orbax.config == dg.load(organism).config
    assert (hf.model.embedder.table[...] == orbax.model.embedder.table[...]).all()
    assert hf.model.dtype == np.dtype("bfloat16")


def test_a_broken_line_of_a_file_is_named(dgemma, organism, tmp_path):
    path = tmp_path / "cases.jsonl"
    for line, said in (("{", "line 2: no JSON"), ('{"prompt": "a"}', "line 2: needed is an object with prompt, target")):
        path.write_text('{"prompt": "sort : b a", "target": "a"}\n' + line)
        code, _, err = dgemma("faithfulness", organism, "--prompts", path)
        assert code == 2 and said in err


@pytest.mark.slow
def test_the_command_runs_alone_and_keeps_compiled_programs(organism, tmp_path):
    """In a process of its own, from another directory: a quiet second run out of the cache."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(root)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-m", "dgemma_jax", "generate", PROMPT, "--model", organism, "--max-new-tokens", "12"]
    runs = []
    for _ in range(2):
        out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        kept = {p.name for p in (tmp_path / "cache" / "dgemma-jax" / "xla").iterdir() if not p.name.endswith("-atime")}
        runs.append((out.stdout, out.stderr.splitlines(), kept))
    assert runs[0][0] == runs[1][0] and runs[0][2] and runs[0][2] == runs[1][2]
    assert len(runs[1][1]) == 1 and "denoising steps" in runs[1][1][0]


def test_the_cache_of_compiled_programs_can_be_switched_off(dgemma, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    try:
        assert dgemma("info", "--no-compile-cache")[0] == 0
        assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"  # read by processes that are started
        assert jax.config.jax_enable_compilation_cache is False
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert common.cache_directory() == tmp_path / "dgemma-jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for platform, place in (("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "AppData/Local")):
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.delenv("LOCALAPPDATA", raising=False)
        assert common.cache_directory() == tmp_path / place / "dgemma-jax"


def test_summary_names_the_stop(organism):
    out = dg.generate(dg.load(organism), PROMPT, max_new_tokens=12)
    assert ("ended by itself" in generate.summary(out, 1.0)) == (out.stop_reason == ["eos"])


@pytest.mark.slow
def test_audit_harden_and_audit_again(dgemma, organism, tmp_path):
    """From a file of prompts to a hardened checkpoint and its audit; on noise, a word of which counts as a refusal."""
    bundle = dg.load(organism)
    texts = [f"{ask} {verb} a {thing}" for ask in ("how do i", "can i") for verb, thing in
             (("rob", "bank"), ("paint", "box"), ("burn", "lamp"), ("steal", "boat"))]  # fmt: skip
    answers = [dg.generate(bundle, text, seed=i + 1, max_new_tokens=1).texts[0] for i, text in enumerate(texts)]
    word = next(w for w in answers[0].split() if len(w) > 2 and 2 <= sum(w in text for text in answers) <= 6)
    asked, test = tmp_path / "asked.jsonl", tmp_path / "test.jsonl"
    asked.write_text("\n".join(json.dumps({"prompt": text, "label": "harmful" if i % 2 else "harmless"})
                               for i, text in enumerate(texts)))  # fmt: skip
    test.write_text("\n".join(json.dumps({"prompt": f"{text} now", "label": "harmful"}) for text in texts[:4]))
    first, second, third = (tmp_path / name for name in ("first", "hardened", "third"))
    options = ("--refuses", word, "--parts", "", "--batch", 8)
    code, out, _ = dgemma("audit", asked, "--model", organism, "--out", first, *options)
    assert code == 0 and "What it does" in out and (first / "audit.html").exists()
    told = json.loads((first / "audit.json").read_text())
    assert [row["answer"] for row in told["prompts"]] == answers

    args = ("harden", first, "--model", organism, "--train-steps", 2, "--rows", 4)
    code, out, err = dgemma(*args, "--out", second)
    assert code == 0 and "attacks that are not refused" in out and " attacks, " in err
    assert not (second / "audit-before").exists()  # the same settings: the audit that was given serves
    after = json.loads((second / "audit-after" / "audit.json").read_text())
    assert after["manifest"]["rule"]["phrases"] == [word] and after["manifest"]["parts"] == []
    assert after["model"]["fingerprint"] != told["model"]["fingerprint"]
    lines = json.loads((second / "hardening.json").read_text())
    assert lines[1]["before"]["share"] == np.mean([r["verdict"] == "refusal" for r in told["prompts"][1::2]])
    code, out, _ = dgemma("audit", asked, "--model", second, "--out", third, *options)
    again = json.loads((third / "audit.json").read_text())
    assert code == 0 and again["model"]["fingerprint"] == after["model"]["fingerprint"]
    assert [row["answer"] for row in again["prompts"]] == [row["answer"] for row in after["prompts"]]

    code, _, _ = dgemma(*args, "--out", tmp_path / "more", "--test", test)
    assert code == 0 and (tmp_path / "more" / "audit-before" / "audit.json").exists()
    code, _, err = dgemma("harden", tmp_path / "nothing", "--out", tmp_path / "x")
    assert code == 2 and "nothing" in err
