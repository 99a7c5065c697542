"""Re-routing: experts that the router may not choose, or must.

Against zeroing an expert's weight, the places it would have had go to other experts, and the weights are shared anew.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dgemma_jax.nn.functional import of
from interp.editing import edit
from interp.edits import Edit
from interp.gates import table

_LOWEST = float(jnp.finfo(jnp.float32).min)


@nnx.dataclass(eq=False)
class Reroute(Edit):
    """Changes the scores of a router so that it chooses other experts; every score that counts stays one of its own.

    A forbidden expert's score falls to the lowest float, hence the router's next choice moves up, with its own score.
    A forced expert that was not among the `top` takes the place, and the score, of the last that was; the other
    forced ones the places before. `interp.reroute` puts it in.

    Attributes:
        forbid, force: which experts, 1 or 0 for each: [E], or broadcasting against the scores [B, T, E].
        top: experts chosen per token; static.
    """

    VALUES: ClassVar = {"forbid": None, "force": None}
    ONLY_AT: ClassVar = ("router_logits",)
    forbid: Any = nnx.data(default=None)
    force: Any = nnx.data(default=None)
    top: int = 1

    def apply(self, x: jax.Array) -> jax.Array:
        if self.forbid is not None:
            x = jnp.where(self.here(self.forbid, x) > 0.5, _LOWEST, x)
        if self.force is None:
            return x
        wanted = jnp.where(self.here(self.force, x) > 0.5, jnp.inf, x)
        _, chosen = jax.lax.top_k(wanted, self.top)
        is_chosen = jax.nn.one_hot(chosen, x.shape[-1]).sum(-2) > 0
        order = jnp.lexsort((-x, ~is_chosen), axis=-1)  # the chosen ones first, each part by falling score
        falling = -jnp.sort(-x, axis=-1)
        return jnp.take_along_axis(falling, jnp.argsort(order, -1), -1)


def reroute(
    model: Any, forbid: Any = None, force: Any = None, *, layers: Any = None, **where: Any
) -> Any:  # fmt: skip
    """The model, or bundle, whose routers may not choose some experts, and must choose others.

    >>> import dgemma_jax as dg, interp
    >>> model = dg.nn.transformer.initialize(dg.ModelConfig.tiny())
    >>> edited = interp.reroute(model, forbid=[3], force=0, layers=1, steps=slice(0, 4))

    Args:
        model: a model or a bundle, edited or not.
        forbid, force: experts: an integer, a slice, a list or a mask.
        layers: an integer, slice, list or mask; None for all.
        **where: further choices of `interp.edit`: steps, blocks, positions, rows, mask, phase, sampler.

    Raises:
        ValueError: too few experts are left, more are forced than a token has, one is forbidden and forced.
    """
    config = of(model).config
    top, count = config.experts_per_token, config.num_experts
    if forbid is None and force is None:
        raise ValueError("give forbid or force: which experts may not, or must, be chosen")
    out, into = (None if e is None else table(e, count, "experts") for e in (forbid, force))
    concrete = not any(isinstance(e, jax.core.Tracer) for e in (out, into))
    if concrete:
        banned, must = (np.zeros(count, bool) if e is None else np.asarray(e) > 0.5 for e in (out, into))
        if count - banned.sum() < top:
            raise ValueError(f"{banned.sum()} of {count} experts are forbidden; a token needs {top} of the others")
        if must.sum() > top:
            raise ValueError(f"{must.sum()} experts are forced; a token has {top}")
        if (banned & must).any():
            raise ValueError(f"expert {int(np.flatnonzero(banned & must)[0])} is both forbidden and forced")
    return edit(model, "layers.*.router_logits", Reroute(out, into, top), layers=layers, **where)
