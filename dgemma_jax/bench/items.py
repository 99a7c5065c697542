"""What `dgemma bench` times: each item is a name and a function that makes its contestants, which take turns."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.bench import roofline
from dgemma_jax.bench.roofline import Part
from dgemma_jax.bench.work import Work, random_model
from dgemma_jax.bundle import Bundle, load
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import loop, noise
from dgemma_jax.diffusion import sampler as sampling
from dgemma_jax.diffusion.autoregressive import autoregress
from dgemma_jax.diffusion.generate import PREFILL_CHUNK, generate
from dgemma_jax.diffusion.trajectory import Record
from dgemma_jax.nn import cache as kv
from dgemma_jax.nn import functional, moe
from dgemma_jax.nn.transformer import Transformer

COPY, MATMUL = "ceiling, copy", "ceiling, matmul"
Capture = Callable[..., Any]  # `interp.capture`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to do an item.

    Attributes:
        name: in the table.
        call: does the work once and returns when it is done.
        work: the least that has to be read, written and multiplied.
        count: units in a call (denoising steps, for instance); times are shown a unit.
        tokens: new text in a call; None if there is none.
        at: {"batch", "context", "steps"} where the item is one of a series.
    """

    name: str
    call: Callable[[], Any]
    work: Sequence[Part] = ()
    count: int = 1
    tokens: int | None = None
    at: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Item:
    """A name, and what makes its contestants from a `Lab`."""

    name: str
    build: Callable[[Lab], list[Contestant]]


class Lab:
    """The work, and what the items share; made when first asked for.

    Attributes:
        work: sizes.
        source: of the weights; None for random ones.
        capture: `interp.capture`, if the item that needs it shall run.
    """

    def __init__(self, work: Work, source: str | None = None, capture: Capture | None = None) -> None:
        self.work, self.source, self.capture = work, source, capture

    @functools.cached_property
    def bundle(self) -> Bundle:
        work = self.work
        if self.source is not None:
            return load(self.source, dtype=work.dtype)
        return Bundle(work.config, random_model(work.config, work.dtype))

    @property
    def model(self) -> Transformer:
        return self.bundle.model

    @property
    def width(self) -> int:
        return jnp.dtype(self.work.dtype).itemsize

    def normal(self, *shape: int, dtype: Any = None) -> jax.Array:
        return jax.random.normal(jax.random.key(0), shape, dtype or self.work.dtype)

    def tokens(self, *shape: int) -> np.ndarray:
        return np.random.default_rng(0).integers(3, self.work.config.vocab_size, shape).astype(np.int32)

    def cache(self, batch: int, context: int) -> kv.KVCache:
        """A cache that holds `context` random tokens a row, and has room for a canvas."""
        empty = kv.empty(self.work.config, batch, context + self.work.config.canvas_length, self.work.dtype)
        layers = jax.tree.map(lambda x: self.normal(*x.shape), empty.layers)
        return dataclasses.replace(empty, layers=layers, length=jnp.full(batch, context, jnp.int32))

    def sampler(self, steps: int) -> SamplerConfig:
        return SamplerConfig(max_denoising_steps=steps, early_stop=False, eos_token_ids=())


def items(work: Work) -> list[Item]:
    """Everything that is timed, ceilings first, then what matters most: time may run out."""
    kinds = dict.fromkeys(work.config.layer_types)
    return [
        Item(COPY, copy_bandwidth),
        Item(MATMUL, matmul_peak),
        *(Item(f"step, batch {n}", functools.partial(step, batch=n, context=work.contexts[0])) for n in work.batches),
        Item("generation", generation),
        Item("append a block", append),
        *(Item(f"prefill, {n:,} tokens", functools.partial(prefill, tokens=n)) for n in work.prefills),
        *(Item(f"step, context {n:,}", functools.partial(step, batch=1, context=n)) for n in work.contexts[1:]),
        *(Item(f"experts, {n:,} tokens", functools.partial(experts, tokens=n)) for n in work.expert_tokens),
        *(
            Item(f"{kind.replace('_', ' ')}, context {n:,}", functools.partial(attention, kind=kind, context=n))
            for kind in kinds
            for n in work.contexts
        ),
        Item("head", head),
        Item("soft embedding", soft_embedding),
        Item("sampler", sampler),
    ]


# --- ceilings


def copy_bandwidth(lab: Lab) -> list[Contestant]:
    """A large array read and written."""
    size = lab.work.ceiling[0]
    x = jnp.zeros(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return [Contestant(name="x + 1", call=lambda: jax.block_until_ready(copy(x)), work=[Part(2 * x.nbytes, 0)])]


def matmul_peak(lab: Lab) -> list[Contestant]:
    """Random squares multiplied in the dtype of the weights."""
    side = lab.work.ceiling[1]
    x = lab.normal(side, side)
    product = jax.jit(jnp.matmul)
    return [Contestant(name="x @ x", call=lambda: jax.block_until_ready(product(x, x)), work=[Part(0, 2 * side**3)])]


# --- parts of a step


def experts(lab: Lab, tokens: int) -> list[Contestant]:
    """The experts of the first layer in every form, routed by its own router."""
    layer, x = lab.model.layers[0], lab.normal(1, tokens, lab.work.config.embed_dim)
    weights = jax.jit(lambda router, x: router(x))(layer.router, x)
    run = jax.jit(lambda experts, x, weights, form: experts(x, weights, form), static_argnums=3)
    least = [roofline.experts(lab.work.config, tokens, lab.width)]
    return [
        Contestant(
            name=form, call=lambda form=form: jax.block_until_ready(run(layer.experts, x, weights, form)), work=least
        )
        for form in moe.FORMS
        if form != "auto"
    ]  # fmt: skip


def attention(lab: Lab, kind: str, context: int) -> list[Contestant]:
    """One layer's attention of a canvas over the cache, projections included."""
    config, number = lab.work.config, lab.work.config.layer_types.index(kind)
    cache, canvas = lab.cache(1, context), jnp.zeros((1, config.canvas_length), jnp.int32)
    cache = dataclasses.replace(cache, layers=cache.layers[number : number + 1])
    x = lab.normal(1, config.canvas_length, config.embed_dim)

    @jax.jit
    def run(attention, embedder, canvas, cache, x):
        # `Transformer.denoise` with nothing in it but this layer's attention: whatever that is given, it is given here.
        def layer(x, positions, entry, *rest):
            return attention(x, positions, entry, rest[0])

        same = types.SimpleNamespace(
            config=config, embedder=embedder, canvas_embed=lambda x: x, self_conditioning=lambda _, soft: soft,
            layers=[layer], final_norm=lambda x: x, moe="auto", mesh=None,
        )  # fmt: skip
        layer.denoise_scalar = jnp.ones(1)
        return Transformer.denoise(same, canvas, cache, x)

    least = [roofline.attention(config, number, 1, config.canvas_length, context, lab.width)]
    arguments = (lab.model.layers[number].attention, lab.model.embedder, canvas, cache, x)
    at = {"context": context}
    return [Contestant(name="as in a step", call=lambda: jax.block_until_ready(run(*arguments)), work=least, at=at)]


def head(lab: Lab) -> list[Contestant]:
    """Logits of a canvas."""
    config = lab.work.config
    x = lab.normal(1, config.canvas_length, config.embed_dim)
    run = jax.jit(lambda embedder, x: embedder.logits(x))
    least = [roofline.head(config, config.canvas_length, lab.width)]
    call = lambda: jax.block_until_ready(run(lab.model.embedder, x))  # noqa: E731
    return [Contestant(name="logits", call=call, work=least)]


def soft_embedding(lab: Lab) -> list[Contestant]:
    """S of a canvas."""
    config = lab.work.config
    probs = jax.nn.softmax(lab.normal(1, config.canvas_length, config.vocab_size, dtype="float32"))
    run = jax.jit(lambda soft, probs, embedder: soft(probs, embedder))
    least = [roofline.soft_embedding(config, config.canvas_length, lab.width)]
    call = lambda: jax.block_until_ready(run(lab.model.soft_embedding, probs, lab.model.embedder))  # noqa: E731
    return [Contestant(name="probs @ table", call=call, work=least)]


def sampler(lab: Lab) -> list[Contestant]:
    """A denoising step whose model is free: given logits, no soft embedding. And Gumbel noise in place of its draw."""
    config = lab.work.config
    logits = lab.normal(1, config.canvas_length, config.vocab_size, dtype="float32") * 4
    state = _start(lab, 1)

    @jax.jit
    def run(logits, state, settings):
        free = types.SimpleNamespace(
            config=config, dtype=state.soft.dtype, mesh=None, embedder=None, denoise=lambda *_: logits,
            unembed=lambda x: x, shaped_logits=lambda x: x, canvas=lambda x: x, soft_embed=lambda _: state.soft,
        )  # fmt: skip
        cache = types.SimpleNamespace(length=jnp.zeros(1, jnp.int32))
        return sampling.denoise_step(free, state, cache, settings)[0]

    gumbel = jax.jit(jax.random.categorical)
    least = [roofline.sampler(config, config.canvas_length, 0)]
    settings = lab.sampler(lab.work.loop)
    return [
        Contestant(
            name="of a step", call=lambda: jax.block_until_ready(run(logits, state, settings).canvas), work=least
        ),
        Contestant(
            name="random.categorical alone", call=lambda: jax.block_until_ready(gumbel(jax.random.key(1), logits))
        ),
    ]  # fmt: skip


# --- the whole model


def _start(lab: Lab, batch: int) -> sampling.State:
    zero = jnp.zeros(batch, jnp.int32)
    keys = noise.row_keys(jnp.arange(batch))
    model = types.SimpleNamespace(config=lab.work.config, dtype=jnp.dtype(lab.work.dtype))
    return sampling.start(keys, zero, jnp.zeros(batch, bool), lab.work.config.canvas_length, model)


def step(lab: Lab, batch: int, context: int) -> list[Contestant]:
    """Denoising steps in the compiled loop, sampler included, nothing recorded."""
    work, settings, record = lab.work, lab.sampler(lab.work.loop), Record.nothing()
    state, cache = _start(lab, batch), lab.cache(batch, context)
    buffers = loop.empty_buffers(lab.model, state, cache, settings, None, record)

    def call() -> None:
        arguments = (lab.model, state, cache, buffers, settings, None, record)
        jax.block_until_ready(loop.compiled(*arguments, first=0, limit=work.loop)[0].canvas)

    least = roofline.step(work.config, batch, context, lab.width) * work.loop
    at = {"batch": batch, "context": context}
    return [Contestant(name="in the loop", call=call, work=least, count=work.loop, at=at)]


def append(lab: Lab) -> list[Contestant]:
    """The causal pass over a committed block."""
    config, context = lab.work.config, lab.work.contexts[0]
    cache, block = lab.cache(1, context), lab.tokens(1, config.canvas_length)
    call = lambda: jax.block_until_ready(functional.prefill(lab.model, block, cache=cache).cache)  # noqa: E731
    least = roofline.prefill(config, 1, config.canvas_length, context, lab.width)
    return [Contestant(name="prefill of a canvas", call=call, work=least, at={"context": context})]


def prefill(lab: Lab, tokens: int) -> list[Contestant]:
    """The causal pass over a prompt, in chunks as in `generate`."""
    prompt = lab.tokens(1, tokens)
    call = lambda: jax.block_until_ready(functional.prefill(lab.model, prompt, chunk=PREFILL_CHUNK).cache)  # noqa: E731
    least = roofline.prefill(lab.work.config, 1, tokens, 0, lab.width)
    return [Contestant(name=f"chunks of {PREFILL_CHUNK:,}", call=call, work=least)]


def generation(lab: Lab) -> list[Contestant]:
    """One block after a prompt as long: by diffusion with fixed steps, with captures, and token by token."""
    config, width = lab.work.config, lab.width
    length = config.canvas_length
    prompt = lab.tokens(length).tolist()
    bundles = {steps: lab.bundle.with_sampler(lab.sampler(steps)) for steps in lab.work.steps}
    before = roofline.prefill(config, 1, length, 0, width)
    least = {steps: before + roofline.step(config, 1, length, width) * steps for steps in bundles}
    found = [
        Contestant(
            name=f"diffusion, {steps} steps", call=lambda b=bundle: generate(b, prompt, max_new_tokens=length),
            work=least[steps], tokens=length, at={"steps": steps},
        )
        for steps, bundle in bundles.items()
    ]  # fmt: skip
    first = lab.work.steps[0]
    if lab.capture is not None:
        found.append(
            Contestant(
                name=f"diffusion, {first} steps, all residuals captured", work=least[first], tokens=length,
                call=lambda: lab.capture(bundles[first], prompt, "layers.*.resid_post", max_new_tokens=length),
            )
        )  # fmt: skip
    least_causal = before + roofline.autoregression(config, 1, length, length, width)
    call = lambda: autoregress(bundles[first], prompt, length)  # noqa: E731
    return [*found, Contestant(name="autoregression, same weights", call=call, work=least_causal, tokens=length)]
