"""What must hold between this package and a record of `transformers`: see `reference_cases.py`.

Every check takes a bundle that was loaded from the case's checkpoint, and the record. `CHECKS` lists them all; they
serve fresh records (`test_parity_live.py`) and the ones kept with the tests (`test_parity_recorded.py`).
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference_cases

import dgemma_jax as dg
from dgemma_jax.diffusion import generate as generation
from dgemma_jax.diffusion import noise, sampler
from dgemma_jax.diffusion.trajectory import StepView, StopReason
from dgemma_jax.nn import cache as kv

DIRECTORY = Path(__file__).parent / "data" / "reference"
TOLERANCE = 1e-4  # absolute, float32
TOKENS = dg.Record(accepted=False, entropy=False, top_k=0)  # with the argmax: what is compared
Kept = dict[str, np.ndarray]


def load_record(path: Path) -> Kept:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def part(kept: Kept, prefix: str) -> types.SimpleNamespace:
    """The arrays below a prefix, as attributes."""
    return types.SimpleNamespace(**{k.removeprefix(prefix): v for k, v in kept.items() if k.startswith(prefix)})


def close(ours: Any, theirs: np.ndarray, what: str, tolerance: float = TOLERANCE) -> None:
    ours = np.asarray(ours, np.float32)
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    if not theirs.size:
        return  # a step that only rows took which had ended: nobody reads it
    gap = np.abs(ours - theirs)
    worst = np.unravel_index(gap.argmax(), gap.shape)
    assert gap.max() <= tolerance, f"{what}: {gap.max():.2e} apart at {worst}, more than {tolerance:.0e}"


def equal(ours: Any, theirs: np.ndarray, what: str) -> None:
    differ = np.argwhere(np.asarray(ours) != theirs)
    assert not len(differ), f"{what}: {len(differ)} differ, first at {differ[0]}"


def prompts_of(kept: Kept) -> list[np.ndarray]:
    return [row[:length] for row, length in zip(kept["prompts"], kept["prompt_lengths"], strict=True)]


def placed(kept: Kept, where: str = "right", length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and valid [P, T]: the prompts with padding (any token) to the right, to the left, or strewn between.

    T is that of `generate`, so that they share a program, as they share the capacity of the cache.
    """
    prompts = prompts_of(kept)
    length = length or generation.bucket(max(map(len, prompts)))
    assert length > max(map(len, prompts))
    tokens, valid = np.full((len(prompts), length), 9), np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        slots = {
            "right": np.arange(len(prompt)),
            "left": np.arange(length - len(prompt), length),
            "between": np.sort(np.random.default_rng(row).permutation(length)[: len(prompt)]),
        }[where]
        tokens[row, slots], valid[row, slots] = prompt, True
    return tokens, valid


def prefilled(bundle: dg.Bundle, kept: Kept, where: str = "right", length: int | None = None, **options: Any) -> Any:
    tokens, valid = placed(kept, where, length)
    new = kept["run/max_new_tokens"].item() if "run/max_new_tokens" in kept else 2 * bundle.config.canvas_length
    capacity = generation.bucket(int(kept["prompt_lengths"].max()) + new)
    return dg.prefill(bundle, tokens, valid, cache_length=capacity, **options), valid


def unrolled(bundle: dg.Bundle, cache: kv.KVCache, row: int) -> dict[str, np.ndarray]:
    """Keys and values of a row by layer, [K, T, H], in the order of positions."""
    found = {}
    for number, entry in enumerate(cache.layers):
        positions = np.asarray(kv.slot_positions(cache.length, entry.k.shape[2]))[row]
        order = [slot for slot in np.argsort(positions) if positions[slot] >= 0]
        for name, array in (("k", entry.k), ("v", entry.v)):
            found[f"{number}/{name}"] = np.asarray(array)[row][:, order]
    return found


def _compare_caches(bundle: dg.Bundle, cache: kv.KVCache, kept: Kept, prefix: str) -> None:
    for row in range(len(kept["prompts"])):
        ours, theirs = unrolled(bundle, cache, row), vars(part(kept, f"{prefix}/{row}/"))
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            close(ours[name], array, f"{prefix}/{row}/{name}")


def causal_pass(bundle: dg.Bundle, kept: Kept) -> None:
    """A padded batch gives each prompt the hidden states, keys and values that it has alone."""
    for where in ("right", "left", "between"):
        out, valid = prefilled(bundle, kept, where)
        for row in range(len(valid)):
            close(np.asarray(out.hidden)[row][valid[row]], kept[f"hidden/{row}"], f"hidden of prompt {row}, {where}")
        _compare_caches(bundle, out.cache, kept, "cache")


def chunked_causal_pass(bundle: dg.Bundle, kept: Kept) -> None:
    """In pieces, too, as long as a block; some rows have nothing in the second piece."""
    chunk = bundle.config.canvas_length
    pieces = int(kept["prompt_lengths"].max()) // chunk + 1
    assert pieces > 1 and kept["prompt_lengths"].min() < chunk
    out, valid = prefilled(bundle, kept, length=pieces * chunk, chunk=chunk)
    for row in range(len(valid)):
        close(np.asarray(out.hidden)[row][valid[row]], kept[f"hidden/{row}"], f"hidden of prompt {row}")
    _compare_caches(bundle, out.cache, kept, "cache")


def appended_block(bundle: dg.Bundle, kept: Kept) -> None:
    """A block after prompts of unequal length, through the rings of the sliding layers."""
    out = dg.prefill(bundle, kept["block"], cache=prefilled(bundle, kept)[0].cache)
    for row in range(len(kept["block"])):
        close(np.asarray(out.hidden)[row], kept[f"hidden_block/{row}"], f"hidden of block {row}")
    _compare_caches(bundle, out.cache, kept, "cache_block")


def first_denoising_pass(bundle: dg.Bundle, kept: Kept) -> None:
    """Without self-conditioning."""
    close(dg.denoise(bundle, kept["canvas"], prefilled(bundle, kept)[0].cache), kept["logits_first"], "logits")


def soft_embedding(bundle: dg.Bundle, kept: Kept) -> None:
    """S from given logits."""
    close(dg.soft_embed(bundle, kept["given"]), kept["soft"], "S")


def self_conditioned_pass(bundle: dg.Bundle, kept: Kept) -> None:
    """With self-conditioning."""
    soft = dg.soft_embed(bundle, kept["given"])
    close(dg.denoise(bundle, kept["canvas"], prefilled(bundle, kept)[0].cache, soft), kept["logits_next"], "logits")


def every_form_of_the_experts(bundle: dg.Bundle, kept: Kept) -> None:
    """One expert at a time, in blocks: the logits of the dense form, which so few experts get by themselves."""
    cache, soft = prefilled(bundle, kept)[0].cache, dg.soft_embed(bundle, kept["given"])
    for form in ("scan", "blocks"):
        model = jax.tree.map(lambda x: x, bundle.model)  # a copy of the nodes, not of the arrays
        model.moe = form
        close(dg.denoise(model, kept["canvas"], cache, soft), kept["logits_next"], f"logits, {form}")


def replayed_steps(bundle: dg.Bundle, kept: Kept) -> None:
    """Every step of a recorded run: same input, then same logits, entropies, choices, stop tests and tokens."""
    run, settings = part(kept, "replay/"), bundle.sampler
    rows, length = run.canvas.shape[1:]
    cache, ended = prefilled(bundle, kept)[0].cache, np.zeros(rows, bool)
    moment = types.SimpleNamespace(history=np.zeros((rows, 0), np.int32), ended=ended, sampler=settings)
    for block in range(run.block.max() + 1):
        state = sampler.start(
            noise.row_keys(np.zeros(rows)), jnp.full(rows, block), jnp.asarray(ended), length, bundle.model
        )
        steps = np.flatnonzero(run.block == block)
        for number, n in enumerate(steps):
            going = ~ended
            live = going & ~run.frozen[n]
            equal(np.asarray(state.done)[going], run.frozen[n][going], f"rows done before step {n}")
            if number:
                given = run.logits[n - 1] / run.temperature[n - 1]
                state = state.replace(soft=dg.soft_embed(bundle, given))
            state = state.replace(canvas=jnp.asarray(run.canvas[n], jnp.int32))
            state = _replayed_step(bundle, state, cache, run, n, live)
            converged = np.asarray(state.stop) == StopReason.CONVERGED  # at the cap, theirs are not marked as finished
            equal(converged[going], run.finished[n][going], f"rows converged after step {n}")
            equal(np.asarray(state.argmax)[going], run.argmax[n][going], f"argmax after step {n}")
            equal(np.asarray(state.canvas)[going], run.next_canvas[n][going], f"canvas after step {n}")
            assert number == settings.max_denoising_steps - run.remaining[n]
        committed = run.argmax[steps[-1]].astype(np.int32)
        moment.history, moment.ended = generation.commit(moment, committed)
        equal(moment.history, run.sequences[:, : moment.history.shape[1]], f"tokens up to block {block}")
        ended = moment.ended
        cache = dg.prefill(bundle, committed, np.broadcast_to(~ended[:, None], committed.shape), cache).cache
    assert moment.history.shape == run.sequences.shape


def _replayed_step(
    bundle: dg.Bundle, state: sampler.State, cache: kv.KVCache, run: types.SimpleNamespace, n: int, live: np.ndarray
) -> sampler.State:
    settings = bundle.sampler
    logits = dg.denoise(bundle, state.canvas, cache, state.soft)
    close(np.asarray(logits)[live], run.logits[n][live], f"logits of step {n}")
    temperature, entropy, accepted, after = _judged(state, logits, run.sample[n], run.fresh[n], settings)
    close(np.asarray(temperature)[live], np.full(live.sum(), run.temperature[n]), f"temperature of step {n}", 1e-6)
    close(np.asarray(entropy)[live], run.entropy[n][live], f"entropy of step {n}")
    equal(np.asarray(accepted)[live], run.accepted[n][live], f"accepted in step {n}")
    return after


@jax.jit
def _judged(
    state: sampler.State, logits: jax.Array, sample: jax.Array, fresh: jax.Array, settings: dg.SamplerConfig
) -> tuple[jax.Array, jax.Array, jax.Array, sampler.State]:
    """Temperature, entropy, accepted positions and the state after a step with these logits and random tokens."""
    temperature = noise.temperature(state.step, settings)
    shaped = logits / temperature[:, None, None]
    entropy, argmax = dg.diffusion.token_entropy(shaped), jnp.argmax(shaped, -1).astype(jnp.int32)
    accepted = dg.diffusion.accept(entropy, settings.entropy_bound)
    next_canvas = jnp.where(accepted, sample, fresh).astype(jnp.int32)
    view = StepView(
        state.step, state.block, state.canvas, state.soft, logits, shaped, argmax, sample, entropy, accepted,
        next_canvas, state.soft,
    )  # fmt: skip
    return temperature, entropy, accepted, sampler.advance(state, view, settings)


def random_numbers(bundle: dg.Bundle, kept: Kept) -> None:
    """The bits that `whole_generation` rests on; they belong to JAX's flag `jax_threefry_partitionable`."""
    run = part(kept, "run/")
    keys = noise.row_keys(run.seeds)
    rows, length = run.uniform.shape[1:]
    first = np.flatnonzero(run.block == 0)[0]
    split = jax.vmap(jax.random.split)(noise.moment_keys(keys, jnp.zeros(rows, int), jnp.ones(rows, int)))
    uniform = jax.vmap(lambda k: jax.random.uniform(k, (length,)))(split[:, 0])
    equal(uniform, run.uniform[first], "uniform numbers of the first step: JAX draws other bits than were recorded")
    fresh = noise.uniform_canvas(split[:, 1], length, bundle.config.vocab_size)
    equal(fresh, run.fresh[first], "fresh tokens of the first step: JAX draws other bits than were recorded")


def whole_generation(bundle: dg.Bundle, kept: Kept) -> None:
    """`generate` end to end under the same random numbers: tokens, steps, tokens a forward, every canvas."""
    run = part(kept, "run/")
    rows, length = run.argmax.shape[1:]
    ids = [prompt.tolist() for prompt in prompts_of(kept)]
    out = dg.generate(bundle, ids, seed=run.seeds.tolist(), max_new_tokens=run.max_new_tokens.item(), record=TOKENS)
    equal(out.tokens, run.sequences, "tokens")
    close(out.tokens_per_forward, run.tokens_per_forward, "tokens per forward", 1e-5)
    ended = np.zeros(rows, bool)
    for block in range(run.block.max() + 1):
        steps = run.block == block
        live = ~run.frozen[steps] & ~ended
        equal(out.trajectory.num_steps[block], live.sum(0), f"steps of block {block}")
        for name, theirs in (("tokens", run.next_canvas), ("argmax", run.argmax)):
            ours = getattr(out.trajectory, name)[block][: len(live)]
            equal(ours[live], theirs[steps][live], f"{name} after the steps of block {block}")
        tokens = run.sequences[:, block * length : (block + 1) * length]
        ended = ended | np.isin(tokens, bundle.sampler.eos_token_ids).any(1)
    assert out.stop_reason == ["eos" if e else "max_new_tokens" for e in ended]


def bfloat16_passes(bundle: dg.Bundle, kept: Kept) -> None:
    """Rounding to bfloat16 costs no more than it costs `transformers` itself.

    Its own loss is the distance of its bfloat16 logits from its float32 logits on the same rounded weights. Ours may
    be 1.5 times as far from either, in the root mean square and at most: two ways of rounding that are independent
    and equally good lie sqrt(2) times one loss apart; the rest is for the small sample.
    """
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), bundle.model)
    cache = prefilled(bundle.with_model(low), kept)[0].cache
    assert all(entry.k.dtype == jnp.bfloat16 for entry in cache.layers)
    drawn = reference_cases.turned(kept, len(kept["bfloat16/low/logits_first"]))
    passes = {
        "logits_first": [dg.denoise(low, canvas, cache) for canvas, _ in drawn],
        "logits_next": [dg.denoise(low, canvas, cache, dg.soft_embed(low, logits)) for canvas, logits in drawn],
    }
    for name, found in passes.items():
        ours, theirs, exact = np.stack(found), kept[f"bfloat16/low/{name}"], kept[f"bfloat16/high/{name}"]
        for reference, what in ((theirs, "bfloat16"), (exact, "float32")):
            for size, of in ((lambda x: np.sqrt(np.mean(x * x)), "rms"), (lambda x: np.abs(x).max(), "largest")):
                ratio = size(ours - reference) / size(theirs - exact)
                assert ratio <= 1.5, f"{name}: {of} distance from {what} logits is {ratio:.2f} of their own loss"


CHECKS = (
    causal_pass,
    chunked_causal_pass,
    appended_block,
    first_denoising_pass,
    soft_embedding,
    self_conditioned_pass,
    every_form_of_the_experts,
    replayed_steps,
    random_numbers,
    whole_generation,
    bfloat16_passes,
)
