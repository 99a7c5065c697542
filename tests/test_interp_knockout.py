"""Knock-outs and re-routing: they find the one head and the one expert of the hand-built model, and nothing else."""

import hand_built as hb
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dgemma_jax as dg
import interp
from interp.knockout import _knocked
from interp.routing import _LOWEST
from interp.rows import run_of

C = hb.LENGTH
SAMPLER = dg.SamplerConfig(max_denoising_steps=3, eos_token_ids=(1,))  # the model is sure after two steps
PROMPTS = hb.prompts(4)
METRIC = interp.answer(hb.answer(PROMPTS))  # nats, over the whole canvas
WHOLE = -15.0  # an effect of more than this destroys the answer
NONE = 1e-2  # an effect below this is none
ALL = ("heads", "experts", "attention", "mlp", "moe", "layers")


@pytest.fixture(scope="module")
def model():
    return hb.model()


def all_zeroed(model, **options):
    return interp.knock_out(model, PROMPTS, METRIC, ALL, steps=[0, 1], sampler=SAMPLER, rows_at_once=40, **options)


@pytest.fixture(scope="module")
def zeroed(model):
    """Every component out, one by one, at two steps."""
    before = _knocked._cache_size()
    maps = all_zeroed(model)
    assert _knocked._cache_size() == before + 1  # two steps, six kinds, several chunks
    return maps


@pytest.fixture(scope="module")
def moment(model):
    return run_of(model, PROMPTS, None, seed=0, sampler=SAMPLER).moment


SILENT = f"layers.{hb.SILENT_HEAD[0]}.attn_z"
ROUTER = f"layers.{hb.EXPERT[0]}.router_weights"


def seen(model, moment, name="logits"):
    """What passes by in the step; one program for a structure of edits."""
    return np.asarray(interp.capture_step(model, moment, [SILENT, ROUTER, "logits"])[name])


def zero_edits(model, heads, experts, mlp):
    """The head, the expert and the MLP of layer 3 at zero in these rows."""
    edited = interp.edit(model, "layers.1.attn_z", interp.Zero(), heads=2, rows=heads)
    edited = interp.edit(edited, "layers.2.router_weights", interp.Zero(), experts=3, rows=experts)
    return interp.edit(edited, "layers.3.mlp_out", interp.Zero(), rows=mlp)


def without(effects, *place):
    """[R, ..., B] with one place masked out."""
    rest = effects.copy()
    rest[(slice(None), *place)] = 0
    return rest


@pytest.mark.parametrize("seed", [0, 5])
def test_the_hand_built_model_answers(seed):
    """From any canvas, with a margin, whatever the idle weights are."""
    built = hb.model(seed)
    found = seen(built, run_of(built, PROMPTS, None, seed=seed, sampler=SAMPLER).moment)
    is_right = np.arange(hb.VOCAB) == hb.answer(PROMPTS)[..., None]
    assert (found[is_right] - np.where(is_right, -np.inf, found).max(-1).ravel() > 10).all()


def test_knock_outs_find_the_head_the_expert_and_their_layers(zeroed):
    assert zeroed.size == 2 * 4 * (4 * 4 + 4 * 5 + 4 * 4) and abs(zeroed.base).max() < 1e-3
    for name, place in {"heads": hb.HEAD, "experts": hb.EXPERT, "attention": hb.HEAD[:1], "moe": hb.EXPERT[:1]}.items():
        assert zeroed[name][(0, *place)].max() < WHOLE, name
        assert abs(without(zeroed[name], *place)).max() < NONE, name
    assert abs(zeroed["mlp"]).max() < NONE
    assert zeroed["layers"][0, [1, 2]].max() < WHOLE and abs(zeroed["layers"][0, [0, 3]]).max() < NONE
    assert zeroed.axes["experts"] == "RLEB" and zeroed.index["heads"]["N"] == [0, 1, 2, 3]


def test_once_the_answer_is_on_the_canvas_no_part_is_needed(zeroed):
    """Nothing overwrites the token's own code then: the knock-out is of a step, not of a run."""
    assert all(abs(zeroed[name][1]).max() < NONE for name in ALL)


def test_the_silent_head_is_active_and_without_effect(model, moment, zeroed):
    layer, head = hb.SILENT_HEAD
    assert (abs(seen(model, moment, SILENT)[:, :, head]).max(-1) > 1).all()
    assert abs(zeroed["heads"][:, layer, head]).max() < NONE


def test_an_effect_is_that_of_the_real_edit(model, moment, zeroed):
    edited = zero_edits(model, heads=0, experts=1, mlp=2)
    real = METRIC(seen(edited, moment)) - METRIC(seen(model, moment))
    predicted = [zeroed[name][(0, *place, row)] for row, (name, *place) in enumerate(
        [("heads", *hb.HEAD), ("experts", *hb.EXPERT), ("mlp", 3)]
    )]  # fmt: skip
    np.testing.assert_allclose([*predicted, 0], real, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("how", [pytest.param("mean", marks=pytest.mark.heavy), "resample"])
def test_other_ways_find_the_same(model, how):
    maps = interp.knock_out(model, PROMPTS, METRIC, ["heads", "moe"], how, steps=0, sampler=SAMPLER, seed=3)
    for name, place in {"heads": hb.HEAD, "moe": hb.EXPERT[:1]}.items():
        assert maps[name][(0, *place)].max() < -5 and abs(without(maps[name], *place)).max() < NONE, (how, name)


def test_a_component_resampled_from_its_own_prompt_is_itself(model):
    same = np.repeat(PROMPTS[:1], 4, 0)
    maps = interp.knock_out(model, same, METRIC, ["heads", "moe"], "resample", steps=0, sampler=SAMPLER)
    assert abs(maps.flat()).max() <= 1e-6 and maps.base[0, 1:].max() < -10  # rows 1 to 3 should say other things


def test_at_one_position_only_that_position_loses_its_answer(model, moment, zeroed):
    maps = all_zeroed(model, positions=slice(2, None), each_position=True)
    heads = maps["heads"][0]
    assert maps.axes["heads"] == "RLTNB" and maps.index["heads"]["T"] == [2, 3, 4, 5]
    whole = zeroed["heads"][(0, *hb.HEAD)]
    found = heads[hb.HEAD[0], :, hb.HEAD[1]]
    by_chance = np.asarray(moment.canvas)[:, 2:] == hb.answer(PROMPTS)[:, 2:]  # noise that is right already
    assert (found[~by_chance.T] < -5).all() and not by_chance.all()
    assert (found.sum(0) > whole).all()  # two positions are left out
    assert abs(without(maps["heads"][:1], hb.HEAD[0], slice(None), hb.HEAD[1])).max() < NONE


def test_on_shuffled_weights_there_is_nothing(model):
    """No component of a shuffled model carries what the head does."""
    rng = np.random.default_rng(0)
    shuffled = jax.tree.map(lambda x: jnp.asarray(rng.permutation(np.asarray(x).ravel()).reshape(x.shape)), model)
    maps = all_zeroed(shuffled)
    assert maps.base.max() < WHOLE and maps["heads"].min() > WHOLE and maps["experts"].min() > WHOLE


# Re-routing


def test_a_forbidden_expert_gives_way_to_the_next(model, moment):
    """The next one speaks at once; with the weight zeroed nobody does."""
    layer, expert = hb.EXPERT
    banned = interp.reroute(model, forbid=expert, layers=layer)
    np.testing.assert_array_equal(seen(banned, moment).argmax(-1), hb.other_answer(PROMPTS))
    later = interp.reroute(model, forbid=expert, layers=layer, steps=slice(1, None))
    np.testing.assert_array_equal(seen(later, moment).argmax(-1), hb.answer(PROMPTS))
    said = seen(zero_edits(model, heads=[], experts=None, mlp=[]), moment).argmax(-1)
    assert (said == hb.other_answer(PROMPTS)).mean() < 0.5 and (said == hb.answer(PROMPTS)).mean() < 0.5
    other = interp.answer(hb.other_answer(PROMPTS))
    maps = interp.knock_out(model, PROMPTS, other, "experts", "reroute", steps=0, sampler=SAMPLER)
    # Without the second expert the next one comes in too, and mutters.
    assert maps["experts"][(0, *hb.EXPERT)].min() > 100 and abs(without(maps["experts"], *hb.EXPERT)).max() < 25


def test_a_forced_expert_takes_the_place_and_the_weight_of_the_last(model, moment):
    layer = hb.EXPERT[0]
    forced = interp.reroute(model, force=hb.NEXT_EXPERT[1], layers=layer)
    own, new = (seen(m, moment, ROUTER) for m in (model, forced))
    np.testing.assert_array_equal(new[..., hb.EXPERT[1]], own[..., hb.EXPERT[1]])
    np.testing.assert_array_equal(new[..., hb.NEXT_EXPERT[1]], own[..., hb.SECOND_EXPERT])
    assert (new[..., hb.SECOND_EXPERT] == 0).all() and (own[..., hb.NEXT_EXPERT[1]] == 0).all()


def test_reroute_by_hand():
    """Against a slow rule: the chosen set, and that only scores of its own are used."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4, 7)).astype(np.float32)
    forbid, force, top = np.zeros(7), np.zeros(7), 3
    forbid[2], force[[0, 5]] = 1, 1
    new = np.asarray(interp.Reroute(jnp.asarray(forbid), jnp.asarray(force), top, axes="BTE")(jnp.asarray(x)))
    allowed = np.where(forbid > 0, _LOWEST, x)
    for old, got in zip(allowed.reshape(-1, 7), new.reshape(-1, 7), strict=True):
        order = [int(e) for e in np.argsort(-old)]
        chosen = set(sorted(range(7), key=lambda e: (force[e] == 0, order.index(e)))[:top])
        assert set(np.argsort(-got)[:top].tolist()) == chosen
        np.testing.assert_array_equal(np.sort(got), np.sort(old))
        kept = [e for e in order[:top] if e in chosen]
        np.testing.assert_array_equal(sorted(kept, key=lambda e: -got[e]), kept)  # their order stays
    nothing = interp.Reroute(jnp.zeros(7), jnp.zeros(7), top, axes="BTE")(jnp.asarray(x))
    np.testing.assert_array_equal(nothing, x)


# Bad input

BAD = [
    (dict(what="neurons"), "what must be of heads, experts"),
    (dict(what=[]), "what must be of"),
    (dict(how="negate"), "how must be one of zero, mean"),
    (dict(how="reroute"), "is for what='experts'"),
    (dict(how="resample", prompts=PROMPTS[:1]), "give two prompts, or a reference"),
    (dict(layers=9), "layers has 9"),
    (dict(layers=[]), "leave no heads"),
    (dict(positions=C), f"positions has {C}"),
    (dict(steps=3), "steps has 3"),
    (dict(steps=[]), "chooses none"),
    (dict(rows_at_once=3), "rows_at_once=3: one intervention on 4 prompts takes 4 rows"),
    (dict(metric="loss"), "metric must be a function"),
    (dict(metric=jnp.sum), "the metric makes shape"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_knock_out_refuses(model, change, message):
    given = dict(prompts=PROMPTS, metric=METRIC, sampler=SAMPLER) | change
    with pytest.raises(ValueError, match=message):
        interp.knock_out(model, **given)


def test_steps_that_no_run_took_are_refused(model):
    with pytest.raises(ValueError, match=r"step 2 was not taken .* give a sampler with early_stop=False"):
        interp.knock_out(model, PROMPTS, METRIC, steps=2, sampler=SAMPLER)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give forbid or force"),
        (dict(forbid=slice(0, 4)), "4 of 5 experts are forbidden; a token needs 2"),
        (dict(force=[0, 1, 2]), "3 experts are forced; a token has 2"),
        (dict(forbid=1, force=1), "expert 1 is both"),
        (dict(forbid=5), "experts has 5"),
    ],
)
def test_reroute_refuses(model, given, message):
    with pytest.raises(ValueError, match=message):
        interp.reroute(model, **given)
