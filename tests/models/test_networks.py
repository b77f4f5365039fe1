"""Properties of the networks that no golden file shows: gradients, variants, other sizes, bad input."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lion_triton.config import PRESETS, quickstart, with_networks
from lion_triton.kernels import group
from lion_triton.models import LION, LIONConfig
from lion_triton.models.attention import Attention, softmax_attention
from lion_triton.models.layers import FeaturePropagation, PVConv, SetAbstraction, SqueezeExcite, sinusoidal_embedding
from lion_triton.models.modulation import Modulation, NormPlace, normalize
from lion_triton.models.plan import LevelGeometry, SetAbstractionGeometry, plan_points
from lion_triton.models.priors import PointPrior
from lion_triton.models.unet import Convolutions, DownLevel, UNet, UNetConfig, UpLevel

N = 160


def small(**changes: object) -> LIONConfig:
    model = quickstart().model
    return replace(model, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def lion() -> LION:
    torch.manual_seed(0)
    return LION(small())


@pytest.fixture(scope="module")
def clouds() -> Tensor:
    return torch.randn(2, N, 3, generator=torch.Generator().manual_seed(1))


def test_every_parameter_is_trained(lion: LION, clouds: Tensor) -> None:
    """A parameter without a gradient is dead weight, or cut off by a mistake."""
    from lion_triton.config import ReconstructionWeights
    from lion_triton.models.lion import posterior
    from lion_triton.training.objectives import prior_loss, vae_loss

    lion.zero_grad()
    key = torch.tensor([3, 0])
    vae_loss(
        lion.vae,
        clouds,
        key,
        kl_coefficient=1.0,
        lambda_z=1.0,
        lambda_h=1.0,
        reconstruction=ReconstructionWeights(l1=1, l2=1, chamfer=1, emd=1),
        occupancy_weight=1.0,
    ).loss.backward()
    labels = torch.tensor([0, 1])
    for linear in lion.point_prior.network.moments.outputs:
        torch.nn.init.normal_(linear.weight)  # zero at first, and then no gradient goes through
    prior_loss(lion, posterior(lion.vae, clouds, key), key, labels).loss.backward()
    for name, parameter in lion.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    lion.zero_grad()


def test_published_ratio_of_the_elbo(lion: LION, clouds: Tensor) -> None:
    """Published: L1 over the batch, KLs per cloud, times 0.5. Here: all per cloud, lambda = 1 / batch."""
    from lion_triton.config import ReconstructionWeights
    from lion_triton.training.objectives import vae_loss

    batch = len(clouds)
    with torch.no_grad():
        loss = vae_loss(
            lion.vae,
            clouds,
            torch.tensor([0, 0]),
            kl_coefficient=0.5,
            lambda_z=1 / batch,
            lambda_h=1 / batch,
            reconstruction=ReconstructionWeights(),
        )
    recipe = PRESETS["lion"]().vae
    assert (recipe.lambda_z, recipe.lambda_h, recipe.kl_end, recipe.kl_anneal) == (1 / 32, 1 / 32, 0.5, 0.5)
    published = loss.reconstruction * batch + 0.5 * (loss.kl_z + loss.kl_h_xyz + loss.kl_h_feature)
    torch.testing.assert_close(loss.loss * batch, published)


def test_vae_starts_at_the_identity(clouds: Tensor) -> None:
    lion = LION(small(vae=replace(quickstart().model.vae, decoder_scale=0.01)))
    z, _ = lion.vae.encode_shape(clouds)
    mu, log_sigma = lion.vae.encode_points(clouds, z)
    assert (mu[..., :3] - clouds).abs().max() < 0.1
    assert log_sigma.mean() < -5
    assert (lion.vae.decode(mu, z) - clouds).abs().max() < 0.2


@pytest.mark.parametrize("points", [64, 129, 1000])
def test_any_number_of_points(lion: LION, points: int) -> None:
    out = lion.sample(1, steps=2, sampler="ddim", num_points=points, labels=torch.tensor([0]))
    assert out.shape == (1, points, 3)
    assert out.isfinite().all()


def test_too_few_points_is_one_clear_line(lion: LION) -> None:
    with pytest.raises(ValueError, match=r"^points: this network needs at least 64 points .* got 63$"):
        lion.encode(torch.randn(1, 63, 3))


@pytest.mark.parametrize(
    "degenerate", [torch.zeros(1, N, 3), torch.ones(1, N, 3) * 1e4, torch.randn(1, 1, 3).expand(1, N, 3)]
)
def test_coincident_points_do_not_divide_by_zero(lion: LION, degenerate: Tensor) -> None:
    h, z = lion.encode(degenerate)
    assert h.isfinite().all()
    assert z.isfinite().all()
    assert lion.decode(h, z).isfinite().all()


def test_clouds_of_a_batch_do_not_meet(lion: LION, clouds: Tensor) -> None:
    lion.eval()
    with torch.no_grad():
        together = lion.vae.encode_shape(clouds)[0]
        alone = lion.vae.encode_shape(clouds[1:])[0]
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


def test_point_order_moves_only_the_rounding(lion: LION, clouds: Tensor) -> None:
    """Without set abstraction's index-order ties nothing in the transformer depends on the order."""
    config = with_networks(quickstart(), None, "transformer").model
    torch.manual_seed(0)
    prior = LION(config).point_prior.eval()
    for parameter in prior.parameters():  # adaLN-zero starts at zero and would hide everything
        torch.nn.init.normal_(parameter, std=0.1)
    h, z, t, labels = torch.randn(2, N, 4), torch.randn(2, 32), torch.tensor([3, 900]), torch.tensor([0, 1])
    order = torch.randperm(N)
    with torch.no_grad():
        a, b = prior(h, t, z, label=labels)[:, order], prior(h[:, order], t, z, label=labels)
    assert a.abs().max() > 0
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_conditions_are_checked(lion: LION) -> None:
    z, t = torch.randn(1, 32), torch.tensor([1])
    with pytest.raises(ValueError, match="^label: this prior is conditioned on it, got None$"):
        lion.shape_prior(z, t)
    with pytest.raises(ValueError, match="^clip: this prior is not conditioned on it, got a tensor$"):
        lion.shape_prior(z, t, torch.randn(1, 512), torch.tensor([0]))


def test_conditions_change_the_output(lion: LION) -> None:
    lion.eval()
    z, h, t = torch.randn(1, 32), torch.randn(1, N, 4), torch.tensor([500])
    a, b = torch.tensor([0]), torch.tensor([1])
    assert not torch.equal(lion.shape_prior(z, t, label=a), lion.shape_prior(z, t, label=b))
    assert not torch.equal(lion.point_prior(h, t, z, label=a), lion.point_prior(h, t, z, label=b))
    assert not torch.equal(lion.point_prior(h, t, z, label=a), lion.point_prior(h, t, z + 1, label=a))
    assert not torch.equal(lion.point_prior(h, t, z, label=a), lion.point_prior(h, t + 1, z, label=a))


def test_sampling_repeats_with_its_generator(lion: LION) -> None:
    def clouds(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.tensor([0, 1])
        return lion.sample(2, steps=3, sampler="ddpm", num_points=N, generator=generator, labels=labels)

    assert torch.equal(clouds(5), clouds(5))
    assert not torch.equal(clouds(5), clouds(6))


def test_sample_refuses_bad_arguments(lion: LION) -> None:
    with pytest.raises(ValueError, match="^num_samples: expected at least 1, got 0$"):
        lion.sample(0)
    with pytest.raises(ValueError, match="^labels: expected the classes of the clouds, 0 to 4 or -1 for none"):
        lion.sample(1)
    with pytest.raises(ValueError, match="^sampler: expected"):
        lion.sample(1, sampler="euler", labels=torch.tensor([0]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^steps: expected 1 to 1000"):
        lion.sample(1, steps=0, labels=torch.tensor([0]))


def test_standardised_latents(clouds: Tensor) -> None:
    lion = LION(small())
    h, z = torch.randn(64, N, 4) * 3 + 1, torch.randn(64, 32) * 2 - 1
    lion.set_latent_statistics(h, z)
    spread = ((z - lion.z_mean) / lion.z_std).std(0, correction=0)
    torch.testing.assert_close(spread, torch.ones(32), rtol=1e-4, atol=1e-4)
    assert lion.h_std[0] == lion.h_std[1] == lion.h_std[2]  # one scale: shapes keep their proportions
    torch.testing.assert_close(((h - lion.h_mean) / lion.h_std).std(), torch.tensor(1.0), rtol=0.05, atol=0.0)


def test_softmax_attention_against_its_formula() -> None:
    q, k, v = torch.randn(3, 2, 7, 4, 5, dtype=torch.float64).unbind(0)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 5**0.5
    expected = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)
    torch.testing.assert_close(softmax_attention(q, k, v), expected)


def test_both_kinds_of_attention_have_the_same_parameters() -> None:
    linear, softmax = Attention(16, 2, 8, "linear"), Attention(16, 2, 8, "softmax")
    softmax.load_state_dict(linear.state_dict())
    x = torch.randn(1, 9, 16)
    assert not torch.allclose(linear(x), softmax(x))


def places(*channels: int) -> list[NormPlace]:
    return [NormPlace("layer", "norm", c) for c in channels]


def test_modulation_starts_as_plain_group_normalisation() -> None:
    (norms,) = Modulation([places(32)], 8)(torch.zeros(2, 8), 2)
    x = torch.randn(2, 5, 32)
    plain = torch.nn.functional.silu(torch.nn.functional.group_norm(x.transpose(1, 2), 8).transpose(1, 2))
    torch.testing.assert_close(normalize(x, norms[0]), plain, rtol=1e-4, atol=1e-5)


def test_modulation_initialises_each_norm_for_itself() -> None:
    modulation = Modulation([places(64, 16)] * 20, 16)
    for half in modulation.style.weight.chunk(2):  # type: ignore[union-attr]
        rows = half.split(modulation.channels)
        for width in (64, 16):
            weight = torch.cat([r.flatten() for r in rows if len(r) == width])
            assert weight.var().item() == pytest.approx(0.1 / (2 * width), rel=0.1)


@pytest.mark.parametrize("style_dim", [0, 5])
def test_modulation_gives_each_norm_its_part(style_dim: int) -> None:
    modulation = Modulation([places(8, 16), places(24)], style_dim)
    with torch.no_grad():
        for p in modulation.parameters():
            p.copy_(torch.randn_like(p))
    style = torch.randn(3, style_dim) if style_dim else None
    blocks = list(modulation(style, 3, torch.tensor([7, 5])))
    assert [len(block) for block in blocks] == [2, 1]
    norms, first = [norm for block in blocks for norm in block], 0
    for i, (norm, c) in enumerate(zip(norms, (8, 16, 24), strict=True)):
        part = slice(first, first + c)
        scale, shift = modulation.weight[part], modulation.bias[part]
        if style is not None:
            s, t = torch.nn.functional.linear(style, modulation.style.weight, modulation.style.bias).chunk(2, 1)
            scale, shift = scale * s[:, part], shift * s[:, part] + t[:, part]
        torch.testing.assert_close(norm.scale, scale.expand(3, c))
        torch.testing.assert_close(norm.shift, shift.expand(3, c))
        torch.testing.assert_close(norm.offset, modulation.offset[part].expand(3, c))
        assert norm.key.tolist() == [7, 5 + (i + 1) * 2**40]
        first += c


def test_what_points_share_is_as_if_concatenated() -> None:
    """A PVConv, a set abstraction and a propagation that are told what all points of a cloud share."""
    torch.manual_seed(0)
    x, shared, skip = torch.randn(2, 12, 5), torch.randn(2, 3), torch.randn(2, 12, 2)
    points = torch.randn(2, 12, 3)
    level = plan_points(points, [LevelGeometry((3,), SetAbstractionGeometry(4, 1.0, 3))]).levels[0]
    apart: list[nn.Module] = [
        PVConv(5, 16, 3, shared_channels=3),
        SetAbstraction(5, 3, (16, 16)),
        FeaturePropagation(5, 3, 2, (16, 16), residual=True),
    ]
    together: list[nn.Module] = [
        PVConv(8, 16, 3),
        SetAbstraction(8, 0, (16, 16)),
        FeaturePropagation(8, 0, 2, (16, 16), residual=True),
    ]
    for a, b in zip(apart, together, strict=True):
        b.load_state_dict(a.state_dict())
        modulation = Modulation([a.norms], 0)  # type: ignore[list-item]
        nn.init.normal_(modulation.offset)
        (norms,) = modulation(None, 2)
        features = x[:, :4] if isinstance(a, FeaturePropagation) else x
        both = torch.cat([features, shared[:, None].expand(-1, features.shape[1], -1)], -1)
        where = level.voxels[3] if isinstance(a, PVConv) else level
        more = (skip,) if isinstance(a, FeaturePropagation) else ()
        torch.testing.assert_close(
            a(features, *more, where, norms, shared), b(both, *more, where, norms), rtol=1e-4, atol=1e-5
        )


def test_a_set_abstraction_is_an_mlp_of_offsets_and_features_and_a_maximum() -> None:
    torch.manual_seed(0)
    x, points = torch.randn(2, 12, 5), torch.randn(2, 12, 3)
    level = plan_points(points, [LevelGeometry((), SetAbstractionGeometry(4, 1.0, 3))]).levels[0]
    abstraction = SetAbstraction(5, 0, (16,))
    (norms,) = Modulation([places(16)], 0)(None, 2)
    whole = torch.cat([level.offsets, group(x, level.neighbors)], -1)
    expected = normalize(whole @ abstraction.mlp.linears[0].weight.T, norms[0]).amax(2)
    torch.testing.assert_close(abstraction(x, level, norms), expected, rtol=1e-4, atol=1e-5)


def test_dropout_depends_on_the_key_alone() -> None:
    torch.manual_seed(0)
    config = replace(quickstart().model.point_prior, num_classes=0)
    config = replace(config, network=replace(config.network, dropout=0.3))  # type: ignore[type-var]
    prior = PointPrior(config, 4, 32).train()
    h, t, z = torch.randn(1, 64, 4), torch.tensor([5.0]), torch.randn(1, 32)
    one, two = torch.tensor([1, 2]), torch.tensor([1, 3])
    torch.manual_seed(1)
    first = prior(h, t, z, key=one)
    torch.manual_seed(2)
    assert torch.equal(prior(h, t, z, key=one), first)
    assert not torch.allclose(prior(h, t, z, key=two), first)
    assert not torch.equal(prior(h, t, z), prior(h, t, z))  # a fresh one each
    with torch.no_grad():
        assert torch.equal(prior.eval()(h, t, z, key=one), prior(h, t, z))  # nothing is dropped out


def test_autocast_casts_once_and_puts_the_weights_back() -> None:
    torch.manual_seed(0)
    config = replace(quickstart().model.point_prior, num_classes=0)
    prior = PointPrior(config, 4, 32)
    before = {name: p.data_ptr() for name, p in prior.named_parameters()}
    h, t, z = torch.randn(1, 64, 4), torch.tensor([5.0]), torch.randn(1, 32)
    exact = prior(h, t, z)
    with torch.autocast("cpu", torch.bfloat16):
        half = prior(h, t, z)
        with pytest.raises(ValueError, match="expected shape"):
            prior(h[..., :3], t, z)
    assert {name: p.data_ptr() for name, p in prior.named_parameters()} == before
    assert half.dtype == torch.float32
    assert 0 < (half - exact).norm() / exact.norm() < 0.05
    half.square().mean().backward()
    got = {name: p.grad for name, p in prior.named_parameters()}
    assert all(g is not None and g.dtype == torch.float32 for g in got.values())
    exact_gradients = torch.autograd.grad(exact.square().mean(), list(prior.parameters()))
    error = sum((a - b).square().sum() for a, b in zip(got.values(), exact_gradients, strict=True))
    assert error < 0.01 * sum(b.square().sum() for b in exact_gradients)


def test_norms_stand_apart_in_state_dictionaries() -> None:
    torch.manual_seed(0)
    one, two = (PointPrior(quickstart().model.point_prior, 4, 32) for _ in range(2))
    state = one.state_dict()
    block = "network.down_convolutions.0.blocks.0"
    assert not any("modulation" in name for name in state)
    assert state[f"{block}.conv2.bias"].shape == state[f"{block}.norm2.weight"].shape == (32,)
    assert state[f"{block}.norm2.style.weight"].shape[0] == 64
    modulation = one.network.modulation
    scales, shifts = modulation.style.weight.chunk(2)
    expected = torch.cat([scales[32:64], shifts[32:64]])  # the second norm that runs
    assert torch.equal(state[f"{block}.norm2.style.weight"], expected)
    assert two.load_state_dict(state) == ([], [])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert copy.deepcopy(one).state_dict().keys() == state.keys()
    del state[f"{block}.norm2.bias"]
    with pytest.raises(RuntimeError, match=r"modulation\.bias"):
        two.load_state_dict(state)


def test_squeeze_excite_takes_vectors_and_grids() -> None:
    gate = SqueezeExcite(16)
    vector = torch.randn(2, 16)
    torch.testing.assert_close(gate(vector[:, None, None, :])[:, 0, 0], gate(vector))


def test_time_embedding() -> None:
    e = sinusoidal_embedding(torch.tensor([0, 7]), 64)
    assert e.shape == (2, 64)
    torch.testing.assert_close(e[0], torch.cat([torch.zeros(32), torch.ones(32)]))
    assert e[1, 31].item() == pytest.approx(torch.sin(torch.tensor(7e-4)).item(), rel=1e-4)


def test_plan_is_shared_only_where_it_fits(clouds: Tensor) -> None:
    sample = SetAbstractionGeometry(32, 0.5, 8)
    plan = plan_points(clouds, (LevelGeometry((8,), sample), LevelGeometry((4,), replace(sample, centers=8))))
    assert [level.points.shape[1] for level in plan.levels] == [N, 32, 8]
    assert plan.serves((LevelGeometry((8,), sample),))
    assert not plan.serves((LevelGeometry((16,), sample),))
    assert torch.equal(plan.levels[1].points[:, 0], clouds[:, 0])  # furthest point sampling starts at index 0


def test_unet_needs_as_many_levels_up_as_down() -> None:
    down = DownLevel(Convolutions(1, 8, 4), SetAbstractionGeometry(8, 1.0, 4), (8,))
    with pytest.raises(ValueError, match="^up: expected one level for each of the 1 of down, got 2$"):
        UNetConfig(down=(down,), up=(UpLevel((8,), Convolutions(0)),) * 2)


def test_moments_change_nothing_before_they_are_trained(clouds: Tensor) -> None:
    level = DownLevel(Convolutions(1, 16, 4), SetAbstractionGeometry(32, 0.8, 8), (16,))
    config = UNetConfig((level,), (UpLevel((24, 16), Convolutions(1, 16, 4)),), head_width=16)
    without, told = (UNet(c, 3, 5, style_dim=7).eval() for c in (config, replace(config, moments=0.8)))
    missing, unknown = told.load_state_dict(without.state_dict(), strict=False)
    assert missing and all(name.startswith("moments.") for name in missing) and not unknown
    style = torch.randn(2, 7)
    out = without(clouds, style)
    assert torch.equal(out, told(clouds, style))
    assert told.moments is not None
    torch.nn.init.normal_(told.moments.outputs[0].weight)
    first = told(clouds, style)
    assert not torch.allclose(out, first)
    torch.nn.init.normal_(told.moments.outputs[1].weight)
    assert not torch.allclose(first, told(clouds, style))


@pytest.mark.parametrize("skip", ["input", "convolved"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_unet_variants(skip: str, residual: bool, attention: str, clouds: Tensor) -> None:
    """Two levels, so that a skip meets the time embedding; residual connections change the function."""
    level = SetAbstractionGeometry(32, 0.8, 8)
    config = UNetConfig(
        down=(
            DownLevel(Convolutions(1, 16, 4), level, (16,)),
            DownLevel(Convolutions(1, 16, 4), replace(level, centers=8), (16, 16)),
        ),
        up=(UpLevel((16, 16), Convolutions(0)), UpLevel((16, 16), Convolutions(1, 16, 4))),
        head_width=16,
        skip=skip,  # type: ignore[arg-type]
        residual=residual,
        attention=attention,  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    unet = UNet(config, 3, 5, style_dim=7, time_dim=8).eval()
    style, t = torch.randn(2, 7), torch.tensor([1, 500])
    out = unet(clouds, style, t)
    assert out.shape == (2, N, 5)
    out.square().mean().backward()
    for name, p in unet.named_parameters():
        assert p.grad is not None, name
        # Two units of a squeeze may both be dead at the start; anything else without a gradient is cut off.
        assert p.grad.abs().max() > 0 or "squeeze_excite" in name, name
    if residual:
        plain = UNet(replace(config, residual=False), 3, 5, style_dim=7, time_dim=8).eval()
        plain.load_state_dict(unet.state_dict())
        assert not torch.allclose(out, plain(clouds, style, t))


def test_occupancy_loss_is_that_of_the_occupied_voxels(clouds: Tensor) -> None:
    from lion_triton.kernels import voxel_coords
    from lion_triton.training.objectives import occupancy_loss

    occupied = torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    for b, cloud in enumerate(voxel_coords(clouds, 4).round().long()):
        occupied[b, cloud[:, 0], cloud[:, 1], cloud[:, 2]] = True
    certain = torch.where(occupied, 30.0, -30.0).flatten(1)
    assert occupancy_loss(certain, clouds, 4).max() < 1e-3
    assert occupancy_loss(-certain, clouds, 4).min() > 1000
    unsure = occupancy_loss(torch.zeros(2, 64), clouds, 4)
    torch.testing.assert_close(unsure, torch.full((2,), 64 * torch.log(torch.tensor(2.0)).item()))
