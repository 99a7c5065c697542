"""Many prompts through the model in batches of few shapes, with all that an audit reads of a run.

The refusal margin of a step is the log-odds that its distribution opens with a refusal. Positions are independent
within a step, so the probability of an opening is a product over its tokens:

    P = sum over openings o of prod_j p_j(o_j)        margin = log P - log(1 - P)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion.generate import bucket
from dgemma_jax.diffusion.many import generate_many
from dgemma_jax.nn.functional import of
from interp.editing import rewrapped
from interp.safety.verdicts import Rule
from interp.taps import tapped

_TOKENS = 1 << 15  # of all prompts of a batch: bounds its cache
_SURE = 1e-6  # probabilities nearer to 0 or 1 than this are not told apart: margins lie within 14 nats


@dataclasses.dataclass(frozen=True)
class Watch:
    """For `dg.Record(fn=...)`: {"margin": [B], "means": [B, L, D] residuals averaged over the canvas}.

    Equal watches share a compiled program.
    """

    openings: tuple[tuple[int, ...], ...]
    sites: tuple[str, ...] = ()

    def __call__(self, view: dg.diffusion.StepView) -> dict[str, jax.Array]:
        told = {"margin": self.margin(view.logits)}
        if self.sites:
            told["means"] = jnp.stack([view.sites[name].astype(jnp.float32).mean(1) for name in self.sites], 1)
        return told

    def margin(self, logits: jax.Array) -> jax.Array:
        """[B] of logits [B, C, V]; zeros without openings."""
        if not self.openings:
            return jnp.zeros(logits.shape[0])
        longest = max(map(len, self.openings))
        logp_BNV = jax.nn.log_softmax(logits[:, :longest].astype(jnp.float32), -1)
        of_each = [sum(logp_BNV[:, j, token] for j, token in enumerate(o)) for o in self.openings]
        logp_B = jnp.clip(jax.nn.logsumexp(jnp.stack(of_each), 0), np.log(_SURE), np.log1p(-_SURE))
        return logp_B - jnp.log1p(-jnp.exp(logp_B))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchedRun:
    """What is read of one run.

    Attributes:
        text: the answer.
        settled: it ended by itself, within the cap on steps.
        drafts: the most likely text after each of R steps of the first block; none unless asked for.
        margins: [R] nats.
        entropy: [R] mean over the canvas, nats; none unless drafts are.
        means: [R, L, D]; L = 0 unless sites are watched.
    """

    text: str
    settled: bool
    drafts: list[str]
    margins: np.ndarray
    entropy: np.ndarray
    means: np.ndarray


def batches_of_shape(lengths: Sequence[int], canvas: int, batch: int) -> Iterator[list[int]]:
    """Indices in batches such that all of a batch fall into the same compiled program; fewer of long prompts.

    Prompts that fill no batch go with the next longer ones, if these are at most twice as long: padding is cheaper than
    another program.
    """
    by_shape: dict[tuple[int, int], list[int]] = {}
    for number, length in enumerate(lengths):
        by_shape.setdefault((bucket(length), bucket(length + canvas)), []).append(number)
    shapes, left = sorted(by_shape), []
    for shape, longer in zip(shapes, [*shapes[1:], None], strict=True):
        group, size = by_shape[shape] + left, rows_that_fit(shape[1], batch)
        left = group if len(group) < size and longer is not None and longer[1] <= 2 * shape[1] else []
        yield from (group[first : first + size] for first in range(0, 0 if left else len(group), size))


def rows_that_fit(length: int, batch: int) -> int:
    """How many prompts of this many tokens, the canvas included, go into a batch."""
    return max(1, min(batch, _TOKENS // max(length, 1)))


def watched_runs(
    bundle: Any, ids: Sequence[Sequence[int]], watch: Watch, *, seeds: Sequence[int], drafts: bool = True,
    batch: int = 32, edited: Callable[[Sequence[int]], Any] | None = None, sampler: SamplerConfig | None = None,
    max_new_tokens: int | None = None, done: Callable[[int], None] | None = None,
) -> list[WatchedRun]:  # fmt: skip
    """Run every prompt.

    Args:
        ids: prompts.
        watch: what is kept of every step.
        seeds: one a prompt.
        drafts: keep the drafts of every step.
        batch: rows of a compiled call; of prompts that take longer than most, fewer.
        edited: numbers of the prompts of a batch -> its model or bundle; None runs the one given.
        max_new_tokens: by default one canvas. The first block is what is watched.
        done: told the number of prompts just done.
    """
    length = of(bundle).config.canvas_length
    wanted = length if max_new_tokens is None else max_new_tokens
    blocks = -(-wanted // length)
    record = dataclasses.replace(dg.Record.nothing(), fn=watch, argmax=drafts, entropy=drafts)
    if watch.sites:
        record = dataclasses.replace(record, site_steps=(0,))  # the sites themselves need not be kept
    groups = []
    for group in batches_of_shape([len(one) for one in ids], blocks * length, batch):
        size = rows_that_fit(bucket(max(len(ids[i]) for i in group) + blocks * length), batch)
        groups.append(group + [group[-1]] * (size - len(group)))  # the last repeated: one program

    def tapping(model: Any) -> Any:
        return rewrapped(model, tapped(of(model), list(watch.sites))[0]) if watch.sites else model

    plain = tapping(bundle) if edited is None else None

    def model_of(numbers: Sequence[int]) -> Any:
        return plain if edited is None else tapping(edited(numbers))

    settings = inputs.parts(bundle)[2] if sampler is None else sampler
    if blocks == 1:
        told = generate_many(model_of, ids, seeds, groups, settings, record)
    else:
        told = _in_whole_batches(model_of, ids, seeds, groups, settings, record, wanted)
    found: list[Any] = [None] * len(ids)
    for number, out, row in told:
        found[number] = _run(bundle, out, row, drafts)
        if done is not None:
            done(1)
    return found


def _in_whole_batches(
    model_of: Callable, ids: Sequence, seeds: Sequence[int], groups: Sequence, sampler: SamplerConfig, record: Any,
    tokens: int,
) -> Iterator[tuple[int, dg.Generation, int]]:  # fmt: skip
    for group in groups:
        given = [ids[n] for n in group], [seeds[n] for n in group]
        out = dg.generate(model_of(group), *given, sampler, tokens, record)
        yield from ((number, out, row) for row, number in enumerate(dict.fromkeys(group)))


def _run(bundle: Any, out: dg.Generation, row: int, drafts: bool) -> WatchedRun:
    run = out.trajectory
    steps = int(run.num_steps[0, row])
    told = run.fn
    means = np.asarray(told["means"])[0, :steps, row] if "means" in told else np.zeros((steps, 0, 0), np.float32)
    texts = [_text(bundle, run.argmax[0, step, row]) for step in range(steps)] if drafts else []
    return WatchedRun(
        text=out.texts[row] or "", settled=bool((run.stop[:, row] != dg.diffusion.StopReason.MAX_STEPS).all()),
        drafts=texts, margins=np.asarray(told["margin"])[0, :steps, row].astype(np.float32),
        entropy=run.entropy[0, :steps, row].mean(-1) if drafts else np.zeros(0, np.float32), means=means,
    )  # fmt: skip


def _text(bundle: Any, tokens: np.ndarray) -> str:
    """The text of a canvas up to its end token."""
    ends = np.flatnonzero(np.isin(tokens, of(bundle).config.eos_token_ids))
    tokens = tokens[: ends[0]] if len(ends) else tokens
    return bundle.tokenizer.decode(tokens[tokens < bundle.tokenizer.vocab_size])  # a model may have more ids


def verdict_of(rule: Rule, run: WatchedRun) -> str:
    """The rule's verdict on a run's answer."""
    return rule(run.text, run.settled)
