"""Steering: a direction taken from two sets of prompts, added to the residual at strengths that follow a schedule.

    v_l = mean(h_l | positive) - mean(h_l | negative)        h_l <- h_l + strength(step) ||h_l|| v_l / ||v_l||

The direction is data, so are strength, schedule, layers, positions and rows: a sweep over any of them shares one
compiled program. RepE, arXiv 2310.01405; `methods.md` 12.3. To remove a direction instead:
`interp.edit(bundle, "layers.*.resid_post", interp.ProjectOut(vector.unit[layer]))`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dgemma_jax import progress
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.nn.functional import of
from interp import array_files
from interp.affine_lens import chosen_layers
from interp.captures import capture, capture_prompt
from interp.editing import edit, num_steps
from interp.edits import Add, Edit
from interp.gates import table

PLACES = ("prompt", "canvas")
_SITES = "layers.*.resid_post"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SteeringVector:
    """A direction of each layer's residual.

    Attributes:
        difference: [L, D] float32, mean of the positive minus mean of the negative prompts.
        norms: [L] mean norm of the residuals it was taken from.
        layers: which layers these are.
        place: "prompt" or "canvas", where it was taken.
        counts: (positive, negative) prompts.
    """

    difference: np.ndarray
    norms: np.ndarray
    layers: tuple[int, ...]
    place: str
    counts: tuple[int, int]

    @property
    def unit(self) -> np.ndarray:
        """[L, D] of length 1; zeros where there is no difference."""
        length = np.linalg.norm(self.difference, axis=-1, keepdims=True)
        return self.difference / np.where(length > 0, length, 1)

    def save(self, path: Any) -> Any:
        """Write one `.npz` file."""
        about = {"kind": "steering vector", "layers": self.layers, "place": self.place, "counts": self.counts}
        return array_files.write(path, {"difference": self.difference, "norms": self.norms}, about)

    @classmethod
    def load(cls, path: Any) -> SteeringVector:
        """Read what `save` wrote."""
        arrays, about = array_files.read(path, "steering vector")
        return cls(
            **arrays, layers=tuple(about["layers"]), place=about["place"], counts=tuple(about["counts"])
        )

    def __repr__(self) -> str:
        share = np.linalg.norm(self.difference, axis=-1) / np.maximum(self.norms, 1e-30)
        shown = ", ".join(f"{layer}: {part:.2f}" for layer, part in zip(self.layers, share, strict=True))
        return (
            f"steering vector from the {self.place} of {self.counts[0]} and {self.counts[1]} prompts; length in "
            f"residual norms, by layer: {shown}"
        )


def steering_vector(
    bundle: Any, positive: Any, negative: Any, layers: Any = None, *, place: str = "prompt", positions: Any = None,
    steps: Any = None, batch: int = 16, seed: int = 0, sampler: SamplerConfig | None = None, show: bool | None = None,
) -> SteeringVector:  # fmt: skip
    """The difference of mean residuals between two sets of prompts.

    Args:
        bundle: a bundle or a model, edited or not.
        positive, negative: prompts, as for `dg.generate`; need not be of equal number.
        layers: an integer, slice, list or mask; None for all.
        place: "prompt": residuals of the causal pass at the last token, or at another position of each prompt, such
            as -2. "canvas": residuals of the denoising steps, a mean over positions and over the steps taken.
        positions: one integer in the prompt; a choice, as in `interp.gates`, on the canvas, None for all.
        steps: of the first block, for the canvas; None for all that are taken.
        batch: prompts at a time.
        seed, sampler: of the generations, for the canvas.
        show: draw a progress bar; None draws it on a terminal.

    Raises:
        ValueError: no such layer, position or place; a prompt that is too short.
    """
    model, tokenizer, default = inputs.parts(bundle)
    if place not in PLACES:
        raise ValueError(f"place must be one of {', '.join(PLACES)}, got {place!r}")
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be an integer of at least 1, got {batch!r}")
    if place == "prompt" and (steps is not None or not (positions is None or isinstance(positions, int))):
        raise ValueError(f"in the prompt there is one position and no step; got {positions=} and {steps=}")
    layers = chosen_layers(model, layers)
    sets = [inputs.to_ids(prompts, tokenizer, model.config.vocab_size) for prompts in (positive, negative)]
    at = -1 if positions is None else positions
    if place == "prompt":
        short = min((ids for one in sets for ids in one), key=len)
        if not -len(short) <= at < len(short):
            raise ValueError(f"a prompt has {len(short)} tokens: no position {at} in it")
    names = [f"layers.{layer}.resid_post" for layer in layers]

    def summed(ids: list[list[int]]) -> np.ndarray:
        """[L, D + 1] sums over a batch of prompts, of residuals and of their norms."""
        if place == "prompt":
            x_LBTD = capture_prompt(bundle, ids, names).stack().astype(np.float64)
            index = [at % len(one) for one in ids]
            x_LBD = x_LBTD[:, np.arange(len(ids)), index]
            return np.concatenate([x_LBD, np.linalg.norm(x_LBD, axis=-1, keepdims=True)], -1)
        acts = capture(
            bundle, ids, names, steps, seed=seed, sampler=sampler or default, positions=positions, reduce=_mean
        )
        taken = acts.valid.sum(0)
        if not taken.all():
            raise ValueError(f"prompt {ids[int(taken.argmin())]} took none of the steps; choose earlier ones")
        return acts.stack().astype(np.float64).sum(1) / taken[:, None]

    found = []
    with progress.bar("steering vector", sum(map(len, sets)), show) as done:
        for one in sets:
            total = np.zeros((len(layers), model.config.embed_dim + 1))
            for first in range(0, len(one), batch):
                rows = [min(r, len(one) - 1) for r in range(first, first + min(batch, len(one)))]  # the last repeated
                fresh = min(batch, len(one) - first)
                total += summed([one[r] for r in rows])[:, :fresh].sum(1)
                done(fresh)
            found.append(total / len(one))
    return SteeringVector(
        difference=(found[0] - found[1])[:, :-1].astype(np.float32),
        norms=((found[0] + found[1]) / 2)[:, -1].astype(np.float32), layers=layers, place=place,
        counts=(len(sets[0]), len(sets[1])),
    )  # fmt: skip


def _mean(x: jax.Array) -> jax.Array:
    """[B, D + 1] means over positions, of the residuals [B, C, D] and of their norms."""
    wide = x.astype(jnp.float32)
    return jnp.concatenate([wide, jnp.linalg.norm(wide, axis=-1, keepdims=True)], -1).mean(1)


@nnx.dataclass(eq=False)
class Push(Edit):
    """Adds `value` in units of the residual's own norm at each position: x + ||x|| value."""

    VALUES: ClassVar = {"value": None}
    value: Any = nnx.data()

    def apply(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        norm = jnp.linalg.norm(wide, axis=-1, keepdims=True)
        return (wide + norm * self.here(self.value, x).astype(jnp.float32)).astype(x.dtype)


def schedule(kind: str, steps: int) -> np.ndarray:
    """Strengths [steps] by name: "constant", "rising" (0 to 1), "falling", "early" (first half), "late" (second half).

    Steps count up to the sampler's cap, which most runs do not reach: for a window within the steps really taken
    give `steer` a slice or an array.
    """
    place = np.arange(steps) / max(steps - 1, 1)
    kinds = {
        "constant": np.ones(steps), "rising": place, "falling": 1 - place, "early": np.arange(steps) < steps / 2,
        "late": np.arange(steps) >= steps / 2,
    }  # fmt: skip
    if kind not in kinds:
        raise ValueError(f"no schedule is named {kind!r}; there are {', '.join(kinds)}, slices, lists and arrays")
    return kinds[kind].astype(np.float32)


def steer(
    model: Any, vector: SteeringVector, strength: Any, schedule: Any = "constant", *, layers: Any = None,
    place: str = "canvas", positions: Any = None, relative: bool = True, sampler: SamplerConfig | None = None,
) -> Any:  # fmt: skip
    """The model, or bundle, steered along a vector. The one given stays as it is.

    >>> import dgemma_jax as dg, interp
    >>> model = dg.nn.transformer.initialize(dg.ModelConfig.tiny())
    >>> vector = interp.steering_vector(model, [[5, 6]], [[7, 8]], layers=[1])
    >>> interp.describe(interp.steer(model, vector, 0.35, slice(0, 4)))  # doctest: +ELLIPSIS
    3 edits...

    Args:
        model: a model or a bundle, edited or not.
        strength: a number; or [B], one a row of the batch. Negative ones steer away.
        schedule: strengths by denoising step: a name (see `interp.steering.schedule`), a slice or a list of steps, or
            an array [R] of any strengths. Does not apply to the prompt.
        layers: of those in the vector; None for all of them.
        place: "canvas" (the denoising steps), "prompt" (the causal pass) or "both".
        positions: on the canvas, or of the prompt; None for all.
        relative: strength 1 is the residual's norm at each position (published values: 0.35 on the prompt, 0.12 on
            the canvas). False: strength 1 is the difference of means as it is.
        sampler: whose number of steps is the range of the schedule; by default the bundle's.

    Raises:
        ValueError: a layer that the vector lacks, a schedule of another length, a vector of another width.
    """
    config = of(model).config
    if vector.difference.shape[-1] != config.embed_dim or max(vector.layers) >= config.num_layers:
        raise ValueError(
            f"the vector has width {vector.difference.shape[-1]} and layers up to {max(vector.layers)}, the model "
            f"{config.embed_dim} and {config.num_layers} layers: take one from this model"
        )
    if place not in (*PLACES, "both"):
        raise ValueError(f"place must be one of {', '.join(PLACES)}, both; got {place!r}")
    wanted = vector.layers if layers is None else chosen_layers(model, layers)
    missing = sorted(set(wanted) - set(vector.layers))
    if missing:
        raise ValueError(f"the vector has no layer {missing[0]}; it has {list(vector.layers)}")
    value_LD = np.zeros((config.num_layers, config.embed_dim), np.float32)
    value_LD[list(vector.layers)] = vector.unit if relative else vector.difference
    strength = jnp.asarray(strength, jnp.float32)
    if strength.ndim > 1 or not (isinstance(strength, jax.core.Tracer) or np.isfinite(np.asarray(strength)).all()):
        raise ValueError(f"strength must be finite, a number or one a row; got {strength}")
    by_row = strength if strength.ndim else None
    value_LD = value_LD * (1 if strength.ndim else strength)
    kind = Push(value_LD) if relative else Add(value_LD)
    common = dict(layers=list(wanted), positions=positions, rows=by_row, per_layer=True)
    if place in ("canvas", "both"):
        steps = _by_step(schedule, num_steps(model, sampler))
        model = edit(model, _SITES, kind, phase="denoise", steps=steps, sampler=sampler, **common)
    if place in ("prompt", "both"):
        model = edit(model, _SITES, kind, phase="prefill", sampler=sampler, **common)
    return model


def _by_step(spec: Any, steps: int) -> Any:
    """A schedule as strengths [R + 1], so that all kinds share a program."""
    return table(schedule(spec, steps) if isinstance(spec, str) else spec, steps, "steps", more=True)
