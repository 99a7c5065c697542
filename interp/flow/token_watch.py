"""A record of the probability of chosen tokens at every position and step: what the default record may miss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax.diffusion import StepView


@dataclasses.dataclass(frozen=True)
class TokenWatch:
    """For `dg.Record(fn=...)`: the shaped probability of each set of tokens, `trajectory.fn[name]` [J, R, B, C].

    >>> import dgemma_jax as dg, interp
    >>> record = dg.Record(fn=interp.TokenWatch.of(end=[0, 1], bracket=[17]))

    Equal watches share a compiled program.
    """

    sets: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, named: Mapping[str, Sequence[int]] | None = None, **sets: Sequence[int]) -> TokenWatch:
        """Sets of ids by name; names that are no words go into the mapping."""
        together = {**(named or {}), **sets}
        if not together or not all(len(tuple(ids)) for ids in together.values()):
            raise ValueError(f"each set needs at least one id, got {together}")
        return cls(tuple((name, tuple(sorted({int(i) for i in ids}))) for name, ids in together.items()))

    def __call__(self, view: StepView) -> dict[str, jax.Array]:
        logp_BCV = jax.nn.log_softmax(view.shaped_logits, -1)
        return {name: jnp.exp(logp_BCV[..., jnp.asarray(ids)]).sum(-1) for name, ids in self.sets}


def watched(trajectory: dg.Trajectory, name: str) -> np.ndarray:
    """[J, R, B, C] what the watch kept under a name.

    Raises:
        ValueError: the record has no such watch.
    """
    kept = trajectory.fn
    if not isinstance(kept, dict) or name not in kept:
        there = f"; it has {sorted(kept)}" if isinstance(kept, dict) else ""
        wanted = f"dg.Record(fn=interp.TokenWatch.of({name}=ids))"
        raise ValueError(f"the record watched no {name!r}{there}; generate with record={wanted}")
    return np.asarray(kept[name])
