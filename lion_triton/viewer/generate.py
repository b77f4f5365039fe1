"""What a model makes: the shape of a seed, its denoising, the nearest training shape, the way between two shapes."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
import trimesh
from jaxtyping import Float32
from torch import Tensor

from lion_triton.config import SamplingConfig
from lion_triton.data.sources import load_sources
from lion_triton.evaluation.memorising import Training, nearest_training
from lion_triton.evaluation.sets import CloudSet, Preparation
from lion_triton.generation.inputs import Given, Model, check_points, known_label, read_given_or_seed
from lion_triton.generation.latents import decode, from_noise
from lion_triton.generation.prompts import Prompt, Prompts, own_prompts
from lion_triton.interpolate import deterministic, end_of, ends_of, frames, num_batches
from lion_triton.models.lion import Latents
from lion_triton.pictures import RIGHT
from lion_triton.progress import begin_parts
from lion_triton.viewer.page import Page

FRAMES = 17  # on the way between two shapes
HINT = "a seed, a file of a shape, FILE:3 or procedural:3"


class Generator:
    """The panel of a model. All is made by DDIM without randomness, so that a seed is a shape.

    ``clouds`` (in data units where the normalisation can be inverted) is what the slider goes over: the denoising of a
    shape, or the way between two. ``shown`` is one of them. ``prompts``: what a model of words can be asked for;
    default: its training shapes.
    """

    def __init__(self, page: Page, model: Model, prompts: Prompts | None = None) -> None:
        self.page, self.model = page, model
        self.prompts = own_prompts(model.run) if prompts is None and model.by_words else prompts
        gui, run = page.server.gui, model.run
        self.clouds: Float32[np.ndarray, "K P 3"] = np.zeros((1, 1, 3), np.float32)
        self.name = ""
        self.made: tuple[object, ...] | None = None  # what is shown, if it is a seed's
        with gui.add_folder("Generate"):
            self.seed = gui.add_number("seed", 0, min=0, max=2**31 - 1, step=1)
            self.label = gui.add_dropdown("class", run.classes) if model.conditional else None
            self.asked = None if self.prompts is None else gui.add_dropdown("like", self.prompts.names)
            self.steps = gui.add_number("steps", deterministic(run, "ddim", None).steps or 1, min=1, step=1)
            self.points = gui.add_number("points", run.config.data.num_points, min=1, step=1)
            page.add_action("Resample", self.resample)
            page.add_action("Nearest training shape", self.nearest)
        with gui.add_folder("Between two shapes"):
            self.ends = [gui.add_text(name, text, hint=HINT) for name, text in (("a", "0"), ("b", "1"))]
            page.add_action("Interpolate", self.interpolate)
        self.slider = gui.add_slider("step", min=0, max=1, step=1, initial_value=0)
        self.slider.on_update(lambda _: self.show())
        page.add_download()
        page.do("Resample", self.resample)
        page.look_at(self.shown)

    @property
    def shown(self) -> Float32[np.ndarray, "P 3"]:
        return self.clouds[min(int(self.slider.value), len(self.clouds) - 1)]

    def resample(self) -> str:
        """The shape of the seed, or the next one where nothing has changed, and the latent points of each step."""
        model, settings, label, prompt, num_points = self.options()
        like = None if prompt is None else prompt.name
        if self.made == (int(self.seed.value), settings, label, like, num_points):
            self.seed.value += 1
        model = model.few_step(settings)
        lion, seed = model.lion, int(self.seed.value)
        steps: list[Tensor] = []
        end = end_of(model, seed, num_points, label, settings, begin_parts(lambda _: None), prompt)
        condition, progress = model.condition(end.label, end.prompt), self.page.progress("Resample")
        with model.autocast():
            latents = from_noise(lion, end.noise, settings, condition, progress, steps.append)
            cloud = decode(lion, latents)
        on_the_way = [lion.unstandardize(Latents(h, latents.z)).h[..., :3].float() for h in steps[:-1]]
        self.replace(torch.cat([*on_the_way, cloud]).cpu(), len(on_the_way), f"seed{seed}")
        self.made = seed, settings, label, like, num_points
        return f"seed {seed}, {model.called(end.label, end.prompt)}: {num_points} points"

    def interpolate(self) -> str:
        """The way from a to b; the panel's class or prompt is that of seeds, shapes have their own."""
        model, settings, label, prompt, num_points = self.options()
        a, b = (read_given_or_seed(box.label, box.value, model.run, num_points, 0) for box in self.ends)
        shapes = sum(isinstance(x, Given) for x in (a, b))
        progress, parts = self.page.progress("Interpolate"), num_batches(FRAMES) + shapes
        begin = begin_parts(lambda done: progress(done, parts))
        if not shapes:  # no noise is known from which distilled priors make a given shape
            model = model.few_step(settings)
        asked = [None if isinstance(x, Given) else prompt for x in (a, b)]
        ends = ends_of(model, a, b, num_points, None if shapes else label, settings, begin, asked)
        self.made = None
        self.replace(frames(model, *ends, FRAMES, settings, begin), 0, "between")
        names = " to ".join(
            f"{box.value} ({model.called(end.label, end.prompt)})" for box, end in zip(self.ends, ends, strict=True)
        )
        return f"from {names}: move the slider"

    def nearest(self) -> str:
        """The training shape nearest to what is shown, beside it."""
        near = nearest_training(self.shown[None], self.training, self.model.device, lambda _: None)
        self.page.show_cloud("nearest", near.points[0], left=1.2 * float(np.ptp(self.shown @ RIGHT)))
        name = self.training.source.clouds.names[int(near.index[0])]
        return f"nearest training shape: {name}, Chamfer distance {near.distance[0]:.2g}"

    @cached_property
    def training(self) -> Training:
        """The training shapes, read when they are first asked for."""
        run = self.model.run
        clouds = load_sources(run.config.data, run.config.evaluate_shapes).train
        own = None if run.normalization.kind == "global" else run.normalization
        source = CloudSet("training", run.config.data.source, clouds)
        return Training.read(source, Preparation(None, 0, own), run.config.data.num_points)

    def options(self) -> tuple[Model, SamplingConfig, int | None, Prompt | None, int]:
        """The model, and what the panel says: how to sample, which class, like which prompt, how many points.

        Raises:
            ValueError: what this model cannot be sampled with.
        """
        run = self.model.run
        settings = deterministic(run, "ddim", int(self.steps.value))
        label = None if self.label is None else known_label(run, self.label.value)
        prompt = None
        if self.prompts is not None and self.asked is not None:
            prompt = self.prompts[self.prompts.names.index(self.asked.value)]
        return self.model, settings, label, prompt, check_points(run, int(self.points.value))

    def replace(self, clouds: Float32[Tensor, "K P 3"], index: int, name: str) -> None:
        """Have the slider go over other clouds (in the model's units), at ``index``."""
        self.clouds, self.name = self.model.run.normalization.invert(clouds.numpy()), name
        self.slider.max = len(clouds) - 1
        self.slider.value = index
        self.show()

    def show(self) -> None:
        """Draw the cloud that the slider is at."""
        self.page.remove("nearest")
        self.page.show_cloud("shape", self.shown)
        self.page.offer(f"{self.name}-{int(self.slider.value)}", trimesh.PointCloud(self.shown))
