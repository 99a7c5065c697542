"""The names of the Hugging Face checkpoint and the places of our tree: one table, read both ways.

It knows names and layouts only; files are read in `hf.py`. A *stored* array is as in the checkpoint.
Facts: `transformers` 5.23, models/diffusion_gemma; the released model.safetensors.index.json.
"""

from __future__ import annotations

import enum
import re
from typing import Any

from dgemma_jax.weights.tree import Path


class Layout(enum.Enum):
    """How the stored array differs from ours."""

    SAME = "same"
    HEADS_FIRST = "[heads * H, D] stored, [heads, H, D] here"
    HEADS_LAST = "[D, heads * H] stored, [D, heads, H] here"
    SWAPPED = "[E, D, F] stored, [E, F, D] here"

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the checkpoint of a leaf of this shape."""
        match self:
            case Layout.HEADS_FIRST:
                return (shape[0] * shape[1], shape[2])
            case Layout.HEADS_LAST:
                return (shape[0], shape[1] * shape[2])
            case Layout.SWAPPED:
                return (shape[0], shape[2], shape[1])
        return tuple(shape)

    def to_stored(self, array: Any) -> Any:
        """The array as the checkpoint keeps it; a view where possible."""
        array = array.swapaxes(1, 2) if self is Layout.SWAPPED else array
        return array if self is Layout.SWAPPED else array.reshape(self.stored_shape(array.shape))

    def from_stored(self, array: Any, shape: tuple[int, ...]) -> Any:
        """The stored array as a leaf of this shape; a view where possible."""
        return array.swapaxes(1, 2) if self is Layout.SWAPPED else array.reshape(shape)


_LAYER = "layers.{L}."
_TABLE: tuple[tuple[str, str, Layout], ...] = (
    # name under model.decoder, place in the tree, layout
    ("embed_tokens.weight", "embedder.table", Layout.SAME),
    ("norm.weight", "final_norm.weight", Layout.SAME),
    ("self_conditioning.pre_norm.weight", "self_conditioning.pre_norm.weight", Layout.SAME),
    ("self_conditioning.gate_proj.weight", "self_conditioning.gate", Layout.SAME),
    ("self_conditioning.up_proj.weight", "self_conditioning.up", Layout.SAME),
    ("self_conditioning.down_proj.weight", "self_conditioning.down", Layout.SAME),
    (_LAYER + "input_layernorm.weight", _LAYER + "input_norm.weight", Layout.SAME),
    (_LAYER + "post_attention_layernorm.weight", _LAYER + "post_attn_norm.weight", Layout.SAME),
    (_LAYER + "pre_feedforward_layernorm.weight", _LAYER + "pre_mlp_norm.weight", Layout.SAME),
    (_LAYER + "post_feedforward_layernorm_1.weight", _LAYER + "post_mlp_norm.weight", Layout.SAME),
    (_LAYER + "pre_feedforward_layernorm_2.weight", _LAYER + "pre_moe_norm.weight", Layout.SAME),
    (_LAYER + "post_feedforward_layernorm_2.weight", _LAYER + "post_moe_norm.weight", Layout.SAME),
    (_LAYER + "post_feedforward_layernorm.weight", _LAYER + "post_ffw_norm.weight", Layout.SAME),
    (_LAYER + "self_attn.q_proj.weight", _LAYER + "attention.q", Layout.HEADS_FIRST),
    (_LAYER + "self_attn.k_proj.weight", _LAYER + "attention.k", Layout.HEADS_FIRST),
    (_LAYER + "self_attn.v_proj.weight", _LAYER + "attention.v", Layout.HEADS_FIRST),
    (_LAYER + "self_attn.o_proj.weight", _LAYER + "attention.o", Layout.HEADS_LAST),
    (_LAYER + "self_attn.q_norm.weight", _LAYER + "attention.q_norm.weight", Layout.SAME),
    (_LAYER + "self_attn.k_norm.weight", _LAYER + "attention.k_norm.weight", Layout.SAME),
    (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.gate", Layout.SAME),
    (_LAYER + "mlp.up_proj.weight", _LAYER + "mlp.up", Layout.SAME),
    (_LAYER + "mlp.down_proj.weight", _LAYER + "mlp.down", Layout.SAME),
    (_LAYER + "router.proj.weight", _LAYER + "router.proj", Layout.SAME),
    (_LAYER + "router.scale", _LAYER + "router.scale", Layout.SAME),
    (_LAYER + "router.per_expert_scale", _LAYER + "router.per_expert_scale", Layout.SAME),
    (_LAYER + "experts.gate_up_proj", _LAYER + "experts.gate_up", Layout.SAME),
    (_LAYER + "experts.down_proj", _LAYER + "experts.down", Layout.SWAPPED),
    (_LAYER + "layer_scalar", _LAYER + "denoise_scalar", Layout.SAME),
)
_DECODER, _ENCODER = "model.decoder.", "model.encoder.language_model."
_SCALAR = "layer_scalar"  # the one weight that encoder and decoder do not share
_PLACES = {place: (_DECODER + name, layout) for name, place, layout in _TABLE} | {
    _LAYER + "prefill_scalar": (_ENCODER + _LAYER + _SCALAR, Layout.SAME)
}
_NAMES = {name: place for place, (name, _) in _PLACES.items()}
_NOT_USED_YET = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
# The arrays of `config.NO_VISION`, the image tower of a model without one.
_SMALLEST_TOWER = {
    "model.encoder.vision_tower.patch_embedder.input_proj.weight": (2, 3),
    "model.encoder.vision_tower.patch_embedder.position_embedding_table": (2, 1, 2),
    "model.encoder.embed_vision.embedding_projection.weight": ("D", 2),
}
# Endings that only quantised checkpoints have, and the scheme they betray.
_QUANTISED = {
    "weight_packed": "compressed-tensors (packed)",
    "weight_global_scale": "compressed-tensors NVFP4",
    "weight_scale_2": "ModelOpt NVFP4",
    "weight_scale_inv": "FP8 by blocks",
    "weight_scale": "FP8 or compressed-tensors",
    "input_scale": "FP8 with static activations",
    "qweight": "GPTQ or AWQ",
    "scales": "mlx, GPTQ or AWQ",
    "absmax": "bitsandbytes",
}


def key_of(path: Path) -> tuple[str, Layout] | None:
    """Checkpoint name and layout of a leaf, or None if checkpoints have no such weight."""
    place, index = _pattern(".".join(map(str, path)))
    found = _PLACES.get(place)
    return found and (found[0].replace("{L}", index), found[1])


def path_of(key: str) -> Path | None:
    """Place in the tree of a checkpoint name, or None if it has none."""
    name, index = _pattern(key)
    place = _NAMES.get(name)
    if place is None or "{" in key:
        return None
    return tuple(int(index) if part == "{L}" else part for part in place.split("."))


def tied_to(key: str) -> str | None:
    """The name whose weight this one repeats: the head, or the encoder's copy of a decoder weight."""
    if key == "lm_head.weight":
        return _DECODER + "embed_tokens.weight"
    twin = _DECODER + key.removeprefix(_ENCODER)
    shared = key.startswith(_ENCODER) and not key.endswith("." + _SCALAR) and "self_conditioning" not in key
    return twin if shared and path_of(twin) else None


def decoder_scalar(key: str) -> str | None:
    """For the encoder's layer scalar, the name of the decoder's."""
    is_scalar = key.startswith(_ENCODER) and key.endswith("." + _SCALAR)
    return _DECODER + key.removeprefix(_ENCODER) if is_scalar else None


def not_used_yet(key: str) -> bool:
    """True for weights of the image tower: known, and left where they are."""
    return key.startswith(_NOT_USED_YET)


def smallest_tower(embed_dim: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tower that `transformers` builds for `config.NO_VISION`."""
    return {key: tuple(embed_dim if size == "D" else size for size in shape) for key, shape in _SMALLEST_TOWER.items()}


def quantisation(key: str) -> str | None:
    """The scheme that this name betrays, or None for a plain weight."""
    return _QUANTISED.get(key.rsplit(".", 1)[-1])


def _pattern(name: str) -> tuple[str, str]:
    """`layers.17.x` as `layers.{L}.x` and "17"."""
    found = re.search(r"(?<=\blayers\.)(0|[1-9]\d*)(?=\.)", name)
    if found is None or name[: found.start()].removesuffix("layers.") not in ("", _DECODER, _ENCODER):
        return name, ""
    return name[: found.start()] + "{L}" + name[found.end() :], found.group()
