"""What a training run writes down while it runs."""

from __future__ import annotations

import json
import math

from torch.utils.tensorboard import SummaryWriter

from lion_triton.models.files import write_text
from lion_triton.runs import Run, Stage, append_text


class Log:
    """metrics.jsonl and TensorBoard; a continued run drops what it will write again."""

    def __init__(self, run: Run, total_step: int) -> None:
        self.path = run.metrics
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _total_step(line) <= total_step]
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        self.board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=total_step + 1)

    def write(self, stage: Stage, step: int, total_step: int, values: dict[str, float]) -> None:
        """Add a line; what is not finite, of a step that was skipped, is null there and no point of a curve."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        record = {"total_step": total_step, "stage": stage, "step": step, **finite}
        append_text(self.path, json.dumps(record) + "\n")
        for name, value in finite.items():
            if value is not None:
                self.board.add_scalar(f"{stage}/{name}", value, total_step)


def _total_step(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for one that a killed process left unfinished."""
    try:
        return json.loads(line)["total_step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
