"""Benchmarks: each compares with a peer in one run, prints a table and can keep its numbers in `results/`.

| command | measures |
|---|---|
| python -m dgemma_jax.bench.peer | a denoising step and a generation with Hugging Face `transformers`, on CPU |
| python -m dgemma_jax.bench.throughput | many prompts of mixed lengths with batches of `transformers`, on CPU |
| python -m dgemma_jax.bench.compiled | nothing: what the release's programs need, compiled for absent accelerators |
| dgemma bench | the machine's ceilings, steps and their parts, prefill, generation; autoregression, `transformers` |
| python -m dgemma_jax.bench.peer | a denoising step and a generation against Hugging Face `transformers`, on CPU |
| python -m dgemma_jax.bench.quantized | what weights in few bits cost in quality |

`dgemma bench` (`run.py`) times the items of `items.py` and `peer_items.py` at the sizes of `work.py`, with the least
that each needs from `roofline.py`, into the file of `lines.py`, shown by `table.py`. Benchmarks are no tests: nothing
here fails because a machine is slow.
"""
