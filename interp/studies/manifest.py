"""What a study was made of: enough to make it again, and to refuse to go on with anything else."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from dgemma_jax.nn.functional import of
from interp.fingerprint import fingerprint
from interp.studies.prompt_files import StudyPrompts

NAME = "manifest.json"
PACKAGES = ("dgemma-jax", "jax", "jaxlib", "flax", "numpy", "matplotlib", "tokenizers")


def described(bundle: Any, prompts: StudyPrompts, sampler: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest. It holds no time and no path, so that a study made again has the same."""
    model = of(bundle)
    text = json.dumps([vars(prompt) for prompt in prompts.prompts], sort_keys=True)
    device = jax.devices()[0]
    return {
        "model": {
            "name": Path(str(getattr(bundle, "source", None))).name, "fingerprint": fingerprint(bundle),
            "parameters": model.config.num_parameters, "dtype": str(model.dtype),
        },
        "prompts": {
            "count": len(prompts.prompts), "broken": list(prompts.broken),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        },
        "sampler": dataclasses.asdict(sampler),
        "settings": dict(settings),
        "device": f"{device.platform} {device.device_kind}",
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }  # fmt: skip


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"


def claim(out: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest into a directory, or find that the study there is this one.

    Raises:
        ValueError: the directory holds another study; says what differs.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, text = out / NAME, json.dumps(manifest, indent=1)
    if path.exists():
        there, now = json.loads(path.read_text("utf-8")), json.loads(text)
        differing = sorted(f"{a}.{b}" for a in now for b in _keys(now[a], there.get(a)))
        if differing:
            raise ValueError(f"{out} holds another study ({', '.join(differing)} differ); give another directory")
        return
    if any(out.glob("*.npz")) or (out / "parts").exists():
        if path.exists():  # another host of this study was here meanwhile
            return claim(out, manifest)
        raise ValueError(f"{out} holds rows without a manifest; give an empty directory")
    write_text(path, text + "\n")


def _keys(now: Any, there: Any) -> list[str]:
    """Keys of the entry that differ."""
    if now == there:
        return []
    if not isinstance(now, dict) or not isinstance(there, dict):
        return ["value"]
    return [key for key in {**now, **there} if now.get(key) != there.get(key)]


def clear(out: Path, numbers: Iterable[int] | None = None) -> None:
    """Take away what a run that was killed had half written; of these parts alone where other hosts are at work."""
    if numbers is not None:
        for number in numbers:
            for left in (out / "parts").glob(f"{number:05d}.*.part.npz"):
                left.unlink(missing_ok=True)
        return
    for folder in (out, out / "parts"):
        for left in (*folder.glob("*.part"), *folder.glob("*.part.npz")):
            left.unlink()


def write_text(path: Path, text: str) -> Path:
    """Write a file that is there whole or not at all."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    part.write_text(text, "utf-8")
    os.replace(part, path)
    return path
