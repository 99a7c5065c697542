"""Runs on eight devices: everything on a mesh is what it is on one device. `python on_meshes.py PART`; see test_meshes."""

import sys

import jax
import numpy as np
from jax.sharding import AxisType

import dgemma_jax as dg
import interp
from dgemma_jax.bench import collectives
from dgemma_jax.diffusion.generate import prefill_prompts
from dgemma_jax.nn.transformer import initialize

LAYERS = ("sliding_attention", "full_attention")
EVEN = dg.ModelConfig.tiny(num_experts=8, layer_types=LAYERS)
# Nothing divides by 2 or 8 but what must: 97 words, 3 heads, 6 experts; 48 hidden units divide by 8.
ODD = dg.ModelConfig.tiny(vocab_size=97, num_heads=3, num_kv_heads=1, num_experts=6, layer_types=LAYERS)
MANY = dg.ModelConfig.tiny(num_experts=20, experts_per_token=4, layer_types=LAYERS)  # more than run densely on CPU
PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9]]  # three rows


def bundle(config):
    sampler = dg.SamplerConfig(max_denoising_steps=3, early_stop=False, eos_token_ids=config.eos_token_ids)
    return dg.Bundle(config, initialize(config), None, sampler)


def mesh(devices=None, **axes):
    """As `jax.make_mesh` makes them unless told: with explicit axes."""
    explicit = (AxisType.Explicit,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=explicit, devices=devices)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def step(bundle, prompts):
    """What one step makes of prompts: logits, entropies, tokens, S."""
    cache = prefill_prompts(bundle.model, prompts, 1)
    canvas = np.random.default_rng(0).integers(0, 90, (len(prompts), bundle.config.canvas_length))
    soft = np.random.default_rng(1).normal(size=(*canvas.shape, bundle.config.embed_dim)).astype(np.float32)
    logits = dg.denoise(bundle.model, canvas, cache, soft)
    return logits, dg.soft_embed(bundle.model, logits)


def generation():
    for config, prompts, over in [
        (EVEN, PROMPTS * 3, mesh(data=8)),  # nine rows over eight
        (MANY, [*PROMPTS, [4]] * 2, mesh(data=8)),
        (ODD, PROMPTS, mesh(data=2, tensor=4)),
        (ODD, PROMPTS, mesh(jax.devices()[:6], expert=3, data=2)),
    ]:
        one = bundle(config)
        many = one.on(over)
        same(step(one, prompts), step(many, prompts))
        options = dict(seed=list(range(len(prompts))), max_new_tokens=config.canvas_length + 1)
        a, b = dg.generate(one, prompts, **options), dg.generate(many, prompts, **options)
        assert (a.tokens == b.tokens).all() and (a.num_steps == b.num_steps).all()
        first = slice(None), 0  # of each block; rounding grows from step to step
        same(a.trajectory.entropy[first], b.trajectory.entropy[first])
        np.testing.assert_allclose(a.trajectory.entropy, b.trajectory.entropy, atol=1e-4)
        print("equal", over.shape)
    assert (dg.resume(many, b.trajectory.moment(1, 1)).tokens == b.tokens).all()


def rows():
    """Rows lie over `data`, within the loop too."""
    many = bundle(EVEN).on(mesh(data=4, tensor=2))
    out = dg.generate(many, PROMPTS[:2] * 2, record=dg.Record(soft=True), max_new_tokens=1)
    moment = out.trajectory.moment(0, 1)
    for x in (moment.state.soft, moment.state.canvas, moment.cache.layers[0].k):
        assert x.addressable_shards[0].data.shape[0] == 1, x.sharding
    assert moment.cache.layers[0].k.addressable_shards[0].data.shape[1] == 1, "key heads lie along tensor"


def studies():
    """What `interp` makes of a step: captures, sweeps, estimates by gradients, knock-outs, saliency."""
    one = bundle(EVEN)
    many = one.on(mesh(data=2, expert=2, tensor=2))
    metric = interp.LogitDifference(positions=2, tokens=7, others=8)
    clean, corrupt = [[5, 6], [7, 8]], [[5, 9], [7, 3]]
    site, few = "layers.0.resid_post", dict(steps=[1], positions=[0, 2, 4])
    record = dg.Record(soft=True)
    fed = dg.generate(one, PROMPTS, max_new_tokens=1, record=record).trajectory.moment(0, 1)

    def second(b):
        """Before the second step of its own run, with the canvas and S of one device: rounding starts anew."""
        own = dg.generate(b, PROMPTS, max_new_tokens=1, record=record).trajectory.moment(0, 1)
        return own.replace(canvas=np.asarray(fed.canvas), soft=np.asarray(fed.soft))

    for ask in [
        lambda b: interp.capture(b, PROMPTS, site, steps=[0]).arrays,
        lambda b: interp.capture_step(b, second(b), [site, "layers.1.resid_post"]),
        lambda b: interp.patch_sweep(b, clean, corrupt, metric, site, **few).effects,
        lambda b: interp.patch_sweep(b, clean, corrupt, metric, "layers.*.resid_post", **few, rows_at_once=8).effects,
        lambda b: interp.attribution_patching(b, clean, corrupt, metric, site, **few).effects,
        lambda b: interp.knock_out(b, clean, metric, "mlp", steps=[1]).effects,
        lambda b: interp.saliency(b, PROMPTS[2], metric, budget=30, draws=2, rows_at_once=8).scores,
    ]:
        a, b = ask(one), ask(many)
        assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(a)), "nothing to compare"
        same(a, b)
        print("equal")


def steps():
    """What devices tell each other in a step: sums after attention and after the feed-forwards, nothing along `data`."""
    sizes = dict(num_experts=8, num_heads=8, num_kv_heads=8, num_global_kv_heads=2, vocab_size=4096)
    config = dg.ModelConfig.tiny(**sizes, layer_types=LAYERS)
    size = 8 * config.canvas_length * config.embed_dim * 4  # bytes of one activation [B, C, D]

    def of(**axes):
        return collectives.of_step(config, mesh(**axes), rows=8, dtype="float32")

    assert of(data=8) == [] == collectives.of_step(MANY, mesh(data=8), rows=8, dtype="float32")
    assert [(one.kind, one.nbytes) for one in of(expert=8)] == [("all-reduce", size)] * len(LAYERS)
    for axes in (dict(tensor=8), dict(expert=4, tensor=2)):
        found = of(**axes)
        assert max(one.nbytes for one in found if one.kind != "all-reduce") <= size, axes  # no weights, no logits
        dots = [one for one in found if any(rule in one.where for rule in ("->btd", "->td"))]
        assert {one.kind for one in dots} == {"all-reduce"}
        assert sum(one.nbytes for one in dots) == 3 * len(LAYERS) * size  # attention, MLP, experts
        print(axes, collectives.table(found), sep="\n")


if __name__ == "__main__":
    for part in sys.argv[1:]:
        globals()[part]()
    print("done")
