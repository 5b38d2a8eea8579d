"""pixel_embed against fp64: one linear a pixel, plus the separable position, in patch order."""

import numpy as np
import pytest
import torch
from rules import (
    Draw,
    assert_bitwise,
    assert_one_rounding,
    check_compiles,
    check_gradients,
    check_meta,
    check_registered,
    check_repeatable,
    every_backend,
    f64,
    forced,
    precisions,
)

from pixeldiff.ops import pixel_embed

# (B, C, H, W, p, P)
SHAPES = {
    "production": (1, 3, 64, 96, 16, 16),
    "primes": (2, 5, 21, 35, 4, 7),
    "one": (1, 1, 1, 1, 2, 1),
    "empty": (0, 3, 8, 12, 4, 4),
}


def arguments(dtype, shape, std=1.0):
    """The image is fp32 whatever the weights' dtype, as in the network."""
    draw, (b, c, height, width, p, patch) = Draw(dtype), shape
    wide = Draw(seed=1)
    x, weight, bias = wide(b, c, height, width, std=std), draw(p, c), draw(p)
    return x, weight, bias, wide(width, p // 2), wide(height, p // 2), patch


def call(x, weight, bias, pos_x, pos_y, patch):
    return pixel_embed(x, weight, bias, pos_x, pos_y, patch=patch)


def oracle(x, weight, bias, pos_x, pos_y, patch):
    x, weight, bias, pos_x, pos_y = f64(x, weight, bias, pos_x, pos_y)
    b, _, height, width = x.shape
    h, w, p = height // patch, width // patch, weight.shape[0]
    out = np.empty((b * h * w, patch * patch, p))
    for row in range(height):
        for col in range(width):
            token = (row // patch) * w + col // patch
            pixel = (row % patch) * patch + col % patch
            position = np.concatenate((pos_x[col], pos_y[row]))
            out[token :: h * w, pixel] = x[:, :, row, col] @ weight.T + bias + position
    return out


@every_backend("pixel_embed")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    args = arguments(dtype, shape, std)
    with forced("pixel_embed", backend):
        q = call(*args)
    assert q.dtype == dtype
    assert_one_rounding(q, oracle(*args))


def test_strided_image():
    x, *rest = arguments(torch.bfloat16, (2, 3, 8, 12, 4, 4))
    assert_bitwise(call(x.transpose(2, 3).contiguous().transpose(2, 3), *rest), call(x, *rest))


def test_runs_everywhere():
    args = arguments(torch.bfloat16, (2, 3, 8, 12, 4, 4))
    check_registered("pixel_embed", call, *args)
    check_compiles("pixel_embed", call, args, arguments(torch.bfloat16, (1, 3, 16, 4, 4, 4)))
    check_meta(call, *args)
    check_repeatable(call, *args)


def test_gradients():
    *tensors, patch = arguments(torch.float32, (1, 2, 4, 2, 4, 2))
    check_gradients(lambda *t: call(*t, patch), *tensors)


def test_errors():
    x, weight, bias, pos_x, pos_y, patch = arguments(torch.float32, (2, 3, 8, 12, 4, 4))

    def raises(error, message, *args):
        with pytest.raises(error, match=f"^pixel_embed: {message}$"):
            call(*args)

    raises(
        ValueError,
        r"H and W must be multiples of patch = 5, got 8x12",
        *(x, weight, bias, pos_x, pos_y, 5),
    )
    raises(
        ValueError,
        r"H and W must be multiples of patch = 0, got 8x12",
        *(x, weight, bias, pos_x, pos_y, 0),
    )
    raises(
        ValueError,
        r"x must be \(B, C, H, W\), 4 axes, got \(3, 8, 12\)",
        *(x[0], weight, bias, pos_x, pos_y, patch),
    )
    raises(
        ValueError,
        r"weight must be \(p, C\) = \(4, 3\), got \(4, 2\)",
        *(x, weight[:, :2], bias, pos_x, pos_y, patch),
    )
    raises(
        ValueError,
        r"p must be even, got 3",
        *(x, weight[:3], bias[:3], pos_x[:, :1], pos_y[:, :1], patch),
    )
    raises(
        ValueError,
        r"bias must be \(p,\) = \(4,\), got \(3,\)",
        *(x, weight, bias[:3], pos_x, pos_y, patch),
    )
    raises(
        ValueError,
        r"pos_x must be \(W, p/2\) = \(12, 2\), got \(8, 2\)",
        *(x, weight, bias, pos_y, pos_x, patch),
    )
    raises(
        ValueError,
        r"pos_y must be \(H, p/2\) = \(8, 2\), got \(7, 2\)",
        *(x, weight, bias, pos_x, pos_y[:7], patch),
    )
    raises(TypeError, r"x must be .* got torch.uint8", *(x.byte(), weight, bias, pos_x, pos_y, 4))
