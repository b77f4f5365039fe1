"""Classifier-free guidance: conditions withheld in training, and the extrapolation away from none in sampling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lion_triton.config import check, check_sampling, quickstart
from lion_triton.diffusion import ddim
from lion_triton.models.lion import LION, posterior
from lion_triton.training.objectives import prior_loss
from tests.tiny import tiny_config

N, CLASSES = 24, 3


@pytest.fixture(scope="module")
def lion() -> LION:
    torch.manual_seed(0)
    lion = LION(tiny_config(CLASSES).model).eval()
    for prior in (lion.shape_prior, lion.point_prior):
        prior.class_embedding.weight.data.normal_(std=3)
    return lion


def test_the_label_minus_one_is_the_network_without_its_class(lion: LION) -> None:
    z, t, label = torch.randn(2, lion.config.vae.shape_dim), torch.tensor([3.0, 500.0]), torch.tensor([-1, 1])
    h = torch.randn(2, N, lion.config.vae.point_dim)
    for predict, prior in (
        (lambda: lion.shape_prior(z, t, label=label), lion.shape_prior),
        (lambda: lion.point_prior(h, t, z, label=label), lion.point_prior),
    ):
        with torch.no_grad():
            got = predict()
            kept = prior.class_embedding.weight.clone()
            prior.class_embedding.weight.zero_()
            without = predict()
            prior.class_embedding.weight.copy_(kept)
        torch.testing.assert_close(got[0], without[0])
        assert (got[1] - without[1]).abs().max() > 1e-3


def test_guidance_extrapolates_from_none_to_the_class(lion: LION) -> None:
    z, t, label = torch.randn(2, lion.config.vae.shape_dim), torch.tensor([3, 500]), torch.tensor([2, 0])
    h = torch.randn(2, N, lion.config.vae.point_dim)
    none = torch.full_like(label, -1)
    with torch.no_grad():
        for x, denoiser in (
            (z, lion.shape_denoiser),
            (h, lambda labels, guidance=0.0: lion.point_denoiser(z, labels, guidance=guidance)),
        ):
            given, without = denoiser(label)(x, t), denoiser(none)(x, t)
            for w in (0.5, 3.0):
                guided = denoiser(label, guidance=w)(x, t)
                torch.testing.assert_close(guided, (1 + w) * given - w * without, rtol=1e-4, atol=1e-5)
                assert (guided - given).abs().max() > 1e-3


def test_sampling_is_guided(lion: LION) -> None:
    labels, options = torch.tensor([0, 2]), {"steps": 3, "sampler": "ddim", "num_points": N}

    def sample(**more: float) -> torch.Tensor:
        return lion.sample(2, generator=torch.Generator().manual_seed(1), labels=labels, **options, **more)  # type: ignore[arg-type]

    plain = sample()
    assert torch.equal(sample(guidance=0.0), plain)
    guided = sample(guidance=2.0)
    assert torch.equal(sample(guidance=2.0), guided)
    assert (guided - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"^guidance: needs labels or clip to guide by, got 2 without either$"):
        lion.sample(1, guidance=2.0)


def test_guidance_one_of_a_gaussian_mixture_is_the_guided_score() -> None:
    """Two classes at -1 and +1: guided samples of +1 stay on its side and lie further out."""
    from lion_triton.diffusion import Schedule

    schedule = Schedule("cosine", 200)

    def eps(x: torch.Tensor, t: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """The exact noise of an even mixture of normals at ``means`` with deviation 0.3."""
        abar = schedule.alphas_cumprod[t - 1][:, None]
        centre, variance = abar.sqrt() * means, abar * 0.09 + 1 - abar
        weight = (-((x - centre) ** 2) / (2 * variance)).softmax(-1)
        score = (weight * (centre - x) / variance).sum(-1, keepdim=True)
        return -(1 - abar).sqrt() * score

    one, both = torch.tensor([1.0]), torch.tensor([-1.0, 1.0])
    x = torch.randn(256, 1, generator=torch.Generator().manual_seed(0))

    def run(w: float) -> torch.Tensor:
        model = lambda x, t: eps(x, t, one) + w * (eps(x, t, one) - eps(x, t, both))  # noqa: E731
        return ddim(model, x, schedule, torch.tensor([0, 0]), steps=50)

    plain, guided = run(0.0), run(1.0)
    assert abs(plain.mean() - 1) < 0.05
    assert guided.mean() > plain.mean() + 0.02
    assert (guided > 0).all()


def test_a_share_of_the_conditions_is_withheld_by_the_key(lion: LION, monkeypatch: pytest.MonkeyPatch) -> None:
    clouds, labels = torch.randn(64, N, 3), torch.arange(64) % CLASSES
    seen: dict[str, torch.Tensor] = {}
    forward = type(lion.shape_prior).forward, type(lion.point_prior).forward

    def shape(self, z, t, clip=None, label=None, **more):  # type: ignore[no-untyped-def]
        seen["shape"] = label
        return forward[0](self, z, t, clip, label, **more)

    def point(self, h, t, z, clip=None, label=None, **more):  # type: ignore[no-untyped-def]
        seen["point"] = label
        return forward[1](self, h, t, z, clip, label, **more)

    monkeypatch.setattr(type(lion.shape_prior), "forward", shape)
    monkeypatch.setattr(type(lion.point_prior), "forward", point)
    with torch.no_grad():
        latents = posterior(lion.vae, clouds, torch.tensor([0, 0]))
        drawn = []
        for offset in range(8):
            prior_loss(lion, latents, torch.tensor([1, 4 * offset]), labels, drop_condition=0.25)
            assert torch.equal(seen["shape"], seen["point"])
            kept = seen["point"] >= 0
            assert torch.equal(seen["point"][kept], labels[kept])
            drawn.append(~kept)
        prior_loss(lion, latents, torch.tensor([1, 0]), labels)
        assert torch.equal(seen["point"], labels)
    assert not torch.equal(drawn[0], drawn[1])
    assert 0.18 < torch.stack(drawn).float().mean() < 0.32  # 512 draws: 0.25 +- 3.6 deviations


def test_what_cannot_be_guided_is_refused() -> None:
    config = quickstart()
    with pytest.raises(ValueError, match=r"^priors.drop-condition: expected a number in \[0, 1\), got 1$"):
        check(replace(config, priors=replace(config.priors, drop_condition=1)))
    untold = replace(config, priors=replace(config.priors, drop_condition=0.0))
    with pytest.raises(
        ValueError, match=r"^guidance: needs a model with classes or CLIP, trained with priors.drop-condition"
    ):
        check_sampling(replace(config.sampling, guidance=1.0), untold)
    told = replace(config, priors=replace(config.priors, drop_condition=0.1))
    check_sampling(replace(config.sampling, guidance=1.0), told)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^guidance: expected a number from 0, got"):
            check_sampling(replace(config.sampling, guidance=wrong), told)
