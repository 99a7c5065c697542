"""What flows between steps, with a model: scripted denoisers whose numbers are known, and a tiny random one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import Scripted, build, softmax

import dgemma_jax as dg
import interp
from dgemma_jax.diffusion import loop
from interp.flow import removal
from interp.flow.recorded import run_of_block

pytestmark = pytest.mark.slow

C, V, STEPS = 6, 32, 4
SAMPLER = dg.SamplerConfig(max_denoising_steps=STEPS, eos_token_ids=(1,), early_stop=False, entropy_bound=2.0)
PROMPTS = [[7, 8, 9, 10], [11, 12, 13]]
RECORD = dg.Record(soft=True, top_k=V)  # whole distributions
CONFIG = dg.ModelConfig.tiny(canvas_length=C, vocab_size=V, embed_dim=V)


@pytest.fixture(scope="module")
def scripted():
    """Two rows of distributions written by hand; the second is sharp from step 2 on."""
    script = np.random.default_rng(0).standard_normal((1, STEPS, 2, C, V))
    script[0, 2:, 1] += 40 * np.eye(V)[np.arange(C) + 3]
    return Scripted.of(script, CONFIG)


@pytest.fixture(scope="module")
def scripted_run(scripted):
    record = dg.Record(soft=True, fn=interp.TokenWatch.of(end=[0, 1], word=[5]))
    return dg.generate(scripted, PROMPTS, seed=1, sampler=SAMPLER, max_new_tokens=C, record=record).trajectory


def shaped(scripted):
    """[R, B, C, V] distributions of the script."""
    temperature = np.array([float(dg.diffusion.temperature(step, SAMPLER)) for step in range(STEPS)])
    return softmax(np.asarray(scripted.script[0], float) / temperature[:, None, None, None])


def test_divergences_are_those_of_the_script(scripted, scripted_run):
    p = shaped(scripted)
    found = interp.divergences(scripted, scripted_run)
    before = np.concatenate([np.full((1, *p.shape[1:]), 1 / V), p[:-1]])
    for name, (a, b) in {"to previous": (p, before), "from final": (p[-1:], p)}.items():
        wanted = (a * (np.log(a) - np.log(b))).sum(-1).mean(-1)
        np.testing.assert_allclose(found[name][0], wanted, rtol=2e-4, atol=1e-6, err_msg=name)
    entropy = -(p[0] * np.log(p[0])).sum(-1).mean(-1)
    np.testing.assert_allclose(found["to previous"][0, 0], np.log(V) - entropy, rtol=1e-4)
    assert abs(found["from final"][0, -1]).max() < 1e-6
    own = interp.divergences(scripted, scripted_run, where=np.arange(C) == 2)["from final"][0]
    wanted = (p[-1] * (np.log(p[-1]) - np.log(p))).sum(-1)[..., 2]
    np.testing.assert_allclose(own, wanted, rtol=2e-4, atol=5e-6)


def test_the_watch_reads_the_shaped_distribution(scripted, scripted_run):
    p = shaped(scripted)
    np.testing.assert_allclose(scripted_run.fn["end"][0], p[..., :2].sum(-1), rtol=1e-4)
    np.testing.assert_allclose(scripted_run.fn["word"][0], p[..., 5], rtol=1e-4)
    length = interp.length_estimate(scripted_run)["length"][0]
    np.testing.assert_allclose(length, (1 - p[..., :2].sum(-1)).sum(-1), rtol=1e-4)


@pytest.fixture(scope="module")
def model():
    sizes = dict(layer_types=("full_attention",), canvas_length=C, embed_dim=16, vocab_size=V, hidden_dim=16, sliding_window=4)
    return build(dg.ModelConfig.tiny(**sizes))


@pytest.fixture(scope="module")
def out(model):
    return dg.generate(model, PROMPTS, seed=5, sampler=SAMPLER, max_new_tokens=C, record=RECORD)


def silenced(model, *names):
    """The model with these parameters at zero: the same compiled programs."""
    def one(path, leaf):
        return jnp.zeros_like(leaf) if any(n in jax.tree_util.keystr(path) for n in names) else leaf

    return jax.tree_util.tree_map_with_path(one, model)


def test_carriers_taken_are_those_of_a_real_moment(model, out):
    """The same step with the moment changed by hand gives the divergence; both nothing and everything is checked."""
    run, accepted = run_of_block(out.trajectory), out.trajectory.accepted[0]
    found = interp.carrier_split(model, out.trajectory, steps=[1, 2])
    moment = out.trajectory.moment(0, 2)
    noise, blank = removal.noise_tokens(run, model, 0)[2], removal.blank_soft(model, "uniform")
    changed = moment.replace(
        canvas=jnp.where(accepted[1], noise, moment.canvas), soft=jnp.where(accepted[1][..., None], blank, moment.soft)
    )
    plain, edited = (_distribution(run, 2) for run in (out, dg.resume(model, changed, record=RECORD)))
    kl = (plain * (np.log(plain) - np.log(edited))).sum(-1)
    for row in range(2):
        there = accepted[1, row]
        wanted = [kl[row, there].mean() if there.any() else np.nan, kl[row, ~there].mean() if (~there).any() else np.nan]
        np.testing.assert_allclose(found.divergence[1, 2, 0, :, row], wanted, rtol=1e-3, atol=1e-6)
    assert np.nanmax(found.divergence) > 1e-3
    assert "canvas" in repr(found) and found.plot().axes


def _distribution(out, step):
    """[B, C, V] of a record of all candidates."""
    ids, probs = out.trajectory.top_ids[0, step], out.trajectory.top_probs[0, step].astype(float)
    return np.take_along_axis(probs, np.argsort(ids, -1), -1)


def test_a_carrier_that_is_not_read_holds_nothing(model, out, tmp_path):
    deaf = silenced(model, "self_conditioning.down")
    run = dg.generate(deaf, PROMPTS, seed=5, sampler=SAMPLER, max_new_tokens=C, record=RECORD)
    before = removal._without._cache_size()
    found = interp.carrier_split(deaf, run.trajectory, steps=[1, 2])
    np.testing.assert_allclose(np.nan_to_num(found.divergence[:, 1]), 0, atol=1e-6)
    np.testing.assert_allclose(found.divergence[:, 0], found.divergence[:, 2], atol=1e-6)
    assert removal._without._cache_size() == before  # one program for both models and all steps
    again = interp.CarrierSplit.load(found.save(tmp_path / "split"))
    np.testing.assert_array_equal(again.divergence, found.divergence)
    with pytest.raises(ValueError, match="into step 0 nothing crosses"):
        interp.carrier_split(model, run.trajectory, steps=[0])
    with pytest.raises(ValueError, match="blank must be"):
        interp.carrier_split(model, run.trajectory, blank="none")
    assert np.concatenate(removal.padded_rows(5, 2)).tolist() == [0, 1, 2, 3, 4, 4]
    with pytest.raises(ValueError, match="takes 7 rows"):
        interp.carrier_split(model, run.trajectory, rows_at_once=6)


def test_dependence_goes_through_attention_alone(model, out):
    found = interp.dependence(model, out.trajectory, steps=[1, 3])
    assert found.loss.shape == (2, 2, C, C) and np.abs(found.loss).max() > 1e-3
    np.testing.assert_array_equal(np.diagonal(found.loss, axis1=2, axis2=3), 0)
    deaf = silenced(model, "attention.o")
    run = dg.generate(deaf, PROMPTS, seed=5, sampler=SAMPLER, max_new_tokens=C, record=RECORD)
    alone = interp.dependence(deaf, run.trajectory, steps=[1])
    np.testing.assert_allclose(alone.loss, 0, atol=1e-6)
    with pytest.raises(ValueError, match="1..3"):
        interp.dependence(model, out.trajectory, steps=[4])
    some = interp.dependence(model, out.trajectory, steps=[1], positions=range(C))
    np.testing.assert_allclose(some.loss[0], found.loss[0], atol=1e-6)


def test_direction_of_dependence(tmp_path):
    """Every position rests on the one after it: all of it runs backwards. Symmetric dependence does not."""
    from interp.order.canvas_dependence import Dependence

    where = np.ones((1, 8), bool)
    chain = np.eye(8, k=-1)[None, None]
    share, p_value = Dependence(chain, (1,)).backward(where)
    assert share[0, 0] == 1 and p_value[0, 0] < 0.05
    share, _ = Dependence(chain.swapaxes(2, 3), (1,)).backward(where)
    assert share[0, 0] == 0
    share, p_value = Dependence(chain + chain.swapaxes(2, 3), (1,)).backward(where)
    assert share[0, 0] == 0.5 and p_value[0, 0] == 1
    assert np.isnan(Dependence(chain, (1,)).backward(np.arange(8)[None] == 3)[0]).all()
    again = Dependence.load(Dependence(chain, (1,)).save(tmp_path / "dependence"))
    np.testing.assert_array_equal(again.loss, chain)


def test_kills(model, out):
    """No positions: nothing changes. Every token of the vocabulary but one, everywhere and for good: something does."""
    none = interp.token_kills(model, out.trajectory, [3, 4], [], steps=[1])
    assert not none.changed().any() and (none.plain == out.tokens).all()
    size = loop._while._cache_size()
    found = interp.token_kills(model, out.trajectory, [int(out.tokens[0, 0]), 4], None, steps=[2])
    assert loop._while._cache_size() == size  # another step, other places, other tokens: one program
    assert found.tokens.shape == (1, 6, 2, C) and len(found.texts[0]) == 6
    assert found.changed()[0, [0, 2, 3, 5]].any() and "canvas once" in repr(found)
    with pytest.raises(ValueError, match="every row took"):
        interp.token_kills(model, out.trajectory, 3, 0, steps=[STEPS])


class Linear(Scripted):
    """Logits at the target are a linear map of S at the operand: what is injected is read, moved by three."""

    operand, target, k = 1, 4, 3

    def denoise(self, canvas, cache, soft):
        logits = super().denoise(canvas, cache, soft)
        read = jnp.roll(soft[:, self.operand], self.k, -1) * 4
        return logits.at[:, self.target].set(read)


def test_injection_into_soft_is_read_by_image(scripted, scripted_run):
    jax.tree_util.register_dataclass(Linear)
    model = Linear(scripted.script.repeat(2, 2), jnp.eye(V), scripted.clock, CONFIG)
    soft = np.full((2, C, V), 0.5 / V)
    soft[:, 1, 20] += 0.5  # the leader at the operand
    moment = scripted_run.moment(0, 0).replace(soft=soft)
    letters, draft = (5, 6, 7, 8, 9), np.zeros(C, int)
    images = [x + 3 for x in letters]
    options = dict(images=images, row=1, amount=0.2, draws=4)
    found = interp.inject(model, moment, draft, 1, 4, [(x,) for x in letters], **options)
    own, other = found.diagonal()
    hot = float(dg.diffusion.temperature(0, SAMPLER))

    def p(mass):
        return softmax(4 * np.roll(mass, 3) / hot)

    wanted = np.log10(p(0.8 * soft[1, 1] + 0.2 * np.eye(V)[5])[images]) - np.log10(p(soft[1, 1])[images])
    np.testing.assert_allclose(found.response[0], wanted, atol=1e-4)
    assert own > other + 0.1 and not found.leads.any() and "5 injections" in repr(found)
    pairs = interp.inject(model, moment, draft, 1, 4, [(5, 6), (7, 8)], **options)
    _, responds = interp.parallel_response(pairs, {x: x + 3 for x in letters})
    assert responds.all()
    _, wrong = interp.parallel_response(pairs, {x: 8 + (x - 3) % 5 for x in letters})
    assert not wrong.all()
    for amount, leads in ((0.2, True), (0.05, False)):
        known = interp.inject(
            model, moment, draft, 1, 4, [(5,)], **options | dict(amount=amount, top=(0.3, [0.2])),
        )  # fmt: skip
        assert known.leads.tolist() == [leads]
    with pytest.raises(ValueError, match="1 in all at most"):
        interp.inject(model, moment, draft, 1, 4, [range(6)], **options)
    with pytest.raises(ValueError, match="needs 6 ids"):
        interp.inject(model, moment, draft[:3], 1, 4, [(5,)], **options)


def hand_made(name, values):
    return interp.Activations(
        arrays={name: values}, axes={name: ""}, steps=tuple(range(len(values))), valid=np.ones(values.shape[:2], bool),
        texts=(None,), tokens=np.zeros((1, 1), int), seeds=(0,),
    )  # fmt: skip


def test_sinks_by_hand():
    """One head of five keys, of which one may not be seen: a sink of the prompt, then one of the canvas, then none."""
    from interp.flow.sinks import received_by_key, sinks_of

    weight = np.array([[0, 0.7, 0.1, 0.1, 0.1], [0, 0.1, 0.1, 0.7, 0.1], [0, 0.25, 0.25, 0.25, 0.25]])
    found = sinks_of(hand_made("layers.0.attn_pattern", weight[:, None, None]), canvas=2)
    assert np.argwhere(found.is_sink["layers.0.attn_pattern"]).tolist() == [[0, 0, 0, 1], [1, 0, 0, 3]]
    np.testing.assert_allclose(found.share()[:, 0], [0.7, 0.7, 0])
    np.testing.assert_array_equal(found.on_canvas()[:, 0], [0, 1, np.nan])
    np.testing.assert_array_equal(found.moved()[:, 0], [1, 1])
    pattern = np.random.default_rng(0).random((1, 2, 3, 4))
    np.testing.assert_allclose(received_by_key(jnp.asarray(pattern)), pattern.mean(2), rtol=1e-6)


def test_routing_by_hand():
    """Two experts of four at each position; one of them changes after the first step, none after the second."""
    from interp.flow.routing_flow import flow_of

    weights = np.zeros((3, 1, 4, 4))
    weights[0, :, :, :2] = 0.5
    weights[1:, :, :, 1:3] = 0.5
    found = flow_of(hand_made("layers.0.router_weights", weights))
    np.testing.assert_allclose(found.load[0, 0], [0.5, 0.5, 0, 0])
    np.testing.assert_allclose(found.spread()[:, 0], 2)
    np.testing.assert_allclose(found.moved()[:, 0], [2 / 3, 0])
    np.testing.assert_allclose(found.null()[:, 0], [2 / 3, 0])


def test_sinks_and_routing_of_a_model(model):
    """Weights are the model's own; the routing of every position names `experts_per_token` experts."""
    options = dict(seed=5, sampler=SAMPLER)
    sinks = interp.attention_sinks(model, PROMPTS, steps=[0, 3], epsilon=0.02, **options)
    for received in sinks.received.values():
        np.testing.assert_allclose(received.sum(-1), 1, atol=1e-5)
    flow = interp.expert_flow(model, PROMPTS, steps=[0, 3], **options)
    assert ((flow.weights != 0).sum(-1) == model.config.experts_per_token).all() and "experts" in repr(flow)
    assert flow.moved().min() >= 0 and sinks.share().shape == (2, 1)
    with pytest.raises(ValueError, match="positive share"):
        interp.attention_sinks(model, PROMPTS, epsilon=0)
