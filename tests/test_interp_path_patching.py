"""Path patching: it finds the two links of the hand-built path, and is what hand-made interventions give."""

import hand_built as hb
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import dgemma_jax as dg
import interp
from interp.path_patching import _paths
from interp.rows import run_of

pytestmark = pytest.mark.slow

C, AT = hb.LENGTH, 3
SAMPLER = dg.SamplerConfig(max_denoising_steps=2, eos_token_ids=(1,), early_stop=False)
CLEAN, CORRUPT = hb.pairs(2, AT)
METRIC = interp.LogitDifference([AT], hb.answer(CLEAN)[:, [AT]], hb.answer(CORRUPT)[:, [AT]])
WHOLE, NONE = 0.95, 0.02  # of the way from the corrupt run to the clean one
(HEAD_LAYER, HEAD), (EXPERT_LAYER, _) = hb.HEAD, hb.EXPERT
RECEIVERS = [
    "logits",
    f"layers.{EXPERT_LAYER}.moe_out",
    f"layers.{EXPERT_LAYER}.mlp_out",
    f"layers.{EXPERT_LAYER}.router_logits",
    interp.Receiver(f"layers.{EXPERT_LAYER}.attn_v", heads=0),
    "layers.3.moe_out",
]


@pytest.fixture(scope="module")
def model():
    return hb.model()


def patched(model, recipient=CORRUPT, donor=CLEAN, metric=METRIC, **options):
    given = dict(receivers=RECEIVERS, steps=0, sampler=SAMPLER, rows_at_once=40) | options
    return interp.path_patch(model, recipient, donor, metric, **given)


@pytest.fixture(scope="module")
def maps(model):
    before = _paths._cache_size()
    found = patched(model)
    assert _paths._cache_size() == before + 1  # three kinds of senders, six receivers
    return found


def test_the_path_is_found_link_by_link(maps):
    """head -> expert's input, experts -> logits: each carries all; every other link of 144 carries nothing."""
    assert maps.size == 2 * 6 * (16 + 4 + 4)
    assert (maps.base < -10).all() and (maps.donor > 10).all()
    links = {
        f"heads -> layers.{EXPERT_LAYER}.moe_out": (HEAD_LAYER, HEAD),
        "moe -> logits": (EXPERT_LAYER,),
    }
    for name in maps.effects:
        share = maps.recovery(name)[0].copy()
        if name in links:
            assert share[links[name]].min() > WHOLE, name
            share[links[name]] = 0
        assert abs(share).max() < NONE, name
    assert maps.axes["heads -> logits"] == "RLNB" and maps.axes["mlp -> logits"] == "RLB"
    assert f"moe -> layers.{EXPERT_LAYER}.attn_v heads 0" in maps.effects


def test_the_silent_route_is_silent(model, maps):
    """The silent head's output differs between the runs and reaches the silent MLP; the gate there is closed."""
    layer, head = hb.SILENT_HEAD
    name = f"layers.{layer}.attn_z"
    runs = run_of(model, np.concatenate([CORRUPT, CLEAN]), 0, seed=0, sampler=SAMPLER)
    z = np.asarray(interp.capture_step(model, runs.moment, name)[name])[:, AT, head]
    assert (abs(z[:2] - z[2:]).max(-1) > 1).all()
    assert abs(maps.recovery(f"heads -> layers.{hb.SILENT_MLP}.mlp_out")[0, layer, head]).max() < NONE


def test_nothing_goes_back(maps):
    """What is written after a receiver has read, or beside it, cannot reach it."""
    for name in maps.effects:
        sender, receiver = name.split(" -> ")
        if receiver != "logits":
            first = int(receiver.split(".")[1])
            first += sender == "heads" and "attn" not in receiver  # attention comes before the MLP and the experts
            assert (abs(maps[name][0, first:]) <= 2e-5).all(), name


def test_with_heads_alone_frozen_the_path_leads_through_the_expert(model):
    """As in the paper, where MLPs belong to the path."""
    share = patched(model, frozen="heads", receivers="logits").recovery("heads -> logits")[0].copy()
    assert share[HEAD_LAYER, HEAD].min() > WHOLE
    share[HEAD_LAYER, HEAD] = 0
    assert abs(share).max() < NONE


def test_a_run_patched_with_itself_is_itself(model):
    same = patched(model, donor=CORRUPT)
    assert abs(same.flat()).max() <= 1e-6 * abs(same.base).max() + 1e-6 * 20


def test_on_shuffled_weights_there_is_no_path(model, maps):
    rng = np.random.default_rng(0)
    shuffled = jax.tree.map(lambda x: jnp.asarray(rng.permutation(np.asarray(x).ravel()).reshape(x.shape)), model)
    assert abs(patched(shuffled).flat()).max() < 0.2 * (maps.donor - maps.base).min()


# On random weights, against interventions made by hand

PROMPTS = np.random.default_rng(3).integers(6, 32, (2, 2, 5))  # recipients, donors; pairs of rows
KINDS = ("sliding_attention", "full_attention")
QUERY = "layers.1.attn_q"
SITES = [f"layers.{layer}.{name}" for layer in (0, 1) for name in ("attn_z", "mlp_out", "moe_out")] + [QUERY]


def weigh(logits):
    """A metric in which every logit counts."""
    weights = np.random.default_rng(1).standard_normal(logits.shape[1:]).astype(np.float32)
    return (logits * weights).sum((1, 2))


@pytest.fixture(scope="module")
def random():
    sizes = dict(hidden_dim=16, sliding_window=6, canvas_length=C, embed_dim=16, vocab_size=32)
    return oracles.build(dg.ModelConfig.tiny(layer_types=KINDS, **sizes))


@pytest.fixture(scope="module")
def random_maps(random):
    receivers = [interp.Receiver("layers.1.attn_q", heads=2), "logits", "layers.1.moe_out"]
    return interp.path_patch(random, *PROMPTS, weigh, ["heads", "mlp", "moe"], receivers, 0, sampler=SAMPLER)


class ByHand:
    """Steps of the recipients (rows 0 and 1; the others are not looked at), edited with `interp.edit`: one program."""

    def __init__(self, random):
        self.model = random
        self.moment = run_of(random, np.concatenate(PROMPTS), 0, seed=0, sampler=SAMPLER).moment
        shapes = {info.name: tuple(C if n == "C" else n for n in info.shape[1:]) for info in interp.sites(random)}
        self.nothing = {name: np.zeros((4, C, *shapes[name][1:]), np.float32) for name in SITES}
        own, donor = (self.step({}, part)[1] for part in ([0, 1, 0, 1], [2, 3, 2, 3]))
        self.own, self.donor = own, donor
        self.base = self.metric({})

    def step(self, values, rows=slice(None), heads=None, only=None):
        """Logits, and what passes by, with these values at sites."""
        model = self.model
        for name, nothing in self.nothing.items():
            on = ([] if name not in values else None) if only is None else only.get(name, [])
            model = interp.edit(model, name, interp.Patch(np.asarray(values.get(name, nothing))), rows=on,
                                heads=heads if name.endswith("attn_q") else None)  # fmt: skip
        seen = interp.capture_step(model, self.moment, [*SITES, "logits"])
        seen = {name: np.asarray(x)[rows] for name, x in seen.items()}
        return seen.pop("logits"), seen

    def metric(self, *args, **options):
        return weigh(self.step(*args, **options)[0])[:2]

    def frozen_but(self, sender, heads=slice(None)):
        """All components write what they wrote, the sender what it did in the donor's run."""
        values = {name: own.copy() for name, own in self.own.items() if not name.endswith("attn_q")}
        values[sender][:, :, heads] = self.donor[sender][:, :, heads]
        return values


@pytest.fixture(scope="module")
def by_hand(random):
    return ByHand(random)


def test_a_path_is_what_two_passes_by_hand_give(random_maps, by_hand):
    """Head 1 of layer 0, through the queries of head 2 of layer 1."""
    np.testing.assert_allclose(random_maps.base[0], by_hand.base, rtol=1e-5)
    heard = by_hand.step(by_hand.frozen_but("layers.0.attn_z", heads=1))[1][QUERY]
    expected = by_hand.metric({QUERY: heard}, heads=2) - by_hand.base
    assert abs(expected).max() > 1e-3
    found = random_maps["heads -> layers.1.attn_q heads 2"][0, 0, 1]
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-3)


def test_a_path_to_the_logits_is_one_pass_by_hand(random_maps, by_hand):
    expected = by_hand.metric(by_hand.frozen_but("layers.0.mlp_out")) - by_hand.base
    assert abs(expected).max() > 1e-2
    np.testing.assert_allclose(random_maps["mlp -> logits"][0, 0], expected, atol=1e-4, rtol=1e-3)


def test_from_the_last_layer_to_the_logits_a_path_is_plain_patching(random_maps, by_hand):
    one, other = (f"layers.1.{kind}_out" for kind in ("mlp", "moe"))
    expected = by_hand.metric(by_hand.donor, only={one: 0, other: 1}) - by_hand.base
    found = [random_maps["mlp -> logits"][0, 1, 0], random_maps["moe -> logits"][0, 1, 1]]
    assert abs(expected).min() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-3)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(senders="experts"), "senders must be of heads, attention"),
        (dict(frozen=[]), "frozen must be of heads, mlp, moe"),
        (dict(receivers="layers.9.attn_q"), "no site matches"),
        (dict(receivers="layers.1.resid_post"), "layers.1.resid_post cannot receive; those that can are attn_q"),
        (dict(receivers=[]), "receivers must be patterns"),
        (dict(receivers=[3]), "receivers must be patterns"),
        (dict(receivers={"a": []}), "receivers must be patterns"),
        (dict(receivers=interp.Receiver("layers.1.attn_k", heads=3)), "heads has 3, which is out of range; there are 2"),
        (dict(receivers=interp.Receiver("layers.1.mlp_out", heads=1)), "no heads to choose from"),
        (dict(receivers=interp.Receiver("logits", positions=C)), f"positions has {C}"),
        (dict(donor=CLEAN[:1]), "2 recipients and 1 donors: give prompts in pairs"),
        (dict(layers=7), "layers has 7"),
        (dict(steps=5), "steps has 5"),
        (dict(rows_at_once=1), "one intervention on 2 prompts takes 2 rows"),
    ],
)
def test_path_patch_refuses(model, change, message):
    with pytest.raises(ValueError, match=message):
        patched(model, **change)
