"""Sites: the closed list is the truth, every site is in the computation, and unused ones cost nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from penzai import pz

import interp
from dgemma_jax.config import ModelConfig, SamplerConfig
from dgemma_jax.diffusion.sampler import denoise_step, start
from dgemma_jax.nn import cache as kv
from dgemma_jax.nn import moe, transformer
from dgemma_jax.nn.sites import LAYER_SITES, MODEL_SITES, Site
from interp.surgery import full_name

B, T, S = 2, 5, 17  # rows, prompt tokens, slots of the cache


@nnx.dataclass
class Disturb(Site):
    """Multiplies by 1 + gate * a pattern along the last axis."""

    gate: jax.Array = nnx.data()

    def __call__(self, x):
        # A norm before another norm forgets its scale, unless eps outweighs the mean square: hence 1e4.
        pattern = [1e4] if x.shape[-1] == 1 else np.arange(x.shape[-1]) % 3
        pattern = jnp.asarray(pattern, jnp.float32).reshape([1] * (x.ndim - 1) + [-1])
        return (x * (1 + self.gate * pattern)).astype(x.dtype)


@nnx.dataclass
class Bare(nnx.Module):
    """The identity, and no site."""

    def __call__(self, x):
        return x


def by_name(model):
    """Every site of the tree by full name, found without `interp.at`."""
    nodes = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda n: isinstance(n, Site))[0]
    return [(full_name(path, node), node) for path, node in nodes if isinstance(node, Site)]


def closed_list(config):
    """The names that the closed list promises."""
    return {*MODEL_SITES, *(f"layers.{i}.{name}" for i in range(config.num_layers) for name in LAYER_SITES)}


def prompt(config):
    return jax.random.randint(jax.random.key(1), (B, T), 0, config.vocab_size)


def whole(model):
    """All that the model computes: a prefill, then one denoising step with self-conditioning."""
    pre = model.prefill(prompt(model.config), jnp.ones((B, T), bool), kv.empty(model.config, B, S, model.dtype))
    zero = jnp.zeros((B,), jnp.int32)
    state = start(jax.random.split(jax.random.key(2), B), zero, zero > 0, model.config.canvas_length, model)
    state = state.replace(soft=jax.random.normal(jax.random.key(3), state.soft.shape, state.soft.dtype))
    view = denoise_step(model, state, pre.cache, SamplerConfig())[1]
    return pre.hidden, view.shaped_logits, view.next_soft, view.next_canvas


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_closed_list_equals_the_tree(dtype):
    model = oracles.build(ModelConfig.tiny(), dtype=dtype)
    names = [name for name, _ in by_name(model)]
    assert len(names) == len(set(names))
    assert set(names) == closed_list(model.config) == set(interp.sites(model).names)
    assert nnx.find_duplicates(model) == []


def test_the_release_can_be_browsed_without_weights():
    model = transformer.abstract(ModelConfig())
    listed = interp.sites(model)
    assert set(listed.names) == closed_list(model.config) and len(listed) == 30 * len(LAYER_SITES) + len(MODEL_SITES)
    assert listed.matching("layers.5.attn_k")[0].shape == ("B", "T", 2, 512)
    assert listed.matching("layers.4.attn_k")[0].shape == ("B", "T", 8, 256)
    assert {info.dtype for info in listed} == {"bfloat16", "float32", "int32"}
    assert interp.at(model, "layers.*.router_probs").count() == 30
    edited = interp.at(model, "layers.17.resid_post").apply(lambda s: Disturb(s.name, jnp.ones(())))
    assert interp.at(edited, "layers.17.resid_post").get() is not interp.at(model, "layers.17.resid_post").get()


def test_the_table_folds_layers_that_are_alike(tiny):
    text = str(interp.sites(tiny))
    assert "\nlayers.*.resid_post  [B, T, D=32]" in text.replace("            ", "  ").replace("    ", "  ")
    assert len(text.splitlines()) < 2 + 2 * len(LAYER_SITES) + len(MODEL_SITES)
    two = [line.split() for line in text.splitlines() if line.startswith("layers.*.attn_k ")]
    assert [(line[3], line[6]) for line in two] == [("K=2,", "0-1"), ("K=1,", "2")]
    assert all(meaning in text for _, _, meaning in [*LAYER_SITES.values(), *MODEL_SITES.values()])


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("logits", 1),
        ("layers.1.resid_post", 1),
        ("layers.*.router_probs", 3),
        ("layers.[0-1].resid_*", 6),
        ("*", 3 * len(LAYER_SITES) + len(MODEL_SITES)),
    ],
)
def test_patterns(tiny, pattern, count):
    selection = interp.at(tiny, pattern)
    assert isinstance(selection, pz.Selection) and selection.count() == count
    assert len(interp.sites(tiny).matching(pattern)) == count


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("layers.7.resid_post", "layers.2.resid_post .3 layers"),
        ("resid_post", r"layers\.\*\.resid_post"),
        ("layers.*.router_prob", r"near it: layers\.\*\.router_probs"),
        ("Logits", "near it: logits"),
        ("qqq", "canvas_embed"),
        ("", "canvas_embed"),
    ],
)
def test_no_match_is_an_error_that_lists_near_names(tiny, pattern, hint):
    for find in (functools.partial(interp.at, tiny), interp.sites(tiny).matching):
        with pytest.raises(ValueError, match=hint):
            find(pattern)


def test_a_selection_edits_a_copy_and_finds_the_edit_again(tiny):
    before = jax.tree.structure(tiny)
    one = jnp.ones(())
    edited = interp.at(tiny, "layers.1.mlp_out").set(Disturb("mlp_out", one))
    assert jax.tree.structure(tiny) == before
    changed = [name for name, site in by_name(edited) if type(site) is not Site]
    assert changed == ["layers.1.mlp_out"]
    assert jax.tree.leaves(edited.embedder)[0] is jax.tree.leaves(tiny.embedder)[0]  # weights are shared, not copied
    restored = interp.at(edited, "layers.1.mlp_out").apply(lambda site: Site(site.name))
    assert jax.tree.structure(restored) == before
    every = interp.at(tiny, "layers.*.mlp_out").apply(lambda site: Disturb(site.name, one))
    assert interp.at(every, "layers.*.mlp_out").count() == 3


@pytest.mark.slow
def test_every_site_is_in_the_computation(tiny):
    """One gated edit at every site; the gates are data, so that all interventions share one compile."""
    names = [name for name, _ in by_name(tiny)]

    @jax.jit
    def run(model, gates):
        gated = interp.at(model, "*")
        edits = [Disturb(site.name, gates[i]) for i, site in enumerate(gated.get_sequence())]
        return whole(gated.set_sequence(edits))

    assert names == [full_name(p, s) for p, s in interp.at(tiny, "*").get_by_path().items()]
    neutral = run(tiny, jnp.zeros(len(names)))
    for gated, plain in zip(neutral, jax.jit(whole)(tiny), strict=True):  # neutral, up to the order of sums
        np.testing.assert_allclose(gated, plain, atol=1e-4, rtol=1e-4)
    silent = []
    for i, name in enumerate(names):
        outcome = run(tiny, jnp.zeros(len(names)).at[i].set(1.0))
        if all(np.allclose(a, b, atol=1e-3) for a, b in zip(neutral, outcome, strict=True)):
            silent.append(name)
    assert silent == [] and run._cache_size() == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_dtypes_are_those_seen(dtype):
    model = oracles.build(ModelConfig.tiny(), dtype=dtype)
    seen = {}

    class Recorder(Site):
        def __init__(self, name, full):
            self.name, self.full = name, full

        def __call__(self, x):
            seen.setdefault(self.full, set()).add((x.shape, str(x.dtype)))
            return x

    everything = interp.at(model, "*").get_by_path()
    recording = interp.at(model, "*").set_by_path({p: Recorder(s.name, full_name(p, s)) for p, s in everything.items()})
    jax.eval_shape(whole, recording)
    canvas = model.config.canvas_length
    for info in interp.sites(model):
        slots = {"B": B, "C": canvas}
        kinds = [slots | {"T": canvas, "S": None}]
        if "T" in info.axes:
            kinds.append(slots | {"T": T, "S": None})
        expected = {tuple(kind.get(s, s) for s in info.shape) for kind in kinds}
        got = seen.pop(info.name)
        assert {dtype for _, dtype in got} == {info.dtype}, info
        for shape, _ in got:  # S depends on the layer's cache: any size goes
            assert tuple(None if a == "S" else n for a, n in zip(info.axes, shape, strict=True)) in expected, info
    assert seen == {}


@pytest.mark.parametrize("form", ["auto", "blocks"])
def test_unused_sites_are_free(monkeypatch, form):
    """The program is word for word that of a model which has the identity in place of every site."""
    model = oracles.build(ModelConfig.tiny())
    model.moe = form
    bare = pz.select(model).at_instances_of(Site).set(Bare())
    tokens, canvas = prompt(model.config), jnp.zeros((B, model.config.canvas_length), jnp.int32)
    cache = kv.empty(model.config, B, S, model.dtype)
    soft = jnp.zeros((*canvas.shape, model.config.embed_dim))

    def text(model):
        prefill = jax.jit(lambda model: model.prefill(tokens, tokens >= 0, cache)).lower(model).as_text()
        denoise = jax.jit(lambda model: model.unembed(model.denoise(canvas, cache, soft))).lower(model).as_text()
        return prefill, denoise

    with_sites = text(model)
    for module in (moe, transformer):  # a bare identity would otherwise open the fused paths
        monkeypatch.setattr(module, "is_open", lambda site: False)
    without = text(bare)
    assert len(without[0]) > 10_000
    assert with_sites == without
