"""Look at shapes in a browser: ``python -m lion_triton.view RUN|CLOUDS|FOLDER``."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from lion_triton.cli import run_cli
from lion_triton.generation.inputs import open_model
from lion_triton.generation.prompts import PromptArguments, read_prompts
from lion_triton.models.hub import find_run
from lion_triton.runs import open_run

if TYPE_CHECKING:
    from lion_triton.viewer.page import Page


@dataclass(frozen=True)
class ViewArguments(PromptArguments):
    """Open a page on this machine that shows clouds and meshes in 3D. Needs viser: pip install 'lion-triton[view]'.

    Of a run it generates: by seed, class, steps and number of points; step by step; between two shapes; beside the
    nearest training shape. Of a run trained with --clip by the words, images and embeddings given here, or those of its
    training shapes. The page fetches nothing from a network.

    Attributes:
        what: a run folder, a folder of save_pretrained, the name of a model that comes with the package, a file of a
            shape or of clouds, or a folder of such files.
        port: of the page; the next free one where it is taken.
    """

    what: tyro.conf.Positional[Path]
    port: int = 8080


def open_page(args: ViewArguments) -> Page:
    """The page, being served by threads of their own.

    Raises:
        ValueError: nothing to show, no viser, a port out of range.
    """
    if not 1 <= args.port < 2**16:
        raise ValueError(f"port: expected 1 to {2**16 - 1}, got {args.port}")
    folder = find_run(args.what)
    if not folder.exists():
        raise ValueError(f"what: {args.what} does not exist")
    try:
        from lion_triton.viewer.files import add_files, find_items
        from lion_triton.viewer.generate import Generator
        from lion_triton.viewer.page import Page
    except ModuleNotFoundError as error:
        if error.name != "viser":
            raise
        raise ValueError("view: needs viser: pip install 'lion-triton[view]'") from None
    if (folder / "config.json").is_file():
        prompts, model = read_prompts(open_run(folder), args), open_model(folder)
        page = Page(args.port)
        Generator(page, model, prompts)
    else:
        for name in args.given:
            raise ValueError(f"{name}: is for a run folder, {args.what} is not one")
        items = find_items(folder)
        items[0].read()  # before anything is served
        page = Page(args.port)
        add_files(page, items)
    return page


def view(args: ViewArguments) -> None:
    """Run the command until it is interrupted; see :class:`ViewArguments`."""
    page = open_page(args)
    print(f"{args.what}: {page.url} (Ctrl-C ends)", flush=True)
    while True:
        time.sleep(3600)


def main(args: list[str] | None = None) -> None:
    """The command line."""
    args = sys.argv[1:] if args is None else args
    run_cli(lambda: view(tyro.cli(ViewArguments, args=args, prog="python -m lion_triton.view")))


if __name__ == "__main__":
    main()
