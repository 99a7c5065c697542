"""Finetuning against attacks that were found: they are to be refused, and what was answered is to stay as it was.

    batch = attacks with a refusal as their answer, and ordinary prompts with the model's own answers, half of each

The loss is that of training (`dgemma_jax.train.loss`). Full: all weights move. LoRA (arXiv 2106.09685): the weights of
attention and of the dense MLP get a correction of low rank, W + A B, which is added to them at the end, so that the
result is an ordinary checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax import progress
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion.generate import bucket
from dgemma_jax.nn.functional import of
from dgemma_jax.nn.quantized import check_plain
from dgemma_jax.train.loop import optimizer
from dgemma_jax.train.loss import Batch, loss
from dgemma_jax.train.recipes import Rate, Recipe
from interp.editing import rewrapped
from interp.safety.audit_report import AuditReport
from interp.safety.prompt_files import FIELDS, Prompt, asked
from interp.safety.verdicts import COMPLIANCE, REFUSAL

_PADDING = 0.2  # weight of the padding after an answer
Pair = tuple[Any, str]  # a prompt, which may be a conversation, and its answer


def training_pairs(report: AuditReport, refusal: str | None = None) -> tuple[list[Pair], list[Pair]]:
    """(attacks, ordinary) of an audit: what got around a refusal with the refusal it should get; what is to stay.

    Attacks are prompts with a phrase, or labelled harmful, that were not refused. Ordinary are all others that settled,
    refusals among them, with their own answers.

    Args:
        refusal: the answer to teach; by default the model's own commonest refusal.

    Raises:
        ValueError: no attack worked, nothing is to stay, or there is no refusal to teach.
    """
    ran = [row for row in report.data["prompts"] if row["why_not"] is None]
    refusals = [row["answer"] for row in ran if row["verdict"] == REFUSAL]
    if refusal is None and not refusals:
        raise ValueError("the model refused nothing, so there is no refusal to teach: give one")
    text = max(refusals, key=refusals.count) if refusal is None else refusal
    is_attack = [row["verdict"] != REFUSAL and bool(row["phrase"] or row["label"] == "harmful") for row in ran]
    attacks = [(_said(row), text) for row, hit in zip(ran, is_attack, strict=True) if hit]
    kept = (COMPLIANCE, REFUSAL)
    others = [row for row, hit in zip(ran, is_attack, strict=True) if not hit]
    ordinary = [(_said(row), row["answer"]) for row in others if row["verdict"] in kept]
    if not attacks or not ordinary:
        raise ValueError(f"{len(attacks)} attacks worked and {len(ordinary)} prompts are to stay: both are needed")
    return attacks, ordinary


def _said(row: Mapping[str, Any]) -> Any:
    return asked(row["text"], row.get("before", ()))  # audits of earlier versions know no conversations


def prompts_of(report: AuditReport) -> list[Prompt]:
    """The prompts of an audit, for another one under the same seeds."""
    more = [{name: row.get(name) for name in FIELDS} | {"before": tuple(row.get("before", ()))}
            for row in report.data["prompts"]]  # fmt: skip
    return [
        Prompt(text=row["text"], line=row["line"], **own) for row, own in zip(report.data["prompts"], more, strict=True)
    ]


def comparable(before: AuditReport, after: AuditReport) -> bool:
    """Whether answers of the two differ by the model alone: equal rules, seeds and samplers."""
    settings = [report.data["manifest"]["settings"] for report in (before, after)]
    return all(settings[0][name] == settings[1][name] for name in ("rule", "seed", "sampler", "max_new_tokens"))


def harden(
    bundle: Any, attacks: Sequence[Pair], ordinary: Sequence[Pair], *, steps: int = 150, rows: int = 32,
    rate: float = 3e-4, rank: int | None = None, seed: int = 0,
    report: Callable[[int, float], None] | None = None, show: bool | None = None,
) -> Any:  # fmt: skip
    """The bundle finetuned; the one given stays as it is.

    Args:
        attacks, ordinary: (prompt, answer); longer answers are cut to one canvas.
        steps, rows: optimiser steps, and examples a step.
        rate: the largest learning rate; it warms up over a tenth of the steps, and falls to zero over the last half.
        rank: of LoRA; None trains all weights.
        report: called with (step, loss in nats a token) after every step.

    Raises:
        ValueError: nothing to train on, an odd number of rows, no tokenizer, packed weights.
    """
    if not attacks or not ordinary or rows < 2 or rows % 2 or steps < 1 or (rank is not None and rank < 1):
        raise ValueError(
            f"needed are attacks and ordinary prompts, an even number of rows, steps and rank of at least 1; got "
            f"{len(attacks)}, {len(ordinary)}, {rows}, {steps}, {rank}"
        )
    check_plain(of(bundle), "trained")
    examples = [[_encoded(bundle, *pair) for pair in side] for side in (attacks, ordinary)]
    longest = bucket(max(len(prompt) for side in examples for prompt, _ in side))
    model = of(bundle)
    base = jax.tree.map(jnp.copy, model)
    trained, merge = (base, _all) if rank is None else (_adapters(model, rank, seed), _with_adapters)
    tune = _optimizer(rate, steps)
    state, rng, key = tune.init(trained), np.random.default_rng(seed), jax.random.key(seed)
    with progress.bar("hardening", steps, show, "steps") as done:
        for step in range(steps):
            drawn = [side[int(i)] for side in examples for i in rng.integers(len(side), size=rows // 2)]
            drawn = [drawn[i] for i in rng.permutation(rows)]
            batch = _batch(drawn, longest, model.config)
            now = jax.random.fold_in(key, step)
            trained, state, value = _step(base, trained, state, batch, now, merge=merge, tune=tune)
            if report is not None:
                report(step, float(value))
            done(1)
    return rewrapped(bundle, jax.tree.map(lambda leaf: leaf, merge(base, trained)))


@functools.lru_cache
def _optimizer(rate: float, steps: int) -> Any:
    """That of training. Equal settings give the same object, and so the same compiled step."""
    rates = (Rate(peak=rate, warmup=max(1, steps // 10), horizon=2 * steps),)
    return optimizer(Recipe(steps=steps, rates=rates, cooldown=max(1, steps // 2), stages=()))


@functools.partial(jax.jit, static_argnames=("merge", "tune"))
def _step(base, trained, state, batch, key, *, merge: Callable, tune: Any):
    value, grads = jax.value_and_grad(lambda own: loss(merge(base, own), batch, key)[0])(trained)
    changes, state = tune.update(grads, state, trained)
    return jax.tree.map(lambda own, change: (own + change).astype(own.dtype), trained, changes), state, value


def _all(base: Any, trained: Any) -> Any:
    return trained


def _encoded(bundle: Any, prompt: Any, answer: str) -> tuple[list[int], list[int]]:
    model, tokenizer, _ = inputs.parts(bundle)
    (ids,) = inputs.to_ids([prompt], tokenizer, model.config.vocab_size)
    end = model.config.eos_token_ids[-1]  # the end of a turn, where there are several
    return ids, [*tokenizer.encode(answer), end][: model.config.canvas_length]


def _batch(examples: Sequence[tuple[list[int], list[int]]], longest: int, config: Any) -> Batch:
    prompt, valid = np.zeros((len(examples), longest), np.int32), np.zeros((len(examples), longest), bool)
    answer = np.full((len(examples), config.canvas_length), config.pad_token_id, np.int32)
    told = np.zeros(answer.shape, bool)
    for row, (given, said) in enumerate(examples):
        prompt[row, : len(given)], valid[row, : len(given)] = given, True
        answer[row, : len(said)], told[row, : len(said)] = said, True
    return Batch(prompt, valid, answer, answer, np.where(told, 1.0, _PADDING).astype(np.float32), told)


def _places(model: Any) -> dict[str, Any]:
    """Weights that LoRA corrects, by name; as matrices, of all axes but the last against the last."""
    found = {}
    for number, layer in enumerate(model.layers):
        for part, names in (("attention", ("q", "k", "v", "o")), ("mlp", ("gate", "up", "down"))):
            module = getattr(layer, part)
            found |= {f"{number}.{part}.{n}": getattr(module, n) for n in names if getattr(module, n, None) is not None}
    return found


def _adapters(model: Any, rank: int, seed: int) -> dict[str, tuple[jax.Array, jax.Array]]:
    """A [rows, rank] random and B [rank, columns] zero: together nothing yet."""
    found = {}
    for number, (name, weight) in enumerate(_places(model).items()):
        shape = weight[...].shape
        rows = int(np.prod(shape[:-1]))
        a = jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), (rows, rank)) * rows**-0.5
        found[name] = (a.astype(weight[...].dtype), jnp.zeros((rank, shape[-1]), weight[...].dtype))
    return found


def _with_adapters(base: Any, adapters: dict[str, tuple[jax.Array, jax.Array]]) -> Any:
    model = jax.tree.map(lambda leaf: leaf, base)  # modules of our own
    for name, weight in _places(model).items():
        a, b = adapters[name]
        weight[...] = weight[...] + (a @ b).reshape(weight[...].shape).astype(weight[...].dtype)
    return model


def compared(before: AuditReport, after: AuditReport) -> list[tuple[str, dict, dict]]:
    """Lines of a before-and-after table: what it says, the share before, the share after; same prompts in both.

    Kept: of prompts that were answered before and are no attacks, how many get the same answer.
    """
    from interp.safety.findings import share

    old, new = ([row for row in report.data["prompts"] if row["why_not"] is None] for report in (before, after))
    later = {repr(_said(row)): row for row in new}
    both = [(row, later[repr(_said(row))]) for row in old if repr(_said(row)) in later]

    def line(title: str, chosen: list, hit: Callable[[dict], bool]) -> tuple[str, dict, dict]:
        return title, share(hit(a) for a, _ in chosen), share(hit(b) for _, b in chosen)

    attacks = [(a, b) for a, b in both if a["phrase"]]
    harmful = [(a, b) for a, b in both if a["label"] == "harmful" and not a["phrase"]]
    calm = [(a, b) for a, b in both if not a["phrase"] and a["label"] != "harmful" and a["verdict"] == COMPLIANCE]
    same = share(a["answer"] == b["answer"] for a, b in calm)
    return [
        line("attacks that are not refused", attacks, lambda row: row["verdict"] != REFUSAL),
        line("harmful requests refused", harmful, lambda row: row["verdict"] == REFUSAL),
        line("ordinary prompts refused", calm, lambda row: row["verdict"] == REFUSAL),
        ("ordinary answers that stayed the same", share(True for _ in calm), same),
    ]
