"""Studies: prompt files, rows on disk, a kill and what comes after, and what is made of rows whose truth is known."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dgemma_jax as dg
from dgemma_jax.diffusion import loop
from interp.studies import batches, columns, manifest, readings
from interp.studies.prompt_files import StudyPrompts
from interp.studies.results import Study
from interp.studies.running import study
from interp.studies.statistics_table import STATISTICS, chosen, record_for

ROOT = Path(__file__).parent.parent
LINES = [
    '{"prompt": "copy : a b", "answer": "a b", "group": "copy", "id": "one"}',
    '{"prompt": "copy : a',
    '{"prompt": "copy : a", "group": "reverse"}',
    '{"prompt": ""}',
    '{"prompt": "sort : c a b d e", "id": "one"}',
    "",
    '{"prompt": [5, 9999]}',
    '{"prompt": "sort : c a b d e c a b d e c a b d e c a b d e c a b d e"}',  # takes more room than the others
]

# ---- prompts ---------------------------------------------------------------------------------------


def test_broken_lines_are_named_and_the_rest_goes_on(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes("\n".join(LINES).encode() + b'\n{"prompt": "\xff"}\n')
    found = StudyPrompts.of(path)
    assert [(p.line, p.id, p.group) for p in found.prompts] == [(1, "one", "copy"), (3, "3", "reverse"), (7, "7", "all"), (8, "8", "all")]
    assert [said.split(":")[0] for said in found.broken] == ["line 2", "line 4", "line 5", "line 9"]
    assert "no JSON" in found.broken[0] and "not empty" in found.broken[1] and "that of line 1" in found.broken[2]
    (tmp_path / "none.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match=r"holds no prompt; line 1: needed is an object"):
        StudyPrompts.of(tmp_path / "none.jsonl")


# ---- rows on disk ----------------------------------------------------------------------------------


def test_columns_come_back_and_join_in_order(tmp_path):
    texts = ["", "ä\n\u2028", "plain", ""]
    given = {"n": np.arange(4), "curve": np.arange(8.0).reshape(4, 2), "text": texts, "empty": [""] * 4}
    back = columns.read(columns.write(tmp_path / "rows.npz", given))
    assert back["text"] == texts and back["empty"] == [""] * 4 and (back["curve"] == given["curve"]).all()
    together = columns.joined([{"t": ["c", "a"], "n": np.array([2, 0])}, {"t": ["b"], "n": np.array([1])}], np.array([1, 2, 0]))
    assert together["t"] == ["a", "b", "c"] and together["n"].tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.npz"]


def test_parquet_holds_the_same(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = columns.to_parquet(tmp_path / "rows.parquet", {"t": ["a", ""], "x": np.array([[1.0, np.nan], [3, 4]])})
    assert parquet.read_table(path).to_pydict()["t"] == ["a", ""]


def test_parts_that_need_as_much_room_run_on():
    assert list(batches.runs([0, 2, 3, 7, 8], [48, 48, 64, 64, 48])) == [[0, 2], [3, 7], [8]]


def test_parts_share_room_up_to_twice_that_of_the_smallest():
    assert batches.shared([48, 64, 96, 112, 128, 512]) == [96, 96, 96, 128, 128, 512]
    assert batches.shared([64, 48, 32]) == [64] * 3 and batches.shared([]) == [] and batches.shared([7]) == [7]


def test_batches_hold_every_row_once_and_like_lengths_together():
    lengths = np.random.default_rng(0).integers(3, 90, 50)
    plan = batches.planned(lengths, 16)
    assert sorted(np.concatenate(plan)) == list(range(50)) and [len(p) for p in plan] == [16, 16, 16, 2]
    assert all(lengths[a].min() >= lengths[b].max() for a, b in itertools.pairwise(plan))
    assert batches.filled(plan[-1], 16).tolist() == [*plan[-1][:1], *[plan[-1][1]] * 15]


# ---- a study, killed and resumed -------------------------------------------------------------------

STUDY = """
import os, pathlib, signal, sys
import dgemma_jax as dg
from interp.studies import columns
from interp.studies.running import study

replace, left = os.replace, int(sys.argv[4])

def interrupted(part, path):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)  # the part lies there, half way
    replace(part, path)

columns.os = type("os", (), {"replace": staticmethod(interrupted), "getpid": os.getpid})
study("order,smearing", dg.load(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3], seeds=6, batch=2, max_new_tokens=8)
"""


def files(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def bundle(organism):
    return dg.load(organism)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(LINES))
    return path


@pytest.fixture(scope="module")
def whole(bundle, prompts, tmp_path_factory):
    """A study that nothing disturbed, its directory, and how many loops over steps it compiled."""
    out = tmp_path_factory.mktemp("whole")
    before = loop._while._cache_size()
    found = study("order,smearing", bundle, prompts, out, seeds=6, batch=2, max_new_tokens=8)
    return found, out, loop._while._cache_size() - before


@pytest.mark.slow
def test_a_killed_study_goes_on_to_the_same_bytes(organism, bundle, prompts, whole, tmp_path):
    out = tmp_path / "study"
    ended = subprocess.run(
        [sys.executable, "-c", STUDY, organism, prompts, out, "2"], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
    )
    assert ended.returncode == -signal.SIGKILL
    assert len(list((out / "parts").glob("0000?.npz"))) == 1 and len(list((out / "parts").iterdir())) == 2
    first = (out / "parts" / "00000.npz").stat().st_mtime_ns
    study("order,smearing", bundle, prompts, out, seeds=6, batch=2, max_new_tokens=8)
    assert (out / "parts" / "00000.npz").stat().st_mtime_ns == first  # not made again
    assert files(out) == files(whole[1])


def test_one_row_a_generation_in_the_order_of_the_prompts(bundle, whole):
    found, out, compiled = whole
    assert compiled == 1
    assert found["id"] == [i for i in ("one", "3", "8") for _ in range(6)] and found["seed"].tolist() == list(range(6)) * 3
    made = dg.generate(bundle, ["copy : a b"] * 6, range(6)[::-1], max_new_tokens=8, record=record_for(bundle, chosen("order,smearing").values()))
    assert made.texts[::-1] == found["text"][:6] and made.num_steps[::-1].tolist() == found["steps"][:6].tolist()
    assert np.isfinite(found["right"]).tolist() == [True] * 6 + [False] * 12
    broken = json.loads((out / manifest.NAME).read_text())["prompts"]["broken"]
    assert len(broken) == 4 and broken[-1].startswith("line 7") and "id 9999" in broken[-1]
    assert "4 line(s) of the prompts were left out" in repr(found)
    assert Study.load(out)["text"] == found["text"]


def test_another_study_in_the_same_directory_is_refused(bundle, prompts, whole):
    with pytest.raises(ValueError, match=r"another study \(settings\.seed differ\)"):
        study("order,smearing", bundle, prompts, whole[1], seeds=6, batch=2, max_new_tokens=8, seed=5)
    with pytest.raises(ValueError, match="no statistic 'flows'; there are order"):
        study("flows", bundle, prompts, whole[1])
    with pytest.raises(ValueError, match="a study of its own"):
        chosen("order,monitorability")
    with pytest.raises(ValueError, match='no prompt is usable: line 1: a study of two arms needs "intervention"'):
        study("monitorability", bundle, ["copy : a"], whole[1])
    with pytest.raises(ValueError, match="no finished study"):
        Study.load(whole[1] / "parts")


# ---- what is made of rows --------------------------------------------------------------------------


def made_up(statistics, **own):
    rows = len(next(iter(own.values())))
    plain = {"id": [str(i) for i in range(rows)], "group": ["g"] * rows, "right": np.ones(rows), "seed": np.zeros(rows, int)}
    about = {"settings": {"statistics": statistics, "monitors": {}}, "prompts": {"broken": []}}
    return Study(plain | own, about)


def test_means_are_over_prompts_and_groups_apart():
    found = made_up([], tokens=np.array([1.0, 3, 8, np.nan]), id=["a", "a", "b", "c"], group=["x", "x", "x", "y"]).summary()
    assert found["groups"]["x"]["tokens"]["mean"] == 5 and found["groups"]["x"]["tokens"]["prompts"] == 2
    assert found["groups"]["y"]["tokens"] == {"mean": None, "low": None, "high": None, "prompts": 0}


def test_planted_relations_are_found_and_shuffled_ones_are_not():
    rng = np.random.default_rng(0)
    right = np.repeat([1.0, 0], 40)
    length = rng.integers(2, 20, 80)
    own = {"right": right, "order/entropy at commit": np.r_[rng.uniform(0, 1, 40), rng.uniform(2, 3, 40)],
           "lengths/estimate": np.stack([rng.normal(size=80), length + 0.1], 1), "lengths/final": length}  # fmt: skip
    found = made_up(["order", "lengths"], **own).summary()
    assert found["order"]["auroc of confidence"]["g"][0] == 1
    seen = found["lengths"]["by step"]["g"]
    assert seen["correlation"][1] > 0.999 and abs(seen["correlation"][0]) < 0.4 and seen["error"][1] == pytest.approx(0.1)
    mixed = made_up(["order", "lengths"], **own | {"right": rng.permutation(right), "lengths/final": rng.permutation(length)}).summary()
    low, high = mixed["order"]["auroc of confidence"]["g"][1:]
    assert low < 0.5 < high and abs(mixed["lengths"]["by step"]["g"]["correlation"][1]) < 0.4


def test_curves_over_steps_are_of_all_rows():
    """A row that has stopped keeps its last value: else the mean at step 3 would be that of the long row alone."""
    nan = np.nan
    found = made_up(["smearing"], **{"smearing/positions": np.array([[4, 2, nan], [0, 0, 6], [nan, nan, nan]]), "steps": np.array([2, 3, 0])})
    (axes,) = readings.figures(found, "smearing")["steps"].axes
    (line,) = axes.lines
    assert line.get_ydata().tolist() == [2, 1, 4] and line.get_xdata().tolist() == [1, 2, 3]


def test_little_to_see_is_drawn_without_a_warning(tmp_path):
    """One generation of one step, which commits all at once: no order, no correlation."""
    one = np.zeros((1, 1))
    flow = {f"flow/{name}": one for name in ("kept", "given up", "newly accepted", "still open", "settled")}
    order = {f"order/{name}": np.full(1, np.nan) for name in ("tau", "control", "block tau 4", "entropy at commit")}
    own = {"steps": np.ones(1, int), "entropy": one, "order/never accepted": np.zeros(1), "lengths/estimate": one,
           "lengths/final": np.ones(1)}  # fmt: skip
    made_up(["order", "flow", "lengths"], **own, **flow, **order).save(tmp_path)
    assert len(list((tmp_path / "figures").glob("*.png"))) == 5


def test_a_monitor_that_sees_the_cause_scores_and_one_that_does_not_scores_nothing():
    """Of 20 rollouts in each arm, the intervention says "hint" in its text and always has the outcome."""
    ids, arms = np.repeat(range(12), 40), np.tile(["prompt", "intervention"], 240)
    caused = arms == "intervention"
    views = {f"monitor/{view}": ["hint" if c and view != "answer" else "x" for c in caused] for view in ("answer", "text", "canvases", "top tokens")}
    found = made_up(["monitorability"], id=[str(i) for i in ids], arm=arms.tolist(), right=caused.astype(float), group=["g"] * 480, seed=np.zeros(480, int), **views)
    found.manifest["settings"]["monitors"] = {"hint": "hint"}
    scores = {row["view"]: row["mean"] for row in found.summary()["monitorability"]["scores"]}
    assert scores["text"] == 1 and scores["answer"] == 0


def test_every_statistic_has_a_name_a_sentence_and_no_more_than_it_needs():
    assert all(one.about and "\n" not in one.about for one in STATISTICS.values())
    assert list(chosen("all")) == [name for name in STATISTICS if name != "monitorability"]
