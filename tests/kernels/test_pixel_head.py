"""pixel_head against fp64: norm, linear, and every pixel back to its place."""

import numpy as np
import pytest
import torch
from rules import (
    Draw,
    assert_one_rounding,
    at_odd_stride,
    check_compiles,
    check_gradients,
    check_meta,
    check_registered,
    check_repeatable,
    every_backend,
    f64,
    forced,
    precisions,
    rms,
)

from pixeldiff.ops import pixel_head

# (B, C, H, W, p, P)
SHAPES = {
    "production": (1, 3, 64, 96, 16, 16),
    "primes": (2, 5, 21, 35, 4, 7),
    "one": (1, 1, 1, 1, 1, 1),
    "empty": (0, 3, 8, 12, 4, 4),
}


def arguments(dtype, shape, std=1.0):
    draw, (b, c, height, width, p, patch) = Draw(dtype), shape
    rows = b * (height // patch) * (width // patch)
    q = draw(rows, patch * patch, p, std=std)
    return q, draw(p), draw(c, p), draw(c), height, width, patch


def call(q, norm_weight, weight, bias, height, width, patch):
    return pixel_head(q, norm_weight, weight, bias, size=(height, width), patch=patch)


def oracle(q, norm_weight, weight, bias, height, width, patch):
    q, norm_weight, weight, bias = f64(q, norm_weight, weight, bias)
    h, w = height // patch, width // patch
    y = rms(q) * norm_weight @ weight.T + bias
    out = np.empty((q.shape[0] // (h * w), weight.shape[0], height, width))
    for row in range(height):
        for col in range(width):
            token = (row // patch) * w + col // patch
            out[:, :, row, col] = y[token :: h * w, (row % patch) * patch + col % patch]
    return out


@every_backend("pixel_head")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    """fp32 out of a bf16 stream too: nothing is rounded to bf16."""
    args = arguments(dtype, shape, std)
    with forced("pixel_head", backend):
        v = call(*args)
    assert v.dtype == torch.float32
    assert_one_rounding(v, oracle(*args))


def test_strided_stream():
    q, *rest = arguments(torch.float32, (2, 3, 8, 12, 4, 4))
    y = call(at_odd_stride(q), *rest)
    assert y.is_contiguous()
    torch.testing.assert_close(y, call(q, *rest), rtol=1e-6, atol=1e-6)


def test_runs_everywhere():
    args = arguments(torch.bfloat16, (2, 3, 8, 12, 4, 4))
    check_registered("pixel_head", call, *args)
    check_compiles("pixel_head", call, args, arguments(torch.bfloat16, (1, 3, 16, 4, 4, 4)))
    check_meta(call, *args)
    check_repeatable(call, *args)


def test_gradients():
    q, norm_weight, weight, bias, *rest = arguments(torch.float32, (1, 2, 2, 4, 3, 2))
    check_gradients(lambda *t: call(*t, *rest), q, norm_weight, weight, bias)


def test_fp64_stays_fp64():
    q, norm_weight, weight, bias, *rest = arguments(torch.float64, (1, 2, 2, 4, 3, 2))
    y = call(q, norm_weight, weight, bias, *rest)
    assert y.dtype == torch.float64
    np.testing.assert_allclose(y.numpy(), oracle(q, norm_weight, weight, bias, *rest), rtol=1e-13)


def test_errors():
    q, norm_weight, weight, bias, *_ = arguments(torch.float32, (2, 3, 8, 12, 4, 4))

    def raises(message, q=q, norm_weight=norm_weight, weight=weight, bias=bias, size=(8, 12)):
        with pytest.raises(ValueError, match=f"^pixel_head: {message}$"):
            pixel_head(q, norm_weight, weight, bias, size=size, patch=4)

    raises(r"size must be positive multiples of patch = 4, got \(8, 10\)", size=(8, 10))
    raises(r"size must be positive multiples of patch = 4, got \(0, 12\)", size=(0, 12))
    raises(
        r"q must be \(B\*N, P\*P, p\) with N = 6 and P\*P = 16, got \(11, 16, 4\)",
        q=q[:11],
    )
    raises(
        r"q must be \(B\*N, P\*P, p\) with N = 6 and P\*P = 16, got \(12, 15, 4\)",
        q=q[:, :15],
    )
    raises(r"q must be \(B\*N, P\*P, p\), 3 axes, got \(16, 4\)", q=q[0])
    raises(r"norm_weight must be \(p,\) = \(4,\), got \(3,\)", norm_weight=norm_weight[:3])
    raises(r"weight must be \(C, p\) = \(3, 4\), got \(3, 3\)", weight=weight[:, :3])
    raises(r"bias must be \(C,\) = \(3,\), got \(2,\)", bias=bias[:2])
    with pytest.raises(TypeError, match=r"^pixel_head: q must be float32, .* got torch.int64$"):
        pixel_head(q.long(), norm_weight, weight, bias, size=(8, 12), patch=4)
