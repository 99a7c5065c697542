"""The letters of every shape. An array `x_BTD` has the axes batch, token, width.

| letter | axis |
|---|---|
| B | batch: independent prompts |
| T | tokens of this call |
| S | key and value slots: cached ones, then those of this call |
| C | canvas positions of one block |
| R | denoising steps |
| J | blocks |
| D | width of the residual stream |
| N | query heads |
| K | key and value heads |
| G | query heads that share one key head, N = K * G |
| H | head dimension |
| F | hidden width of a feed-forward network or expert |
| E | experts |
| X | experts chosen per token |
| V | vocabulary |
| L | layers |
| U | candidates kept per position (top-k of a record) |

Einsum strings use the same letters in lower case. Masks say what True means: `valid` (a real token),
`visible` (may be attended to), `accepted` (kept by the sampler), `pinned` (never changed).
"""
