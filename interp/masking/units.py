"""Units: what is switched on and off, and where in the model the mask of each acts.

A unit is a set of cells: prompt positions, cached positions, canvas rows, S rows, or entries of a site. No cell belongs
to two units, so one array a site says which unit each cell belongs to, and a mask over units becomes a mask over cells
by a lookup: masks are data, and can be differentiated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dgemma_jax.config import ModelConfig
from dgemma_jax.nn.functional import of
from interp import surgery
from interp.gates import table

PROMPT = ("tokens", "words", "sentences", "turns")
CARRIERS = ("cache", "canvas", "soft")
# Sites by kind of unit, without the layer; the axes along which units lie, beside layers.
SITES: dict[str, tuple[tuple[str, ...], str]] = {
    "layers": (("resid_post",), ""),
    "residuals": (("resid_post",), "T"),
    "heads": (("attn_z",), "N"),
    "experts": (("router_weights",), "E"),
    "mlps": (("mlp_out",), ""),
    "moes": (("moe_out",), ""),
    "norms": (
        tuple(f"{norm}_norm_scale" for norm in
              ("input", "post_attn", "pre_mlp", "post_mlp", "router", "pre_moe", "post_moe", "post_ffw")),
        "",
    ),
}  # fmt: skip
KINDS = (*PROMPT, *CARRIERS, *SITES)
TURN_OPEN, TURN_CLOSE = "<|turn>", "<turn|>"
_ENDS = (".", "!", "?", "。", "！", "？")


@dataclasses.dataclass(frozen=True)
class Units:
    """U units.

    Attributes:
        names: of the units, all different.
        kinds: of each.
        places: [U, 2] int, layer and position of each; -1 where it has none.
        cells: int32 arrays, the number of the unit that each cell belongs to, -1 for none. By place: "token_embed" [T],
            "cache" [T], "canvas" [C], "soft" [C], and by full site name in the shape of the site without its batch.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    places: np.ndarray
    cells: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.names)

    def __add__(self, other: Units) -> Units:
        """Both together."""
        for name in self.cells.keys() & other.cells.keys():
            if ((self.cells[name] >= 0) & (other.cells[name] >= 0)).any():
                raise ValueError(f"two kinds of units share cells of {name}: take one of them")
        cells = dict(self.cells)
        for name, own in other.cells.items():
            moved = np.where(own >= 0, own + len(self), -1).astype(np.int32)
            # Sites may come in two shapes (a whole layer, and each position): arrays broadcast.
            cells[name] = np.where(cells[name] >= 0, cells[name], moved) if name in cells else moved
        return Units(
            self.names + other.names, self.kinds + other.kinds, np.concatenate([self.places, other.places]), cells
        )


def units_of(bundle: Any, ids: Sequence[int], what: Any, *, layers: Any = None, positions: Any = None) -> Units:
    """The units of a prompt and a model.

    Args:
        ids: of the prompt.
        what: one of `KINDS`; several, for their product; or a mapping from names to prompt positions (ids count from
            0, template included): spans of the user's own. Prompt kinds leave out the tokens of the chat template.
        layers: of "layers", "residuals", "heads", "experts", "mlps", "moes", "norms"; None for all.
        positions: on the canvas, of "canvas", "soft" and "residuals"; None for all.

    Raises:
        ValueError: no units, no such kind, positions outside the prompt or taken twice.
    """
    if isinstance(what, Mapping):
        parts = [_spans(what, len(ids))]
    else:
        kinds = [what] if isinstance(what, str) else list(what)
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise ValueError(f"there are no units {unknown[0]!r}; there are {', '.join(KINDS)}, or a mapping of spans")
        parts = [_of_kind(bundle, list(ids), kind, layers, positions) for kind in kinds]
    if not parts or not sum(map(len, parts)):
        raise ValueError(f"units={what!r} makes no units of this prompt of {len(ids)} tokens; choose others")
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole


def _of_kind(bundle: Any, ids: list[int], kind: str, layers: Any, positions: Any) -> Units:
    model = of(bundle)
    config = model.config
    if kind in PROMPT or kind == "cache":
        groups = groups_of(bundle, ids, "tokens" if kind == "cache" else kind)
        return _prompt("cache" if kind == "cache" else "token_embed", kind, groups, len(ids))
    if kind in CARRIERS:
        chosen = np.flatnonzero(np.asarray(table(positions, config.canvas_length, "positions")))
        cells = np.full(config.canvas_length, -1, np.int32)
        cells[chosen] = np.arange(len(chosen))
        places = np.stack([np.full(len(chosen), -1), chosen], 1)
        word = {"canvas": "canvas row", "soft": "S row"}[kind]
        return Units(tuple(f"{word} {p}" for p in chosen), (kind,) * len(chosen), places, {kind: cells})
    return _sites(model, config, kind, layers, positions)


def _sites(model: Any, config: ModelConfig, kind: str, layers: Any, positions: Any) -> Units:
    """Units at sites: layer by layer, then along the site's own axis."""
    sites, letters = SITES[kind]
    ranks = {info.name: info.axes for info in surgery.sites(model)}
    chosen = np.flatnonzero(np.asarray(table(layers, config.num_layers, "layers")))
    if positions is not None and kind != "residuals":
        raise ValueError(f"positions choose canvas rows of 'canvas', 'soft' and 'residuals'; {kind!r} act on all rows")
    rows = np.flatnonzero(np.asarray(table(positions, config.canvas_length, "positions")))
    each = {"": [0], "T": rows, "N": range(config.num_heads), "E": range(config.num_experts)}[letters]
    sizes = {"T": config.canvas_length, "N": config.num_heads, "E": config.num_experts}
    own = {"": kind.removesuffix("s"), "T": "position", "N": "head", "E": "expert"}[letters]
    names, places, cells = [], [], {}
    for layer in chosen:
        for site in sites:
            full = f"layers.{layer}.{site}"
            at = np.full(max(sizes.get(letters, 1), 1), -1, np.int32)
            at[np.asarray(each)] = len(names) + np.arange(len(each))
            cells[full] = at.reshape([sizes[a] if a == letters else 1 for a in ranks[full][1:]])
            word = site.removesuffix("_scale") if len(sites) > 1 else own
            names += [f"layer {layer} {word}{f' {n}' if letters else ''}".removesuffix(" layer") for n in each]
            places += [(layer, n if letters == "T" else -1) for n in each]
    return Units(tuple(names), (kind,) * len(names), np.array(places, int).reshape(-1, 2), cells)


def _prompt(place: str, kind: str, groups: list[tuple[str, list[int]]], length: int) -> Units:
    """Units of prompt positions, named by their text and first position."""
    cells = np.full(length, -1, np.int32)
    for number, (_, own) in enumerate(groups):
        cells[own] = number
    word = "cached " if place == "cache" else ""
    names = tuple(f"{word}{text} @{own[0]}" for text, own in groups)
    places = np.array([(-1, own[0]) for _, own in groups], int).reshape(-1, 2)
    return Units(names, (kind,) * len(groups), places, {place: cells})


def _spans(spans: Mapping[str, Any], length: int) -> Units:
    """Units of prompt positions that the user names."""
    cells, places = np.full(length, -1, np.int32), []
    for number, (name, own) in enumerate(spans.items()):
        own = np.atleast_1d(np.asarray(own))
        if not own.size or own.dtype.kind not in "iu" or own.min() < 0 or own.max() >= length:
            raise ValueError(f"span {name!r} must be positions in 0..{length - 1} of the prompt, got {spans[name]!r}")
        if (cells[own] >= 0).any():
            raise ValueError(f"span {name!r} has a position that another span has already")
        cells[own] = number
        places.append((-1, int(own.min())))
    names = tuple(map(str, spans))
    return Units(names, ("span",) * len(names), np.array(places, int).reshape(-1, 2), {"token_embed": cells})


def content(bundle: Any, ids: Sequence[int]) -> list[int]:
    """Positions of the prompt that are text: neither special tokens nor the headers of the chat template."""
    tokenizer = getattr(bundle, "tokenizer", None)
    if tokenizer is None:
        return list(range(len(ids)))
    found, header = [], 0  # 2: the role comes next; 1: white space may follow
    for position, token in enumerate(ids):
        piece = tokenizer.token(token)
        if piece in (TURN_OPEN, TURN_CLOSE):
            header = 2 if piece == TURN_OPEN else 1
        elif token in tokenizer.special_ids:
            header = 0
        elif header == 2:
            header = 1
        elif header == 1 and not tokenizer.decode([token], skip_special=False).strip():
            continue
        else:
            header = 0
            found.append(position)
    return found


def groups_of(bundle: Any, ids: Sequence[int], kind: str) -> list[tuple[str, list[int]]]:
    """Text and positions of every token, word, sentence or turn of the prompt, template left out.

    Raises:
        ValueError: words, sentences or turns without a tokenizer.
    """
    tokenizer, inside = getattr(bundle, "tokenizer", None), content(bundle, ids)
    if tokenizer is None:
        if kind != "tokens":
            raise ValueError(f"units={kind!r} needs a tokenizer: take 'tokens', or a mapping of spans")
        return [(str(ids[p]), [p]) for p in inside]

    def text(positions: Sequence[int]) -> str:
        return tokenizer.decode([ids[p] for p in positions], skip_special=False)

    groups: list[list[int]] = []
    for position in inside:
        before = groups[-1][-1] if groups else None
        if before is None or before != position - 1 or _parts(kind, text, before, position):
            groups.append([position])
        else:
            groups[-1].append(position)
    return [(text(own).strip() or tokenizer.token(ids[own[0]]), own) for own in groups]


def _parts(kind: str, text: Any, before: int, position: int) -> bool:
    """Whether a new unit begins at a position, the one before it being text too."""
    if kind in ("tokens", "turns"):  # template tokens stand between turns
        return kind == "tokens"
    if kind == "sentences":
        return text([before]).strip().endswith(_ENDS) or "\n" in text([before])
    return text([before, position])[len(text([before])) :][:1].isspace() or not text([before]).strip()
