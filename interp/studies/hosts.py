"""A study on many hosts: parts are dealt out by number, and whoever sees the last of them in the directory joins them.

Hosts share the directory and nothing else, so that losing one loses no more than its part in the making: run its share
again, or the study without `hosts`, which makes whatever is missing. Where one model lies over several hosts, these
make every part together and the first writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dgemma_jax.nn import meshes
from dgemma_jax.nn.functional import of


@dataclasses.dataclass(frozen=True)
class Share:
    """What this host makes of a study.

    Attributes:
        host, hosts: the parts whose number is `host` modulo `hosts`.
        together: all processes run each part; only the first writes.
    """

    host: int = 0
    hosts: int = 1
    together: bool = False

    @classmethod
    def of(cls, bundle: Any, hosts: int | None = None, host: int | None = None) -> Share:
        """As given; by default by `jax.process_index()` where each process has a model of its own.

        Raises:
            ValueError: one number without the other, a host that is none, a model over several hosts that are told
                to share out the prompts.
        """
        together = meshes.spans_processes(meshes.of(of(bundle)))
        if hosts is None and host is None:
            return cls(together=True) if together else cls(jax.process_index(), jax.process_count())
        if hosts is None or host is None or not 0 <= host < hosts:
            raise ValueError(f"needed are hosts >= 1 and host in 0..hosts - 1, got hosts={hosts}, host={host}")
        if together:
            raise ValueError("the model lies over several processes, which run every prompt together: leave out hosts "
                             "and host, or give each process a mesh of its own devices")  # fmt: skip
        return cls(host, hosts)

    @property
    def writes(self) -> bool:
        return not self.together or jax.process_index() == 0

    def mine(self, numbers: Iterable[int]) -> list[int]:
        """Those of the parts that this host makes, finished or not."""
        return [number for number in numbers if number % self.hosts == self.host]

    def absent(self, paths: list[Path]) -> list[int]:
        """Numbers of the parts that are not there; where processes work together, as the first sees it."""
        found = np.array([not path.exists() for path in paths])
        if self.together:
            from jax.experimental import multihost_utils

            found = multihost_utils.broadcast_one_to_all(found)
        return np.flatnonzero(found).tolist()

    def meet(self) -> None:
        """Wait until all processes that work together are here."""
        if self.together:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("study")
