"""Benchmarks: each compares with a peer in one run, prints a table and can keep its numbers in `results/`.

| command | compares |
|---|---|
| python -m dgemma_jax.bench.peer | a denoising step and a generation with Hugging Face `transformers`, on CPU |
| python -m dgemma_jax.bench.throughput | many prompts of mixed lengths with batches of `transformers`, on CPU |
| python -m dgemma_jax.bench.compiled | nothing: what the release's programs need, compiled for absent accelerators |

They are no tests: nothing here fails because a machine is slow.
"""
