"""Configurations: frozen, validated, plain values; from and to the Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax

SLIDING, FULL = "sliding_attention", "full_attention"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image tower as the checkpoint describes it. Recognised and kept, not used yet."""

    raw: str  # the JSON text of `vision_config`

    @property
    def fields(self) -> dict[str, Any]:
        """The parsed JSON object."""
        return json.loads(self.raw)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the text model. The defaults are the released 26B-A4B checkpoint.

    `layer_types` decides per layer between sliding attention (`num_kv_heads`, `head_dim`, own value
    projection) and full attention (`num_global_kv_heads`, `global_head_dim`, keys reused as values).
    """

    vocab_size: int = 262_144
    embed_dim: int = 2816
    hidden_dim: int = 2112
    num_heads: int = 16
    num_kv_heads: int = 8
    num_global_kv_heads: int = 2
    head_dim: int = 256
    global_head_dim: int = 512
    layer_types: tuple[str, ...] = ((SLIDING,) * 5 + (FULL,)) * 5
    sliding_window: int = 1024
    num_experts: int = 128
    experts_per_token: int = 8
    expert_dim: int = 704
    canvas_length: int = 256
    max_position_embeddings: int = 262_144
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    global_rope_theta: float = 1_000_000.0
    global_rope_fraction: float = 0.25
    global_rope_proportional: bool = True
    rms_norm_eps: float = 1e-6
    final_logit_softcap: float = 30.0
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_ids: tuple[int, ...] = (1, 106)
    vision: VisionConfig | None = None

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            _require(isinstance(value, int) and value > 0, f"{name} must be a positive integer, got {value!r}")
        _require(len(self.layer_types) > 0, "layer_types is empty: name one attention type for each layer")
        unknown = sorted(set(self.layer_types) - {SLIDING, FULL})
        _require(not unknown, f"layer_types has {unknown}; each must be {SLIDING!r} or {FULL!r}")
        _require(self.sliding_window >= 2, f"sliding_window must be at least 2, got {self.sliding_window}")
        for kv in ("num_kv_heads", "num_global_kv_heads"):
            value = getattr(self, kv)
            _require(
                self.num_heads % value == 0,
                f"{kv}={value} does not divide num_heads={self.num_heads}; choose a divisor",
            )
        for dim in ("head_dim", "global_head_dim"):
            _require(getattr(self, dim) % 2 == 0, f"{dim} must be even (rotary pairs), got {getattr(self, dim)}")
        _require(
            self.experts_per_token <= self.num_experts,
            f"experts_per_token={self.experts_per_token} exceeds num_experts={self.num_experts}",
        )
        for name in ("rope_fraction", "global_rope_fraction"):
            _require(0 < getattr(self, name) <= 1, f"{name} must be in (0, 1], got {getattr(self, name)}")
        _require(self.final_logit_softcap > 0, "final_logit_softcap must be positive")
        for name in ("pad_token_id", "bos_token_id"):
            value = getattr(self, name)
            _require(0 <= value < self.vocab_size, f"{name}={value} is outside the vocabulary of {self.vocab_size}")

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    def is_sliding(self, layer: int) -> bool:
        return self.layer_types[layer] == SLIDING

    def kv_heads(self, layer: int) -> int:
        return self.num_kv_heads if self.is_sliding(layer) else self.num_global_kv_heads

    def head_size(self, layer: int) -> int:
        return self.head_dim if self.is_sliding(layer) else self.global_head_dim

    @property
    def num_parameters(self) -> int:
        """Number of text parameters, layer scalars of both passes included."""
        d, f, e = self.embed_dim, self.expert_dim, self.num_experts
        total = self.vocab_size * d + d + d + 3 * d * self.hidden_dim
        for layer in range(self.num_layers):
            h, k = self.head_size(layer), self.kv_heads(layer)
            total += 2 * self.num_heads * h * d + (2 if self.is_sliding(layer) else 1) * k * h * d + 2 * h
            total += 3 * d * self.hidden_dim + 3 * e * d * f + e * d + d + e + 7 * d + 2
        return total

    @classmethod
    def tiny(cls, **overrides: Any) -> ModelConfig:
        """A model of a few thousand parameters with every part of the architecture, for tests."""
        sizes = dict(
            vocab_size=96, embed_dim=32, hidden_dim=48, num_heads=4, num_kv_heads=2, num_global_kv_heads=1,
            head_dim=8, global_head_dim=16, layer_types=(SLIDING, SLIDING, FULL), sliding_window=8,
            num_experts=6, experts_per_token=2, expert_dim=16, canvas_length=12,
            max_position_embeddings=512, eos_token_ids=(1, 5),
        )  # fmt: skip
        return cls(**(sizes | overrides))

    @classmethod
    def from_hf(cls, fields: dict[str, Any]) -> ModelConfig:
        """Read a parsed `config.json` of model type `diffusion_gemma`.

        As `transformers` does, the last layer is taken as full attention whatever the file says, and
        missing `layer_types` mean five sliding layers before each full one.
        """
        kind = fields.get("model_type")
        _require(
            kind == "diffusion_gemma",
            f"config.json has model_type {kind!r}; this package reads 'diffusion_gemma' checkpoints only",
        )
        _require(isinstance(fields.get("text_config"), dict), "config.json has no text_config object")
        text = dict(fields["text_config"])
        missing = [key for key in _REQUIRED if text.get(key) is None]
        _require(not missing, f"text_config of config.json lacks {missing}; the class defaults are not the release")
        for key, wanted in _FIXED.items():
            got = text.get(key, wanted)
            _require(got in (wanted, None), f"text_config.{key} is {got!r}; only {wanted!r} is supported")
        num_layers = int(text["num_hidden_layers"])
        kinds = text.get("layer_types") or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(num_layers)]
        _require(
            len(kinds) == num_layers,
            f"layer_types has {len(kinds)} entries, num_hidden_layers says {num_layers}",
        )
        kinds = [*kinds[:-1], FULL]
        bidirectional = text.get("use_bidirectional_attention")
        _require(
            bidirectional in (None, "vision"),
            f"text_config.use_bidirectional_attention is {bidirectional!r}; only 'vision' or null is supported",
        )
        rope = text.get("rope_parameters") or {}
        sliding, full = rope.get(SLIDING) or {}, rope.get(FULL) or {}
        _require(
            sliding.get("rope_type", "default") == "default"
            and full.get("rope_type", "proportional") in ("default", "proportional"),
            f"rope_parameters {rope} has a rope_type that is not supported (sliding: default; full: proportional)",
        )
        eos = fields.get("eos_token_id", text.get("eos_token_id", 1))
        full_head_dim, full_kv_heads = _full_layers(text, kinds)
        vision = fields.get("vision_config")
        proportional = full.get("rope_type", "proportional") == "proportional"
        return cls(
            vocab_size=text["vocab_size"],
            embed_dim=text["hidden_size"],
            hidden_dim=text["intermediate_size"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            num_global_kv_heads=full_kv_heads,
            head_dim=text["head_dim"],
            global_head_dim=full_head_dim,
            layer_types=tuple(kinds),
            sliding_window=text["sliding_window"],
            num_experts=text["num_experts"],
            experts_per_token=text["top_k_experts"],
            expert_dim=text["moe_intermediate_size"],
            canvas_length=fields.get("canvas_length") or 256,
            max_position_embeddings=text.get("max_position_embeddings", 131_072),
            rope_theta=float(sliding.get("rope_theta", 1e4)),
            rope_fraction=float(sliding.get("partial_rotary_factor", 1.0)),
            global_rope_theta=float(full.get("rope_theta", 1e6)),
            global_rope_fraction=float(full.get("partial_rotary_factor", 0.25 if proportional else 1.0)),
            global_rope_proportional=proportional,
            rms_norm_eps=float(text.get("rms_norm_eps", 1e-6)),
            final_logit_softcap=float(text.get("final_logit_softcapping", 30.0)),
            pad_token_id=_first(text.get("pad_token_id"), 0),
            bos_token_id=_first(text.get("bos_token_id"), 2),
            eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else (eos,),
            vision=VisionConfig(raw=json.dumps(vision)) if vision and vision.get("num_hidden_layers") != 0 else None,
        )

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """The `config.json` that `transformers` reads; `dtype` is the storage type of the weights."""
        full = {"rope_type": "proportional", "partial_rotary_factor": self.global_rope_fraction}
        if not self.global_rope_proportional:
            full = {"rope_type": "default", "partial_rotary_factor": self.global_rope_fraction}
        sliding: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_fraction != 1.0:
            sliding["partial_rotary_factor"] = self.rope_fraction
        text = {
            "model_type": "diffusion_gemma_text",
            "vocab_size": self.vocab_size,
            "hidden_size": self.embed_dim,
            "intermediate_size": self.hidden_dim,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "num_global_key_value_heads": self.num_global_kv_heads,
            "head_dim": self.head_dim,
            "global_head_dim": self.global_head_dim,
            "layer_types": list(self.layer_types),
            "sliding_window": self.sliding_window,
            "num_experts": self.num_experts,
            "top_k_experts": self.experts_per_token,
            "moe_intermediate_size": self.expert_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_parameters": {SLIDING: sliding, FULL: full | {"rope_theta": self.global_rope_theta}},
            "rms_norm_eps": self.rms_norm_eps,
            "final_logit_softcapping": self.final_logit_softcap,
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "tie_word_embeddings": True,
            "use_bidirectional_attention": "vision" if self.vision else None,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids),
            "dtype": dtype,
        }
        fields = {
            "architectures": ["DiffusionGemmaForBlockDiffusion"],
            "model_type": "diffusion_gemma",
            "text_config": text,
            "canvas_length": self.canvas_length,
            "eos_token_id": list(self.eos_token_ids),
            "tie_word_embeddings": True,
            "dtype": dtype,
            "vision_config": self.vision.fields if self.vision else dict(NO_VISION),
        }
        return fields


# `transformers` builds an image tower for every model, 16 layers of it where the file says nothing. This is the
# smallest that it accepts: no layers. It stands for "no vision" in both directions.
NO_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 2,
    "intermediate_size": 2,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "patch_size": 1,
    "pooling_kernel_size": 1,
    "position_embedding_size": 1,
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "num_experts",
    "top_k_experts",
    "moe_intermediate_size",
)
_POSITIVE = (
    "vocab_size",
    "embed_dim",
    "hidden_dim",
    "num_heads",
    "num_kv_heads",
    "num_global_kv_heads",
    "head_dim",
    "global_head_dim",
    "num_experts",
    "experts_per_token",
    "expert_dim",
    "canvas_length",
    "max_position_embeddings",
)
_FIXED = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "tie_word_embeddings": True}


def _full_layers(text: dict[str, Any], kinds: list[str]) -> tuple[int, int]:
    """Head size and KV heads of full layers: named (the release), or per layer (as `transformers` saves them)."""
    named = (text.get("global_head_dim") or 512, text.get("num_global_key_value_heads") or text["num_key_value_heads"])
    own = {int(layer): sizes for layer, sizes in (text.get("per_layer_config") or {}).items()}
    if not own:
        return named
    sizes = {
        layer: (own.get(layer, {}).get("head_dim", text["head_dim"]),
                own.get(layer, {}).get("num_key_value_heads", text["num_key_value_heads"]))
        for layer in range(len(kinds))
    }  # fmt: skip
    full = {sizes[layer] for layer, kind in enumerate(kinds) if kind == FULL}
    sliding = {sizes[layer] for layer, kind in enumerate(kinds) if kind == SLIDING}
    _require(
        len(full) == 1
        and sliding <= {(text["head_dim"], text["num_key_value_heads"])}
        and all(set(own[layer]) <= {"head_dim", "num_key_value_heads"} for layer in own),
        f"text_config.per_layer_config {own} is not supported; full layers may have one other head_dim and "
        "num_key_value_heads, the rest must be as in text_config",
    )
    return full.pop()


def _first(value: Any, default: int) -> int:
    return default if value is None else value


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """The entropy-bound sampler (arXiv 2505.24857) with a linear temperature and an adaptive stop.

    A pytree whose leaves are the real-valued settings, so that changing them never recompiles.

    Attributes:
        max_denoising_steps: cap N on the steps of one block; the temperature schedule depends on it.
        entropy_bound: nats; accepted positions carry at most this much entropy beside their largest.
        t_max, t_min: temperature at step i is t_min + (t_max - t_min) * (N - i) / N.
        stability_threshold: number of previous steps whose argmax must equal the present one.
        confidence_threshold: nats; the mean entropy over the canvas must be below it to stop.
        early_stop: False runs exactly `max_denoising_steps` steps.
        commit: "argmax" of the last shaped logits (Hugging Face), or the last "canvas" (Google's JAX code).
        stability: what the argmax is compared with: the previous "argmax", or the "canvas" fed in (Google).
        eos_token_ids, pad_token_id: a block holding an end token ends its row; what follows becomes padding.
    """

    max_denoising_steps: int = 48
    entropy_bound: float = 0.1
    t_max: float = 0.8
    t_min: float = 0.4
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    early_stop: bool = True
    commit: str = "argmax"
    stability: str = "argmax"
    eos_token_ids: tuple[int, ...] = (1, 106, 50)
    pad_token_id: int = 0

    _DATA = ("entropy_bound", "t_max", "t_min", "confidence_threshold")

    def __post_init__(self) -> None:
        steps, stable = self.max_denoising_steps, self.stability_threshold
        _require(isinstance(steps, int) and steps >= 1, f"max_denoising_steps must be an integer >= 1, got {steps!r}")
        _require(
            isinstance(stable, int) and stable >= 0, f"stability_threshold must be an integer >= 0, got {stable!r}"
        )
        for name in self._DATA:
            value = getattr(self, name)
            _require(
                isinstance(value, int | float) and math.isfinite(value),
                f"{name} must be a finite number, got {value!r}",
            )
            object.__setattr__(self, name, float(value))  # an integer would be another type to jit: a recompile
        _require(self.entropy_bound >= 0, f"entropy_bound must be >= 0 nats, got {self.entropy_bound}")
        _require(self.t_min >= 0, f"t_min must be >= 0, got {self.t_min}")
        _require(self.t_max > self.t_min, f"t_max must exceed t_min, got t_max={self.t_max}, t_min={self.t_min}")
        _require(self.confidence_threshold > 0, f"confidence_threshold must be > 0, got {self.confidence_threshold}")
        for name in ("commit", "stability"):
            value = getattr(self, name)
            _require(value in ("argmax", "canvas"), f"{name} must be 'argmax' or 'canvas', got {value!r}")

    @classmethod
    def google(cls, **overrides: Any) -> SamplerConfig:
        """The variant of google-deepmind/gemma: commits the last canvas, compares with the canvas fed in."""
        return cls(**({"commit": "canvas", "stability": "canvas"} | overrides))

    @classmethod
    def gentle(cls, **overrides: Any) -> SamplerConfig:
        """The gentle schedule of the truncation studies: 96 steps, temperature 1.0 to 0.5, bound 0.02."""
        settings = dict(max_denoising_steps=96, t_max=1.0, t_min=0.5, entropy_bound=0.02)
        return cls(**(settings | overrides))

    def replace(self, **changes: Any) -> SamplerConfig:
        """A validated copy with some fields changed."""
        known = {f.name for f in dataclasses.fields(self)}
        unknown = sorted(set(changes) - known)
        _require(not unknown, f"unknown sampler option {unknown}; known are {sorted(known)}")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_hf(cls, fields: dict[str, Any], config: ModelConfig | None = None) -> SamplerConfig:
        """Read a parsed `generation_config.json`; what it does not say keeps the default."""
        settings: dict[str, Any] = {
            key: fields[key]
            for key in ("max_denoising_steps", "t_max", "t_min", "stability_threshold", "confidence_threshold")
            if fields.get(key) is not None
        }
        bound = (fields.get("sampler_config") or {}).get("entropy_bound")
        if bound is not None:
            settings["entropy_bound"] = bound
        eos = fields.get("eos_token_id")
        if eos is None and config is not None:
            eos = list(config.eos_token_ids)
        if eos is not None:
            settings["eos_token_ids"] = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        if fields.get("pad_token_id") is not None:
            settings["pad_token_id"] = fields["pad_token_id"]
        return cls(**settings)

    def to_hf(self) -> dict[str, Any]:
        """The `generation_config.json` that `transformers` reads; it has no name for how to stop and commit."""
        return {
            "max_new_tokens": 256,
            "max_denoising_steps": self.max_denoising_steps,
            "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": self.entropy_bound},
            "t_max": self.t_max,
            "t_min": self.t_min,
            "stability_threshold": self.stability_threshold,
            "confidence_threshold": float(self.confidence_threshold),  # it refuses an integer
            "eos_token_id": list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }

    def tree_flatten(self):
        fixed = tuple(f.name for f in dataclasses.fields(self) if f.name not in self._DATA)
        return tuple(getattr(self, n) for n in self._DATA), tuple((n, getattr(self, n)) for n in fixed)

    @classmethod
    def tree_unflatten(cls, fixed, data):
        config = object.__new__(cls)  # leaves may be tracers: no validation here
        for name, value in (*fixed, *zip(cls._DATA, data, strict=True)):
            object.__setattr__(config, name, value)
        return config
