"""The live view of `dgemma generate --watch`: the draft after every denoising step."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from dgemma_jax.bundle import Bundle
    from dgemma_jax.diffusion.generate import Draft


class Watch:
    """A callback for `generate` that draws row 0 of each draft; a context manager around the run."""

    def __init__(self, bundle: Bundle, console: Console | None = None) -> None:
        self._bundle = bundle
        self._live = Live(console=console or Console(stderr=True), refresh_per_second=30)
        self._earlier: list[Text] = []
        self._last: tuple[int, Text] | None = None

    def __enter__(self) -> Watch:
        self._live.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.__exit__(kind, error, trace)

    def __call__(self, draft: Draft) -> None:
        shown = text(draft, self._bundle)
        if self._last is not None and self._last[0] != draft.block:
            self._earlier.append(self._last[1])
        self._last = (draft.block, shown)
        self._live.update(Group(*self._earlier, shown, Text(status(draft), style="cyan")), refresh=True)


def text(draft: Draft, bundle: Bundle) -> Text:
    """The most likely tokens of row 0, accepted ones bright and unsettled ones dim, up to an accepted end token."""
    ends = {*bundle.sampler.eos_token_ids, bundle.sampler.pad_token_id}
    shown, ids = Text(), []
    for id, accepted in zip(draft.argmax[0], draft.accepted[0], strict=True):
        if accepted and int(id) in ends:
            break
        ids.append(int(id))
        so_far = bundle.tokenizer.decode(ids) if bundle.tokenizer else " ".join(map(str, ids))
        shown.append(so_far[len(shown) :], style="bold" if accepted else "dim")
    return shown


def status(draft: Draft) -> str:
    """`block 1  step 7  accepted 12/24  mean entropy 0.031 nats`."""
    accepted, entropy = draft.accepted[0], draft.entropy[0]
    return (
        f"block {draft.block + 1}  step {draft.step + 1}  accepted {int(accepted.sum())}/{len(accepted)}  "
        f"mean entropy {float(entropy.mean()):.3f} nats"
    )
