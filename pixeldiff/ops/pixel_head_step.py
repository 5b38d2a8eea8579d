"""pixel_head_step: pixel_head and the student sampler's update, from tokens to the next state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import check_device, check_float, check_shape
from .pixel_head import check as check_head
from .pixel_head import reference as head
from .registry import Backend, define

SAMPLE_TYPES = ("sde", "ode")
PREDICTION_TYPES = ("velocity", "x0")
MIN_TIME = 0.05  # floor of t where an x0-predicting network's velocity divides by it

BACKENDS = (
    Backend("triton", "pixeldiff.triton_kernels.pixel_head_step"),
    Backend("cpu", "pixeldiff.ops.cpu.pixel_head_step"),
)


def update(
    x: Tensor,
    out: Tensor,
    noise: Tensor | None,
    t: float,
    t_next: float,
    *,
    sample_type: str = "sde",
    prediction_type: str = "velocity",
    state_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The student's step from t to t_next, given the network's output: (x_next, x0).

        x0 = x - t v
        x_next = (1 - t') x0 + t' noise  (SDE)  or  x + (t' - t) v  (ODE);  x0 itself at t' = 0

    x0 (and v, where the network predicts x0) is computed in state_dtype and rounded to x's.
    """
    x0 = out
    if prediction_type == "velocity":
        x0 = _by_plane(lambda a, b: a - t * b, x, out, state_dtype)
    if t_next == 0:
        return x0, x0
    if sample_type == "sde":
        return (1 - t_next) * x0 + t_next * noise, x0
    if prediction_type == "x0":
        # A tensor, because PyTorch on CUDA multiplies by the reciprocal of a Python divisor.
        divisor = torch.full((), max(t, MIN_TIME), dtype=state_dtype, device=x.device)
        out = _by_plane(lambda a, b: (a - b) / divisor, x, x0, state_dtype)
    return x + (t_next - t) * out, x0


def _by_plane(f: Callable[..., Tensor], a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    # One colour plane at a time, so that the wide copies are a third of the image each.
    out = torch.empty_like(a)
    for c in range(a.shape[1]):
        out[:, c] = f(a[:, c].to(dtype), b[:, c].to(dtype))
    return out


def reference(
    q, norm_weight, weight, bias, x, noise, t, t_next, ode, predicts_x0, fp64_state, want_x0,
    patch, eps,
):  # fmt: skip
    v = head(q, norm_weight, weight, bias, *x.shape[2:], patch, eps)
    x_next, x0 = update(
        x,
        v,
        noise,
        t,
        t_next,
        sample_type="ode" if ode else "sde",
        prediction_type="x0" if predicts_x0 else "velocity",
        state_dtype=torch.float64 if fp64_state else torch.float32,
    )
    if not want_x0:
        return x_next, x.new_empty(0)
    return x_next, x0.clone() if x0 is x_next else x0  # an op's results must not share memory


def _fake(
    q, norm_weight, weight, bias, x, noise, t, t_next, ode, predicts_x0, fp64_state, want_x0,
    patch, eps,
):  # fmt: skip
    return x.new_empty(x.shape), x.new_empty(x.shape if want_x0 else 0)


_op = define(
    "pixel_head_step",
    "(Tensor q, Tensor norm_weight, Tensor weight, Tensor bias, Tensor x, Tensor? noise, float t,"
    " float t_next, bool ode, bool predicts_x0, bool fp64_state, bool want_x0, int patch,"
    " float eps) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=BACKENDS,
)


def pixel_head_step(
    q: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    noise: Tensor | None,
    *,
    t: float,
    t_next: float,
    patch: int,
    sample_type: str = "sde",
    prediction_type: str = "velocity",
    state_dtype: torch.dtype = torch.float64,
    want_x0: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """Project the pixel stream to the network's output and move the sampler's state by it.

        v = pixel_head(q)
        x0 = x - t v
        x_next = (1 - t') x0 + t' noise  (SDE)  or  x + (t' - t) v  (ODE);  x0 itself at t' = 0

    Shapes: B images of C x H x W, P pixels a side of a patch, N = H/P * W/P, p channels.

    Args:
        q, norm_weight, weight, bias, patch, eps: as for `pixel_head`.
        x: (B, C, H, W) fp32, the state at time t.
        noise: as x, fresh standard normals of an SDE step; None in an ODE and where t_next is 0.
        t, t_next: diffusion times, t > t_next >= 0.
        sample_type: "sde" or "ode".
        prediction_type: what the head's output is, "velocity" or "x0". An ODE step then takes
            v = (x - x0) / max(t, 0.05).
        state_dtype: of the arithmetic of x0 and of that v, fp64 or fp32.
        want_x0: whether to return x0.

    Returns:
        (x_next, x0), each (B, C, H, W) fp32, contiguous; x0 is None unless wanted. Given the same
        output of `pixel_head` they are bitwise what `update` computes: every operation rounds by
        itself.

    Raises:
        ValueError: shape, a missing noise, an unknown type. TypeError: dtype.

    Backends: triton, cpu (both fp32, bf16, fp16), reference. Gradients: through the reference.
    Cost: B*H*W*(p*sizeof(q) + 4*C*(2 + noise + x0)) bytes; bandwidth-bound.
    Source: PiD (arXiv 2605.23902), final layer and the student's sampler.
    """
    op = "pixel_head_step"
    check_float(op, q=q, norm_weight=norm_weight, weight=weight, bias=bias, x=x, noise=noise)
    for name, value, choices in (
        ("sample_type", sample_type, SAMPLE_TYPES),
        ("prediction_type", prediction_type, PREDICTION_TYPES),
        ("state_dtype", state_dtype, (torch.float64, torch.float32)),
    ):
        if value not in choices:
            raise ValueError(f"{op}: {name} must be one of {choices}, got {value!r}")
    if x.dim() != 4 or x.shape[1] != weight.shape[0]:
        raise ValueError(
            f"{op}: x must be (B, {weight.shape[0]}, H, W) for this head, got {tuple(x.shape)}"
        )
    check_head(op, q, norm_weight, weight, bias, tuple(x.shape[2:]), patch)
    images = q.shape[0] * patch * patch // (x.shape[2] * x.shape[3])
    check_shape(op, "x", x, "(B, C, H, W)", (images, *x.shape[1:]))
    if sample_type == "sde" and t_next != 0:
        if noise is None:
            raise ValueError(f"{op}: noise must be given in an SDE step to t_next = {t_next}")
        check_shape(op, "noise", noise, "(B, C, H, W)", tuple(x.shape))
    else:
        noise = None
    check_device(op, q, x=x, noise=noise)
    ode, predicts_x0 = sample_type == "ode", prediction_type == "x0"
    x_next, x0 = _op(
        q, norm_weight, weight, bias, x, noise, t, t_next, ode, predicts_x0,
        state_dtype == torch.float64, want_x0, patch, eps,
    )  # fmt: skip
    return x_next, x0 if want_x0 else None
