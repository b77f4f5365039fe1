"""Networks that a trained run gets besides its own, each in a folder of the run: RUN/surface, RUN/encoders/voxels.

    FOLDER/config.json             version, commit, the checkpoint whose VAE it was trained with, its configuration
    FOLDER/metrics.jsonl           and so on, as in a run folder
    FOLDER/checkpoints/step-<n>/

The ``Run`` of a part is that of the run with FOLDER as its folder: its checkpoints are saved and read as a run's own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import dacite

from lion_triton import __version__
from lion_triton.config import differences
from lion_triton.runs import Run, commit, write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def create_part(run: Run, name: str, vae: str | None, **contents: DataclassInstance) -> Run:
    """Make the folder; ``vae`` names the checkpoint whose VAE the network is trained with."""
    folder = run.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"lion_triton": __version__, "commit": commit(), "vae": vae}
    about |= {key: asdict(value) for key, value in contents.items()}
    write_text(folder / "config.json", json.dumps(about, indent=2) + "\n")
    return replace(run, folder=folder)


def open_part(run: Run, name: str, **kinds: type) -> tuple[Run, dict[str, Any]] | None:
    """The part called ``name`` and what its ``config.json`` says, as objects of ``kinds``; None if there is none yet.

    Raises:
        ValueError: a ``config.json`` that is damaged or of another version's form.
    """
    path = run.folder / name / "config.json"
    if not path.is_file():
        return None
    strict = dacite.Config(cast=[tuple], strict=True)
    try:
        about = json.loads(path.read_text())
        contents: dict[str, Any] = {key: dacite.from_dict(kind, about[key], strict) for key, kind in kinds.items()}
    except Exception as error:  # whatever a damaged or foreign file makes the parsers raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"run: {path} is damaged or of another version ({reason})") from None
    return replace(run, folder=path.parent), contents


def check_same_settings(part: Run, now: DataclassInstance, before: DataclassInstance, prefix: str) -> None:
    """Refuse to continue the training of a part with other settings.

    Raises:
        ValueError: naming the first difference.
    """
    lines = differences(now, before, prefix)
    if lines:
        raise ValueError(f"stage: {part.folder} was started with other settings ({lines[0]}): remove it to start anew")
