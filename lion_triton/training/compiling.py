"""torch.compile where it pays: the repeated blocks of the networks, each kind of block once for all its instances."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo import callback

from lion_triton.config import TrainConfig
from lion_triton.models.layers import FeaturePropagation, PVConv, SetAbstraction
from lion_triton.models.lion import LION
from lion_triton.models.priors import _TransformerBlock
from lion_triton.progress import ProgressBar
from lion_triton.training import report

BLOCKS: tuple[type[nn.Module], ...] = (PVConv, SetAbstraction, FeaturePropagation, _TransformerBlock)
# Blocks of one class differ in widths, resolution, style and dtype, in training and in sampling: PyTorch's own limit, 8
# compiled forms of one function, is meant for a function that is called in ever new ways.
FORMS = 64
# Where it was measured, on an H100 with the published VAE in bf16, 32 clouds, whole networks, uncaptured steps
# (bench/README.md): seconds that compiling took, the part of a step that it saved, and seconds of a step without it.
# Blocks and captured steps are unmeasured.
SECONDS_PER_STAGE, SAVED, SLOW_STEP = 99.0, 0.2, 0.283


def whether_to_compile(config: TrainConfig, device: torch.device) -> Literal["on", "off"]:
    """What ``config.compile`` means for a run that begins on ``device``; says so where it had to be decided."""
    if config.compile != "auto":
        return config.compile
    steps = config.vae.steps + config.priors.steps
    if device.type != "cuda" or not pays(SLOW_STEP * steps):
        return "off"  # and too short for a measurement
    seconds = report.predicted_seconds(LION(config.model).to(device), config)
    decided: Literal["on", "off"] = "on" if pays(seconds) else "off"
    print(f"compile: {decided}, as the steps of this run are predicted to take {report.duration(seconds)}")
    return decided


def pays(predicted_seconds: float) -> bool:
    """Whether compiling is expected to save more time than it takes, in a run of two stages of this length."""
    return SAVED * predicted_seconds > 2 * SECONDS_PER_STAGE


def check_compiler(device: torch.device) -> None:
    """Raises ``ValueError`` where torch.compile cannot work for want of a compiler of C++."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ValueError("compile: on a CPU it needs a C++ compiler, found none: --compile off")


def compile_blocks(module: nn.Module, backend: str = "inductor") -> None:
    """Make every block in ``module`` run compiled, from its next call on; weights and names stay as they are.

    Blocks of one class share one compiled function, which PyTorch keeps in as many forms as they differ in shape.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FORMS)
    compiled = {kind: torch.compile(kind.forward, fullgraph=True, backend=backend) for kind in BLOCKS}
    for block in module.modules():
        if type(block) in compiled:
            block.forward = MethodType(compiled[type(block)], block)


@contextmanager
def compile_bar(module: nn.Module) -> Iterator[None]:
    """While something compiles a bar says so, with the name of the block in ``module``."""
    running = ""
    names: dict[str, str] = {}  # of blocks, by what PyTorch calls their compilations
    bars: list[Any] = []

    def enter(name: str) -> Any:
        def hook(*_: object) -> None:
            nonlocal running
            running = name

        return hook

    def start(args: callback.CallbackArgs) -> None:
        # A backward pass is compiled when it first runs, long after the forward pass of its block.
        name = names.setdefault(args.compile_id, running)
        backward = args.callback_trigger == callback.CallbackTrigger.LAZY_BACKWARD
        text = f"compiling {name}{', backward pass' if backward else ''}"
        bars.append(ProgressBar(desc=text, bar_format="{desc}", leave=False))

    def end(args: callback.CallbackArgs) -> None:
        if bars:
            bars.pop().close()

    blocks = {name: block for name, block in module.named_modules() if isinstance(block, BLOCKS)}
    hooks = [block.register_forward_pre_hook(enter(name)) for name, block in blocks.items()]
    handler = callback.callback_handler
    handler.register_start_callback(start)
    handler.register_end_callback(end)
    try:
        yield
    finally:
        handler.remove_start_callback(start)
        handler.remove_end_callback(end)
        for hook in hooks:
            hook.remove()
