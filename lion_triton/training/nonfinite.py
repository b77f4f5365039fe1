"""What to say when numbers have gone wrong: the step is done once more, uncaptured, and every tensor looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lion_triton.models.files import write_text
from lion_triton.runs import Stage
from lion_triton.training.batches import Batch
from lion_triton.training.context import Context
from lion_triton.training.step import Step

NAMED = 8  # clouds in the message; all are in the file
NORMS = 5


@dataclass
class Fault:
    """The first tensors of a step, in the order in which they were computed, that hold what is not finite.

    Attributes:
        inputs: tensors of the batch.
        output: the innermost module whose output it is, and ``from_input``: whether one of its inputs was it already.
        losses: by name.
        gradient: the parameter whose it is, of the module that is nearest to the loss.
        rows: of the first tensor, clouds of the batch, counted from 0; empty if it does not tell.
    """

    inputs: list[str] = field(default_factory=list)
    output: str = ""
    from_input: bool = False
    losses: list[str] = field(default_factory=list)
    gradient: str = ""
    rows: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.inputs or self.output or self.losses or self.gradient)

    def __str__(self) -> str:
        parts = [f"the batch's {name}" for name in self.inputs]
        if self.output:
            parts.append(f"the output of {self.output} (its input was {'not ' * self.from_input}finite)")
        if self.losses:
            terms = ", ".join(name for name in self.losses if name != "loss")
            parts.append(f"the loss{f' ({terms})' if terms else ''}")
        if self.gradient:
            parts.append(f"the gradient of {self.gradient}")
        return ", ".join(parts) or "nothing: done once more, the step is finite, so a fault of the machine is likely"


def find_fault(step: Step, lion: nn.Module) -> Fault:
    """Do the next step once more but for its update, and look at every tensor; modules by their names in ``lion``, or
    in the objective if they are no part of that.

    ``step`` has the batch loaded. No other process takes part.
    """
    fault = Fault()
    batch_size = len(next(iter(step.batch.values())))
    ran: list[str] = []  # modules, innermost first

    def note_rows(tensors: list[Tensor]) -> None:
        if not fault.rows:
            bad = [~x.isfinite().flatten(1).all(1) for x in tensors if x.ndim > 1 and len(x) == batch_size]
            fault.rows = torch.stack(bad).any(0).nonzero().flatten().tolist() if bad else []

    def after(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            ran.append(name)
            bad = _not_finite(output)
            if bad and not fault.output:
                fault.output, fault.from_input = name, bool(_not_finite(inputs))
                note_rows(bad)

        return hook

    fault.inputs = [name for name, x in step.batch.items() if _not_finite(x)]
    note_rows([step.batch[name] for name in fault.inputs])
    roots = (step.local, lion)
    names = {module: name for root in roots for name, module in root.named_modules() if name}
    hooks = [module.register_forward_hook(after(name)) for module, name in names.items()]
    step.optimizer.zero_grad()
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled blocks have no hooks inside
            losses = step.losses(step.local)
            fault.losses = [name for name, loss in losses.items() if _not_finite(loss)]
            step.accelerator.backward(losses["loss"])
        # Not in the order in which gradients are done: casts of weights come in between.
        last = {name: number for number, name in enumerate(ran)}
        parameters = {p: name for root in roots for name, p in root.named_parameters()}
        bad = [name for p, name in parameters.items() if _not_finite(p.grad)]
        fault.gradient = max(bad, key=lambda name: last.get(name.rpartition(".")[0], -1), default="")
    finally:
        for hook in hooks:
            hook.remove()
        step.optimizer.zero_grad()
    return fault


def explain(context: Context, stage: Stage, step: Step, batch: Batch, clouds: list[str], share: range) -> str:
    """One line about the first of the steps that ended the run; all that is known goes to RUN/nonfinite.json.

    batch: of that step, this process's. clouds: the names of all its clouds, of which ``share`` are this process's.
    """
    first, in_a_row = step.good + 1, int(step.in_a_row)
    norms = step.largest_norms(NORMS)
    step.number.fill_(first - 1)
    step.load(batch)
    fault = find_fault(step, context.lion)
    fault.rows = [share[row] for row in fault.rows]
    found: list[Fault] = gather_object([fault])
    fault = next(filter(None, found), fault)
    at_fault = [clouds[i] for one in found for i in one.rows]
    record = {
        "stage": stage,
        "step": first,
        "in_a_row": in_a_row,
        "first_at_fault": {**asdict(fault), "rows": at_fault},
        "clouds": clouds,
        "largest_gradient_norms": norms,
    }
    path = context.run.folder / "nonfinite.json"
    if context.accelerator.is_main_process:
        write_text(path, json.dumps(record, indent=2) + "\n")
    steps = f"step {first}" if in_a_row == 1 else f"steps {first} to {first + in_a_row - 1}"
    largest = ", ".join(f"{norm:.4g} (step {number})" for number, norm in norms.items())
    kept = f"the weights before are kept in {context.run.folder}; " if first > 1 else ""
    return (
        f"loss: loss or gradient not finite in {steps} of stage {stage}; first at fault: {fault}"
        f"{f', at {_some(at_fault)}' if at_fault else ''}; clouds of the batch: {_some(clouds)}; "
        f"largest gradient norms before: {largest or 'none'}; whole report: {path}; {kept}a smaller "
        "learning rate or --on-nonfinite skip may help"
    )


def _not_finite(tree: Any) -> list[Tensor]:
    """The tensors in ``tree`` that hold what is not finite."""
    floats = (x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point())
    return [x.detach() for x in floats if not bool(x.detach().isfinite().all())]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
