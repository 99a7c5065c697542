"""Autoencoders in the file format of SAELens 6: a folder with `cfg.json` and `sae_weights.safetensors`.

Tensors: W_enc [D, F], b_enc [F], W_dec [F, O], b_dec [O], and threshold [F] of JumpReLU. The architecture is named in
`cfg.json`. BatchTopK is written as JumpReLU, as SAELens itself does after training. Source: SAELens,
sae_lens/saes/{sae,topk_sae,jumprelu_sae,transcoder}.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from interp.features.sae import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_READ = ("standard", "topk", "jumprelu", "transcoder", "jumprelu_transcoder")


def save_sae(sae: SAE, directory: str | Path, *, model: str = "", site: str = "", **about: Any) -> Path:
    """Write a folder that SAELens loads with `SAE.load_from_disk`.

    Args:
        model: name of the model, for `metadata.model_name`.
        site: where the activations come from, for `metadata.hook_name`.
        **about: more metadata, as JSON.

    Raises:
        ValueError: an autoencoder conditioned on noise, or a TopK transcoder: the format has neither.
    """
    from safetensors.numpy import save_file

    if sae.shift is not None:
        raise ValueError("SAELens has no place for a bias by noise level: save sae.at_level(0.2), one file a level")
    if sae.kind == "topk" and not sae.centred:
        raise ValueError("SAELens has no TopK transcoder: train it with kind='batchtopk' or 'jumprelu'")
    names = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}
    tensors = {
        names[field]: np.ascontiguousarray(np.asarray(getattr(sae, field), np.float32))
        for field in names if getattr(sae, field) is not None
    }  # fmt: skip
    settings = {
        "d_in": sae.w_enc.shape[0], "d_sae": sae.num_features, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": sae.centred, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"model_name": model, "hook_name": site, "training_k": sae.k} | about,
    }  # fmt: skip
    if sae.kind == "topk":
        settings |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if not sae.centred:
        settings |= {"d_out": sae.w_dec.shape[1]}
    settings["architecture"] = sae.kind if sae.centred else "jumprelu_transcoder"
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
    return directory


def site_of(directory: str | Path) -> str | None:
    """The site that the folder names as its own; None if it names none."""
    told = json.loads((Path(directory) / CONFIG).read_text("utf-8")).get("metadata") or {}
    return told.get("hook_name") or None


def load_sae(directory: str | Path) -> SAE:
    """Read a folder that SAELens or `save_sae` wrote.

    Raises:
        ValueError: an architecture, a normalisation or a reshaping that is not one of ours; tensors that are missing
            or do not fit the configuration.
    """
    from safetensors.numpy import load_file

    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).exists():
            raise ValueError(f"{directory} has no {name}: it is no autoencoder of SAELens")
    config = json.loads((directory / CONFIG).read_text("utf-8"))
    kind = config.get("architecture", "standard")
    if kind not in _READ:
        raise ValueError(f"{directory} holds the architecture {kind!r}; those read are {', '.join(_READ)}")
    for setting in ("normalize_activations", "reshape_activations"):
        if config.get(setting, "none") != "none":
            raise ValueError(f"{directory / CONFIG} has {setting}={config[setting]!r}; fold it into the weights first")
    tensors = {name: np.asarray(t, np.float32) for name, t in load_file(directory / WEIGHTS).items()}
    width, features = config["d_in"], config["d_sae"]
    out = config.get("d_out", width)
    shapes = {"W_enc": (width, features), "b_enc": (features,), "W_dec": (features, out), "b_dec": (out,)}
    if kind.startswith("jumprelu"):
        shapes["threshold"] = (features,)
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            found = tensors[name].shape if name in tensors else "nothing"
            raise ValueError(f"{directory / WEIGHTS} has {found} as {name}; {CONFIG} says {shape}")
    if config.get("rescale_acts_by_decoder_norm"):  # its activations are ours: the norm goes into the encoder
        norm_F = np.linalg.norm(tensors["W_dec"], axis=-1)
        tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norm_F, tensors["b_enc"] * norm_F
        tensors["W_dec"] = tensors["W_dec"] / norm_F[:, None]
    threshold = tensors.get("threshold", np.zeros(features, np.float32))
    return SAE(
        w_enc=jnp.asarray(tensors["W_enc"]), b_enc=jnp.asarray(tensors["b_enc"]), w_dec=jnp.asarray(tensors["W_dec"]),
        b_dec=jnp.asarray(tensors["b_dec"]), threshold=None if kind == "topk" else jnp.asarray(threshold),
        kind="topk" if kind == "topk" else "jumprelu",
        k=config["k"] if kind == "topk" else config.get("metadata", {}).get("training_k") or 0,
        centred=bool(config.get("apply_b_dec_to_input", True)) and "transcoder" not in kind,
    )  # fmt: skip
