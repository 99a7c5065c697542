"""Fetching a checkpoint from the Hugging Face hub, once; the only code that may use the network."""

from __future__ import annotations

import json
import re
from pathlib import Path

from dgemma_jax.weights import registry

_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def plausible(name: str) -> bool:
    """Whether this could be a hub id, `owner/name`."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def fetch(name: str, revision: str | None = None) -> Path:
    """The local directory of a hub model: from the cache if it is complete there, else downloaded (resuming).

    A model of the registry has its pinned revision unless another is given.

    Raises:
        ValueError: it cannot be had; the message says what to do.
    """
    release = registry.RELEASES.get(name)
    repo = release.repo if release else name
    if release and revision is None:
        revision = release.revision
    import huggingface_hub
    from huggingface_hub import errors

    def snapshot(offline: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=list(_FILES), local_files_only=offline
            )
        )

    pinned = revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None
    if pinned:  # a commit never changes: what is here is right if it is whole
        try:
            cached = snapshot(offline=True)
            if _complete(cached):
                return cached
        except (errors.LocalEntryNotFoundError, OSError):
            pass
    at = f"{repo} at {revision}" if revision else repo
    try:
        return snapshot(offline=False)
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{at}: access must be granted first. Accept the terms at https://huggingface.co/{repo}, then run "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{repo} has no revision {revision!r}; see https://huggingface.co/{repo}/commits") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no model {repo!r} on the hub, or it is private. Check the name; for a private model run "
            f"`hf auth login`. For a directory give an existing path. Known names: {registry.names()}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(
            f"{at} is not in the local cache and the hub cannot be reached. Connect once, or copy the files and "
            "load the directory"
        ) from error
    except (*errors.HfHubHTTPError.__bases__, RuntimeError, OSError) as error:  # connections, broken transfers, disk
        raise ValueError(f"downloading {at} failed ({error}). Call again: what is there is kept") from error


def _complete(directory: Path) -> bool:
    """Whether every file that the weights need is there (a broken-off download leaves some out)."""
    if not all((directory / name).is_file() for name in ("config.json", "tokenizer.json")):
        return False
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return (directory / "model.safetensors").is_file()
    shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    return all((directory / shard).is_file() for shard in shards)
