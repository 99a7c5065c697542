"""What the likely tokens of each step are, seen from the final text (arXiv 2606.20560, section 3.2).

Each token that is likely at a position gets the first class that applies:

| class | the token |
|---|---|
| final | is the final one there |
| adjacent | is the final one at most `window` positions away |
| similar | is one of the nearest neighbours of the final one, by cosine in an embedding table |
| similar to adjacent | is one of the nearest neighbours of a final one at most `window` positions away |
| other | none of these: not interpretable by this rule |
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax.nn.functional import of
from dgemma_jax.progress import bar
from interp.flow.recorded import Specials, content, joined, kept
from interp.flow.saved import Saved

CLASSES = ("final", "adjacent", "similar", "similar to adjacent", "other")


@dataclasses.dataclass(frozen=True, eq=False)
class TokenIdentity(Saved):
    """Likely tokens by class.

    Attributes:
        counts: [J, R, B, 5], in the order of `CLASSES`.
        distances: [J, R, B, window] adjacent ones, by the smallest distance, 1 first.
        about: which tokens were taken as likely.
    """

    counts: np.ndarray
    distances: np.ndarray
    about: str

    def shares(self) -> np.ndarray:
        """[R, 5] share of each class among the likely tokens of a step, all rows and blocks; NaN without any."""
        counts = self.counts.sum((0, 2))
        total = counts.sum(-1, keepdims=True)
        return np.where(total > 0, counts / np.maximum(total, 1), np.nan)

    def plot(self) -> Any:
        """Stacked shares by step; returns the figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        shares = self.shares()
        shares = shares[np.isfinite(shares).all(-1)]
        axes.stackplot(range(len(shares)), shares.T, labels=CLASSES)
        axes.set(xlabel="step", ylabel="share of likely tokens", ylim=(0, 1), title=self.about)
        axes.legend(loc="lower right", fontsize="small")
        return figure

    def __repr__(self) -> str:
        shares = self.counts.sum((0, 1, 2)) / max(1, self.counts.sum())
        said = ", ".join(f"{name} {share:.1%}" for name, share in zip(CLASSES, shares, strict=True))
        return f"{int(self.counts.sum())} likely tokens ({self.about}): {said}"


def token_identity(
    bundle: Any, trajectory: dg.Trajectory, *, k: int | None = None, p: float | None = None, window: int = 10,
    neighbors: int = 50, specials: Specials | None = None, skip: int = 0, final: np.ndarray | None = None,
    table: Any = None, progress: bool | None = None,
) -> TokenIdentity:  # fmt: skip
    """Classes of the likely tokens of every step.

    Args:
        bundle: the model of the run, whose embedding table says what is similar.
        trajectory: with candidates enough: `top_k` of its record at least k, or 1 / p.
        k, p: likely are the k most likely tokens, or those of probability above p (0.03 in the paper). Give one.
        window: positions that count as adjacent.
        neighbors: nearest tokens that count as similar.
        specials: what is no content; by default the bundle's. Positions that end as one of these are left out.
        skip: positions left out at the start of an answer.
        final: [J, B, C] the text to compare with; by default what was committed. Texts of other rows
            (`np.roll(trajectory.committed, 1, 1)`) are the null: chance agreement.
        table: [V, D] embedding table that says what is similar, of another model with the same vocabulary.

    Raises:
        ValueError: neither or both of k and p, or a record with too few candidates.
    """
    ids, probs = kept(trajectory, "top_ids", "top_probs")
    taken = _taken(ids, probs, k, p)
    final = trajectory.committed if final is None else np.asarray(final)
    if final.shape != trajectory.committed.shape:
        raise ValueError(f"final has shape {final.shape}; needed is {trajectory.committed.shape}")
    specials = Specials.of(bundle) if specials is None else specials
    model = of(bundle)
    ran_JBC = np.broadcast_to((trajectory.num_steps > 0)[..., None], final.shape)
    own = joined(content(dataclasses.replace(trajectory, committed=final), specials, skip))
    text, there = joined(final), joined(ran_JBC)
    words = np.unique(text[there])
    near = _Near(words, nearest_tokens(model if table is None else table, words, neighbors), model.config.vocab_size)
    blocks, steps, rows, length, _ = ids.shape
    counts = np.zeros((blocks, steps, rows, len(CLASSES)), int)
    distances = np.zeros((blocks, steps, rows, window), int)
    with bar("token identity", rows, progress) as done:
        for row in range(rows):
            use = taken[:, :, row] & trajectory.valid[:, :, row, None, None]
            use &= own[row].reshape(blocks, 1, length, 1)
            block, step, place, _ = at = np.nonzero(use)
            kind, distance = _classes(
                ids[:, :, row][at], block * length + place, text[row], there[row], window, near
            )  # fmt: skip
            np.add.at(counts, (block, step, row, kind), 1)
            is_near = kind == CLASSES.index("adjacent")
            np.add.at(distances, (block[is_near], step[is_near], row, distance[is_near] - 1), 1)
            done(1)
    return TokenIdentity(counts, distances, f"the top {k}" if p is None else f"p > {p:g}")


def _taken(ids: np.ndarray, probs: np.ndarray, k: int | None, p: float | None) -> np.ndarray:
    """[J, R, B, C, U] bool: the candidates that are likely."""
    if (k is None) == (p is None):
        raise ValueError(f"give one of k and p, got {k=}, {p=}")
    count = ids.shape[-1]
    if k is not None:
        if not 1 <= k <= count:
            raise ValueError(f"k={k}: the record kept {count} candidates; generate with record=dg.Record(top_k={k})")
        return np.broadcast_to(np.arange(count) < k, ids.shape)
    if not 0 < p < 1:
        raise ValueError(f"p must be between 0 and 1, got {p}")
    if (probs[..., -1] > p).any():
        raise ValueError(
            f"the record kept {count} candidates, and the last of them is above p={p:g} in places: some are missing; "
            f"generate with record=dg.Record(top_k={int(1 / p)})"
        )
    return probs > p


def _classes(tokens, places, text, there, window, near) -> tuple[np.ndarray, np.ndarray]:
    """Class of each likely token, and its distance where it is adjacent."""
    kind = np.full(len(tokens), CLASSES.index("other"))
    distance = np.zeros(len(tokens), int)

    def mark(name: str, is_like: Any, reach: range) -> None:
        for far in reach:
            for sign in (-1, 1) if far else (1,):
                open_ = np.flatnonzero(kind == CLASSES.index("other"))
                other = places[open_] + sign * far
                inside = (other >= 0) & (other < len(text))
                open_, other = open_[inside], other[inside]
                open_, other = open_[there[other]], other[there[other]]
                hit = open_[is_like(text[other], tokens[open_])]
                kind[hit], distance[hit] = CLASSES.index(name), far

    near_by = range(1, window + 1)
    mark("final", np.equal, range(1))
    mark("adjacent", np.equal, near_by)
    mark("similar", near, range(1))
    mark("similar to adjacent", near, near_by)
    return kind, distance


class _Near:
    """Whether a token is among the neighbours of another: a sorted list of pairs, not a table [V, V]."""

    def __init__(self, words: np.ndarray, neighbors: np.ndarray, size: int) -> None:
        self.size = size
        self.pairs = np.sort((words[:, None].astype(np.int64) * size + neighbors).ravel())

    def __call__(self, word: np.ndarray, token: np.ndarray) -> np.ndarray:
        if not len(self.pairs):
            return np.zeros(len(word), bool)
        code = word.astype(np.int64) * self.size + token
        return self.pairs[np.searchsorted(self.pairs, code).clip(max=len(self.pairs) - 1)] == code


def nearest_tokens(model: Any, tokens: Any, count: int = 50, block: int = 16384) -> np.ndarray:
    """[n, count] the nearest other tokens of each, by cosine, nearest first.

    Args:
        model: a model or bundle, or an embedding table [V, D].
        tokens: [n] ids.
        block: rows of the table looked at together.

    Raises:
        ValueError: more neighbours than other tokens.
    """
    table_VD = jnp.asarray(model) if hasattr(model, "ndim") else of(model).embedder.table.get_value()
    size, ids = table_VD.shape[0], np.asarray(tokens, np.int32).reshape(-1)
    if not 1 <= count < size:
        raise ValueError(f"count must be from 1 to {size - 1}, the number of other tokens; got {count}")
    at_once = 256
    padded = np.resize(ids, -(-len(ids) // at_once) * at_once).reshape(-1, at_once) if len(ids) else ids[None, :0]
    parts = [np.asarray(_nearest(table_VD, part, count=count, block=min(block, size))) for part in padded if len(ids)]
    return np.concatenate(parts)[: len(ids)] if parts else np.zeros((0, count), np.int32)


@functools.partial(jax.jit, static_argnames=("count", "block"))
def _nearest(table_VD, tokens_Q, *, count, block):
    size = table_VD.shape[0]

    def unit(x):
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-30))

    query_QD = unit(table_VD[tokens_Q])

    def merge(best, number):
        scores, found = best
        first = jnp.minimum(number * block, size - block)  # the last block overlaps the one before
        ids = first + jnp.arange(block, dtype=jnp.int32)
        new_QB = jnp.einsum("qd,bd->qb", query_QD, unit(jax.lax.dynamic_slice_in_dim(table_VD, first, block)))
        is_new = (ids >= number * block) & (ids != tokens_Q[:, None])
        scores, at = jax.lax.top_k(jnp.concatenate([scores, jnp.where(is_new, new_QB, -jnp.inf)], 1), count)
        every = jnp.concatenate([found, jnp.broadcast_to(ids, new_QB.shape)], 1)
        return (scores, jnp.take_along_axis(every, at, 1)), None

    shape = (len(tokens_Q), count)
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32))
    return jax.lax.scan(merge, start, jnp.arange(-(-size // block)))[0][1]
