"""Train autoencoders and transcoders: Adam, many updates in one compiled scan.

The loss is the squared error as a share of the variance, plus 1/32 of the error that dead features alone leave of the
rest (auxiliary k, arXiv 2406.04093), plus for JumpReLU a penalty on the number of active features. Rows of W_dec stay
of length one. Inputs are scaled to a mean norm of sqrt(D); the scale is taken out of the weights at the end.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgemma_jax import progress
from interp.features.activation_sets import ActivationSet
from interp.features.sae import KINDS, SAE, batch_top, count, jump, top

AUXILIARY = 1 / 32
UPDATES_A_CALL = 50
ALIVE_FOR = 500  # updates without a sample after which a feature counts as dead

Source = Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class TrainedSAE:
    """An autoencoder, and how its training went.

    Attributes:
        sae: what was trained.
        error: [updates] squared error as a share of the variance of the batch.
        active: [updates] mean number of active features a sample.
        dead: share of features that no sample of the last `ALIVE_FOR` updates made active.
    """

    sae: SAE
    error: np.ndarray
    active: np.ndarray
    dead: float

    def __repr__(self) -> str:
        last = slice(-min(50, len(self.error)), None)
        return (
            f"{self.sae}; {len(self.error)} updates, {1 - self.error[last].mean():.1%} of the variance explained, "
            f"{self.active[last].mean():.3g} features active, {self.dead:.1%} dead"
        )


def train_sae(
    data: Any, features: int, *, kind: str = "topk", k: int = 32, site: str | None = None,
    target: Any = None, noise: Any = None, edges: Any = None, which: Any = None, updates: int = 2000, batch: int = 1024,
    rate: float = 1e-3, sparsity: float = 1e-3, seed: int = 0, show: bool | None = None,
) -> TrainedSAE:  # fmt: skip
    """Train a sparse autoencoder, or with a target a transcoder.

    >>> import interp, numpy as np
    >>> x = np.random.default_rng(0).standard_normal((64, 8))
    >>> interp.train_sae(x, 16, k=2, updates=0).sae
    topk autoencoder, 8 to 16 features to 8, k 2

    Args:
        data: activations [n, D], or an `ActivationSet`, which is streamed from disk.
        features: F, the width.
        kind: "topk", "jumprelu" or "batchtopk". The last is trained with the k n largest of a batch of n and then
            becomes JumpReLU with one threshold, so that samples do not depend on their batch.
        k: features kept a sample; unused by "jumprelu".
        site: of the set.
        target: for a transcoder: [n, O], or the site of the set that it writes. From "resid_mid" to "mlp_out" or
            "moe_out" it stands for the MLP or for the experts of a layer.
        noise: [n] noise levels; of a set its own. Used with `edges`.
        edges: levels between the bins of an autoencoder conditioned on noise, such as (0.25, 0.5, 0.75).
        which: numbers of the samples to train on: `found.where(accepted=False, step=[0, 1])`.
        updates: of Adam; the rate falls to zero over the last fifth.
        sparsity: price of an active feature, "jumprelu" only.

    Raises:
        ValueError: no such kind or site; sizes that do not fit each other.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 1 <= k <= features and kind != "jumprelu":
        raise ValueError(f"k must be in 1..{features}, the number of features; got {k}")
    edges = None if edges is None else jnp.asarray(sorted(edges), jnp.float32)
    source, sizes = _source(data, site, target, noise, edges is not None, which, batch, seed)
    x, y, level = source(1)
    scale_x, scale_y = (float(np.sqrt(a.shape[-1]) / np.linalg.norm(a[0], axis=-1).mean()) for a in (x, y))
    sae = _begin(sizes, features, kind, k, edges, target is not None, seed, scale_y * y[0].mean(0))
    fit = _Fit(sae, _ADAM.init(sae), jnp.zeros(features, jnp.int32), jnp.zeros(()), jnp.zeros((), jnp.int32))
    errors, active = [], []
    settings = (kind, k, jnp.float32(rate), jnp.float32(sparsity), jnp.int32(updates))
    with progress.bar("autoencoder", updates, show, "updates") as done:
        for first in range(0, updates, UPDATES_A_CALL):
            x, y, level = source(UPDATES_A_CALL)  # the last call may train less than it draws
            fit, told = _updates(fit, scale_x * x, scale_y * y, level, *settings)
            fresh = min(UPDATES_A_CALL, updates - first)
            errors.append(np.asarray(told[0])[:fresh])
            active.append(np.asarray(told[1])[:fresh])
            done(fresh, f"unexplained {errors[-1].mean():.3f}")
    dead = float(np.mean(np.asarray(fit.unused) >= min(ALIVE_FOR, max(updates, 1))))
    return TrainedSAE(
        _finished(fit, kind, scale_x, scale_y), np.concatenate([*errors, np.zeros(0)]),
        np.concatenate([*active, np.zeros(0)]), dead,
    )  # fmt: skip


def _source(data, site, target, noise, conditioned, which, batch, seed) -> tuple[Source, tuple[int, int]]:
    """A function of n giving x [n, batch, D], y [n, batch, O], level [n, batch]; and (D, O)."""
    if isinstance(data, ActivationSet):
        if site is None:
            raise ValueError(f"site says which activations of the set; there are {', '.join(data.sites)}")
        drawn = data.batches(site, batch, seed, which)
        levels = data.columns["noise"]

        def one() -> tuple[np.ndarray, ...]:
            x, number = next(drawn)
            y = x if target is None else data.values(target, number)
            x, y = (np.asarray(a, np.float32).reshape(batch, -1) for a in (x, y))
            return x, y, levels[number]
    else:
        x_ND = np.asarray(data, np.float32)
        y_NO = x_ND if target is None else np.asarray(target, np.float32)
        if x_ND.ndim != 2 or y_NO.ndim != 2 or len(y_NO) != len(x_ND) or len(x_ND) < 2:
            raise ValueError(f"needed are [n, D] and a target [n, O]; got {x_ND.shape} and {y_NO.shape}")
        if conditioned and (noise is None or np.shape(noise) != (len(x_ND),)):
            raise ValueError(f"edges are given, so noise must be [{len(x_ND)}]; got {np.shape(noise)}")
        levels = np.zeros(len(x_ND), np.float32) if noise is None else np.asarray(noise, np.float32)
        pool = np.arange(len(x_ND)) if which is None else np.asarray(which)
        rng = np.random.default_rng(seed)

        def one() -> tuple[np.ndarray, ...]:
            number = rng.choice(pool, batch)
            return x_ND[number], y_NO[number], levels[number]

    def several(count: int) -> tuple[np.ndarray, ...]:
        return tuple(np.stack(parts) for parts in zip(*(one() for _ in range(count)), strict=True))

    x, y, _ = several(1)
    return several, (x.shape[-1], y.shape[-1])


def _begin(sizes, features, kind, k, edges, is_transcoder, seed, mean_O) -> SAE:
    """Random unit directions; the encoder is the decoder's transpose where the sizes allow it."""
    rng = np.random.default_rng([seed, features])
    w_FO = rng.standard_normal((features, sizes[1]))
    w_FO /= np.linalg.norm(w_FO, axis=-1, keepdims=True)
    w_DF = rng.standard_normal((sizes[0], features)) / np.sqrt(sizes[0]) if is_transcoder else w_FO.T
    zeros = jnp.zeros(features)
    return SAE(
        w_enc=jnp.asarray(w_DF, jnp.float32), b_enc=zeros, w_dec=jnp.asarray(w_FO, jnp.float32),
        b_dec=jnp.asarray(mean_O, jnp.float32), threshold=jnp.full(features, 0.05) if kind == "jumprelu" else None,
        shift=None if edges is None else jnp.zeros((len(edges) + 1, features)), edges=edges,
        kind="topk" if kind == "topk" else "jumprelu", k=0 if kind == "jumprelu" else k, centred=not is_transcoder,
    )  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Fit:
    """What is trained, and where training stands.

    Attributes:
        sae: the weights, in units in which inputs have a mean norm of sqrt(D).
        adam: state of the optimiser.
        unused: [F] updates since a sample made the feature active.
        least: running mean of the least activation that BatchTopK kept: its threshold.
        update: how many were made.
    """

    sae: SAE
    adam: Any
    unused: jax.Array
    least: jax.Array
    update: jax.Array


_ADAM = optax.scale_by_adam(b1=0.9, b2=0.999)


@functools.partial(jax.jit, static_argnames=("kind", "k"), donate_argnums=0)
def _updates(fit: _Fit, x_UND, y_UNO, level_UN, kind, k, rate, sparsity, total):
    def one(fit: _Fit, given):
        (_, told), grads = jax.value_and_grad(_loss, has_aux=True)(fit.sae, fit.unused, *given, kind, k, sparsity)
        error, active, used, least = told
        if fit.sae.edges is not None:
            grads = dataclasses.replace(grads, edges=jnp.zeros_like(fit.sae.edges))  # given, not learned
        changes, adam = _ADAM.update(grads, fit.adam)
        now = rate * jnp.clip(5 * (1 - fit.update / total), 0, 1)  # 0 beyond the last update
        sae = jax.tree.map(lambda p, change: p - now * change, fit.sae, changes)
        length_F1 = jnp.linalg.norm(sae.w_dec, axis=-1, keepdims=True)
        sae = dataclasses.replace(sae, w_dec=sae.w_dec / length_F1)
        unused = jnp.where(used, 0, fit.unused + 1)
        mean = jnp.where(fit.update == 0, least, 0.99 * fit.least + 0.01 * least)
        return _Fit(sae, adam, unused, mean, fit.update + 1), (error, active)

    return jax.lax.scan(one, fit, (x_UND, y_UNO, level_UN))


def _loss(sae: SAE, unused_F, x_ND, y_NO, level_N, kind, k, sparsity):
    before_NF = sae.before(x_ND, level_N)
    if kind == "jumprelu":
        z_NF = jump(before_NF, sae.threshold)
    else:
        z_NF = top(before_NF, k) if kind == "topk" else batch_top(before_NF, k)
    rest_NO = y_NO - sae.decode(z_NF)
    variance = jnp.mean(jnp.sum((y_NO - y_NO.mean(0)) ** 2, -1)) + 1e-12
    error = jnp.mean(jnp.sum(rest_NO**2, -1)) / variance
    active_N = (z_NF > 0).sum(-1)
    dead_F = unused_F >= ALIVE_FOR
    # What is left over, put together from the dead features alone, so that they get a gradient.
    spare_NF = top(jnp.where(dead_F, before_NF, -jnp.inf), min(max(k, 1) * 2, before_NF.shape[-1]))
    spare_NF = jnp.where(dead_F, spare_NF, 0)
    missed_NO = jax.lax.stop_gradient(rest_NO) - spare_NF @ sae.w_dec
    loss = error + jnp.where(dead_F.any(), AUXILIARY * jnp.mean(jnp.sum(missed_NO**2, -1)) / variance, 0)
    if kind == "jumprelu":
        loss = loss + sparsity * jnp.mean(count(before_NF, sae.threshold))
    least = jnp.min(jnp.where(z_NF > 0, z_NF, jnp.inf))
    return loss, (error, jnp.mean(active_N), (z_NF > 0).any(0), least)


def _finished(fit: _Fit, kind: str, scale_x: float, scale_y: float) -> SAE:
    """The weights for inputs as they are: x' = z W_dec + b_dec, activations in the units of the target."""
    sae = fit.sae
    if kind == "batchtopk":
        sae = dataclasses.replace(sae, threshold=jnp.full(sae.num_features, fit.least))
    unit = 1 / scale_y
    return dataclasses.replace(
        sae, w_enc=sae.w_enc * (scale_x * unit), b_enc=sae.b_enc * unit, b_dec=sae.b_dec * unit,
        threshold=None if sae.threshold is None else jnp.maximum(sae.threshold, 0) * unit,
        shift=None if sae.shift is None else sae.shift * unit,
    )  # fmt: skip
