"""LION as a whole: the VAE, the two priors, and how they sample.

Shapes: B clouds, N points, Z shape-latent channels, H latent-point channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lion_triton import diffusion
from lion_triton.diffusion import Schedule, Spacing
from lion_triton.kernels import normal_noise
from lion_triton.kernels.noise import Key, new_key
from lion_triton.models.hub import Pretrained
from lion_triton.models.priors import (
    PointPrior,
    PointPriorConfig,
    ShapePrior,
    ShapePriorConfig,
    published_point_prior,
)
from lion_triton.models.sampling import Samplings
from lion_triton.models.vae import VAE, Latents, VAEConfig, published_vae

Sampler = Literal["ddpm", "ddim", "ode"]


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process of both priors and what their denoisers predict."""

    schedule: Literal["linear", "warmup_constant", "cosine"] = "linear"
    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction: Literal["eps", "v"] = "eps"
    variance: Literal["fixed_large", "fixed_small"] = "fixed_large"
    weight: Literal["uniform", "variational"] = "uniform"


@dataclass(frozen=True)
class LIONConfig:
    """Architecture of a LION; the defaults are the published one."""

    vae: VAEConfig = field(default_factory=published_vae)
    shape_prior: ShapePriorConfig = field(default_factory=ShapePriorConfig)
    point_prior: PointPriorConfig = field(default_factory=published_point_prior)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)


@dataclass(frozen=True)
class Posterior:
    """A sample of q(z0|x) and, at it, q(h0|x,z0): what the priors are trained on."""

    z: Float[Tensor, "B Z"]
    h_mu: Float[Tensor, "B N H"]
    h_log_sigma: Float[Tensor, "B N H"]


@torch.no_grad()
def posterior(vae: VAE, points: Float[Tensor, "B N 3"], key: Key) -> Posterior:
    """Encode clouds; z0 is sampled with ``key``, h0 is left as its distribution."""
    plan = vae.plan(points)
    z_mu, z_log_sigma = vae.encode_shape(points, plan)
    z = z_mu + z_log_sigma.exp() * normal_noise(z_mu.shape, key)
    return Posterior(z, *vae.encode_points(points, z, plan))


class DistilledPriors(nn.Module):
    """Both priors, distilled for one number of steps, and the guidance that they learned; the samplings by them."""

    guidance: Tensor

    def __init__(self, shape_prior: ShapePrior, point_prior: PointPrior, guidance: float) -> None:
        super().__init__()
        self.register_buffer("guidance", torch.tensor(guidance, dtype=torch.float64))
        self.shape_prior, self.point_prior = copy.deepcopy(shape_prior), copy.deepcopy(point_prior)
        self.samplings = Samplings()


class LION(nn.Module, Pretrained):
    """VAE and priors with one forward process.

    The priors work on standardised latents, ``(latent - mean) / std``; the statistics are buffers, set once
    by :meth:`set_latent_statistics` before the priors are trained, and the identity in the published model.

    ``distilled`` holds further priors for few steps of deterministic DDIM, by their number, of models that have such.
    ``spacing`` is that of DDIM's steps, ``guided`` the guidance that the priors' predictions contain.
    """

    config_type = LIONConfig
    spacing: Spacing = "uniform"
    guided: float = 0.0

    def __init__(self, config: LIONConfig | None = None) -> None:
        super().__init__()
        config = config or LIONConfig()
        self.config = config
        shape_dim, point_dim = config.vae.shape_dim, config.vae.point_dim
        self.vae = VAE(config.vae)
        self.shape_prior = ShapePrior(config.shape_prior, shape_dim)
        self.point_prior = PointPrior(config.point_prior, point_dim, shape_dim)
        d = config.diffusion
        self.schedule = Schedule(d.schedule, d.num_train_timesteps, d.beta_start, d.beta_end)
        self.z_mean: Tensor
        self.z_std: Tensor
        self.h_mean: Tensor
        self.h_std: Tensor
        for name, size in (("z", shape_dim), ("h", point_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        self.distilled = nn.ModuleDict()
        self._samplings = Samplings()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; also distilled priors that this model has none of yet."""
        for steps in sorted({int(name.split(".")[1]) for name in state_dict if name.startswith("distilled.")})[::-1]:
            if str(steps) not in self.distilled:
                self.add_distilled(steps, self)
        return super().load_state_dict(state_dict, strict, assign)

    def add_distilled(self, steps: int, teacher: LION, guidance: float = 0.0) -> LION:
        """Add priors for so many steps, at first the teacher's; returns what :meth:`few_step` will."""
        self.distilled[str(steps)] = DistilledPriors(teacher.shape_prior, teacher.point_prior, guidance)
        return self.few_step(steps, guidance=guidance)

    @property
    def distilled_steps(self) -> dict[int, float]:
        """The numbers of steps that distilled priors take, and the guidance that each have learned."""
        distilled: Any = self.distilled
        return {int(steps): priors.guidance.item() for steps, priors in distilled.items()}

    def few_step(self, steps: int | None, sampler: Sampler = "ddim", eta: float = 0.0, guidance: float = 0.0) -> LION:
        """This LION with the priors that are distilled for sampling like this, or itself where none are.

        They share all weights but those of the priors.
        """
        if sampler != "ddim" or eta or self.distilled_steps.get(steps or 0) != guidance:
            return self
        priors: Any = self.distilled[str(steps)]
        few = copy.copy(self)
        few._modules = self._modules | dict(priors.named_children()) | {"distilled": nn.ModuleDict()}
        few._samplings, few.spacing, few.guided = priors.samplings, "trailing", guidance
        return few

    def set_latent_statistics(self, h: Float[Tensor, "S N H"], z: Float[Tensor, "S Z"]) -> None:
        """Standardise by these latents: z per channel; h by a mean per channel, one std for xyz and one per feature."""
        z, h = z.double(), h.double().flatten(0, 1)
        self.z_mean.copy_(z.mean(0))
        self.z_std.copy_(z.std(0, correction=0).clamp_min(1e-3))
        self.h_mean.copy_(h.mean(0))
        std = h.std(0, correction=0)
        std[:3] = (h[:, :3] - h[:, :3].mean(0)).square().mean().sqrt()  # one scale: keep the geometry
        self.h_std.copy_(std.clamp_min(1e-3))

    @torch.no_grad()
    def encode(
        self, points: Float[Tensor, "B N 3"], *, generator: torch.Generator | None = None, mean: bool = False
    ) -> Latents:
        """Sample ``(h0, z0)`` from the posteriors, or take the means."""
        plan = self.vae.plan(points)
        mu, log_sigma = self.vae.encode_shape(points, plan)
        z = mu if mean else mu + log_sigma.exp() * normal_noise(mu.shape, new_key(mu.device, generator))
        mu, log_sigma = self.vae.encode_points(points, z, plan)
        h = mu if mean else mu + log_sigma.exp() * normal_noise(mu.shape, new_key(mu.device, generator))
        return Latents(h, z)

    @torch.no_grad()
    def decode(self, h: Float[Tensor, "B N H"], z: Float[Tensor, "B Z"]) -> Float[Tensor, "B N 3"]:
        """The cloud of these latents, in the model's (normalised) units."""
        return self.vae.decode(h, z)

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        *,
        steps: int | None = None,
        sampler: Sampler = "ddpm",
        eta: float = 0.0,
        num_points: int | None = None,
        generator: torch.Generator | None = None,
        labels: Int[Tensor, " B"] | None = None,
        clip: Float[Tensor, "B 512"] | None = None,
        clip_x0: float | None = None,
        guidance: float = 0.0,
        callback: Callable[[int, int], None] | None = None,
    ) -> Float[Tensor, "B P 3"]:
        """Generate clouds; by distilled priors where there are such for so many steps of DDIM with ``eta`` 0.

        Args:
            num_samples: B, at least 1.
            steps: network evaluations per prior; None: all training timesteps (ddpm), 50 (ddim).
                The ODE solver chooses its own steps and takes none.
            sampler: "ddpm" (ancestral), "ddim", or "ode" (probability flow).
            eta: DDIM's stochasticity, 0 (deterministic) to 1.
            num_points: P; may differ from training. None: as in training where the model was read from a run or a
                folder, which say; else 2048.
            generator: source of the randomness, on any device; the same generator state gives the same clouds.
            labels: class of each cloud, for class-conditional models; -1 for none.
            clip: CLIP embedding of each cloud, for CLIP-conditional models.
            clip_x0: clamp the predicted (standardised) latent to +- this in every step.
            guidance: w of classifier-free guidance, eps + w (eps - eps without the condition); 0 is none. For models
                whose conditions were dropped in training now and then. Each step evaluates twice as many clouds.
            callback: called with (steps done, steps in all) over both priors.

        Returns:
            Clouds in the model's (normalised) units, float32.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
        if num_points is None:
            num_points = int((self.about or {}).get("config", {}).get("data", {}).get("num_points", 2048))
        if num_points < 1:
            raise ValueError(f"num_points: expected at least 1, got {num_points}")
        config, chosen, lion = self.config.diffusion, None, self.few_step(steps, sampler, eta, guidance)
        if sampler == "ode":
            if config.prediction != "eps":
                raise ValueError('sampler: "ode" needs a model that predicts eps, this one predicts v')
        elif sampler == "ddpm":
            chosen = diffusion.ddpm_steps(self.schedule, steps, config.variance)
        elif sampler == "ddim":
            count = default_steps(sampler, config.num_train_timesteps) if steps is None else steps
            chosen = diffusion.ddim_steps(self.schedule, count, eta, lion.spacing)
        else:
            raise ValueError(f'sampler: expected "ddpm", "ddim" or "ode", got {sampler!r}')
        if guidance and labels is None and clip is None:
            raise ValueError(f"guidance: needs labels or clip to guide by, got {guidance:g} without either")
        classes = self.config.shape_prior.num_classes
        if classes and labels is None:
            raise ValueError(f"labels: expected the classes of the clouds, 0 to {classes - 1} or -1 for none, got None")
        sampling = lion._samplings.get(lion, num_samples, num_points, labels, clip, clip_x0, guidance)
        return sampling.run(chosen, lambda: new_key(self.z_mean.device, generator), labels, clip, callback)

    def shape_denoiser(
        self, labels: Int[Tensor, " B"] | None = None, clip: Float[Tensor, "B 512"] | None = None, guidance: float = 0.0
    ) -> diffusion.Model:
        """The shape prior as samplers take it: from (standardised z_t (B, Z), t (B,)) to eps."""
        return self._denoiser(self.shape_prior, (), labels, clip, guidance)

    def point_denoiser(
        self,
        z: Float[Tensor, "B Z"],
        labels: Int[Tensor, " B"] | None = None,
        clip: Float[Tensor, "B 512"] | None = None,
        guidance: float = 0.0,
    ) -> diffusion.Model:
        """The point prior given standardised z, likewise: from (standardised h_t (B, N, H), t (B,)) to eps."""
        return self._denoiser(self.point_prior, (z,), labels, clip, guidance)

    def _denoiser(
        self, prior: nn.Module, given: tuple[Tensor, ...], labels: Tensor | None, clip: Tensor | None, guidance: float
    ) -> diffusion.Model:
        """A prior as samplers take it, guided away from what it says without its conditions.

        Ho & Salimans 2022, Classifier-Free Diffusion Guidance, eq. 6: (1 + w) eps(x_t, c) - w eps(x_t).
        """

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            return self._eps(prior(x_t, t, *given, clip, labels), x_t, t)

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            both = [torch.cat([x, x]) for x in (x_t, t, *given)]
            unlabelled = None if labels is None else torch.cat([labels, torch.full_like(labels, -1)])
            undescribed = None if clip is None else torch.cat([clip, torch.zeros_like(clip)])
            x, times, *rest = both
            eps, without = self._eps(prior(x, times, *rest, undescribed, unlabelled), x, times).chunk(2)
            return eps + guidance * (eps - without)

        return denoise if guidance in (0, self.guided) else guided

    def standardize(self, latents: Latents) -> Latents:
        """Latents as the priors take them."""
        return Latents((latents.h - self.h_mean) / self.h_std, (latents.z - self.z_mean) / self.z_std)

    def unstandardize(self, latents: Latents) -> Latents:
        """Latents as the VAE takes them."""
        return Latents(latents.h * self.h_std + self.h_mean, latents.z * self.z_std + self.z_mean)

    def _eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return diffusion.to_eps(prediction, x_t, t, self.schedule, self.config.diffusion.prediction)


def keys_per_batch(sampler: Sampler) -> int:
    """How many noise keys ``LION.sample`` draws from its generator: of each prior's x_T, and of its steps if they have
    one."""
    return 2 if sampler == "ode" else 4


def default_steps(sampler: Literal["ddpm", "ddim"], num_train_timesteps: int) -> int:
    """Network evaluations per prior where nobody says how many."""
    return num_train_timesteps if sampler == "ddpm" else min(50, num_train_timesteps)
