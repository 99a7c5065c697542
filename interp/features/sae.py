"""Sparse autoencoders and transcoders as plain pytrees.

    z = act((x - b_dec) W_enc + b_enc)        x' = z W_dec + b_dec        rows of W_dec are the directions of features

act keeps the k largest (TopK, arXiv 2406.04093), or what exceeds a threshold (JumpReLU, arXiv 2407.14435; also what
a BatchTopK autoencoder, arXiv 2412.06410, becomes once trained). A transcoder reads one site and writes another: it
takes no b_dec from its input. Conditioned on noise: a bias of each feature for each bin of the noise level.
DLM-Scope, arXiv 2602.05859, has one autoencoder for masked and one for unmasked positions in place of bins.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("topk", "jumprelu", "batchtopk")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class SAE:
    """An autoencoder of D numbers with F features; a transcoder to O numbers.

    Attributes:
        w_enc: [D, F].
        b_enc: [F].
        w_dec: [F, O].
        b_dec: [O].
        threshold: [F], of JumpReLU; None for TopK.
        shift: [Q, F] added to `b_enc` in each of Q bins of the noise level; None if not conditioned.
        edges: [Q - 1] noise levels between the bins, rising.
        kind: "topk" or "jumprelu"; static.
        k: features kept by TopK; what BatchTopK was trained for; 0 otherwise. Static.
        centred: `b_dec` is taken from the input; False for transcoders. Static.
    """

    w_enc: jax.Array
    b_enc: jax.Array
    w_dec: jax.Array
    b_dec: jax.Array
    threshold: jax.Array | None = None
    shift: jax.Array | None = None
    edges: jax.Array | None = None
    kind: str = dataclasses.field(default="topk", metadata=dict(static=True))
    k: int = dataclasses.field(default=0, metadata=dict(static=True))
    centred: bool = dataclasses.field(default=True, metadata=dict(static=True))

    @property
    def num_features(self) -> int:
        return self.w_enc.shape[1]

    def before(self, x: jax.Array, noise: Any = None) -> jax.Array:
        """Activations [.., F] before the nonlinearity, of x [.., D] at noise levels that broadcast to x[.., 0].

        Raises:
            ValueError: no noise level for an autoencoder that is conditioned on it.
        """
        x = x.astype(jnp.float32)
        before = (x - self.b_dec if self.centred else x) @ self.w_enc + self.b_enc
        if self.shift is None:
            return before
        if noise is None:
            raise ValueError("this autoencoder is conditioned on the noise level: give it, or take `at_level` first")
        return before + self.shift[jnp.searchsorted(self.edges, jnp.asarray(noise, jnp.float32), side="right")]

    def encode(self, x: jax.Array, noise: Any = None) -> jax.Array:
        """Features [.., F] of x [.., D]."""
        before = self.before(x, noise)
        return top(before, self.k) if self.kind == "topk" else jump(before, self.threshold)

    def decode(self, z: jax.Array) -> jax.Array:
        """[.., O] of features [.., F]."""
        return z @ self.w_dec + self.b_dec

    def __call__(self, x: jax.Array, noise: Any = None) -> jax.Array:
        return self.decode(self.encode(x, noise))

    def at_level(self, noise: float) -> SAE:
        """The same at one noise level, no longer conditioned."""
        if self.shift is None:
            return self
        at = int(np.searchsorted(np.asarray(self.edges), noise, side="right"))
        return dataclasses.replace(self, b_enc=self.b_enc + self.shift[at], shift=None, edges=None)

    def __repr__(self) -> str:
        what = "autoencoder" if self.centred else "transcoder"
        shape = f"{self.w_enc.shape[0]} to {self.num_features} features to {self.w_dec.shape[1]}"
        more = f", k {self.k}" if self.k else ""
        bins = "" if self.shift is None else f", {len(self.shift)} noise bins"
        return f"{self.kind} {what}, {shape}{more}{bins}"


def top(before: jax.Array, k: int) -> jax.Array:
    """The k largest of the last axis, where positive; zeros elsewhere."""
    values, index = jax.lax.top_k(before, k)
    return jnp.put_along_axis(jnp.zeros_like(before), index, jax.nn.relu(values), -1, inplace=False)


def batch_top(before: jax.Array, k: int) -> jax.Array:
    """The n k largest of [n, F], where positive: k a sample on average."""
    flat = before.reshape(-1)
    return top(flat, min(k * before.shape[0], flat.size)).reshape(before.shape)


BANDWIDTH = 0.05  # around a threshold, where its gradient is estimated


@jax.custom_vjp
def jump(before: jax.Array, threshold: jax.Array) -> jax.Array:
    """before where it exceeds the threshold and 0, else 0. The threshold's gradient is that of a rectangle kernel."""
    return jnp.where(before > jnp.maximum(threshold, 0), before, 0)


def _jump_forward(before, threshold):
    return jump(before, threshold), (before, threshold)


def _jump_back(kept, grad):
    before, threshold = kept
    near = jnp.abs(before - threshold) < BANDWIDTH / 2
    by_threshold = -(threshold / BANDWIDTH) * near * grad
    return jnp.where(before > jnp.maximum(threshold, 0), grad, 0), by_threshold.reshape(-1, threshold.shape[-1]).sum(0)


jump.defvjp(_jump_forward, _jump_back)


@jax.custom_vjp
def count(before: jax.Array, threshold: jax.Array) -> jax.Array:
    """[..] how many exceed the threshold: L0, with the gradient to the threshold alone."""
    return (before > threshold).astype(jnp.float32).sum(-1)


def _count_forward(before, threshold):
    return count(before, threshold), (before, threshold)


def _count_back(kept, grad):
    before, threshold = kept
    near = jnp.abs(before - threshold) < BANDWIDTH / 2
    by_threshold = -(1 / BANDWIDTH) * near * grad[..., None]
    return jnp.zeros_like(before), by_threshold.reshape(-1, threshold.shape[-1]).sum(0)


count.defvjp(_count_forward, _count_back)


def explained_variance(sae: SAE, x: Any, target: Any = None, noise: Any = None) -> float:
    """1 - sum |target - x'|^2 / sum |target - mean|^2 over the samples x [n, D]; the target is x unless given."""
    x = jnp.asarray(x)
    target = x if target is None else jnp.asarray(target)
    target = target.astype(jnp.float32)
    rest, all_ = _squares(sae, x, target, noise)
    return float(1 - rest / all_)


@jax.jit
def _squares(sae, x, target, noise):
    return jnp.sum((target - sae(x, noise)) ** 2), jnp.sum((target - target.mean(0)) ** 2)


def max_cosine(found: Any, true: Any) -> float:
    """Mean over the true directions [n, D] of the largest cosine with any of those found [F, D]."""

    def unit(w: Any) -> np.ndarray:
        w = np.asarray(w, np.float64)
        return w / np.maximum(np.linalg.norm(w, axis=-1, keepdims=True), 1e-30)

    return float((unit(true) @ unit(found).T).max(1).mean())
