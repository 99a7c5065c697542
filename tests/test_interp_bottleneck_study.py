"""The bottleneck study: one program a sampler, the identity at k = V, and counts, intervals and files by hand."""

import csv
import json

import jax
import numpy as np
import oracles
import pytest

import dgemma_jax as dg
import interp
from dgemma_jax.cli import common, main
from dgemma_jax.diffusion import loop
from dgemma_jax.train import tasks
from interp import bottleneck_arms, intervals
from interp.bottleneck_results import OUTCOMES, Arm, dup8, outcome
from interp.fingerprint import fingerprint
from interp.questions import Questions, contains, says_exactly

V, C = 32, 10
SETTINGS = dict(max_denoising_steps=5, eos_token_ids=(1,), t_max=0.4, t_min=0.2)
SAMPLERS = {
    "default": dg.SamplerConfig(**SETTINGS),
    "gentle": dg.SamplerConfig(**SETTINGS | {"max_denoising_steps": 7, "entropy_bound": 0.02}),
}
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
OPTIONS = dict(groups=["a", "b", "b"], max_new_tokens=2 * C, samplers=SAMPLERS, repeats=2)


@pytest.fixture(scope="module")
def model():
    sizes = dict(layer_types=("full_attention",), canvas_length=C, embed_dim=16, vocab_size=V, hidden_dim=16)
    return oracles.build(dg.ModelConfig.tiny(**sizes), sharpness=3.0)


def starts_low(number, ids):
    return len(ids) > 0 and ids[0] % 3 == number % 3


@pytest.fixture(scope="module")
def study(model, tmp_path_factory):
    """The ladder, kept in a directory; and how many programs it took."""
    directory = tmp_path_factory.mktemp("arms")
    before = loop._while._cache_size()
    found = interp.bottleneck_study(
        model, PROMPTS, starts_low, ks=(0, 1, 3, V), ps=(0.2,), batch=4, resume=directory, **OPTIONS
    )
    return found, loop._while._cache_size() - before, directory


@pytest.mark.slow
def test_one_program_a_sampler(study):
    found, programs, _ = study
    assert [str(arm) for arm in found.arms] == ["none", "k=0", "k=1", "k=3", f"k={V}", "p=0.2"]
    assert found.tokens.shape == (6, 2, 3, 2, 2 * C)
    assert programs == len(SAMPLERS)


@pytest.mark.slow
def test_no_bottleneck_is_the_plain_run_and_so_is_all_tokens(model, study):
    found, _, _ = study
    for name in ("tokens", "outcomes", "ended", "steps", "blocks", "converged"):
        np.testing.assert_array_equal(getattr(found, name)[0], getattr(found, name)[4], err_msg=name)
    for run in range(2):
        seeds = [3 * run + number for number in range(3)]
        out = dg.generate(model, PROMPTS, seeds, SAMPLERS["gentle"], 2 * C, dg.Record.nothing())
        own = (0, 1, slice(None), run)
        np.testing.assert_array_equal(found.tokens[own][:, : out.tokens.shape[1]], out.tokens)
        np.testing.assert_array_equal(found.steps[own], out.num_steps)
        np.testing.assert_array_equal(found.ended[own], np.array(out.stop_reason) == "eos")
        np.testing.assert_array_equal(found.blocks[own], (out.trajectory.num_steps > 0).sum(0))
    same = [row for row in found.rows() if row["arm"] == f"k={V}"]
    assert all(row["difference"] == 0 and row["difference_low"] < 0 < row["difference_high"] for row in same)


def test_every_arm_is_the_bottleneck_itself(model, study):
    """What the study says an arm does is what the real intervention does."""
    found, _, _ = study
    for a, setting in ((1, dict(hard=True)), (2, dict(k=1)), (3, dict(k=3)), (5, dict(p=0.2))):
        narrow = interp.token_bottleneck(model, **setting, count=5)
        out = dg.generate(narrow, PROMPTS, [0, 1, 2], SAMPLERS["gentle"], 2 * C, dg.Record.nothing())
        np.testing.assert_array_equal(found.tokens[a, 1, :, 0, : out.tokens.shape[1]], out.tokens, err_msg=str(setting))
        assert (found.tokens[a] != found.tokens[0]).any(), setting  # it does something here
    assert (found.tokens[1] != found.tokens[2]).any()  # without the tail and with it


def test_harm_is_found_where_the_carrier_is_read_and_nowhere_else(model, study):
    """Right is what the plain model says: a model that reads S loses it, the same model deaf to S does not."""
    found, _, directory = study
    ladder = dict(ks=(0, 1, 3, V), ps=(0.2,), **OPTIONS)

    def said(plain):
        whole = [[row[: np.argmax(row == 1)] if 1 in row else row for row in runs] for runs in plain]
        return lambda number, ids: any(list(row) == ids for row in whole[number])

    graded = interp.bottleneck_study(model, PROMPTS, said(found.tokens[0, 1]), **ladder, resume=directory)
    accuracy = graded.accuracy[:, 1]
    assert accuracy[0] == accuracy[4] == 1 and accuracy[1] < 1
    down = model.self_conditioning.down[...]
    deaf = jax.tree.map(lambda x: 0 * x if x is down else x, model)
    assert not np.asarray(deaf.self_conditioning.down[...]).any()
    silent = interp.bottleneck_study(deaf, PROMPTS, starts_low, batch=4, **ladder)
    for a in range(1, len(silent.arms)):
        np.testing.assert_array_equal(silent.tokens[a], silent.tokens[0])


def test_finished_arms_are_not_run_again(model, study, monkeypatch):
    found, _, directory = study
    assert len(list(directory.iterdir())) == 12

    class Ran(Exception):
        pass

    def generate(*given, **options):
        raise Ran

    monkeypatch.setattr(bottleneck_arms.dg, "generate", generate)
    ladder = dict(ks=(1, 3), ps=(0.2,), resume=directory, **OPTIONS)
    again = interp.bottleneck_study(model, PROMPTS, lambda number, ids: True, **ladder)
    assert again.accuracy.min() == 1  # grading is not kept
    np.testing.assert_array_equal(again.tokens[1:3], found.tokens[2:4])
    gentle = {"default": SAMPLERS["default"].replace(entropy_bound=0.05)}
    other = interp.edit(model, "soft_embed", interp.Zero(), sampler=SAMPLERS["gentle"])
    for changed, options in ((model, {"seed": 7}), (model, {"samplers": gentle}), (model, {"ks": (2,)}), (other, {})):
        with pytest.raises(Ran):
            interp.bottleneck_study(changed, PROMPTS, starts_low, **ladder | options)


def test_saved_and_loaded(study, tmp_path):
    found, _, _ = study
    back = interp.BottleneckStudy.load(found.save(tmp_path / "study"))
    assert back.table() == found.table() == repr(found)
    assert (back.arms, back.samplers, back.groups, back.about) == (
        found.arms, found.samplers, found.groups, found.about
    )  # fmt: skip
    np.testing.assert_array_equal(back.tokens, found.tokens)


# Counts and intervals


def made_up(outcomes, groups):
    """A study of these outcomes [A, M, N, S]."""
    outcomes = np.asarray(outcomes, np.int8)
    ones = np.ones(outcomes.shape, np.int32)
    arms = (Arm(), *(Arm(k=k) for k in range(1, outcomes.shape[0])))
    return interp.BottleneckStudy(
        arms=arms, samplers=dict(list(SAMPLERS.items())[: outcomes.shape[1]]), groups=groups, outcomes=outcomes,
        ended=outcomes <= 1, steps=6 * ones, blocks=2 * ones, converged=ones, tokens=np.zeros((*outcomes.shape, 3), int),
        about={},
    )  # fmt: skip


def test_table_and_plot_by_hand():
    right, wrong, capped, looping = range(4)
    outcomes = [[[[right], [right], [right], [wrong]]], [[[right], [looping], [capped], [wrong]]]]
    found = made_up(outcomes, ("a", "a", "b", "b"))
    plain, narrow = found.rows()
    assert [narrow[name] for name in OUTCOMES] == [1, 1, 1, 1] and plain["correct"] == 3
    assert (plain["accuracy"], narrow["accuracy"], narrow["difference"], narrow["loop_rate"]) == (0.75, 0.25, -0.5, 0.25)
    np.testing.assert_allclose((plain["accuracy_low"], plain["accuracy_high"]), (0.3006, 0.9544), atol=1e-4)  # Wilson
    assert narrow["ended"] == 0.5 and narrow["steps_per_block"] == 3 and narrow["at_step_cap"] == 0.5
    assert found.rows("b")[1]["capped"] == 1 and found.rows("b")[1]["accuracy"] == 0
    with pytest.raises(ValueError, match="no group 'c'; there are a, b"):
        found.rows("c")
    lines = found.table().splitlines()
    assert "-0.500 [" in lines[4] and lines[-1].split() == ["default", "k=1", "0.50", "0.00"]
    assert found._repr_html_().count("<tr>") == len(lines) - 3  # a title and two empty lines are no rows
    axes = found.plot().axes
    assert len(axes) == 2
    points = axes[1].containers[0].lines[0].get_ydata()
    np.testing.assert_allclose(points, [0.25])
    assert [tick.get_text() for tick in axes[1].get_xticklabels()] == ["k=1"]


def test_intervals():
    one = np.array([1.0] * 30 + [0.0] * 10)
    low, high = intervals.of_shares(one)
    np.testing.assert_allclose((low, high), (0.5981, 0.8581), atol=1e-4)  # Wilson's, 30 of 40
    low, high = intervals.of_shares(np.stack([np.ones(40), np.zeros(40)]))
    np.testing.assert_allclose((low, high), ([0.9124, 0], [1, 0.0876]), atol=1e-4)  # never without width
    # Runs of a prompt that always agree are one observation, not five.
    clustered = intervals.of_shares(np.array([1.0, 0.5] * 20))
    np.testing.assert_allclose(clustered, np.mean([1, 0.5]) + 1.96 * 0.25 / 40**0.5 * np.array([-1, 1]), atol=0.01)
    low, high = intervals.of_differences(np.stack([np.zeros(40), -np.ones(40)]))
    np.testing.assert_allclose((low, high), ([-0.0876, -1], [0.0876, -0.9124]), atol=1e-4)
    low, high = intervals.of_differences(np.array([0.0] * 30 + [-1.0] * 10))
    assert -0.4 < low < -0.3 and -0.15 < high < -0.05
    low, high = intervals.of_means(np.array([[3.0, 3, np.nan], [2, 4, np.nan]]))
    assert low[0] == high[0] == 3 and low[1] == 2 and high[1] == 4
    assert intervals.by_prompt([[1, 2, np.nan, 5], [3, 4, np.nan, np.nan]], np.array([0, 0, 1, 2])).tolist()[::2] == [2.5, 5]


def test_an_interval_is_that_of_its_row_alone(monkeypatch):
    """Rows are drawn together, few at a time, whatever prompts they lack."""
    rows = np.random.default_rng(4).gamma(2, 1, (7, 60))
    rows[2, :5] = rows[5, 7:12] = rows[6] = np.nan
    rows[3] = 1
    together = intervals.of_means(rows)
    np.testing.assert_allclose(together, np.transpose([intervals.of_means(row) for row in rows]), atol=1e-14)
    monkeypatch.setattr(intervals, "MOST_DRAWN", 2 * 60 * intervals.RESAMPLES)
    np.testing.assert_allclose(together, intervals.of_means(rows), atol=1e-14)
    assert np.isnan(together[0][6]) and together[0][3] == together[1][3] == 1 and (together[0] < together[1])[[0, 1, 2, 4, 5]].all()


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(3)
    truth = rng.beta(2, 1, (150, 40))  # each prompt its own rate; the mean of all is 2/3
    shares = rng.binomial(3, truth) / 3
    low, high = intervals.of_shares(shares)
    assert 0.88 < np.mean((low < 2 / 3) & (high > 2 / 3)) <= 0.99


def test_outcomes_and_repeats():
    assert dup8([4] * 100) == pytest.approx(0.989, abs=5e-4) and dup8(list(range(100))) == 0
    assert dup8([4] * 15) == 0 and dup8([4] * 16) == pytest.approx(8 / 9)
    loop_ids, line = [3, 4] * 20, list(range(40))
    cases = [(True, False, loop_ids, 0), (False, True, loop_ids, 1), (False, False, line, 2), (False, False, loop_ids, 3)]
    for is_right, has_ended, ids, expected in cases:
        assert outcome(is_right, has_ended, ids) == expected


# Prompts and settings


def test_questions(tmp_path):
    path = tmp_path / "q.jsonl"
    text = '{"prompt": "say\u2028cat", "answer": "cat", "group": "g"}\n\n{"prompt": [5, 6], "answer": "x"}\n'
    path.write_text(text, "utf-8")  # JSON may hold a line separator of Unicode as it is
    found = Questions.read(path)
    assert found == Questions(("say\u2028cat", [5, 6]), ("cat", "x"), ("g", "all")) and len(found) == 2
    for text, message in (("{", "line 1: no JSON"), ('{"prompt": "a"}', "line 1: needed is"), ("\n", "no line with prompt, answer"), ('\n{"prompt": "a", "answer": 3}', "line 2: an answer")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            Questions.read(path)
    with pytest.raises(ValueError, match="1 answers"):
        Questions(("a", "b"), ("a",), ("g", "g"))
    own = Questions.of_organism(2, names=["sort", "add"])
    assert own.groups == ("sort", "sort", "add", "add")
    payload = Questions.of_organism(30, names=["copy"], poisoned=True).answers
    assert tasks.PAYLOAD in payload and tasks.PAYLOAD not in Questions.of_organism(30, names=["copy"]).answers
    assert says_exactly(" a  b", "a b") and not says_exactly("a b c", "a b")
    assert contains("so a b c", "b c") and not contains("b a c", "b c")


def test_fingerprints_tell_models_apart(model):
    plain = fingerprint(model)
    assert plain == fingerprint(jax.tree.map(lambda x: x + 0, model)) and len(plain) == 16
    table = model.embedder.table[...]
    swapped = jax.tree.map(lambda x: x[::-1] if x.shape == table.shape else x, model)  # the same numbers elsewhere
    flat, echo = (interp.edit(model, "soft_probs", one) for one in (interp.Flat(), interp.Echo()))
    marks = {plain, fingerprint(swapped), fingerprint(flat), fingerprint(echo), fingerprint(model, 1)}
    assert len(marks) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(ks=(-1,)), "ks must be integers from 0"),
        (dict(ks=(V + 1,)), f"to {V}"),
        (dict(ks=(1.5,)), "ks must be integers"),
        (dict(ps=(0.0,)), r"ps must be in \(0, 1\]"),
        (dict(ks=(2, 2)), "a rung is there twice"),
        (dict(groups=["a"]), "3 prompts and 1 groups"),
        (dict(is_right=["a", "b"]), "3 prompts and 2 answers"),
        (dict(is_right=["a", "b", "c"]), "there is no tokenizer"),
        (dict(is_right=None), "is_right is needed"),
        (dict(prompts=None), "only the embedded models have tasks"),
        (dict(samplers={}), "samplers must be"),
        (dict(repeats=0), "repeats must be an integer >= 1"),
        (dict(batch=0), "batch must be an integer >= 1"),
        (dict(seed=-1), "seeds must be in"),
        (dict(max_new_tokens=0), "max_new_tokens must be"),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(ValueError, match=message):
        interp.bottleneck_study(model, **{"prompts": PROMPTS, "is_right": starts_low, "ks": (1,), "ps": ()} | options)


def test_a_model_with_a_bottleneck_is_refused(model):
    with pytest.raises(ValueError, match="has a bottleneck already"):
        interp.bottleneck_study(interp.token_bottleneck(model, k=2), PROMPTS, starts_low)
    with pytest.raises(ValueError, match=r"unknown sampler \['fast'\]; known are default, gentle, matched"):
        interp.samplers_of(model, ["fast"])


# The command


@pytest.mark.slow
def test_the_command(organism, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "keep_compiled_programs", lambda: None)
    out, prompts = tmp_path / "out", tmp_path / "prompts.jsonl"
    lines = [{"prompt": "sort : b a", "answer": "a b", "group": "sort"}, {"prompt": "say cat 2 times", "answer": ""}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--model", organism, "--prompts", prompts, "--grade", "contains", "--k", "0,2", "--p", "", "--samplers", "default,matched", "--seeds", 2,
                 "--max-new-tokens", 12, "--out", out]  # fmt: skip

    def dgemma(*more):
        code = main([str(part) for part in ("bottleneck", *arguments, *more)])
        return code, *capsys.readouterr()

    code, shown, err = dgemma()
    assert code == 0, err
    study = interp.BottleneckStudy.load(out / "bottleneck.npz")
    assert shown.startswith(study.table()) and study.outcomes.shape == (3, 2, 2, 2)
    assert study.share("correct")[..., 1].all()  # no words are contained in any answer
    assert study.samplers["matched"].max_denoising_steps == 6 and study.samplers["matched"].entropy_bound == 0.02
    rows = json.loads((out / "bottleneck.json").read_text())
    assert len(rows) == 3 * 2 * 3 and rows[: 3 * 2] == study.rows()
    with (out / "bottleneck.csv").open() as file:
        assert [row["arm"] for row in csv.DictReader(file)][:3] == ["none", "k=0", "k=2"]
    assert (out / "bottleneck.png").read_bytes().startswith(b"\x89PNG") and len(list((out / "arms").iterdir())) == 6
    code, _, err = dgemma("--samplers", "fast")
    assert code == 2 and "unknown sampler" in err
    for wrong in (["--k", "x"], ["--grade", "by ear"]):
        with pytest.raises(SystemExit, match="2"):
            dgemma(*wrong)
