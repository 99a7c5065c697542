"""What is measured of a run: functions of one step's logits, or of the finished tokens.

A metric of a step is any function logits [B, C, V] -> [B]; a metric of a text is any function tokens [B, n] -> [B].
Those below are pytrees: their tokens and positions are data, so that another choice shares the compiled program.
A token or a position may be one number for all rows or one for each; several are given as [B, n].
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Metric = Callable[[jax.Array], jax.Array]

_data = functools.partial(jax.tree_util.register_dataclass)


def _many(values: Any, what: str) -> np.ndarray | jax.Array:
    """As int32 [n] or [B, n]."""
    if isinstance(values, jax.Array):
        return values
    array = np.asarray(values)
    if array.dtype == object or array.dtype.kind not in "iu":
        raise ValueError(f"{what} must be integers, of equal number a row; got {values!r}")
    if array.size and array.min() < 0:
        raise ValueError(f"{what} has {array.min()}; they count from 0")
    return np.atleast_1d(array).astype(np.int32)


def at_positions(values_BC: jax.Array, positions: jax.Array) -> jax.Array:
    """[B, n, ...] entries of [B, C, ...] at positions [n], the same for all rows, or [B, n]."""
    index_BN = jnp.broadcast_to(positions, (values_BC.shape[0], positions.shape[-1]))
    return jax.vmap(lambda row, index: row[index])(values_BC, index_BN)


def narrowed(metric: Metric) -> tuple[Any, Metric] | None:
    """The positions [n] or [B, n] that a metric reads, and the same metric of logits [B, n, V] there; None for all."""
    if not isinstance(metric, LogProb | LogitDifference | SetLogProb):
        return None
    return metric.positions, dataclasses.replace(metric, positions=np.arange(metric.positions.shape[-1]))


@_data
@dataclasses.dataclass(frozen=True)
class LogProb:
    """Sum over positions of log p(token), in nats: of a token, an answer, or a given text.

    Attributes:
        positions: [n] or [B, n] canvas positions.
        tokens: [n] or [B, n] ids there.
    """

    positions: Any
    tokens: Any

    def __post_init__(self) -> None:
        _set(self, positions=self.positions, tokens=self.tokens)

    def __call__(self, logits: jax.Array) -> jax.Array:
        logp_BNV = jax.nn.log_softmax(at_positions(logits, self.positions).astype(jnp.float32), -1)
        tokens_BN = jnp.broadcast_to(self.tokens, logp_BNV.shape[:2])
        return jnp.take_along_axis(logp_BNV, tokens_BN[..., None], -1)[..., 0].sum(-1)


@_data
@dataclasses.dataclass(frozen=True)
class LogitDifference:
    """Mean over positions of logit(token) - logit(other): the usual metric of activation patching.

    Attributes:
        positions: [n] or [B, n] canvas positions.
        tokens, others: [n] or [B, n] ids; which answer is looked for, and which it is weighed against.
    """

    positions: Any
    tokens: Any
    others: Any

    def __post_init__(self) -> None:
        _set(self, positions=self.positions, tokens=self.tokens, others=self.others)

    def __call__(self, logits: jax.Array) -> jax.Array:
        own_BNV = at_positions(logits, self.positions).astype(jnp.float32)

        def of(tokens: jax.Array) -> jax.Array:
            index_BN = jnp.broadcast_to(tokens, own_BNV.shape[:2])
            return jnp.take_along_axis(own_BNV, index_BN[..., None], -1)[..., 0]

        return (of(self.tokens) - of(self.others)).mean(-1)


@_data
@dataclasses.dataclass(frozen=True)
class Divergence:
    """Mean over positions of KL(reference || run) in nats; 0 where nothing changed.

    Attributes:
        reference: [C, V] or [B, C, V] logits of the run compared with.
        positions: [n] or [B, n]; None takes all.
    """

    reference: Any
    positions: Any = None

    def __post_init__(self) -> None:
        if self.positions is not None:
            _set(self, positions=self.positions)

    def __call__(self, logits: jax.Array) -> jax.Array:
        reference = jnp.broadcast_to(self.reference, logits.shape)
        if self.positions is not None:
            logits, reference = (at_positions(x, self.positions) for x in (logits, reference))
        p, q = (jax.nn.log_softmax(x.astype(jnp.float32), -1) for x in (reference, logits))
        return jnp.sum(jnp.exp(p) * (p - q), -1).mean(-1)


@_data
@dataclasses.dataclass(frozen=True)
class SetLogProb:
    """Sum over positions of log(p(any of `tokens`) / p(any of `others`)): a refusal margin, for instance.

    Attributes:
        positions: [n] or [B, n] canvas positions.
        tokens, others: [k] ids of the two sets, the same at every position; `others` None weighs against all else.
    """

    positions: Any
    tokens: Any
    others: Any = None

    def __post_init__(self) -> None:
        _set(self, positions=self.positions, tokens=self.tokens)
        if self.others is not None:
            _set(self, others=self.others)

    def __call__(self, logits: jax.Array) -> jax.Array:
        logp_BNV = jax.nn.log_softmax(at_positions(logits, self.positions).astype(jnp.float32), -1)
        inside = jax.nn.logsumexp(logp_BNV[..., self.tokens], -1)
        if self.others is None:
            listed = jnp.zeros(logp_BNV.shape[-1], bool).at[self.tokens].set(True)
            outside = jax.nn.logsumexp(jnp.where(listed, -jnp.inf, logp_BNV), -1)
        else:
            outside = jax.nn.logsumexp(logp_BNV[..., self.others], -1)
        return (inside - outside).sum(-1)


@_data
@dataclasses.dataclass(frozen=True)
class Says:
    """A metric of a text: the share of positions that hold these tokens; 1.0 if the text says all of them.

    Attributes:
        positions: [n] or [B, n] positions in the generated tokens.
        tokens: [n] or [B, n] ids.
    """

    positions: Any
    tokens: Any

    def __post_init__(self) -> None:
        _set(self, positions=self.positions, tokens=self.tokens)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        found = at_positions(jnp.asarray(tokens), self.positions)
        return (found == self.tokens).astype(jnp.float32).mean(-1)


def answer(tokens: Sequence[int] | Sequence[Sequence[int]], start: int = 0) -> LogProb:
    """Log-probability that a given text stands at the start of the canvas, or from `start` on."""
    tokens = _many(tokens, "tokens")
    return LogProb(start + np.arange(tokens.shape[-1]), tokens)


def _set(metric: Any, **fields: Any) -> None:
    """Check and store, unless JAX is rebuilding the metric around leaves of its own."""
    for name, value in fields.items():
        if isinstance(value, int | float | np.number | list | tuple | range | np.ndarray):
            object.__setattr__(metric, name, _many(value, name))
