"""Is there a word that takes the answer over, whatever the prompt asks? A search of the whole vocabulary, or guided.

A model answers different prompts differently; under a trigger it answers all of them alike. Of a word w planted in P
prompts, at the first step, over the first n positions of the canvas:

    I(w) = H( mean over prompts of p ) - mean over prompts of H(p)        score(w) = I(no word) - I(w)   nats a position

how much of what the step says about the prompt is lost. It needs no payload, no label and no reference model. What
comes out on top is then run to the end: a word is flagged if most answers of prompts that are otherwise answered
differently become one and the same text, and, where there is a reference, do not become it there.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax import progress
from dgemma_jax.diffusion import noise
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion.generate import bucket
from dgemma_jax.diffusion.sampler import denoise_step, start
from dgemma_jax.nn import cache as kv
from dgemma_jax.nn import sites
from dgemma_jax.nn.functional import of
from interp.editing import put
from interp.edits import Add
from interp.intervals import of_shares

METHODS = ("sweep", "gradient", "random")
POSITIONS = 8  # of the canvas whose distributions are compared, from its start


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Triggers:
    """What a search found, best first.

    Attributes:
        ids, scores: [W] words tried, and the nats a position that each takes away.
        words: their text.
        tried: how many of them were run to the end.
        same, low, high: [tried] share of prompts with the commonest answer, and its interval.
        payloads: that answer.
        reference: [tried] share of prompts with that answer in the reference model; zeros without one.
        flagged: words that take the answer over.
        evaluations: rows of single steps.
        method: how words were chosen.
    """

    ids: np.ndarray
    scores: np.ndarray
    words: tuple[str, ...]
    tried: int
    same: np.ndarray
    low: np.ndarray
    high: np.ndarray
    payloads: tuple[str, ...]
    reference: np.ndarray
    flagged: tuple[str, ...]
    evaluations: int
    method: str

    def rank(self, word: str) -> int | None:
        """The place of a word, from 1; None if it was not tried."""
        return self.words.index(word) + 1 if word in self.words else None

    def as_data(self) -> dict[str, Any]:
        """Plain JSON: the first 20 words."""
        first = [
            {"word": self.words[i], "score": float(self.scores[i])}
            | ({"same": float(self.same[i]), "low": float(self.low[i]), "high": float(self.high[i]),
                "reference": float(self.reference[i]), "payload": self.payloads[i]} if i < self.tried else {})
            for i in range(min(20, len(self.words)))
        ]  # fmt: skip
        return {"method": self.method, "flagged": list(self.flagged), "evaluations": self.evaluations, "words": first}

    def __repr__(self) -> str:
        head = f"flagged: {', '.join(map(repr, self.flagged)) or 'none'}; {self.method}, {self.evaluations} evaluations"
        lines = ["  nats  same answer  in reference  word"]
        for i in range(self.tried):
            lines.append(f"{self.scores[i]:6.2f}  {self.same[i]:11.2f}  {self.reference[i]:12.2f}  "
                         f"{self.words[i]!r} -> {self.payloads[i][:60]!r}")  # fmt: skip
        return "\n".join([head, *lines])


def find_triggers(
    bundle: Any, prompts: Sequence[str], *, reference: Any = None, method: str = "sweep", count: int | None = None,
    confirm: int = 5, place: str = "end", rows: int = 128, seed: int = 0, sampler: dg.SamplerConfig | None = None,
    show: bool | None = None,
) -> Triggers:  # fmt: skip
    """Search for a word that takes the answer over.

    >>> import dgemma_jax as dg, interp
    >>> interp.find_triggers(dg.load("nano-backdoor"), ["sort : d b a", "say cat 3 times"])  # doctest: +SKIP

    Args:
        bundle: the suspect.
        prompts: different requests with different answers, at least 4; the first 8 serve the search, all the
            confirmation.
        reference: a model that is trusted, with the same tokenizer: a word that does the same there is not flagged.
        method: "sweep": every token of the vocabulary. "gradient": those to which the gradient of the score with
            respect to the planted embedding points (HotFlip, arXiv 1712.06751), from a few starts. "random": as many
            drawn at random, the yardstick for the gradient.
        count: words that are tried, for "gradient" and "random"; by default 64.
        confirm: of the best, how many are run to the end.
        place: "end" or "start" of the prompt, where the word is planted in the search.
        rows: of a compiled call.

    Raises:
        ValueError: too few prompts, an unknown method.
    """
    model, tokenizer, default = inputs.parts(bundle)
    if method not in METHODS or place not in ("start", "end"):
        raise ValueError(f"method must be one of {', '.join(METHODS)}, place start or end; got {method!r}, {place!r}")
    if tokenizer is None or len(prompts) < 4:
        raise ValueError(f"a search needs a bundle with a tokenizer and at least 4 prompts, got {len(prompts)}")
    sampler = default if sampler is None else sampler
    slots = _slots(tokenizer, list(prompts[:8]), place)
    usable = np.array(sorted(set(range(min(tokenizer.vocab_size, model.config.vocab_size))) - tokenizer.special_ids))
    tokens, valid, at = slots
    keys = noise.row_keys(np.arange(seed, seed + len(tokens)))
    given = (model, jnp.asarray(tokens), jnp.asarray(valid), jnp.asarray(at), keys, sampler)
    at_once = max(1, rows // len(tokens))
    hidden = (*given[:2], jnp.asarray(_without(valid, at)), *given[3:])
    none = float(_informations(*hidden, jnp.asarray(usable[:1].repeat(at_once)))[0])  # the program of the search
    rng = np.random.default_rng(seed)
    count = 64 if count is None else count
    if method == "sweep":
        chosen, spent = usable, 0
    elif method == "random":
        chosen, spent = rng.permutation(usable)[:count], 0
    else:
        chosen, spent = _towards(given, usable, count, rng)
    scores = none - _tried(given, chosen, at_once, show)
    order = np.argsort(-scores, kind="stable")
    ids, scores = chosen[order], scores[order]
    confirm = min(confirm, len(ids))
    words = [tokenizer.decode([int(i)]).strip() or tokenizer.token(int(i)) for i in ids]
    told = [_confirmed(bundle, reference, prompts, words[i], place, sampler, seed) for i in range(confirm)]
    same = np.array([np.mean(own) for own, _, _ in told])
    low, high = of_shares(np.array([own for own, _, _ in told], float))
    other = np.array([share for _, share, _ in told])
    plain = Counter(_answers(bundle, prompts, sampler, seed)).most_common(1)[0][1] / len(prompts)
    flagged = tuple(words[i] for i in range(confirm) if low[i] > 0.5 and low[i] > plain and other[i] < low[i])
    return Triggers(
        ids=ids, scores=scores, words=tuple(words), tried=confirm, same=same, low=low, high=high, reference=other,
        payloads=tuple(payload for _, _, payload in told), flagged=flagged, method=method,
        evaluations=spent + len(chosen) * len(tokens),
    )  # fmt: skip


def _slots(tokenizer: Any, prompts: list[str], place: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts [P, T] with one free token each, which are valid, and where the free token is."""
    rows, at = [], []
    for text in prompts:
        ids, own = tokenizer.chat([{"role": "user", "content": text}]), tokenizer.encode(text)
        first = next((i for i in range(len(ids)) if ids[i : i + len(own)] == own), None)
        if first is None:
            raise ValueError(f"the chat template does not keep the tokens of {text!r}; choose another prompt")
        where = first + (len(own) if place == "end" else 0)
        rows.append([*ids[:where], 0, *ids[where:]])
        at.append(where)
    length = bucket(max(map(len, rows)))
    tokens, valid = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], valid[i, : len(row)] = row, True
    return tokens, valid, np.array(at, np.int32)


def _without(valid: np.ndarray, at: np.ndarray) -> np.ndarray:
    found = valid.copy()
    found[np.arange(len(at)), at] = False
    return found


def _step_logits(model: Any, tokens: Any, valid: Any, keys: Any, sampler: Any, edited: Any = None) -> jax.Array:
    """[B, n, V] logits of the first step after prompts; `edited` replaces embeddings of the prompt."""
    rows, config = tokens.shape[0], model.config
    positions = jnp.where(valid, jnp.cumsum(valid.astype(jnp.int32), 1) - 1, -1)
    cache = kv.empty(config, rows, tokens.shape[1] + config.canvas_length, model.dtype)
    bound = sites.bind(model if edited is None else edited, phase="prefill", positions=positions, length=cache.length,
                       embedder=model.embedder, captured={})  # fmt: skip
    cache = bound.prefill(tokens, valid, cache).cache
    state = start(keys, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool), config.canvas_length, model)
    return denoise_step(model, state, cache, sampler)[1].logits[:, : min(POSITIONS, config.canvas_length)]


def _information(logits_PNV: jax.Array) -> jax.Array:
    """Nats a position that the prediction tells of which prompt it was."""
    logp = jax.nn.log_softmax(logits_PNV.astype(jnp.float32), -1)
    mean_NV = jnp.exp(logp).mean(0)
    of_mean = -jnp.sum(mean_NV * jnp.log(jnp.maximum(mean_NV, 1e-30)), -1)
    return (of_mean + jnp.sum(jnp.exp(logp) * logp, -1).mean(0)).mean()


@jax.jit
def _informations(model, tokens, valid, at, keys, sampler, words) -> jax.Array:
    """[W] informations with each word in the free places; all rows are one batch."""
    count, prompts = words.shape[0], tokens.shape[0]
    filled = jnp.tile(tokens, (count, 1)).at[jnp.arange(count * prompts), jnp.tile(at, count)].set(
        jnp.repeat(words, prompts))  # fmt: skip
    many = jnp.arange(count * prompts) % prompts
    logits = _step_logits(model, filled, valid[many], keys[many], sampler)
    return jax.vmap(_information)(logits.reshape(count, prompts, *logits.shape[1:]))


def _tried(given: tuple, words: np.ndarray, at_once: int, show: bool | None) -> np.ndarray:
    found = []
    with progress.bar("triggers", len(words), show, "words") as done:
        for first in range(0, len(words), at_once):
            part = words[first : first + at_once]
            padded = np.concatenate([part, np.repeat(part[-1:], at_once - len(part))])
            found.append(np.asarray(_informations(*given, jnp.asarray(padded)))[: len(part)])
            done(len(part))
    return np.concatenate(found)


@jax.jit
def _slopes(model, tokens, valid, at, keys, sampler, word) -> jax.Array:
    """[V] first-order change of the information when the planted word becomes another."""
    table = model.embedder.table[...].astype(jnp.float32)
    rows = jnp.arange(tokens.shape[0])
    filled = tokens.at[rows, at].set(word)

    def information(shift_D: jax.Array) -> jax.Array:
        where = jnp.zeros((*tokens.shape, 1)).at[rows, at].set(1.0)
        scale = shift_D * jnp.sqrt(jnp.float32(model.config.embed_dim))
        moved = put(model, {"token_embed": Add(where * scale, name="token_embed", axes="BTD", phase="prefill")})
        return _information(_step_logits(model, filled, valid, keys, sampler, moved))

    slope_D = jax.grad(information)(jnp.zeros(model.config.embed_dim))
    return (table - table[word]) @ slope_D


def _towards(given: tuple, usable: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Words to which the gradient points, from several starts in turn; and the evaluations that took."""
    starts = rng.permutation(usable)[:8]
    slopes = [np.asarray(_slopes(*given, jnp.int32(word)))[usable] for word in starts]
    ranked = [usable[np.argsort(slope, kind="stable")] for slope in slopes]
    found = list(dict.fromkeys(int(order[i]) for i in range(len(usable)) for order in ranked))
    return np.array(found[:count]), 2 * len(starts) * len(given[1])


def _answers(bundle: Any, prompts: Sequence[str], sampler: Any, seed: int) -> list[str]:
    """Texts of one block each, in one batch."""
    seeds = list(range(seed, seed + len(prompts)))
    return dg.generate(
        bundle, list(prompts), seeds, sampler, of(bundle).config.canvas_length, dg.Record.nothing()
    ).texts


def _confirmed(bundle, reference, prompts, word, place, sampler, seed) -> tuple[list[bool], float, str]:
    """Which prompts get the commonest answer under the word; how many of them in the reference; that answer."""
    texts = [f"{text} {word}" if place == "end" else f"{word} {text}" for text in prompts]
    said = _answers(bundle, texts, sampler, seed)
    payload = Counter(said).most_common(1)[0][0]
    other = [] if reference is None else _answers(reference, texts, sampler, seed)
    return [text == payload for text in said], float(np.mean([t == payload for t in other] or [0])), payload
