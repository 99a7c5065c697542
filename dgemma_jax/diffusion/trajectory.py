"""What a run records, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    from dgemma_jax.diffusion.moment import Moment


class StopReason(enum.IntEnum):
    """Why the denoising of a block ended for a row."""

    NOT_RUN = 0  # the row had ended in an earlier block
    CONVERGED = 1  # argmax stable and mean entropy below the threshold
    MAX_STEPS = 2  # the cap on steps was reached

    @property
    def sentence(self) -> str:
        return {
            0: "the row had ended before this block",
            1: "the argmax was stable and the mean entropy below the confidence threshold",
            2: "max_denoising_steps was reached; raise it, or read the entropy to see what stayed open",
        }[int(self)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What to keep of every step. The default is cheap: of order steps x canvas.

    Attributes:
        tokens, argmax, accepted, entropy: keep the arrays of that name.
        top_k: candidates kept per position, ids and probabilities; 0 keeps none.
        soft: keep S after every step (steps x canvas x width: 1.4 MB a step for the release in bfloat16).
        fn: any function of a `StepView`; its result, a pytree of arrays, is kept for every step. A
            module-level function compiles once; a new lambda compiles anew.
        site_steps: steps whose captured sites are kept, rising; None keeps all. Nothing is captured unless
            surgery put a tap into the model (`interp.capture` does). Another choice of as many steps shares
            the compiled program, so this field takes no part in comparisons.
    """

    tokens: bool = True
    argmax: bool = True
    accepted: bool = True
    entropy: bool = True
    top_k: int = 4
    soft: bool = False
    fn: Callable[[StepView], Any] | None = None
    site_steps: tuple[int, ...] | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be an integer >= 0, got {self.top_k!r}")
        steps = self.site_steps
        if steps is not None and (len(steps) == 0 or steps[0] < 0 or list(steps) != sorted(set(steps))):
            raise ValueError(f"site_steps must be steps >= 0 in rising order, got {steps!r}")

    @classmethod
    def nothing(cls) -> Record:
        """Keep only steps, temperature and stop reason: for speed."""
        return cls(tokens=False, argmax=False, accepted=False, entropy=False, top_k=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepView:
    """All that one denoising step computed; what `Record.fn` is given. `logits` are before temperature.

    Attributes:
        step: [B] int32, counted from 0 in each block.
        block: [B] int32.
        canvas: [B, C] fed into the step.
        soft: [B, C, D] fed into the step.
        logits, shaped_logits: [B, C, V] float32.
        argmax, sample: [B, C] of the shaped distribution.
        entropy: [B, C] nats, of the shaped distribution.
        accepted: [B, C] bool.
        next_canvas: [B, C] after acceptance and renoising.
        next_soft: [B, C, D].
        sites: what captured sites left, by full name; empty unless surgery put taps into the model.
        hidden: [B, C, D] after the final norm; `model.unembed` makes the logits of it.
    """

    step: jax.Array
    block: jax.Array
    canvas: jax.Array
    soft: jax.Array
    logits: jax.Array
    shaped_logits: jax.Array
    argmax: jax.Array
    sample: jax.Array
    entropy: jax.Array
    accepted: jax.Array
    next_canvas: jax.Array
    next_soft: jax.Array
    sites: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    hidden: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The record of a generation, numpy arrays padded to [J blocks, R steps, B rows, ...].

    Entries where `valid` is False were not run (zeros). Arrays that the `Record` left out are None.

    Attributes:
        start: [J, B, C] canvas before the first step.
        tokens: [J, R, B, C] canvas after each step (sampled where accepted, renoised elsewhere).
        argmax: [J, R, B, C] most likely token.
        accepted: [J, R, B, C] bool, kept by the sampler at this step; may be given up at a later one.
        entropy: [J, R, B, C] nats, of the shaped distribution.
        temperature: [J, R, B].
        top_ids, top_probs: [J, R, B, C, U] most likely tokens and their shaped probabilities, best first.
        soft: [J, R, B, C, D] S after each step.
        fn: pytree with leading axes [J, R], results of `Record.fn`.
        sites: captured sites by full name, [J, kept steps, B, ...]; None if nothing was captured.
        site_steps: [kept steps], which steps these are.
        valid: [J, R, B] bool, the row took this step.
        committed: [J, B, C] tokens that the block left, before padding after an end token.
        num_steps: [J, B] steps taken.
        stop: [J, B] `StopReason` codes.
        replay: recomputes moments; None in a trajectory that was loaded from a file.
    """

    start: np.ndarray
    tokens: np.ndarray | None
    argmax: np.ndarray | None
    accepted: np.ndarray | None
    entropy: np.ndarray | None
    temperature: np.ndarray
    top_ids: np.ndarray | None
    top_probs: np.ndarray | None
    soft: np.ndarray | None
    fn: Any
    valid: np.ndarray
    committed: np.ndarray
    num_steps: np.ndarray
    stop: np.ndarray
    sites: dict[str, np.ndarray] | None = None
    site_steps: np.ndarray | None = None
    replay: Callable[..., Moment] | None = dataclasses.field(default=None, repr=False, compare=False)

    def moment(self, block: int, step: int, model: Any = None) -> Moment:
        """Everything that crossed into `step` of `block` (both from 0): cache, canvas, S, step, keys.

        It is recomputed from the start of the run by the programs of the run, so it is exact and costs no
        memory until asked for. `step` may be the number of steps taken: the end of the block.

        Args:
            model: another model to replay with; by default the run's own.

        Raises:
            ValueError: a block or step that was not run, or a trajectory loaded from a file.
        """
        if self.replay is None:
            raise ValueError("a trajectory loaded from a file holds no model; generate again with the same seed")
        if not 0 <= block < len(self.num_steps):
            raise ValueError(f"block {block} was not run; blocks are 0..{len(self.num_steps) - 1}")
        ran = np.flatnonzero(self.valid[block].any(-1))
        if not len(ran) or not ran[0] <= step <= ran[-1] + 1:
            span = f"{ran[0]}..{ran[-1] + 1}" if len(ran) else "none"
            raise ValueError(f"step {step} of block {block} was not run; steps there: {span}")
        return self.replay(self, block, step, model)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, those of `fn` and `sites` under "fn/<key>"; what `Generation.save` writes."""
        found = {}
        kept = list(self.fn.values()) if isinstance(self.fn, dict) else [self.fn]
        if any(not isinstance(value, np.ndarray | jax.Array | None) for value in kept):
            raise ValueError("results of Record.fn must be arrays or dictionaries of arrays to be named and saved")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "replay" or value is None:
                continue
            if isinstance(value, dict):
                found |= {f"{field.name}/{k}": np.asarray(v) for k, v in value.items()}
            else:
                found[field.name] = np.asarray(value)
        return found

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Trajectory:
        """The inverse of `arrays`."""

        def nested(name: str) -> dict[str, np.ndarray] | None:
            return {k.split("/", 1)[1]: v for k, v in arrays.items() if k.startswith(f"{name}/")} or None

        names = {f.name for f in dataclasses.fields(cls)} - {"replay", "fn", "sites"}
        return cls(fn=nested("fn") or arrays.get("fn"), sites=nested("sites"), **{n: arrays.get(n) for n in names})
