"""Edges: they add up to the nodes, and one of them is the derivative of a real change of one receiver's input."""

import jax
import numpy as np
import pytest
from oracles import build

import dgemma_jax as dg
import interp
from interp import edge_attribution, paired_runs
from interp.metrics import LogitDifference

pytestmark = pytest.mark.slow

C, STEPS = 5, 2
SAMPLER = dg.SamplerConfig(max_denoising_steps=STEPS, eos_token_ids=(1,), early_stop=False)
CLEAN, CORRUPT = [[7, 8, 9, 10], [11, 12, 13]], [[7, 20, 9, 10], [11, 21, 22]]
METRIC = LogitDifference(positions=[[1], [2]], tokens=[[3], [4]], others=[[5], [6]])
CUTS = ["layers.*.resid_pre", "layers.*.resid_mid", "layers.*.resid_post"]


@pytest.fixture(scope="module")
def model():
    """Two layers; norms and layer scalars differ from one."""
    kinds = ("sliding_attention", "full_attention")
    sizes = dict(layer_types=kinds, canvas_length=C, embed_dim=16, vocab_size=32, hidden_dim=16, sliding_window=4)
    return build(dg.ModelConfig.tiny(**sizes))


def edges(model, corrupt=CORRUPT, **options):
    options = dict(form="plain", sampler=SAMPLER, rows_at_once=8) | options
    return interp.edge_attribution_patching(model, CLEAN, corrupt, METRIC, **options)


@pytest.fixture(scope="module")
def plain(model):
    return edges(model)


def test_edges_across_a_cut_add_up_to_the_stream_there(model, plain):
    """Through every cut: senders before it into receivers behind it. So no sender, receiver or scalar is missing."""
    nodes = interp.attribution_patching(model, CLEAN, CORRUPT, METRIC, [*CUTS, "cache"], form="plain", sampler=SAMPLER)

    def when(name):
        """Layer, and place within it, of what a sender writes or a receiver reads."""
        if not name.startswith("layers."):
            return 9.0 if name == "logits" else -1.0
        late = {"attn_out": 0.4, "mlp_out": 0.8, "moe_out": 0.8, "mlp": 0.6, "router": 0.6, "experts": 0.6}
        return int(name.split(".")[1]) + late.get(name.split(".")[2], 0.2)

    stream = plain.scores[:, [name != "cache" for name in plain.senders]]
    senders = np.array([when(name) for name in plain.senders if name != "cache"])
    receivers = np.array([when(name) for name in plain.receivers])
    for cut, within in zip(CUTS, (0.1, 0.5, 0.9), strict=True):
        for layer in (0, 1):
            total = stream[:, senders < layer + within][:, :, receivers > layer + within].sum((1, 2))
            wanted = nodes[cut][:, layer].sum(1)
            np.testing.assert_allclose(total, wanted, atol=1e-4, rtol=1e-3, err_msg=f"{cut} {layer}")
            assert np.abs(wanted).max() > 0.1
    early = senders[:, None] > receivers
    assert early.sum() > 10 and not stream[:, early].any()
    prompt = plain.scores[:, plain.senders.index("cache")].sum(1)
    np.testing.assert_allclose(prompt, nodes["cache"].sum((1, 2)), atol=1e-4, rtol=1e-3)
    assert np.abs(plain["cache", "layers.1.attn_v"]).min() > 0 and not plain["cache", "layers.1.mlp"].any()


@jax.jit
def listen(model, side):
    names = ("layers.0.resid_pre", "layers.0.resid_mid", "layers.1.resid_mid")
    return paired_runs.forward(model, side, {}, names, SAMPLER, "denoise")[1]


@jax.jit
def with_receiver_moved(model, side, middle, change, scale):
    """The metric if the dense MLP of layer 1 read a residual with a share of the change in it, and nothing else did."""
    layer = model.layers[1]
    outs = [layer.mlp(layer.pre_mlp_norm(x)) for x in (middle + scale * change, middle)]
    adds = {"layers.1.mlp_out": outs[0] - outs[1]}
    return METRIC(paired_runs.forward(model, side, adds, (), SAMPLER, "denoise")[0])


def test_an_edge_is_the_derivative_of_a_real_change(model, plain):
    """Attention of layer 0 into the MLP of layer 1: what attention wrote, grown by the layer scalar."""
    recipient, donor = paired_runs.run_pairs(model, CLEAN, CORRUPT, METRIC, None, "denoising", 0, SAMPLER).at([1])
    here, there = listen(model, recipient), listen(model, donor)
    wrote = [seen["layers.0.resid_mid"] - seen["layers.0.resid_pre"] for seen in (there, here)]
    change = (wrote[0] - wrote[1]) * model.layers[0].denoise_scalar[...]
    middle, step = here["layers.1.resid_mid"], 1e-2
    ahead, behind = (with_receiver_moved(model, recipient, middle, change, s) for s in (step, -step))
    slope = np.asarray(ahead - behind) / (2 * step)
    np.testing.assert_allclose(plain["layers.0.attn_out", "layers.1.mlp"][1], slope, rtol=0.02, atol=2e-3)
    assert np.abs(slope).max() > 0.01


def test_heads_are_parts_of_attention(model, plain):
    heads = edges(model, heads=True)
    for layer in (0, 1):
        own = [i for i, name in enumerate(heads.senders) if name.startswith(f"layers.{layer}.attn_z")]
        assert len(own) == model.config.num_heads
        whole = plain.scores[:, plain.senders.index(f"layers.{layer}.attn_out")]
        np.testing.assert_allclose(heads.scores[:, own].sum(1), whole, atol=1e-5, rtol=1e-4)


def test_identity_programs_positions_and_points(model, plain):
    programs = edge_attribution._estimate._cache_size()
    same = edges(model, corrupt=CLEAN, form="integrated", points=4)
    assert same.scores.size > 100 and same.size == 0
    full = edges(model, form="integrated", points=4)
    parts = [edges(model, form="integrated", points=4, positions=p).scores for p in (slice(0, 2), slice(2, None))]
    on_stream = slice(0, -1)  # the cached prompt has no place on the canvas
    np.testing.assert_allclose(sum(parts)[:, on_stream], full.scores[:, on_stream], atol=1e-5)
    assert edge_attribution._estimate._cache_size() == programs  # points are data


def test_what_is_refused(model):
    with pytest.raises(ValueError, match="form must be one of plain, integrated"):
        edges(model, form="exact")
    with pytest.raises(ValueError, match="points must be an integer >= 1"):
        edges(model, form="integrated", points=0)
    with pytest.raises(ValueError, match="corrupt tokens"):
        edges(model, corrupt=[[7], [11, 12, 13]])


def test_an_edge_map_is_read_drawn_and_kept(plain, tmp_path):
    sender, receiver, step, score = plain.top(1)[0]
    assert plain[sender, receiver][plain.steps.index(step)].mean() == pytest.approx(score)
    assert abs(score) == pytest.approx(np.abs(plain.scores.mean(-1)).max())
    assert f"{sender} -> {receiver}  step {step}" in repr(plain) and "edges (denoising, plain)" in repr(plain)
    again = interp.EdgeMap.load(plain.save(tmp_path / "edges"))
    np.testing.assert_array_equal(again.scores, plain.scores)
    assert again.senders == plain.senders and again.steps == plain.steps and again.method == plain.method
    figure = plain.plot()
    assert len([axes for axes in figure.axes if axes.images]) == STEPS
    with pytest.raises(KeyError, match="'layers.9.mlp' is none of"):
        plain["canvas_embed", "layers.9.mlp"]
    with pytest.raises(ValueError, match="steps, senders, receivers and rows make"):
        interp.EdgeMap(scores=plain.scores, senders=("a",), receivers=("b",), steps=[0], base=plain.base, donor=plain.donor)
