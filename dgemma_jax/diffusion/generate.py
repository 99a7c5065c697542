"""Generation: prefill, then block after block of denoising. A thin loop in Python around compiled programs.

    prompts -> ids -> prefill -> [denoise a block -> commit -> append to the cache] * blocks -> texts

A row's tokens depend on its prompt and its seed alone, not on the batch it is in.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax import memory
from dgemma_jax.config import ModelConfig, SamplerConfig
from dgemma_jax.diffusion import loop, noise
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.diffusion import sampler as sampling
from dgemma_jax.diffusion.moment import Moment
from dgemma_jax.diffusion.trajectory import Record, Trajectory
from dgemma_jax.nn import functional, meshes
from dgemma_jax.nn.cache import KVCache
from dgemma_jax.nn.transformer import Prefill

PREFILL_CHUNK = 2048  # prompt tokens per causal pass: bounds the memory of attention scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What `generate` gives.

    Attributes:
        texts: answers, without special tokens; None for a row if the model has no tokenizer.
        tokens: [B, J * C] generated ids, padding after the end token.
        prompt_tokens: ids of each prompt.
        trajectory: the record of the run.
        num_steps: [B] denoising steps taken, all blocks.
        stop_reason: per row "eos" or "max_new_tokens".
        tokens_per_forward: [B] generated tokens that are not padding, per denoising step.
        sampler: settings used.
        seeds: [B].
    """

    texts: list[str | None]
    tokens: np.ndarray
    prompt_tokens: list[list[int]]
    trajectory: Trajectory
    num_steps: np.ndarray
    stop_reason: list[str]
    tokens_per_forward: np.ndarray
    sampler: SamplerConfig
    seeds: list[int]

    def save(self, path: str | Path) -> Path:
        """Write everything to one `.npz` file (`Record.fn` results must be arrays or dictionaries of arrays)."""
        path = _npz(path)
        about = {
            "texts": self.texts, "prompt_tokens": self.prompt_tokens, "stop_reason": self.stop_reason,
            "seeds": self.seeds, "sampler": dataclasses.asdict(self.sampler),
        }  # fmt: skip
        arrays = {"tokens": self.tokens, "num_steps": self.num_steps, "tokens_per_forward": self.tokens_per_forward}
        arrays |= {f"trajectory/{name}": array for name, array in self.trajectory.arrays().items()}
        np.savez_compressed(path, about=np.array(json.dumps(about)), **arrays)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Generation:
        """Read what `save` wrote. `trajectory.moment` of it needs the model as an argument."""
        with np.load(_npz(path)) as file:
            arrays = {k: file[k] for k in file.files}
        about = json.loads(str(arrays.pop("about")))
        settings = about.pop("sampler")
        sampler = SamplerConfig(**settings | {"eos_token_ids": tuple(settings["eos_token_ids"])})
        own = {k: arrays[k] for k in ("tokens", "num_steps", "tokens_per_forward")}
        record = {k.removeprefix("trajectory/"): v for k, v in arrays.items() if k.startswith("trajectory/")}
        return cls(trajectory=Trajectory.from_arrays(record), sampler=sampler, **about, **own)


def _npz(path: str | Path) -> Path:
    """`path` with `.npz` added if need be; "t0.8" keeps its dot."""
    path = Path(path)
    return path if path.suffix == ".npz" else path.with_name(f"{path.name}.npz")


@dataclasses.dataclass(frozen=True)
class Draft:
    """What a callback is given after every few steps: arrays [B, C], as in `Trajectory`; numpy.

    Attributes:
        block, step: counted from 0; `step` is the last one taken.
        tokens, argmax: canvas after the step, most likely tokens.
        accepted, entropy: None if the record leaves them out.
        done: [B] bool.
    """

    block: int
    step: int
    tokens: np.ndarray
    argmax: np.ndarray
    accepted: np.ndarray | None
    entropy: np.ndarray | None
    done: np.ndarray


def generate(
    bundle: Any, prompts: Any, seed: int | Sequence[int] = 0, sampler: SamplerConfig | None = None,
    max_new_tokens: int = 256, record: Record | None = None, *, canvas: Any = None, pinned: Any = None,
    soft: Any = None, callback: Callable[[Draft], None] | None = None, callback_every: int = 1,
    thinking: bool = False,
) -> Generation:  # fmt: skip
    """Generate answers to one prompt or a batch of prompts.

    Args:
        bundle: a bundle, or a model (then prompts must be ids).
        prompts: a text, a chat (list of {"role", "content"}), ids, or a list or array of any one of these. A
            text is taken as one user turn; ids are taken as they are.
        seed: one for all rows, or one a row. Equal prompts with equal seeds give equal texts.
        sampler: settings; by default the bundle's.
        max_new_tokens: rounded up to whole blocks of `canvas_length`, as in `transformers`.
        record: what the trajectory keeps; by default `Record()`.
        canvas: [C] or [B, C] ids that start the first block; by default uniform noise.
        pinned: [C] or [B, C] bool, positions of `canvas` that never change (infill). Their entropy is 0.
        soft: [C, D] or [B, C, D], S for the first step of the first block; by default zeros.
        callback: called with a `Draft` after every `callback_every` steps.
        thinking: let the chat template open the thinking channel.

    Raises:
        ValueError: before any work, for an empty prompt, ids outside the vocabulary, more tokens than the
            context holds, arrays of a wrong shape, non-finite weights, too little memory.
    """
    run = begin(bundle, prompts, seed, sampler, max_new_tokens, record, canvas, pinned, soft, thinking, callback_every)
    return run_to_end(run, callback, callback_every)


def generate_python(bundle: Any, prompts: Any, seed: int | Sequence[int] = 0, sampler: SamplerConfig | None = None,
                    max_new_tokens: int = 256, record: Record | None = None, *, canvas: Any = None, pinned: Any = None,
                    soft: Any = None, callback: Callable[[Draft], None] | None = None, callback_every: int = 1,
                    thinking: bool = False) -> Generation:  # fmt: skip
    """`generate` with the loop over steps in Python: the same steps, tokens and trajectory; slower, easier to read."""
    args = (bundle, prompts, seed, sampler, max_new_tokens, record, canvas, pinned, soft, thinking, callback_every)
    return run_to_end(begin(*args, Programs(denoise=loop.python)), callback, callback_every)


def resume(
    bundle: Any, moment: Moment, sampler: SamplerConfig | None = None, record: Record | None = None, *,
    callback: Callable[[Draft], None] | None = None, callback_every: int = 1,
) -> Generation:  # fmt: skip
    """Go on from a moment to the end of the run, under the same keys.

    A moment of a run, resumed with the same model and sampler, gives the run's own tokens. The trajectory holds
    the steps from the moment on; earlier ones are marked not valid.
    """
    _check_every(callback_every)
    model, tokenizer, _ = inputs.parts(bundle)
    settings = moment.sampler if sampler is None else sampler
    if moment.step >= settings.max_denoising_steps and not bool(moment.state.done.all()):
        raise ValueError(
            f"the moment is at step {moment.step}; max_denoising_steps={settings.max_denoising_steps} ends before"
        )
    shape = (*moment.canvas.shape, model.config.embed_dim)
    if moment.soft.shape != shape:
        raise ValueError(
            f"the moment's S has shape {moment.soft.shape}, this model needs {shape}: is it of another model?"
        )
    seeds = [-1] * moment.canvas.shape[0]  # unknown here; the keys are in the moment
    run = Run(model, tokenizer, moment.replace(sampler=settings), record or Record(), seeds)
    return run_to_end(run, callback, callback_every)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run about to begin or to go on: the model, where it stands, and what to keep."""

    model: Any
    tokenizer: Any
    moment: Moment
    record: Record
    seeds: list[int]
    programs: Programs = dataclasses.field(default_factory=lambda: Programs())


def begin(
    bundle, prompts, seed, sampler, max_new_tokens, record, canvas, pinned, soft, thinking, every, programs=None
) -> Run:
    """Check everything, run the prompt through the model and stand before the first step."""
    programs = Programs() if programs is None else programs
    model, tokenizer, default = inputs.parts(bundle)
    sampler = default if sampler is None else sampler
    config, length = model.config, model.config.canvas_length
    ids = inputs.to_ids(prompts, tokenizer, config.vocab_size, thinking)
    seeds = inputs.to_seeds(seed, len(ids))
    num_blocks = blocks_for(max(map(len, ids)), max_new_tokens, config)
    if record is not None:
        check_record(record, config.vocab_size, sampler)
    _check_every(every)
    rows = len(ids)
    canvas = inputs.rows_of("canvas", canvas, (rows, length), np.int32)
    pinned = inputs.rows_of("pinned", pinned, (rows, length), bool)
    soft = inputs.rows_of("soft", soft, (rows, length, config.embed_dim), None)
    if pinned is not None and canvas is None:
        raise ValueError("pinned says which positions of canvas stay; give canvas too")
    if canvas is not None:
        functional.check_tokens(canvas, config.vocab_size, "canvas")
    memory.check_generate(model, rows, bucket(max(map(len, ids)) + num_blocks * length))
    if hasattr(bundle, "check_finite"):
        bundle.check_finite()

    cache = programs.prefill(model, ids, num_blocks)
    state = sampling.start(
        noise.row_keys(np.array(seeds)), np.zeros(rows, np.int32), np.zeros(rows, bool), length, model
    )
    if canvas is not None:
        state = state.replace(canvas=jnp.asarray(canvas))
    if soft is not None:
        state = state.replace(soft=jnp.asarray(soft, model.dtype))
    moment = Moment(
        state=state, cache=cache, pinned=None if pinned is None else jnp.asarray(pinned),
        history=np.zeros((rows, 0), np.int32), ended=np.zeros(rows, bool), spent=np.zeros(rows, np.int32),
        sampler=sampler, num_blocks=num_blocks, prompts=tuple(map(tuple, ids)),
    )  # fmt: skip
    return Run(model, tokenizer, moment, Record() if record is None else record, seeds, programs)


def blocks_for(prompt_length: int, max_new_tokens: int, config: ModelConfig) -> int:
    """Whole blocks for so many new tokens, or a ValueError where there is no room for them behind the prompt."""
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer >= 1, got {max_new_tokens!r}")
    length = config.canvas_length
    num_blocks = -(-max_new_tokens // length)
    longest = prompt_length + num_blocks * length
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"a prompt of {prompt_length} tokens and {num_blocks} blocks of {length} make {longest}; the context "
            f"is {config.max_position_embeddings}: shorten the prompt or lower max_new_tokens"
        )
    return num_blocks


def check_record(record: Record, vocab_size: int, sampler: SamplerConfig) -> None:
    """A ValueError for a record of more candidates or later steps than there are."""
    if record.top_k > vocab_size:
        raise ValueError(f"top_k={record.top_k} exceeds the vocabulary of {vocab_size}")
    kept, total = record.site_steps or (0,), sampler.max_denoising_steps
    if kept[-1] >= total:
        raise ValueError(f"site_steps has step {kept[-1]}; max_denoising_steps={total} makes steps 0..{total - 1}")


def _check_every(every: int) -> None:
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"callback_every must be an integer >= 1, got {every!r}")


def bucket(length: int) -> int:
    """`length` rounded up to one of few sizes, at most a quarter more, so that few programs are compiled."""
    grain = max(16, 1 << max(0, length.bit_length() - 3))
    return -(-length // grain) * grain


def prefill_prompts(model: Any, ids: Sequence[Sequence[int]], num_blocks: int) -> KVCache:
    """The cache after the prompts, with room for `num_blocks` more blocks."""
    return prefill_padded(model, ids, max(map(len, ids)) + num_blocks * model.config.canvas_length).cache


def prefill_padded(model: Any, ids: Sequence[Sequence[int]], capacity: int) -> Prefill:
    """The causal pass over the prompts, rows padded on the right, with room for `capacity` tokens at least."""
    padded = bucket(max(map(len, ids)))
    tokens, valid = np.zeros((len(ids), padded), np.int32), np.zeros((len(ids), padded), bool)
    for row, prompt in enumerate(ids):
        tokens[row, : len(prompt)], valid[row, : len(prompt)] = prompt, True
    return functional.prefill(model, tokens, valid, cache_length=bucket(capacity), chunk=PREFILL_CHUNK)


def append_block(model: Any, tokens: np.ndarray, valid: np.ndarray, cache: KVCache) -> KVCache:
    """The cache with a committed block [B, C] added."""
    return functional.prefill(model, tokens, valid, cache).cache


@dataclasses.dataclass(frozen=True)
class Programs:
    """What computes a run: by default the functions of this package, compiled when first called.

    Attributes:
        prefill: as `prefill_prompts`.
        buffers, denoise: as `loop.empty_buffers` and `loop.compiled`.
        append: as `append_block`.
    """

    prefill: Callable = prefill_prompts
    buffers: Callable = loop.empty_buffers
    denoise: Callable = loop.compiled
    append: Callable = append_block


def run_to_end(run: Run, callback: Callable[[Draft], None] | None, every: int) -> Generation:
    """Denoise the block at hand and those after it, until every row has ended."""
    moment, blocks = run.moment, []
    check_record(run.record, run.model.config.vocab_size, moment.sampler)
    while True:
        first = meshes.to_host(moment.canvas)
        shapes = (run.model, moment.state, moment.cache, moment.sampler, moment.pinned, run.record)
        draft = None if callback is None else functools.partial(_draft, callback, moment.block)
        state, buffers = run.programs.denoise(
            run.model, moment.state, moment.cache, run.programs.buffers(*shapes), moment.sampler, moment.pinned,
            run.record, first=moment.step, limit=moment.sampler.max_denoising_steps, draft=draft, every=every,
        )  # fmt: skip
        last = state.canvas if moment.sampler.commit == "canvas" else state.argmax
        committed, steps, stop = meshes.to_host((last, state.step, state.stop))
        committed = np.where(moment.ended[:, None], 0, committed)  # a row that had ended took no step
        blocks.append((first, loop.fetched(buffers), committed, steps, stop))
        history, ended = commit(moment, committed)
        spent = moment.spent + steps
        number = moment.block + 1
        if ended.all() or number >= moment.num_blocks:
            break
        moment = _next_block(run.model, moment, state, committed, history, ended, spent, run.programs.append)
    return finish(run, blocks, history, ended, spent)


def _draft(
    callback: Callable[[Draft], None], block: int, state: sampling.State, buffers: loop.Buffers, step: int
) -> None:
    kept = {k: buffers[k][step] if k in buffers else None for k in ("accepted", "entropy")}
    shown = {"tokens": state.canvas, "argmax": state.argmax, "done": state.done}
    callback(Draft(block, step, **meshes.to_host(shown | kept)))


def commit(moment: Moment, committed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """History with the block added, and which rows have ended. What follows an end token becomes padding."""
    is_end = _is_end(committed, moment.sampler)
    after_end = (np.cumsum(is_end, 1) - is_end) > 0
    shown = np.where(after_end | moment.ended[:, None], moment.sampler.pad_token_id, committed)
    return np.concatenate([moment.history, shown], 1), moment.ended | is_end.any(1)


def _next_block(model, moment, state, committed, history, ended, spent, append=append_block) -> Moment:
    """The moment before the first step of the next block: the committed block is appended to the cache."""
    valid = np.broadcast_to(~ended[:, None], committed.shape)
    cache = append(model, committed, valid, moment.cache)
    block = np.full(ended.shape, moment.block + 1, np.int32)
    fresh = sampling.start(state.keys, block, ended, committed.shape[1], model)
    return dataclasses.replace(
        moment, state=fresh, cache=cache, pinned=None, history=history, ended=ended, spent=spent
    )  # fmt: skip


def finish(run: Run, blocks: list, history: np.ndarray, ended: np.ndarray, spent: np.ndarray) -> Generation:
    moment, tokenizer = run.moment, run.tokenizer
    texts = (
        [None] * len(history)
        if tokenizer is None
        else [tokenizer.decode(_visible(row, moment.sampler)) for row in history]
    )
    real = (history != moment.sampler.pad_token_id).sum(1)
    trajectory = _trajectory(run, blocks, history.shape[1] // blocks[0][0].shape[1])
    return Generation(
        texts=texts,
        tokens=history,
        prompt_tokens=[list(p) for p in moment.prompts],
        trajectory=trajectory,
        num_steps=spent,
        stop_reason=["eos" if e else "max_new_tokens" for e in ended],
        tokens_per_forward=real / np.maximum(spent, 1),
        sampler=moment.sampler,
        seeds=run.seeds,
    )


def _visible(row: np.ndarray, sampler: SamplerConfig) -> list[int]:
    """The row up to its end token."""
    ends = np.flatnonzero(_is_end(row, sampler))
    return row[: ends[0] if len(ends) else len(row)].tolist()


def _is_end(tokens: np.ndarray, sampler: SamplerConfig) -> np.ndarray:
    """Whether each token ends an answer. There are few that do: `np.isin`, which sorts, takes four times as long."""
    return (tokens[..., None] == np.array(sampler.eos_token_ids, int)).any(-1)


def _trajectory(run: Run, blocks: list, num_blocks: int) -> Trajectory:
    """Stack the blocks; blocks before the moment the run began at are there, not valid."""
    missing = num_blocks - len(blocks)
    rows, length = blocks[0][0].shape

    def stack(arrays: list[np.ndarray]) -> np.ndarray:
        arrays = [np.zeros_like(arrays[0])] * missing + arrays
        return np.stack(arrays) if len(arrays) > 1 else arrays[0][None]  # captures may be large: no copy

    buffers = jax.tree.map(lambda *a: stack(list(a)), *[b[1] for b in blocks])
    committed = np.array(stack([b[2] for b in blocks]))
    committed[:missing] = run.moment.history.reshape(rows, missing, length).swapaxes(0, 1)
    names = ("tokens", "argmax", "accepted", "entropy", "top_ids", "top_probs", "soft", "fn", "sites")
    return Trajectory(
        start=stack([b[0] for b in blocks]),
        **{n: buffers.get(n) for n in names},
        temperature=buffers["temperature"],
        valid=buffers["valid"],
        committed=committed,
        num_steps=stack([b[3] for b in blocks]),
        stop=stack([b[4] for b in blocks]),
        site_steps=buffers["site_steps"][-1] if "sites" in buffers else None,
        replay=Replay(run),
    )


_QUIET = Record.nothing()


@dataclasses.dataclass(frozen=True)
class Replay:
    """Recomputes any moment of a run from where the run began, by the same programs: exact, and free to keep."""

    run: Run

    def __call__(self, trajectory: Trajectory, block: int, step: int, model: Any = None) -> Moment:
        """The moment before `step` of `block`."""
        model = self.run.model if model is None else functional.of(model)
        moment = self.run.moment
        while moment.block < block:
            committed = trajectory.committed[moment.block]
            history, ended = commit(moment, committed)
            spent = moment.spent + trajectory.num_steps[moment.block]
            moment = _next_block(model, moment, moment.state, committed, history, ended, spent)
        return self.onward(moment, step, model)

    def onward(self, moment: Moment, step: int, model: Any = None) -> Moment:
        """The moment before a later step of the same block."""
        model = self.run.model if model is None else functional.of(model)
        args = moment.sampler, moment.pinned, _QUIET
        state, _ = loop.compiled(
            model, moment.state, moment.cache, self._buffers, *args, first=moment.step, limit=step
        )  # fmt: skip
        return dataclasses.replace(moment, state=state)

    @functools.cached_property
    def _buffers(self) -> loop.Buffers:
        """Of a record that keeps nothing: alike in all blocks."""
        moment = self.run.moment
        return loop.empty_buffers(self.run.model, moment.state, moment.cache, moment.sampler, moment.pinned, _QUIET)
