"""The least work of every op: bytes that must move and FLOPs that must be done, from its arguments.

One entry an op. Bytes: every value of the arguments that the result depends on is read once, every
value of the result is written once. FLOPs: a multiply-add is two; elementwise functions count by
their multiplies and adds, an exponential or a root as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pixeldiff.ops.registry import OPS

ONE_ROUNDING, TWICE_EAGER, HALF_SPACING = "one rounding", "twice eager", "half an e4m3 spacing"
Args = tuple[Any, ...]


@dataclass(frozen=True)
class Work:
    """What one op costs at least, and how its result is judged.

    Args:
        bytes, flops: of a call, from its arguments in schema order.
        rule: which of the error rules of tests/kernels/rules.py holds for it. By HALF_SPACING the
            last two results are e4m3 values and the scales of their rows (e4m3_rules.py), judged
            multiplied out; by which rule the others are, `rest` says.
        token_axes: argument -> its axis of independent rows, `out_axis` the result's. Where given,
            the fp64 oracle is evaluated for a selection of rows: all of them would not fit.
        oracle: (fp64 arguments, fp64 result) -> what the result should be; default: the op's
            reference in fp64.
        speed: how many times the products of the dtype of the call its products may be as fast.
    """

    bytes: Callable[[Args], int]
    flops: Callable[[Args], int]
    rule: str
    token_axes: Mapping[int, int] = field(default_factory=dict)
    out_axis: int = 0
    oracle: Callable[[Args, Any], Any] | None = None
    speed: float = 1.0
    rest: str = ONE_ROUNDING


def size(*values: Any) -> int:
    """Bytes of the tensors among `values`."""
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def _image_bytes(args: Args) -> int:  # pixel_embed: q is (H*W, p) in the dtype of the weight
    x, weight = args[:2]
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return size(*args) + pixels * weight.shape[0] * weight.element_size()


def _head_bytes(args: Args) -> int:  # v is fp32 whatever q is
    q, weight = args[0], args[2]
    return size(*args) + 4 * weight.shape[0] * q.shape[0] * q.shape[1]


def _compress_bytes(args: Args) -> int:
    q, u, ada_weight, ada_bias, norm_weight, weight, bias, _ = args
    read = size(q, u, norm_weight, weight, bias) + size(ada_weight, ada_bias) * 2 // 6
    return read + q.shape[0] * weight.shape[0] * q.element_size()


def _mlp_bytes(args: Args) -> int:
    q, ada = args[0], args[5:7]
    return size(*args) - size(*ada) * 2 // 6 + size(q)


def _compress_flops(args: Args) -> int:
    q, u, weight = args[0], args[1], args[5]
    return 2 * q.numel() * (2 * u.shape[1] + weight.shape[0])


def _mlp_flops(args: Args) -> int:
    q, u, attn, fc1 = args[0], args[1], args[2], args[8]
    return 2 * q.numel() * (4 * u.shape[1] + attn.shape[1] + 2 * fc1.shape[0])


def _down_outputs(args: Args) -> int:  # the skip, and the pooled quarter of it
    x, weight, _ = args
    values = weight.shape[0] * x.shape[0] * x.shape[1] * x.shape[2]
    return (values + values // 4) * weight.element_size()


def _up_bytes(args: Args) -> int:
    x, skip, weight = args[0], args[1], args[4]
    out = x.shape[0] * skip.shape[1] * skip.shape[2] * weight.shape[0]
    return size(*args) + out * x.element_size()


def _up_flops(args: Args) -> int:
    # Of the nine taps that meet the doubled rows, those that meet the same value are one: four.
    x, skip, up_weight, _, weight, _ = args
    pixels, (up, channels), out = (
        skip.shape[1] * skip.shape[2],
        up_weight.shape[:2],
        weight.shape[0],
    )
    first, second = 8 * channels * up, 18 * up * out
    return pixels * (x.shape[0] * (first + second) + skip.shape[0] * 18 * skip.shape[3] * out)


def _pixels_bytes(args: Args) -> int:
    x, weight, guidance = args[0], args[1], args[3]
    pixels = x.shape[0] * x.shape[1] * x.shape[2] // (1 if guidance is None else 2)
    return size(*args) + 4 * pixels * weight.shape[0]


def _pixels_flops(args: Args) -> int:
    x, weight, guidance = args[0], args[1], args[3]
    mixed, mix = (x.numel(), 0) if guidance is None else (x.numel() // 2, 3)
    return mixed * (2 * weight.shape[0] + mix)


def _qk_channels(args: Args) -> int:
    return sum(t.numel() for t in (args[0], args[5]) if t is not None) * 2 // 3


def _projection_streams(args: Args) -> list[tuple[Tensor, Tensor]]:  # x and weight of each
    return [(args[i], args[i + 1]) for i in (0, 6) if args[i] is not None]


def _projection_bytes(args: Args) -> int:
    out = sum(x.numel() // x.shape[2] * w.shape[0] for x, w in _projection_streams(args))
    return size(*args) + out * args[0].element_size()


def _projection_flops(args: Args) -> int:  # the products, and 7 a channel of q and k
    return sum(
        x.numel() // x.shape[2] * (2 * w.numel() + 7 * w.shape[0] * 2 // 3)
        for x, w in _projection_streams(args)
    )


def _attention_bytes(args: Args) -> int:
    q, k, v, _, key_mask, return_lse = args
    lse = 4 * q.shape[0] * q.shape[1] * q.shape[2] if return_lse else 0
    return 2 * size(q) + size(k, v, key_mask) + lse


def _attention_flops(args: Args) -> int:  # of all keys: a mask's are not counted on the device
    q, k = args[:2]
    return 4 * q.numel() * k.shape[1]


def _gate_flops(args: Args) -> int:
    x, weight = args[0], args[2]
    return 2 * x.numel() * weight.shape[0] + 6 * x.numel()


def _residual_oracle(args: Args, result: Any) -> Any:
    # The norm is defined on the residual as stored, so its oracle starts from the result's own.
    x, y, gate, weight, scale, shift, eps = args
    norm = OPS["rms_norm_modulate"].reference(result[0], weight, scale, shift, eps)
    return x + gate[:, None] * y, norm


def _row_bytes(x: Tensor) -> int:
    """e4m3 values of the shape of x, and a fp32 scale for each row."""
    return x.numel() + 4 * (x.numel() // x.shape[-1])


def _plain(op: str) -> Callable[[Args, Any], Any]:
    return lambda args, _: OPS[op].reference(*args)


def _linear_bytes(args: Args) -> int:
    x, weight, out_dtype = args[0], args[2], args[5]
    return size(*args) + x.numel() // x.shape[-1] * weight.shape[0] * out_dtype.itemsize


def _gate_norm_oracle(args: Args, result: Any) -> Any:
    # As above, but of the gate.
    *gate, norm_weight, scale, shift, eps = args
    norm = OPS["rms_norm_modulate"].reference(result[0], norm_weight, scale, shift, eps)
    return OPS["sigma_gate"].reference(*gate), norm


WORK: dict[str, Work] = {
    "rms_norm": Work(
        bytes=lambda a: 2 * size(a[0]) + size(a[1]),
        flops=lambda a: 4 * a[0].numel(),
        rule=TWICE_EAGER,  # it rounds twice by definition
    ),
    "rms_norm_modulate": Work(
        bytes=lambda a: 2 * size(a[0]) + size(*a[1:]),
        flops=lambda a: 5 * a[0].numel(),
        rule=ONE_ROUNDING,
    ),
    "gated_residual_norm": Work(
        bytes=lambda a: 4 * size(a[0]) + size(*a[2:]),
        flops=lambda a: 7 * a[0].numel(),
        rule=ONE_ROUNDING,
        oracle=_residual_oracle,
    ),
    "quantize_rows": Work(
        bytes=lambda a: size(a[0]) + _row_bytes(a[0]),
        flops=lambda a: 2 * a[0].numel(),
        rule=HALF_SPACING,
        oracle=lambda args, _: args[0],
    ),
    "rms_norm_modulate_fp8": Work(
        bytes=lambda a: size(*a) + _row_bytes(a[0]),
        flops=lambda a: 7 * a[0].numel(),
        rule=HALF_SPACING,
        oracle=_plain("rms_norm_modulate"),
    ),
    "gated_residual_norm_fp8": Work(
        bytes=lambda a: size(*a) + size(a[0]) + _row_bytes(a[0]),
        flops=lambda a: 9 * a[0].numel(),
        rule=HALF_SPACING,
        oracle=_residual_oracle,
    ),
    "swiglu_fp8": Work(
        bytes=lambda a: size(*a) + _row_bytes(a[0]),
        flops=lambda a: 7 * a[0].numel(),
        rule=HALF_SPACING,
        oracle=_plain("swiglu"),
    ),
    "fp8_linear": Work(
        bytes=_linear_bytes,
        flops=lambda a: 2 * a[0].numel() * a[2].shape[0],
        rule=TWICE_EAGER,
        token_axes={0: 1, 1: 1},
        out_axis=1,
        speed=2.0,
    ),
    "gated_norm_residual": Work(
        bytes=lambda a: 3 * size(a[0]) + size(*a[2:]),
        flops=lambda a: 6 * a[0].numel(),
        rule=ONE_ROUNDING,
    ),
    "qk_norm_rope": Work(
        bytes=lambda a: size(a[0], a[5]) + size(*a),
        flops=lambda a: 7 * _qk_channels(a),
        rule=ONE_ROUNDING,
    ),
    "qkv_norm_rope": Work(bytes=_projection_bytes, flops=_projection_flops, rule=TWICE_EAGER),
    "joint_attention": Work(
        bytes=_attention_bytes,
        flops=_attention_flops,
        rule=TWICE_EAGER,
        token_axes={0: 1},
        out_axis=1,
    ),
    "joint_attention_fp8": Work(
        bytes=lambda a: 2 * size(a[0]) + size(a[1], a[2]),
        flops=_attention_flops,
        rule=TWICE_EAGER,  # eager rounds to e4m3 as it does; both are held against no rounding
        token_axes={0: 1},
        out_axis=1,
        oracle=lambda a, result: OPS["joint_attention"].reference(*a, None, False)[0],
    ),
    "swiglu": Work(
        bytes=lambda a: 3 * size(a[0]), flops=lambda a: 5 * a[0].numel(), rule=ONE_ROUNDING
    ),
    "add_silu": Work(
        bytes=lambda a: 2 * size(a[0]) + size(a[1]),
        flops=lambda a: 5 * a[0].numel(),
        rule=ONE_ROUNDING,
    ),
    "sigma_gate": Work(bytes=lambda a: size(*a) + size(a[0]), flops=_gate_flops, rule=TWICE_EAGER),
    "sigma_gate_norm": Work(
        bytes=lambda a: size(*a) + 2 * size(a[0]),
        flops=lambda a: _gate_flops(a) + 5 * a[0].numel(),
        rule=TWICE_EAGER,
        oracle=_gate_norm_oracle,
    ),
    "sigma_gate_norm_fp8": Work(
        bytes=lambda a: size(*a) + size(a[0]) + _row_bytes(a[0]),
        flops=lambda a: _gate_flops(a) + 7 * a[0].numel(),
        rule=HALF_SPACING,
        rest=TWICE_EAGER,
        oracle=_gate_norm_oracle,
    ),
    "local_decoder_down": Work(
        bytes=lambda a: size(*a) + _down_outputs(a),
        flops=lambda a: 18 * a[0].numel() * a[1].shape[0],
        rule=TWICE_EAGER,
    ),
    "local_decoder_pixels": Work(bytes=_pixels_bytes, flops=_pixels_flops, rule=TWICE_EAGER),
    "local_decoder_up": Work(bytes=_up_bytes, flops=_up_flops, rule=TWICE_EAGER),
    "pixel_embed": Work(
        bytes=_image_bytes,
        flops=lambda a: (2 * a[1].shape[1] + 2) * a[1].shape[0] * (a[0].numel() // a[0].shape[1]),
        rule=ONE_ROUNDING,
    ),
    "pixel_adaln_compress": Work(
        bytes=_compress_bytes, flops=_compress_flops, rule=TWICE_EAGER, token_axes={0: 0, 1: 0}
    ),
    "pixel_adaln_mlp": Work(
        bytes=_mlp_bytes, flops=_mlp_flops, rule=TWICE_EAGER, token_axes={0: 0, 1: 0, 2: 0}
    ),
    "pixel_head_step": Work(
        bytes=lambda a: size(*a) + (2 if a[11] else 1) * size(a[4]),  # a[11]: x0 is returned too
        flops=lambda a: (4 + 2 * a[2].shape[0]) * a[0].numel() + 6 * a[4].numel(),
        rule=TWICE_EAGER,  # it rounds after each of its operations, by definition
    ),
    "pixel_head": Work(
        bytes=_head_bytes,
        flops=lambda a: (4 + 2 * a[2].shape[0]) * a[0].numel(),
        rule=ONE_ROUNDING,
    ),
}
