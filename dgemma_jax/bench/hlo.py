"""What an optimised program does, read from its text: products, launches, copies, collectives.

Figures of a loop are those of one iteration, times the number of iterations where the program says it. What is fused
into a kernel is not launched; the inside of custom calls is not seen.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

LARGE = 100_000_000  # bytes from which a result is listed
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "add-dependency", "domain",
}  # fmt: skip
_MOVES = {
    "copy", "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad", "reshape", "reverse",
    "gather", "broadcast", "convert",
}  # fmt: skip
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction: its name, the printed shape of its result, what it does, and the rest of the line."""

    name: str
    shape: str
    kind: str
    rest: str
    is_root: bool

    def find(self, pattern: str) -> str:
        found = re.search(pattern, self.rest)
        return found[1] if found else ""

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])


@dataclasses.dataclass
class Cost:
    """What a part of a program costs.

    Attributes:
        flops: of matrix products, twice their multiplications.
        kernels: launches by kind.
        custom: of these, custom calls whose inside is unknown, by target.
        collectives: between devices, by kind.
        large: (bytes written, kind, shape) of results of `LARGE` bytes or more; "move" is the kind of a copy.
    """

    flops: float = 0.0
    kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    custom: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    large: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)

    def add(self, other: Cost, times: int = 1) -> None:
        self.flops += times * other.flops
        for name in ("kernels", "custom", "collectives"):
            for key, count in getattr(other, name).items():
                getattr(self, name)[key] += times * count
        self.large += other.large * times

    @property
    def copies(self) -> list[tuple[int, str, str]]:
        return [row for row in self.large if row[1] == "move"]


def arrays_of(shape: str) -> list[tuple[int, int]]:
    """(elements, bytes) of each array of a printed shape."""
    found = []
    for kind, sizes in re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", shape):
        count = math.prod(int(size) for size in sizes.split(",") if size)
        bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
        found.append((count, count * bits // 8))
    return found


class Program:
    """The text of an optimised program.

    Attributes:
        whole: cost of all of it; the dearer branch of a choice counts.
        step: cost of one iteration of its dearest loop, or of all of it if there is none.
    """

    def __init__(self, text: str) -> None:
        self._bodies: dict[str, list[Op]] = {}
        self._shapes: dict[str, str] = {}
        entry = inside = ""
        for line in text.splitlines():
            if opening := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
                inside = opening[2]
                entry = inside if opening[1] else entry
                self._bodies[inside] = []
            elif inside and (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$", line)):
                root, name, shape, kind, rest = found.groups()
                if kind.endswith("-start") and shape.startswith("("):  # (operands, result, ...)
                    shape = max(re.findall(r"\w+\[[\d,]*\]", shape), key=_size, default=shape)
                self._bodies[inside].append(Op(name, shape, kind, rest, bool(root)))
                self._shapes[name] = shape
        if not entry:
            raise ValueError("the text has no ENTRY computation: this is no optimised program, or XLA prints it anew")
        self._cost = functools.cache(self._cost_of)
        self.whole = self._cost(entry)
        loops = [self._cost(op.find(r"body=%?([\w.\-]+)")) for op in self._all_ops() if op.kind == "while"]
        self.step = max(loops, key=lambda cost: (cost.flops, cost.kernels.total()), default=self.whole)

    def _all_ops(self) -> Iterator[Op]:
        return (op for body in self._bodies.values() for op in body)

    def _cost_of(self, name: str) -> Cost:
        cost = Cost()
        for op in self._bodies.get(name, []):
            kind = op.kind.removesuffix("-start")
            if kind in _FREE or kind.endswith(("-done", "-update")):
                continue
            if kind == "while":
                count = op.find(r'"known_trip_count":\{"n":"(\d+)"')
                cost.add(self._cost(op.find(r"body=%?([\w.\-]+)")), int(count or 1))
                cost.add(self._cost(op.find(r"condition=%?([\w.\-]+)")), int(count or 1))
            elif kind in ("call", "async"):
                cost.add(self._cost(op.find(r"(?:to_apply|calls)=%?([\w.\-]+)")))
            elif kind == "conditional":
                names = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", op.rest)
                names += re.findall(r"%?([\w.\-]+)", op.find(r"branch_computations=\{(.*?)\}"))
                cost.add(max((self._cost(n) for n in names), key=lambda c: (c.flops, c.kernels.total())))
            else:
                self._one(op, kind, cost)
        return cost

    def _one(self, op: Op, kind: str, cost: Cost) -> None:
        flops, moves = self._flops(op), self._only_moves(op)
        target = op.find(r'custom_call_target="([^"]+)"')
        if target == "ConcatBitcast":  # on TPU: neighbours in memory seen as one
            return
        cost.flops += flops
        cost.kernels[target or kind] += 1
        if target and not flops:
            cost.custom[target] += 1
        if kind in COLLECTIVES:
            cost.collectives[kind] += 1
        if (size := self._written(op)) >= LARGE:
            cost.large.append((size, "move" if moves else kind, op.shape))

    def _fused(self, op: Op) -> list[Op]:
        return self._bodies.get(op.find(r"calls=%?([\w.\-]+)"), []) if "fusion" in op.kind else []

    def _flops(self, op: Op) -> float:
        if "fusion" in op.kind:
            return sum(map(self._flops, self._fused(op)))
        if op.kind == "dot":
            summed = op.find(r"lhs_contracting_dims=\{([\d,]*)\}")
        elif op.kind == "custom-call" and "__cublas$" in op.rest:
            summed = op.find(r'"lhs_contracting_dimensions":\[([^\]]*)\]').replace('"', "")
        else:
            return 0.0
        left = re.search(r"\[([\d,]*)\]", self._shapes[op.operands[0]])[1].split(",")
        return 2.0 * arrays_of(op.shape)[0][0] * math.prod(int(left[int(d)]) for d in summed.split(",") if d)

    def _only_moves(self, op: Op) -> bool:
        if "fusion" in op.kind:
            return all(map(self._only_moves, self._fused(op)))
        small = max((count for count, _ in arrays_of(op.shape)), default=0) <= 1024  # computes an index
        return op.kind.removesuffix("-start") in _MOVES | _FREE or small

    def _written(self, op: Op) -> int:
        """Bytes written: of an update in place those of the update, not of the whole."""
        if op.kind == "dynamic-update-slice":
            return _size(self._shapes.get(op.operands[1], ""))
        inside = {inner.name: inner for inner in self._fused(op)}
        root = next((inner for inner in inside.values() if inner.is_root), None)
        while root is not None and root.kind == "bitcast" and root.operands[0] in inside:
            root = inside[root.operands[0]]
        if root is None or root.kind == "parameter":
            return _size(op.shape)
        if root.kind == "tuple":
            return sum(self._written(inside[name]) for name in root.operands if name in inside)
        return self._written(root)


def _size(shape: str) -> int:
    return sum(size for _, size in arrays_of(shape))
