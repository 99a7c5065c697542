"""The walk over a traced program: how deep every variable lies, through calls, branches and loops."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from jax.extend.core import Literal

from interp.depth.costs import Costs
from interp.depth.loops import power
from interp.depth.paths import FREE, INPUTS, NOTHING, Path, Value, deeper, longest, through

# Primitives that only run another program, and where they keep it.
CALLS = {
    "pjit": "jaxpr", "jit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "remat2": "jaxpr",
    "checkpoint": "jaxpr", "remat": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr", "shard_map": "jaxpr", "custom_lin": "jaxpr", "core_closed_call": "call_jaxpr",
    "composite": "jaxpr", "named_call": "call_jaxpr", "custom_batching_call": "call", "custom_vmap_call": "call",
    "run_state": "jaxpr",
}  # fmt: skip
MARK = "name"  # the primitive of `jax.ad_checkpoint.checkpoint_name`


@dataclasses.dataclass
class Walk:
    """One analysis.

    Attributes:
        costs: the table.
        is_cut: which marks are interpretable nodes, at which depth restarts.
        bound: iterations of a `while` loop, by where it stands.
        ends: the deepest value at each cut met so far.
        unknown: primitives that the table does not know and counts all the same.
        equations: how many were walked.
    """

    costs: Costs
    is_cut: Callable[[str], bool]
    bound: Callable[[str], int]
    ends: dict[str, Value] = dataclasses.field(default_factory=dict)
    unknown: set[str] = dataclasses.field(default_factory=set)
    equations: int = 0
    sources: Any = dataclasses.field(default_factory=lambda: itertools.count(INPUTS + 1))

    def run(self, program: Any, inputs: list[Value], where: str = "") -> list[Value]:
        """Values of the outputs of a jaxpr, closed or open."""
        jaxpr = getattr(program, "jaxpr", program)
        known = dict.fromkeys(jaxpr.constvars, FREE) | dict(zip(jaxpr.invars, inputs, strict=True))
        for eqn in jaxpr.eqns:
            self.equations += 1
            given = [FREE if isinstance(v, Literal) else known[v] for v in eqn.invars]
            known |= dict(zip(eqn.outvars, self.equation(eqn, given, where), strict=True))
        return [FREE if isinstance(v, Literal) else known[v] for v in jaxpr.outvars]

    def equation(self, eqn: Any, given: list[Value], where: str) -> list[Value]:
        """Values of the outputs of an equation."""
        name, count = eqn.primitive.name, len(eqn.outvars)
        if name in self.costs.table and name != MARK:  # what the user declared goes first
            return [deeper(longest(given or [FREE]), self.costs.of(eqn), eqn)] * count
        if name == MARK:
            return [self.mark(eqn.params["name"], given[0])]
        if name in CALLS and CALLS[name] in eqn.params:
            called = eqn.params.get("name", "")
            return self.run(eqn.params[CALLS[name]], given, f"{where}/{called}" if called else where)
        if name == "cond":
            return self.branches(eqn, given, where)
        if name == "scan":
            return self.scan(eqn, given, where)
        if name == "while":
            return self.while_loop(eqn, given, where)
        cost = self.costs.of(eqn)
        if cost is None:
            raise ValueError(
                f"the depth of the primitive {name!r} is not known ({_place(eqn)}): declare it, as in "
                f"serial_depth(..., costs=interp.depth.costs.CIRCUIT.declare(**{{{name!r}: 12}})), "
                "by its depth or a function of the equation"
            )
        self.unknown.add(name)
        return [deeper(longest(given or [FREE]), cost, eqn)] * count

    def mark(self, name: str, value: Value) -> Value:
        value = deeper(value, 0, name)
        if not self.is_cut(name):
            return value
        self.ends[name] = longest([self.ends.get(name, value), value])
        return {INPUTS: Path(step=name)}

    def branches(self, eqn: Any, given: list[Value], where: str) -> list[Value]:
        """The deepest branch; the choice itself counts if the table says so."""
        programs = eqn.params["branches"]
        outs = [longest(values) for values in zip(*(self.run(b, given[1:], where) for b in programs), strict=True)]
        if not self.costs.predicates:
            return outs
        return [deeper(longest([out, given[0]]), (len(programs) - 1).bit_length(), eqn) for out in outs]

    def scan(self, eqn: Any, given: list[Value], where: str) -> list[Value]:
        params = eqn.params
        if "ft_in" in params:  # JAX 0.12
            consts, carries, _ = map(len, params["ft_in"].unpack())
        else:
            consts, carries = params["num_consts"], params["num_carry"]
        constant, carried = given[:consts] + given[consts + carries :], given[consts : consts + carries]

        def body(fixed: list[Value], carry: list[Value]) -> list[Value]:
            return self.run(params["jaxpr"], [*fixed[:consts], *carry, *fixed[consts:]], where)

        return self.loop(eqn, body, constant, carried, params["length"])

    def while_loop(self, eqn: Any, given: list[Value], where: str) -> list[Value]:
        """As many iterations as were declared, all of them taken."""
        params = eqn.params
        tests, bodies = params["cond_nconsts"], params["body_nconsts"]
        constant, carried = given[: tests + bodies], given[tests + bodies :]

        def body(fixed: list[Value], carry: list[Value]) -> list[Value]:
            outs = self.run(params["body_jaxpr"], [*fixed[tests:], *carry], where)
            if not self.costs.predicates:
                return outs
            test = self.run(params["cond_jaxpr"], [*fixed[:tests], *carry], where)
            return [deeper(longest([out, *test]), 1, eqn) for out in outs]

        scope = "/".join(filter(None, [where.strip("/"), str(eqn.source_info.name_stack)]))
        return self.loop(eqn, body, constant, carried, self.bound(f"{scope} ({_place(eqn)})"))

    def loop(self, eqn: Any, body: Callable, constant: list[Value], carried: list[Value], length: int) -> list[Value]:
        """Carries, then stacked results, after `length` iterations."""
        if self.costs.loops == "body times length":
            return self.bounded_loop(eqn, body, constant, carried, length)
        outside: dict[int, Value] = {INPUTS: FREE}

        def source(value: Value) -> int:
            if value is FREE or value == FREE:
                return INPUTS
            outside[key := next(self.sources)] = value
            return key

        def inner(key: int) -> Value:
            return FREE if key == INPUTS else {key: NOTHING}

        fixed = [inner(source(value)) for value in constant]
        carries = [next(self.sources) for _ in carried]
        ends, self.ends = self.ends, {}
        outs = body(fixed, [{key: NOTHING} for key in carries])
        met, self.ends = self.ends, ends

        # What is met at any iteration, stacked results and cuts, is kept beside what goes round.
        kept = [(next(self.sources), value) for value in [*outs[len(carries) :], *met.values()]]
        step = {key: {key: NOTHING} for key in outside}
        step |= dict(zip(carries, outs, strict=False))
        step |= {key: longest([{key: NOTHING}, value]) for key, value in kept}
        values = outside | dict(zip(carries, carried, strict=True)) | {key: {} for key, _ in kept}
        final = {key: through(row, values) for key, row in power(step, length).items()}
        results = [final[key] for key, _ in kept]
        stacked = len(outs) - len(carries)
        for name, value in zip(met, results[stacked:], strict=True):
            if value:
                self.ends[name] = longest([self.ends.get(name, value), value])
        return [final[key] for key in carries] + [value or FREE for value in results[:stacked]]

    def bounded_loop(
        self, eqn: Any, body: Callable, constant: list[Value], carried: list[Value], length: int
    ) -> list[Value]:
        """Each output: deepest input + length * (how much deeper one iteration takes it)."""
        given = longest([*constant, *carried, FREE])
        start = given[INPUTS]
        outs = body(constant, carried)
        gains = [max(0, out[INPUTS].depth - start.depth) for out in outs]
        return [{INPUTS: Path(start.depth + length * gain, start, eqn)} for gain in gains]


def _place(eqn: Any) -> str:
    """File and line that made an equation, as far as JAX kept it."""
    from jax._src import source_info_util  # JAX has no public way to say where an equation is from

    return source_info_util.summarize(eqn.source_info) or "of unknown origin"
