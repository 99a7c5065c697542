"""What an operation adds to the depth, as data: a table from the names of JAX primitives to numbers and rules.

`PUBLIC` is the table of google-deepmind/serial_depth (9d9f53c), whose loops and unknown primitives are treated as
there. `CIRCUIT`, the default, agrees with it wherever it says anything, adds what it lacks, and refuses the unknown.
Logarithms are base 2, rounded up: a reduction is a balanced tree of gates with two inputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

Rule = int | str | Callable[[Any], int]

LOOPS = ("longest path", "body times length")


def log2(count: int) -> int:
    """Levels of a balanced tree over `count` values."""
    return (max(count, 1) - 1).bit_length()


def _shape(eqn: Any, operand: int = 0) -> tuple[int, ...]:
    return eqn.invars[operand].aval.shape


def _sizes(eqn: Any, axes: Any, operand: int = 0) -> int:
    return math.prod(_shape(eqn, operand)[axis] for axis in axes)


def _contracted(eqn: Any) -> int:
    numbers = eqn.params["dimension_numbers"]
    return _sizes(eqn, numbers[0][0])


def _ragged(eqn: Any) -> int:
    """One product a row, over the contracted axis; which group a row is of decides the weights alone."""
    return _sizes(eqn, eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0][0])


def _sort(eqn: Any) -> int:
    """Stages of a bitonic network: k (k + 1) / 2 for 2^k values."""
    levels = log2(_shape(eqn)[eqn.params["dimension"]])
    return levels * (levels + 1) // 2


def _scattered(eqn: Any) -> int:
    """All updates may fall on one place: a tree over them and the old value."""
    updates, numbers = _shape(eqn, 2), eqn.params["dimension_numbers"]
    window = set(numbers.update_window_dims)
    return log2(1 + math.prod(size for axis, size in enumerate(updates) if axis not in window))


def _convolved(eqn: Any) -> int:
    kernel = eqn.params["dimension_numbers"].rhs_spec  # output features, input features, space
    return log2(_sizes(eqn, kernel[1:], 1)) + 1


def _tree(eqn: Any) -> int:
    """A tree whose gate is the function given, `lax.reduce`."""
    gate = len(eqn.params["jaxpr"].jaxpr.eqns)
    return gate * log2(_sizes(eqn, eqn.params["dimensions"]))


def _devices(eqn: Any) -> int:
    """A tree over the devices of the named axes."""
    axes = eqn.params.get("axes", eqn.params.get("axis_name"))
    sizes = getattr(eqn.ctx.cur_abstract_mesh, "shape", {})
    return log2(math.prod(sizes[axis] for axis in (axes if isinstance(axes, tuple) else (axes,))))


RULES: dict[str, Callable[[Any], int]] = {
    "log reduced": lambda eqn: log2(_sizes(eqn, eqn.params["axes"])),
    "log axis": lambda eqn: log2(_shape(eqn)[eqn.params["axis"]]),
    "log axis, 6 a level": lambda eqn: 6 * log2(_shape(eqn)[eqn.params["axis"]]),  # max, 2 sub, exp, add, log
    "log last": lambda eqn: log2(_shape(eqn)[-1]),
    "log reduced axis": lambda eqn: log2(_shape(eqn)[eqn.params["reduction_dimension"]]),
    "log cases": lambda eqn: log2(len(eqn.invars) - 1),
    "log window": lambda eqn: log2(math.prod(eqn.params["window_dimensions"])),
    "log scattered": _scattered,
    "log devices": _devices,
    "dot": lambda eqn: log2(_contracted(eqn)) + 1,
    "ragged dot": lambda eqn: log2(_ragged(eqn)) + 1,
    "convolution": _convolved,
    "bitonic sort": _sort,
    "tree": _tree,
}


def _each(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_PUBLIC: dict[str, Rule] = {
    **_each(
        0,
        "broadcast_in_dim gather stop_gradient reshape transpose slice squeeze split concatenate named_tensor copy "
        "random_wrap random_unwrap pad name optimization_barrier scatter",
    ),
    **_each(
        1,
        "add div sub mul rem relu max ne lt ge gt iota square sqrt rsqrt exp integer_pow tanh sin cos log pow "
        "convert_element_type and not or eq reduce_precision neg abs min random_seed random_fold_in random_split "
        "random_clone logistic is_finite sign",
    ),
    **_each("log reduced", "reduce_sum reduce_max reduce_min reduce_and reduce_or argmax argmin"),
    "cumsum": "log axis",
    "top_k": "log last",
    "select_n": "log cases",
    "dot_general": "dot",
}
_MORE: dict[str, Rule] = {
    **_each(
        0,
        "dynamic_slice dynamic_update_slice rev bitcast_convert_type copy_p device_put sharding_constraint pvary "
        "pcast reshard "
        "empty empty2 platform_index real imag complex select_and_gather_add axis_index all_gather "
        "all_to_all ppermute all_gather_invariant create_token stack unstack tile tie "
        "to_edtype from_edtype after_all dce_sink pbroadcast",
    ),
    **_each(
        1,
        "le lt_to le_to eq_to xor shift_left shift_right_logical shift_right_arithmetic population_count clz "
        "erf erfc erf_inv expm1 "
        "log1p exp2 cbrt tan asin acos atan atan2 sinh cosh asinh acosh atanh floor ceil round nextafter conj "
        # Random bits are free inputs of the circuit.
        "random_bits random_gamma threefry2x32 rng_bit_generator rng_uniform mulhi",
    ),
    "clamp": 2,
    **_each("log reduced", "reduce_prod reduce_xor"),
    **_each("log axis", "cumprod cummax cummin"),
    "cumlogsumexp": "log axis, 6 a level",
    "approx_top_k": "log reduced axis",
    **_each("log window", "reduce_window_sum reduce_window_max reduce_window_min select_and_scatter_add"),
    **_each("log scattered", "scatter-add scatter_add scatter-mul scatter_mul scatter-min scatter_min scatter-max"),
    **_each("log scattered", "scatter_max scatter_sub scatter-sub"),
    **_each("log devices", "psum psum2 psum_invariant pmax pmin psum_scatter reduce_scatter"),
    **_each("ragged dot", "ragged_dot ragged_dot_general"),
    "conv_general_dilated": "convolution",
    "sort": "bitonic sort",
    "reduce": "tree",
}


@dataclasses.dataclass(frozen=True)
class Costs:
    """A table of costs, and how loops and branches are counted.

    Attributes:
        name: for reports.
        table: primitive to a number, the name of a rule in `RULES`, or a function of the equation.
        unknown: what a primitive outside the table costs; None makes it an error.
        loops: "longest path" follows what one iteration hands to the next, exactly: independent iterations add
            nothing to each other. "body times length" is the public tool's bound.
        predicates: what a branch or a `while` decides counts as an input of its result, through a selection.
    """

    name: str
    table: Mapping[str, Rule]
    unknown: int | None = None
    loops: str = "longest path"
    predicates: bool = False

    def __post_init__(self) -> None:
        if self.loops not in LOOPS:
            raise ValueError(f"loops must be one of {LOOPS}, got {self.loops!r}")
        for primitive, rule in self.table.items():
            if isinstance(rule, str) and rule not in RULES:
                raise ValueError(f"{primitive!r} has the rule {rule!r}; known are {sorted(RULES)}")

    def declare(self, **rules: Rule) -> Costs:
        """The table with other or more primitives: `CIRCUIT.declare(pallas_call=12)`."""
        return dataclasses.replace(self, name=f"{self.name}, changed", table={**self.table, **rules})

    def of(self, eqn: Any) -> int | None:
        """Depth that an equation adds; None if the table does not know its primitive."""
        rule = self.table.get(eqn.primitive.name, self.unknown)
        if callable(rule):
            return rule(eqn)
        return RULES[rule](eqn) if isinstance(rule, str) else rule


PUBLIC = Costs("public", _PUBLIC, unknown=0, loops="body times length")
CIRCUIT = Costs("circuit", {**_PUBLIC, **_MORE})
TABLES = {table.name: table for table in (CIRCUIT, PUBLIC)}
