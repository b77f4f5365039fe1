"""Networks that a trained run gets besides its own, each in a folder of the run: RUN/surface, RUN/encoders/voxels.

FOLDER/config.json             version, commit, the checkpoint whose VAE it was trained with, its configuration
FOLDER/metrics.jsonl           and so on, as in a run folder
FOLDER/checkpoints/step-<n>/
FOLDER/figures.json            of held-out shapes, once it is trained
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import dacite

from lion_triton import __version__
from lion_triton.config import differences
from lion_triton.errors import one_line
from lion_triton.models.files import write_text
from lion_triton.models.hub import last_checkpoint
from lion_triton.runs import Run, commit

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

P = TypeVar("P", bound="Part")


@dataclass(frozen=True)
class Part:
    """One of them. ``run`` is the run with FOLDER as its folder: checkpoints are saved and read as a run's own.

    All else is what ``config.json`` says, each a dataclass: ``training`` with its number of ``steps``, and what a
    subclass adds.
    """

    run: Run
    training: Any

    @classmethod
    def create(cls: type[P], run: Run, name: str, vae: str | None, **contents: DataclassInstance) -> P:
        """Make the folder ``name``; ``vae`` names the checkpoint whose VAE the network is trained with."""
        folder = run.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = {"lion_triton": __version__, "commit": commit(), "vae": vae}
        about |= {key: asdict(value) for key, value in contents.items()}
        write_text(folder / "config.json", json.dumps(about, indent=2) + "\n")
        return cls(replace(run, folder=folder), **contents)

    @classmethod
    def open(cls: type[P], run: Run, name: str) -> P | None:
        """The part called ``name``; None if there is none yet.

        Raises:
            ValueError: a ``config.json`` that is damaged or of another version's form.
        """
        path = run.folder / name / "config.json"
        if not path.is_file():
            return None
        kinds = {key: kind for key, kind in get_type_hints(cls).items() if key != "run"}
        strict = dacite.Config(cast=[tuple], strict=True)
        try:
            about = json.loads(path.read_text())
            contents: dict[str, Any] = {key: dacite.from_dict(kind, about[key], strict) for key, kind in kinds.items()}
        except Exception as error:  # whatever a damaged or foreign file makes the parsers raise
            raise ValueError(f"run: {path} is damaged or of another version ({one_line(error)})") from None
        return cls(replace(run, folder=path.parent), **contents)

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def trained(self) -> bool:
        """Whether it is trained to the end."""
        return last_checkpoint(self.folder, self.training.steps) is not None

    @property
    def finished(self) -> bool:
        """Whether it is trained to the end, and judged."""
        return self.trained and (self.folder / "figures.json").is_file()

    def check_same_settings(self, training: DataclassInstance, prefix: str) -> None:
        """Refuse to continue its training with other settings.

        Raises:
            ValueError: naming the first difference.
        """
        lines = differences(training, self.training, prefix)
        if lines:
            started = f"{self.folder} was started with other settings ({lines[0]})"
            raise ValueError(f"stage: {started}: remove it to start anew")
