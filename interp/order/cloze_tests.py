"""Open slots in a given text: what the model would write there, and whether two slots agree on an order.

A slot is open if it holds noise; the distribution is the mean over draws of the noise (`methods.md` sections 13 and
15.4). It can be set through the canvas (its token) or through S (its mass).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax.diffusion import prompts as inputs
from interp.flow.saved import Saved
from interp.order.slot_reading import read


@dataclasses.dataclass(frozen=True, eq=False)
class Cloze(Saved):
    """Attributes:
    probs: [A, s, V] mean over draws, by setting and slot.
    slots: [s].
    settings: what was set in each, (slot, token) pairs.
    """

    probs: np.ndarray
    slots: tuple[int, ...]
    settings: tuple[tuple[tuple[int, int], ...], ...]

    def top(self, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
        """Ids and probabilities [A, s, k], best first."""
        ids = np.argsort(-self.probs, -1, kind="stable")[..., :k]
        return ids, np.take_along_axis(self.probs, ids, -1)

    def __repr__(self) -> str:
        ids, probs = self.top(3)
        said = [
            f"{dict(setting) or 'all open'}: "
            + "; ".join(
                f"slot {slot} " + ", ".join(f"{i} {p:.2f}" for i, p in zip(ids[a, s], probs[a, s], strict=True))
                for s, slot in enumerate(self.slots)
            )
            for a, setting in enumerate(self.settings)
        ]
        return "\n".join(said)


def cloze(
    bundle: Any, prompt: Any, frame: Any, slots: Sequence[int], settings: Sequence[Mapping[int, int]] = ({},), *,
    through: str = "canvas", draws: int = 8, seed: int = 0, temperature: float = 1.0, progress: bool | None = None,
) -> Cloze:  # fmt: skip
    """Distributions at open slots of a canvas, under several settings of some of them.

    Args:
        prompt: one prompt.
        frame: [C] ids, the canvas around the slots (`moment.canvas`, `trajectory.committed[0, 0]`).
        slots: positions that are open.
        settings: tokens by slot that are set in each arm; {} leaves all open. All arms share the draws of the noise.
        through: "canvas" writes the token into the slot; "soft" leaves noise there and sets S to the token, all other
            positions and slots having the S of the uniform distribution, which is also the S of the open arm.
        draws: of the noise.

    Raises:
        ValueError: a slot twice or out of range, a setting of what is no slot.
    """
    model, tokenizer, _ = inputs.parts(bundle)
    config = model.config
    slots, settings = tuple(int(s) for s in slots), tuple(dict(a) for a in settings)
    if not slots or len(set(slots)) < len(slots) or not all(0 <= s < config.canvas_length for s in slots):
        raise ValueError(f"slots={list(slots)}: needed are different positions in 0..{config.canvas_length - 1}")
    strange = sorted({s for a in settings for s in a} - set(slots))
    if strange:
        raise ValueError(f"positions {strange} are set and are no slots; the slots are {list(slots)}")
    if through not in ("canvas", "soft") or draws < 1:
        raise ValueError(f"{through=}, {draws=}: needed are 'canvas' or 'soft', and at least one draw")
    ids = inputs.to_ids(prompt, tokenizer, config.vocab_size)
    frame = np.asarray(frame)
    if len(ids) != 1 or frame.shape != (config.canvas_length,):
        raise ValueError(f"{len(ids)} prompt(s) and a frame of shape {frame.shape}: one, and ({config.canvas_length},)")
    canvas = np.broadcast_to(frame, (len(settings), draws, len(frame))).copy()
    canvas[..., slots] = np.random.default_rng(seed).integers(0, config.vocab_size, (draws, len(slots)))
    soft = None
    if through == "canvas":
        for arm, setting in enumerate(settings):
            for slot, token in setting.items():
                canvas[arm, :, slot] = token
    else:
        soft = np.repeat(_soft(bundle, settings, len(frame)), draws, 0)
    canvas = canvas.reshape(-1, len(frame))
    every = np.broadcast_to(slots, (len(canvas), len(slots)))
    owner = np.zeros(len(canvas), int)
    logp = read(bundle, ids, owner, canvas, every, soft, temperature=temperature, progress=progress)
    probs = np.exp(logp).reshape(len(settings), draws, len(slots), -1).mean(1)
    return Cloze(probs, slots, tuple(tuple(setting.items()) for setting in settings))


def _soft(bundle: Any, settings: Sequence[Mapping[int, int]], length: int) -> np.ndarray:
    """[A, C, D] S of the uniform distribution, and of a token alone where one is set."""
    size = inputs.parts(bundle)[0].config.vocab_size
    tokens = sorted({t for a in settings for t in a.values()})
    sharp = jnp.where(jnp.arange(size) == jnp.asarray(tokens, jnp.int32)[:, None], 0.0, -1e9)
    table = np.asarray(dg.soft_embed(bundle, jnp.concatenate([jnp.zeros((1, size)), sharp])[None])[0])
    soft = np.broadcast_to(table[0], (len(settings), length, table.shape[-1])).copy()
    for arm, setting in enumerate(settings):
        for slot, token in setting.items():
            soft[arm, slot] = table[1 + tokens.index(token)]
    return soft


@dataclasses.dataclass(frozen=True, eq=False)
class Circulation(Saved):
    """log [p(a) p(b|a)] - log [p(b) p(a|b)] of pairs of tokens at two slots, nats. 0 throughout: any order will do.

    Attributes:
        values: [n, n] by the token of the first slot and of the second.
        first, second: [n] tokens.
        weight: [n, n] mean of the two pseudo-joints, scaled to sum to one.
    """

    values: np.ndarray
    first: np.ndarray
    second: np.ndarray
    weight: np.ndarray

    @property
    def size(self) -> float:
        """Mean of |circulation| under the joint, nats."""
        return float((np.abs(self.values) * self.weight).sum())

    def __repr__(self) -> str:
        return f"circulation {self.size:.4f} nats over {self.values.size} pairs of tokens"


def circulation(
    bundle: Any, prompt: Any, frame: Any, slots: tuple[int, int], k: int = 4, *, draws: int = 8, seed: int = 0,
    temperature: float = 1.0, progress: bool | None = None,
) -> Circulation:  # fmt: skip
    """Circulation of two positions over their k most likely tokens (arXiv 2605.09303).

    Args:
        prompt, frame, draws, seed, temperature: as for `cloze`.
        slots: the two positions.
    """
    if len(slots) != 2:
        raise ValueError(f"circulation is of two slots, got {len(slots)}")
    options = dict(draws=draws, seed=seed, temperature=temperature, progress=progress)
    free = cloze(bundle, prompt, frame, slots, **options)
    first, second = free.top(k)[0][0]
    arms = [{slots[0]: int(t)} for t in first] + [{slots[1]: int(t)} for t in second]
    given = cloze(bundle, prompt, frame, slots, arms, **options).probs
    open_a, open_b = (np.log(free.probs[0, s]) for s in (0, 1))
    b_given_a, a_given_b = np.log(given[:k, 1][:, second]), np.log(given[k:, 0][:, first]).T
    one = open_a[first][:, None] + b_given_a
    other = open_b[second][None] + a_given_b
    weight = np.exp(one) + np.exp(other)
    return Circulation(one - other, first, second, weight / weight.sum())
