"""Depth of the model's programs: the published numbers, the law D(T) = a + b T, cuts, and the sorted experts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import build

import interp
from dgemma_jax.cli import main
from dgemma_jax.config import ModelConfig, SamplerConfig
from dgemma_jax.nn.transformer import abstract
from interp.depth import costs
from interp.depth.programs import PUBLISHED
from interp.depth.sorted_experts import with_sorted_experts

TINY = ModelConfig.tiny(layer_types=("sliding_attention", "full_attention"))


GROUP = ModelConfig(layer_types=ModelConfig().layer_types[:6])  # five sliding layers and a full one, of the release


@pytest.fixture(scope="module")
def group():
    return interp.model_depth(GROUP)


def test_the_release_at_its_whole_context(group):
    """arXiv 2606.20560, Table 1. What our program lacks is told in `interp.depth.programs`."""
    assert group.context == 262_144
    one, *steps = (
        sum(v.depth for v in found.path if v.site.startswith("layers.") and v.site != "layers.0.resid_pre")
        for found in (group.causal, *group.steps.values())
    )
    causal = group.causal.depth + 4 * one  # all 30 layers: what lies in the six, five times
    slope = group.line[1] + 4 * (steps[1] - steps[0]) / 47
    assert (causal, slope) == (22_224, 11_973)
    assert causal == pytest.approx(PUBLISHED["causal"], rel=0.05)
    assert slope == pytest.approx((PUBLISHED[48] - PUBLISHED[1]) / 47, rel=0.04)


@pytest.mark.slow
def test_with_two_canvases_a_step_the_published_numbers_come_out():
    found = interp.model_depth(ModelConfig(), canvases=2)
    assert found.line == (12_056, 12_693) and "2 canvases a step" in repr(found)
    for row, depth in zip(found.rows(), PUBLISHED.values(), strict=True):
        assert row["depth"] == pytest.approx(depth, rel=0.05)
        assert row["ratio"] == pytest.approx(depth / PUBLISHED["causal"], rel=0.05)


def test_sorting_is_what_makes_the_causal_pass_deep(group):
    """Two bitonic networks a layer over 2^21 assignments, against 2^11 on a canvas."""
    assert group.causal.operations["sort"] == 6 * 2 * (21 * 22 // 2)
    step = (group.steps[48].operations["sort"] - group.steps[1].operations["sort"]) / 47
    assert step == 6 * 2 * (11 * 12 // 2) + 2 * (8 * 9 // 2)  # and two sorts of the entropies


@pytest.fixture(scope="module")
def tiny():
    return interp.model_depth(TINY, steps=(1, 2, 5, 1000))


def test_depth_is_linear_in_the_steps(tiny):
    fixed, slope = tiny.line
    assert [tiny.steps[n].depth for n in (2, 5, 1000)] == [fixed + slope * n for n in (2, 5, 1000)]
    assert "D(T) = " in repr(tiny) and tiny.rows()[0]["ratio"] == 1
    assert tiny.plot().axes[0].get_xlabel() == "denoising steps"


def test_an_interpretable_bottleneck_takes_the_steps_away(tiny):
    """Canvas and S read after every step: 1,000 steps are no deeper than one. One carrier alone does not do it."""
    both, alone = (interp.model_depth(TINY, steps=(3, 1000), cuts=["cache", *c]) for c in (["canvas", "S"], ["S"]))
    assert both.steps[1000].depth == both.steps[3].depth < tiny.steps[2].depth
    assert alone.steps[1000].depth > 100 * both.steps[1000].depth
    every = interp.model_depth(TINY, steps=(3,), cuts=["cache", "canvas", "S", "layers.*.resid_post"])
    assert every.steps[3].depth < both.steps[3].depth / 2
    assert every.causal.depth < both.causal.depth / 2


def test_an_opaque_cache_puts_the_context_on_the_path(tiny):
    whole = interp.model_depth(TINY, steps=1, cuts=())
    extra = whole.steps[1].depth - tiny.steps[1].depth
    assert 0 < extra < tiny.causal.depth  # both passes go up the layers together: the last cache enters the last layer
    with pytest.raises(ValueError, match="no mark matches the cut 'layers.9.moe_out'"):
        interp.model_depth(TINY, steps=1, cuts=["cache", "layers.9.moe_out"])


def test_other_forms_samplers_tables_and_bundles(tiny):
    dense = interp.model_depth(TINY, steps=1, experts="dense")
    assert dense.causal.depth < tiny.causal.depth and "sort" not in dense.causal.operations
    google = SamplerConfig.google()
    public = interp.model_depth(abstract(TINY), steps=1, costs=costs.PUBLIC, sampler=google)
    assert "sort" in public.steps[1].unknown and public.causal.depth < tiny.causal.depth


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(context=513), "context must be 1 to 512"),
        (dict(steps=[0, 3]), "steps must be numbers of at least 1"),
        (dict(experts="ragged"), "experts must be one of"),
        (dict(canvases=0), "canvases must be at least 1"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        interp.model_depth(TINY, **options)


def test_sorted_experts_give_the_numbers_of_the_others():
    model = build(TINY)
    layer, other = model.layers[0], with_sorted_experts(model).layers[0].experts
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 5, TINY.embed_dim)), jnp.float32)
    assert type(other) is not type(layer.experts)

    @jax.jit
    def both(layer, other, x):
        weights = layer.router(x)
        return other(x, weights), layer.experts(x, weights, "dense")

    np.testing.assert_allclose(*both(layer, other, x), atol=2e-6)


def test_command(capsys, tmp_path):
    out = tmp_path / "depth.json"
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf()))
    code = main(["depth", str(tmp_path), "--steps", "1,3", "--cuts", "cache,canvas,S", "--json", "--out", str(out)])
    rows = json.loads(capsys.readouterr().out.splitlines()[0])
    assert code == 0 and [row["depth"] for row in rows] == [row["depth"] for row in json.loads(out.read_text())["rows"]]
    assert rows[1]["depth"] == rows[2]["depth"]
    assert main(["depth", str(tmp_path), "--context", "0"]) == 2
    assert "context must be" in capsys.readouterr().err
