"""The JSON files beside the weights: `config.json`, `generation_config.json`, and what the latter cannot say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgemma_jax.config import ModelConfig, SamplerConfig
from dgemma_jax.weights import problems

CONFIG, GENERATION, SAMPLER = "config.json", "generation_config.json", "dgemma_sampler.json"
PACKED = "dgemma_packed.json"
# Sampler options that `generation_config.json` has no name for (and `transformers` refuses unknown names).
_OWN = ("early_stop", "commit", "stability")


def read_config(directory: Path) -> ModelConfig:
    """The model's configuration.

    Raises:
        ValueError: the file is missing, damaged, of another model or of a quantised checkpoint.
    """
    if not (directory / CONFIG).is_file():
        raise ValueError(f"{directory} has no {CONFIG}; it holds {problems.listing(directory)}")
    fields = _json(directory / CONFIG)
    for key in ("quantization_config", "compression_config", "quantization"):
        scheme = fields.get(key) or (fields.get("text_config") or {}).get(key)
        if scheme:
            raise quantised(_scheme(key, scheme), directory)
    if (directory / "hf_quant_config.json").is_file():
        raise quantised(f"ModelOpt {_scheme('', _json(directory / 'hf_quant_config.json'))}", directory)
    return ModelConfig.from_hf(fields)


def read_sampler(directory: Path, config: ModelConfig) -> SamplerConfig:
    """The sampler of the directory; without a file, the defaults with the model's end tokens."""
    fields = _json(directory / GENERATION) if (directory / GENERATION).is_file() else {}
    sampler = SamplerConfig.from_hf(fields, config)
    own = _json(directory / SAMPLER) if (directory / SAMPLER).is_file() else {}
    return sampler.replace(**own)


def read_packed(directory: Path) -> dict[str, str] | None:
    """`form` of the weights in few bits and the `dtype` that is computed in; None for plain weights."""
    return _json(directory / PACKED) if (directory / PACKED).is_file() else None


def write(
    directory: Path, config: ModelConfig, sampler: SamplerConfig | None, dtype: str,
    packed: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write the settings that `read_config`, `read_sampler` and `read_packed` give back."""
    _write_json(directory / CONFIG, config.to_hf(dtype))
    if packed:
        _write_json(directory / PACKED, dict(packed))
    if sampler is None:
        return
    _write_json(directory / GENERATION, sampler.to_hf())
    default = SamplerConfig()
    own = {name: getattr(sampler, name) for name in _OWN if getattr(sampler, name) != getattr(default, name)}
    if own:
        _write_json(directory / SAMPLER, own)


def quantised(scheme: str, where: Any) -> ValueError:
    """The error for weights that are not plain floats."""
    return ValueError(
        f"{where} holds quantised weights ({scheme}), which are not supported; "
        "use the bfloat16 checkpoint 'google/diffusiongemma-26B-A4B-it' or one converted to float"
    )


def _scheme(key: str, fields: Any) -> str:
    if not isinstance(fields, dict):
        return str(fields)
    fields = fields.get("quantization", fields)
    words = [fields.get(name) for name in ("quant_method", "quant_algo", "format")]
    if key == "quantization":
        words += ["mlx", f"{fields['bits']}-bit" if "bits" in fields else None]
    return " ".join(str(w) for w in words if w) or "unknown scheme"


def _json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(fields).__name__}")
    return fields


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
