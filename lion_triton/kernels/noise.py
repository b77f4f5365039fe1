"""Counter-based normal noise: Philox 4x32-10 and Box-Muller, the same in PyTorch and in Triton.

Element ``i`` of a noise tensor depends only on ``i`` and the key, so a kernel can make the noise where it
is used and make it again in the backward pass; it is never stored.

A key is (seed, offset, first), or (seed, offset) where ``first`` is 0: the number of the tensor's first row, a sample,
in a larger batch. Elements are counted from the start of that batch, so that processes that each hold a slice of it
make the very noise that one process makes for the whole.

    x0, x1, x2, x3 = philox(counter = (c mod 2^32, c // 2^32 + stream * 2^24, lo(offset), hi(offset)),
                            key = (lo(seed), hi(seed)))          with c = i // 4
    noise[4c : 4c + 4] = r(x0) cos(x1), r(x0) sin(x1), r(x2) cos(x3), r(x2) sin(x3)

Radius: ``u = fl32(x) 2^-32 + 2^-33`` lies in [2^-33, 1], ``r = sqrt(-2 log u)`` in [0, 6.77].
Angle: ``2 pi x / 2^32``, x / 2^32 in [0, 1). With ``y = x + 2^29 mod 2^32`` the top two bits of y are the
quadrant and the rest, less 2^29, is a signed fraction f in [-1/2, 1/2) of a right angle: an exact reduction.
``cos(pi/2 f)`` and ``sin(pi/2 f)`` are minimax polynomials on that interval (absolute error below 1e-7 in
float32), then swapped and negated by quadrant.

Both implementations do this arithmetic in float32 and in this order, so that they differ only by the
rounding of log, sqrt and fused multiply-adds: below 1e-6, but in the far tail.

Cost per element: 4 bytes written, 44 instructions per lane (sm_90 machine code).

Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); Box and Muller (1958).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_integer, use_triton
from lion_triton.kernels._op import op
from lion_triton.kernels._triton import cdiv, launch, tl, triton

Key = Int64[Tensor, " 2"] | Int64[Tensor, " 3"]

_U32 = 0xFFFFFFFF
_BLOCK = 256  # counters per program


def philox_reference(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 on uint32 values held in int64 tensors that broadcast together."""
    for _ in range(10):
        # int64 products wrap, which keeps all 64 bits. c1 and c3 need no mask of their own, nor the shift
        # to be a logical one: whatever stands above bit 31 is masked once, after the xors.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((p1 >> 32) ^ c1 ^ k0) & _U32, p1
        c2, c3 = ((p0 >> 32) ^ c3 ^ k1) & _U32, p0
        k0, k1 = (k0 + 0x9E3779B9) & _U32, (k1 + 0xBB67AE85) & _U32
    return c0, c1 & _U32, c2, c3 & _U32


def box_muller_reference(radius: Tensor, angle: Tensor) -> Tensor:
    """Two float32 normals, last dimension (cos, sin), of uint32 values held in int64 tensors."""
    r = (-2.0 * (radius.float() * 2.0**-32 + 2.0**-33).log()).sqrt()
    y = angle + 0x20000000
    f = ((y & 0x3FFFFFFF) - 0x20000000).float() * 2.0**-30
    z = f * f
    c = (((0.00089720911 * z - 0.0208571069) * z + 0.253668815) * z - 1.23370051) * z + 1.0
    s = (((-0.00460170675 * z + 0.0796800554) * z - 0.64596349) * z + 1.57079637) * f
    quadrant = y >> 30  # 4 stands for 0
    odd = (quadrant & 1).bool()
    # Quadrants 1 and 2 have a negative cosine, 2 and 3 a negative sine.
    cos = torch.where(odd, s, c) * (1 - ((quadrant + 1) & 2))
    sin = torch.where(odd, c, s) * (1 - (quadrant & 2))
    return torch.stack((r * cos, r * sin), dim=-1)


def philox_words_reference(key: Tensor, counters: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four uint32 words of each int64 counter, in int64 tensors."""
    seed, offset = key[0], key[1]
    return philox_reference(
        counters & _U32,
        (counters >> 32) + (stream << 24),
        offset & _U32,
        (offset >> 32) & _U32,
        seed & _U32,
        (seed >> 32) & _U32,
    )


def noise_block_reference(key: Tensor, counters: Tensor, stream: int) -> Tensor:
    """The four normals of each int64 counter: (n,) to (n, 4)."""
    x0, x1, x2, x3 = philox_words_reference(key, counters, stream)
    return box_muller_reference(torch.stack((x0, x2), dim=-1), torch.stack((x1, x3), dim=-1)).flatten(1)


def counted_reference(shape: Sequence[int], key: Tensor, size: int, block: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor of ``shape`` made by ``block``, which gives ``size`` elements for each counter: (n,) to (n, size)."""
    numel, per_row = prod(shape), prod(shape[1:])
    start = full_key(key)[2] * per_row  # elements of the batch before these
    counters = start // size + torch.arange(-(-numel // size) + (per_row % size > 0), device=key.device)
    elements = block(counters).flatten()
    if per_row % size:  # they may start inside a counter
        elements = elements[start % size + torch.arange(numel, device=key.device)]
    return elements[:numel].view(tuple(shape))


def normal_noise_reference(shape: Sequence[int], key: Tensor, stream: int = 0) -> Tensor:
    """Specification of ``normal_noise``; ``stream`` (0 to 255) picks one of the key's independent draws."""
    return counted_reference(shape, key, 4, lambda counters: noise_block_reference(key, counters, stream))


def check_key(key: Tensor, like: Tensor | None = None) -> None:
    """Raise ``ValueError`` unless ``key`` is a noise key (on the device of ``like``)."""
    if not isinstance(key, Tensor):
        raise ValueError(f"key: expected an int64 tensor (seed, offset), got {type(key).__name__}")
    if key.dtype != torch.int64 or key.shape not in ((2,), (3,)):
        raise ValueError(
            f"key: expected an int64 tensor of shape (2,) or (3,), got {key.dtype} of shape {tuple(key.shape)}"
        )
    if like is not None and key.device != like.device:
        raise ValueError(f"key: expected a key on {like.device}, got one on {key.device}")


def full_key(key: Key) -> Int64[Tensor, " 3"]:
    """The key with its third number, contiguous: what kernels read."""
    return key.contiguous() if len(key) == 3 else torch.cat([key, key.new_zeros(1)])


def later_key(key: Key, offset: int | Int64[Tensor, ""]) -> Key:
    """The key whose offset is ``offset`` further on."""
    later = key.clone()
    later[1].add_(offset)
    return later


def key_of_parts(key: Key, parts: int) -> Int64[Tensor, " 3"]:
    """The key for rows of which each sample has ``parts``, one after the other."""
    key = full_key(key).clone()
    key[2].mul_(parts)
    return key


def later_keys(key: Key, offsets: Int64[Tensor, " n"]) -> Int64[Tensor, "n K"]:
    """A key for each of ``offsets``, so much further on."""
    later = key.repeat(len(offsets), 1)
    later[:, 1].add_(offsets)
    return later


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Philox 4x32-10 on uint32 blocks (or scalars: they stay scalar until they meet a block)."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)  # wraps, and may in debug mode too
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def box_muller(radius, angle):  # type: ignore[no-untyped-def]
    """Two float32 normals of two uint32 blocks."""
    r = tl.sqrt(-2.0 * tl.log(radius.to(tl.float32) * 2.0**-32 + 2.0**-33))
    y = tl.add(angle, 0x20000000, sanitize_overflow=False)
    f = ((y & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32) * 2.0**-30
    z = f * f
    c = (((0.00089720911 * z - 0.0208571069) * z + 0.253668815) * z - 1.23370051) * z + 1.0
    s = (((-0.00460170675 * z + 0.0796800554) * z - 0.64596349) * z + 1.57079637) * f
    quadrant = y >> 30
    odd = (quadrant & 1) != 0
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    return r * tl.where(((quadrant + 1) & 2) != 0, -cos, cos), r * tl.where((quadrant & 2) != 0, -sin, sin)


@triton.jit
def noise_block(key_ptr, first, STREAM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The (4 * BLOCK,) noise of elements 4 * first and up; ``first`` is an int64 scalar."""
    seed = tl.load(key_ptr)
    offset = tl.load(key_ptr + 1)
    c = first + tl.arange(0, BLOCK)
    x0, x1, x2, x3 = philox(
        c.to(tl.uint32),
        (c >> 32).to(tl.uint32) + (STREAM << 24),
        offset.to(tl.uint32),
        (offset >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    n0, n1 = box_muller(x0, x1)
    n2, n3 = box_muller(x2, x3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def first_sample(key_ptr):  # type: ignore[no-untyped-def]
    """The key's third number."""
    return tl.load(key_ptr + 2)


@triton.jit
def _normal_noise_kernel(key_ptr, out_ptr, numel, per_row, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = first_sample(key_ptr) * per_row
    first = start // 4 + tl.program_id(0).to(tl.int64) * BLOCK
    i = first * 4 - start + tl.arange(0, 4 * BLOCK)
    tl.store(out_ptr + i, noise_block(key_ptr, first, 0, BLOCK), mask=(i >= 0) & (i < numel))


def _empty_noise(shape: list[int], key: Tensor) -> Tensor:
    return key.new_empty(shape, dtype=torch.float32)


@op(fake=_empty_noise)
def _normal_noise_op(shape: list[int], key: Tensor) -> Tensor:
    out = _empty_noise(shape, key)
    numel, per_row = out.numel(), prod(shape[1:])
    # Rows that start inside a counter may reach three elements further.
    grid = (cdiv(numel + (3 if numel and per_row % 4 else 0), 4 * _BLOCK),)
    launch(_normal_noise_kernel, grid, full_key(key), out, numel, per_row, BLOCK=_BLOCK, num_warps=4)
    return out


def normal_noise(shape: Sequence[int], key: Key, *, impl: Impl = "auto") -> Float32[Tensor, " ..."]:
    """Standard normal noise that is a function of the key alone: the very noise the fused ops use.

    Args:
        shape: shape of the result; element i, in row-major order, does not depend on it.
        key: int64 tensor (seed, offset) on the device where the noise is wanted. It is never read on the
            host, so a captured CUDA graph draws new noise when the key's contents change. Two keys that
            differ in the seed or the offset give independent noise. A third number >= 0 says how many rows of a
            larger batch, of the same shape behind the first dimension, come before these: (seed, offset, n) gives
            what rows n and up of that batch get from (seed, offset).
        impl: "auto" (Triton on a GPU, the reference elsewhere), "triton" or "reference".

    Returns:
        float32 tensor of ``shape`` without gradient. Deterministic: same key, same bits.

    Raises:
        ValueError: a shape that is not a sequence of sizes >= 0, or a key that is not an int64 tensor of shape (2,)
            or (3,).
    """
    if not isinstance(shape, Sequence):
        raise ValueError(f"shape: expected a sequence of sizes, got {type(shape).__name__}")
    sizes = [check_integer("shape", size, least=0) for size in shape]
    check_key(key)
    if not use_triton(impl, key):
        return normal_noise_reference(sizes, key)
    return _normal_noise_op(sizes, key)


def new_key(device: torch.device, generator: torch.Generator | None = None) -> Int64[Tensor, " 3"]:
    """A fresh noise key (seed, 0, 0) on ``device``, drawn from ``generator`` (None: PyTorch's own on the CPU)."""
    source = None if generator is None else generator.device
    seed = torch.randint(2**62, (1,), generator=generator, device=source)
    return torch.cat([seed, seed.new_zeros(2)]).to(device)
