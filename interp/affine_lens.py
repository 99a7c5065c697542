"""What a lens does to a residual before the model reads it: an affine map a layer. The tuned and the Jacobian lens.

    lens_l(h) = cap tanh(W norm(M_l h + b_l) / cap)

W is the table, `norm` the model's final norm. M = 1 and b = 0 is the plain logit lens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgemma_jax.nn.functional import of
from interp import array_files
from interp.gates import table


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AffineLens:
    """A map of the residual of each layer to the residual of the last one. A pytree: the maps are data.

    Attributes:
        matrix: [L, D, D] float32, M_l.
        bias: [L, D] float32, b_l.
        layers: which layers these are, rising.
        method: in words: "identity", "tuned (200 updates)", "Jacobian (4 moments)".
    """

    matrix: jax.Array
    bias: jax.Array
    layers: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
    method: str = dataclasses.field(default="", metadata=dict(static=True))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] of [..., D], for the lens of one layer, `lens[3]`; float32."""
        return jnp.einsum("...d,ed->...e", x.astype(jnp.float32), self.matrix) + self.bias

    def __getitem__(self, layer: int) -> AffineLens:
        """The lens of one layer, without the axis of layers."""
        at = self._index([layer])[0]
        return AffineLens(self.matrix[at], self.bias[at], (layer,), self.method)

    def of_layers(self, layers: Sequence[int]) -> AffineLens:
        """The lens of some layers, in this order."""
        at = self._index(layers)
        return AffineLens(self.matrix[at], self.bias[at], tuple(layers), self.method)

    def fitting(self, model: Any, layers: Sequence[int]) -> AffineLens:
        """The lens of some layers of this model.

        Raises:
            ValueError: the model has another width, or the lens lacks a layer.
        """
        width = of(model).config.embed_dim
        if self.matrix.shape[-1] != width:
            raise ValueError(f"the lens has width {self.matrix.shape[-1]}, the model {width}: fit one on this model")
        return self.of_layers(layers)

    def _index(self, layers: Sequence[int]) -> np.ndarray:
        missing = [layer for layer in layers if layer not in self.layers]
        if missing:
            raise ValueError(f"the lens has no layer {missing[0]}; it has {list(self.layers)}: choose among these")
        return np.asarray([self.layers.index(layer) for layer in layers])

    def directions(self, model: Any, tokens: Sequence[int], *, norm: bool = True) -> jax.Array:
        """[L, n, D], along which each layer writes what the lens reads as these tokens: M_l^T w_v.

        For `interp.edit(model, "layers.*.resid_post", interp.ProjectOut(directions))`: afterwards the logit of these
        tokens in a lens without bias is 0 in each layer of the lens. `methods.md` 13.4.

        Args:
            model: a model or a bundle, whose table has the rows w_v.
            tokens: ids.
            norm: w_v times the weight of the final norm, which stands between the residual and the table. False
                takes the bare row, as the published code does.
        """
        model = of(model)
        tokens = np.atleast_1d(np.asarray(tokens))
        size = model.config.vocab_size
        if tokens.dtype.kind not in "iu" or tokens.size == 0 or tokens.min() < 0 or tokens.max() >= size:
            raise ValueError(f"tokens must be ids in 0..{size - 1}, got {tokens.tolist()}")
        rows_ND = model.embedder.table[...][tokens].astype(jnp.float32)
        if norm:
            rows_ND = rows_ND * model.final_norm.weight[...].astype(jnp.float32)
        return jnp.einsum("lde,nd->lne", self.matrix, rows_ND)

    def save(self, path: Any) -> Any:
        """Write one `.npz` file."""
        about = {"kind": "lens", "layers": self.layers, "method": self.method}
        return array_files.write(path, {"matrix": self.matrix, "bias": self.bias}, about)

    @classmethod
    def load(cls, path: Any) -> AffineLens:
        """Read what `save` wrote."""
        arrays, about = array_files.read(path, "lens")
        return cls(
            jnp.asarray(arrays["matrix"]), jnp.asarray(arrays["bias"]), tuple(about["layers"]), about["method"]
        )

    def __repr__(self) -> str:
        return f"{self.method or 'affine'} lens of {len(self.layers)} layers, width {self.matrix.shape[-1]}"


def identity_lens(model: Any, layers: Sequence[int]) -> AffineLens:
    """The plain logit lens as an affine one: M = 1, b = 0."""
    width = of(model).config.embed_dim
    matrix = jnp.broadcast_to(jnp.eye(width, dtype=jnp.float32), (len(layers), width, width))
    return AffineLens(matrix, jnp.zeros((len(layers), width), jnp.float32), tuple(layers), "identity")


def chosen_layers(model: Any, layers: Any) -> tuple[int, ...]:
    """Layers as numbers; all for None.

    Raises:
        ValueError: a layer that the model lacks, or none.
    """
    chosen = np.flatnonzero(np.asarray(table(layers, of(model).config.num_layers, "layers")))
    if not len(chosen):
        raise ValueError(f"layers={layers!r} chooses none")
    return tuple(map(int, chosen))
