"""joint_attention against fp64: softmax(scale q k^T) v for every head."""

import numpy as np
import pytest
import torch
from rules import (
    Draw,
    assert_bitwise,
    assert_within_twice_eager,
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
)

from pixeldiff.ops import joint_attention

# (B, L, S, G, d)
SHAPES = {
    "production": (1, 160, 190, 6, 64),
    "pit": (2, 48, 48, 4, 72),
    "primes": (3, 7, 13, 5, 11),
    "one": (1, 1, 1, 1, 1),
    "one-key": (2, 5, 1, 3, 8),
    "no-query": (2, 0, 4, 2, 8),
    "no-image": (0, 3, 4, 2, 8),
}


def arguments(dtype, shape, std=1.0):
    draw, (b, queries, keys, g, d) = Draw(dtype), shape
    return tuple(draw(b, rows, g, d, std=std) for rows in (queries, keys, keys))


def oracle(q, k, v, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = f64(q, k, v)
    logits = np.einsum("blgd,bsgd->bgls", q, k) * scale
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bgls,bsgd->blgd", weights, v)


def eager(q, k, v):
    logits = torch.einsum("blgd,bsgd->bgls", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bgls,bsgd->blgd", logits.softmax(-1), v)


@every_backend("joint_attention")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    args = arguments(dtype, shape, std)
    with forced("joint_attention", backend):
        o = joint_attention(*args)
    assert_within_twice_eager(o, eager(*args), oracle(*args))


@every_backend("joint_attention")
@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_scale(scale, backend):
    q, k, v = arguments(torch.float32, (2, 5, 7, 3, 8))
    with forced("joint_attention", backend):
        o = joint_attention(q, k, v, scale=scale)
    same = eager(q * (scale * 8**0.5), k, v)
    assert_within_twice_eager(o, same, oracle(q, k, v, scale))


@every_backend("joint_attention")
def test_large_logits_do_not_overflow(backend):
    q, k, v = arguments(torch.float32, (1, 4, 6, 2, 8))
    with forced("joint_attention", backend):
        o = joint_attention(q * 300, k * 300, v)
    assert torch.isfinite(o).all()
    np.testing.assert_allclose(f64(o), oracle(q * 300, k * 300, v), atol=1e-2)


def test_views_of_the_joint_buffer():
    """q without its text rows, k and v whole, all views of one (3, B, T+N, G, d) buffer."""
    q, k, v = Draw()(3, 2, 9, 3, 8).unbind(0)
    o = joint_attention(q[:, 4:], k, v)
    assert o.is_contiguous()
    assert_bitwise(o, joint_attention(q[:, 4:].contiguous(), k.clone(), v.clone()))
    torch.testing.assert_close(o, joint_attention(q, k, v)[:, 4:], rtol=1e-5, atol=1e-6)
    odd = joint_attention(at_odd_stride(q), at_odd_stride(k), at_odd_stride(v))
    torch.testing.assert_close(odd, joint_attention(q, k, v), rtol=1e-5, atol=1e-6)


def test_runs_everywhere():
    args = arguments(torch.bfloat16, (2, 5, 7, 3, 8))
    check_registered("joint_attention", joint_attention, *args)
    check_compiles(
        "joint_attention", joint_attention, args, arguments(torch.bfloat16, (1, 6, 9, 3, 8))
    )
    check_meta(joint_attention, *args)
    check_repeatable(joint_attention, *args)


def test_gradients():
    check_gradients(joint_attention, *arguments(torch.float32, (1, 2, 3, 2, 3)))


def test_errors():
    q, k, v = arguments(torch.float32, (2, 5, 7, 3, 8))

    def raises(error, message, *args):
        with pytest.raises(error, match=f"^joint_attention: {message}$"):
            joint_attention(*args)

    raises(ValueError, r"q must be \(B, L, G, d\), 4 axes, got \(5, 3, 8\)", q[0], k, v)
    raises(
        ValueError,
        r"k must be \(B, S, G, d\) = \(2, 7, 3, 8\), got \(2, 7, 2, 8\)",
        q,
        k[:, :, :2],
        v,
    )
    raises(
        ValueError, r"v must be \(B, S, G, d\) = \(2, 7, 3, 8\), got \(2, 6, 3, 8\)", q, k, v[:, 1:]
    )
    raises(
        ValueError,
        r"k must have at least one row, got \(2, 0, 3, 8\)",
        q,
        k[:, :0],
        v[:, :0],
    )
    raises(
        TypeError,
        r"k and v must have the dtype of q, torch.float32, got torch.float32, torch.bfloat16",
        q,
        k,
        v.bfloat16(),
    )
    raises(TypeError, r"q must be float32, .* got torch.int32", q.int(), k, v)
    raises(
        ValueError,
        r"the last axis of v must be contiguous, got strides .*; call \.contiguous\(\)",
        q,
        k,
        v.transpose(2, 3).contiguous().transpose(2, 3),
    )
