from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lion_triton.kernels import diffusion, losses
from lion_triton.kernels._checks import Impl, interpreting
from lion_triton.kernels.diffusion import ancestral_step, posterior_q_sample, q_sample
from lion_triton.kernels.losses import gaussian_kl, noise_mse
from lion_triton.kernels.noise import normal_noise, normal_noise_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("impl", ["reference", "triton"])


class Op(NamedTuple):
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: str  # one letter each: x like a batch, c one number per cloud, k the key
    constants: str = ""  # positions of the inputs that the public function gives no gradient


OPS = {
    "q_sample": Op(q_sample, diffusion.q_sample_reference, "xcck"),
    "posterior_q_sample": Op(posterior_q_sample, diffusion.posterior_q_sample_reference, "xxcck"),
    "noise_mse": Op(noise_mse, losses.noise_mse_reference, "xkc"),
    "noise_mse-unweighted": Op(noise_mse, losses.noise_mse_reference, "xk"),
    "ancestral_step": Op(ancestral_step, diffusion.ancestral_step_reference, "xxccck", constants="234"),
    "gaussian_kl": Op(gaussian_kl, losses.gaussian_kl_reference, "xx"),
}
EVERY_OP = pytest.mark.parametrize("op", OPS.values(), ids=OPS)

# One element per cloud, less than a counter of four, clouds that straddle a block's edge, several blocks.
SHAPES = [(1, 1), (3,), (2, 3), (3, 2, 4), (2, 127), (2, 1025), (1, 512, 4)]


def make_key(seed: int = 7, offset: int = 1) -> Tensor:
    return torch.tensor([seed, offset], device=DEVICE)


def make_inputs(op: Op, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = []
    for kind in op.inputs:
        if kind == "k":
            inputs.append(make_key())
        elif kind == "c":
            inputs.append(torch.rand(shape[0], generator=generator).to(DEVICE))
        else:
            inputs.append((0.5 * torch.randn(shape, generator=generator)).to(DEVICE, dtype))
    return inputs


def run(op: Op, inputs: list[Tensor], impl: Impl) -> list[Tensor]:
    """The output, then the gradient of every differentiable input for one random cotangent."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    out = op.function(*inputs, impl=impl)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    wanted = [x for i, x in enumerate(inputs) if x.requires_grad and str(i) not in op.constants]
    return [out.detach(), *torch.autograd.grad(out, wanted, cotangent)]


def assert_as_good_as_reference(op: Op, inputs: list[Tensor]) -> None:
    """Output and gradients at most twice as far from float64 as the reference of the same dtype."""
    exact = run(op, [x.double() if x.is_floating_point() else x for x in inputs], "reference")
    ours, reference = run(op, inputs, "triton"), run(op, inputs, "reference")
    for x, y, z in zip(ours, reference, exact, strict=True):
        assert x.shape == y.shape == z.shape
        assert x.dtype == y.dtype
        # The second term is for a reference that is right by chance, as it is for one element.
        allowed = 2 * (y - z).abs().max() + 1e-6 * z.abs().max()
        if not interpreting():
            # A GPU's fast functions: noise that differs in the last bits from that of both references, and in a cloud's
            # sums so many times.
            terms = inputs[0][0].numel() if z.ndim == 1 else 1
            allowed += 1e-6 * z.abs().max() + 1e-6 * terms**0.5
        if interpreting() and x.dtype == torch.bfloat16:
            # The interpreter truncates where a GPU rounds: a whole unit in the last place, not half.
            allowed = 2.0**-7 * z.abs().max()
        assert (x - z).abs().max() <= allowed


@EVERY_OP
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "B" + "x".join(map(str, shape)))
def test_output_and_gradients(op: Op, shape: tuple[int, ...]) -> None:
    assert_as_good_as_reference(op, make_inputs(op, shape))


@EVERY_OP
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(op: Op, dtype: torch.dtype) -> None:
    inputs = make_inputs(op, (2, 31, 3), dtype)
    if dtype != torch.float64:
        assert_as_good_as_reference(op, inputs)
        return
    for x, y in zip(run(op, inputs, "triton"), run(op, inputs, "reference"), strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)  # the kernels compute in float32


@EVERY_OP
def test_non_contiguous(op: Op) -> None:
    inputs = [
        x.transpose(1, 2) if kind == "x" else x.repeat_interleave(2)[::2]
        for kind, x in zip(op.inputs, make_inputs(op, (2, 3, 37)), strict=True)
    ]
    assert_as_good_as_reference(op, inputs)


@pytest.mark.parametrize("op", [OPS["posterior_q_sample"], OPS["ancestral_step"], OPS["gaussian_kl"]])
def test_mixed_dtypes(op: Op) -> None:
    inputs = make_inputs(op, (2, 31, 3))
    inputs[1] = inputs[1].bfloat16()
    assert_as_good_as_reference(op, inputs)


@EVERY_OP
def test_repeats_bit_for_bit(op: Op) -> None:
    inputs = make_inputs(op, (1, 1025))
    for x, y in zip(run(op, inputs, "triton"), run(op, inputs, "triton"), strict=True):
        assert torch.equal(x, y)


@EVERY_OP
def test_reference_gradients(op: Op) -> None:
    inputs = [x.double().requires_grad_() if x.is_floating_point() else x for x in make_inputs(op, (2, 3))]
    assert torch.autograd.gradcheck(op.reference, inputs)


@BOTH
def test_only_some_gradients(impl: Impl) -> None:
    x_0, alpha, sigma, key = make_inputs(OPS["q_sample"], (2, 9))
    q_sample(x_0.requires_grad_(), alpha, sigma, key, impl=impl).sum().backward()
    torch.testing.assert_close(x_0.grad, alpha[:, None].expand(2, 9))
    assert alpha.grad is None

    q_sample(x_0.detach(), alpha, sigma.requires_grad_(), key, impl=impl).sum().backward()
    torch.testing.assert_close(sigma.grad, normal_noise_reference((2, 9), key).sum(1))


@BOTH
def test_all_ops_use_normal_noise(impl: Impl) -> None:
    shape, key = (3, 7), make_key()
    noise = normal_noise(shape, key, impl=impl)
    zeros, zero, one = torch.zeros(shape, device=DEVICE), torch.zeros(3).to(DEVICE), torch.ones(3).to(DEVICE)
    torch.testing.assert_close(q_sample(zeros, one, one, key, impl=impl), noise)
    torch.testing.assert_close(ancestral_step(zeros, zeros, one, one, one, key, impl=impl), noise)
    torch.testing.assert_close(posterior_q_sample(zeros, zeros, zero, one, key, impl=impl), noise)
    assert noise_mse(noise, key, impl=impl).max() < 1e-12
    torch.testing.assert_close(noise_mse(zeros, key, 3 * one, impl=impl), 3 * noise.square().mean(1))


@BOTH
def test_posterior_noise_is_independent_of_the_diffusion_noise(impl: Impl) -> None:
    shape, key = (1, 4000), make_key()
    zeros, zero, one = torch.zeros(shape, device=DEVICE), torch.zeros(1).to(DEVICE), torch.ones(1).to(DEVICE)
    latent = posterior_q_sample(zeros, zeros, one, zero, key, impl=impl)
    torch.testing.assert_close(latent, normal_noise_reference(shape, key, stream=1))
    both = torch.cat((latent, normal_noise(shape, key)))
    assert torch.corrcoef(both)[0, 1].abs() < 5 / 4000**0.5


@BOTH
def test_posterior_q_sample_without_spread_is_q_sample(impl: Impl) -> None:
    mu, alpha, sigma, key = make_inputs(OPS["q_sample"], (2, 5, 3))
    log_sigma = torch.full_like(mu, -float("inf"))
    x_t = posterior_q_sample(mu, log_sigma, alpha, sigma, key, impl=impl)
    torch.testing.assert_close(x_t, q_sample(mu, alpha, sigma, key, impl=impl))


@BOTH
def test_gaussian_kl_is_that_of_torch(impl: Impl) -> None:
    mu, log_sigma = make_inputs(OPS["gaussian_kl"], (3, 11))
    posterior = torch.distributions.Normal(mu, log_sigma.exp())
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    expected = torch.distributions.kl_divergence(posterior, prior).sum(1)
    torch.testing.assert_close(gaussian_kl(mu, log_sigma, impl=impl), expected)
    zeros = torch.zeros((2, 3), device=DEVICE)
    assert torch.equal(gaussian_kl(zeros, zeros, impl=impl), torch.zeros(2, device=DEVICE))


@BOTH
def test_ancestral_step_coefficients_are_constants(impl: Impl) -> None:
    x_t, eps, coef_x, coef_eps, rho, key = make_inputs(OPS["ancestral_step"], (2, 5))
    for coefficient in (coef_x, coef_eps, rho):
        coefficient.requires_grad_()
    assert not ancestral_step(x_t, eps, coef_x, coef_eps, rho, key, impl=impl).requires_grad


@EVERY_OP
def test_compiles_whole(op: Op) -> None:
    inputs = make_inputs(op, (2, 2, 3))
    inputs[0].requires_grad_()
    # aot_eager: inductor would spend its time in the C++ compiler.
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
    x, y = compiled(*inputs, impl="triton"), op.function(*inputs, impl="triton")
    assert torch.equal(x, y)
    dx, dy = (torch.autograd.grad(out.square().sum(), inputs[0])[0] for out in (x, y))
    assert torch.equal(dx, dy)


def opcheck_cases() -> dict[str, tuple[Any, ...]]:
    x, alpha, sigma, key = make_inputs(OPS["q_sample"], (2, 3))
    return {
        "q_sample": (x, None, alpha, sigma, key),
        "q_sample-posterior": (x, x.bfloat16(), alpha, sigma, key),
        "q_sample_bwd": (x, x, None, alpha, key, False),
        "q_sample_bwd-posterior": (x, x, x.bfloat16(), alpha, key, True),
        "noise_mse": (x, key),
        "noise_mse_bwd": (alpha, x, key),
        "ancestral_step": (x, x, alpha, sigma, sigma, key),
        "ancestral_step_bwd": (x, alpha, sigma, torch.bfloat16),
        "gaussian_kl": (x, x),
        "gaussian_kl_bwd": (alpha, x, x),
    }


@pytest.mark.parametrize("name", opcheck_cases())
def test_opcheck(name: str) -> None:
    name, args = name.partition("-")[0], opcheck_cases()[name]
    op = getattr(torch.ops.lion_triton, name).default
    if name.endswith("_bwd"):  # never differentiated
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
        return
    args = tuple(a.requires_grad_(a.is_floating_point()) if isinstance(a, Tensor) else a for a in args)
    torch.library.opcheck(op, args)


x, c, k = torch.ones(2, 3), torch.ones(2), torch.tensor([0, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: q_sample(x.int(), c, c, k), "x_0: expected float32, .* got torch.int32"),
        (
            lambda: q_sample(x[:, :0], c, c, k),
            r"x_0: expected shape \(B, ...\) with at least one element .* got \(2, 0\)",
        ),
        (lambda: q_sample(x[0, 0], c, c, k), r"x_0: expected shape \(B, ...\) .* got \(\)"),
        (lambda: noise_mse([1.0], k), "pred: expected a tensor, got list"),  # type: ignore[arg-type]
        (lambda: q_sample(x, c[:1], c, k), r"alpha: .* shape \(2,\), got \(1,\)"),
        (lambda: q_sample(x, c, x, k), r"sigma: .* shape \(2,\), got \(2, 3\)"),
        (lambda: q_sample(x, c, c.to("meta"), k), "sigma: expected the device of x_0 .* got meta"),
        (lambda: q_sample(x, c, c, k.int()), r"key: .* got torch.int32 of shape \(2,\)"),
        (lambda: q_sample(x, c, c, k.to("meta")), "key: expected a key on cpu, got one on meta"),
        (lambda: q_sample(x, c, c, k, impl="cuda"), "impl: expected .* got 'cuda'"),  # type: ignore[arg-type]
        (lambda: posterior_q_sample(x, x[:, :1], c, c, k), r"log_sigma: .* mu \(2, 3\), got \(2, 1\)"),
        (lambda: posterior_q_sample(x, x.to("meta"), c, c, k), "log_sigma: .* mu .cpu., got meta"),
        (lambda: posterior_q_sample(x, x, 1.0, c, k), "alpha: expected a tensor, got float"),  # type: ignore[arg-type]
        (lambda: noise_mse(x, k, c[:1]), r"weight: .* shape \(2,\), got \(1,\)"),
        (lambda: noise_mse(x, k[:1]), r"key: .* of shape \(1,\)"),
        (lambda: noise_mse(x.long(), k), "pred: .* got torch.int64"),
        (lambda: ancestral_step(x, x[:1], c, c, c, k), r"eps: .* x_t \(2, 3\), got \(1, 3\)"),
        (lambda: ancestral_step(x, x, c, c, c.int(), k), "rho: .* got torch.int32"),
        (lambda: gaussian_kl(x, x.int()), "log_sigma: .* got torch.int32"),
        (lambda: gaussian_kl(x, x[:, 1:]), r"log_sigma: .* mu \(2, 3\), got \(2, 2\)"),
    ],
)
def test_bad_input(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
