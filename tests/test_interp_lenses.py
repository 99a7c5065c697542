"""The logit lens: the last layer is the model, reading changes nothing, and it finds what is said inside."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import dgemma_jax as dg
import interp
from dgemma_jax.diffusion import loop
from dgemma_jax.diffusion.sampler import denoise_step
from dgemma_jax.train import tasks
from interp import lenses
from interp.affine_lens import AffineLens, identity_lens
from interp.taps import tapped

C, D, V, L, STEPS = 6, 16, 32, 2, 4
PROMPTS = [[7, 8, 9], [10, 11], [12, 13, 14, 15]]
SAMPLER = dg.SamplerConfig(max_denoising_steps=STEPS, eos_token_ids=(1,), early_stop=False)
KINDS = ("sliding_attention", "full_attention")
CONFIG = dg.ModelConfig.tiny(
    layer_types=KINDS, canvas_length=C, embed_dim=D, vocab_size=V, hidden_dim=16, sliding_window=4
)
TOKENS = [3, 20]


@pytest.fixture(scope="module")
def model():
    return oracles.build(CONFIG, sharpness=3.0)


@pytest.fixture(scope="module")
def out(model):
    quiet = dg.Record.nothing()
    return dg.generate(model, PROMPTS[:2], seed=[3, 4], sampler=SAMPLER, max_new_tokens=C, record=quiet)


@pytest.fixture(scope="module")
def read(model, out):
    return interp.logit_lens(model, out, tokens=TOKENS)


@jax.jit
def one_step(model, moment):
    view = denoise_step(model, moment.state, moment.cache, moment.sampler)[1]
    return view.logits, view.sites


@pytest.mark.parametrize("step", [0, STEPS - 1])
def test_the_last_layer_is_the_model_and_a_layer_its_residual_before_the_final_norm(model, out, read, step):
    """Every number kept, against cap tanh(W norm(h_l) / cap) in numpy, and at the last layer the step's own logits."""
    logits, sites = one_step(tapped(model, "layers.*.resid_post")[0], out.trajectory.moment(0, step))
    table, weight = (np.asarray(p[...], np.float64) for p in (model.embedder.table, model.final_norm.weight))
    own, finals = oracles.softmax(np.asarray(logits, np.float64)), out.trajectory.committed[0]
    np.testing.assert_array_equal(read.finals, finals)
    for layer in range(L):
        hidden = oracles.rms(np.asarray(sites[f"layers.{layer}.resid_post"], np.float64), weight)
        scores = CONFIG.final_logit_softcap * np.tanh(hidden @ table.T / CONFIG.final_logit_softcap)
        p = oracles.softmax(np.asarray(logits, np.float64) if layer == L - 1 else scores)
        order = np.argsort(-p, -1)
        np.testing.assert_array_equal(read.ids[step, layer], order[..., :5])
        np.testing.assert_allclose(read.probs[step, layer], np.take_along_axis(p, order[..., :5], -1), atol=1e-5)
        np.testing.assert_allclose(read.entropy[step, layer], oracles.entropy(np.log(p)), atol=1e-4)
        np.testing.assert_allclose(read.chosen[step, layer], p[..., TOKENS], atol=1e-5)
        of_final = np.take_along_axis(p, finals[..., None], -1)[..., 0]
        np.testing.assert_allclose(read.final_prob[step, layer], of_final, atol=1e-5)
        np.testing.assert_array_equal(read.final_rank[step, layer], np.argmax(order == finals[..., None], -1))
        np.testing.assert_allclose(read.kl[step, layer], np.sum(own * (np.log(own) - np.log(p)), -1), atol=1e-4)
    assert (read.final_rank[-1, -1] == 0).all()  # what is committed is the last argmax
    assert read.mean_kl()[0] > 0.05 and read.mean_kl()[-1] < 1e-5


def test_a_run_that_is_read_is_the_run_and_parts_make_the_whole(model, out, read):
    """The taps change no token; three rows, two at a time, share the programs of two."""
    programs = loop._while._cache_size()
    parts = interp.logit_lens(model, PROMPTS, seed=[3, 4, 5], sampler=SAMPLER, tokens=TOKENS, batch=2)
    assert loop._while._cache_size() == programs
    np.testing.assert_array_equal(parts.finals[:2], out.tokens)
    assert parts.texts == (None,) * 3 and parts.seeds == (3, 4, 5) and parts.entropy.shape == (STEPS, L, 3, C)
    assert parts.steps == tuple(range(STEPS)) and parts.axes == "RLBC"
    for name in ("probs", "entropy", "final_prob", "kl", "chosen"):
        np.testing.assert_allclose(getattr(parts, name)[:, :, :2], getattr(read, name), atol=1e-6, err_msg=name)


def test_an_affine_lens_is_read_through_the_same_function(model, out, read):
    """The identity is the plain lens; zero and a bias is one reading everywhere. Lens, tokens and steps are data."""
    same = interp.logit_lens(model, out, steps=[1, 3], lens=identity_lens(model, range(L)), tokens=TOKENS)
    np.testing.assert_allclose(same.probs, read.probs[[1, 3]], atol=1e-6)
    programs = loop._while._cache_size()
    bias = np.random.default_rng(0).standard_normal((L, D)).astype(np.float32)
    constant = AffineLens(jnp.zeros((L, D, D)), jnp.asarray(bias), tuple(range(L)), "constant")
    found = interp.logit_lens(model, out, steps=[0, 2], lens=constant, tokens=[5, 6])
    assert loop._while._cache_size() == programs
    assert (same.steps, found.steps, same.method, found.method) == ((1, 3), (0, 2), "identity", "constant")
    logits = oracles.rms(bias) * np.asarray(model.final_norm.weight[...]) @ np.asarray(model.embedder.table[...]).T
    best = np.argmax(logits, -1)[:, None, None]
    np.testing.assert_array_equal(found.ids[..., 0], np.broadcast_to(best, found.ids.shape[:-1]))


def test_positions_in_parts_read_the_same(model, monkeypatch):
    """A vocabulary for which only two positions fit at a time."""
    rng = np.random.default_rng(1)
    x, logits = jnp.asarray(rng.standard_normal((L, 3, C, D))), jnp.asarray(rng.standard_normal((3, C, V)))
    reader = lenses._Reader(
        name="logits", top_k=2, eps=1e-6, residuals=(), norm=jnp.ones(D), tokens=jnp.asarray(TOKENS),
        finals=jnp.asarray(rng.integers(0, V, (1, 3, C))),
    )  # fmt: skip
    whole = reader.read(x, logits, model.embedder, jnp.zeros(3, jnp.int32))
    monkeypatch.setattr(lenses, "_LOGITS_AT_ONCE", 2 * 3 * V + 1)
    parts = reader.read(x, logits, model.embedder, jnp.zeros(3, jnp.int32))
    chex.assert_trees_all_close(parts, whole, atol=1e-6)
    assert parts["ids"].shape == (3, L, C, 2)


@pytest.mark.heavy
def test_edits_are_read_and_two_blocks_have_their_own_final_tokens(model):
    edited = interp.edit(model, "layers.0.resid_post", interp.Patch(jnp.arange(D, dtype=jnp.float32)), positions=4)
    out = dg.generate(edited, PROMPTS[:2], seed=2, sampler=SAMPLER, max_new_tokens=2 * C, record=dg.Record.nothing())
    found = interp.logit_lens(edited, out, [0, 1], [3])
    assert found.axes == "JRLBC" and found.entropy.shape == (2, 1, 2, 2, C)
    np.testing.assert_array_equal(found.finals, out.trajectory.committed)
    assert (found.final_rank[:, -1, -1][out.trajectory.valid[:, 3]] == 0).all()  # each block is compared with itself
    at_4 = found.entropy[0, 0, 0, :, 4]
    np.testing.assert_allclose(at_4, at_4[0], atol=1e-5)  # after the edit
    assert found.block(1).axes == "RLBC" and found.agreement().shape == (2, 1, 2, 2)


def test_agreement_counts_the_answer(read):
    right = read.ids[..., 0] == read.finals
    np.testing.assert_allclose(read.agreement(answer_only=False), right.mean(-1))
    np.testing.assert_allclose(read.agreement()[-1, -1], 1)
    fields = {name: getattr(read, name) for name in read.__dataclass_fields__}
    ended = np.zeros_like(read.inside)
    ended[:, :2] = True
    short = interp.LensReadings(**fields | {"inside": ended})
    np.testing.assert_allclose(short.agreement(), right[..., :2].mean(-1))
    valid = read.valid.copy()
    valid[2, 1] = False
    assert np.isnan(interp.LensReadings(**fields | {"valid": valid}).agreement()[2, :, 1]).all()


def test_saved_loaded_shown_and_drawn(read, tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    loaded = interp.LensReadings.load(read.save(tmp_path / "some.lens"))
    for name in read.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(read, name), err_msg=name)
    assert "plain lens, RLBC [4, 2, 2, 6]" in repr(loaded) and "1: " in repr(loaded)
    assert loaded.top(0, 1, 4, row=1)[0] == (int(read.ids[0, 1, 1, 4, 0]), float(read.probs[0, 1, 1, 4, 0]))
    assert len(read.plot(step=1, row=1).axes) == 4
    with pytest.raises(ValueError, match=r"step 9 was not read; read are \[0, 1, 2, 3\]"):
        read.top(9, 0, 0)
    with pytest.raises(ValueError, match="holds lens readings, not lens"):
        AffineLens.load(tmp_path / "some.lens")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(layers=L), "layers has 2, which is out of range"),
        (dict(layers=[]), "chooses none"),
        (dict(steps=STEPS), "out of range; there are 4"),
        (dict(top_k=0), "top_k must be an integer in 1..32"),
        (dict(tokens=[V]), r"tokens must be a list of ids in 0..31"),
        (dict(batch=0), "batch must be at least 1"),
        (dict(lens=AffineLens(jnp.eye(4)[None], jnp.zeros((1, 4)), (0,))), "the lens has width 4, the model 16"),
        (dict(lens=AffineLens(jnp.eye(D)[None], jnp.zeros((1, D)), (0,))), r"the lens has no layer 1; it has \[0\]"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(model, monkeypatch, options, message):
    monkeypatch.setattr(dg, "generate", None)
    with pytest.raises(ValueError, match=message):
        interp.logit_lens(model, PROMPTS, sampler=SAMPLER, **options)


def test_of_the_release_no_layer_is_held_in_the_size_of_the_vocabulary():
    """By shapes alone: no array of a reading has more than a part of the positions at V = 262,144."""
    config = dg.ModelConfig(layer_types=("sliding_attention", "full_attention"))
    reader = lenses._Reader(
        name="logits", top_k=5, eps=1e-6, residuals=("a", "b"), norm=jnp.ones(config.embed_dim, jnp.bfloat16),
        finals=jnp.zeros((1, 1, 256), jnp.int32), tokens=jnp.zeros(3, jnp.int32),
    )  # fmt: skip
    embedder = dg.nn.transformer.abstract(config).embedder

    def shapes(x, logits, embedder):
        return reader.read(x, logits, embedder, jnp.zeros(1, jnp.int32))

    given = (
        jax.ShapeDtypeStruct((2, 1, 256, config.embed_dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 256, config.vocab_size), jnp.float32),
    )
    jaxpr = jax.make_jaxpr(shapes)(*given, embedder)
    found = jax.eval_shape(shapes, *given, embedder)
    assert found["ids"].shape == (1, 2, 256, 5) and found["chosen"].shape == (1, 2, 256, 3)
    sizes = [v.aval.size for v in _values(jaxpr.jaxpr) if v.aval.size >= config.vocab_size * 256]
    assert not sizes


def _values(jaxpr):
    """All results in a program, those of its loops included."""
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from _values(inner)


# ---- on the trained model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano():
    return dg.load("nano").with_sampler(max_denoising_steps=16)


@pytest.fixture(scope="module")
def hidden(nano):
    """Prompts whose answer has a term that must be computed and may not be said: (prompts, ids, positions)."""
    found = [e for e in tasks.examples(0, 60, ["sequence"], "test") if e.facts["hidden"]][:8]
    ids = [nano.tokenizer.id(e.facts["hidden"]) for e in found]
    return [e.prompt for e in found], ids, [e.facts["hidden_in_answer"] for e in found]


def probability(read, hidden):
    """[R, L, B] of the term, where it would stand; and of other terms there."""
    _, ids, at = hidden
    own = np.stack([read.chosen[:, :, b, c, read.tokens.index(i)] for b, (i, c) in enumerate(zip(ids, at, strict=True))], -1)
    others = np.stack([read.chosen[:, :, b, c].sum(-1) for b, c in enumerate(at)], -1) - own
    return own, others / (len(read.tokens) - 1)


@pytest.mark.slow
def test_the_hidden_term_is_read_where_it_is_never_said(nano, hidden):
    """It surfaces in the late layers of the first step, and enters the next one below; a shuffled model has no trace."""
    prompts, ids, at = hidden
    read = interp.logit_lens(nano, prompts, steps=[0, 1, 2], tokens=sorted(set(ids)))
    assert not any(row[c] == i for row, c, i in zip(read.finals, at, ids, strict=True))
    own, others = probability(read, hidden)
    print("hidden term, probability by layer:", own.mean(-1).round(3).tolist())
    assert own[0, -1].mean() > 0.7 and own[1, 0].mean() > 0.6 and own[2, 0].mean() < 0.3
    assert own[0, 0].mean() < 0.1 and own[0, -1].mean() > 5 * others[0, -1].mean()
    rng = np.random.default_rng(0)
    shuffled = jax.tree.map(lambda x: jnp.asarray(rng.permutation(np.ravel(x)).reshape(x.shape)), nano.model)
    null, _ = probability(
        interp.logit_lens(nano.with_model(shuffled), prompts, steps=[0, 1, 2], tokens=sorted(set(ids))), hidden
    )
    assert np.median(null, -1).max() < 0.05
    assert read.words[ids[0]].isdigit()
