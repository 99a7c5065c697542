"""Two checkpoints on the same prompts and the same noise: where do their residuals, routes and answers differ?

A difference is no defect: two seeds of one training differ everywhere. What it gives is a place to look.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

import dgemma_jax as dg
from dgemma_jax.config import SamplerConfig
from dgemma_jax.diffusion import prompts as inputs
from dgemma_jax.nn.functional import of
from interp.captures import capture


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ModelDiff:
    """Differences of L layers and N prompts, at the first step.

    Attributes:
        moved: [L, N] |x - x'| / |x'| of the residuals, a mean over the canvas.
        unlike: [L] 1 - linear CKA over prompts and positions: 0 for equal up to rotation and scale; arXiv 1905.00414.
        routing: [L, N] total variation between the routers' distributions, 0 to 1.
        answers: N of (text of the one, text of the other).
        features: [K] mean difference of sparse features, by layer; empty without an SAE.
    """

    moved: np.ndarray
    unlike: np.ndarray
    routing: np.ndarray
    answers: tuple[tuple[str, str], ...]
    features: dict[int, np.ndarray]

    @property
    def changed(self) -> np.ndarray:
        """[N] bool: another answer."""
        return np.array([a != b for a, b in self.answers])

    def outlying(self) -> np.ndarray:
        """[N] how far each prompt's movement lies above the usual, in robust deviations, at its worst layer."""
        middle = np.median(self.moved, 1, keepdims=True)
        spread = 1.4826 * np.median(np.abs(self.moved - middle), 1, keepdims=True)
        return ((self.moved - middle) / np.maximum(spread, 1e-9)).max(0)

    def as_data(self) -> dict[str, Any]:
        """Plain JSON: means by layer."""
        top = {
            layer: [{"feature": int(k), "difference": float(gap[k])} for k in np.argsort(-np.abs(gap))[:10]]
            for layer, gap in self.features.items()
        }
        return {
            "moved": self.moved.mean(1).tolist(), "unlike": self.unlike.tolist(),
            "routing": self.routing.mean(1).tolist(), "answers_changed": float(self.changed.mean()), "features": top,
        }  # fmt: skip

    def __repr__(self) -> str:
        lines = ["layer  moved  unlike  routing"]
        told = zip(self.moved.mean(1), self.unlike, self.routing.mean(1), strict=True)
        lines += [f"{layer:5}  {m:5.2f}  {u:6.3f}  {r:7.3f}" for layer, (m, u, r) in enumerate(told)]
        return "\n".join([*lines, f"{100 * self.changed.mean():.0f} % of {len(self.answers)} answers differ"])


def compare_models(
    bundle: Any, reference: Any, prompts: Sequence[Any], *, saes: dict[int, Any] | None = None, seed: int = 0,
    sampler: SamplerConfig | None = None,
) -> ModelDiff:  # fmt: skip
    """Run both on the prompts and compare them layer by layer.

    Args:
        bundle, reference: of one architecture and tokenizer.
        saes: layer -> a sparse autoencoder of that layer's residual (`interp.SAE`), used on both.
        seed: of prompt 0; both models start from the same canvases.

    Raises:
        ValueError: architectures that cannot be compared.
    """
    own, other = of(bundle).config, of(reference).config
    same = ("vocab_size", "embed_dim", "num_layers", "canvas_length", "num_experts")
    unlike = [name for name in same if getattr(own, name) != getattr(other, name)]
    if unlike:
        raise ValueError(f"the models differ in {', '.join(unlike)}: give two checkpoints of one architecture")
    sites = ["layers.*.resid_post", "layers.*.router_probs"]
    seeds = [seed + i for i in range(len(prompts))]
    acts = [capture(b, list(prompts), sites, [0], seed=seeds, sampler=sampler) for b in (bundle, reference)]
    layers = range(own.num_layers)
    pairs = [[np.asarray(a[f"layers.{i}.resid_post"][0], np.float64) for a in acts] for i in layers]  # [B, C, D]
    moved = np.stack([(_norm(x - y) / np.maximum(_norm(y), 1e-30)).mean(-1) for x, y in pairs])
    routes = [[np.asarray(a[f"layers.{i}.router_probs"][0], np.float64) for a in acts] for i in layers]
    routing = np.stack([0.5 * np.abs(x - y).sum(-1).mean(-1) for x, y in routes])
    features = {}
    for layer, sae in (saes or {}).items():
        one, two = (np.asarray(sae.encode(x.astype(np.float32))) for x in pairs[layer])
        features[layer] = (one - two).mean((0, 1))
    sampler = inputs.parts(bundle)[2] if sampler is None else sampler
    texts = [
        dg.generate(b, list(prompts), seeds, sampler, own.canvas_length, dg.Record.nothing()).texts
        for b in (bundle, reference)
    ]
    return ModelDiff(
        moved=moved, unlike=np.array([1 - _cka(x, y) for x, y in pairs]), routing=routing,
        answers=tuple(zip(*texts, strict=True)), features=features,
    )  # fmt: skip


def _norm(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1)


def _cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear centred kernel alignment of [.., D] and [.., D], over all but the last axis."""
    x, y = (a.reshape(-1, a.shape[-1]) - a.reshape(-1, a.shape[-1]).mean(0) for a in (x, y))
    cross = np.linalg.norm(x.T @ y) ** 2
    return float(cross / max(np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y), 1e-30))
