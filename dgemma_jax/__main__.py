"""`python -m dgemma_jax`, the same as `dgemma`."""

from dgemma_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
