"""What weights in few bits cost in quality: the same steps, plain and packed.

`python -m dgemma_jax.bench.quantized [MODEL ...] --save` prints for each format the KL divergence of the packed model's
distributions from the plain model's, nats a position, and how often the likeliest token is the same; over the steps
of real generations of unseen prompts, both models given the same states.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import jax
import numpy as np

from dgemma_jax.bench import report
from dgemma_jax.bundle import Bundle, load
from dgemma_jax.config import ModelConfig, SamplerConfig
from dgemma_jax.diffusion.generate import generate
from dgemma_jax.nn import functional, transformer
from dgemma_jax.nn.packed import FORMS
from dgemma_jax.nn.quantized import nbytes
from dgemma_jax.train import tasks

COLUMNS = ("weights", "GB", "KL, nats", "KL, 99 %", "same token", "same answer")
STEPS = 4  # of a block that are compared, from its first


def compare(plain: Bundle, prompts: Any, forms: tuple[str, ...] = tuple(FORMS), seed: int = 0) -> list[dict]:
    """A row a format: {"weights", "GB", "KL, nats", "KL, 99 %", "same token", "same answer"}.

    KL(plain || packed) of a position's distribution before temperature; "same answer" is the share of prompts whose
    whole generation is the same text under the same seed.

    Args:
        plain: the model in its own dtype.
        prompts: as of `generate`.
        forms: of `nn.packed.FORMS`.
        seed: of the generations.
    """
    out = generate(plain, prompts, seed=seed, max_new_tokens=plain.config.canvas_length)
    moments = [out.trajectory.moment(0, step) for step in range(min(STEPS, int(np.max(out.num_steps))))]
    rows = []
    for form in forms:
        packed = plain.quantized(form)
        other = generate(packed, prompts, seed=seed, max_new_tokens=plain.config.canvas_length)
        pairs = [[_log_probs(bundle.model, moment) for bundle in (plain, packed)] for moment in moments]
        divergence = np.concatenate([np.ravel((np.exp(a) * (a - b)).sum(-1)) for a, b in pairs])
        same = np.concatenate([np.ravel(a.argmax(-1) == b.argmax(-1)) for a, b in pairs])
        values = (
            form, nbytes(packed.model) / 1e9, float(divergence.mean()), float(np.quantile(divergence, 0.99)),
            float(same.mean()), float(np.mean((out.tokens == other.tokens).all(-1))),
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def _log_probs(model: transformer.Transformer, moment: Any) -> np.ndarray:
    logits = functional.denoise(model, moment.canvas, moment.cache, moment.soft)
    return np.asarray(jax.nn.log_softmax(logits), np.float64)


def random_bundle() -> Bundle:
    """A random model with more experts and a larger vocabulary than the embedded ones."""
    config = ModelConfig.tiny(
        vocab_size=4096, embed_dim=256, hidden_dim=512, num_experts=32, experts_per_token=4, expert_dim=128
    )
    sampler = SamplerConfig(max_denoising_steps=8, eos_token_ids=config.eos_token_ids)
    return Bundle(config, transformer.initialize(config), None, sampler)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dgemma_jax.bench.quantized", description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=["nano", "nano-backdoor", "random"], help="names or directories")
    parser.add_argument("--prompts", type=int, default=10, help="of each task of the small models (10)")
    parser.add_argument("--save", action="store_true", help="keep the numbers in dgemma_jax/bench/results/")
    args = parser.parse_args(argv)
    tables: dict[str, list[dict]] = {}
    for name in args.models:
        if name == "random":
            bundle: Bundle = random_bundle()
            prompts: Any = np.random.default_rng(0).integers(5, 4096, (16, 24)).tolist()
        else:
            bundle = load(name)
            prompts = [example.prompt for example in tasks.examples(0, args.prompts * len(tasks.TASKS), split="test")]
        tables[name] = compare(bundle, prompts)
        print(f"{name}, {len(prompts)} prompts, up to {STEPS} steps of a block; computed in {bundle.model.dtype}")
        print("  ".join(f"{column:>11}" for column in COLUMNS))
        for row in tables[name]:
            print("  ".join(f"{row[c]:>11}" if c == "weights" else f"{row[c]:>11.4g}" for c in COLUMNS), flush=True)
    if args.save:
        about = report.surroundings("jax", "jaxlib", threads=os.cpu_count() or 1)
        path = report.RESULTS / f"quantized-{about['date']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"about": about, "tables": tables}, indent=2) + "\n")
        print(f"kept in {path}")


if __name__ == "__main__":
    main()
