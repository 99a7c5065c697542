"""Slow references in numpy, written from the equations token by token; and two kinds of models to test with."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dgemma_jax as dg
from dgemma_jax.nn import cache as kv
from dgemma_jax.nn import transformer
from dgemma_jax.nn.sites import Site
from dgemma_jax.train import language


def build(config, seed=0, dtype=np.float32, sharpness=1.0):
    """A model in which no parameter is neutral (norms and scalars differ from one); compiles nothing.

    `sharpness` scales the final norm and thereby the logits.
    """
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        if len(leaf.shape) == 1:
            value = 1 + 0.2 * rng.standard_normal(leaf.shape)
            value = value * sharpness if "final_norm" in name else value
        else:
            by_output = math.prod(leaf.shape[1:])  # `o` is [D, N, H]
            fan_in = {".o": by_output, "s.down": leaf.shape[1], "r.proj": 1}
            found = [n for end, n in fan_in.items() if end in name.removesuffix(".value")[-6:]]
            value = rng.standard_normal(leaf.shape) / math.sqrt(found[0] if found else leaf.shape[-1])
        return jnp.asarray(value.astype(dtype))

    return jax.tree_util.tree_map_with_path(fill, transformer.abstract(config, dtype))


def worded(tokenizer, *kinds):
    """A bundle of such a model with these layers and the vocabulary of the embedded ones."""
    config = dg.ModelConfig.tiny(vocab_size=language.VOCAB_SIZE, layer_types=kinds)
    sampler = dg.SamplerConfig(max_denoising_steps=6, eos_token_ids=config.eos_token_ids)
    return dg.Bundle(config, build(config), tokenizer, sampler)


# Equations.


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def entropy(logits):
    """Nats, float64; a probability of zero adds nothing."""
    p = softmax(np.asarray(logits, np.float64))
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), -1)


def rms(x, weight=None, eps=1e-6):
    normed = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)
    return normed if weight is None else normed * weight


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rope(x, position, theta, fraction, proportional):
    """One head vector [H] turned as complex numbers."""
    size = x.shape[0]
    if proportional:  # all pairs, of which only the fast ones turn
        pairs, live, denominator = size // 2, int(fraction * size // 2), size
    else:  # only the first channels, in pairs among themselves
        denominator = int(size * fraction)
        pairs = live = denominator // 2
    out = np.array(x, np.float64)
    for j in range(pairs):
        angle = position * theta ** (-2 * j / denominator) if j < live else 0.0
        turned = complex(x[j], x[j + pairs]) * complex(math.cos(angle), math.sin(angle))
        out[j], out[j + pairs] = turned.real, turned.imag
    return out


def accept(entropy, bound):
    """Positions kept, by definition: the longest sorted prefix whose sum without its largest is within the bound."""
    order = sorted(range(len(entropy)), key=lambda i: (entropy[i], i))
    best = 0
    for k in range(1, len(order) + 1):
        chosen = [entropy[i] for i in order[:k]]
        if math.fsum(chosen) - max(chosen) <= bound:
            best = k
    kept = np.zeros(len(entropy), bool)
    kept[order[:best]] = True
    return kept


def experts(x, weights, gate_up, down):
    """sum_e weights[e] expert_e(x), token by token, expert by expert; float64."""
    x, weights, gate_up, down = (np.asarray(a, np.float64) for a in (x, weights, gate_up, down))
    out = np.zeros_like(x)
    for t in range(len(x)):
        for e in np.flatnonzero(weights[t]):
            gate, up = np.split(gate_up[e] @ x[t], 2)
            out[t] += weights[t, e] * ((gelu(gate) * up) @ down[e])
    return out


def router(x, scale, proj, per_expert, top, eps=1e-6):
    """Weight of every expert for one token [D]."""
    logits = proj @ (rms(x, eps=eps) * scale / math.sqrt(len(x)))
    probs = softmax(logits)
    chosen = sorted(range(len(probs)), key=lambda e: -probs[e])[:top]
    out = np.zeros(len(probs))
    for e in chosen:
        out[e] = probs[e] / sum(probs[c] for c in chosen) * per_expert[e]
    return out


# The whole model, for one row.


@dataclasses.dataclass
class Numbers:
    """The model's parameters in float64 and both passes over one row of tokens."""

    config: object
    model: object

    def _layer(self, i, x, positions, past, see, scalar):
        """One layer; `past` is (keys, values) of earlier tokens, `see(query, slot)` says what is visible."""
        c, layer = self.config, self.model.layers[i]
        wide = lambda p: np.asarray(p[...], np.float64)  # noqa: E731
        norm = lambda x, n: rms(x, wide(n.weight), c.rms_norm_eps)  # noqa: E731
        a = layer.attention
        turn = (
            (c.rope_theta, c.rope_fraction, False)
            if c.is_sliding(i)
            else (c.global_rope_theta, c.global_rope_fraction, c.global_rope_proportional)
        )
        h = norm(x, layer.input_norm)
        q, raw = (np.einsum("td,nhd->tnh", h, wide(w)) for w in (a.q, a.k))
        v = raw if a.v is None else np.einsum("td,nhd->tnh", h, wide(a.v))
        q, k, v = norm(q, a.q_norm), norm(raw, a.k_norm), rms(v, eps=c.rms_norm_eps)
        q, k = (
            np.array([[rope(head, p, *turn) for head in row] for row, p in zip(y, positions, strict=False)])
            for y in (q, k)
        )
        keys, values = np.concatenate([past[0], k]), np.concatenate([past[1], v])
        group = c.num_heads // c.kv_heads(i)
        z = np.zeros_like(q)
        for t in range(len(x)):
            slots = [s for s in range(len(keys)) if see(t, s)]
            for n in range(c.num_heads):
                z[t, n] = softmax(keys[slots, n // group] @ q[t, n]) @ values[slots, n // group]
        x = x + norm(np.einsum("tnh,dnh->td", z, wide(a.o)), layer.post_attn_norm)
        m = layer.mlp
        h = norm(x, layer.pre_mlp_norm)
        dense = norm((gelu(h @ wide(m.gate).T) * (h @ wide(m.up).T)) @ wide(m.down).T, layer.post_mlp_norm)
        r = layer.router
        weights = np.array(
            [router(row, wide(r.scale), wide(r.proj), wide(r.per_expert_scale), c.experts_per_token) for row in x]
        )
        h = norm(x, layer.pre_moe_norm)
        mixed = experts(h, weights, wide(layer.experts.gate_up), wide(layer.experts.down))
        both = dense + norm(mixed, layer.post_moe_norm)
        return (x + norm(both, layer.post_ffw_norm)) * wide(scalar), (keys, values)

    def causal(self, tokens):
        """hidden [T, D] after the final norm, and (keys, values) [T, K, H] of every layer."""
        c, table = self.config, np.asarray(self.model.embedder.table[...], np.float64)
        x, memory = math.sqrt(c.embed_dim) * table[np.asarray(tokens)], []
        for i, layer in enumerate(self.model.layers):
            reach = c.sliding_window if c.is_sliding(i) else len(tokens)
            empty = np.zeros((0, c.kv_heads(i), c.head_size(i)))

            def see(t, s, reach=reach):
                return 0 <= t - s < reach

            x, kept = self._layer(i, x, range(len(tokens)), (empty, empty), see, layer.prefill_scalar)
            memory.append(kept)
        return self._final(x), memory

    def canvas(self, canvas, soft, memory):
        """hidden [C, D] after the final norm."""
        c, table = self.config, np.asarray(self.model.embedder.table[...], np.float64)
        s = self.model.self_conditioning
        gate, up, down, weight = (np.asarray(p[...], np.float64) for p in (s.gate, s.up, s.down, s.pre_norm.weight))
        normed = rms(np.asarray(soft, np.float64), weight)
        signal = (gelu(normed @ gate.T) * (normed @ up.T)) @ down.T
        x = rms(math.sqrt(c.embed_dim) * table[np.asarray(canvas)] + signal)
        length = len(memory[0][0])
        for i, layer in enumerate(self.model.layers):
            first = max(0, length - (c.sliding_window - 1)) if c.is_sliding(i) else 0
            positions = range(length, length + len(canvas))

            def see(t, s, first=first):
                return s >= first

            x, _ = self._layer(i, x, positions, memory[i], see, layer.denoise_scalar)
        return self._final(x)

    def logits(self, hidden):
        scores = hidden @ np.asarray(self.model.embedder.table[...], np.float64).T
        return self.config.final_logit_softcap * np.tanh(scores / self.config.final_logit_softcap)

    def _final(self, x):
        return rms(x, np.asarray(self.model.final_norm.weight[...], np.float64), self.config.rms_norm_eps)


# A model whose logits are written by hand.


@nnx.dataclass
class Clock(Site):
    """Told the step and block of every row, as an edited site is."""

    step: jax.Array | None = nnx.data(default=None)
    block: jax.Array | None = nnx.data(default=None)

    def bind(self, **context):
        return Clock(self.name, context["step"], context["block"]) if "step" in context else self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scripted:
    """Stands in for a `Transformer`: logits [J, R, B, C, V] by block, step and row, whatever the canvas is.

    S of a step is the shaped distribution times `table` [V, D].
    """

    script: jax.Array
    table: jax.Array
    clock: Clock
    config: object = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def of(cls, script, config):
        script = np.asarray(script, np.float32)
        assert script.shape[3:] == (config.canvas_length, config.vocab_size)
        rng = np.random.default_rng(7)
        table = rng.standard_normal((config.vocab_size, config.embed_dim)).astype(np.float32)
        return cls(jnp.asarray(script), jnp.asarray(table), Clock("clock"), config)

    model = property(lambda self: self)  # a bundle and its model in one
    embedder = property(lambda self: self.table)
    dtype = property(lambda self: jnp.dtype(jnp.float32))

    def prefill(self, tokens, valid, cache):
        length = cache.length + valid.astype(jnp.int32).sum(1)
        return transformer.Prefill(kv.KVCache(cache.layers, length), jnp.zeros((*tokens.shape, self.config.embed_dim)))

    def denoise(self, canvas, cache, soft):
        return self.script[self.clock.block, self.clock.step, jnp.arange(canvas.shape[0])]

    def unembed(self, hidden):
        return hidden

    def shaped_logits(self, shaped):
        return shaped

    def canvas(self, tokens):
        return tokens

    def soft_embed(self, probs):
        return jnp.einsum("bcv,vd->bcd", probs, self.table)


def ring(length, slots):
    """Position in each slot of a ring after `length` tokens; -1 where empty."""
    held = [-1] * slots
    for position in range(length):
        held[position % slots] = position
    return held
