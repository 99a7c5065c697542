"""Experts: every form is the same function, also under the transforms; the router chooses as it says."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

from dgemma_jax.config import ModelConfig
from dgemma_jax.nn import grouped, moe
from dgemma_jax.nn.packed import pack
from dgemma_jax.nn.sites import Site

FORMS = ("dense", "scan", "blocks", "capacity", "ragged")
D, F = 8, 4


@functools.cache
def jitted(form, layout="efd"):
    return jax.jit(functools.partial(moe._apply, form, layout=layout), static_argnums=0)


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


def test_layouts_hold_the_same_experts():
    x, w, gate_up, down = draw(9, 20, 3)
    expected = oracles.experts(x, w, gate_up, down)
    for form in FORMS:
        got = jitted(form, "edf")(3, x, w, np.ascontiguousarray(gate_up.swapaxes(1, 2)), down)
        np.testing.assert_allclose(got, expected, atol=2e-5, err_msg=form)


def test_forms_agree_under_vmap_grad_and_jvp():
    batch = [draw(9, 5, 2, seed=s) for s in range(3)]
    x, w, up, down = (np.stack(a) for a in zip(*batch, strict=True))
    args = (x, w, up[0], down[0])  # rows share the experts
    tangent = tuple(np.random.default_rng(9).standard_normal(a.shape).astype(np.float32) for a in args)
    tangent = (tangent[0], tangent[1] * (w > 0), *tangent[2:])  # which experts are chosen does not move

    def run(form, args, tangent, forward=True):
        def total(x, w, up, down):
            out = jax.vmap(lambda x, w: moe._apply(form, 2, x, w, up, down))(x, w)
            return jnp.sum(jnp.sin(out)), out

        grads, out = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)(*args)
        slope = jax.jvp(lambda *a: total(*a)[0], args, tangent)[1] if forward else 0.0
        return out, slope, grads[0], grads[1] * (args[1] > 0), *grads[2:]

    reference = jax.jit(functools.partial(run, "dense"))(args, tangent)
    np.testing.assert_allclose(reference[0], [oracles.experts(*b[:2], *args[2:]) for b in batch], atol=2e-5)
    along = sum(np.vdot(g, t) for g, t in zip(reference[2:], tangent, strict=True))
    np.testing.assert_allclose(reference[1], along, rtol=1e-4)  # forward and reverse mode agree
    for form in FORMS[1:]:
        found = jax.jit(functools.partial(run, form, forward=form != "ragged"))(args, tangent)
        for i, (got, wanted) in enumerate(zip(found, reference, strict=True)):
            if form != "ragged" or i != 1:
                np.testing.assert_allclose(got, wanted, atol=1e-4, err_msg=form)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: moe._apply("ragged", 2, x, w[0], up[0], down[0]), (x[0],), (x[0],))


def test_an_edit_may_widen_the_dtype():
    """float32 residuals meet bfloat16 weights: the product and its gradients are those of the wider dtype."""
    x, w, *weights = draw(5, 4, 2)
    narrow = [jnp.asarray(a, jnp.bfloat16) for a in weights]

    def gradient(form, x, gate_up, down):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(moe._apply(form, 2, a[0], w, *a[1:]))), (0, 1, 2))(x, gate_up, down)

    ragged, dense = (jax.jit(functools.partial(gradient, form))(x, *narrow) for form in ("ragged", "dense"))
    chex.assert_trees_all_equal_dtypes(ragged, (x, *narrow))
    chex.assert_trees_all_close(ragged, dense, atol=2e-2)


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


def test_even_loads_fit_and_any_other_goes_to_blocks(monkeypatch):
    """No token is dropped: what does not fit is done by `blocks`, which is not touched otherwise."""
    assert [moe.room_of(a, e) for a, e in ((1024, 32), (2048, 128), (8, 8), (1, 40))] == [64, 40, 8, 8]
    even, odd = draw(64, 8, 2), draw(64, 8, 2, "same")
    assert np.count_nonzero(even[1], 0).max() <= moe.room_of(128, 8) < np.count_nonzero(odd[1], 0).max()
    monkeypatch.setattr(moe, "blocks", lambda top, x, *rest: jnp.full_like(x, jnp.nan))
    run = jax.jit(functools.partial(moe.capacity, 2))
    np.testing.assert_allclose(run(*even), oracles.experts(*even), atol=2e-5)
    assert np.isnan(run(*odd)).all()


def test_choice_of_form():
    table = {
        ("cpu", 256, 8, 2): "dense", ("cpu", 256, 128, 8): "capacity", ("cpu", 1, 128, 8): "dense",
        ("cuda", 256, 128, 8): "dense", ("cuda", 4096, 128, 8): "blocks", ("cuda", 4096, 16, 8): "dense",
        ("tpu", 512, 128, 8): "dense", ("tpu", 513, 128, 8): "blocks",
        ("tpu", 256, 128, 8, "edf"): "ragged", ("tpu", 256, 16, 8, "edf"): "dense", ("cpu", 1, 128, 8, "edf"): "dense",
        ("cuda", 256, 128, 8, "edf"): "dense",
    }  # fmt: skip
    assert {key: moe.choose(*key) for key in table} == table


def test_auto_is_decided_by_the_platform_compiled_for():
    args = draw(12, 20, 2)
    auto = jax.jit(functools.partial(moe.run, "auto", 2))
    traced = auto.trace(*args)
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda")}
    assert ("stablehlo.while" in texts["cpu"], "stablehlo.while" in texts["cuda"]) == (True, False)  # the blocks for loads that do not fit
    np.testing.assert_allclose(auto(*args), oracles.experts(*args), atol=2e-5)
    few = jax.jit(functools.partial(moe.run, "auto", 2)).lower(*draw(12, 4, 2)).as_text()
    assert "stablehlo.while" not in few and "stablehlo.case" not in few
    with pytest.raises(ValueError, match=r"unknown expert form 'sparse'; known are \('auto', 'dense', 'scan', 'blocks'"):
        moe.run("sparse", 2, *args)


def groups(rows, count, seed):
    """Rows sorted by group [A, 6] and the sizes of the groups, some of them empty."""
    rng = np.random.default_rng(seed)
    sizes = np.bincount(rng.integers(0, count, rows), minlength=count).astype(np.int32)
    return rng.standard_normal((rows, 6)).astype(np.float32), sizes


def by_owner(x, w, sizes):
    """What `grouped.rows` says, with the matrix of every row looked up."""
    return jnp.einsum("ai,aio->ao", x, w[jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(x))])


TRANSFORMS = {
    "plain": lambda f, x, w, s: f(x[0], w, s[0]),
    "shared matrices": lambda f, x, w, s: jax.vmap(f, (0, None, 0))(x, w, s),
    "shared sizes": lambda f, x, w, s: jax.vmap(f, (0, None, None))(x, w, s[0]),
    "own matrices": lambda f, x, w, s: jax.vmap(f, (None, 0, None))(x[0], jnp.stack([w, 2 * w]), s[0]),
    "twice": lambda f, x, w, s: jax.vmap(lambda k: jax.vmap(f, (0, None, 0))(k * x, w, s))(jnp.arange(2.0)),
    "gradients": lambda f, x, w, s: jax.grad(total(f), (0, 1))(x[0], w, s[0]),
    "gradients of each": lambda f, x, w, s: jax.vmap(jax.grad(total(f), (0, 1)), (0, None, 0))(x, w, s),
    "gradient of all": lambda f, x, w, s: jax.grad(lambda w: jax.vmap(total(f), (0, None, 0))(x, w, s).sum())(w),
    "jacobian": lambda f, x, w, s: jax.jacrev(f, (0, 1))(x[0], w, s[0]),
    "recomputed": lambda f, x, w, s: jax.grad(jax.checkpoint(total(f)), (0, 1))(x[0], w, s[0]),
    "second derivatives of each": lambda f, x, w, s: jax.vmap(jax.grad(twice(f), (0, 1)), (0, None, 0))(x, w, s),
}


def total(f):
    return lambda x, w, s: jnp.sum(jnp.sin(f(x, w, s)))


def twice(f):
    return lambda *args: sum(jnp.sum(jnp.cos(g)) for g in jax.grad(total(f), (0, 1))(*args))


@pytest.mark.parametrize(
    "turned, names",
    [
        (True, ["shared matrices", "gradients of each"]),
        *(pytest.param(turned, list(TRANSFORMS), marks=pytest.mark.slow) for turned in (False, True)),
    ],
)
def test_grouped_rows_under_transforms(turned, names):
    """Also where rows are mapped and matrices are not, of which `lax.ragged_dot` alone is not capable."""
    x, sizes = (np.stack(a) for a in zip(*(groups(11, 4, seed) for seed in range(3)), strict=True))
    w = np.random.default_rng(8).standard_normal((4, 6, 5)).astype(np.float32)
    ours = grouped.rows(grouped.XLA, turned)

    @functools.partial(jax.jit, static_argnums=0)
    def all_of(is_ours, x, w, sizes):
        f = (lambda x, w, s: ours(x, w.swapaxes(1, 2) if turned else w, s)) if is_ours else by_owner
        return {name: TRANSFORMS[name](f, x, w, sizes) for name in names}

    found, expected = all_of(True, x, w, sizes), all_of(False, x, w, sizes)
    for name in names:
        chex.assert_trees_all_close(found[name], expected[name], atol=2e-4, custom_message=name)


def test_a_mapped_product_is_one_call():
    """What a sweep maps over joins the rows: one product with the shared matrices, not one a member."""
    x, sizes = groups(11, 4, 0)
    w = np.ones((4, 6, 5), np.float32)
    mapped = jax.vmap(grouped.rows(grouped.XLA, False), (0, None, 0))
    text = str(jax.make_jaxpr(mapped)(np.stack([x, x]), w, np.stack([sizes, sizes])))
    assert text.count("ragged_dot_general[") == 1 and "scan[" not in text and "f32[22,5]" in text


def test_weight_gradients_are_made_only_when_asked_for():
    """Their kernel cannot be traced everywhere."""
    kernel = grouped.Kernel(grouped.XLA.rows, lambda *args: pytest.fail("no weight is differentiated"))
    x, sizes = groups(11, 4, 0)
    w = np.ones((4, 6, 5), np.float32)
    jax.jit(jax.grad(total(grouped.rows(kernel, False)))).lower(x, w, sizes)
    with pytest.raises(pytest.fail.Exception):
        jax.grad(total(grouped.rows(kernel, False)), 1)(x, w, sizes)


def hopper_arguments(tokens=11, experts=5, top=2):
    """Sizes that the Hopper kernels take: whole tiles of 64 on all sides, bfloat16."""
    rng = np.random.default_rng(3)
    weights = draw(tokens, experts, top)[1]
    shapes = ((tokens, 64), (experts, 256, 64), (experts, 128, 64))
    x, gate_up, down = (jnp.asarray(rng.standard_normal(s) / 8, jnp.bfloat16) for s in shapes)
    return 8 * x, weights, gate_up, down


@pytest.mark.slow
@pytest.mark.parametrize("layout", moe.LAYOUTS)
def test_hopper_kernels_by_their_interpreter(monkeypatch, layout):
    """Values, and gradients in input and weights, of the kernels for a GPU, computed on the CPU."""
    from jax.experimental.pallas import mosaic_gpu

    if not hasattr(mosaic_gpu, "force_gpu_interpret_mode"):
        pytest.skip("this JAX has no interpreter for Mosaic kernels on GPUs (0.12 has)")
    x, weights, gate_up, down = hopper_arguments(tokens=12)  # not the shapes of a test that lowers the kernels
    gate_up = gate_up.swapaxes(1, 2) if layout == "edf" else gate_up

    def run(form, *args):
        def loss(x, gate_up, down):
            out = moe._apply(form, 2, x, weights, gate_up, down, layout=layout)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*args)
        return out, *grads

    expected = jax.jit(functools.partial(run, "dense"))(*(a.astype(jnp.float32) for a in (x, gate_up, down)))
    with mosaic_gpu.force_gpu_interpret_mode():
        with monkeypatch.context() as patched:
            patched.setattr(jax, "devices", lambda *_: [types.SimpleNamespace(core_count=4)])
            traced = jax.jit(functools.partial(run, "mosaic")).trace(x, gate_up, down)
        found = traced.lower().compile()(x, gate_up, down)
    for got, wanted in zip(found, expected, strict=True):
        size = float(jnp.abs(wanted).max())
        np.testing.assert_allclose(np.asarray(got, np.float32), wanted, atol=0.03 * size)


def test_mosaic_is_for_cuda():
    args = hopper_arguments()
    mosaic = jax.jit(functools.partial(moe.run, "mosaic", 2))
    texts = {p: mosaic.trace(*args).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda")}
    assert ("mosaic_gpu" in texts["cuda"], "mosaic_gpu" in texts["cpu"]) == (True, False)
    assert texts["cpu"].count("stablehlo.dot_general") == 2  # so few experts run densely there


def test_what_the_hopper_kernels_take():
    x, weights, gate_up, down = hopper_arguments()
    wide = [a.astype(jnp.float32) for a in (x, gate_up, down)]
    assert grouped.fits_hopper(x, gate_up, down)
    for others in ((wide[0], gate_up, down), wide, (x[:, :48], gate_up[..., :48], down[..., :48])):
        assert not grouped.fits_hopper(*others)
        jax.eval_shape(functools.partial(moe.run, "mosaic", 2), others[0], weights, *others[1:])
    packed = pack(gate_up, "int8", (2,)), pack(down, "int8", (2,))
    text = jax.jit(functools.partial(moe.run, "mosaic", 2)).trace(x, weights, *packed)
    assert "mosaic_gpu" not in text.lower(lowering_platforms=("cuda",)).as_text()


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
