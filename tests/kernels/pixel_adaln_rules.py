"""What both ops that modulate pixels are held against in the same way, on a CPU and in Triton.

Each brings its arguments at a shape (R, P*P, p, D, A), its fp64 oracle and eager's composition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from harness import launcher, on, usable_isas
from hypothesis import strategies as st
from rules import assert_bitwise, assert_within_twice_eager, assert_within_twice_eager_or_spacing
from torch import Tensor

from pixeldiff.ops.cpu import pixel_adaln
from pixeldiff.ops.registry import explain

EPS = 1e-6

# (R, P*P, p, D, A)
SHAPES = {
    "production": (6, 256, 16, 96, 288),
    "primes": (7, 9, 4, 13, 11),
    "one": (1, 1, 1, 1, 1),
    "patch8": (5, 64, 8, 32, 48),
    "p12": (3, 4, 12, 16, 20),
    "p20": (4, 25, 20, 9, 16),
    "one-patch": (1, 64, 8, 24, 40),
    "empty": (0, 4, 4, 8, 8),
}
# Fewer patches and pixels than a tile, one patch more than a tile, D of one block and with a rest.
TRITON_SHAPES = {
    "p8": (7, 9, 8, 13, 11),
    "p16": (5, 7, 16, 40, 24),
    "p32": (3, 3, 32, 19, 8),
    "next-row": (129, 2, 16, 16, 8),
    "one": (1, 1, 8, 1, 1),
    "no-patch": (0, 4, 16, 8, 8),
}


@dataclass(frozen=True)
class Definition:
    op: str
    arguments: Callable[..., tuple[Tensor, ...]]
    eager: Callable[..., Tensor]
    oracle: Callable[..., np.ndarray]

    def check(self, y: Tensor, args: tuple[Tensor, ...]) -> None:
        """`y` is the result for `args`, which are on the CPU."""
        assert_within_twice_eager_or_spacing(y.cpu(), self.eager(*args), self.oracle(*args))

    def kernel(self) -> Any:
        return import_module(f"pixeldiff.triton_kernels.{self.op}")


def check_instruction_set(d: Definition, dtype: torch.dtype, shape: tuple, isa: str) -> None:
    launch, _ = launcher(d.op, f"cpu-{isa}")
    if shape[2] % 4:
        pytest.skip("the kernels take multiples of 4 channels")
    args = d.arguments(dtype, shape)
    d.check(launch(*args, EPS), args)


def check_random_shape(d: Definition, data: Any) -> None:
    """Chunks of any number of patches, groups of pixels with and without a rest."""
    draw = data.draw
    p, patch = 4 * draw(st.integers(1, 5)), draw(st.integers(1, 9))
    # Enough results that the largest is not itself a sum that cancels.
    rows, width, a = draw(st.integers(4, 12)), draw(st.integers(1, 20)), draw(st.integers(8, 24))
    shape = (rows, patch**2, p, width, a)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    args = d.arguments(dtype, shape, draw(st.sampled_from([1.0, 1e-3, 30.0])))
    launch, _ = launcher(d.op, f"cpu-{draw(st.sampled_from(usable_isas()))}")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pixel_adaln, "CHUNK_BYTES", draw(st.sampled_from([1, 3000, 10000])))
        patched.setattr(pixel_adaln, "GROUP", draw(st.sampled_from([1, 5, 16, 40])))
        y = launch(*args, EPS)
    d.check(y, args)


def check_chunks(d: Definition, monkeypatch: pytest.MonkeyPatch) -> None:
    """No chunk and no group changes the result beyond the rounding of the GEMMs, whose order of
    summation may depend on their size."""
    launch, _ = launcher(d.op, f"cpu-{usable_isas()[-1]}")
    args = d.arguments(torch.float32, (37, 64, 8, 24, 40))
    whole = launch(*args, EPS)
    for chunk, group in ((1, 16), (20_000, 7), (50_000, 64)):
        monkeypatch.setattr(pixel_adaln, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(pixel_adaln, "GROUP", group)
        torch.testing.assert_close(launch(*args, EPS), whole, rtol=1e-5, atol=1e-5)


def check_inference_mode(d: Definition, isa: str) -> None:
    launch, _ = launcher(d.op, f"cpu-{isa}")
    args = d.arguments(torch.float32, (3, 9, 8, 13, 11))
    want = launch(*args, EPS)
    with torch.inference_mode():
        assert_bitwise(launch(*args, EPS), want)


def check_magnitude(d: Definition, std: float, backend: str) -> None:
    launch, device = launcher(d.op, backend)
    q, *rest = d.arguments(torch.float32, (6, 16, 8, 24, 40))
    args = (q * std, *rest)
    d.check(launch(*on(device, args), EPS), args)


def check_on_triton(
    d: Definition, dtype: torch.dtype, std: float, shape: tuple, backend: str
) -> None:
    launch, device = launcher(d.op, backend)
    args = d.arguments(dtype, shape, std)
    y = launch(*on(device, args), EPS)
    assert y.dtype == dtype
    assert y.is_contiguous()
    d.check(y, args)


def check_pieces_and_groups(
    d: Definition,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    config: tuple[int, ...],
    whole_piece: int,
) -> None:
    """One piece of `whole_piece` patches or several, in any order of tiles, is the same."""
    launch, device = launcher(d.op, backend)
    kernel = d.kernel()
    config = kernel.Config(*config)
    args = d.arguments(torch.float32, (70, 7, 16, 24, 24))
    whole = launch(*on(device, args), EPS, config=config)
    d.check(whole, args)
    for piece, group in ((whole_piece, 32), (33, 16), (70, 48)):
        monkeypatch.setattr(kernel, "PIECE", piece)
        monkeypatch.setattr(kernel.pixel_adaln, "GROUP_PATCHES", group)
        y = launch(*on(device, args), EPS, config=config)
        torch.testing.assert_close(y, whole, rtol=1e-5, atol=1e-5)


def check_released_shape_on_gpu(
    d: Definition, dtype: torch.dtype, patches: int, *, of_patches: int
) -> None:
    """Every tile that fits the device, held against fp64 at some patches of each piece.

    `of_patches`: how many arguments have a row for each patch; they come first.
    """
    launch, device = launcher(d.op, "triton-gpu")
    kernel = d.kernel()
    args = on(device, d.arguments(dtype, (patches, 256, 16, 1536, 1152)))
    assert explain(d.op, *args, EPS)[0] == ("triton", None)
    some = torch.tensor([0, 1, 127, 128, 299, patches // 2, patches - 2, patches - 1])
    picked = (*(t[some] for t in args[:of_patches]), *args[of_patches:])
    want, baseline = d.oracle(*on("cpu", picked)), d.eager(*picked).cpu()
    assert_within_twice_eager(launch(*args, EPS)[some].cpu(), baseline, want)
    for config in kernel.candidates(*args):
        try:
            y = launch(*args, EPS, config=config)
        except kernel.triton.runtime.errors.OutOfResources:
            continue
        assert_within_twice_eager(y[some].cpu(), baseline, want)
