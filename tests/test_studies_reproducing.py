"""The tables of the two papers: what is in them, that their commands exist, and how ours are compared."""

import json
import shlex

import pytest

from dgemma_jax.cli import main, parser
from interp.studies.reproducing import PAPERS, published, reproduce


@pytest.mark.parametrize("number", PAPERS)
def test_every_command_parses_and_every_value_has_what_it_needs(number):
    for artefact in published(number)["artefacts"]:
        if "command" in artefact:
            program, *words = shlex.split(artefact["command"])
            assert program == "dgemma" and parser().parse_args(words)
            assert "RESULTS/" in artefact["command"]
        assert "command" in artefact or "needs" in artefact
        for value in artefact["values"]:
            assert set(value) <= {"what", "paper", "at", "within", "share", "between", "least", "most"}
            assert ("at" in value) <= ("file" in artefact)
            assert value["paper"] is not None or not {"within", "share"} & set(value)


def test_the_depths_lie_on_the_published_line():
    depth = [value["paper"] for value in published("2606.20560")["artefacts"][0]["values"]]
    assert depth[1] == 11_136 + 12_435 and depth[3] == 11_136 + 48 * 12_435
    assert depth[2] == round(depth[1] / depth[0], 2) and depth[4] == round(depth[3] / depth[0], 2)


def test_what_was_made_is_compared_and_the_rest_needs_the_release(tmp_path):
    rows = [{"depth": 21_000, "ratio": 1.0}, {"depth": 23_571, "ratio": 1.12}, {"depth": 700_000, "ratio": 33.3}]
    for artefact in published("2606.20560")["artefacts"]:
        if "depth" in artefact:
            (tmp_path / artefact["file"]).write_text(json.dumps({"rows": rows}))
    (tmp_path / "bottleneck-gpqa").mkdir()
    arms = [{"sampler": "default", "group": "all", "k": k, "p": None, "accuracy": a} for k, a in ((1, 0.1), (8, 0.2), (None, 0.6))]
    (tmp_path / "bottleneck-gpqa" / "bottleneck.json").write_text(json.dumps(arms))
    found = reproduce("arXiv:2606.20560", tmp_path)
    table = [row for row in found.rows if row.what.startswith("opaque serial depth, 262,144")]
    assert [row.verdict for row in table] == ["agrees", "agrees", "agrees", "differs", "differs"]
    gpqa = {row.what.split(" | ")[1]: row.verdict for row in found.rows if "GPQA (bars" in row.what}
    assert gpqa == {"k = 1": "agrees", "k = 2": "needs the release", "k = 4": "needs the release", "k = 8": "differs",
                    "p = 0.1": "needs the release", "no bottleneck": "agrees"}  # fmt: skip
    assert all(row.verdict.startswith("needs") for row in found.rows if row.ours is None)
    assert "Fig. 3: classes of likely tokens" in repr(found) and "$ dgemma study identity" in repr(found)
    assert json.loads(found.save(tmp_path / "all.json").read_text())["rows"][0]["ours"] == 21_000


@pytest.mark.heavy
def test_depths_are_made_where_they_are_not_there_and_kept(tmp_path):
    found = reproduce("2606.20560", tmp_path)
    depths = [row for row in found.rows if row.what.startswith("opaque serial depth, 262,144")]
    assert depths and all(row.ours is not None for row in depths)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert files and repr(reproduce("2606.20560", tmp_path)) == repr(found)
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_the_interval_of_the_paper_is_the_goal(tmp_path):
    (tmp_path / "suite").mkdir()
    groups = {g: {"order/tau": {"mean": m}} for g, m in (("R1", 0.5), ("R2", 0.2), ("R6", None))}
    (tmp_path / "suite" / "summary.json").write_text(json.dumps({"groups": groups}))
    found = {row.what: row for row in reproduce("2606.14620", tmp_path).rows}
    assert found["R1 GSM8K | token tau-b"].verdict == "agrees" and found["R2 HumanEval | token tau-b"].verdict == "differs"
    assert found["R6 JSON | token tau-b"].verdict == "needs the release"


def test_the_commands(capsys, tmp_path):
    assert main(["reproduce", "2606.14620", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) > 50
    assert main(["study", "--list"]) == 0 and "order " in capsys.readouterr().out
    assert main(["reproduce", "2606.00000"]) == 2 and "known papers are" in capsys.readouterr().err
    assert main(["study", "order"]) == 2 and "--out DIR" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["study", "order", "--out", str(tmp_path / "x"), "--prompts", str(tmp_path / "empty.jsonl")]) == 2
    assert "holds no prompt" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_options_of_a_study_are_read(capsys):
    args = parser().parse_args(["study", "order", "--mesh", "data=2,expert=4", "--monitor", "gold=\\bgold\\b", "--monitor", "a=b=c"])
    assert args.mesh == {"data": 2, "expert": 4} and dict(args.monitor) == {"gold": "\\bgold\\b", "a": "b=c"}
    for bad in (["--mesh", "expert"], ["--mesh", "expert=x"], ["--monitor", "=x"]):
        with pytest.raises(SystemExit):
            parser().parse_args(["study", "order", *bad])
    assert capsys.readouterr().err.count("needed is") == 3
