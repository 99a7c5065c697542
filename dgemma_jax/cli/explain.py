"""`dgemma explain`: one generation as a page to look at and as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dgemma_jax.cli import common

PROMPT = "sequence 3 5 with gold for 13"  # the embedded model writes 13 first, then replaces it


def add(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "explain",
        help="show how an answer came about, as a page",
        description="Answer a prompt and write a page that shows how the answer came about, with its data beside it.",
    )
    command.add_argument("prompt", nargs="?", default=PROMPT, help=f"one user turn ({PROMPT!r})")
    command.add_argument(
        "--out",
        type=page,
        default="report.html",
        metavar="PAGE",
        help="the page; its JSON lies beside it (report.html)",
    )
    command.add_argument(
        "--against",
        metavar="PROMPT",
        help="another prompt of as many tokens: adds a map of where patching its run into this one changes the answer",
    )
    command.add_argument(
        "--target",
        metavar="TEXT",
        help="words of the answer: the page shows what in the prompt drove them, instead of the whole answer",
    )
    common.add_generation(command)
    command.set_defaults(run=run)
    return command


def page(name: str) -> Path:
    """The path of the page; refused before any work if it does not end in .html."""
    if not name.lower().endswith((".html", ".htm")):
        raise argparse.ArgumentTypeError(f"the report is a page, its name must end in .html, got {name!r}")
    return Path(name)


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    import interp

    if getattr(interp, "__dist__", None) != "dgemma-jax":
        raise ValueError(f"{interp.__file__} is another package named interp and hides ours; run from elsewhere")
    with Console(stderr=True).status(f"loading {args.model}") as status:
        bundle = common.load(args)
        explanation = interp.explain(
            bundle, args.prompt, seed=args.seed, sampler=common.sampler(args, bundle),
            max_new_tokens=args.max_new_tokens, against=args.against, target=args.target, progress=status.update,
        )  # fmt: skip
        saved, data = explanation.save(args.out)
    print(f"answer  {explanation.data['answer']['text']}")
    print(f"steps   {explanation.data['run']['num_steps']}")
    print(f"page    {saved}")
    print(f"data    {data}")
