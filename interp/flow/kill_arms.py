"""Kills: tokens taken out of what flows, at some positions, for one step or from then on, by either carrier.

The study of two rival texts on one canvas (`methods.md` section 10.2) found that a single step of it does nothing and
that one carrier alone can look inert; all six arms are therefore run together, as rows of one batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

import dgemma_jax as dg
from dgemma_jax.nn.functional import of
from dgemma_jax.progress import bar
from interp.carriers import Kill
from interp.editing import edit
from interp.edits import Renoise
from interp.flow.saved import Saved
from interp.gates import table
from interp.sweeps import rows_of

ARMS = tuple((carrier, window) for carrier in ("canvas", "soft", "both") for window in ("once", "from then on"))


@dataclasses.dataclass(frozen=True, eq=False)
class Kills(Saved):
    """How runs end after a kill.

    Attributes:
        tokens: [R, 6, B, n] ids of the answers, by the step of the kill and the arm (`ARMS`).
        texts: the same as texts, nested tuples.
        plain: [B, n] ids without a kill.
        steps: [R].
    """

    tokens: np.ndarray
    texts: tuple[tuple[tuple[str | None, ...], ...], ...]
    plain: np.ndarray
    steps: tuple[int, ...]

    def changed(self) -> np.ndarray:
        """[R, 6, B] bool: the answer is another than without the kill."""
        return (self.tokens != self.plain).any(-1)

    def __repr__(self) -> str:
        rate = self.changed().mean((0, 2))
        said = ", ".join(f"{' '.join(arm)} {share:.0%}" for arm, share in zip(ARMS, rate, strict=True))
        return f"kills at steps {list(self.steps)}, answers changed: {said}"


def token_kills(
    bundle: Any, trajectory: dg.Trajectory, tokens: int | Sequence[int], positions: Any, steps: Any, block: int = 0, *,
    seed: int = 0, progress: bool | None = None,
) -> Kills:  # fmt: skip
    """Kill tokens after each of some steps, and go on to the end under the same draws.

    "soft" removes the tokens from the distribution behind S (`interp.Kill`); "canvas" hands on a fresh random token at
    these positions (`interp.Renoise`); "both" does both. "once" acts on what this step hands on, "from then on" on
    what it and all later ones do.

    Args:
        tokens: ids to kill.
        positions: canvas positions: an integer, slice, list or mask.
        steps: the steps of the kill, such that each row took them; each is one run of 7 * B rows.

    Raises:
        ValueError: a step that a row did not take.
    """
    chosen = tuple(int(s) for s in np.atleast_1d(steps))
    taken = int(trajectory.num_steps[block].min())
    if not chosen or min(chosen) < 0 or max(chosen) >= taken:
        raise ValueError(f"steps={list(chosen)}: needed are some of 0..{taken - 1}, which every row took")
    config, rows = of(bundle).config, trajectory.committed.shape[1]
    own = trajectory.moment(block, 0).sampler
    place = np.asarray(table(positions, config.canvas_length, "positions"))
    found, texts = [], []
    with bar("kills", len(chosen), progress) as done:
        for step in chosen:
            model = bundle
            for window, span in (("once", step), ("from then on", slice(step, None))):
                for site, new, names in (
                    ("soft_probs", Kill(tokens), ("soft", "both")),
                    ("canvas", Renoise(seed=seed), ("canvas", "both")),
                ):
                    on = np.repeat([arm[1] == window and arm[0] in names for arm in ARMS] + [False], rows)
                    mask = on[:, None] * place
                    mask = mask[..., None] if site == "soft_probs" else mask
                    model = edit(model, site, new, steps=span, blocks=block, mask=mask, sampler=own)
            out = dg.resume(model, rows_of(trajectory.moment(block, step), len(ARMS) + 1), record=dg.Record.nothing())
            found.append(out.tokens.reshape(len(ARMS) + 1, rows, -1))
            texts.append(tuple(tuple(out.texts[a * rows : (a + 1) * rows]) for a in range(len(ARMS))))
            done(1)
    every = np.stack(found)
    return Kills(every[:, :-1], tuple(texts), every[0, -1], chosen)
