"""Accelerators that programs are compiled for without being there: XLA works from a description of the chip.

JAX must be told before it starts, so this is for a process of its own; `environment` says with which settings.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

# name of the device, bytes of memory, bytes a second, bytes of second-level cache
GPUS = {
    "h100": ("NVIDIA H100 80GB HBM3", 84_978_434_048, 3_352_320_000_000, 52_428_800),
    "h200": ("NVIDIA H200", 150_754_820_096, 4_800_000_000_000, 62_914_560),
}
# topology and kind of the machine; of the first only one chip is used
TPUS = {"v5p": ("v5p:2x2x1", "v5p-8"), "v5e-8": ("v5e:2x4", "v5litepod-8")}
TARGETS = (*GPUS, *TPUS)

_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  l2_cache_size: {cache}
  dnn_version: "9.28.0"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}}
platform_name: "CUDA"
device_description_str: "{name}"
"""


def platform(target: str) -> str:
    """The name that JAX lowers for."""
    return "cuda" if target in GPUS else "tpu"


def missing(target: str) -> str | None:
    """Why nothing can be compiled for the target here, or None."""
    if target in TPUS:
        found = importlib.util.find_spec("libtpu")
        return None if found else "libtpu is not installed (pip install 'jax[tpu]'; no TPU is needed)"
    for cuda in (13, 12):
        try:
            importlib.metadata.version(f"jax-cuda{cuda}-plugin")
            importlib.metadata.version(f"jax-cuda{cuda}-pjrt")
        except importlib.metadata.PackageNotFoundError:
            continue
        return None
    return "the CUDA build of JAX is not installed (pip install 'jax[cuda13]'; no GPU is needed)"


def environment(target: str) -> dict[str, str]:
    """What must be set before JAX starts, so that it takes the compiler without the device."""
    settings = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    if target in TPUS:
        settings |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": TPUS[target][1],
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    return settings


def devices(target: str) -> list[Any]:
    """The devices that are not there, to be named in shardings."""
    from jax.experimental import topologies

    if target in TPUS:
        return list(topologies.get_topology_desc(TPUS[target][0], "tpu").devices)
    name, memory, bandwidth, cache = GPUS[target]
    chip = _HOPPER.format(name=name, memory=memory, bandwidth=bandwidth, cache=cache)
    return list(topologies.get_topology_desc(target, "cuda", topology="1x1x1", target_config=chip).devices)
