"""A saliency as coloured text with a table beside it, as bars, or as a heat map."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from interp.masking.saliency_maps import Saliency

_UP, _DOWN = "178,24,43", "33,102,172"  # raises the target, lowers it: told apart by the colour-blind too


def page(found: Saliency) -> str:
    """The prompt, each token shaded by the score of its unit, and the table of the units."""
    most = float(np.abs(found.scores).max()) or 1.0
    pieces = []
    for token, unit in zip(found.tokens, found.token_units, strict=True):
        text = html.escape(token.replace("\u2581", " "))
        if unit < 0:
            pieces.append(f'<span style="opacity:.55">{text}</span>')
            continue
        score = float(found.scores[unit])
        colour = _UP if score >= 0 else _DOWN
        shade = f"rgba({colour},{0.75 * abs(score) / most:.3f})"
        pieces.append(f'<span style="background:{shade}" title="{score:+.4g}">{text}</span>')
    head = html.escape(repr(found).splitlines()[0])
    text = f'<p style="line-height:1.8">{" ".join(pieces)}</p>' if found.token_units.max(initial=-1) >= 0 else ""
    key = "<p><small>Red raises the target, blue lowers it; the table says the same in numbers.</small></p>"
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{score:+.4f}</td><td>{error:.4f}</td>"
        f"<td>{'raises' if score > 0 else 'lowers' if score < 0 else 'nothing'}</td></tr>"
        for name, score, error in found.top(40)
    )
    titles = "".join(f'<th scope="col">{title}</th>' for title in ("unit", "score", "standard error", "effect"))
    rest = len(found.units) - 40
    more = f"<p><small>and {rest} units with smaller scores</small></p>" if rest > 0 else ""
    return f"<div><p>{head}</p>{text}{key if text else ''}<table><tr>{titles}</tr>{rows}</table>{more}</div>"


def draw(found: Saliency, most: int) -> Any:
    """A heat map if all units have a layer and a position, else bars with error bars."""
    from matplotlib.figure import Figure

    if (found.places >= 0).all():
        return _heat(found, Figure)
    names = found.top(most)[::-1]
    figure = Figure(figsize=(7, 1.2 + 0.24 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    scores = [score for _, score, _ in names]
    colours = [f"#{'b2182b' if score >= 0 else '2166ac'}" for score in scores]
    errors = np.nan_to_num([error for *_, error in names])
    axes.barh(range(len(names)), scores, xerr=errors, color=colours)
    axes.set_yticks(range(len(names)), [name for name, *_ in names])
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_xlabel(f"score ({found.target})")
    axes.set_title(f"{found.method}, {found.scope} {found.step}")
    return figure


def _heat(found: Saliency, figure_of: Any) -> Any:
    layers, columns = (np.unique(axis, return_inverse=True) for axis in found.places.T)
    grid = np.full((len(layers[0]), len(columns[0])), np.nan)
    grid[layers[1], columns[1]] = found.scores
    figure = figure_of(figsize=(2 + 0.22 * grid.shape[1], 1.5 + 0.3 * grid.shape[0]), layout="constrained")
    axes = figure.add_subplot()
    limit = float(np.nanmax(np.abs(grid))) or 1.0
    image = axes.imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
    axes.set_yticks(range(len(layers[0])), layers[0])
    step = max(1, grid.shape[1] // 16)
    axes.set_xticks(range(0, grid.shape[1], step), columns[0][::step])
    axes.set_xlabel("canvas position")
    axes.set_ylabel("layer")
    axes.set_title(f"{found.method}, {found.scope} {found.step}")
    figure.colorbar(image, label=f"score ({found.target})")
    return figure
