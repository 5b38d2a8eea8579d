"""Tensors of more than 2^31 elements: a kernel that counts in 32 bits loses their last rows.

One launch each of the memory-bound ops, in bf16, on two images that lie in one tensor: the last
rows must be what the reference gives for these rows alone. On a small grid the reference takes the
place of the kernel, so that the slices themselves are tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import launcher
from torch import Tensor

from pixeldiff.ops.registry import OPS

LIMIT = 2**31
LAST = 48  # rows compared
EPS = 1e-6
D, F, HEADS = 1536, 4096, 24  # of the released network
# As many colours as channels, so that the image's offsets pass the limit where the stream's do.
PATCH, CHANNELS, COLOURS = 16, 16, 16


@dataclass(frozen=True)
class Call:
    args: tuple[Any, ...]  # of the op, in schema order
    tail: tuple[Any, ...]  # the same for the last rows alone
    last: Callable[[Tensor], Tensor]  # those rows of a result
    of_tail: Callable[[Tensor], Tensor] = lambda y: y  # and of the tail's own


Draw = Callable[..., Tensor]


def _rows(a: Tensor) -> Tensor:
    return a[-1:, -LAST:]


def _call(args: tuple[Any, ...], *kinds: Callable[[Any], Any]) -> Call:
    assert len(args) == len(kinds)
    return Call(args, tuple(f(a) for f, a in zip(kinds, args, strict=True)), _rows)


def _image(a: Tensor) -> Tensor:
    return a[-1:]


def _same(a: Any) -> Any:
    return a


def rms_norm(t: Draw, n: int) -> Call:
    return _call((t(2, n, D), t(D), EPS), _rows, _same, _same)


def rms_norm_modulate(t: Draw, n: int) -> Call:
    args = (t(2, n, D), t(D), t(2, D), t(2, D), EPS)
    return _call(args, _rows, _same, _image, _image, _same)


def gated_residual_norm(t: Draw, n: int) -> Call:
    args = (t(2, n, D), t(2, n, D), t(2, D), t(D), t(2, D), t(2, D), EPS)
    return _call(args, _rows, _rows, _image, _same, _image, _image, _same)


def qk_norm_rope(t: Draw, n: int) -> Call:
    def stream(rows: int) -> tuple[Tensor, ...]:
        d = D // HEADS
        angle = t(rows, d // 2, dtype=torch.float32)
        return t(2, rows, 3 * D), t(d), t(d), angle.cos(), angle.sin()

    (qkv, q, k, cos, sin), text = stream(n), stream(5)
    tail = (_rows(qkv), q, k, cos[-LAST:], sin[-LAST:], *(None,) * 5, HEADS, EPS)
    return Call((qkv, q, k, cos, sin, *text, HEADS, EPS), tail, lambda y: y[:, -1:, -LAST:])


def swiglu(t: Draw, n: int) -> Call:
    return _call((t(2, n, F), t(2, n, F)), _rows, _rows)


def add_silu(t: Draw, n: int) -> Call:
    return _call((t(2, n, D), t(2, D)), _rows, _image)


def sigma_gate(t: Draw, n: int) -> Call:
    args = (t(2, n, D), t(2, n, D), t(1, D) * D**-0.5, t(2, n, 1))
    return _call(args, _rows, _rows, _same, _rows)


def sigma_gate_norm(t: Draw, n: int) -> Call:
    gate = sigma_gate(t, n)
    args = (*gate.args, t(D), t(2, D), t(2, D), EPS)
    return Call(args, (*gate.tail, args[4], *map(_image, args[5:7]), EPS), _rows)


def joint_attention(t: Draw, n: int) -> Call:
    """Of n images of 128 rows, since attention over as many rows would take minutes."""
    q, k, v = (t(n, 128, 2, 64) for _ in range(3))
    how = (0.125, None, True)
    return Call((q, k, v, *how), (*map(_image, (q, k, v)), *how), _image)


# Two images of (h, w) patches; of the last one, the last row of patches.


def _stream(t: Draw, h: int, w: int) -> tuple[Tensor, ...]:
    q = t(2 * h * w, PATCH**2, CHANNELS)
    return q, t(CHANNELS), t(COLOURS, CHANNELS) * CHANNELS**-0.5, t(COLOURS)


def _strip(a: Tensor) -> Tensor:
    return a[-1:, :, -PATCH:]


def pixel_embed(t: Draw, h: int, w: int) -> Call:
    x, weight = t(2, COLOURS, h * PATCH, w * PATCH), t(CHANNELS, COLOURS)
    pos_x, pos_y = (t(n * PATCH, CHANNELS // 2, dtype=torch.float32) for n in (w, h))
    args = (x, weight, t(CHANNELS), pos_x, pos_y, PATCH)
    return Call(args, (_strip(x), *args[1:4], pos_y[-PATCH:], PATCH), lambda q: q[-w:])


def pixel_head(t: Draw, h: int, w: int) -> Call:
    q, *rest = _stream(t, h, w)
    size = (w * PATCH, PATCH, EPS)
    return Call((q, *rest, h * PATCH, *size), (q[-w:], *rest, PATCH, *size), _strip)


def pixel_head_step(t: Draw, h: int, w: int) -> Call:
    q, *rest = _stream(t, h, w)
    shape = (2, COLOURS, h * PATCH, w * PATCH)
    x, noise = (t(*shape, dtype=torch.float32) for _ in range(2))
    how = (0.866, 0.634, False, False, True, True, PATCH, EPS)
    tail = (q[-w:], *rest, _strip(x), _strip(noise), *how)
    return Call((q, *rest, x, noise, *how), tail, _strip)


# Two images of 2h x 2w pixels; of the last one, pixels from a few rows above the last ones on: what
# a convolution finds at the upper end of these alone is not what it finds in the image.


def _convolved(args: tuple[Any, ...], tail: tuple[Any, ...], h: int) -> Call:
    def rows(y: Tensor) -> Tensor:  # of `pooled` half as many
        return y[-1:, -(4 if y.shape[1] in (2 * h, 8) else 2) :]

    return Call(args, tail, rows, rows)


def _weights(t: Draw, before: int, after: int) -> tuple[Tensor, Tensor]:
    return t(after, before, 3, 3) * (9 * before) ** -0.5, t(after)


def local_decoder_down(t: Draw, h: int, w: int) -> Call:
    x, weights = t(2, 2 * h, 2 * w, 32), _weights(t, 32, 32)
    return _convolved((x, *weights), (x[-1:, -8:], *weights), h)


def local_decoder_up(t: Draw, h: int, w: int) -> Call:
    x, skip = t(2, h, w, 16), t(2, 2 * h, 2 * w, 16)
    weights = *_weights(t, 16, 16), *_weights(t, 32, 16)
    return _convolved((x, skip, *weights), (x[-1:, -4:], skip[-1:, -8:], *weights), h)


IMAGES = {joint_attention: 2**17 + 1}
ROWS = {  # and the channels of the widest tensor
    rms_norm: D,
    rms_norm_modulate: D,
    gated_residual_norm: D,
    qk_norm_rope: 3 * D,
    swiglu: F,
    add_silu: D,
    sigma_gate: D,
    sigma_gate_norm: D,
}
GRIDS = {  # on each side, of patches or of pairs of pixels
    pixel_embed: (320, 832),
    pixel_head: (320, 832),
    pixel_head_step: (320, 832),
    local_decoder_down: (2048, 4112),
    local_decoder_up: (4096, 4112),
}
GIGABYTES = {  # arguments and results
    rms_norm: 9,
    rms_norm_modulate: 9,
    gated_residual_norm: 18,
    qk_norm_rope: 9,
    swiglu: 13,
    add_silu: 9,
    sigma_gate: 13,
    sigma_gate_norm: 18,
    joint_attention: 18,
    pixel_embed: 9,
    pixel_head: 14,
    pixel_head_step: 40,
    local_decoder_down: 10,
    local_decoder_up: 10,
}
CUDA = (rms_norm_modulate, gated_residual_norm, joint_attention)  # have a kernel in CUDA C++ too
each_case = pytest.mark.parametrize("case", GIGABYTES, ids=lambda case: case.__name__)


def draw(device: str) -> Draw:
    generator = torch.Generator(device).manual_seed(0)

    def t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    return t


def assert_last_rows(call: Call, result: Any, op: str) -> None:
    got = result if isinstance(result, tuple) else (result,)
    want = OPS[op].reference(*call.tail)
    want = want if isinstance(want, tuple) else (want,)
    for y, expected in zip(got, want, strict=True):
        y, expected = call.last(y), call.of_tail(expected)
        assert y.shape == expected.shape
        # Two spacings of the largest: rows of another place are nowhere near.
        atol = 2 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
        torch.testing.assert_close(y, expected, rtol=0, atol=atol)


def largest(*values: Any) -> int:
    return max(v.numel() for v in values if isinstance(v, Tensor))


def arguments(case: Callable[..., Call], t: Draw) -> Call:
    """The case, large."""
    if case in GRIDS:
        return case(t, *GRIDS[case])
    return case(t, IMAGES.get(case) or LIMIT // (2 * ROWS[case]) + LAST)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "backend"),
    [(case, "triton-gpu") for case in GIGABYTES] + [(case, "cuda") for case in CUDA],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_last_rows(case, backend):
    op = case.__name__
    launch, device = launcher(op, backend)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < GIGABYTES[case] + 2:
        pytest.skip(f"takes {GIGABYTES[case] + 2} GB of device memory, {free:.0f} GB are free")
    call = arguments(case, draw(device))
    assert largest(*call.args) > LIMIT
    assert_last_rows(call, launch(*call.args), op)


@each_case
def test_the_slices(case):
    sizes = (6, 7) if case in GRIDS else (LAST + 3,)
    call = case(draw("cpu"), *sizes)
    assert_last_rows(call, OPS[case.__name__].reference(*call.args), case.__name__)


@each_case
def test_sizes_on_meta(case):
    """Arguments and results come to the memory that is asked for, and pass the limit."""

    def t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    call = arguments(case, t)
    result = getattr(torch.ops.pixeldiff, case.__name__)(*call.args)
    results = result if isinstance(result, tuple) else (result,)
    assert largest(*call.args) > LIMIT
    assert largest(*results) > LIMIT
    tensors = [v for v in (*call.args, *results) if isinstance(v, Tensor)]
    total = sum(v.numel() * v.element_size() for v in tensors) / 1e9
    assert GIGABYTES[case] - 1 < total <= GIGABYTES[case]
