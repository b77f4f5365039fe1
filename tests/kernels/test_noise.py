from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import scipy.stats
import torch
from torch import Tensor

from lion_triton.kernels import _triton
from lion_triton.kernels._checks import Impl
from lion_triton.kernels._triton import tl, triton
from lion_triton.kernels.noise import (
    box_muller,
    box_muller_reference,
    noise_block,
    noise_block_reference,
    normal_noise,
    normal_noise_reference,
    philox,
    philox_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = pytest.mark.parametrize("impl", ["reference", "triton"])


def assert_close(noise: Tensor, reference: Tensor) -> None:
    """Equal but for log, sqrt and fused multiply-adds that a GPU may round otherwise."""
    torch.testing.assert_close(noise, reference, rtol=5e-7, atol=5e-7)


def make_key(seed: int = 20221015, offset: int = 3) -> Tensor:
    return torch.tensor([seed, offset], device=DEVICE)


@triton.jit
def _philox_kernel(in_ptr, out_ptr):  # type: ignore[no-untyped-def]
    c0 = tl.load(in_ptr + tl.arange(0, 1)).to(tl.uint32)
    c1 = tl.load(in_ptr + 1).to(tl.uint32)
    c2 = tl.load(in_ptr + 2).to(tl.uint32)
    c3 = tl.load(in_ptr + 3).to(tl.uint32)
    k0 = tl.load(in_ptr + 4).to(tl.uint32)
    k1 = tl.load(in_ptr + 5).to(tl.uint32)
    x0, x1, x2, x3 = philox(c0, c1, c2, c3, k0, k1)
    i = tl.arange(0, 1)
    tl.store(out_ptr + i, x0.to(tl.int64))
    tl.store(out_ptr + 1 + i, x1.to(tl.int64))
    tl.store(out_ptr + 2 + i, x2.to(tl.int64))
    tl.store(out_ptr + 3 + i, x3.to(tl.int64))


@triton.jit
def _box_muller_kernel(radius_ptr, angle_ptr, cos_ptr, sin_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    cos, sin = box_muller(tl.load(radius_ptr + i).to(tl.uint32), tl.load(angle_ptr + i).to(tl.uint32))
    tl.store(cos_ptr + i, cos)
    tl.store(sin_ptr + i, sin)


@triton.jit
def _noise_block_kernel(key_ptr, first_ptr, out_ptr, STREAM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    noise = noise_block(key_ptr, tl.load(first_ptr), STREAM, BLOCK)
    tl.store(out_ptr + tl.arange(0, 4 * BLOCK), noise)


def box_muller_of(impl: Impl, radius: Tensor, angle: Tensor) -> Tensor:
    if impl == "reference":
        return box_muller_reference(radius, angle)
    cos, sin = torch.empty((2, len(radius)), device=DEVICE)
    _box_muller_kernel[(1,)](radius, angle, cos, sin, BLOCK=len(radius))
    return torch.stack((cos, sin), dim=-1)


# The vectors that Salmon et al. publish with Random123 (kat_vectors, philox4x32 10): counter, key, output.
KNOWN_ANSWERS = {
    "zeros": ("00000000 00000000 00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}


@IMPLS
@pytest.mark.parametrize("case", KNOWN_ANSWERS)
def test_philox_known_answers(case: str, impl: Impl) -> None:
    words, expected = ([int(word, 16) for word in row.split()] for row in KNOWN_ANSWERS[case])
    counter_and_key = torch.tensor(words, device=DEVICE)
    if impl == "reference":
        out = torch.stack(philox_reference(*counter_and_key))
    else:
        out = torch.empty(4, dtype=torch.int64, device=DEVICE)
        _philox_kernel[(1,)](counter_and_key, out)
    assert out.tolist() == expected


@IMPLS
def test_box_muller_is_exact_at_every_quadrant_and_end(impl: Impl) -> None:
    corners = [(k * 2**29 + d) % 2**32 for k in range(8) for d in (-1, 0, 1)]
    angle = torch.cat((torch.tensor(corners), torch.randint(2**32, (1000,))))
    radius = torch.full_like(angle, round(math.exp(-0.5) * 2**32))  # r = 1
    out = box_muller_of(impl, radius.to(DEVICE)[:1024], angle.to(DEVICE)[:1024]).double().cpu()
    turn = 2 * math.pi * angle.double()[:1024] / 2**32
    assert (out - torch.stack((turn.cos(), turn.sin()), dim=-1)).abs().max() < 2.5e-7

    radius = torch.tensor([0, 1, 2**31, 2**32 - 1], device=DEVICE)
    out = box_muller_of(impl, radius, torch.zeros_like(radius))[:, 0].cpu()
    u = torch.tensor([2.0**-33, 1.5 * 2**-32, 0.5 + 2**-33, 1.0], dtype=torch.float64)
    assert_close(out, (-2 * u.log()).sqrt().float())


@pytest.mark.parametrize("numel", [1, 2, 3, 4, 5, 1023, 1024, 1025, 4099])
def test_kernel_equals_reference(numel: int) -> None:
    key = make_key(-(2**62) + 12345, 7 << 40)
    noise = normal_noise((numel,), key, impl="triton")
    assert_close(noise, normal_noise_reference((numel,), key))
    assert torch.equal(noise, normal_noise((numel,), key, impl="triton"))


@pytest.mark.parametrize("first", [0, 2**32 - 8, 2**40 + 1])
@pytest.mark.parametrize("stream", [0, 1])
def test_kernel_equals_reference_at_large_counters(first: int, stream: int) -> None:
    key, start = make_key(), torch.tensor([first], device=DEVICE)
    out = torch.empty((16, 4), device=DEVICE)
    _noise_block_kernel[(1,)](key, start, out, STREAM=stream, BLOCK=16)
    reference = noise_block_reference(key, start + torch.arange(16, device=DEVICE), stream)
    assert_close(out, reference)


def test_large_counters_do_not_repeat() -> None:
    blocks = [
        noise_block_reference(make_key(), torch.arange(8, device=DEVICE) + first, stream)
        for first in (0, 2**32, 2**33)
        for stream in (0, 1)
    ]
    assert len(torch.cat(blocks).unique()) == 6 * 32


@IMPLS
def test_elements_do_not_depend_on_the_shape(impl: Impl) -> None:
    noise = normal_noise((30,), make_key(), impl=impl)
    assert torch.equal(normal_noise((2, 3, 5), make_key(), impl=impl), noise.view(2, 3, 5))
    assert torch.equal(normal_noise([11], make_key(), impl=impl), noise[:11])
    assert torch.equal(normal_noise((), make_key(), impl=impl), noise[0])
    assert normal_noise((3, 0), make_key(), impl=impl).shape == (3, 0)


def test_is_standard_normal() -> None:
    noise = normal_noise((400_001,), make_key()).double().cpu()
    n = len(noise)
    # Five standard errors each: chance failures are one in millions, and the key is fixed.
    assert abs(noise.mean()) < 5 / n**0.5
    assert abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs(scipy.stats.skew(noise)) < 5 * (6 / n) ** 0.5
    assert abs(scipy.stats.kurtosis(noise)) < 5 * (24 / n) ** 0.5
    assert scipy.stats.kstest(noise, "norm").pvalue > 1e-3
    for component in range(4):
        assert scipy.stats.kstest(noise[component::4], "norm").pvalue > 1e-3


def test_keys_streams_and_elements_are_independent() -> None:
    n = 100_000
    keys = [(1, 0), (2, 0), (1 + 2**32, 0), (1, 1), (1, 2**32), (1, 2)]
    rows = [normal_noise_reference((n,), make_key(*key)) for key in keys]
    rows += [normal_noise_reference((n,), make_key(1, 0), stream=stream) for stream in (1, 2)]
    rows += [rows[0].roll(shift) for shift in (1, 2, 3, 4)]
    x = torch.stack(rows).double()
    for moment in (x, x.square()):  # squares too: cos and sin of one angle are uncorrelated anyhow
        correlation = torch.corrcoef(moment) - torch.eye(len(x), device=DEVICE, dtype=x.dtype)
        assert correlation.abs().max() < 5 / n**0.5


def test_new_noise_when_the_key_changes_in_place() -> None:
    key = make_key()
    compiled = torch.compile(lambda key: normal_noise((9,), key, impl="triton"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(key), normal_noise((9,), key, impl="triton"))
    before = compiled(key)
    key[1] += 1
    assert not torch.isclose(compiled(key), before).any()


def test_reference_compiles() -> None:
    # aot_eager: inductor would spend its time in the C++ compiler.
    compiled = torch.compile(normal_noise_reference, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled((2, 5), make_key()), normal_noise_reference((2, 5), make_key()))


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.lion_triton.normal_noise.default, ([2, 3], make_key()))


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_cuda_graph_draws_new_noise() -> None:
    key = make_key()
    normal_noise((1000,), key)  # compile before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noise = normal_noise((1000,), key)
    key[1] += 5
    graph.replay()
    assert_close(noise, normal_noise_reference((1000,), make_key(offset=8)))


@pytest.mark.parametrize(
    ("shape", "key", "message"),
    [
        ((2, -1), torch.tensor([0, 0]), "shape: expected an integer >= 0, got -1"),
        ((2,), 7, r"key: expected an int64 tensor \(seed, offset\), got int"),
        ((2,), torch.tensor([0.0, 0.0]), r"key: .* got torch.float32 of shape \(2,\)"),
        ((2,), torch.tensor([1, 2, 3, 4]), r"key: .* of shape \(2,\) or \(3,\), got torch.int64 of shape \(4,\)"),
    ],
)
def test_bad_input(shape: tuple[int, ...], key: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normal_noise(shape, key)


def test_kernels_without_triton_raise_when_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("without_triton", _triton.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    @module.triton.jit
    def kernel() -> None: ...

    with pytest.raises(RuntimeError, match="needs Triton"):
        kernel[(1,)]()
