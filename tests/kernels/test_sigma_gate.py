"""sigma_gate against fp64: y = x + sigmoid(x W^T + lq_logit) * feature."""

import numpy as np
import pytest
import torch
from rules import (
    Draw,
    assert_bitwise,
    assert_one_rounding,
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
    sigmoid,
)

from pixeldiff.ops import sigma_gate

# (B, N, D); every one runs with K = D and K = 1.
SHAPES = {"production": (2, 24, 384), "primes": (3, 7, 13), "one": (1, 1, 1), "empty": (2, 0, 8)}


def arguments(dtype, shape, k, std=1.0):
    draw, (b, n, d) = Draw(dtype), shape
    return (
        draw(b, n, d, std=std),
        draw(b, n, d, std=std),
        draw(k, d, std=d**-0.5),
        draw(b, n, k),
    )


def oracle(x, feature, weight, lq_logit):
    x, feature, weight, lq_logit = f64(x, feature, weight, lq_logit)
    return x + sigmoid(np.einsum("bnd,kd->bnk", x, weight) + lq_logit) * feature


def eager(x, feature, weight, lq_logit):
    return x + torch.sigmoid(x @ weight.T + lq_logit) * feature


@every_backend("sigma_gate")
@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-token"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, per_channel, backend):
    args = arguments(dtype, shape, shape[-1] if per_channel else 1, std)
    with forced("sigma_gate", backend):
        y = sigma_gate(*args)
    assert_within_twice_eager(y, eager(*args), oracle(*args))


@every_backend("sigma_gate")
def test_a_closed_gate_returns_x(backend):
    x, feature, weight, logit = arguments(torch.bfloat16, (2, 3, 8), 1)
    with forced("sigma_gate", backend):
        assert_bitwise(sigma_gate(x, feature, weight, torch.full_like(logit, -1e4)), x)


def test_logit_in_fp32_with_a_bf16_stream():
    """A per-token logit stays in fp32: its fraction below bf16's step is not lost."""
    x, feature, weight, _ = arguments(torch.bfloat16, (2, 30, 8), 1)
    x, logit = torch.zeros_like(x), Draw(seed=1)(2, 30, 1) * 0.3 - 6
    y = sigma_gate(x, feature, weight, logit)
    assert y.dtype == torch.bfloat16
    assert_one_rounding(y, oracle(x, feature, weight, logit))


def test_column_slice_and_strided_stream():
    x, feature, weight, logit = arguments(torch.float32, (2, 3, 8), 8)
    y = sigma_gate(at_odd_stride(x), at_odd_stride(feature), at_odd_stride(weight), logit)
    assert y.is_contiguous()
    torch.testing.assert_close(y, sigma_gate(x, feature, weight, logit), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [8, 1])
def test_runs_everywhere(k):
    args = arguments(torch.bfloat16, (2, 3, 8), k)
    check_registered("sigma_gate", sigma_gate, *args)
    check_compiles("sigma_gate", sigma_gate, args, arguments(torch.bfloat16, (1, 5, 8), k))
    check_meta(sigma_gate, *args)
    check_repeatable(sigma_gate, *args)


@pytest.mark.parametrize("k", [3, 1])
def test_gradients(k):
    check_gradients(sigma_gate, *arguments(torch.float32, (1, 2, 3), k))


def test_errors():
    x, feature, weight, logit = arguments(torch.float32, (2, 3, 8), 8)
    with pytest.raises(
        ValueError,
        match=r"^sigma_gate: weight must be \(D, D\) or \(1, D\) with D = 8, got \(2, 8\)$",
    ):
        sigma_gate(x, feature, weight[:2], logit)
    with pytest.raises(
        ValueError, match=r"^sigma_gate: weight must be \(K, D\) = \(8, 8\), got \(8, 7\)$"
    ):
        sigma_gate(x, feature, weight[:, :7], logit)
    with pytest.raises(
        ValueError,
        match=r"^sigma_gate: feature must be \(B, N, D\) = \(2, 3, 8\), got \(2, 2, 8\)$",
    ):
        sigma_gate(x, feature[:, :2], weight, logit)
    with pytest.raises(
        ValueError,
        match=r"^sigma_gate: lq_logit must be \(B, N, K\) = \(2, 3, 1\), got \(2, 3, 8\)$",
    ):
        sigma_gate(x, feature, weight[:1], logit)
    with pytest.raises(
        ValueError, match=r"^sigma_gate: x must be \(B, N, D\), 3 axes, got \(3, 8\)$"
    ):
        sigma_gate(x[0], feature, weight, logit)
    with pytest.raises(
        TypeError,
        match=r"^sigma_gate: weight must have the dtype of x, torch.float32, got torch.bfloat16$",
    ):
        sigma_gate(x, feature, weight.bfloat16(), logit)
    with pytest.raises(TypeError, match=r"^sigma_gate: lq_logit must be .* got torch.int64$"):
        sigma_gate(x, feature, weight, logit.long())
