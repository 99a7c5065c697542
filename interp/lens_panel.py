"""The data of the explain page's lens panel: what each layer would have said, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np

MOST_LAYERS = 10  # more are thinned out evenly, for the size of the page


def lens_data(bundle: Any, generation: Any) -> dict[str, Any] | None:
    """Readings of the plain logit lens on the run of a page; None for a run that cannot be made once more.

    `layers`, and per block: `top` [n, L, C] ids of the most likely token, `top_probs` and `final_probs` [n, L, C] in
    percent, of it and of the final token; `share` [n, L] of the answer's positions with the final token on top, or
    null. `vocabulary` has the text of the ids. Entry 0 is step 1.
    """
    if generation.trajectory.replay is None:  # read from a file
        return None
    from interp.lenses import logit_lens  # here: who only wants a page need not load surgery

    count = bundle.config.num_layers
    layers = np.unique(np.linspace(0, count - 1, min(count, MOST_LAYERS)).round().astype(int)).tolist()
    read = logit_lens(bundle, generation, layers, top_k=1)
    blocks = []
    for number in range(len(generation.trajectory.num_steps)):
        one, taken = read.block(number), int(generation.trajectory.num_steps[number, 0])
        if taken:
            share = np.round(one.agreement()[:taken, :, 0], 3)
            blocks.append(
                {
                    "top": one.ids[:taken, :, 0, :, 0].tolist(),
                    "top_probs": _percent(one.probs[:taken, :, 0, :, 0]),
                    "final_probs": _percent(one.final_prob[:taken, :, 0]),
                    "share": [[None if np.isnan(x) else float(x) for x in row] for row in share],
                }
            )
    words = {str(i): word for i, word in read.words.items()}
    return {"method": read.method, "layers": layers, "vocabulary": words, "blocks": blocks}


def _percent(probs: np.ndarray) -> list[Any]:
    return np.rint(100 * probs).astype(int).tolist()
