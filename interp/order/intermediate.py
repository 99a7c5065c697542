"""Tokens that are there for a while and not in the final text; and whether what follows needs them.

"Intermediate-context reasoning" (arXiv 2606.20560, section 5): a value that the answer may not say is written at its
place first, and replaced. That it is needed was argued there and not tested: `necessity` tests it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax.nn.functional import of
from dgemma_jax.progress import bar
from interp.flow.recorded import kept, run_of_block
from interp.flow.removal import blank_soft, noise_tokens, without
from interp.flow.saved import Saved


class Intermediate(NamedTuple):
    """A token that did not stay.

    Attributes:
        block, row, position, token: where, and which.
        first, last: steps at which it was above the floor.
        peak: its largest probability.
    """

    block: int
    row: int
    position: int
    token: int
    first: int
    last: int
    peak: float


def intermediate_tokens(
    trajectory: dg.Trajectory, *, floor: float = 0.5, window: int = 10, positions: np.ndarray | None = None,
    final: np.ndarray | None = None,
) -> list[Intermediate]:  # fmt: skip
    """Tokens above the floor at some step that the final text does not hold within `window` positions.

    Args:
        trajectory: with candidates; one is enough for a floor of 0.5.
        positions: [J, B, C] bool, where to look (`content`); None for everywhere.
        final: [J, B, C] the final text; by default what was committed. Texts of other rows are the null of the
            window: nearly everything is then intermediate.
    """
    ids, probs = kept(trajectory, "top_ids", "top_probs")
    if not 0 < floor <= 1:
        raise ValueError(f"floor must be a probability above 0, got {floor}")
    final = trajectory.committed if final is None else np.asarray(final)
    strong = (probs > floor) & trajectory.valid[..., None, None]
    if positions is not None:
        strong &= np.asarray(positions, bool)[:, None, ..., None]
    spans: dict[tuple[int, ...], list[tuple[int, float]]] = {}
    for block, step, row, place, rank in np.argwhere(strong):
        token = ids[block, step, row, place, rank]
        if not (final[block, row, max(0, place - window) : place + window + 1] == token).any():
            key = tuple(int(x) for x in (block, row, place, token))
            spans.setdefault(key, []).append((int(step), float(probs[block, step, row, place, rank])))
    return [
        Intermediate(*key, first=min(seen)[0], last=max(seen)[0], peak=max(p for _, p in seen))
        for key, seen in sorted(spans.items())
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class Necessity(Saved):
    """What is lost without an intermediate token, for each of some.

    Attributes:
        loss: [n] nats, drop of log p of the final tokens at the targets, summed, in the step that reads it.
        null: [n, draws] the same for other positions, drawn at random.
        found: which tokens.
    """

    loss: np.ndarray
    null: np.ndarray
    found: tuple[Intermediate, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "found", tuple(Intermediate(*token) for token in self.found))

    @property
    def p_value(self) -> np.ndarray:
        """[n] share of draws that lose as much (with the token itself counted among them)."""
        return (1 + (self.null >= self.loss[:, None]).sum(1)) / (1 + self.null.shape[1])

    def __repr__(self) -> str:
        return (
            f"{len(self.found)} intermediate token(s): without one, {self.loss.mean():.3f} nats are lost; without "
            f"another position, {self.null.mean():.3f}"
        )


def necessity(
    bundle: Any, trajectory: dg.Trajectory, found: Sequence[Intermediate], targets: Any = None, *, draws: int = 8,
    seed: int = 0, blank: str = "uniform", progress: bool | None = None,
) -> Necessity:  # fmt: skip
    """Take each token away, from the canvas and from S, before the step that follows its last appearance.

    The null takes away what is at other positions, and reads the same targets.

    Args:
        bundle: the model of the run.
        trajectory: of `record=dg.Record(soft=True)`.
        found: of one block, by `intermediate_tokens`.
        targets: [n, C] bool for each token, where the final text should suffer: its own place, if the question is
            whether the final token there is made from it. By default all positions but the one taken away.
        draws: positions of the null for each.

    Raises:
        ValueError: none are given, or they are of several blocks.
    """
    blocks = sorted({token.block for token in found})
    if len(blocks) != 1:
        raise ValueError(f"needed are intermediate tokens of one block; got {len(found)}, of blocks {blocks}")
    block, model = found[0].block, of(bundle)
    run, empty = run_of_block(trajectory, block), blank_soft(bundle, blank)
    noise, final = noise_tokens(run, model, seed), trajectory.committed[block]
    length, rng = final.shape[1], np.random.default_rng(seed)
    goal = None if targets is None else np.broadcast_to(np.asarray(targets, bool), (len(found), length))
    draws = min(draws, length - 1)
    losses = np.zeros((len(found), 1 + draws))
    with bar("necessity", len(found), progress) as done:
        for number, token in enumerate(found):
            step = min(token.last + 1, int(trajectory.num_steps[block, token.row]) - 1)
            row = np.array([token.row])
            others = rng.choice(np.delete(np.arange(length), token.position), draws, replace=False)
            away = np.zeros((2 + draws, 1, length), bool)
            away[np.arange(1, 2 + draws), 0, [token.position, *others]] = True
            at = run.at(step)[jnp.asarray(row)]
            logp, _ = without(model, at, run.sampler, away, away, final[row], noise[step, row], empty)
            logp = np.asarray(logp, float)[:, 0]
            read = ~away[1:, 0] if targets is None else goal[number]
            losses[number] = ((logp[0] - logp[1:]) * read).sum(-1)
            done(1)
    return Necessity(losses[:, 0], losses[:, 1:], tuple(found))
