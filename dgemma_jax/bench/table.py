"""The results of `dgemma bench` as tables: times beside the least that the machine allows, and how they grow."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from dgemma_jax.bench import items, roofline
from dgemma_jax.bench.lines import Lines
from dgemma_jax.bench.roofline import Part


def title(found: Lines) -> str:
    """Date, hardware and versions."""
    header, names = found.header or {}, ("date", "device", "machine", "load", "size", "model", "dtype")
    shown = {name: header[name] for name in names if name in header}
    versions = ", ".join(f"{name} {version}" for name, version in header.get("versions", {}).items())
    return ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None) + f"\n{versions}"


def ceilings(found: Lines) -> tuple[float, float] | None:
    """Bytes and FLOPs a second that were measured: the best of the runs; None before they are there."""
    rates = []
    for name, column in ((items.COPY, 0), (items.MATMUL, 1)):
        row = found.items.get(name, [{}])[0]
        if not row.get("seconds"):
            return None
        rates.append(row["work"][0][column] / min(row["seconds"]))
    return rates[0], rates[1]


def results(found: Lines) -> Table:
    """Each contestant: median and best time a unit, tokens a second, what it must move and multiply, and its share."""
    table, rates = Table(title="times of a unit: a step, a call"), ceilings(found)
    for column in ("item", "by"):
        table.add_column(column)
    for column in ("median ms", "best ms", "first s", "tokens/s", "GB", "TFLOP", "least ms", "share"):
        table.add_column(column, justify="right")
    for item, row in rows(found):
        if "error" in row:
            table.add_row(item, row["by"], "[red]" + row["error"].replace("[", "\\["))
            continue
        median, best = (f(row["seconds"]) / row["count"] for f in (statistics.median, min))
        cells = [f"{1e3 * median:.4g}", f"{1e3 * best:.4g}", f"{row['first']:.2g}"]
        cells.append(f"{row['tokens'] / median / row['count']:.4g}" if row["tokens"] else "")
        moved, flops = (sum(part[i] for part in row["work"]) / row["count"] for i in (0, 1))
        cells += [f"{moved / 1e9:.3g}", f"{flops / 1e12:.3g}"] if row["work"] else ["", ""]
        if rates and row["work"]:
            least = roofline.seconds([Part(*part) for part in row["work"]], *rates) / row["count"]
            cells += [f"{1e3 * least:.4g}", f"{least / median:.0%}"]
        table.add_row(item, row["by"], *cells)
    return table


def scaling(found: Lines) -> Table:
    """How the time of a step, or of a generation, grows with batch, context, steps and captures."""
    table = Table(title="scaling: median ms, and against the first of its kind")
    for column in ("of", "with", "ms", "times"):
        table.add_column(column, justify="left" if column in ("of", "with") else "right")
    series: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for item, row in rows(found):
        if "error" in row or not row["at"]:
            continue
        milliseconds = 1e3 * statistics.median(row["seconds"]) / row["count"]
        at = dict(row["at"])
        kind, _, _ = item.partition(", ")
        axis = item.removeprefix(f"{kind}, ").split(" ")[0] if ", " in item else "steps"
        if axis in at:
            series.setdefault((kind, axis), []).append((f"{axis} {at[axis]:,}", milliseconds))
        if kind == "step" and axis == "batch" and at["batch"] == 1:  # the first of the contexts, too
            series.setdefault((kind, "context"), []).append((f"context {at['context']:,}", milliseconds))
    plain, captured = _captures(found)
    if plain and captured:
        series["generation", "captures"] = [("no captures", 1e3 * plain), ("all residuals", 1e3 * captured)]
    for (kind, _), points in series.items():
        for place, milliseconds in points:
            table.add_row(kind, place, f"{milliseconds:.4g}", f"{milliseconds / points[0][1]:.2f}")
    return table


def ratios(found: Lines) -> list[str]:
    """Diffusion against autoregression, ours against `transformers`, and memory, as sentences."""
    said = []
    for item, group in found.items.items():
        median = {row["by"]: statistics.median(row["seconds"]) for row in group if "error" not in row}
        causal = next((taken for by, taken in median.items() if by.startswith("autoregression")), None)
        if causal:
            steps = {by: taken for by, taken in median.items() if by.startswith("diffusion") and "captured" not in by}
            said += [f"{by}: {causal / taken:.2f} x the tokens/s of autoregression" for by, taken in steps.items()]
        peers = {by: taken for by, taken in median.items() if by.startswith("transformers")}
        if peers and "dgemma_jax" in median:
            fastest = min(peers, key=peers.get)
            said.append(f"{item}: {peers[fastest] / median['dgemma_jax']:.2f} x the speed of {fastest}")
    if found.peak_gb:
        peaks = ", ".join(f"{item} {held:.1f}" for item, held in found.peak_gb.items())
        said.append(f"most memory held on the device by the end of an item, GB: {peaks}")
    return said


def rows(found: Lines) -> Iterator[tuple[str, dict[str, Any]]]:
    """(item, row) in the order of the file."""
    for item, group in found.items.items():
        for row in group:
            yield item, row


def _captures(found: Lines) -> tuple[float | None, float | None]:
    median = {
        row["by"]: statistics.median(row["seconds"]) for row in found.items.get("generation", []) if "error" not in row
    }
    captured = next((by for by in median if "captured" in by), "")
    return median.get(captured.split(", all")[0]), median.get(captured)
