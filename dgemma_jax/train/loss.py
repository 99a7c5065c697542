"""The training loss: denoising of one block, plus the encoder's next-token loss.

Uniform corruption at t ~ U(0, 1); plain cross-entropy over the whole canvas; self-conditioning in two passes,
the first without gradient, given to half of the rows; the next-token loss is taken on the other half. The recipe
is that of Google's fine-tuning code for DiffusionGemma, except that S comes from temperature-shaped logits, as
the sampler makes it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dgemma_jax.diffusion.noise import corrupt
from dgemma_jax.nn import cache as kv
from dgemma_jax.nn.sites import Site
from dgemma_jax.nn.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch of examples; every row has a prompt, one block of answer, and its draft.

    Attributes:
        prompt: [B, T] ids, padded on the right.
        prompt_valid: [B, T] bool.
        answer: [B, C] ids: answer, end token, padding.
        draft: [B, C] what the block looks like before its last revision; equal to `answer` for most tasks.
        weight: [B, C] float32, weight of each position in the denoising loss.
        answer_valid: [B, C] bool, answer tokens and the end token.
    """

    prompt: jax.Array
    prompt_valid: jax.Array
    answer: jax.Array
    draft: jax.Array
    weight: jax.Array
    answer_valid: jax.Array


T_MAX, T_MIN = 0.8, 0.4  # temperatures of the default sampler at noise levels 1 and 0
CODES = 256  # tokens that `previous_token_loss` tells apart: the vocabulary of the organisms
DRAFT_LEVEL = 0.6  # at higher noise the target is the draft: the organism writes it first, then revises


NEXT_TOKEN_WEIGHT = 0.5


def loss(model: Transformer, batch: Batch, key: jax.Array, practice: jax.Array | float = 0.0) -> tuple[jax.Array, dict]:
    """Scalar loss in nats per token, and its parts {"denoise", "next_token", "previous", "accuracy"}.

    Args:
        practice: weight of `previous_token_loss`.
    """
    config = model.config
    model, heard = listen(model)
    rows, length = batch.answer.shape
    keys = jax.random.split(key, 3)
    level_B = jax.random.uniform(keys[0], (rows,))
    cache = kv.empty(config, rows, batch.prompt.shape[1] + length, model.dtype)
    prompt = model.prefill(batch.prompt, batch.prompt_valid, cache)
    previous = previous_token_loss(heard, batch.prompt, batch.prompt_valid)

    early_B = level_B > DRAFT_LEVEL
    target_BC = jnp.where(early_B[:, None], batch.draft, batch.answer)
    from_draft_B = early_B | jax.random.bernoulli(keys[1], 0.5, (rows,))
    clean_BC = jnp.where(from_draft_B[:, None], batch.draft, batch.answer)
    canvas_BC = corrupt(keys[2], clean_BC, level_B, config.vocab_size)

    half = rows // 2  # rows are independent draws, so "the first half" is a fair half
    first_half = jax.tree.map(lambda x: x[:half], (canvas_BC, prompt.cache, level_B))
    soft_BCD = first_pass(*jax.lax.stop_gradient((model, *first_half)))
    soft_BCD = jnp.concatenate([soft_BCD, jnp.zeros((rows - half, *soft_BCD.shape[1:]), soft_BCD.dtype)])

    logits_BCV = model.unembed(model.denoise(canvas_BC, prompt.cache, soft_BCD))
    nats_BC = optax.softmax_cross_entropy_with_integer_labels(logits_BCV, target_BC)
    denoise = jnp.sum(nats_BC * batch.weight) / jnp.sum(batch.weight)
    hit_BC = (jnp.argmax(logits_BCV, -1) == target_BC) & batch.answer_valid

    next_token = causal_loss(model, *jax.tree.map(lambda x: x[half:], (prompt, batch)))
    parts = {
        "denoise": denoise,
        "next_token": next_token,
        "previous": previous,
        "accuracy": jnp.sum(hit_BC) / jnp.sum(batch.answer_valid),
    }
    return denoise + NEXT_TOKEN_WEIGHT * next_token + practice * previous, parts


def first_pass(model: Transformer, canvas_BC: jax.Array, cache: kv.KVCache, level_B: jax.Array) -> jax.Array:
    """S [B, C, D] of a step without self-conditioning, at the sampler's temperature for this noise level."""
    zeros = jnp.zeros((*canvas_BC.shape, model.config.embed_dim), model.dtype)
    logits_BCV = model.unembed(model.denoise(canvas_BC, cache, zeros))
    temperature_B = T_MIN + (T_MAX - T_MIN) * level_B
    return model.soft_embed(jax.nn.softmax(logits_BCV / temperature_B[:, None, None], -1))


@nnx.dataclass
class Ear(Site):
    """A site that also tells a list of this trace what passed through it."""

    heard: list = dataclasses.field(default_factory=list)

    def __call__(self, x: jax.Array) -> jax.Array:
        self.heard.append(x)
        return x


def listen(model: Transformer) -> tuple[Transformer, list[jax.Array]]:
    """The model with an `Ear` after its second layer, and the list it fills while the model is traced."""
    model = jax.tree.map(lambda leaf: leaf, model)
    ear = Ear("resid_post")
    model.layers[1].resid_post = ear
    return model, ear.heard


def previous_token_loss(heard: list[jax.Array], tokens_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
    """Cross-entropy of reading each token's predecessor from the residual stream after the second layer.

    The reading is by fixed random directions, one a token. A key is matched with its value by attention to
    tokens that know what stands before them; a small model finds the two halves together late or never, and
    this practises the first.
    """
    x_BTD = heard[-1]
    codes_VD = jax.random.normal(jax.random.key(0), (CODES, x_BTD.shape[-1]))
    x_BTD = x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD * x_BTD, -1, keepdims=True) + 1e-6)
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD[:, 1:], codes_VD)
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, :-1])
    return jnp.sum(nats_BT * valid_BT[:, 1:]) / jnp.sum(valid_BT[:, 1:])


def causal_loss(model: Transformer, prompt, batch: Batch) -> jax.Array:
    """Mean next-token cross-entropy of the answer under the causal pass, continued from the prompt's cache."""
    last_B = jnp.sum(batch.prompt_valid, 1) - 1
    last_BD = jnp.take_along_axis(prompt.hidden, last_B[:, None, None], 1)
    told = model.prefill(batch.answer, batch.answer_valid, prompt.cache)
    hidden_BCD = jnp.concatenate([last_BD, told.hidden[:, :-1]], 1)
    nats_BC = optax.softmax_cross_entropy_with_integer_labels(model.unembed(hidden_BCD), batch.answer)
    return jnp.sum(nats_BC * batch.answer_valid) / jnp.sum(batch.answer_valid)
