"""What the quantising ops are held against.

    value    |q * scale - o| <= half the e4m3 spacing at o / scale, times scale, + 4 eps(fp32) max|o
    scale    one rounding of max|o of the row| / 448

`o` is the fp64 oracle of the unquantised result and the maximum is over its row. Where a kernel
starts from the same fp32 numbers as `nearest`, the bits must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import aot
import pytest
import torch
from harness import launcher, one_rounding
from torch import Tensor

E4M3 = torch.float8_e4m3fn
EPS32 = torch.finfo(torch.float32).eps
BACKENDS = ["reference", "triton", pytest.param("triton-gpu", marks=pytest.mark.gpu)]


def implementation(op: str, backend: str) -> tuple[Callable, str]:
    """(function, device) of a backend; skips the test, with the reason, if it cannot run."""
    if backend == "reference":
        reference = import_module(f"pixeldiff.ops.{op}").reference
        return lambda *args: tuple(t.contiguous() for t in reference(*args)), "cpu"
    return launcher(op, backend)


def nearest(values: Tensor) -> Tensor:
    """e4m3 codes (uint8) of finite fp64 values: the nearest by comparing with all of them, ties to
    the even code, beyond 448 saturated. No conversion of PyTorch's is used."""
    grid = torch.arange(127, dtype=torch.uint8).view(E4M3).double()  # 0 to 448 in order
    size = values.abs().clamp(max=448)
    upper = torch.searchsorted(grid, size.contiguous()).clamp(max=126)
    lower = (upper - 1).clamp(min=0)
    down, up = size - grid[lower], grid[upper] - size
    code = torch.where((up < down) | ((up == down) & (upper % 2 == 0)), upper, lower)
    code = torch.where(grid[upper] == size, upper, code)
    return (code + 128 * torch.signbit(values)).to(torch.uint8)


def check_rows(q: Tensor, scale: Tensor, oracle: Tensor) -> None:
    """`q` (..., D) e4m3 and `scale` (...) fp32 are the rows of `oracle` by the rules above."""
    assert (q.dtype, scale.dtype) == (E4M3, torch.float32)
    assert q.is_contiguous()
    assert scale.is_contiguous()
    assert q.shape == oracle.shape
    assert scale.shape == oracle.shape[:-1]
    if q.numel() == 0:
        assert (scale == 1).all()
        return
    q, scale = q.cpu(), scale.cpu()
    largest = oracle.abs().amax(-1)
    assert one_rounding(scale, largest / 448) <= 1
    wide = scale.double()[..., None]
    exponent = torch.frexp(oracle.abs() / wide).exponent - 1
    spacing = torch.ldexp(torch.ones_like(oracle), exponent.clamp(min=-6) - 3)
    budget = spacing / 2 * wide + 4 * EPS32 * largest[..., None]
    worst = ((q.double() * wide - oracle).abs() / budget).max().item()
    assert worst <= 1, f"error is {worst:.3g} times its budget"
    # The whole range is used: the largest of every row lies on 448.
    assert (q.double().abs().amax(-1) == 448).all()


def codes(q: Tensor) -> Tensor:
    """The bits of e4m3 values."""
    return q.cpu().view(torch.uint8)


# Of aot.TARGETS those that convert to e4m3 in hardware.
TARGETS = [target for target in aot.TARGETS if target >= 89]


def check_quantising_kernel(
    op: str, target: int, sites: Iterable[dict[str, Any]], *, launches: int = 1
) -> None:
    """At every site (changes to `aot.released`) the last of `launches` kernels is lean and loads
    16 bytes, converts in hardware, and stores 8 or 16 bytes."""
    module = pytest.importorskip(f"pixeldiff.triton_kernels.{op}")
    for site in sites:
        args = aot.released(op, **site)
        refusal = aot.refusal(lambda args=args: module.why_not(*args), target)
        assert refusal is None, f"{op} on sm_{target}, {site}: {refusal}"
        compiled = aot.compile_launch(lambda args=args: module.launch(*args), target)
        names = [kernel.name for kernel in compiled]
        assert len(names) == launches, f"{op}, {site}: launches {names}, expected {launches}"
        kernel = compiled[-1]
        aot.assert_lean(kernel)
        where = f"{kernel.name} on sm_{target}, {site}"
        for needed in ("ld.global.v4.b32", "cvt.rn.satfinite.e4m3x2.f32"):
            assert needed in kernel.ptx, f"{where}: no {needed}"
        wide = ("st.global.v2.b32", "st.global.v4.b32")
        assert any(store in kernel.ptx for store in wide), f"{where}: no wide store"


def check_refuses_before_e4m3(op: str) -> None:
    """Compute capability 8.0 is refused, with the reason."""
    module = pytest.importorskip(f"pixeldiff.triton_kernels.{op}")
    args = aot.released(op)
    reason = aot.refusal(lambda: module.why_not(*args), 80)
    expected = "e4m3 needs compute capability 8.9, this device is 8.0"
    assert reason == expected, f"{op} on sm_80: {reason}"
