"""Activation patching at every place of a run: [step, layer, position], heads, experts and carriers.

A chunk of n interventions on P pairs of prompts is one compiled step of n * P rows. Every intervention starts from
the recipient's own moment at its step, under the recipient's keys; effects are differences to a row of the same
program that takes nothing, and the layers before the first changed one hand on what they did in that row. What a donor
has at a site is read by that program too: another rounds elsewhere, and a run patched with itself would move. Terms:
Zhang and Nanda, arXiv 2309.16042 (denoising, noising, resampling); places by step and carrier are what a diffusion
model adds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dgemma_jax as dg
from dgemma_jax import progress
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion.generate import PREFILL_CHUNK, bucket, prefill_padded
from dgemma_jax.diffusion.moment import Moment
from dgemma_jax.diffusion.sampler import State, denoise_step
from dgemma_jax.nn.cache import KVCache
from dgemma_jax.nn.functional import of
from dgemma_jax.nn.transformer import Prefill
from interp import donors, kept_chunks
from interp.effect_maps import EffectMap
from interp.gates import table
from interp.later_layers import Beginning, begun
from interp.metrics import Metric
from interp.places import Change, Target, change, changed, edited, targets
from interp.rows import as_data, of_step, repeated, that_fit
from interp.sweep_inputs import Run, check_metric, chosen, pairs, steps_of
from interp.taps import FirstRows, tapped

BUSY = 256  # tokens that keep a device busy
READ = 1 << 28  # bytes of donors' values that one call gives, if more than one step of them
LAST_IN_LAYER = "layers.*.resid_post"
DIRECTIONS, EFFECTS = ("denoising", "noising"), ("step", "text")


def patch_sweep(
    bundle: Any, clean: Any, corrupt: Any, metric: Metric, sites: str | Sequence[str], steps: Any = None,
    positions: Any = None, *, prompt_positions: Any = None, over: str | Sequence[str] = ("position",),
    phase: str = "denoise", direction: str = "denoising", source: str = "donor", effect: str = "step",
    seed: int | Sequence[int] = 0, sampler: SamplerConfig | None = None, max_new_tokens: int | None = None,
    noise_seeds: Sequence[int] = (), source_seed: int = 0, rows_at_once: int | None = None,
    directory: str | Path | None = None, show_progress: bool | None = None,
) -> EffectMap:  # fmt: skip
    """The effect of patching every place by itself, at every step by itself.

    >>> import dgemma_jax as dg, interp
    >>> model = dg.nn.transformer.initialize(dg.ModelConfig.tiny())
    >>> metric = interp.LogitDifference(positions=2, tokens=7, others=8)
    >>> sampler = dg.SamplerConfig(max_denoising_steps=2, early_stop=False)
    >>> found = interp.patch_sweep(model, [5, 6], [5, 9], metric, "layers.*.resid_post", sampler=sampler)
    >>> found["layers.*.resid_post"].shape  # steps, layers, positions, pairs
    (2, 3, 12, 1)

    Args:
        bundle: a bundle or a model, edited or not.
        clean, corrupt: P prompts each, as for `dg.generate`; pairs of equally many tokens. `corrupt` may be None where
            the source is no donor: places of the clean run are then knocked out.
        metric: of one step, logits [P, C, V] -> [P] (see `interp.metrics`); of generated tokens [P, n] -> [P] if
            `effect` is "text".
        sites: patterns as for `interp.at`, and carriers: "canvas" (tokens fed into a step), "soft" (S fed into it),
            "cache" (keys and values of the prompt).
        steps: an integer, slice, list or mask; None for those that all runs took.
        positions: on the canvas; None for all.
        prompt_positions: of the prompt, for "cache" and `phase="prefill"`; None for all.
        over: along which axes places lie, beside layers, where a site has them: "position", "head", "expert". The
            chosen positions are patched together if they are not among them.
        phase: "prefill" sweeps sites of the pass over the prompt; steps then read the patched cache.
        direction: "denoising" puts clean values into the corrupt run, "noising" the other way round.
        source: what is put there: the "donor" run's own value; "zero"; the "mean" of the donor runs over pairs and
            positions; "resample", the value of another pair's donor; "renoise", random tokens ("canvas",
            "canvas_embed", and "token_embed" in prefill).
        effect: "step" measures the patched step; "text" goes on to the end, the later steps unpatched, except that a
            changed cache stays changed.
        seed: one, or one a pair; donors share it.
        sampler, max_new_tokens: as for `dg.generate`; by default one block. Places are in the first block.
        noise_seeds: other seeds of the unpatched run; the spread of its metric over them is the noise floor.
        source_seed: of "resample" and "renoise".
        rows_at_once: rows of one compiled step; by default what fits the memory.
        directory: where finished chunks are kept; the same call made again goes on after them.
        show_progress: a bar; by default on a terminal.

    Raises:
        ValueError: prompts that do not pair, sites or steps that do not exist, a source that a site cannot have.
    """
    model, tokenizer, default = inputs.parts(bundle)
    sampler, canvas = default if sampler is None else sampler, model.config.canvas_length
    for name, value, known in (("direction", direction, DIRECTIONS), ("effect", effect, EFFECTS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    length = canvas if max_new_tokens is None else max_new_tokens
    goals = targets(model, sites, phase, over)
    ids = pairs(clean, corrupt, source, tokenizer, model.config.vocab_size)
    donors.check(source, goals, len(ids[0]))
    ids = ids if direction == "noising" or corrupt is None else ids[::-1]  # of the recipients, of the donors
    table(steps, sampler.max_denoising_steps, "steps")
    index = {
        "T": chosen(positions, canvas, "positions"),
        "P": chosen(prompt_positions, max(map(len, ids[0])), "prompt positions"),
    }
    check_metric(metric, effect, len(ids[0]), (canvas, model.config.vocab_size), -(-length // canvas) * canvas)

    begin = functools.partial(Run.of, bundle, sampler=sampler, max_new_tokens=length)
    seeds = inputs.to_seeds(seed, len(ids[0]))
    recipient = begin(ids[0], seeds)
    donor = recipient if corrupt is None else begin(ids[1], seeds)
    numbers = steps_of(steps, sampler, recipient, donor)
    work = _Work(bundle, recipient, donor, metric, effect, source, source_seed, numbers, index, rows_at_once)

    store = kept_chunks.Chunks(
        directory, bundle, ids, seeds, sampler, goals, numbers, index, direction, source, effect, length, source_seed,
        kept_chunks.words(metric),
    )  # fmt: skip
    effects: dict[str, np.ndarray] = {}
    indices: dict[str, dict[str, list[int]]] = {}
    with progress.bar("patching", sum(work.calls(goal) for goal in goals), show_progress) as done:
        for number, goal in enumerate(goals):
            found, base = work.sweep(goal, functools.partial(store.kept, number), done)
            own = {"R": list(numbers)} | work.numbers(goal)
            if goal.layers:  # layers of other shapes are other targets
                own["L"] = sorted(layer for other in goals if other.name == goal.name for layer in other.layers)
            whole = effects.setdefault(goal.name, np.zeros((*(len(v) for v in own.values()), len(seeds)), np.float32))
            at = [own["L"].index(layer) for layer in goal.layers] if goal.layers else slice(None)
            whole[:, at] = found.reshape(whole[:, at].shape)
            indices[goal.name] = own
    goal = goals[0]
    token = (lambda i: str(i)) if tokenizer is None else tokenizer.token
    return EffectMap(
        effects=effects,
        axes={name: "".join(own) + "B" for name, own in indices.items()},
        index=indices,
        base=base,
        donor=None if corrupt is None else work.plain(goal, donor),
        noise=_noise([work.plain(goal, begin(ids[0], [s] * len(seeds))) for s in noise_seeds]),
        method=f"patch ({direction}, {source}, {effect})",
        labels={"P": [token(i) for i in ids[0][0]]},
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Work:
    """A sweep about to run."""

    bundle: Any
    recipient: Run
    donor: Run
    metric: Metric
    effect: str
    source: str
    seed: int
    steps: tuple[int, ...]
    index: dict[str, list[int]]
    rows_at_once: int | None

    @functools.cached_property
    def flat_model(self) -> tuple[list[jax.Array], jax.tree_util.PyTreeDef]:
        """Leaves and structure: to take the modules apart again in every call costs as much as a small step."""
        return jax.tree.flatten(of(self.bundle))

    @property
    def pairs(self) -> int:
        return len(self.recipient.ids)

    def numbers(self, goal: Target) -> dict[str, list[int]]:
        """The numbers along each axis of the places of a target."""
        sizes = self._sizes(goal)
        return {a: list(goal.layers) if a == "L" else self.index.get(a) or list(range(sizes[a])) for a in goal.shown}

    def _sizes(self, goal: Target) -> dict[str, int]:
        config = of(self.bundle).config
        heads = config.kv_heads(goal.layers[0]) if goal.layers else 0
        prompt = max(map(len, self.recipient.ids))
        length = prompt if goal.kind in ("prompt", "cache") else config.canvas_length
        return {"T": length, "P": length, "N": config.num_heads, "K": heads, "E": config.num_experts}

    @functools.cached_property
    def chunks(self) -> Callable[[Target], list[tuple[np.ndarray, np.ndarray]]]:
        """Places, and whether each is one: the first of all stands for no change, and so does what fills up."""
        return functools.cache(self._chunks)

    def _chunks(self, goal: Target) -> list[tuple[np.ndarray, np.ndarray]]:
        places = goal.places(self.numbers(goal))
        metric = self.metric if self.effect == "step" and "V" not in goal.axes else None  # at logits all are made
        most = that_fit(self.bundle, self.recipient, self.pairs, self.rows_at_once, metric=metric)
        in_layer = len(places) // max(1, len(goal.layers))
        enough = in_layer * of(self.bundle).config.canvas_length >= BUSY and len(goal.layers) <= most
        if goal.kind == "site" and goal.layers and enough and in_layer < most:  # a layer a chunk: as few run as can
            acts = np.arange(in_layer + 1) > 0
            return [(np.concatenate([own[:1], own]), acts) for own in np.split(places, len(goal.layers))]
        places = np.concatenate([places[:1], places])
        acts = np.arange(len(places)) > 0
        size = math.ceil(len(places) / math.ceil(len(places) / most))  # chunks of about equal size
        fill = -len(places) % size
        places, acts = np.pad(places, [(0, fill), (0, 0)], "edge"), np.pad(acts, (0, fill))
        return [(places[i : i + size], acts[i : i + size]) for i in range(0, len(places), size)]

    def calls(self, goal: Target) -> int:
        """Compiled steps needed."""
        return len(self.chunks(goal)) * len(self.steps)

    def sweep(self, goal: Target, kept: Callable, done: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
        """Effects [R, places, P], and the metric [R, P] without a change."""
        chunks = self.chunks(goal)
        size, acts = len(chunks[0][0]), np.concatenate([acts for _, acts in chunks])
        given = functools.lru_cache(1)(lambda step: self._given(goal, step))
        rows = functools.lru_cache(1)(lambda step: rows_of(self.recipient.at(step), size))
        prompt = functools.lru_cache(1)(lambda chunk: self._prefilled(goal, chunks[chunk], given(0), self.recipient))
        anew = self._beginning(goal)
        handed: dict[int, list[jax.Array]] = {}  # of one step, by the row that takes nothing

        def one(step: int, chunk: int) -> np.ndarray:
            if goal.kind == "prompt":
                return self._measure(rows(step).replace(cache=prompt(chunk).cache))[0]
            begin = anew
            if chunk and step in handed:  # not if the first chunk was kept from an earlier call
                begin = Beginning(_first(goal, *chunks[chunk]), handed[step])
            found, left = self._measure(rows(step), goal, self._change(goal, chunks[chunk], given(step)), begin)
            if anew is not None and not chunk:
                handed.clear()
                handed[step] = left
            return found

        jobs = [(r, c) for r in self.steps for c in range(len(chunks))]
        if goal.kind == "prompt":
            jobs.sort(key=lambda job: job[1])  # the prompt is run once for all steps
        values = {}
        for r, c in jobs:
            values[r, c] = kept(f"{r}-{c}", functools.partial(one, r, c))
            done(1)
        found = np.stack([np.concatenate([values[r, c] for c in range(len(chunks))]) for r in self.steps])
        base_RB = found[:, 0]
        return found[:, acts] - base_RB[:, None], base_RB

    def _given(self, goal: Target, step: int) -> Any:
        """What is put in place, of every pair."""
        moment = self.donor.at(step)
        if goal.kind == "site":
            place = self.steps.index(step)
            row = place % self._at_once(goal)
            own = slice(row * self.pairs, (row + 1) * self.pairs)
            values = {name: x[own] for name, x in self.of_donor(goal, place - row)[1].items()}
        elif goal.kind == "prompt" and self._in_one_piece:
            values = self._prompt_of_donor(goal)
        else:
            values = donors.carried(goal, moment, self.bundle)
        return donors.put(self.source, goal, values, moment, self.bundle, self.seed)

    @functools.cached_property
    def of_donor(self) -> Callable[[Target, int], tuple[np.ndarray | None, dict[str, np.ndarray]]]:
        """`_unpatched` of the donor; the last call is kept."""
        return functools.lru_cache(1)(lambda goal, first: self._unpatched(goal, first, self.donor))

    def _at_once(self, goal: Target) -> int:
        """Steps of an unpatched run in one call: as rows, where a sweep has places."""
        count = len(self.chunks(goal)[0][0])
        size = sum(x.nbytes for x in self._nothing(goal).values())
        return min(count, max(1, READ // size)) if size else count

    @property
    def _prompt_length(self) -> int:
        """Tokens of the padded prompts."""
        return bucket(max(map(len, self.recipient.ids)))

    @property
    def _in_one_piece(self) -> bool:
        """Whether one pass runs the prompts; sites of several cannot be read."""
        return self._prompt_length <= PREFILL_CHUNK

    def _prompt_of_donor(self, goal: Target) -> dict[str, np.ndarray]:
        """What the donor has at sites of the prompt, [P, ...]."""
        places, _ = self.chunks(goal)[0]
        chunk = places, np.zeros(len(places), bool)
        return jax.device_get(self._prefilled(goal, chunk, self._nothing(goal), self.donor).sites)

    def _nothing(self, goal: Target) -> dict[str, np.ndarray]:
        """Zeros in place of what a run has at sites."""
        if goal.kind not in ("site", "prompt"):
            return {}
        model, entries = of(self.bundle), self.recipient.moment.cache.layers
        length = model.config.canvas_length if goal.kind == "site" else self._prompt_length
        slots = entries[goal.layers[0]].k.shape[2] + length if goal.layers else 0
        known = {"B": self.pairs, "T": length, "S": slots}
        shape = [known.get(size, size) for size in goal.shape]
        zero = np.zeros((), model.dtype if goal.dtype == "compute" else goal.dtype)
        return dict.fromkeys(goal.sites, np.broadcast_to(zero, shape))

    def _unpatched(self, goal: Target, first: int, run: Run) -> tuple[np.ndarray | None, dict[str, np.ndarray]]:
        """Of steps from number `first` on: the metric [m, P], if it is of a step; what is at the sites [m * P, ...]."""
        places, _ = self.chunks(goal)[0]
        steps = self.steps[first : first + self._at_once(goal)]
        args = ()
        if goal.kind != "prompt":
            given = self._nothing(goal) or self._given(goal, steps[0])
            args = goal, self._change(goal, (places, np.zeros(len(places), bool)), given), self._beginning(goal)
        found, _, seen = self._step(rows_of_all([run.at(step) for step in steps], len(places)), *args)
        return (found[: len(steps)] if self.effect == "step" else None), jax.device_get(seen)

    def _change(self, goal: Target, chunk: tuple[np.ndarray, np.ndarray], given: Any) -> Change:
        sizes = self._sizes(goal)
        whole = np.zeros(sizes["T"], bool)
        whole[self.index["P" if goal.kind in ("prompt", "cache") else "T"]] = True
        return change(goal, *chunk, given, sizes, whole)

    def _prefilled(self, goal: Target, chunk: tuple[np.ndarray, np.ndarray], given: Any, run: Run) -> Prefill:
        """A patched pass over the prompts: the cache [n * P, ...], and what comes to the sites before, [P, ...]."""
        model = of(self.bundle)
        if self._in_one_piece:
            model, _ = tapped(model, goal.sites, phase="prefill", reduce=FirstRows(self.pairs))
        room = max(map(len, run.ids)) + run.moment.num_blocks * model.config.canvas_length
        model = edited(goal, self._change(goal, chunk, given), model)
        return prefill_padded(model, run.ids * len(chunk[0]), room)

    def _beginning(self, goal: Target) -> Beginning | None:
        """All layers run, and say what they hand on; None where no later chunk could use that."""
        if goal.kind == "site" and goal.layers and len(self.chunks(goal)) > 1:
            return Beginning.anew(of(self.bundle), self.pairs)
        return None

    def _measure(self, moment: Moment, *change: Any) -> tuple[np.ndarray, list[jax.Array]]:
        """[n, P] the metric of the step that follows a moment of n * P rows, or of the text; what layers handed on."""
        found, left, _ = self._step(moment, *change)
        if self.effect == "text":
            state, cache = found
            out = dg.resume(self.bundle, moment.replace(state=state, cache=cache), record=dg.Record.nothing())
            found = self._of_text(out.tokens)
        return found, left

    def _step(
        self, moment: Moment, goal: Target | None = None, own: Change | None = None, begin: Beginning | None = None
    ) -> tuple[Any, list[jax.Array], dict[str, jax.Array]]:
        """[n, P] the metric of a step, or the state and the cache that a text goes on with; see `_changed`."""
        leaves, tree = self.flat_model
        args = (leaves, moment.state, moment.cache, moment.sampler, moment.pinned, own, begin)
        static = {"tree": tree, "goal": goal, "read": self.pairs * self._at_once(goal) if goal else 0}
        if self.effect == "step":
            found, left, seen = _metric(*args, as_data(self.metric), pairs=self.pairs, **static)
            return np.asarray(found, np.float32), left, seen
        state, cache, left, seen = _next(*args, **static)
        return (state, cache), left, seen

    def _of_text(self, tokens: np.ndarray) -> np.ndarray:
        """[n, P] of generated tokens [n * P, .]."""
        width = self.recipient.moment.num_blocks * of(self.bundle).config.canvas_length
        pad = self.recipient.moment.sampler.pad_token_id
        wide = np.pad(tokens, [(0, 0), (0, width - tokens.shape[1])], constant_values=pad)
        parts = np.split(wide, len(wide) // self.pairs)
        return np.stack([np.asarray(self.metric(part), np.float32) for part in parts])

    def plain(self, goal: Target, run: Run) -> np.ndarray:
        """[R, P] the metric of an unpatched run, by the program that patches; rows that ended count as at their end."""
        if self.effect == "text":
            return np.repeat(self._of_text(run.out.tokens), len(self.steps), 0)
        one = self.of_donor if run is self.donor else functools.partial(self._unpatched, run=run)
        return np.concatenate([one(goal, first)[0] for first in range(0, len(self.steps), self._at_once(goal))])


def _first(goal: Target, places: np.ndarray, acts: np.ndarray) -> jax.Array:
    """The first layer that has more to do than to hand on, changed or not."""
    return jnp.int32(places[acts, 0].min() + (goal.name == LAST_IN_LAYER))


@functools.partial(jax.jit, static_argnames=("tree", "goal", "pairs", "read"))
def _metric(leaves, state, cache, sampler, pinned, own, begin, metric, *, tree, goal, pairs, read):
    """[n, P] the metric of a patched step of n * P rows; what `_changed` tells."""
    model, state, cache, left, seen = _changed(tree.unflatten(leaves), state, cache, own, begin, goal, read)
    _, view = denoise_step(model, state, cache, sampler, pinned)
    return of_step(metric, model, view, len(view.hidden) // pairs), _in_order(left), seen


@functools.partial(jax.jit, static_argnames=("tree", "goal", "read"))
def _next(leaves, state, cache, sampler, pinned, own, begin, *, tree, goal, read):
    """The state after a patched step; the cache, changed if that is what was patched; what `_changed` tells."""
    model, state, cache, left, seen = _changed(tree.unflatten(leaves), state, cache, own, begin, goal, read)
    state, _ = denoise_step(model, state, cache, sampler, pinned)
    return state, cache, _in_order(left), seen


def _changed(model, state, cache, own, begin, goal, read) -> tuple[Any, State, KVCache, dict, dict]:
    """What goes into a patched step; and, once it is traced, what its layers hand on, by layer, and what comes to the
    target's sites before anything is taken, by name, of the first `read` rows."""
    left: dict[int, jax.Array] = {}
    seen: dict[str, jax.Array] = {}
    if goal is not None:

        def leave(name: str, x: jax.Array) -> None:
            seen[name] = x[:read]

        model, state, cache = changed(goal, own, model, state, cache, leave)
    if begin is not None:

        def at_end(layer: int, x: jax.Array) -> jax.Array:
            return own.take(goal.axes, layer, own.value)(x) if goal.name == LAST_IN_LAYER else x

        model, left = begun(model, begin, at_end, seen)
    return model, state, cache, left, seen


def _in_order(left: dict[int, jax.Array]) -> list[jax.Array]:
    return [left[layer] for layer in sorted(left)]


def rows_of(moment: Moment, count: int) -> Moment:
    """The moment with all its rows `count` times over."""
    return rows_of_all([moment], count)


def rows_of_all(moments: Sequence[Moment], count: int) -> Moment:
    """Moments of one run, all rows of one after all of another; the first again and again up to `count` of them."""
    device = ("state", "cache", "pinned")
    rows = _joined([{name: getattr(moment, name) for name in device} for moment in moments], count=count)
    every = [*moments, *[moments[0]] * (count - len(moments))]
    rows |= {n: np.concatenate([getattr(moment, n) for moment in every]) for n in ("history", "ended", "spent")}
    return dataclasses.replace(moments[0], prompts=moments[0].prompts * count, **rows)


@functools.partial(jax.jit, static_argnames="count")
def _joined(trees: list[Any], *, count: int) -> Any:
    """Arrays [B, ...] of each as [count * B, ...]."""
    if len(trees) == 1:
        return repeated(trees[0], count)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *trees, repeated(trees[0], count - len(trees)))


def _noise(found: list[np.ndarray]) -> np.ndarray | None:
    """[R, P] spread over seeds."""
    return None if not found else np.std(np.stack(found), 0, ddof=1 if len(found) > 1 else 0)
