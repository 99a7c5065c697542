"""Opaque serial depth: hand-computed programs, loops by longest path, cuts, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import interp
from interp.depth import costs
from interp.depth.walk import CALLS


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def perceptron(weights, x):
    first, second, third = weights
    return jax.nn.relu(jax.nn.relu(x @ first) @ second) @ third


def depth(fn, *args, **options):
    return interp.serial_depth(fn, *args, **options).depth


@pytest.mark.parametrize("table", costs.TABLES.values(), ids=costs.TABLES.keys())
def test_the_perceptron_of_the_public_tool(table):
    found = interp.serial_depth(perceptron, [shape(1, 8), shape(8, 8), shape(8, 1)], shape(1), costs=table)
    assert found.depth == 2 + 5 + 4
    assert found.operations == {"dot_general": 9, "max": 2}


X, ZERO = shape(1000), jnp.float32(0)
HAND = {
    "elementwise": (lambda x: jnp.sin(x) * x + 1, 3),
    "movement": (lambda x: x.reshape(10, 100).T[3], 0),
    "log, rounded up": (lambda x: lax.reduce_sum_p.bind(x, axes=(0,), out_sharding=None), 10),
    "parallel branches": (lambda x: jnp.exp(jnp.exp(x)) + jnp.sin(x), 3),
    "running sum": (lambda x: lax.cumsum(x), 10),
    "running log-sum-exp": (lambda x: lax.cumlogsumexp(x), 60),
    "sort": (lambda x: lax.sort(x), 55),
    "top k": (lambda x: lax.top_k(x, 3)[0], 10),
    "selection": (lambda x: lax.select(x > 0, x, x), 2),
    "clamp": (lambda x: lax.clamp(0.0, x, 1.0), 2),
    "parallel scan": (lambda x: lax.associative_scan(jnp.add, x[:8]), 9),  # as traced: 3 down, 3 levels up,
    "rows of a map": (lambda x: lax.map(lambda y: y * y * y, x), 2),
    "carried": (lambda x: lax.scan(lambda c, y: (c + y, c), ZERO, x), 1000),
    "carried, read deeper": (lambda x: lax.scan(lambda c, y: (c + y, (c * 2) ** 2), ZERO, x)[1], 999 + 2),
    "handed round": (lambda x: lax.scan(lambda c, y: ((c[1], c[0] * y), None), (x[0], x[1]), x[:10])[0], 5),
    "known loop": (lambda x: lax.fori_loop(0, 7, lambda i, y: y * 2 + 1, x), 14),
    "jit": (lambda x: jax.jit(lambda y: y * y)(x), 1),
    "remat": (lambda x: jax.checkpoint(lambda y: y * y)(x), 1),
    "custom jvp": (lambda x: jax.nn.relu(x), 1),
    "branches": (lambda x: lax.cond(x[0] > 0, lambda y: y * 2, lambda y: jnp.exp(y * 2), x), 2),
    "scattered sum": (lambda x: x.at[jnp.zeros(7, int)].add(1.0), 2 + 3),  # negative indices, then a tree over 8
}


@pytest.mark.parametrize("name", HAND)
def test_computed_by_hand(name):
    program, expected = HAND[name]
    assert depth(program, X) == expected


def test_ragged_products_contract_one_axis():
    sizes = jax.ShapeDtypeStruct((3,), jnp.int32)
    assert depth(lax.ragged_dot, shape(20, 33), shape(3, 33, 5), sizes) == 6 + 1


def test_custom_vjp_and_shard_map_are_looked_into():
    @jax.custom_vjp
    def square(x):
        return x * x

    square.defvjp(lambda x: (x * x, x), lambda x, g: (2 * x * g,))
    assert depth(square, X) == 1
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("rows")
    inside = jax.shard_map(lambda x: lax.psum(x * x, "rows"), mesh=mesh, in_specs=spec, out_specs=jax.P())
    assert depth(inside, X) == 1  # a sum over one device is free
    assert {"shard_map", "custom_vjp_call"} <= set(CALLS)


def test_the_public_rule_for_loops_is_a_bound():
    def program(x):
        return lax.map(lambda y: y * y * y, x)
    assert depth(program, X, costs=costs.PUBLIC) == 2 * 1000
    assert depth(program, X) == 2


def iterated(x):
    return lax.while_loop(lambda y: y.sum() < 100, lambda y: y * 2 + 1, x)


@pytest.mark.parametrize("bound", [0, 1, 48, 100_000])
def test_while_loops_take_the_declared_number_of_iterations(bound):
    assert depth(iterated, X, while_bounds=bound) == 2 * bound
    assert depth(jax.jit(iterated), X, while_bounds={"iterated*": bound}) == 2 * bound


def test_predicates_count_where_the_table_says_so():
    import dataclasses

    strict = dataclasses.replace(costs.CIRCUIT, predicates=True)
    # An iteration: the test takes a sum of 1000 and a comparison, the choice one more.
    assert depth(iterated, X, while_bounds=3, costs=strict) == 3 * (10 + 1 + 1)


@pytest.mark.parametrize("length", [1, 2, 3, 17])
def test_a_loop_is_its_unrolled_program(length):
    """Random bodies of a scan: the power of the matrix equals walking every iteration."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        links = rng.random((3, 3)) < 0.6
        extra = rng.integers(0, 4, (3, 3))

        def body(carry, x, links=links, extra=extra):
            def link(i):
                terms = [x] + [functools.reduce(lambda v, _: v * 2.0, range(extra[i, j]), carry[j])
                               for j in range(3) if links[i, j]]  # fmt: skip
                return functools.reduce(jnp.maximum, terms)

            new = tuple(link(i) for i in range(3))
            return (new[0], interp.mark("read", new[1]) * 3, new[2]), new[2]

        def unrolled(carry, xs, body=body):
            kept = []
            for i in range(length):
                carry, y = body(carry, xs[i])
                kept.append(y)
            return carry, jnp.stack(kept)

        args = ((shape(),) * 3, shape(length))
        def rolled(c, xs, body=body):
            return lax.scan(body, c, xs)
        for cuts in ((), ("read",)):
            a, b = (interp.serial_depth(f, *args, cuts=cuts) for f in (rolled, unrolled))
            assert (a.depth, a.segments) == (b.depth, b.segments), seed
            assert a.operations == b.operations or sum(a.operations.values()) == a.depth


def chain(x):
    with jax.named_scope("first"):
        x = jnp.exp(jnp.exp(jnp.exp(x)))
    x = interp.mark("read", x)
    return {"out": jnp.sin(jnp.sin(x))}


def test_depth_restarts_at_cuts():
    whole = interp.serial_depth(chain, X)
    assert (whole.depth, whole.start, whole.end) == (5, "inputs", "outputs")
    assert [(v.site, v.depth) for v in whole.path] == [("read", 3), ("(output)", 2)]
    cut = interp.serial_depth(chain, X, cuts="re*")
    assert (cut.depth, cut.start, cut.end, cut.segments) == (3, "inputs", "read", {"read": 3, "outputs": 2})


def test_marks_change_nothing():
    x = {"a": jnp.arange(3.0), "b": (jnp.ones(2),)}
    jax.tree.map(np.testing.assert_array_equal, interp.mark("here", x), x)
    grad = jax.grad(lambda y: (interp.mark("here", y) ** 2).sum())(jnp.arange(3.0))
    np.testing.assert_array_equal(grad, [0, 2, 4])


def test_the_path_adds_up_and_is_kept(tmp_path):
    def program(x):
        return lax.scan(lambda c, y: (interp.mark("step", c * y + 1), None), x[0], x)[0] ** 2
    found = interp.serial_depth(program, X)
    assert found.depth == 2 * 1000 + 1 == sum(v.depth for v in found.path) == sum(found.operations.values())
    assert found.path[0].times == 1000 and found.path[0].operations == {"mul": 1000, "add": 1000}
    assert "2,001" in repr(found) and "step" in repr(found)
    assert interp.SerialDepth.load(found.save(tmp_path / "depth")) == found
    assert found.plot().axes[0].get_title().startswith("serial depth 2,001")


def test_what_is_not_known_is_refused():
    def fft(x):
        return jnp.abs(jnp.fft.fft(x))
    with pytest.raises(ValueError, match="primitive 'fft' is not known.*declare"):
        interp.serial_depth(fft, X)
    assert depth(fft, X, costs=costs.CIRCUIT.declare(fft=20)) == 22  # to complex numbers, and their size
    assert interp.serial_depth(fft, X, costs=costs.PUBLIC).unknown == ("fft",)
    def called(x):
        return jax.pure_callback(np.sin, shape(1000), x)
    with pytest.raises(ValueError, match="pure_callback"):
        interp.serial_depth(called, X)
    assert depth(called, X, costs=costs.CIRCUIT.declare(pure_callback=lambda eqn: len(eqn.invars) + 6)) == 7
    with pytest.raises(ValueError, match="no bound for the while loop in 'iterated"):
        interp.serial_depth(jax.jit(iterated), X)
    with pytest.raises(ValueError, match=r"number of iterations >= 0, got -1"):
        interp.serial_depth(iterated, X, while_bounds=-1)
    with pytest.raises(ValueError, match="no mark matches the cut 'canvas'; the program has read"):
        interp.serial_depth(chain, X, cuts=["canvas"])
    with pytest.raises(ValueError, match="has the rule 'log rows'; known are"):
        costs.CIRCUIT.declare(fft="log rows")
