"""A model whose weights are written, not trained: one head, one expert and one path do all the work.

The task: canvas position c answers `answer(prompt[c])`, for prompts of `LENGTH` tokens and a canvas as long. The path:

    prompt token -> head 2 of layer 1 -> code "copied" -> expert 3 of layer 2 -> code "token" -> logits

- `HEAD` attends from every canvas position to the prompt position of the same number, by rotation alone. Its values
  are the token's code; it writes them into dimensions of their own.
- `EXPERT` applies a permutation of the tokens. It is the first choice of its router at every token. Second comes an
  expert that says nothing, third `NEXT_EXPERT` with another permutation: it speaks only when the router may not choose
  `EXPERT`, and then as loudly (its norm sees to that).
- `SILENT_HEAD` in layer 0 copies the same token to dimensions that only the dense MLP of `SILENT_MLP` reads, which
  would write the answer too, but its gate is closed. A second route, of active parts, without effect.

All other weights are random, but what they write is kept, by the weights of the norms after them, to dimensions that
nothing reads on purpose, and small. Codes are orthogonal: one dimension a token and code, and one that is constant.
"""

import jax.numpy as jnp
import numpy as np
from oracles import build

from dgemma_jax.config import FULL, SLIDING, ModelConfig

VOCAB, LENGTH, WIDTH, HEAD_DIM = 16, 6, 80, 16
HEAD, EXPERT, NEXT_EXPERT, SILENT_HEAD, SILENT_MLP = (1, 2), (2, 3), (2, 0), (0, 1), 2
SECOND_EXPERT = 1  # chosen beside EXPERT

CONSTANT, TOKEN, COPIED, HIDDEN = 0, slice(1, 17), slice(17, 33), slice(33, 49)
REST = slice(49, WIDTH)  # read by nothing on purpose

WORDS = np.arange(6, VOCAB)  # the tokens of prompts and answers; the rest are special


def _permuted(shift):
    special = (np.arange(WORDS[0]) + shift) % WORDS[0]
    return np.concatenate([special, np.roll(WORDS, -shift)])


# No token keeps its name, and the two permutations agree nowhere.
_ANSWER, _OTHER = _permuted(4), _permuted(7)

CONFIG = ModelConfig.tiny(
    vocab_size=VOCAB, embed_dim=WIDTH, hidden_dim=VOCAB, head_dim=HEAD_DIM, global_head_dim=HEAD_DIM, expert_dim=VOCAB,
    layer_types=(SLIDING, SLIDING, SLIDING, FULL), sliding_window=4 * LENGTH, num_experts=5, canvas_length=LENGTH,
    rope_theta=100.0, eos_token_ids=(1,),
)  # fmt: skip


def answer(tokens):
    """What the model says at the canvas positions, given the prompt's tokens."""
    return _ANSWER[np.asarray(tokens)]


def other_answer(tokens):
    """What it says when `NEXT_EXPERT` takes the place of `EXPERT`."""
    return _OTHER[np.asarray(tokens)]


def prompts(count, seed=0):
    """Random prompts [count, LENGTH], without special tokens."""
    return np.random.default_rng(seed).choice(WORDS, (count, LENGTH))


def pairs(count, position, seed=0):
    """Two batches of prompts that differ at one position only, in every row."""
    first = prompts(count, seed)
    second = first.copy()
    second[:, position] = np.roll(WORDS, -3)[second[:, position] - WORDS[0]]
    return first, second


def model(seed=0):
    """The model, in float32; `seed` draws the weights that do nothing."""
    built = build(CONFIG, seed)
    table = np.zeros((VOCAB, WIDTH))
    table[:, CONSTANT] = 0.5
    table[:, TOKEN] = 0.5 * np.eye(VOCAB)
    _write(built.embedder.table, table)
    _write(built.self_conditioning.down, 0.0)
    # The final norm reads the code of tokens alone, loud enough for the soft cap to matter.
    _write(built.final_norm.weight, _weights(6.0, TOKEN))
    for layer in built.layers:
        _write(layer.input_norm.weight, 1.0)
        _write(layer.post_attn_norm.weight, _weights(0.2, REST))
        _write(layer.post_ffw_norm.weight, _weights(0.2, REST))
    _copying_head(built.layers[SILENT_HEAD[0]], SILENT_HEAD[1], HIDDEN)
    _copying_head(built.layers[HEAD[0]], HEAD[1], COPIED)
    _answering_expert(built.layers[EXPERT[0]])
    _silent_mlp(built.layers[SILENT_MLP])
    return built


def _write(param, value):
    param[...] = jnp.broadcast_to(jnp.asarray(value, jnp.float32), param.shape)


def _weights(value, *dimensions):
    out = np.zeros(WIDTH)
    for part in dimensions:
        out[part] = value
    return out


def _change(param, index, value):
    array = np.array(param[...])
    array[index] = value
    _write(param, array)


def _copying_head(layer, head, to):
    """The head writes the code of the token `LENGTH` positions back into the dimensions `to`."""
    attention, half = layer.attention, HEAD_DIM // 2
    key_head = head // (CONFIG.num_heads // CONFIG.num_kv_heads)
    frequencies = CONFIG.rope_theta ** (-np.arange(half) / half)
    # Rotated by its own position, the query points where the key of the position LENGTH before it points.
    query, key = np.zeros((2, HEAD_DIM, WIDTH))
    query[:, CONSTANT] = np.concatenate([np.cos(LENGTH * frequencies), -np.sin(LENGTH * frequencies)])
    key[:half, CONSTANT] = 1.0
    value = np.zeros((HEAD_DIM, WIDTH))
    value[:, TOKEN] = np.eye(VOCAB)
    _change(attention.q, head, query)
    _change(attention.k, key_head, key)
    _change(attention.v, key_head, value)
    _write(attention.q_norm.weight, 5.0)
    _write(attention.k_norm.weight, 5.0)
    out = 0.02 * np.array(attention.o[...])  # the layer's other heads whisper
    out[: REST.start] = 0.0
    out[:, head] = 0.0
    out[to, head] = np.eye(VOCAB)
    _write(attention.o, out)
    _write(layer.post_attn_norm.weight, _weights(1.0, to, REST))


def _permutation(to):
    """[D, F]: unit v writes the code of token to[v]."""
    down = np.zeros((WIDTH, VOCAB))
    down[TOKEN.start + to, np.arange(VOCAB)] = 1.0
    return down


def _answering_expert(layer):
    """Units of the two experts read the copied code; the router goes by the constant alone."""
    _write(layer.pre_moe_norm.weight, 1.0)
    _write(layer.router.scale, 1.0)
    _write(layer.router.per_expert_scale, 1.0)
    scores = np.zeros((CONFIG.num_experts, WIDTH))
    scores[[EXPERT[1], SECOND_EXPERT, NEXT_EXPERT[1]], CONSTANT] = [8.0, 5.0, 3.0]
    _write(layer.router.proj, scores)
    gate_up = np.zeros((2 * VOCAB, WIDTH))
    gate_up[:VOCAB, COPIED] = gate_up[VOCAB:, COPIED] = np.eye(VOCAB)
    down = np.array(layer.experts.down[...]).swapaxes(1, 2)  # as [E, D, F]
    down[:, : REST.start] = 0.0
    down *= 0.02
    for expert, permutation in ((EXPERT[1], _ANSWER), (NEXT_EXPERT[1], _OTHER)):
        _change(layer.experts.gate_up, expert, gate_up)
        down[expert] = _permutation(permutation)
    down[SECOND_EXPERT] = 0.0
    _write(layer.experts.down, down.swapaxes(1, 2))
    _write(layer.post_moe_norm.weight, 1.0)
    _write(layer.post_ffw_norm.weight, _weights(3.0, TOKEN))


def _silent_mlp(layer):
    """Reads the silent head's copy and would write the answer; its gate is closed by the constant."""
    gate, up = np.zeros((2, VOCAB, WIDTH))
    gate[:, CONSTANT], up[:, HIDDEN] = -10.0, np.eye(VOCAB)
    _write(layer.pre_mlp_norm.weight, 1.0)
    _write(layer.mlp.gate, gate)
    _write(layer.mlp.up, up)
    _write(layer.mlp.down, _permutation(_ANSWER))
    _write(layer.post_mlp_norm.weight, 1.0)
