"""What all tests share: strict JAX settings, and a tiny model with every part of the architecture."""

import gc
import importlib.metadata
import os
from pathlib import Path

import pytest

# Nearly all the time of the tests is compilation of programs that run once; this takes a third of it.
_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_JAXLIB = importlib.metadata.version("jaxlib")
_KNOWN = {"0.10.": " --xla_cpu_use_fusion_emitters=false", "0.12.": " --xla_cpu_emitter_verification_level=0"}
for _version, _flag in _KNOWN.items():  # a jaxlib that does not know a flag ends the process
    if _JAXLIB.startswith(_version):
        _FAST += f" --xla_cpu_parallel_codegen_split_count=1{_flag}"
os.environ["XLA_FLAGS"] = f"{_FAST} {os.environ.get('XLA_FLAGS', '')}".strip()

# The products of torch do not depend on where in memory a weight lies.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")

# Tracing makes many small objects, nearly all of which live on.
gc.set_threshold(100_000, 20, 20)

# Each compiled program keeps some memory maps; Linux allows a process 65,530, and XLA ends the process beyond.
_MAPS = Path("/proc/self/maps")
_MOST_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Forget compiled programs, between two files of tests, when there are many."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tiny():
    """A model of a few thousand random parameters: two sliding layers and a full one."""
    from oracles import build

    from dgemma_jax.config import ModelConfig

    return build(ModelConfig.tiny())


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """That of the embedded models."""
    from dgemma_jax.text import Tokenizer
    from dgemma_jax.train import language

    directory = tmp_path_factory.mktemp("tokenizer")
    language.write_tokenizer_files(directory)
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="session")
def organism(tmp_path_factory):
    """Directory of an untrained tiny model that has the vocabulary of the embedded ones."""
    from oracles import build

    import dgemma_jax as dg
    from dgemma_jax.text import Tokenizer
    from dgemma_jax.train import language

    directory = tmp_path_factory.mktemp("organism")
    language.write_tokenizer_files(directory)
    config = dg.ModelConfig.tiny(vocab_size=language.VOCAB_SIZE, layer_types=("sliding_attention", "full_attention"))
    sampler = dg.SamplerConfig(max_denoising_steps=6, eos_token_ids=config.eos_token_ids)
    bundle = dg.Bundle(config, build(config), Tokenizer.from_directory(directory), sampler)
    dg.save(bundle, directory)
    return directory
