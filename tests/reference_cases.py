"""Tiny random checkpoints built in `transformers`, and the record of what `transformers` computes with them.

    python tests/reference_cases.py        writes tests/data/reference/ anew (needs the `parity` extra)

A case is a directory: the checkpoint as `save_pretrained` writes it, and `reference.npz`. What must hold between a
record and this package is said in `reference_checks.py`, for fresh records and for the ones kept here alike.

No norm weight, scale or layer scalar is one, and the scalars of encoder and decoder differ, so that nothing left out
or mixed up can go unseen. The weights are such that runs are worth replaying: entropies vary, a step accepts some
positions and not others, rows converge at different steps, one row ends early.

Keys of a record, floats in float32; P prompts, C canvas, V vocabulary, N denoising steps over all blocks:
    prompts [P, T] right-padded, prompt_lengths [P], block [P, C] tokens that follow, canvas [P, C]
    hidden/p, hidden_block/p        causal pass over prompt p alone, then over its block
    cache/p/layer/k|v               keys and values [K, T, H] after the prompt; cache_block/... after the block
    logits_first, given, soft, logits_next   one denoising pass without and with self-conditioning from logits `given`
    replay/...                      a run of `generate` on the left-padded batch, step by step
    run/...                         another run, with the random numbers of this package
    bfloat16/...                    the denoising passes in bfloat16 and, on weights rounded to it, in float32, with an
                                    axis of `turned` canvases in front
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

DIRECTORY = Path(__file__).parent / "data" / "reference"
SLIDING, FULL = "sliding_attention", "full_attention"
S, F = SLIDING, FULL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A tiny checkpoint, and the run to record.

    Attributes:
        sizes: of `DiffusionGemmaTextConfig`.
        rope: (theta on sliding layers, theta on full layers, live fraction of the spectrum on full layers).
        spread: standard deviation of the embedding table: what makes logits large.
        share: bounds of the weights of the norms that close a branch: how much a layer changes the residual.
        prompts: length of each.
        generation: fields of `DiffusionGemmaGenerationConfig`.
        entropy_bound: of the sampler.
    """

    name: str
    seed: int
    sizes: dict[str, Any]
    canvas: int
    rope: tuple[float, float, float]
    spread: float
    share: tuple[float, float]
    prompts: tuple[int, ...]
    generation: dict[str, Any]
    entropy_bound: float


CASES = (
    # Full layers first and between, a window shorter than canvas and prompts, one key head on full layers.
    Case(
        name="irregular",
        seed=3,
        sizes=dict(
            vocab_size=80, hidden_size=32, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2,
            num_global_key_value_heads=1, head_dim=8, global_head_dim=16, layer_types=[F, S, S, F, S, F],
            sliding_window=8, num_experts=6, top_k_experts=2, moe_intermediate_size=16, rms_norm_eps=1e-3,
            final_logit_softcapping=20.0,
        ),
        canvas=12,
        rope=(100.0, 1000.0, 0.5),
        spread=0.8,
        share=(0.1, 0.5),
        prompts=(5, 19, 12),
        generation=dict(
            max_new_tokens=36, max_denoising_steps=10, t_max=0.8, t_min=0.4, stability_threshold=1,
            confidence_threshold=0.12, eos_token_id=[1, 7], pad_token_id=0,
        ),
        entropy_bound=0.6,
    ),
    # The order of the release, other ratios of heads, more experts, a longer stability test.
    Case(
        name="five_to_one",
        seed=3,
        sizes=dict(
            vocab_size=64, hidden_size=24, intermediate_size=28, num_attention_heads=6, num_key_value_heads=3,
            num_global_key_value_heads=2, head_dim=10, global_head_dim=20, layer_types=[S, S, S, S, S, F],
            sliding_window=16, num_experts=10, top_k_experts=3, moe_intermediate_size=8, rms_norm_eps=1e-6,
            final_logit_softcapping=30.0,
        ),
        canvas=10,
        rope=(50.0, 300.0, 0.25),
        spread=1.1,
        share=(0.1, 0.5),
        prompts=(23, 4, 11, 16),
        generation=dict(
            max_new_tokens=20, max_denoising_steps=10, t_max=1.0, t_min=0.3, stability_threshold=2,
            confidence_threshold=0.12, eos_token_id=[1, 5], pad_token_id=0,
        ),
        entropy_bound=0.8,
    ),
)  # fmt: skip

# The smallest image tower that `transformers` accepts: it builds one for every model.
NO_TOWER = dict(
    model_type="gemma4_vision", hidden_size=2, intermediate_size=2, num_hidden_layers=0, num_attention_heads=1,
    num_key_value_heads=1, head_dim=2, patch_size=1, pooling_kernel_size=1, position_embedding_size=1,
)  # fmt: skip


def build(case: Case) -> Any:
    """The `DiffusionGemmaForBlockDiffusion` of a case, float32, every weight drawn."""
    import torch
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        DiffusionGemmaGenerationConfig,
        EntropyBoundSamplerConfig,
    )

    sliding, full, fraction = case.rope
    rope = {
        SLIDING: {"rope_type": "default", "rope_theta": sliding},
        FULL: {"rope_type": "proportional", "rope_theta": full, "partial_rotary_factor": fraction},
    }
    sizes = case.sizes | {"layer_types": list(case.sizes["layer_types"])}
    text = sizes | dict(
        num_hidden_layers=len(sizes["layer_types"]), max_position_embeddings=256, rope_parameters=rope,
        eos_token_id=case.generation["eos_token_id"],
    )  # fmt: skip
    config = DiffusionGemmaConfig(
        text_config=text, vision_config=dict(NO_TOWER), canvas_length=case.canvas,
        eos_token_id=case.generation["eos_token_id"],
    )  # fmt: skip
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            _draw(name, weight, case, generator)
    model.generation_config = DiffusionGemmaGenerationConfig(
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=case.entropy_bound), **case.generation
    )
    return model


def _draw(name: str, weight: Any, case: Case, generator: Any) -> None:
    import torch

    if "vision" in name or name.endswith(("inv_freq", "embed_scale")):
        return
    uniform = torch.rand(weight.shape, generator=generator)
    normal = torch.randn(weight.shape, generator=generator)
    closing = name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight"))
    if name.endswith("layer_scalar"):
        weight.copy_(0.7 + 0.5 * uniform)
    elif name.endswith("embed_tokens.weight"):
        weight.copy_(case.spread * normal)
    elif "norm" in name or "scale" in name:
        low, high = case.share if closing else (0.5, 1.5)
        weight.copy_(low + (high - low) * uniform)
    else:
        weight.copy_(normal * weight.shape[-1] ** -0.5)


def record(case: Case, model: Any) -> dict[str, np.ndarray]:
    """All that is kept of a case."""
    rng = np.random.default_rng(case.seed)
    shape = (len(case.prompts), case.canvas)
    prompts = [rng.integers(3, case.sizes["vocab_size"], length) for length in case.prompts]
    given = dict(
        prompts=right_padded(prompts), prompt_lengths=np.array(case.prompts),
        block=rng.integers(3, case.sizes["vocab_size"], shape), canvas=rng.integers(0, case.sizes["vocab_size"], shape),
        given=rng.normal(0, 4, (*shape, case.sizes["vocab_size"])).astype(np.float32),
    )  # fmt: skip
    return (
        given
        | passes(model, given)
        | prefixed("replay/", replay(model, prompts, seed=case.seed))
        | prefixed("run/", run(model, prompts, seeds=[case.seed + i for i in range(len(prompts))]))
        | prefixed("bfloat16/", bfloat16(model, given))
    )


def passes(model: Any, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The causal pass over each prompt alone and over the block after it, and two denoising passes in between."""
    found: dict[str, np.ndarray] = {}
    rows: dict[str, list[np.ndarray]] = {"logits_first": [], "logits_next": [], "soft": []}
    for p, length in enumerate(given["prompt_lengths"]):
        cache = _new_cache(model)
        prompt, block = given["prompts"][p : p + 1, :length], given["block"][p : p + 1]
        found[f"hidden/{p}"] = _encode(model, prompt, cache)
        found |= prefixed(f"cache/{p}/", _keys_and_values(cache))
        canvas, logits = given["canvas"][p : p + 1], given["given"][p : p + 1]
        rows["logits_first"].append(_denoise(model, canvas, cache))
        with _watched(model.model.decoder.self_conditioning) as calls:
            rows["logits_next"].append(_denoise(model, canvas, cache, logits))
        rows["soft"].append(_numpy(calls[0][1]))
        found[f"hidden_block/{p}"] = _encode(model, block, cache)
        found |= prefixed(f"cache_block/{p}/", _keys_and_values(cache))
    return found | {name: np.concatenate(arrays) for name, arrays in rows.items()}


def bfloat16(model: Any, given: dict[str, np.ndarray], turns: int = 1) -> dict[str, np.ndarray]:
    """The denoising passes on `turned` canvases in bfloat16, and in float32 with the same rounded weights."""
    import copy

    low = copy.deepcopy(model).bfloat16()
    high = copy.deepcopy(low).float()
    exact = dict(model.named_buffers())
    for each in (low, high):  # `bfloat16()` rounds the frequencies too, which loading in bfloat16 does not
        for name, buffer in each.named_buffers():
            if name.endswith("inv_freq") or (each is high and name.endswith("embed_scale")):
                buffer.data = exact[name].clone()
    found = {}
    for name, each in (("low", low), ("high", high)):
        first, later = [], []
        for p, length in enumerate(given["prompt_lengths"]):
            cache = _new_cache(each)
            _encode(each, given["prompts"][p : p + 1, :length], cache)
            drawn = [(canvas[p : p + 1], logits[p : p + 1]) for canvas, logits in turned(given, turns)]
            first.append([_denoise(each, canvas, cache) for canvas, _ in drawn])
            later.append([_denoise(each, canvas, cache, logits) for canvas, logits in drawn])
        found |= {f"{name}/logits_first": np.concatenate(first, 1), f"{name}/logits_next": np.concatenate(later, 1)}
    return found


def turned(given: dict[str, np.ndarray], turns: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The canvas and the logits given, and both from other positions on: as many other cases."""
    return [(np.roll(given["canvas"], n, 1), np.roll(given["given"], n, 1)) for n in range(turns)]


def replay(
    model: Any, prompts: list[np.ndarray], seed: int, given: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """A run of `generate` with torch's own random numbers: what went into and came out of each step.

    With `given` [N, B, C, V] the steps after each step are conditioned on these shaped logits instead of the run's own.

    [N] block, remaining, temperature; [N, B] frozen, finished; [N, B, C] canvas, sample, fresh, entropy, accepted,
    argmax, next_canvas; [N, B, C, V] logits, which over the temperature are the next step's self-conditioning.
    """
    import torch

    torch.manual_seed(seed)
    with recorded(model, given) as steps:
        out = _generate(model, prompts)
    found = {name: np.stack([step[name] for step in steps]) for name in steps[0]}
    return found | dict(
        sequences=_numpy(out.sequences)[:, max(map(len, prompts)) :],
        tokens_per_forward=_numpy(out.tokens_per_forward),
    )


def run(model: Any, prompts: list[np.ndarray], seeds: list[int]) -> dict[str, np.ndarray]:
    """A run of `generate` whose random numbers are those of this package (`jax_threefry_partitionable` is on)."""
    draws = Draws(seeds, model.config.canvas_length, model.config.text_config.vocab_size)
    with recorded(model) as steps, our_draws(model, draws):
        out = _generate(model, prompts)
    kept = ("block", "frozen", "next_canvas", "argmax")
    return {name: np.stack([step[name] for step in steps]) for name in kept} | dict(
        seeds=np.array(seeds), max_new_tokens=np.array(model.generation_config.max_new_tokens),
        uniform=np.stack(draws.uniform), fresh=np.stack(draws.fresh),
        sequences=_numpy(out.sequences)[:, max(map(len, prompts)) :],
        tokens_per_forward=_numpy(out.tokens_per_forward),
    )  # fmt: skip


@contextlib.contextmanager
def recorded(model: Any, given: np.ndarray | None = None) -> Any:
    """A list that fills with one dictionary of arrays for every denoising step of `generate`; `given` as in `replay`."""
    import torch

    steps: list[dict[str, np.ndarray]] = []
    original, prepare = model._denoising_step, model._prepare_denoiser_inputs
    block = [-1]

    def prepared(**inputs: Any) -> Any:
        block[0] += 1
        return prepare(**inputs)

    def step(**inputs: Any) -> Any:
        sampler, forward, processor = (inputs[k] for k in ("sampler", "decoder_forward", "logits_processor"))
        seen: dict[str, Any] = {}

        def kept(name: str, function: Any) -> Any:
            @functools.wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                seen[name] = function(*args, **kwargs)
                return seen[name]

            return call

        accept = sampler.accept_canvas

        def accepting(current: Any, sampled: Any, *rest: Any) -> Any:
            seen["sample"] = sampled
            return accept(current, sampled, *rest)

        sampler.accept_canvas = accepting
        sampler.initialize_canvas = kept("fresh", type(sampler).initialize_canvas.__get__(sampler))
        before = {k: _numpy(inputs[k]) for k in ("finished_denoising", "current_canvas")}
        canvas, argmax, shaped, finished = original(
            **inputs | {"decoder_forward": kept("out", forward), "logits_processor": kept("shaped", processor)}
        )
        del sampler.accept_canvas, sampler.initialize_canvas
        logits = _numpy(seen["out"].logits)
        most = np.abs(logits).argmax()
        steps.append(
            dict(
                block=np.array(block[0]), remaining=np.array(inputs["cur_step"]), frozen=before["finished_denoising"],
                temperature=logits.flat[most] / _numpy(seen["shaped"]).flat[most], canvas=before["current_canvas"],
                logits=logits, sample=_numpy(seen["sample"]), fresh=_numpy(seen["fresh"]),
                entropy=_numpy(torch.distributions.Categorical(logits=seen["shaped"]).entropy()),
                accepted=_numpy(sampler.accepted_token_mask), argmax=_numpy(argmax), next_canvas=_numpy(canvas),
                finished=_numpy(finished),
            )
        )  # fmt: skip
        if given is not None:
            live = ~before["finished_denoising"]  # the others keep theirs
            shaped[live] = shaped.new_tensor(given[len(steps) - 1][live])
        return canvas, argmax, shaped, finished

    model._denoising_step, model._prepare_denoiser_inputs = step, prepared
    try:
        yield steps
    finally:
        del model._denoising_step, model._prepare_denoiser_inputs


class Draws:
    """The random numbers that this package uses for rows with these seeds, step by step."""

    def __init__(self, seeds: list[int], length: int, vocab_size: int) -> None:
        from dgemma_jax.diffusion import noise

        self.keys, self.length, self.vocab_size = noise.row_keys(np.array(seeds)), length, vocab_size
        self.block, self.step = -1, 0
        self.uniform: list[np.ndarray] = []
        self.fresh: list[np.ndarray] = []

    def _keys(self, moment: int) -> Any:
        from dgemma_jax.diffusion import noise

        rows = self.keys.shape[0]
        return noise.moment_keys(self.keys, np.full(rows, self.block), np.full(rows, moment))

    def canvas(self) -> np.ndarray:
        """The first canvas of the next block."""
        from dgemma_jax.diffusion import noise

        self.block, self.step = self.block + 1, 0
        return np.asarray(noise.uniform_canvas(self._keys(0), self.length, self.vocab_size))

    def sample(self, probs: np.ndarray) -> np.ndarray:
        """Tokens drawn from `probs` [B * C, V] in the step at hand."""
        import jax

        from dgemma_jax.diffusion import sampler

        keys = jax.vmap(jax.random.split)(self._keys(self.step + 1))[:, 0]
        self.uniform.append(np.asarray(jax.vmap(lambda k: jax.random.uniform(k, (self.length,)))(keys)))
        return np.asarray(sampler.categorical(self.uniform[-1].reshape(-1), probs))

    def renoise(self) -> np.ndarray:
        """Fresh tokens in the step at hand; the next call of `sample` belongs to the next step."""
        import jax

        from dgemma_jax.diffusion import noise

        keys = jax.vmap(jax.random.split)(self._keys(self.step + 1))[:, 1]
        self.fresh.append(np.asarray(noise.uniform_canvas(keys, self.length, self.vocab_size)))
        self.step += 1
        return self.fresh[-1]


@contextlib.contextmanager
def our_draws(model: Any, draws: Draws) -> Any:
    """Within it, `generate` of the model draws nothing itself."""
    import torch
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as reference

    sampler, multinomial, inner = reference.EntropyBoundSampler, torch.multinomial, model._denoising_step
    initialize, within = sampler.initialize_canvas, [False]

    def initial(self: Any, batch_size: int, device: Any) -> Any:
        drawn = draws.renoise() if within[0] else draws.canvas()
        return torch.tensor(drawn.astype(np.int64))

    def sampled(probs: Any, num_samples: int) -> Any:
        return torch.tensor(draws.sample(_numpy(probs)).astype(np.int64))[:, None]

    def step(**inputs: Any) -> Any:
        within[0] = True
        result = inner(**inputs)
        within[0] = False
        return result

    sampler.initialize_canvas, torch.multinomial, model._denoising_step = initial, sampled, step
    try:
        yield
    finally:
        sampler.initialize_canvas, torch.multinomial, model._denoising_step = initialize, multinomial, inner


def right_padded(prompts: list[np.ndarray]) -> np.ndarray:
    """[P, T], zeros after each prompt."""
    padded = np.zeros((len(prompts), max(map(len, prompts))), np.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded


def prefixed(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + name: array for name, array in arrays.items()}


def _numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
    return tensor.cpu().numpy().copy()


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _encode(model: Any, tokens: np.ndarray, cache: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        out = model.model.encoder(input_ids=torch.tensor(tokens), past_key_values=cache)
    return _numpy(out.last_hidden_state)[0]


def _denoise(model: Any, canvas: np.ndarray, cache: Any, given: np.ndarray | None = None) -> np.ndarray:
    import torch

    logits = None if given is None else torch.tensor(given)
    with torch.no_grad():
        out = model(decoder_input_ids=torch.tensor(canvas), past_key_values=cache, self_conditioning_logits=logits)
    return _numpy(out.logits)


def _keys_and_values(cache: Any) -> dict[str, np.ndarray]:
    return {
        f"{number}/{name}": _numpy(array)[0]
        for number, layer in enumerate(cache.layers)
        for name, array in (("k", layer.keys), ("v", layer.values))
    }


@contextlib.contextmanager
def _watched(module: Any) -> Any:
    calls: list[tuple] = []
    hook = module.register_forward_pre_hook(lambda _, args: calls.append(args))
    try:
        yield calls
    finally:
        hook.remove()


def _generate(model: Any, prompts: list[np.ndarray]) -> Any:
    import torch

    longest = max(map(len, prompts))
    tokens = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.tensor(prompt), 1
    return model.generate(tokens, attention_mask=mask)


def check_informative(case: Case, kept: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the recorded run shows, as numbers; raises if there is too little in it to compare.

    Decisions must be clear: no argmax, acceptance or stop hangs on the last bits of a float32.
    """
    found = {}
    for name in ("replay/", "run/"):
        sequences, block, frozen = kept[name + "sequences"], kept[name + "block"], kept[name + "frozen"]
        stops = np.isin(sequences, case.generation["eos_token_id"])
        found[name + "blocks"] = int(block.max()) + 1
        found[name + "steps of rows"] = [(~frozen[block == j]).sum(0).tolist() for j in range(block.max() + 1)]
        found[name + "ended in block"] = [
            int(row.argmax() // case.canvas) if row.any() else None for row in stops
        ]  # fmt: skip
        steps = {n for row in found[name + "steps of rows"] for n in row}
        if found[name + "blocks"] < 2 or len(steps) < 3 or not stops.any() or stops.any(1).all():
            raise SystemExit(f"{case.name}: {name} shows too little: {found}")
    live = ~kept["replay/frozen"]
    shaped = kept["replay/logits"] / kept["replay/temperature"][:, None, None, None]
    top = np.sort(shaped, -1)[live]
    entropy = kept["replay/entropy"]
    ranked = np.sort(entropy, -1)
    slack = np.cumsum(ranked, -1) - ranked - case.entropy_bound
    found["accepted"] = float(kept["replay/accepted"][live].mean())
    found["entropy"] = [round(float(q), 4) for q in np.quantile(entropy[live], [0, 0.25, 0.5, 0.75, 1])]
    found["largest logit"] = float(np.abs(kept["replay/logits"]).max())
    found["margins"] = {
        "argmax": float((top[..., -1] - top[..., -2]).min()),
        "acceptance": float(np.abs(slack[live]).min()),
        "stop": float(np.abs(entropy.mean(-1) - case.generation["confidence_threshold"])[live].min()),
    }
    if not 0.2 < found["accepted"] < 0.95 or min(found["margins"].values()) < 1e-4:
        raise SystemExit(f"{case.name}: not informative: {found}")
    return found


def main() -> None:
    for case in CASES:
        model = build(case)
        kept = record(case, model)
        print(case.name, check_informative(case, kept))
        directory = DIRECTORY / case.name
        model.save_pretrained(directory)
        np.savez_compressed(directory / "reference.npz", **kept)
        print({path.name: path.stat().st_size for path in sorted(directory.iterdir())})


if __name__ == "__main__":
    main()
