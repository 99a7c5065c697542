"""Tokens injected into S at one position, and read at another: does the model compute on what S only hints at?

p' = (1 - n e) p + e 1[x_1 .. x_n] at the operand; one pass; R[x'] = log10 of the ratio of the probabilities of x' at
the target, with and without. The canvas is the draft with operand and target replaced by noise, so that S alone
speaks (`methods.md` section 10.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax.diffusion.moment import Moment
from dgemma_jax.diffusion.sampler import denoise_step
from dgemma_jax.nn.functional import of
from dgemma_jax.progress import bar
from interp.flow.saved import Saved
from interp.rows import Rows, repeated

FLOOR = 1e-5


@dataclasses.dataclass(frozen=True, eq=False)
class Injections(Saved):
    """Attributes:
    response: [A, n] R of each image, log10, by set of injected tokens.
    sets: the sets.
    images: [n] tokens that are read.
    leads: [A] bool, an injected token became the most likely one: leave these arms out.
    """

    response: np.ndarray
    sets: tuple[tuple[int, ...], ...]
    images: tuple[int, ...]
    leads: np.ndarray

    def __repr__(self) -> str:
        return f"{len(self.sets)} injections read at {len(self.images)} tokens; {self.leads.sum()} lead by rank"

    def diagonal(self) -> tuple[float, float]:
        """(mean response at the own image, mean at the others) of single injections, set i going with image i."""
        if len(self.sets) != len(self.images) or any(len(s) != 1 for s in self.sets):
            raise ValueError("a diagonal needs one single injection for each image, in the same order")
        use = self.response[~self.leads]
        own = np.eye(len(self.images), dtype=bool)[~self.leads]
        return float(use[own].mean()), float(use[~own].mean())


def inject(
    bundle: Any, moment: Moment, draft: Any, operand: int, target: int, sets: Sequence[Sequence[int]],
    images: Sequence[int], *, row: int = 0, amount: float = 0.45, top: tuple[float, Sequence[float]] | None = None,
    draws: int = 8, seed: int = 0, progress: bool | None = None,
) -> Injections:  # fmt: skip
    """Inject sets of tokens into S at the operand, and read the target.

    Args:
        moment: its S is what is added to.
        draft: [C] ids, the argmax of the step before (`trajectory.argmax[block, step - 1, row]`).
        operand, target: canvas positions.
        sets: tokens injected together, each with the mass `amount`; of any sizes.
        images: tokens whose response is read.
        row: of the moment.
        top: (probability of the most likely token at the operand, those of the injected tokens in the order in which
            the sets first name them), to tell which arms to leave out; by default a token leads if its mass exceeds
            one half.
        draws: of the noise at operand and target, shared by all arms.

    Raises:
        ValueError: no such row, a draft of another length, or a set whose mass exceeds one.
    """
    model = of(bundle)
    config, draft = model.config, np.asarray(draft)
    sets, images = tuple(tuple(int(t) for t in s) for s in sets), tuple(int(t) for t in images)
    rows = moment.canvas.shape[0]
    if not 0 <= row < rows or draft.shape != (config.canvas_length,):
        raise ValueError(f"{row=} of {rows}, draft of shape {draft.shape}: it needs {config.canvas_length} ids")
    if not sets or not all(s and len(s) * amount <= 1 for s in sets):
        sizes = sorted({len(s) for s in sets})
        raise ValueError(f"sets need one token or more, of mass {amount} each and 1 in all at most; got {sizes} tokens")
    known = {t: i for i, t in enumerate(dict.fromkeys(t for s in sets for t in s))}
    sharp = jnp.where(jnp.arange(config.vocab_size) == jnp.asarray(list(known), jnp.int32)[:, None], 0.0, -1e9)
    table = np.asarray(dg.soft_embed(bundle, sharp[None])[0], np.float32)
    soft = np.asarray(moment.soft, np.float32)[row]
    canvas = np.broadcast_to(draft, (draws, len(draft))).copy()
    canvas[:, [operand, target]] = np.random.default_rng(seed).integers(0, config.vocab_size, (draws, 2))
    at = Rows(moment.state, moment.cache, moment.pinned)[jnp.array([row])]
    probs = []
    with bar("injections", len(sets) + 1, progress) as done:
        for tokens in ((), *sets):
            own = soft.copy()
            own[operand] *= 1 - len(tokens) * amount
            own[operand] += amount * table[[known[t] for t in tokens]].sum(0)
            found = _read(model, at, moment.sampler, jnp.asarray(canvas), jnp.asarray(own), target)
            probs.append(np.asarray(found)[list(images)])
            done(1)
    probs = np.maximum(np.stack(probs), FLOOR)
    response = np.log10(probs[1:]) - np.log10(probs[0])
    return Injections(response, sets, images, np.array([_leads(s, amount, known, top) for s in sets]))


def _leads(tokens: Sequence[int], amount: float, known: dict[int, int], top: Any) -> bool:
    rest = 1 - len(tokens) * amount
    if top is None:
        return amount > 0.5
    best, own = top
    return any(rest * own[known[t]] + amount > rest * best for t in tokens)


@jax.jit
def _read(model, at, sampler, canvas_BC, soft_CD, target):
    """[V] mean over draws of the shaped probabilities at the target."""
    many = repeated(at, canvas_BC.shape[0])
    soft = jnp.broadcast_to(soft_CD, (canvas_BC.shape[0], *soft_CD.shape)).astype(many.state.soft.dtype)
    state = many.state.replace(canvas=canvas_BC.astype(jnp.int32), soft=soft)
    view = denoise_step(model, state, many.cache, sampler, many.pinned)[1]
    return jax.nn.softmax(view.shaped_logits[:, target], -1).mean(0)


def parallel_response(
    injections: Injections, image_of: dict[int, int], pools: Sequence[Sequence[int]] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Whether all injected operands are worked on at once: E(x_i) = R(image of x_i) - mean R over a pool of others.

    Args:
        image_of: the image of each operand.
        pools: for each set, the images that no injected operand has; by default all other images.

    Returns:
        [A] min over the set of E, and [A] bool, all are above 0 (chance: 0.5 to the size of the set).
    """
    column = {token: n for n, token in enumerate(injections.images)}
    least = np.zeros(len(injections.sets))
    for arm, tokens in enumerate(injections.sets):
        own = [column[image_of[t]] for t in tokens]
        pool = [n for n in range(len(column)) if n not in own] if pools is None else [column[t] for t in pools[arm]]
        if not pool:
            raise ValueError(f"set {tokens}: no image is left to compare with; give more images or pools")
        row = injections.response[arm]
        least[arm] = (row[own] - row[pool].mean()).min()
    return least, least > 0
