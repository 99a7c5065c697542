"""Taps: sites that leave a copy of what passes by, and the capture of a single step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dgemma_jax.diffusion.moment import Moment
from dgemma_jax.diffusion.sampler import denoise_step
from dgemma_jax.nn.functional import of
from dgemma_jax.nn.sites import Site, SiteInfo
from interp import surgery
from interp.editing import put
from interp.gates import table

Reduce = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class FirstRows:
    """A reduction to the first rows; equal numbers of them share a program."""

    count: int

    def __call__(self, x: jax.Array) -> jax.Array:
        return x[: self.count]


@nnx.dataclass(eq=False)
class Tap(Site):
    """Leaves a copy of what passes by, and changes nothing.

    Attributes:
        full: full name of the site, under which the copy is left; static.
        phase: the pass in which it listens; static.
        axis: of positions; static.
        positions: [n] which positions are kept, data; None keeps all.
        reduce: applied to the copy [B, ...]; its result keeps the rows. Static: a new lambda compiles anew.
    """

    full: str
    phase: str
    axis: int
    positions: jax.Array | None = nnx.data(default=None)
    reduce: Reduce | None = None

    def bind(self, **context: Any) -> Any:
        if context.get("phase", self.phase) != self.phase:
            return Site(self.name)
        return _Listening(self, context["captured"]) if "captured" in context else self

    def seen(self, x: jax.Array) -> jax.Array:
        """What is kept of a value."""
        if self.positions is not None:
            x = jnp.take(x, self.positions, self.axis)
        return x if self.reduce is None else self.reduce(x)


class _Listening:
    """A tap within one trace of one pass: it has a place to leave its copy."""

    def __init__(self, tap: Tap, captured: dict[str, jax.Array]) -> None:
        self.tap, self.captured, self.name = tap, captured, tap.name

    def bind(self, **context: Any) -> _Listening:
        return self

    def __call__(self, x: jax.Array) -> jax.Array:
        self.captured[self.tap.full] = self.tap.seen(x)
        return x


def tapped(
    model: Any,
    sites: str | Sequence[str],
    *,
    phase: str = "denoise",
    positions: Any = None,
    reduce: Reduce | None = None,
) -> tuple[Any, list[SiteInfo]]:
    """The model with taps at sites, and which these are. `StepView.sites` and `Prefill.sites` then hold the values."""
    listed = surgery.sites(model)
    patterns = [sites] if isinstance(sites, str) else list(sites)
    names = {info.name for pattern in patterns for info in listed.matching(pattern)}
    infos = [info for info in listed if info.name in names]
    for info in infos:
        if "C" in info.axes if phase == "prefill" else info.name == "token_embed":
            raise ValueError(f"{info.name} does not exist in {phase}")
    if positions is not None:
        entries = np.asarray(table(positions, model.config.canvas_length, "positions"))
        positions = jnp.asarray(np.flatnonzero(entries), jnp.int32)
    taps = {}
    for info in infos:
        axis = info.axes.replace("C", "T").index("T")
        taps[info.name] = Tap(info.name.split(".")[-1], info.name, phase, axis, positions, reduce)
    return put(model, taps), infos


def capture_step(
    bundle: Any, moment: Moment, sites: str | Sequence[str], *, positions: Any = None
) -> dict[str, jax.Array]:
    """Activations of the one step that follows a moment: arrays [B, C, ...] by full name, on the device."""
    model, _ = tapped(of(bundle), sites, positions=positions)
    return heard(model, moment)


def heard(model: Any, moment: Moment) -> dict[str, jax.Array]:
    """What the taps of a model hear in the one step that follows a moment."""
    return _one_step(model, moment.state, moment.cache, moment.sampler, moment.pinned)


@jax.jit
def _one_step(model, state, cache, sampler, pinned) -> dict[str, jax.Array]:
    return denoise_step(model, state, cache, sampler, pinned)[1].sites
