"""Opaque serial depth of any JAX function: the longest path of gates between interpretable points.

Definition: arXiv 2603.09786; rules: google-deepmind/serial_depth. For each equation of the traced program,
depth(out) = max over inputs of depth(in) + cost; inputs, constants and cuts have depth 0. The result is the largest
depth at an output or at a cut. It is an upper bound for this program; another program for the same function may be
shallower.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from interp.depth.costs import CIRCUIT, Costs
from interp.depth.paths import FREE, INPUTS, Path, Value, longest, totals
from interp.depth.results import SerialDepth, Visit
from interp.depth.walk import MARK, Walk

Bounds = int | Mapping[str, int] | None


def serial_depth(
    fn: Callable | Any, *args: Any, cuts: str | Sequence[str] = (), while_bounds: Bounds = None,
    costs: Costs = CIRCUIT, **kwargs: Any,
) -> SerialDepth:  # fmt: skip
    """The opaque serial depth of `fn(*args, **kwargs)`, from its traced program alone; nothing is run.

    >>> import interp, jax.numpy as jnp
    >>> interp.serial_depth(lambda x: jnp.dot(x, x), jnp.ones(8)).depth  # a product, then a tree over 8
    4

    Args:
        fn: any function that JAX can trace, or a `ClosedJaxpr` (then without arguments).
        args, kwargs: arrays or `jax.ShapeDtypeStruct`, in any pytrees: nothing needs memory.
        cuts: names or globs of marks (`interp.mark`, or `jax.ad_checkpoint.checkpoint_name`) at which the program can
            be read, so that depth restarts.
        while_bounds: how many iterations a `while` loop takes: a number for all of them, or one for each glob of
            where a loop stands (functions and scopes around it, as the error message tells).
        costs: the table; `interp.depth.costs.PUBLIC` is that of the public tool.

    Raises:
        ValueError: a primitive that the table does not know, a `while` loop without bound, a cut that no mark has.
    """
    program = fn if hasattr(fn, "jaxpr") and not args and not kwargs else jax.make_jaxpr(fn)(*args, **kwargs)
    patterns = (cuts,) if isinstance(cuts, str) else tuple(cuts)
    _check_cuts(patterns, program.jaxpr)

    def is_cut(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    walk = Walk(costs, is_cut, lambda where: _bound(while_bounds, where))
    outputs = longest([FREE, *walk.run(program, [FREE] * len(program.jaxpr.invars))])
    return _result(walk, outputs, patterns)


def _result(walk: Walk, outputs: Value, cuts: tuple[str, ...]) -> SerialDepth:
    reached = {name: value[INPUTS] for name, value in walk.ends.items()} | {"outputs": outputs[INPUTS]}
    end, path = max(reached.items(), key=lambda item: item[1].depth)
    found = totals(path)
    visits = [
        Visit(name, found.visits[name], sum(costs.values()), _by_primitive(costs))
        for name, costs in found.sites.items()
    ]
    scopes = dict.fromkeys(scope for scope, _ in found.rest)
    for scope in scopes:
        costs = {key: depth for key, depth in found.rest.items() if key[0] == scope}
        visits.append(Visit(scope or "(output)", 1, sum(costs.values()), _by_primitive(costs)))
    return SerialDepth(
        path.depth, _start(path), end, {name: p.depth for name, p in reached.items()}, tuple(visits), cuts,
        walk.costs.name, walk.equations, tuple(sorted(walk.unknown)),
    )  # fmt: skip


def _by_primitive(costs: Mapping[tuple[str, str], int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for (_, primitive), depth in costs.items():
        found[primitive] = found.get(primitive, 0) + depth
    return found


def _start(path: Path) -> str:
    """The node at which a path begins."""
    node = path
    while node.before is not None or node.after is not None:
        node = node.before if node.before is not None else node.after
    return node.step if isinstance(node.step, str) else "inputs"


def _bound(bounds: Bounds, where: str) -> int:
    found = [n for pattern, n in bounds.items() if fnmatch.fnmatchcase(where, pattern)] if isinstance(
        bounds, Mapping) else [] if bounds is None else [bounds]  # fmt: skip
    if not found:
        raise ValueError(
            f"no bound for the while loop in {where!r}: give while_bounds, a number of iterations for all loops or a "
            f"mapping from globs of their places, {{'*': 48}}"
        )
    if not isinstance(found[0], int) or found[0] < 0:
        raise ValueError(f"a bound is a number of iterations >= 0, got {found[0]!r} for {where!r}")
    return found[0]


def _check_cuts(patterns: tuple[str, ...], jaxpr: Any) -> None:
    names = _marks(jaxpr)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"no mark matches the cut {pattern!r}; the program has "
                f"{', '.join(sorted(names)[:12]) or 'none: name values with interp.mark'}"
            )


def _marks(jaxpr: Any) -> set[str]:
    """Names of all marks of a program and of those inside it."""
    found = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == MARK:
            found.add(eqn.params["name"])
        for param in eqn.params.values():
            for inner in param if isinstance(param, tuple | list) else (param,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found |= _marks(inner)
    return found
