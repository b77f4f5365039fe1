"""A run that goes on to another number of steps than it was started for."""

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate import Accelerator

from lion_triton.config import PriorTraining, TrainConfig, VAETraining
from lion_triton.runs import Checkpoint, Run, Stage, change_config, open_run
from lion_triton.training.objectives import kl_coefficient
from lion_triton.training.step import learning_rate


def change_steps(run: Run, checkpoint: Checkpoint | None, accelerator: Accelerator) -> None:
    """Where ``run.config`` has other steps than the folder's ``config.json``: check, say what changes, write it down.

    Raises:
        ValueError: fewer than are done, or another VAE than the one on whose latents the priors are trained.
    """
    stored = open_run(run.folder).config
    accelerator.wait_for_everyone()  # all have read it
    stages: tuple[Stage, ...] = ("vae", "priors")
    changed = [stage for stage in stages if _training(run.config, stage).steps != _training(stored, stage).steps]
    done = {"vae": 0, "priors": 0}
    if checkpoint is not None:
        done[checkpoint.stage] = checkpoint.step
    notes = []
    for stage in changed:
        new, old = _training(run.config, stage), _training(stored, stage)
        if stage == "vae" and checkpoint is not None and checkpoint.stage == "priors":
            raise ValueError(
                f"vae.steps: the priors of {run.folder} are trained on its VAE as it is after {old.steps}, got "
                f"{new.steps}: a longer VAE takes a new run, --init-from {run.folder}"
            )
        if new.steps < done[stage]:
            raise ValueError(f"{stage}.steps: {done[stage]} are done, expected no fewer, got {new.steps}")
        effects = schedule_changes(new, old, done[stage]) or ["no schedule depends on it"]
        notes.append(f"{stage}.steps: {new.steps}, was {old.steps}; after step {done[stage]}: {', '.join(effects)}")
    if notes and accelerator.is_main_process:
        for note in notes:
            print(note)
        kept = replace(
            stored,
            vae=replace(stored.vae, steps=run.config.vae.steps),
            priors=replace(stored.priors, steps=run.config.priors.steps),
        )
        change_config(run, kept, "; ".join(notes))
    accelerator.wait_for_everyone()


def schedule_changes(new: VAETraining | PriorTraining, old: VAETraining | PriorTraining, done: int) -> list[str]:
    """In words, what the step after ``done`` steps does otherwise than before."""
    number = torch.tensor(done)
    rates = [learning_rate(training, number).item() for training in (new, old)]
    changes = []
    if new.learning_rate_decay == "cosine":
        changes.append(f"learning rate {rates[0]:.3g}, was {rates[1]:.3g} (its cosine ends with the last step)")
    if isinstance(new, VAETraining) and isinstance(old, VAETraining) and new.kl_start != new.kl_end:
        values = [kl_coefficient(training, number).item() for training in (new, old)]
        until = round(new.kl_anneal * new.steps)
        changes.append(f"KL coefficient {values[0]:.3g}, was {values[1]:.3g} (it rises until step {until})")
    return changes


def _training(config: TrainConfig, stage: Stage) -> VAETraining | PriorTraining:
    return config.vae if stage == "vae" else config.priors
