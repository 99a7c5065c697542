"""Experts: every form is the same function, also under the transforms; the router chooses as it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

from dgemma_jax.config import ModelConfig
from dgemma_jax.nn import moe
from dgemma_jax.nn.sites import Site

FORMS = ("dense", "scan", "blocks")
D, F = 8, 4


@functools.cache
def jitted(form):
    return jax.jit(functools.partial(moe._apply, form), static_argnums=0)


def draw(tokens, experts, top, load="random", seed=0):
    """Tokens, their weights [T, E] with `top` non-zero ones a token, and the experts' parameters."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((tokens, experts), np.float32)
    for t in range(tokens):
        chosen = rng.permutation(experts)[:top] if load == "random" else np.arange(top)
        weights[t, chosen] = rng.uniform(0.1, 1, top)
    return tuple(
        a.astype(np.float32)
        for a in (
            rng.standard_normal((tokens, D)), weights,
            rng.standard_normal((experts, 2 * F, D)) * 0.5, rng.standard_normal((experts, F, D)) * 0.5,
        )
    )  # fmt: skip


SIZES = [
    (1, 1, 1, "random"),
    (3, 20, 2, "random"),  # fewer assignments than experts
    (40, 3, 2, "random"),  # several blocks an expert
    (33, 6, 1, "same"),  # one expert gets everything, the others nothing
    (5, 4, 4, "random"),  # all chosen
]


@pytest.mark.parametrize(("tokens", "experts", "top", "load"), SIZES)
def test_all_forms_are_the_oracle(tokens, experts, top, load):
    args = draw(tokens, experts, top, load)
    expected = oracles.experts(*args)
    for form in FORMS:
        np.testing.assert_allclose(jitted(form)(top, *args), expected, atol=2e-5, err_msg=form)


def test_forms_agree_under_vmap_grad_and_jvp():
    batch = [draw(9, 5, 2, seed=s) for s in range(3)]
    x, w, up, down = (np.stack(a) for a in zip(*batch, strict=True))
    args = (x, w, up[0], down[0])  # rows share the experts
    tangent = tuple(np.random.default_rng(9).standard_normal(a.shape).astype(np.float32) for a in args)
    tangent = (tangent[0], tangent[1] * (w > 0), *tangent[2:])  # which experts are chosen does not move

    def run(form, args, tangent):
        def total(x, w, up, down):
            out = jax.vmap(lambda x, w: moe._apply(form, 2, x, w, up, down))(x, w)
            return jnp.sum(jnp.sin(out)), out

        grads, out = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)(*args)
        slope = jax.jvp(lambda *a: total(*a)[0], args, tangent)[1]
        return out, slope, grads[0], grads[1] * (args[1] > 0), *grads[2:]

    reference = jax.jit(functools.partial(run, "dense"))(args, tangent)
    np.testing.assert_allclose(reference[0], [oracles.experts(*b[:2], *args[2:]) for b in batch], atol=2e-5)
    along = sum(np.vdot(g, t) for g, t in zip(reference[2:], tangent, strict=True))
    np.testing.assert_allclose(reference[1], along, rtol=1e-4)  # forward and reverse mode agree
    for form in ("scan", "blocks"):
        for got, wanted in zip(jax.jit(functools.partial(run, form))(args, tangent), reference, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-4, err_msg=form)


def test_blocks_are_enough_for_any_load():
    """The number of blocks is fixed by the sizes: no distribution of tokens needs more."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        tokens, experts = rng.integers(1, 200), rng.integers(1, 30)
        top = rng.integers(1, experts + 1)
        size = moe.block_size(int(tokens * top), int(experts))
        assert size in (8, 16, 32, 64, 128)
        load = rng.multinomial(tokens * top, rng.dirichlet(np.full(experts, 0.3)))
        assert np.sum(-(-load // size)) <= -(-tokens * top // size) + experts - 1


def test_choice_of_form():
    table = {
        ("cpu", 256, 8, 2): "dense", ("cpu", 256, 128, 8): "blocks", ("cpu", 1, 128, 8): "dense",
        ("cuda", 256, 128, 8): "dense", ("cuda", 4096, 128, 8): "blocks", ("cuda", 4096, 16, 8): "dense",
        ("tpu", 512, 128, 8): "dense", ("tpu", 513, 128, 8): "blocks",
    }  # fmt: skip
    assert {key: moe.choose(*key) for key in table} == table


def test_auto_is_decided_by_the_platform_compiled_for():
    args = draw(12, 20, 2)
    auto = jax.jit(functools.partial(moe._run, "auto", 2))
    traced = auto.trace(*args)
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda")}
    assert ("stablehlo.while" in texts["cpu"], "stablehlo.while" in texts["cuda"]) == (True, False)
    np.testing.assert_allclose(auto(*args), oracles.experts(*args), atol=2e-5)
    few = jax.jit(functools.partial(moe._run, "auto", 2)).lower(*draw(12, 4, 2)).as_text()
    assert "stablehlo.while" not in few and "stablehlo.case" not in few
    with pytest.raises(
        ValueError, match=r"unknown expert form 'ragged'; known are \('auto', 'dense', 'scan', 'blocks'\)"
    ):
        moe._run("ragged", 2, *args)


def parts(**sizes):
    """Router and experts of a built model, and a token matrix [2, 3, D]."""
    config = ModelConfig.tiny(layer_types=("full_attention",), **sizes)
    layer = oracles.build(config, seed=5).layers[0]
    return layer.router, layer.experts, np.random.default_rng(2).standard_normal((2, 3, 32)).astype(np.float32)


def test_router_against_the_oracle():
    router, _, x = parts(num_experts=7, experts_per_token=3)
    got = np.asarray(jax.jit(lambda r, x: r(x))(router, x))
    arrays = [np.asarray(p[...], np.float64) for p in (router.scale, router.proj, router.per_expert_scale)]
    expected = np.array([[oracles.router(token, *arrays, 3) for token in row] for row in x])
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert ((got > 0).sum(-1) == 3).all()  # zero for those not chosen
    np.testing.assert_allclose((got / arrays[2]).sum(-1), 1, rtol=1e-5)  # renormalised, then each times its own scale
    narrow = jax.eval_shape(lambda r, x: r(x), router, jnp.asarray(x, jnp.bfloat16))
    assert narrow.dtype == jnp.float32  # whatever the dtype of the stream


@nnx.dataclass
class Open(Site):
    def __call__(self, x):
        return x


def test_an_open_site_gives_the_same_output():
    """An edit at `expert_hidden` or `expert_out` switches to the open path, which computes the same."""
    router, experts, x = parts(num_experts=5)
    run = jax.jit(lambda r, e, x: e(x, r(x), "blocks"))
    closed = run(router, experts, x)
    texts = [run.lower(router, experts, x).as_text()]
    for name in ("hidden", "out"):
        setattr(experts, name, Open(f"expert_{name}"))
        np.testing.assert_allclose(run(router, experts, x), closed, atol=1e-5)
        texts.append(run.lower(router, experts, x).as_text())
        setattr(experts, name, Site(f"expert_{name}"))
    assert ["stablehlo.while" in t for t in texts] == [True, False, False]
