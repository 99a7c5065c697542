"""Activation patching at a moment: from a donor's moment into a recipient's.

    recipient at step r  --what the donor has there-->  one step, or the rest of the run under the same keys

What flows into a step are the carriers: the canvas, S and the cached keys and values; what is computed within it are
the sites. Terms as in Heimersheim and Nanda, arXiv 2404.15255; the carriers are those of a diffusion model.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

import dgemma_jax as dg
from dgemma_jax.diffusion.generate import prefill_prompts
from dgemma_jax.diffusion.moment import Moment
from dgemma_jax.diffusion.sampler import denoise_step
from dgemma_jax.nn.functional import of
from interp import surgery
from interp.cache_edits import edit_cache
from interp.captures import capture_prompt
from interp.editing import edit, remove
from interp.edits import Add, Patch
from interp.metrics import Metric
from interp.places import ROUNDED
from interp.taps import capture_step, tapped

CARRIERS = {"canvas": "canvas", "soft": "soft_embed"}  # and the site through which each is handed to the next step


@dataclasses.dataclass(frozen=True, eq=False)
class Patched:
    """A run as it goes on after a patch, and as it would have gone on without.

    Attributes:
        bundle, moment: with the patch; another patch, or any edit, may be put on top.
        plain_bundle, plain_moment: without.
        baseline: a bundle and a moment without, which round where the patch does.
    """

    bundle: Any
    moment: Moment
    plain_bundle: Any
    plain_moment: Moment
    baseline: tuple[Any, Moment]

    @functools.cached_property
    def logits(self) -> jax.Array:
        """[B, C, V] of the step that follows the moment, patched; before temperature."""
        return step_logits(self.bundle, self.moment)

    @functools.cached_property
    def plain_logits(self) -> jax.Array:
        """[B, C, V] of the same step without the patch."""
        return step_logits(*self.baseline)

    def effect(self, metric: Metric) -> np.ndarray:
        """[B] metric of the patched step - of the step without, from logits [B, C, V]."""
        return np.asarray(metric(self.logits)) - np.asarray(metric(self.plain_logits))

    @functools.cached_property
    def finished(self) -> dg.Generation:
        """The patched run to its end, under the recipient's keys."""
        return dg.resume(self.bundle, self.moment)

    @functools.cached_property
    def plain_finished(self) -> dg.Generation:
        """The run without the patch to its end."""
        return dg.resume(self.plain_bundle, self.plain_moment)

    def text_effect(self, metric: Metric) -> np.ndarray:
        """[B] metric of the patched text - of the text without, from generated tokens [B, n]."""
        return np.asarray(metric(self.finished.tokens)) - np.asarray(metric(self.plain_finished.tokens))

    def __repr__(self) -> str:
        rows = len(self.moment.prompts)
        return f"a patch at step {self.moment.step} of block {self.moment.block}, {rows} row(s): .effect, .finished"


def patch(
    bundle: Any, recipient: Moment, donor: Moment, pattern: str, *, phase: str = "denoise", persistent: bool = False,
    donor_bundle: Any = None, **where: Any,
) -> Patched:  # fmt: skip
    """Put what a donor run has at a moment into a recipient run at its own moment.

    The draws of the sampler are the recipient's in both arms, so what differs differs by the patch. The donor may
    stand at another step; it is then shifted in time.

    Args:
        bundle: a bundle or a model, edited or not.
        recipient, donor: moments with as many rows, from `out.trajectory.moment(block, step)`.
        pattern: "canvas" (the tokens fed into the step), "soft" (S fed into it), "cache" (cached keys and values),
            or a pattern of sites as for `interp.at`.
        phase: "prefill" patches sites of the pass over the prompt, whose cache the recipient then reads.
        persistent: the donor's run goes on beside the recipient's, and every later step of the block takes the
            donor's values of that step, the last ones when the donor has ended; else the one step alone. A changed
            cache ("cache", "prefill") is never put back.
        donor_bundle: the model of the donor where it is another.
        **where: positions, layers, rows, heads, experts, units, keys, cached, mask, as for `interp.edit`; for
            "cache" layers, positions (of the prompt), rows, heads and parts, as for `interp.edit_cache`.

    Raises:
        ValueError: moments that do not fit each other, no such site, a choice out of range.
    """
    _check(recipient, donor, bundle)
    for name in ("steps", "blocks", "per_layer", "per_step", "phase"):
        if name in where:
            raise ValueError(f"{name} cannot be chosen: a patch acts from the recipient's moment on")
    source = bundle if donor_bundle is None else donor_bundle
    if phase == "prefill":
        moment, plain = _prompt(bundle, recipient, donor, pattern, source, where)
        return Patched(bundle, moment, bundle, recipient, (bundle, plain))
    if phase != "denoise":
        raise ValueError(f"phase must be 'denoise' or 'prefill', got {phase!r}")
    if pattern == "cache":
        moment = edit_cache(recipient, Patch(donor), **where)
        return Patched(bundle, moment, bundle, recipient, (bundle, recipient))
    edited, moment = bundle, recipient
    span: Any = slice(recipient.step, None) if persistent else recipient.step
    sampler, gate = recipient.sampler, {"blocks": recipient.block, **where}
    if pattern in CARRIERS:
        value, site = getattr(donor, pattern), CARRIERS[pattern]
        alone = edit(remove(of(bundle), site), site, Patch(value), **where)
        moment = recipient.replace(**{pattern: surgery.at(alone, site).get()(getattr(recipient, pattern))})
        if persistent:
            later = _later(dg.resume(source, donor, record=dg.Record(soft=True)), recipient, donor)
            kept = {"canvas": "tokens", "soft": "soft"}[pattern]
            edited = edit(bundle, site, Patch(later(kept)), steps=span, per_step=True, sampler=sampler, **gate)
    elif persistent:
        model, infos = tapped(source, pattern)
        later = _later(dg.resume(model, donor, record=dg.Record.nothing()), recipient, donor)
        values = {info.name: later("sites", info.name) for info in infos}
        edited = edit(bundle, pattern, Patch(values), steps=span, per_step=True, sampler=sampler, **gate)
    else:
        edited = edit(bundle, pattern, Patch(capture_step(source, donor, pattern)), steps=span, sampler=sampler, **gate)
    plain = bundle if pattern in CARRIERS else _rounded(bundle, pattern, "denoise")
    return Patched(edited, moment, bundle, recipient, (plain, recipient))


def step_logits(bundle: Any, moment: Moment) -> jax.Array:
    """Logits [B, C, V] of the step that follows a moment."""
    return _logits(of(bundle), moment.state, moment.cache, moment.sampler, moment.pinned)


@jax.jit
def _logits(model, state, cache, sampler, pinned) -> jax.Array:
    return denoise_step(model, state, cache, sampler, pinned)[1].logits


def _check(recipient: Moment, donor: Moment, bundle: Any) -> None:
    for name, moment in (("recipient", recipient), ("donor", donor)):
        if not isinstance(moment, Moment):
            raise ValueError(f"the {name} must be a moment (out.trajectory.moment(block, step)), got {type(moment)}")
        if bool(np.asarray(moment.state.done).any()):
            raise ValueError(f"a row of the {name} has ended before step {moment.step}; choose an earlier step")
    if recipient.canvas.shape != donor.canvas.shape:
        raise ValueError(f"canvases of {recipient.canvas.shape} and {donor.canvas.shape}: rows and length must agree")
    width = of(bundle).config.embed_dim
    if recipient.soft.shape[-1] != width or donor.soft.shape[-1] != width:
        raise ValueError(f"S has width {recipient.soft.shape[-1]} and {donor.soft.shape[-1]}; the model needs {width}")


def _rounded(bundle: Any, pattern: str, phase: str) -> Any:
    """The model with nothing added where the pattern has a product: it is rounded before anything else is added."""
    for info in surgery.sites(of(bundle)).matching(pattern):
        if info.name in ROUNDED:
            bundle = edit(bundle, info.name, Add(np.zeros(of(bundle).config.embed_dim)), phase=phase)
    return bundle


def _prompt(bundle, recipient, donor, pattern, source, where) -> tuple[Moment, Moment]:
    """The recipient's moment on the cache of a patched pass over its prompts, and on that of a pass without."""
    lengths = [list(map(len, moment.prompts)) for moment in (recipient, donor)]
    if lengths[0] != lengths[1]:
        raise ValueError(f"prompts of {lengths[0]} and {lengths[1]} tokens: they must be of equal length")
    if recipient.block or donor.block:
        raise ValueError("sites of the prompt pass are patched in block 0: later blocks have a cache of their own")
    values = capture_prompt(source, donor.prompts, pattern).arrays
    edited = edit(bundle, pattern, Patch(dict(values)), phase="prefill", **where)
    plain = _rounded(bundle, pattern, "prefill")

    def moment(model: Any) -> Moment:
        return recipient.replace(cache=prefill_prompts(of(model), recipient.prompts, recipient.num_blocks))

    return moment(edited), recipient if plain is bundle else moment(plain)


def _later(out: dg.Generation, recipient: Moment, donor: Moment) -> Any:
    """A function from a record of the donor's run to its values [R, B, ...] at the recipient's steps."""
    block = donor.block
    ends_B = out.trajectory.num_steps[block]
    step_R = np.arange(recipient.sampler.max_denoising_steps) - recipient.step + donor.step
    step_RB = np.clip(step_R[:, None], donor.step, ends_B - 1)

    def later(*path: str) -> np.ndarray:
        found = out.trajectory
        for name in path:
            found = found[name] if isinstance(found, dict) else getattr(found, name)
        return found[block][step_RB, np.arange(len(ends_B))]

    return later
