"""Longest paths as ropes, and the arithmetic of (maximum, plus) on them.

A `Value` says how deep a variable lies below each source: the inputs of the program are one source, and inside a loop
each thing that an iteration is given is another. Paths share their parts, so that 48 iterations cost no more memory
than a few.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Path:
    """A path: `before`, then either one equation (or mark) or another path.

    Attributes:
        depth: of the whole path.
        before: what came first; None for nothing.
        step: an equation, or the name of a mark.
        after: a path that follows instead.
    """

    depth: int = 0
    before: Path | None = None
    step: Any = None
    after: Path | None = None


Value = dict[int, Path]  # by source
INPUTS = 0  # the source of everything interpretable
NOTHING = Path()
FREE: Value = {INPUTS: NOTHING}


def longest(values: Iterable[Value]) -> Value:
    """The deeper path from each source."""
    first, found = None, None
    for value in values:
        if first is None or value is first:
            first = value
            continue
        if found is None:
            found = dict(first)
        for source, path in value.items():
            if source not in found or path.depth > found[source].depth:
                found[source] = path
    return (first or {}) if found is None else found


def deeper(value: Value, cost: int, step: Any) -> Value:
    """The value after a step. A step that costs nothing leaves no trace, unless it is a mark."""
    if not cost and not isinstance(step, str):
        return value
    return {source: Path(path.depth + cost, path, step) for source, path in value.items()}


def joined(first: Path, second: Path) -> Path:
    """One path, then the other."""
    if second is NOTHING:
        return first
    return second if first is NOTHING else Path(first.depth + second.depth, first, after=second)


def through(row: Value, values: dict[int, Value]) -> Value:
    """A value in terms of inner sources, as one in terms of what lies outside them."""
    return longest({outer: joined(path, rest) for outer, path in values[source].items()}
                   for source, rest in row.items() if source in values)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Totals:
    """What lies on a path, in order of the first visit.

    Attributes:
        sites: depth by operation on the way to each mark.
        visits: how often each mark was passed.
        rest: depth by operation after the last mark.
    """

    sites: dict[str, Counter]
    visits: Counter
    rest: Counter

    def then(self, other: Totals) -> Totals:
        if not other.visits:
            return Totals(self.sites, self.visits, self.rest + other.rest)
        sites = {name: Counter(costs) for name, costs in self.sites.items()}
        first = next(iter(other.sites))
        for name, costs in other.sites.items():
            mine = sites.setdefault(name, Counter())
            mine.update(costs)
            if name == first:
                mine.update(self.rest)
        return Totals(sites, self.visits + other.visits, other.rest)


def totals(path: Path, known: dict[int, Totals] | None = None) -> Totals:
    """Depth by mark and operation; parts that paths share are added up once."""
    known = {} if known is None else known
    walked: list[Path] = []
    node: Path | None = path
    while node is not None and id(node) not in known:
        if node.after is not None:
            totals(node.after, known)
        walked.append(node)
        node = node.before
    found = known[id(node)] if node is not None else Totals({}, Counter(), Counter())
    sites = {name: Counter(costs) for name, costs in found.sites.items()}
    visits, rest = Counter(found.visits), Counter(found.rest)
    for node in reversed(walked):
        if node.after is not None:
            both = Totals(sites, visits, rest).then(known[id(node.after)])
            sites, visits, rest = ({n: Counter(c) for n, c in both.sites.items()}, Counter(both.visits),
                                   Counter(both.rest))  # fmt: skip
            known[id(node)] = both
        elif isinstance(node.step, str):
            sites.setdefault(node.step, Counter()).update(rest)
            visits[node.step] += 1
            rest = Counter()
        elif node.step is not None:
            scope = str(node.step.source_info.name_stack)
            rest[scope, node.step.primitive.name] += node.depth - (node.before.depth if node.before else 0)
    found = Totals(sites, visits, rest)
    known[id(path)] = found
    return found
