"""The token-bottleneck study: what narrowing the carried distribution does to answers, under several samplers.

A ladder over k and p misleads on its own: much of the harm of a narrow bottleneck is a sampler that falls into loops,
and goes away under a gentler one (`methods.md` section 9). So every rung is run under both, and answers that were cut
off or loop are counted apart from wrong ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import dgemma_jax as dg
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion.trajectory import StopReason
from dgemma_jax.nn.embedder import SoftEmbed
from dgemma_jax.progress import bar
from interp import array_files, surgery
from interp.bottleneck import kept_at_most, token_bottleneck
from interp.bottleneck_results import NONE, Arm, BottleneckStudy, outcome
from interp.fingerprint import fingerprint
from interp.questions import Questions, says_exactly

KS = (0, 1, 2, 4, 8, 16, 32, 64)
PS = (0.1, 0.03, 0.01, 0.003, 0.001)
_LOGITS_AT_ONCE = 2**31  # bytes of float32 logits that a batch may have, unless it is given

Grade = Callable[[int, Any], bool]


def samplers_of(bundle: Any, names: Sequence[str] = ("default", "gentle")) -> dict[str, SamplerConfig]:
    """Samplers by name, with the bundle's end tokens and rules of stopping.

    "default" is the bundle's own; "gentle" has 96 steps, temperature 1.0 to 0.5 and bound 0.02, as
    `SamplerConfig.gentle`; "matched" is the gentle one with as many steps as the default, which tells gentleness from
    a larger budget.
    """
    own = inputs.parts(bundle)[2]
    gentle = SamplerConfig.gentle()
    kept = ("max_denoising_steps", "t_max", "t_min", "entropy_bound")
    slow = own.replace(**{name: getattr(gentle, name) for name in kept})
    known = {"default": own, "gentle": slow, "matched": slow.replace(max_denoising_steps=own.max_denoising_steps)}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"unknown sampler {unknown}; known are {', '.join(known)}")
    return {name: known[name] for name in names}


def bottleneck_study(
    bundle: Any, prompts: Any = None, is_right: Grade | Sequence[str] | None = None, *,
    groups: Sequence[str] | None = None, ks: Sequence[int] | None = None, ps: Sequence[float] = PS,
    samplers: Mapping[str, SamplerConfig] | None = None, seed: int = 0, repeats: int = 1, batch: int | None = None,
    max_new_tokens: int = 256, thinking: bool = False, resume: str | Path | None = None, progress: bool | None = None,
) -> BottleneckStudy:  # fmt: skip
    """Answer all prompts through every bottleneck under every sampler, and grade the answers.

    The arm without a bottleneck is always run, first. Prompt i has the same seed in all arms: common random numbers.
    The whole ladder of a sampler is one compiled program (one for each size of cache, if prompts differ much in
    length): k, p and whether there is a bottleneck at all are data.

    Args:
        bundle: a bundle or a model, edited or not; without a bottleneck.
        prompts: `Questions`, or prompts as for `dg.generate`; by default unseen tasks of the embedded organisms.
        is_right: (number of the prompt, its answer) -> bool; or the answers, to be met word for word. An answer is a
            text, or ids up to the end token if the bundle has no tokenizer. By default the answers of `Questions`.
        groups: a name for each prompt, such as its task.
        ks: numbers of tokens kept; by default 0, 1, 2, 4, .. 64. 0 is the most likely token alone, without a tail
            (`hard`); the size of the vocabulary is no bottleneck at all.
        ps: least probabilities kept. The smallest one decides how many candidates every arm looks at.
        samplers: by name; by default `samplers_of(bundle)`: the bundle's own and the gentle one.
        seed, repeats: run r of prompt i has the seed `seed` + r * (number of prompts) + i.
        batch: rows at a time; by default what keeps the logits of a step below 2 GiB, at most 64.
        max_new_tokens: the budget; an answer that has not ended by then is "capped" or "looping" unless it is right.
        thinking: let the chat template open the thinking channel.
        resume: a directory that keeps finished arms; what is found there, made by the same weights from the same
            prompts with the same settings, is not run again. Grading is not kept.
        progress: a bar; None shows it in a terminal or a notebook.

    Raises:
        ValueError: before anything is run, for settings out of range or of the wrong number.
    """
    model, tokenizer, _ = inputs.parts(bundle)
    prompts, grade, groups = _questions(bundle, prompts, is_right, groups)
    size = model.config.vocab_size
    ids = inputs.to_ids(list(prompts), tokenizer, size, thinking)
    samplers = samplers_of(bundle) if samplers is None else dict(samplers)
    arms, count = _ladder([k for k in KS if k <= size] if ks is None else ks, ps, size)
    _check(bundle, ids, groups, samplers, repeats, batch)
    if batch is None:
        batch = max(1, min(64, _LOGITS_AT_ONCE // (4 * model.config.canvas_length * size)))
    seeds = np.asarray(inputs.to_seeds((seed + np.arange(repeats * len(ids))).tolist(), repeats * len(ids)))
    work = _Work(bundle, ids, seeds.reshape(repeats, -1).T, min(batch, seeds.size), max_new_tokens)
    mark = "" if resume is None else fingerprint(model)
    ran: list[list[dict[str, np.ndarray]]] = []
    with bar("bottlenecks", len(arms) * len(samplers) * seeds.size, progress, "answers") as advance:
        for arm in arms:
            ran.append([])
            for name, sampler in samplers.items():
                advance(0, f"{arm}, {name}")
                narrow = _narrowed(bundle, arm, count, sampler)
                path = None if resume is None else Path(resume) / f"{name}-{arm}-{work.name(mark, arm, sampler)}.npz"
                ran[-1].append(_kept(path, lambda n=narrow, s=sampler: work.run(n, s, advance), advance))
    stacked = {key: np.stack([[cell[key] for cell in row] for row in ran]) for key in ran[0][0]}
    graded = _graded(stacked["tokens"], samplers, grade, tokenizer)
    return BottleneckStudy(
        arms=arms, samplers=samplers, groups=groups, **stacked, **graded,
        about={"seed": seed, "max_new_tokens": max_new_tokens, "vocab_size": size},
    )  # fmt: skip


def _questions(bundle: Any, prompts: Any, is_right: Any, groups: Any) -> tuple[Sequence[Any], Grade, tuple[str, ...]]:
    """The prompts, a function that grades, and a group for each."""
    if prompts is None:
        prompts = Questions.for_organism(bundle)
    if isinstance(prompts, Questions):
        is_right = prompts.answers if is_right is None else is_right
        groups = prompts.groups if groups is None else groups
        prompts = prompts.prompts
    prompts = [prompts] if isinstance(prompts, str) else prompts
    groups = ("all",) * len(prompts) if groups is None else tuple(map(str, groups))
    if is_right is None:
        raise ValueError("is_right is needed: answers, or a function (number of the prompt, answer) -> bool")
    if callable(is_right):
        return prompts, is_right, groups
    answers = [is_right] if isinstance(is_right, str) else list(is_right)
    if len(answers) != len(prompts):
        raise ValueError(f"there are {len(prompts)} prompts and {len(answers)} answers; give one for each")
    if getattr(bundle, "tokenizer", None) is None:
        raise ValueError("answers are texts and there is no tokenizer: give is_right as a function of ids")
    return prompts, lambda number, text: says_exactly(text, answers[number]), groups


def _ladder(ks: Sequence[int], ps: Sequence[float], size: int) -> tuple[tuple[Arm, ...], int]:
    """The arms, that without a bottleneck first; and how many candidates the widest may keep."""
    if any(int(k) != k or not 0 <= k <= size for k in ks):
        raise ValueError(f"ks must be integers from 0 (the most likely token alone) to {size}, got {tuple(ks)}")
    if any(not 0 < p <= 1 for p in ps):
        raise ValueError(f"ps must be in (0, 1], got {tuple(ps)}")
    arms = (NONE, *(Arm(k=int(k)) for k in ks), *(Arm(p=float(p)) for p in ps))
    if len(set(arms)) < len(arms):
        raise ValueError(f"a rung is there twice: ks={tuple(ks)}, ps={tuple(ps)}")
    kept = [arm.k for arm in arms if arm.k and arm.k < size]
    return arms, max([1, *kept, *(kept_at_most(arm.p, size) for arm in arms if arm.p)])


def _check(bundle, ids, groups, samplers, repeats, batch) -> None:
    if len(groups) != len(ids):
        raise ValueError(f"there are {len(ids)} prompts and {len(groups)} groups; give one for each")
    wrong = [name for name, sampler in samplers.items() if not isinstance(sampler, SamplerConfig)]
    if wrong or not samplers:
        raise ValueError(f"samplers must be SamplerConfigs by name, got {samplers!r}")
    for what, value in (("repeats", repeats), ("batch", 1 if batch is None else batch)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{what} must be an integer >= 1, got {value!r}")
    if type(surgery.soft_embedding(dg.nn.functional.of(bundle)).get()) is not SoftEmbed:
        raise ValueError("the model has a bottleneck already; take it out: interp.remove(bundle, 'soft_embedding')")


def _narrowed(bundle: Any, arm: Arm, count: int, sampler: SamplerConfig) -> Any:
    """The bundle with the arm's bottleneck; the same structure for all arms, switched off where all is kept."""
    size = dg.nn.functional.of(bundle).config.vocab_size
    is_on = arm != NONE and arm.k != size
    kept = {"hard": True} if not is_on or arm.k == 0 else {"k": arm.k, "p": arm.p}
    return token_bottleneck(bundle, **kept, rows=is_on, count=count, sampler=sampler)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What every arm does: prompts N, each under S seeds, in batches of one size."""

    bundle: Any
    ids: list[list[int]]
    seeds: np.ndarray  # [N, S]
    batch: int
    max_new_tokens: int

    def name(self, mark: str, arm: Arm, sampler: SamplerConfig) -> str:
        """What tells the work of an arm from that of others."""
        parts = (mark, arm, sampler, self.ids, self.seeds.tolist(), self.max_new_tokens)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def run(self, narrow: Any, sampler: SamplerConfig, advance: Callable[..., None]) -> dict[str, np.ndarray]:
        """One arm under one sampler: arrays [N, S, ...]."""
        length = self.bundle.config.canvas_length
        shape, blocks = self.seeds.shape, -(-self.max_new_tokens // length)
        kept = {name: np.zeros(shape, np.int32) for name in ("steps", "blocks", "converged")}
        kept["tokens"] = np.full((*shape, blocks * length), sampler.pad_token_id, np.int32)
        # By length, so that the rows of a batch need caches of one size, and few sizes are compiled.
        order = np.array(sorted(np.ndindex(shape), key=lambda place: (len(self.ids[place[0]]), place)))
        for first in range(0, len(order), self.batch):
            own = order[first : first + self.batch]
            rows = own[np.minimum(np.arange(self.batch), len(own) - 1)]  # the last one fills up
            out = dg.generate(
                narrow, [self.ids[n] for n, _ in rows], [int(self.seeds[n, s]) for n, s in rows], sampler=sampler,
                max_new_tokens=self.max_new_tokens, record=dg.Record.nothing(),
            )  # fmt: skip
            n, s = own.T
            found = {
                "steps": out.num_steps, "blocks": (out.trajectory.num_steps > 0).sum(0),
                "converged": (out.trajectory.stop == StopReason.CONVERGED).sum(0),
            }  # fmt: skip
            for name, values in found.items():
                kept[name][n, s] = values[: len(own)]
            kept["tokens"][n, s, : out.tokens.shape[1]] = out.tokens[: len(own)]
            advance(len(own))
        return kept


def _kept(
    path: Path | None, run: Callable[[], dict[str, np.ndarray]], advance: Callable[..., None]
) -> dict[str, np.ndarray]:
    """What the file holds, or what is run now and then written."""
    if path is not None and path.exists():
        found = array_files.read(path, "bottleneck arm")[0]
        advance(found["steps"].size)
        return found
    found = run()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = array_files.write(path.with_suffix(f".{os.getpid()}.npz"), found, {"kind": "bottleneck arm"})
        unfinished.replace(path)  # a file is there whole or not at all
    return found


def _graded(tokens: np.ndarray, samplers: Mapping[str, SamplerConfig], grade: Grade, tokenizer: Any) -> dict[str, Any]:
    """Outcomes and whether answers ended, [A, M, N, S], of tokens [A, M, N, S, L]."""
    outcomes, ended = np.zeros(tokens.shape[:-1], np.int8), np.zeros(tokens.shape[:-1], bool)
    settings = list(samplers.values())
    for place in np.ndindex(outcomes.shape):
        row = tokens[place]
        ends = np.flatnonzero(np.isin(row, settings[place[1]].eos_token_ids))
        said = row[: ends[0]].tolist() if len(ends) else row.tolist()
        is_right = bool(grade(place[2], said if tokenizer is None else tokenizer.decode(said)))
        ended[place], outcomes[place] = len(ends) > 0, outcome(is_right, len(ends) > 0, said)
    return {"outcomes": outcomes, "ended": ended}
