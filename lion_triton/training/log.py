"""What a training run writes down while it runs."""

from __future__ import annotations

import json
import math

from torch.utils.tensorboard import SummaryWriter

from lion_triton.runs import Run, Stage, write_text


class Log:
    """metrics.jsonl and TensorBoard; a continued run drops what it will write again."""

    def __init__(self, run: Run, total_step: int) -> None:
        self.path = run.metrics
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _total_step(line) <= total_step]
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        self.board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=total_step + 1)

    def write(self, stage: Stage, step: int, total_step: int, values: dict[str, float]) -> None:
        record = {"total_step": total_step, "stage": stage, "step": step, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{stage}/{name}", value, total_step)


def _total_step(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for one that a killed process left unfinished."""
    try:
        return json.loads(line)["total_step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
