"""Many hosts: start `jax.distributed`, and meshes of the devices of this host or of all."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax

TIMEOUT = 300  # seconds to wait for the other processes


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, timeout: int = TIMEOUT
) -> None:
    """Join the other processes of this job; before anything asks for a device.

    Args:
        coordinator: "HOST:PORT" of process 0. None leaves all to JAX, which reads it from the environment of Slurm,
            Open MPI, GKE and TPU pods.
        processes, process: how many there are, and which this is; with `coordinator`.
        timeout: seconds.

    Raises:
        ValueError: the environment says nothing, or the numbers do not fit; JAX was used before.
    """
    given = (coordinator, processes, process)
    if any(x is not None for x in given) and None in given:
        raise ValueError(f"coordinator, processes and process go together, got {given}")
    if processes is not None and not 0 <= process < processes:
        raise ValueError(f"process must be in 0..{processes - 1}, got {process}")
    if jax.distributed.is_initialized():
        raise ValueError("jax.distributed has been started already in this process")
    try:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=timeout)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"jax.distributed does not start: {error}. Outside of Slurm, GKE and TPU pods give "
                         "coordinator='HOST:PORT', processes and process") from error  # fmt: skip


def mesh(axes: Mapping[str, int]) -> jax.sharding.Mesh:
    """A mesh of so many devices along each axis: of this host's own if they are enough, else of all hosts'.

    Raises:
        ValueError: there are not as many.
    """
    count, own, every = math.prod(axes.values()), jax.local_devices(), jax.devices()
    if count > len(every) or count < 1:
        raise ValueError(f"a mesh of {dict(axes)} needs {count} devices; there are {len(every)} on "
                         f"{jax.process_count()} host(s)")  # fmt: skip
    if len(own) < count < len(every):
        raise ValueError(f"a mesh of {dict(axes)} needs {count} devices: more than the {len(own)} of this host and "
                         f"fewer than the {len(every)} of all; take one or the other")  # fmt: skip
    devices = (own if count <= len(own) else every)[:count]
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices)
