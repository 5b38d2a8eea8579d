"""qk_norm_rope against fp64: RMSNorm per head, rotation as a complex product, one buffer."""

import numpy as np
import pytest
import torch
from rules import (
    Draw,
    assert_bitwise,
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

from pixeldiff.ops import qk_norm_rope

# (B, N, T, G, d); T = None has no text.
SHAPES = {
    "production": (1, 24, 10, 24, 64),
    "pit": (2, 15, None, 16, 72),
    "primes": (3, 7, 5, 11, 2),
    "one": (1, 1, 1, 1, 2),
    "no-image": (2, 0, 3, 2, 4),
    "no-text-rows": (2, 3, 0, 2, 4),
}


def stream(draw, b, n, g, d, std=1.0):
    """qkv, q_weight, k_weight, (cos, sin) of n rows."""
    angle = Draw(seed=n)(n, d // 2) * 3
    return draw(b, n, 3 * g * d, std=std), draw(d), draw(d), (angle.cos(), angle.sin())


def arguments(dtype, shape, std=1.0):
    draw, (b, n, t, g, d) = Draw(dtype), shape
    image = stream(draw, b, n, g, d, std)
    return image, None if t is None else stream(draw, b, t, g, d, std), g


def call(image, text, heads):
    return qk_norm_rope(*image, heads=heads, text=text)


def flat(heads):
    """The public function of tensors alone, as compile and gradcheck want it."""

    def fn(qkv, q_weight, k_weight, cos, sin, *text):
        text = (*text[:3], text[3:]) if text else None
        return qk_norm_rope(qkv, q_weight, k_weight, (cos, sin), heads=heads, text=text)

    return fn


def flattened(image, text, heads):
    streams = [image] if text is None else [image, text]
    return tuple(t for s in streams for t in (*s[:3], *s[3]))


def oracle(image, text, heads):
    rows = [_rows(*s, heads) for s in ([image] if text is None else [text, image])]
    return np.concatenate(rows, 2)


def _rows(qkv, q_weight, k_weight, rope, heads):
    turn = f64(rope[0]) + 1j * f64(rope[1])
    wide, d = f64(qkv), q_weight.numel()
    out = np.empty((3, *wide.shape[:2], heads, d))
    for part, weight in enumerate((q_weight, k_weight, None)):
        for head in range(heads):
            first = (part * heads + head) * d
            h = wide[..., first : first + d]
            if weight is not None:
                h = rms(h) * f64(weight)
                pair = (h[..., 0::2] + 1j * h[..., 1::2]) * turn
                h = np.stack((pair.real, pair.imag), -1).reshape(h.shape)
            out[part, :, :, head] = h
    return out


@every_backend("qk_norm_rope")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    args = arguments(dtype, shape, std)
    with forced("qk_norm_rope", backend):
        out = call(*args)
    want = oracle(*args)
    assert_one_rounding(out[0], want[0])
    assert_one_rounding(out[1], want[1])
    assert_bitwise(out[2], torch.from_numpy(want[2]).to(dtype))


def test_text_rows_come_first():
    image, text, heads = arguments(torch.float32, (2, 4, 3, 2, 4))
    joint = call(image, text, heads)
    assert_bitwise(joint[:, :, :3], call(text, None, heads))
    assert_bitwise(joint[:, :, 3:], call(image, None, heads))


def test_strided_projection():
    image, text, heads = arguments(torch.bfloat16, (2, 4, 3, 2, 4))
    y = call((at_odd_stride(image[0]), *image[1:]), (at_odd_stride(text[0]), *text[1:]), heads)
    assert y.is_contiguous()
    assert_bitwise(y, call(image, text, heads))


@pytest.mark.parametrize("rows", [3, None], ids=["text", "no-text"])
def test_runs_everywhere(rows):
    fn = flat(2)
    small, large = (
        flattened(*arguments(torch.bfloat16, (b, n, rows, 2, 4))) for b, n in ((2, 5), (3, 8))
    )
    check_registered("qk_norm_rope", fn, *small)
    check_compiles("qk_norm_rope", fn, small, large)
    check_meta(fn, *small)
    check_repeatable(fn, *small)


def test_gradients():
    check_gradients(flat(2), *flattened(*arguments(torch.float32, (1, 3, 2, 2, 4))))


def test_errors():
    (qkv, q_weight, k_weight, rope), text, heads = arguments(torch.float32, (2, 4, 3, 2, 4))

    def raises(error, message, image=(qkv, q_weight, k_weight, rope), text=None, heads=heads):
        with pytest.raises(error, match=f"^qk_norm_rope: {message}$"):
            qk_norm_rope(*image, heads=heads, text=text)

    raises(
        ValueError,
        r"qkv must have 3\*G\*d channels with even d and G = 5 heads, got 24",
        heads=5,
    )
    raises(ValueError, r"qkv must have 3\*G\*d channels .* G = 0 heads, got 24", heads=0)
    raises(
        ValueError,
        r"q_weight must be \(d,\) = \(4,\), got \(3,\)",
        (qkv, q_weight[:3], k_weight, rope),
    )
    raises(
        ValueError,
        r"k_weight must be \(d,\) = \(4,\), got \(3,\)",
        (qkv, q_weight, k_weight[:3], rope),
    )
    raises(
        ValueError,
        r"sin must be \(N, d/2\) = \(4, 2\), got \(3, 2\)",
        (qkv, q_weight, k_weight, (rope[0], rope[1][:3])),
    )
    raises(
        ValueError,
        r"the last axis of qkv must be contiguous, got strides .*; call \.contiguous\(\)",
        (qkv.transpose(1, 2).contiguous().transpose(1, 2), q_weight, k_weight, rope),
    )
    raises(
        ValueError,
        r"qkv must be \(B, N, 3\*G\*d\), 3 axes, got \(4, 24\)",
        (qkv[0], q_weight, k_weight, rope),
    )
    raises(
        TypeError,
        r"qkv must be float32, .* got torch.int64",
        (qkv.long(), q_weight, k_weight, rope),
    )
    raises(
        ValueError,
        r"text qkv must be \(B, T, 3\*G\*d\) with B = 2 and 3\*G\*d = 24, got \(1, 3, 24\)",
        text=(text[0][:1], *text[1:]),
    )
    raises(
        TypeError,
        r"text qkv must have the dtype of qkv, torch.float32, got torch.bfloat16",
        text=(text[0].bfloat16(), *text[1:]),
    )
    raises(
        ValueError,
        r"text cos must be \(N, d/2\) = \(3, 2\), got \(4, 2\)",
        text=(*text[:3], rope),
    )
