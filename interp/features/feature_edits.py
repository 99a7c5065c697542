"""Autoencoders put into the model: their features taken out, turned up on a schedule, or spliced in whole.

    h <- h + decode(z') - decode(z)        z' = factor z + amount max(z)        what the features miss stays as it was

Steering by the largest activation at each position: DLM-Scope, arXiv 2602.05859. Edits take part in every step in
which their gate is open; the schedule over steps is data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from interp import steering, surgery
from interp.editing import edit, num_steps
from interp.edits import Edit
from interp.features.sae import SAE


@nnx.dataclass(eq=False)
class Spliced(Edit):
    """Takes the reconstruction in place of what is there.

    Attributes:
        sae: the autoencoder, data.
        noise: [R] noise level of each step, for one conditioned on it.
    """

    sae: SAE = nnx.data()
    noise: Any = nnx.data(default=None)

    def apply(self, x: jax.Array) -> jax.Array:
        return self.sae(x, self.level(x)).astype(x.dtype)

    def level(self, x: jax.Array) -> jax.Array | None:
        """[B, 1] noise level of the step each row is at."""
        if self.noise is None:
            return None
        step_B = self.told(x.shape[0]).get("step", jnp.zeros(x.shape[0], jnp.int32))
        return self.noise[jnp.clip(step_B, 0, len(self.noise) - 1)][:, None]


@nnx.dataclass(eq=False)
class Turned(Spliced):
    """Multiplies features by `factor` [F] and adds `amount` [F] times the largest activation at each position."""

    factor: Any = nnx.data(default=1.0)
    amount: Any = nnx.data(default=0.0)

    def apply(self, x: jax.Array) -> jax.Array:
        z = self.sae.encode(x, self.level(x))
        change = (self.factor - 1) * z + self.amount * z.max(-1, keepdims=True)
        return (x.astype(jnp.float32) + change @ self.sae.w_dec).astype(x.dtype)


def splice_sae(bundle: Any, sae: SAE, site: str, *, noise: Any = None, **chosen: Any) -> Any:
    """The model, or bundle, that reads a reconstruction at a site in place of the activation itself.

    Args:
        noise: [R] noise level by step (`ActivationSet.noise_by_step`), for an autoencoder conditioned on noise.
        **chosen: as for `interp.edit`: steps, positions, rows, phase, ...
    """
    return edit(bundle, _fits(bundle, sae, site), Spliced(sae, _levels(sae, noise)), **chosen)


def ablate_features(
    bundle: Any, sae: SAE, site: str, features: Sequence[int], *, schedule: Any = None, noise: Any = None, **chosen: Any
) -> Any:
    """The model without these features at a site; the rest of the activation, and what no feature holds, stays.

    Args:
        schedule: steps, or strengths by step, as for `interp.steer`: 1 takes the features out whole.
        noise, **chosen: as for `splice_sae`.
    """
    factor = np.ones(sae.num_features, np.float32)
    factor[_known(sae, features)] = 0
    turned = Turned(sae, _levels(sae, noise), jnp.asarray(factor), jnp.zeros(sae.num_features))
    return _scheduled(bundle, sae, site, turned, schedule, chosen)


def steer_features(
    bundle: Any, sae: SAE, site: str, features: Sequence[int], strength: float = 2.0, *, schedule: Any = None,
    noise: Any = None, **chosen: Any,
) -> Any:  # fmt: skip
    """The model with features turned up by `strength` times the largest activation at each position.

    Args:
        strength: 2.0 is the published setting; negative ones turn down.
        schedule, noise, **chosen: as for `ablate_features`.
    """
    if not np.isfinite(strength):
        raise ValueError(f"strength must be finite, got {strength}")
    amount = np.zeros(sae.num_features, np.float32)
    amount[_known(sae, features)] = strength
    turned = Turned(sae, _levels(sae, noise), jnp.ones(sae.num_features), jnp.asarray(amount))
    return _scheduled(bundle, sae, site, turned, schedule, chosen)


def _scheduled(bundle: Any, sae: SAE, site: str, turned: Turned, schedule: Any, chosen: dict[str, Any]) -> Any:
    if isinstance(schedule, str):
        schedule = steering.schedule(schedule, num_steps(bundle, chosen.get("sampler")))
    if schedule is not None and "steps" in chosen:
        raise ValueError("give either schedule or steps, not both")
    if schedule is not None:
        chosen = chosen | {"steps": schedule}
    return edit(bundle, _fits(bundle, sae, site), turned, **chosen)


def _fits(bundle: Any, sae: SAE, site: str) -> str:
    for info in surgery.sites(bundle).matching(site):
        if info.shape[-1] != sae.w_enc.shape[0] or sae.w_dec.shape[1] != sae.w_enc.shape[0]:
            raise ValueError(
                f"{info.name} has width {info.shape[-1]}; this is a {sae}: it must read and write the site's width"
            )
    return site


def _known(sae: SAE, features: Sequence[int]) -> list[int]:
    chosen = [int(f) for f in np.atleast_1d(features)]
    beyond = [f for f in chosen if not 0 <= f < sae.num_features]
    if beyond or not chosen:
        raise ValueError(f"features must be in 0..{sae.num_features - 1}, got {beyond or 'none'}")
    return chosen


def _levels(sae: SAE, noise: Any) -> jax.Array | None:
    if (noise is None) != (sae.shift is None):
        needed = "needs noise, the level of each step" if noise is None else "is not conditioned on noise: give none"
        raise ValueError(f"{sae} {needed}")
    return None if noise is None else jnp.asarray(noise, jnp.float32)
