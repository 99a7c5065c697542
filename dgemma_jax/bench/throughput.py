"""Many prompts of mixed lengths, against Hugging Face `transformers` with the same weights, on CPU.

    python -m dgemma_jax.bench.throughput [--model medium|nano|tiny] [--prompts 256] [--save]

needs the `parity` extra. This package runs `dg.stream`: a row that has finished takes the next prompt. `transformers`
runs batches, sorted by length and padded on the left to the longest of each: every block lasts as long as its slowest
row, every batch as long as its longest answer, and rows that have ended are denoised until the others have. Of several
sizes of its batches the fastest is the peer; batches of one wait for nobody. Where all of them would take hours, it
answers some, evenly drawn (`--peer-prompts`).

`medium` has the sizes of `dgemma_jax.bench.peer` and random weights. Its final norm is scaled until the entropy falls
over the steps as that of a trained model does, so that the adaptive stop ends blocks at steps that differ (by little:
random rows are much alike); a set of end tokens ends two answers in five with each block. `nano` is the embedded model
on its own tasks. Both sides have the same prompts and settings, and random numbers of their own, so that what they had
to do differs by chance: the table says how many steps of a row were needed, how many were computed (rows that waited
count), and the time of a needed one. Times are those of a prompt, a whole job's by how many it answered, without the
compilation, which a first job of a single step a block causes. Where a machine has other work to do, processor time
says more than time; both are printed.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from dgemma_jax.bench import peer, report

GOAL = 1 / 3  # of the time of the peer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done, for either side.

    Attributes:
        model: of `transformers`; bundle: the same weights here.
        prompts: ids.
        blocks: most blocks of an answer.
        steps, confidence, stability, ends: settings of the sampler.
    """

    model: Any
    bundle: Any
    prompts: list[list[int]]
    blocks: int
    steps: int
    confidence: float
    stability: int
    ends: tuple[int, ...]

    @property
    def new_tokens(self) -> int:
        return self.blocks * self.bundle.config.canvas_length


@dataclasses.dataclass
class Done:
    """What a run did: prompts answered, rows times steps that were needed and that were computed, tokens that are not
    padding.

    `stops` counts blocks by their steps (ours alone).
    """

    prompts: int = 0
    needed: int = 0
    computed: int = 0
    tokens: int = 0
    processor_seconds: float = 0.0
    stops: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def random_job(sizes: peer.Sizes, count: int, blocks: int, longest: int, seed: int = 0) -> Job:
    """Random weights; lengths from 16 (or less) to `longest`, evenly on a logarithmic scale."""
    torch = peer.peer_package("torch")
    model = peer.random_peer(sizes, seed)
    with torch.no_grad():
        model.model.encoder.language_model.norm.weight.fill_(3.0)
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.uniform(np.log(min(16, longest)), np.log(longest), count)).astype(int)
    ends = rng.choice(np.arange(3, sizes.vocab_size), max(1, sizes.vocab_size // (2 * sizes.canvas_length)), False)
    prompts = [rng.integers(3, sizes.vocab_size, n).tolist() for n in lengths]
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        bundle = _loaded(directory)
    return Job(
        model=model, bundle=bundle, prompts=prompts, blocks=blocks, steps=sizes.steps, confidence=2.5, stability=0,
        ends=tuple(map(int, ends)),
    )  # fmt: skip


def nano_job(count: int) -> Job:
    """The embedded model, its tasks and its own settings."""
    transformers, torch = peer.peer_package("transformers"), peer.peer_package("torch")
    from dgemma_jax.train.tasks import examples
    from dgemma_jax.weights import registry

    path = registry.embedded("nano")
    bundle = _loaded(path)
    prompts = [bundle.tokenizer.chat([{"role": "user", "content": e.prompt}]) for e in examples(0, count)]
    own = bundle.sampler
    return Job(
        model=transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(path, dtype=torch.float32).eval(),
        bundle=bundle, prompts=prompts, blocks=1, steps=own.max_denoising_steps, confidence=own.confidence_threshold,
        stability=own.stability_threshold, ends=own.eos_token_ids,
    )  # fmt: skip


def _loaded(path: Any) -> Any:
    from dgemma_jax.bundle import load

    return load(path, dtype="float32")


def ours(job: Job, rows: int, done: Done, warm: bool = False) -> None:
    """All prompts by `dg.stream`."""
    from dgemma_jax.config import SamplerConfig
    from dgemma_jax.diffusion import loop
    from dgemma_jax.diffusion.stream import stream
    from dgemma_jax.diffusion.trajectory import Record

    sampler = SamplerConfig(
        max_denoising_steps=job.steps, confidence_threshold=1e9 if warm else job.confidence,
        stability_threshold=job.stability, eos_token_ids=job.ends, pad_token_id=0,
    )  # fmt: skip
    some, spans = loop.some, []

    def counted(*args: Any, **options: Any) -> Any:
        out = some(*args, **options)
        spans.append((out[0], out[1].done.shape[0]))  # not waited for here
        return out

    with mock.patch.object(loop, "some", counted):
        for _, one in stream(job.bundle, job.prompts, 0, sampler, job.new_tokens, Record.nothing(), rows=rows):
            done.prompts += 1
            done.needed += int(one.num_steps[0])
            done.tokens += int((one.tokens != 0).sum())
            done.stops.update(one.trajectory.num_steps[:, 0].tolist())
    done.computed += sum(int(taken) * count for taken, count in spans)


def drawn(batches: list[Any], count: int) -> list[Any]:
    """So many of them, from the middles of as many equal parts."""
    return [batches[int((i + 0.5) * len(batches) / count)] for i in range(count)]


def theirs(job: Job, rows: int, experts: str, answered: int, done: Done, warm: bool = False) -> None:
    """About `answered` prompts by `transformers`, batch after batch."""
    torch, model = peer.peer_package("torch"), job.model
    module = peer.importlib.import_module("transformers.models.diffusion_gemma.generation_diffusion_gemma")
    settings = module.DiffusionGemmaGenerationConfig(
        max_denoising_steps=job.steps, confidence_threshold=1e9 if warm else job.confidence,
        stability_threshold=job.stability, t_max=0.8, t_min=0.4,
        sampler_config=module.EntropyBoundSamplerConfig(entropy_bound=0.1), eos_token_id=list(job.ends),
        pad_token_id=0,
    )  # fmt: skip
    model.set_experts_implementation(experts)
    step = model._denoising_step

    def counted(**options: Any) -> Any:
        done.computed += options["current_canvas"].shape[0]
        return step(**options)

    prompts = sorted(job.prompts, key=len)
    batches = [prompts[at : at + rows] for at in range(0, len(prompts), rows)]
    batches = batches[-1:] if warm else drawn(batches, -(-min(answered, len(prompts)) // rows))
    with mock.patch.object(model, "_denoising_step", counted), torch.no_grad():
        for ids in batches:
            longest = max(map(len, ids))
            tokens = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
            out = model.generate(
                tokens, attention_mask=mask, generation_config=settings, max_new_tokens=job.new_tokens
            )
            own = (out.sequences[:, longest:] != 0).sum(-1)
            done.prompts += len(ids)
            done.needed += round(float((own / out.tokens_per_forward).sum()))
            done.tokens += int(own.sum())


def fastest_experts(job: Job) -> str:
    """The implementation of the peer's experts that takes least processor time for a step here."""
    steps = {name: peer.peer_step(job.model, np.array(job.prompts[0]), name) for name in peer.EXPERTS}
    taken = peer.second_calls(steps, time.process_time)
    said = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in taken.items())
    print(f"a step of the peer, processor time: {said}", flush=True)
    return min(taken, key=taken.get)


def compare(
    job: Job, rows: tuple[int, ...], peer_rows: tuple[int, ...], experts: str, answered: int, runs: int
) -> tuple:  # fmt: skip
    """Time both sides; the peer on about `answered` of the prompts.

    Returns:
        Times of one prompt by name; what the last run of each did; times of the first, short job.
    """
    contestants: dict[str, Callable[..., None]] = {
        f"dgemma_jax, {n} rows": functools.partial(ours, job, n) for n in rows
    } | {f"transformers, batches of {n}": functools.partial(theirs, job, n, experts, answered) for n in peer_rows}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    compiling, work = {}, {}
    for name, call in contestants.items():
        start = time.perf_counter()
        call(done=Done(), warm=True)
        compiling[name] = time.perf_counter() - start
    for turn in range(runs):
        for name in list(contestants)[:: 1 if turn % 2 == 0 else -1]:
            work[name] = Done()
            start, used = time.perf_counter(), time.process_time()
            contestants[name](done=work[name])
            taken, work[name].processor_seconds = time.perf_counter() - start, time.process_time() - used
            seconds[name].append(taken / work[name].prompts)
            print(_said(name, taken, work[name]), flush=True)
    return seconds, work, compiling


def _said(name: str, seconds: float, done: Done) -> str:
    return (
        f"{name:28}  {done.prompts} prompts {seconds:8.1f} s  {done.processor_seconds:8.1f} s of processors  "
        f"{done.prompts / seconds:7.3f} prompts/s  {done.tokens / seconds:8.1f} tokens/s  "
        f"steps needed {done.needed}, computed {done.computed} ({done.needed / done.computed:.0%} used), "
        f"{1e3 * done.processor_seconds / done.needed:.0f} ms of processors a needed one"
    )


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m dgemma_jax.bench.throughput", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("medium", "nano", "tiny"), default="medium")
    parser.add_argument("--prompts", type=int, default=256, help="how many (256)")
    parser.add_argument("--rows", type=_numbers, default=(8,), help="prompts at once here, with commas between (8)")
    parser.add_argument("--peer-rows", type=_numbers, default=(1, 8), help="sizes of the peer's batches (1,8)")
    parser.add_argument("--peer-prompts", type=int, help="about how many of them the peer answers (all)")
    parser.add_argument("--experts", choices=peer.EXPERTS, help="the peer's experts; by default the fastest")
    parser.add_argument("--canvas", type=int, default=256, help="canvas of medium (256)")
    parser.add_argument("--steps", type=int, default=12, help="most steps of a block of medium (12)")
    parser.add_argument("--blocks", type=int, default=4, help="most blocks of an answer of medium (4)")
    parser.add_argument("--longest", type=int, default=512, help="longest prompt of medium, tokens (512)")
    parser.add_argument("--runs", type=int, default=1, help="timed runs of each (1)")
    parser.add_argument("--threads", type=int, default=2, help="processors for either side (2)")
    parser.add_argument("--save", action="store_true", help="keep the numbers in dgemma_jax/bench/results/")
    args = parser.parse_args(argv)
    args.peer_prompts = args.prompts if args.peer_prompts is None else args.peer_prompts
    if args.peer_prompts < 1:
        parser.error(f"--peer-prompts must be at least 1, got {args.peer_prompts}")
    report.keep_threads(args.threads)
    peer.peer_package("torch").set_num_threads(args.threads)
    if args.model == "nano":
        job = nano_job(args.prompts)
    else:
        sizes = dataclasses.replace(peer.Sizes(), canvas_length=args.canvas, steps=args.steps)
        small = dataclasses.replace(peer.Sizes.tiny(), steps=args.steps)
        tiny = args.model == "tiny"
        job = random_job(small if tiny else sizes, args.prompts, args.blocks, 20 if tiny else args.longest)
    args.experts = args.experts or fastest_experts(job)
    seconds, work, compiling = compare(job, args.rows, args.peer_rows, args.experts, args.peer_prompts, args.runs)
    rows = tuple(
        report.Row(
            task=f"a prompt of {args.prompts}", name=name, seconds=tuple(taken),
            compile_seconds=compiling[name] if name.startswith("dgemma") else None,
            goal=GOAL if name.startswith("dgemma") else None,
        )
        for name, taken in seconds.items()
    )  # fmt: skip
    counts = {name: vars(done) | {"stops": sorted(done.stops.items())} for name, done in work.items()}
    found = report.Report(
        title=f"Throughput of {args.model}, mixed prompts, CPU, float32",
        rows=rows,
        settings=vars(args) | {"work": counts},
        about=report.surroundings("dgemma-jax", "jax", "flax", "torch", "transformers", threads=args.threads),
    )
    print(found)
    if args.save:
        path = report.RESULTS / f"throughput-{args.model}-cpu-{found.about['date']}.json"
        print(f"kept in {found.save(path)}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
