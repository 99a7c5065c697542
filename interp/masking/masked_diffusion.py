"""Saliency of any prediction: `saliency`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import noise
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion.generate import PREFILL_CHUNK, bucket, prefill_prompts
from dgemma_jax.diffusion.moment import Moment
from dgemma_jax.diffusion.sampler import start
from dgemma_jax.nn import cache as kv
from dgemma_jax.nn import meshes
from dgemma_jax.progress import bar
from interp.kept_chunks import Chunks, words
from interp.masking.game import Counted, Found, Game
from interp.masking.gradients import gradient
from interp.masking.hard_gates import gates
from interp.masking.information_bottleneck import information_bottleneck
from interp.masking.input_gradients import gradient_norm, gradient_x_input, smooth_grad
from interp.masking.masked_game import READS, Given, MaskedGame
from interp.masking.paths import path
from interp.masking.regression import regression
from interp.masking.replacements import pool_of
from interp.masking.rollout import attention_rollout
from interp.masking.saliency_maps import Saliency
from interp.masking.single_masks import occlusion, rise
from interp.masking.straight_paths import expected_gradients, integrated_gradients
from interp.masking.targets import TextEnergy, energy_rows, said
from interp.masking.units import Units, units_of
from interp.metrics import Says
from interp.rows import Run, as_data, that_fit
from interp.sweep_inputs import check_metric

Estimator = Callable[..., Found]
# The usual ones that ours are compared with.
BASELINES: dict[str, Estimator] = {
    f.__name__: f for f in (
        gradient_norm, gradient_x_input, smooth_grad, integrated_gradients, expected_gradients, occlusion, rise,
        information_bottleneck, attention_rollout,
    )
}  # fmt: skip
METHODS: dict[str, Estimator] = {
    "masked_diffusion": path, "path": path, "gradient": gradient, "regression": regression, "gates": gates, **BASELINES,
}  # fmt: skip
SCOPES = ("step", "window", "generation")
ROWS, GRADIENT_ROWS = 64, 8  # of a compiled call at most, unless the user says more


def saliency(
    bundle: Any, prompt: Any, target: Any, method: str | Estimator = "masked_diffusion", *, units: Any = "tokens",
    baseline: Any = "noise", layers: Any = None, positions: Any = None, step: int | str | Moment = 0,
    scope: str = "step", window: int = 4, reads: str | None = None, budget: int | None = None,
    tolerance: float | None = None, draws: int = 8, seed: int = 0, sampler: SamplerConfig | None = None,
    thinking: bool = False, rows_at_once: int | None = None, keep: str | Path | None = None,
    progress: bool | None = None, **settings: Any,
) -> Saliency:  # fmt: skip
    """Which units drove a prediction, by masking and unmasking them along random paths.

    >>> import dgemma_jax as dg, interp
    >>> bundle = dg.load("nano")
    >>> found = interp.saliency(bundle, "recall a 4 , b 7 , c 2 ? b", "7")  # doctest: +SKIP
    >>> found.top(1)[0][0]  # doctest: +SKIP
    '7 @8'

    A unit that is off is replaced by a baseline; the score of a unit is what the target gains when it comes on,
    averaged over the orders in which units come on (its Shapley value). Scores of the default method sum to the
    target's whole change, `on - off`. Another method may cost less, see the modules of `interp.masking`.

    Args:
        bundle: a bundle or a model, edited or not.
        prompt: one, as for `dg.generate`.
        target: what is explained. A text that the model's answer holds: the log-probability of its tokens there.
            `TextEnergy(text)`: the score of a given text. Or any metric: a function logits [B, C, V] -> [B], such as
            `interp.LogitDifference`, `interp.answer(ids)`, `refusal_margin(...)`; or of tokens, such as `interp.Says`.
        method: one of `METHODS`, or an estimator of the user's own, see `interp.masking.game`.
        units: one of `interp.masking.units.KINDS`, several of them, or spans: names -> prompt positions.
        baseline: "noise" (uniform random tokens run through the model), "mean", "zero", or a list of other prompts of
            as many tokens.
        layers, positions: of the units; see `units_of`.
        step: s, the denoising step explained, or the first of several; 0 is the first, and the default. Rows start
            from the canvas and S that the run had before step s, whatever is masked: a score says what a unit does to
            this step's prediction, the draft so far given. At step 0 the canvas is noise and S is 0, so all comes
            from the prompt; later, drafts and S carry part of it, and units of "canvas" and "soft" show that part.
            "settled": the first step whose most likely tokens hold the text that is the target. A moment of a run of
            this prompt saves running it again; the target is then a metric, the seed of the run and the sampler are
            the moment's own. Several steps side by side: `saliency_by_step`.
        scope: how far from there the target is read. "step": the logits of step s. "window": those of step
            s + window - 1, rows going their own way in between. "generation": rows run to their end, and the target
            reads the look that the model takes at its finished draft (of the first block), or the draft's tokens.
            Prompts, caches and sites stay masked all the way; canvas and S are what steps hand on: masked before
            step s, and free after it. Scopes differ where a draft repairs, or makes worse, what one step lost.
        reads: "logits" or "tokens", what the metric is given; by default tokens for `Says`, logits for all else.
        budget: evaluations at most; by default the method's own.
        tolerance: stop at this standard error.
        draws: of the baseline "noise" and of `TextEnergy`.
        seed: of the run, the baselines and the masks.
        rows_at_once: rows of a compiled call; by default what fits the memory, 64 at most.
        keep: a directory for finished calls; the same call made again goes on after them.
        progress: a bar; None shows it in a terminal or notebook.
        **settings: of the method (`interactions=True` of "path", `margin` of "gates").

    Raises:
        ValueError: no units, a target that the answer does not hold or that is not finite, and whatever else cannot be
            explained; says what to change.
    """
    estimator = _estimator(method, settings)
    game = masked_game(
        bundle, prompt, target, units=units, baseline=baseline, layers=layers, positions=positions, step=step,
        scope=scope, window=window, reads=reads, draws=draws, seed=seed, sampler=sampler, thinking=thinking,
        rows_at_once=rows_at_once, keep=keep,
    )  # fmt: skip
    options = settings | ({} if budget is None else {"budget": budget})
    tokenizer, ids = inputs.parts(bundle)[1], np.asarray(game.given.tokens[0])[np.asarray(game.given.valid[0])]
    cells = game.units.cells.get("token_embed", game.units.cells.get("cache"))
    found, evaluations = estimate(game, estimator, tolerance=tolerance, seed=seed, progress=progress, **options)
    return Saliency(
        **vars(found), units=game.names, kinds=game.units.kinds, places=game.units.places, evaluations=evaluations,
        method=method if isinstance(method, str) else getattr(method, "__name__", "an estimator"),
        target=_said(target), baseline=baseline if isinstance(baseline, str) else "other prompts", scope=scope,
        step=int(np.argmax(np.asarray(game.given.first))),
        tokens=tuple(str(i) if tokenizer is None else tokenizer.token(int(i)) for i in ids),
        token_units=np.full(len(ids), -1) if cells is None else np.asarray(cells)[: len(ids)].astype(int),
    )  # fmt: skip


def estimate(
    game: Game, estimator: str | Estimator = "path", *, tolerance: float | None = None, seed: int = 0,
    progress: bool | None = None, **settings: Any,
) -> tuple[Found, int]:  # fmt: skip
    """What an estimator finds of any game, and how often it asked. A bar shows the evaluations."""
    estimator = METHODS[estimator] if isinstance(estimator, str) else estimator
    default = inspect.signature(estimator).parameters.get("budget")
    budget = settings.get("budget", default.default if default is not None else 0)
    with bar("saliency", budget if isinstance(budget, int) else 0, progress, "evaluations") as done:
        counted = Counted(game, done)
        found = estimator(counted, tolerance=tolerance, seed=seed, **settings)
    return found, counted.evaluations


def masked_game(
    bundle: Any, prompt: Any, target: Any, *, units: Any = "tokens", baseline: Any = "noise", layers: Any = None,
    positions: Any = None, step: int | str | Moment = 0, scope: str = "step", window: int = 4,
    reads: str | None = None, draws: int = 8, seed: int = 0, sampler: SamplerConfig | None = None,
    thinking: bool = False, rows_at_once: int | None = None, keep: str | Path | None = None,
) -> MaskedGame:  # fmt: skip
    """The game that `saliency` plays: for estimators and tests of one's own. Arguments as there."""
    model, tokenizer, default = inputs.parts(bundle)
    sampler = step.sampler if isinstance(step, Moment) else default if sampler is None else sampler
    ids = inputs.to_ids(prompt, tokenizer, model.config.vocab_size, thinking)
    if len(ids) != 1:
        raise ValueError(f"a saliency explains one prompt, got {len(ids)}: call it for each, calls share the program")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    reads = reads or ("tokens" if isinstance(target, Says) else "logits")
    if reads not in READS:
        raise ValueError(f"reads must be one of {', '.join(READS)}, got {reads!r}")
    if hasattr(bundle, "check_finite"):
        bundle.check_finite()
    chosen = units_of(bundle, ids[0], units, layers=layers, positions=positions)

    # Where every row runs a prompt of its own, nothing is read of this one's cache.
    anew = "token_embed" in chosen.cells and set(chosen.cells) <= {"token_embed", "canvas"}
    moment, metric, starts = _explained(bundle, ids, target, step, draws, seed, sampler, anew)
    config = model.config
    check_metric(metric, "text" if reads == "tokens" else "step", 1, (config.canvas_length, config.vocab_size),
                 config.canvas_length)  # fmt: skip
    at = moment.step
    limit = {"step": None, "window": at + window - 1, "generation": sampler.max_denoising_steps}[scope]
    if scope == "window" and not (window >= 1 and limit < sampler.max_denoising_steps):
        raise ValueError(f"a window of {window} steps from step {at} on: the run has {sampler.max_denoising_steps}")
    run = Run(moment=moment, canvas=np.asarray(moment.canvas)[None], soft=np.asarray(moment.soft)[None], steps=(at,))
    pool, count = pool_of(bundle, ids[0], chosen, run.at(0), sampler, baseline, draws, seed)
    given = Given.of(run.at(0), starts, ids[0], chosen, pool, sampler)
    fit = that_fit(bundle, run, 1, rows_at_once, _prompt_bytes(config, given.tokens.shape[1], chosen))
    each = meshes.ways(meshes.of(model))  # rows are dealt out evenly over the axis `data` of the model's mesh
    rows = fit if rows_at_once is not None else min(fit, ROWS * each)
    rows = max(each, rows // each * each)
    most = min(GRADIENT_ROWS * each, rows, fit // (2 * config.num_layers))  # what all layers keep for the way back
    gradients = max(each, most // each * each)
    store = None
    if keep is not None:
        places = [(place, where.tobytes()) for place, where in chosen.cells.items()]
        about = (ids, places, repr(baseline), at, limit, draws, seed, sampler, reads, words(metric),
                 np.asarray(starts).tolist())  # fmt: skip
        store = Chunks(keep, bundle, *about)
    return MaskedGame(
        bundle=bundle, units=chosen, given=given, draws=max(count, len(starts)), metric=as_data(metric), reads=reads,
        limit=limit, rows_at_once=rows, gradients_at_once=gradients, keep=store,
    )  # fmt: skip


def _prompt_bytes(config: Any, length: int, units: Units) -> int:
    """What a row needs for a prompt of its own: attention scores of a piece, embeddings."""
    if "token_embed" not in units.cells:
        return 0
    return 8 * config.num_heads * min(length, PREFILL_CHUNK) * length + 4 * length * 24 * config.embed_dim


def _estimator(method: str | Estimator, settings: dict[str, Any]) -> Estimator:
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, or an estimator; got {method!r}")
        method = METHODS[method]
    if not callable(method):
        raise ValueError(f"method must be one of {', '.join(METHODS)}, or an estimator; got {method!r}")
    known = inspect.signature(method).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    unknown = sorted(set(settings) - set(known))
    if unknown and not takes_all:
        raise ValueError(f"the method has no setting {unknown[0]!r}; it has {', '.join(list(known)[1:])}")
    return method


def _explained(bundle, ids, target, step, draws, seed, sampler, anew) -> tuple[Moment, Any, jax.Array]:
    """The moment before the step, the metric, and the canvases that rows start from."""
    is_text = isinstance(target, str)
    if isinstance(step, Moment):
        if is_text or isinstance(target, TextEnergy):
            raise ValueError("before a moment's run ends it has no answer: give a metric, such as interp.answer(ids)")
        if step.prompts != (tuple(ids[0]),) or step.block:
            raise ValueError("the moment must be of a run of this prompt alone, in its first block")
        return step, target, step.canvas
    if not ((isinstance(step, int) and step >= 0) or step == "settled"):
        raise ValueError(f"step must be an integer >= 0 or 'settled', got {step!r}")
    if step == "settled" and not is_text:
        raise ValueError("step='settled' needs a text as target, to see when the draft holds it; give a number")
    metric = target
    if is_text or step:
        run = dg.generate(bundle, ids, seed, sampler, max_new_tokens=1, record=_record())
        if is_text:
            metric = said(bundle, target, run.tokens[0])
        if step == "settled":
            drafts = run.trajectory.argmax[0, : int(run.trajectory.num_steps[0, 0]), 0]
            step = int(np.argmax((drafts[:, metric.positions] == metric.tokens).all(1)))
        if step >= run.trajectory.num_steps[0, 0]:
            raise ValueError(
                f"step {step} was not taken, the run stopped after {run.trajectory.num_steps[0, 0]} steps: choose an "
                "earlier one, or give a sampler with early_stop=False"
            )
        moment = run.trajectory.moment(0, step)
    else:
        moment = _beginning(bundle, ids, seed, sampler, anew)
    if isinstance(target, TextEnergy):
        metric, starts = energy_rows(bundle, target, draws, seed)
        return moment, metric, starts
    return moment, metric, moment.canvas


def _record() -> dg.Record:
    return dg.Record(tokens=False, argmax=True, accepted=False, entropy=False, top_k=0)


def _beginning(bundle: Any, ids: list[list[int]], seed: int, sampler: SamplerConfig, anew: bool) -> Moment:
    """The moment before the first step: nothing but the prompt has been run; its cache is only shaped if `anew`."""
    model = inputs.parts(bundle)[0]
    length = model.config.canvas_length
    if anew:  # in the shape that a run has
        cache = kv.empty(model.config, 1, bucket(len(ids[0]) + length), model.dtype)
    else:
        cache = prefill_prompts(model, ids, 1)
    seeds = np.array(inputs.to_seeds(seed, 1))
    zero = jnp.zeros(1, jnp.int32)
    state = start(noise.row_keys(seeds), zero, zero.astype(bool), length, model)
    return Moment(
        state=state, cache=cache, pinned=None, history=np.zeros((1, 0), np.int32),
        ended=np.zeros(1, bool), spent=np.zeros(1, np.int32), sampler=sampler, num_blocks=1,
        prompts=tuple(map(tuple, ids)),
    )  # fmt: skip


def _said(target: Any) -> str:
    """The target in words."""
    if isinstance(target, str):
        return f"log p({target})"
    name = getattr(target, "__name__", type(target).__name__)
    return f"{name} at level {target.level}" if isinstance(target, TextEnergy) else name
