"""Edits of what one step hands to the next: the distribution behind S, and S.

Those of "soft_probs" change the distribution that the soft embedding reads, and nothing else: sampling, entropy and
acceptance keep the model's own. `steps=slice(t, None)` makes one persistent, `steps=t` a single kill. For the canvas,
`Patch` tokens at "canvas" (pins them) or `Renoise` there (un-commits them). `methods.md` sections 10 and 13.

At positions that the sampler accepted the canvas carries the information, elsewhere S does: edit one of them, and
then both, before calling a carrier inert. `Zero` at "soft_embed" (no signal) and `Flat` (a uniform one) differ.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from interp.edits import Edit, lead

_PROBS = ("soft_probs",)


def renormalized(weights_BCV: jax.Array) -> jax.Array:
    """Rows that sum to one; rows of zeros stay."""
    total = jnp.sum(weights_BCV, -1, keepdims=True)
    return jnp.where(total > 0, weights_BCV / jnp.where(total > 0, total, 1.0), 0.0)


def _listed(tokens: Any) -> jax.Array:
    return jnp.atleast_1d(jnp.asarray(tokens, jnp.int32))


def _chosen(tokens: jax.Array, size: int) -> jax.Array:
    """[V] float32, 1 for the listed tokens; an id outside the vocabulary, such as -1, stands for none."""
    return jnp.sum(jax.nn.one_hot(tokens, size, dtype=jnp.float32), 0).clip(0, 1)


@nnx.dataclass(eq=False)
class Flat(Edit):
    """The uniform distribution: the signal says nothing. What logits of zero give."""

    ONLY_AT: ClassVar = _PROBS

    def apply(self, x: jax.Array) -> jax.Array:
        return jnp.full_like(x, 1 / x.shape[-1])


@nnx.dataclass(eq=False)
class Echo(Edit):
    """The token that the canvas holds, one-hot: S carries nothing beyond the canvas handed on beside it."""

    ONLY_AT: ClassVar = _PROBS

    def apply(self, x: jax.Array) -> jax.Array:
        context = self.told(x.shape[0])
        if "next_canvas" not in context:
            raise ValueError("Echo needs the canvas of a denoising step; dg.soft_embed alone has none")
        return jax.nn.one_hot(context["next_canvas"], x.shape[-1], dtype=x.dtype)


@nnx.dataclass(eq=False)
class SwapRanks(Edit):
    """Exchanges the probabilities of two ranks, 0 being the most likely token, at every step anew."""

    ONLY_AT: ClassVar = _PROBS
    first: Any = nnx.data(default=0)
    second: Any = nnx.data(default=1)

    def __post_init__(self) -> None:
        self.first, self.second = jnp.asarray(self.first, jnp.int32), jnp.asarray(self.second, jnp.int32)

    def apply(self, x: jax.Array) -> jax.Array:
        rank_BCV = ranks(x)
        is_first, is_second = rank_BCV == self.first, rank_BCV == self.second
        of_first = jnp.sum(jnp.where(is_first, x, 0.0), -1, keepdims=True)
        of_second = jnp.sum(jnp.where(is_second, x, 0.0), -1, keepdims=True)
        return jnp.where(is_first, of_second, jnp.where(is_second, of_first, x))


@nnx.dataclass(eq=False)
class DropRank(Edit):
    """Removes the token of one rank and scales the others up, at every step anew."""

    ONLY_AT: ClassVar = _PROBS
    rank: Any = nnx.data(default=0)

    def __post_init__(self) -> None:
        self.rank = jnp.asarray(self.rank, jnp.int32)

    def apply(self, x: jax.Array) -> jax.Array:
        return renormalized(jnp.where(ranks(x) == self.rank, 0.0, x))


def ranks(probs_BCV: jax.Array) -> jax.Array:
    """The rank of every token, 0 for the most likely; the lower id first among equals."""
    return jnp.argsort(jnp.argsort(-probs_BCV, -1, stable=True), -1, stable=True)


@nnx.dataclass(eq=False)
class Kill(Edit):
    """Removes tokens and scales the others up: what a logit of -3e4 does.

    Attributes:
        tokens: an id or ids, data; -1 stands for none, so that lists of one length share a program.
    """

    ONLY_AT: ClassVar = _PROBS
    tokens: Any = nnx.data()

    def __post_init__(self) -> None:
        self.tokens = _listed(self.tokens)

    def apply(self, x: jax.Array) -> jax.Array:
        return renormalized(x * (1 - lead(_chosen(self.tokens, x.shape[-1]), x.ndim)))


@nnx.dataclass(eq=False)
class Inject(Edit):
    """Gives each of n tokens the mass `amount`: p' = (1 - n * amount) p + amount * 1[tokens].

    A token that becomes the most likely one also tells by its rank: compare arms in which none does.
    """

    ONLY_AT: ClassVar = _PROBS
    tokens: Any = nnx.data()
    amount: Any = nnx.data()

    def __post_init__(self) -> None:
        self.tokens, self.amount = _listed(self.tokens), jnp.asarray(self.amount, jnp.float32)
        if not isinstance(self.tokens, jax.core.Tracer) and not isinstance(self.amount, jax.core.Tracer):
            count, amount = len(set(np.asarray(self.tokens).tolist()) - {-1}), np.asarray(self.amount)
            if count and not ((amount >= 0) & (count * amount <= 1 + 1e-6)).all():
                raise ValueError(f"{count} tokens cannot have the mass {amount} each; give 0 to {1 / count:.3g}")

    def apply(self, x: jax.Array) -> jax.Array:
        chosen_V = _chosen(self.tokens, x.shape[-1])
        return (1 - jnp.sum(chosen_V) * self.amount) * x + self.amount * lead(chosen_V, x.ndim)


@nnx.dataclass(eq=False)
class Bump(Edit):
    """Adds `amount` to the logits of tokens. A large one makes the row that token alone."""

    ONLY_AT: ClassVar = _PROBS
    tokens: Any = nnx.data()
    amount: Any = nnx.data()

    def __post_init__(self) -> None:
        self.tokens, self.amount = _listed(self.tokens), jnp.asarray(self.amount, jnp.float32)

    def apply(self, x: jax.Array) -> jax.Array:
        logp = jnp.log(jnp.maximum(x, jnp.finfo(x.dtype).tiny))
        return jax.nn.softmax(logp + self.amount * lead(_chosen(self.tokens, x.shape[-1]), x.ndim), -1)


@nnx.dataclass(eq=False)
class Mix(Edit):
    """Mixes in a donor: (1 - amount) of what is there, `amount` of the donor's value.

    At "soft_embed" (S) and at "soft_probs" this is the same mixture of distributions; `logits` mixes logarithms at
    "soft_probs" instead. The donor may be of another prompt, temperature or step (`moment.soft`, captured sites).
    """

    ONLY_AT: ClassVar = ("soft_embed", "soft_probs")
    VALUES: ClassVar = {"donor": None}
    donor: Any = nnx.data()
    amount: Any = nnx.data()
    logits: bool = False

    def __post_init__(self) -> None:
        self.amount = jnp.asarray(self.amount, jnp.float32)
        if self.logits and self.name == "soft_embed":
            raise ValueError("S has no logits to mix: put Mix(..., logits=True) at soft_probs")

    def apply(self, x: jax.Array) -> jax.Array:
        donor, amount = self.here(self.donor, x), self.amount
        if not self.logits:
            return (1 - amount) * x + amount * donor
        tiny = jnp.finfo(x.dtype).tiny
        return jax.nn.softmax(
            (1 - amount) * jnp.log(jnp.maximum(x, tiny)) + amount * jnp.log(jnp.maximum(donor, tiny)), -1
        )


@nnx.dataclass(eq=False)
class Smooth(Edit):
    """An exponential mean over steps: S <- decay * S fed into the step + (1 - decay) * S; anew in each block."""

    ONLY_AT: ClassVar = ("soft_embed",)
    decay: Any = nnx.data(default=0.5)

    def __post_init__(self) -> None:
        self.decay = jnp.asarray(self.decay, jnp.float32)

    def apply(self, x: jax.Array) -> jax.Array:
        context = self.told(x.shape[0])
        if "soft" not in context:
            raise ValueError("Smooth needs the S of a denoising step; dg.soft_embed alone has none")
        is_first = (context["step"] == 0)[:, None, None]
        return jnp.where(is_first, x, self.decay * context["soft"] + (1 - self.decay) * x)
