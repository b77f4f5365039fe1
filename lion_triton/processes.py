"""The processes that torchrun or ``accelerate launch`` starts together to do one command's work.

The launcher tells each its number by RANK, that on its machine by LOCAL_RANK, and how many there are by WORLD_SIZE;
without these a process is alone.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch.distributed.rendezvous import rendezvous

from lion_triton.devices import best_device

T = TypeVar("T")
MEETING_SECONDS = 50  # from the first that comes to the last; what they import takes them about as long


@dataclass(frozen=True)
class Processes:
    """Which process this is, of how many. The first is the main one: it alone writes and speaks."""

    index: int = 0
    count: int = 1

    @classmethod
    def launched(cls) -> Processes:
        """As the launcher says; nothing is connected yet."""
        index, local, count = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        return cls(int(index), int(count)) if index and local and count else cls()

    @classmethod
    def join(cls) -> Processes:
        """Connect those that were launched, each with a GPU of its own, or all on the CPU.

        Raises:
            ValueError: one does not come.
        """
        processes = cls.launched()
        if processes.count > 1:
            from accelerate import PartialState  # which takes a second to import

            store = processes._met()
            PartialState(cpu=best_device().type == "cpu")
            del store  # not before: it may be the one that all meet in
        return processes

    def _met(self) -> torch.distributed.Store:
        """Where all have come to. Connecting would wait for 30 minutes for one that has died on another machine."""
        limit = timedelta(seconds=MEETING_SECONDS)
        try:
            store, *_ = next(rendezvous("env://", timeout=limit))
            store.set(f"lion_triton/{self.index}", "")
            store.wait([f"lion_triton/{index}" for index in range(self.count)], limit)
        except torch.distributed.DistError:
            raise ValueError(
                f"processes: expected {self.count} to meet, but not all came within {MEETING_SECONDS} s; the error of "
                "one that is missing, above or on its machine, says why"
            ) from None
        return store

    @property
    def main(self) -> bool:
        return self.index == 0

    def mine(self, number: int) -> bool:
        """Whether the piece of work of this number is this process's: they take turns."""
        return number % self.count == self.index

    def gathered(self, pieces: list[T]) -> list[T]:
        """The pieces of all processes, in the order of their numbers, in every process."""
        if self.count == 1:
            return pieces
        of_each: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(of_each, pieces)
        total = sum(map(len, of_each))
        return [of_each[number % self.count][number // self.count] for number in range(total)]

    def agreed(self, value: T) -> T:
        """The main process's value."""
        return self.gathered([value])[0]


ALONE = Processes()


def quiet() -> None:
    """Say nothing from here on but errors: no line on the standard output."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def lost_another(error: RuntimeError) -> bool:
    """Whether this is what a process meets with when another one of its run is gone."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
