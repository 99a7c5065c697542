"""A moment of a run: everything that crosses from one denoising step to the next. The unit of causal studies."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion.sampler import State
from dgemma_jax.nn import meshes
from dgemma_jax.nn.cache import KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """The state just before a step. `dg.resume` goes on from it; `dg.diffusion.denoise_step` takes one step.

    Attributes:
        state: what evolves within the block; its fields can be read here too (`moment.canvas`, `moment.soft`).
        cache: keys and values of the prompt and of earlier blocks.
        pinned: [B, C] bool or None.
        history: [B, j * C] tokens of the blocks before this one, padded after an end token.
        ended: [B] bool, rows that met an end token in an earlier block.
        spent: [B] denoising steps of earlier blocks.
        sampler: settings of the run.
        num_blocks: blocks the run may use in all.
        prompts: ids of the prompts.
    """

    state: State
    cache: KVCache
    pinned: jax.Array | None
    history: np.ndarray
    ended: np.ndarray
    spent: np.ndarray
    sampler: SamplerConfig
    num_blocks: int = dataclasses.field(metadata=dict(static=True))
    prompts: tuple[tuple[int, ...], ...] = dataclasses.field(metadata=dict(static=True))

    @property
    def canvas(self) -> jax.Array:
        """[B, C] tokens fed into the next step."""
        return self.state.canvas

    @property
    def soft(self) -> jax.Array:
        """S [B, C, D] fed into the next step."""
        return self.state.soft

    @property
    def step(self) -> int:
        """Steps already taken in this block (by the rows that took most)."""
        return int(np.max(meshes.to_host(self.state.step)))

    @property
    def block(self) -> int:
        return int(np.max(meshes.to_host(self.state.block)))

    @property
    def keys(self) -> jax.Array:
        """[B] random keys of the rows; the draws of a step depend on them, the block and the step alone."""
        return self.state.keys

    def replace(self, **changes: Any) -> Moment:
        """A copy with some fields changed; fields of `state` (canvas, soft, keys, ...) can be given directly.

        Raises:
            ValueError: an array of another shape than the one it replaces, or an unknown field.
        """
        own = {f.name for f in dataclasses.fields(self)}
        inner = {f.name for f in dataclasses.fields(State)}
        unknown = sorted(set(changes) - own - inner)
        if unknown:
            raise ValueError(f"a moment has no field {unknown}; it has {sorted(own | inner)}")
        for name in [n for n in ("pinned", "history", "ended", "spent") if changes.get(n) is not None]:
            needed = np.shape(self.canvas if name == "pinned" else getattr(self, name))
            if np.shape(changes[name]) != needed:
                raise ValueError(f"{name} has shape {np.shape(changes[name])}; the moment needs {needed}")
        state = dict(changes.pop("state", self.state).__dict__)
        for name in [n for n in changes if n in inner]:
            old, new = state[name], changes.pop(name)
            if np.shape(new) != np.shape(old):
                raise ValueError(f"{name} has shape {np.shape(new)}; the moment needs {np.shape(old)}")
            state[name] = new if name == "keys" else jax.numpy.asarray(new, old.dtype)
        return dataclasses.replace(self, state=State(**state), **changes)
