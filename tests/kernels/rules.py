"""What every op is held against: three error rules, and checks that are the same for all ops.

The oracle `o` is always fp64 and written in the test itself, not with the op's own reference:

    moves data                   bitwise equal
    fp32 inside, one rounding    |y - o| <= eps(dtype) |o| + 4 eps(fp32) max|o|
    low precision inside         max error <= 2 x eager's + 4 eps(fp32) max|o|

At fp32 the second rule catches what a bf16 tolerance hides: a missing element in a mean, an early
rounding of 1 + scale, an eps on the wrong side of the root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pixeldiff
from pixeldiff.ops.registry import OPS

EPS32 = torch.finfo(torch.float32).eps

precisions = pytest.mark.parametrize(
    ("dtype", "std"),
    [
        (torch.float32, 1.0),
        (torch.float32, 1e-3),
        (torch.bfloat16, 1.0),
        (torch.bfloat16, 1e-3),
    ],
    ids=["fp32-std1", "fp32-std1e-3", "bf16-std1", "bf16-std1e-3"],
)


def every_backend(op: str) -> pytest.MarkDecorator:
    """Parametrise `backend` over the implementations the op has; `forced` skips those that
    cannot run here, with their own reason."""
    return pytest.mark.parametrize("backend", [*(b.name for b in OPS[op].backends), "reference"])


@contextmanager
def forced(op: str, backend: str) -> Iterator[None]:
    with pixeldiff.backend(**{op: backend}):
        try:
            yield
        except NotImplementedError as refusal:
            if backend == "reference":
                raise
            pytest.skip(str(refusal))


class Draw:
    """Standard normals of one seed, in one dtype: draw(2, 3) has std 1, draw(2, 3, std=s) has s."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * std).to(self.dtype)


def f64(*tensors: Tensor) -> Any:
    """The same values as fp64 numpy arrays."""
    arrays = [t.detach().double().numpy() for t in tensors]
    return arrays[0] if len(arrays) == 1 else arrays


def rms(x: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) over the last axis."""
    return x / np.sqrt(np.einsum("...d,...d->...", x, x)[..., None] / x.shape[-1] + eps)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def assert_bitwise(y: Tensor, want: Tensor) -> None:
    assert y.shape == want.shape
    assert y.dtype == want.dtype
    if y.dtype == torch.float8_e4m3fn:  # which PyTorch does not compare
        y, want = y.view(torch.uint8), want.view(torch.uint8)
    assert torch.equal(y, want)


def results(returned: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a call returned, as a tuple."""
    return returned if isinstance(returned, tuple) else (returned,)


def assert_one_rounding(y: Tensor, oracle: np.ndarray, dtype: torch.dtype | None = None) -> None:
    """`dtype` is the one whose rounding is allowed, by default that of y."""
    assert tuple(y.shape) == oracle.shape
    if y.numel() == 0:
        return
    error = np.abs(f64(y) - oracle)
    budget = torch.finfo(dtype or y.dtype).eps * np.abs(oracle) + _slack(oracle)
    worst = np.nanmax(error / budget)
    assert (error <= budget).all(), f"error is {worst:.3g} times its budget"


def assert_within_twice_eager(y: Tensor, eager: Tensor, oracle: np.ndarray) -> None:
    assert tuple(y.shape) == tuple(eager.shape) == oracle.shape
    if y.numel() == 0:
        return
    error, baseline = (np.abs(f64(t) - oracle).max() for t in (y, eager))
    budget = 2 * baseline + _slack(oracle)
    assert error <= budget, f"error {error:.3g}, eager's {baseline:.3g}, budget {budget:.3g}"


def assert_within_twice_eager_or_spacing(y: Tensor, eager: Tensor, oracle: np.ndarray) -> None:
    """As `assert_within_twice_eager`, but never less than the spacing of the largest result.

    For odd shapes: of a handful of results eager now and then rounds each to the right side.
    """
    assert tuple(y.shape) == oracle.shape
    if not oracle.size:
        return
    error, baseline = (np.abs(f64(t) - oracle).max() for t in (y, eager))
    spacing = torch.finfo(y.dtype).eps * np.abs(oracle).max()
    budget = max(2 * baseline, spacing) + _slack(oracle)
    assert error <= budget, f"error {error:.3g}, eager's {baseline:.3g}, spacing {spacing:.3g}"


def _slack(oracle: np.ndarray) -> float:
    return 4 * EPS32 * np.abs(oracle).max()


def check_registered(op: str, fn: Callable[..., Any], *args: Any) -> None:
    """opcheck of the registered op, with exactly the arguments the public function gives it."""
    recorded: list[tuple[Any, ...]] = []
    qualified = getattr(torch.ops.pixeldiff, op).default

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is qualified:
                recorded.append(args)
            return func(*args, **(kwargs or {}))

    with Record():
        fn(*args)
    assert len(recorded) == 1, f"one public call made {len(recorded)} calls of {op}"
    torch.library.opcheck(qualified, recorded[0])


def check_compiles(op: str, fn: Callable[..., Tensor], *calls: tuple[Any, ...]) -> None:
    """The public function under fullgraph compile, free choice, one call per size.

    The compiled callable must hold the registered op itself, return what eager returns bit for
    bit, and keep doing so when the sizes change.
    """
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(fn, fullgraph=True, backend=keep)
    for args in calls:
        assert_bitwise(compiled(*args), fn(*args))
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert f"pixeldiff.{op}.default" in targets, f"{op} is not in the compiled graph: {targets}"


def check_compiled_like_eager(
    fn: Callable[..., Any], *calls: tuple[Any, ...], **keywords: Any
) -> None:
    """The public function, traced whole with its fake results, returns eager's bits at every size.

    The keywords are those of every call.
    """
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for args in calls:
        got, want = compiled(*args, **keywords), fn(*args, **keywords)
        for y, expected in zip(results(got), results(want), strict=True):
            assert_bitwise(y, expected)


def check_meta(fn: Callable[..., Tensor], *args: Any) -> None:
    """On the meta device: shape and dtype of the real result, contiguous."""
    real = fn(*args)
    meta = fn(*(_to_meta(a) for a in args))
    assert meta.device.type == "meta"
    assert (meta.shape, meta.dtype) == (real.shape, real.dtype)
    assert meta.is_contiguous()
    assert real.is_contiguous()


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple):
        return tuple(_to_meta(v) for v in value)
    return value


def check_repeatable(fn: Callable[..., Any], *args: Any) -> None:
    """Two runs bitwise equal, and no argument changed in place."""
    before = [a.clone() for a in args if isinstance(a, Tensor)]
    first, second = results(fn(*args)), results(fn(*args))
    for y, want in zip(second, first, strict=True):
        assert_bitwise(y, want)
    for was, now in zip(before, [a for a in args if isinstance(a, Tensor)], strict=True):
        assert_bitwise(now, was)


def check_captures(launch: Callable[..., Any], *args: Any) -> None:
    """A CUDA graph of the launch gives, when replayed, the launch's own bits."""
    want = launch(*args)  # and compiles, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = launch(*args)
    pairs = list(zip(results(got), results(want), strict=True))
    for y, _ in pairs:
        y.zero_()
    graph.replay()
    for y, expected in pairs:
        assert_bitwise(y, expected)


def check_gradients(fn: Callable[..., Tensor], *args: Tensor) -> None:
    """gradcheck in fp64, with respect to every argument."""
    args = tuple(a.detach().double().requires_grad_() for a in args)
    assert torch.autograd.gradcheck(fn, args)


def at_odd_stride(t: Tensor) -> Tensor:
    """The same values as a view whose rows are not adjacent and whose last axis is."""
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 5), float("nan"))
    view = wide[..., 2 : 2 + t.shape[-1]]
    view.copy_(t)
    return view
