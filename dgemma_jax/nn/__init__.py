"""The text model: `flax.nnx` modules used as plain pytrees. Start reading at `transformer.py`."""
