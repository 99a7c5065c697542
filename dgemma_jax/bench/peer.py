"""One denoising step and one generation, against Hugging Face `transformers` with the same weights.

    python -m dgemma_jax.bench.peer [--save]         needs the `parity` extra

The model is random and of the architecture's shape at a size that fits a laptop. Both sides run in float32, on the
same number of threads, in turns. `transformers` runs eagerly with each of its expert implementations that is not far
slower than the others; the fastest is the peer. Times of the first call are printed as compile time and are not part of
the others.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dgemma_jax.bench import report

STEP, GENERATION = "one denoising step", "generation"
STEP_GOAL, GENERATION_GOAL = 1.0, 0.6
EXPERTS = ("eager", "grouped_mm", "batched_mm")  # implementations of `transformers`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The model and the work. The defaults are the benchmark; `tiny` only shows that it runs."""

    vocab_size: int = 32_768
    embed_dim: int = 512
    hidden_dim: int = 1024
    num_layers: int = 12
    num_heads: int = 8
    num_kv_heads: int = 4
    num_global_kv_heads: int = 2
    head_dim: int = 64
    global_head_dim: int = 128
    sliding_window: int = 512
    num_experts: int = 32
    experts_per_token: int = 4
    expert_dim: int = 256
    canvas_length: int = 256
    prompt_length: int = 256
    steps: int = 16

    @classmethod
    def tiny(cls) -> Sizes:
        return cls(
            vocab_size=96, embed_dim=32, hidden_dim=32, num_layers=2, num_heads=4, num_kv_heads=2,
            num_global_kv_heads=1, head_dim=8, global_head_dim=16, sliding_window=8, num_experts=4,
            experts_per_token=2, expert_dim=16, canvas_length=8, prompt_length=12, steps=2,
        )  # fmt: skip


def compare(sizes: Sizes | None = None, runs: int = 7, threads: int = 2, seed: int = 0) -> report.Report:
    """Time both sides.

    Raises:
        ImportError: torch or transformers is missing.
    """
    sizes = sizes or Sizes()
    torch = peer_package("torch")
    torch.set_num_threads(threads)
    model = random_peer(sizes, seed)
    bundle = shared(model, sizes.steps)
    rng = np.random.default_rng(seed)
    prompt = rng.integers(3, sizes.vocab_size, sizes.prompt_length)
    rows: list[report.Row] = []
    kept = worth_timing({experts: peer_step(model, prompt, experts) for experts in EXPERTS})
    for task, ours, theirs, goal in (
        (STEP, our_step(bundle, prompt), functools.partial(peer_step, model, prompt), STEP_GOAL),
        (
            GENERATION, our_generation(bundle, prompt, sizes),
            functools.partial(peer_generation, model, prompt, steps=sizes.steps), GENERATION_GOAL,
        ),
    ):  # fmt: skip
        name = task if task == STEP else f"{task}, {sizes.steps} steps"
        contestants = {"dgemma_jax": ours} | {f"transformers, {experts}": theirs(experts) for experts in kept}
        seconds, first = report.alternate(contestants, runs)
        compiling = max(0.0, first["dgemma_jax"] - min(seconds["dgemma_jax"]))
        rows += [
            report.Row(
                task=name, name=who, seconds=taken, goal=goal if who == "dgemma_jax" else None,
                compile_seconds=compiling if who == "dgemma_jax" else None,
            )
            for who, taken in seconds.items()
        ]  # fmt: skip
    return report.Report(
        title="Against transformers on CPU, float32, the same random weights",
        rows=tuple(rows),
        settings=dataclasses.asdict(sizes) | {"runs": runs},
        about=report.surroundings("dgemma-jax", "jax", "flax", "torch", "transformers", threads=threads),
    )


def peer_package(name: str) -> Any:
    """The module, or an ImportError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this benchmark needs {name}: pip install 'dgemma-jax[parity]'") from error


def random_peer(sizes: Sizes, seed: int, device: str = "cpu", dtype: str = "float32") -> Any:
    """A model of `transformers` with weights of the usual size, so that routing and logits are varied."""
    torch, transformers = peer_package("torch"), peer_package("transformers")
    from dgemma_jax.config import FULL, NO_VISION, SLIDING

    kinds = [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(sizes.num_layers)]
    text = dict(
        vocab_size=sizes.vocab_size, hidden_size=sizes.embed_dim, intermediate_size=sizes.hidden_dim,
        num_hidden_layers=sizes.num_layers, layer_types=[*kinds[:-1], FULL], num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads, num_global_key_value_heads=sizes.num_global_kv_heads,
        head_dim=sizes.head_dim, global_head_dim=sizes.global_head_dim, sliding_window=sizes.sliding_window,
        num_experts=sizes.num_experts, top_k_experts=sizes.experts_per_token, moe_intermediate_size=sizes.expert_dim,
    )  # fmt: skip
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config=dict(NO_VISION), canvas_length=sizes.canvas_length
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):  # made where it stays, in its dtype: no second copy
            model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    finally:
        torch.set_default_dtype(default)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "vision" not in name:
                weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
    return model


def shared(model: Any, steps: int) -> Any:
    """A bundle on the very weights of a model of `transformers`; only experts' `down` is laid out anew."""
    import jax
    import jax.numpy as jnp

    from dgemma_jax.bundle import Bundle
    from dgemma_jax.config import ModelConfig, SamplerConfig
    from dgemma_jax.nn import transformer
    from dgemma_jax.weights import hf_keys, tree

    config = ModelConfig.from_hf(model.config.to_dict())
    stored = model.state_dict()

    def weight(path: tree.Path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, layout = hf_keys.key_of(path)
        return layout.from_stored(jnp.from_dlpack(stored[name].detach().contiguous()), leaf.shape)

    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    target = transformer.abstract(config, jnp.dtype(dtype))
    ours = tree.replace(target, {path: weight(path, leaf) for path, leaf in tree.leaves(target).items()})
    return Bundle(config, ours, sampler=SamplerConfig(max_denoising_steps=steps, early_stop=False, eos_token_ids=(1,)))


def our_step(bundle: Any, prompt: np.ndarray) -> Callable[[], Any]:
    """A call that takes one step, self-conditioned, sampler included."""
    import jax
    import jax.numpy as jnp

    from dgemma_jax.diffusion import noise
    from dgemma_jax.diffusion import sampler as sampling
    from dgemma_jax.nn import functional

    @jax.jit
    def step(model: Any, state: Any, cache: Any, sampler: Any) -> Any:
        return sampling.denoise_step(model, state, cache, sampler)[0]

    model, config = bundle.model, bundle.config
    tokens, room = prompt[None].astype(np.int32), len(prompt) + config.canvas_length
    cache = functional.prefill(model, tokens, cache_length=room).cache
    zero, never = jnp.zeros(1, jnp.int32), jnp.zeros(1, bool)
    state = sampling.start(noise.row_keys(zero), zero, never, config.canvas_length, model)
    soft = jax.random.normal(jax.random.key(1), state.soft.shape, state.soft.dtype)
    state = state.replace(soft=soft, step=zero + 1)
    return lambda: jax.block_until_ready(step(model, state, cache, bundle.sampler))


def our_generation(bundle: Any, prompt: np.ndarray, sizes: Sizes) -> Callable[[], Any]:
    """A call that generates one block."""
    from dgemma_jax.diffusion.generate import generate

    return lambda: generate(bundle, prompt.tolist(), seed=0, max_new_tokens=sizes.canvas_length)


def peer_step(model: Any, prompt: np.ndarray, experts: str) -> Callable[[], Any]:
    """A call that takes one step as `generate` of `transformers` does."""
    torch, transformers = peer_package("torch"), peer_package("transformers")
    settings = _peer_settings(model, 16)
    length, vocab_size = model.config.canvas_length, model.config.text_config.vocab_size
    device = model.device
    tokens = torch.tensor(prompt, device=device)[None]
    cache = transformers.DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad():
        model.model.encoder(input_ids=tokens, past_key_values=cache)
    canvas = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    given = torch.randn((1, length, vocab_size), generator=torch.Generator().manual_seed(1)).to(device)

    def call() -> Any:
        model.set_experts_implementation(experts)
        with torch.no_grad(), waited(device):
            return model._denoising_step(
                decoder_forward=model.forward, current_canvas=canvas, argmax_canvas=canvas, input_ids=tokens,
                decoder_position_ids=torch.arange(len(prompt), len(prompt) + length, device=device)[None],
                self_conditioning_logits=given, mask_mapping=dict(full_attention=None, sliding_attention=None),
                past_key_values=cache, finished_denoising=torch.zeros(1, dtype=torch.bool, device=device), cur_step=15,
                sampler=model._prepare_sampler(settings), logits_processor=model._prepare_logits_processor(settings),
                diffusion_stopping_criteria=model._prepare_diffusion_stopping_criteria(settings),
            )  # fmt: skip

    return call


def peer_generation(
    model: Any, prompt: np.ndarray, experts: str, *, steps: int, compiled: bool = False
) -> Callable[[], Any]:
    """A call that generates one block with all its steps; `compiled` with a static cache, by `torch.compile`."""
    torch = peer_package("torch")
    tokens, settings = torch.tensor(prompt, device=model.device)[None], _peer_settings(model, steps)
    if compiled:
        settings.cache_implementation = "static"

    def call() -> Any:
        model.set_experts_implementation(experts)
        with waited(model.device):
            return model.generate(
                tokens, generation_config=settings, max_new_tokens=model.config.canvas_length
            ).sequences

    return call


@contextlib.contextmanager
def waited(device: Any) -> Any:
    """Leaves when the device has done what was asked of it within."""
    yield
    if device.type == "cuda":
        peer_package("torch").cuda.synchronize(device)


def _peer_settings(model: Any, steps: int) -> Any:
    """Sampling without early stop: a confidence that is never reached."""
    module = importlib.import_module("transformers.models.diffusion_gemma.generation_diffusion_gemma")
    return module.DiffusionGemmaGenerationConfig(
        max_denoising_steps=steps, confidence_threshold=1e-30, stability_threshold=1, t_max=0.8, t_min=0.4,
        sampler_config=module.EntropyBoundSamplerConfig(entropy_bound=0.1), eos_token_id=[1], pad_token_id=0,
    )  # fmt: skip


def second_calls(
    calls: dict[str, Callable[[], Any]], clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds of the second call of each that runs here; says which are left out."""
    seconds = {}
    for name, call in calls.items():
        try:
            call()
            start = clock()
            call()
            seconds[name] = clock() - start
        except (RuntimeError, ImportError, NotImplementedError) as error:
            print(f"left out: {name}: {str(error).splitlines()[0]}")
    return seconds


def worth_timing(calls: dict[str, Callable[[], Any]], factor: float = 3.0) -> list[str]:
    """Names of the calls that run here and take less than `factor` times the fastest; says which are left out."""
    seconds = second_calls(calls)
    for name, taken in seconds.items():
        if taken >= factor * min(seconds.values()):
            print(f"left out: {name}: {taken:.1f} s a step, the fastest takes {min(seconds.values()):.1f} s")
    return [name for name, taken in seconds.items() if taken < factor * min(seconds.values())]


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m dgemma_jax.bench.peer", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each (7)")
    parser.add_argument("--threads", type=int, default=2, help="processors for either side (2)")
    parser.add_argument("--tiny", action="store_true", help="a toy size: shows that it runs, says nothing of speed")
    parser.add_argument("--save", action="store_true", help="keep the numbers in dgemma_jax/bench/results/")
    args = parser.parse_args(argv)
    report.keep_threads(args.threads)
    found = compare(Sizes.tiny() if args.tiny else None, args.runs, args.threads)
    print(found)
    if args.save:
        path = report.RESULTS / f"peer-cpu-{found.about['date']}.json"
        print(f"kept in {found.save(path)}")


if __name__ == "__main__":
    main()
