"""The error of attention in e4m3 beside bf16's, and what the sums of Hopper's tensor cores add.

Those keep 14 bits of a sum of e4m3 products and cut off the rest (DeepSeek-V3, arXiv 2412.19437,
section 3.5.2), whether it is over 32 keys or all of them. Everything is held against attention in
fp64 of the same bf16 tensors; an error is the norm of the difference over that of the result.
`python -m bench attention-error` writes the figures of docs/kernels/attention.md as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pixeldiff.ops.joint_attention import reference as exact_attention
from pixeldiff.ops.joint_attention_fp8 import E4M3, ROWS, WEIGHT, quantized, reference
from pixeldiff.ops.joint_attention_fp8 import _by_blocks as quantized_keys
from pixeldiff.out_files import written_whole

from .machine import machine
from .schema import Machine

BITS = 14
CONTRACTION = 32  # keys or channels of one instruction
QUERIES = 16


@dataclass
class Error:
    """Of one kind of input; per unit of the result's norm."""

    inputs: str
    keys: int
    channels: int
    bf16: float
    e4m3: float  # sums in fp32
    each_step: float  # of 14 bits within 128 keys, fp32 between them: the CUDA kernel
    one_sum: float  # of 14 bits over all keys


@dataclass
class Report:
    machine: Machine
    command: str
    errors: list[Error]


def add_up(start: Tensor, products: Tensor) -> Tensor:
    """start + products.sum(-1) as the tensor cores make it: all moved to the largest exponent, and
    cut off after 14 bits."""
    terms = torch.cat((start[..., None], products), -1)
    exponent = torch.frexp(terms.abs().amax(-1, keepdim=True)).exponent
    return torch.ldexp(torch.ldexp(terms, BITS - exponent).trunc(), exponent - BITS).sum(-1)


def multiply(a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
    """start + a b^T with sums of 14 bits. a (..., M, K), b (..., N, K), e4m3 values in fp32."""
    short = -a.shape[-1] % CONTRACTION
    a, b = (torch.nn.functional.pad(t, (0, short)) for t in (a, b))
    total = a.new_zeros(*a.shape[:-1], b.shape[-2]) if start is None else start
    for k in range(0, a.shape[-1], CONTRACTION):
        part = slice(k, k + CONTRACTION)
        total = add_up(total, a[..., :, None, part] * b[..., None, :, part])
    return total


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *, one_sum: bool = False) -> Tensor:
    """joint_attention_fp8 with sums of 14 bits: of a step's 128 keys, or with `one_sum` of all.

    Shapes: (B, L, G, d), (B, S, G, d) twice; any float dtype. Returns fp32.
    """
    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
    q8, q_scale = quantized(q, (3,))
    k8, k_scale = quantized_keys(k - k.mean(2, keepdim=True))
    v8, v_scale = quantized(v, (2,))
    most = torch.full_like(q_scale, -torch.inf)
    total, o = torch.zeros_like(q_scale), torch.zeros_like(q8)
    for start in range(0, k8.shape[2], ROWS):
        block = slice(start, start + ROWS)
        logits = multiply(q8, k8[:, :, block]) * (q_scale * scale * k_scale[:, :, None, block])
        now = torch.maximum(most, logits.amax(-1, keepdim=True))
        weights = (logits - now).exp() * WEIGHT
        factor = (most - now).exp()
        total = total * factor + weights.sum(-1, keepdim=True)
        weights, values = weights.to(E4M3).float(), v8[:, :, block].transpose(2, 3)
        if one_sum:
            o = multiply(weights, values, o * factor)
        else:
            o = o * factor + multiply(weights, values)
        most = now
    return (o / total * v_scale).transpose(1, 2)


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def _normal(keys: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    def draw(rows: int) -> Tensor:
        return torch.randn(1, rows, 1, d, generator=generator)

    return draw(QUERIES), draw(keys), draw(keys)


def _with_means(keys: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values around a mean of their own in every channel."""
    q, k, v = _normal(keys, d, generator)
    return q, k + 3 * torch.randn(d, generator=generator), v + torch.randn(d, generator=generator)


def _sharp(keys: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of standard deviation 4: a few keys have most of the weight."""
    q, k, v = _normal(keys, d, generator)
    return 4 * q, k, v


def _outliers(keys: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Four channels of q and k eight times as large, in the same logits."""
    q, k, v = _normal(keys, d, generator)
    wide = torch.ones(d)
    wide[:: d // 4] = 8
    return q * wide * math.sqrt(1 / wide.pow(4).mean().item()), k * wide, v


INPUTS: dict[str, Callable] = {
    "normal": _normal,
    "around means": _with_means,
    "sharp": _sharp,
    "outlying channels": _outliers,
}
SHAPES = ((16684, 64), (16384, 72), (65836, 64), (4224, 128))  # of the released networks


def cases(divide: int = 1) -> Iterator[Error]:
    """Errors of 16 queries of one head; `divide` makes the keys fewer."""
    for keys, d in SHAPES:
        for name, make in INPUTS.items():
            if (keys, d) != SHAPES[0] and name != "normal":
                continue
            generator = torch.Generator().manual_seed(0)
            args = tuple(t.bfloat16() for t in make(keys // divide, d, generator))
            scale = d**-0.5
            want = exact_attention(*(t.double() for t in args), scale, None, False)[0]
            wide = tuple(t.float() for t in args)
            yield Error(
                *(name, keys // divide, d),
                bf16=distance(exact_attention(*args, scale, None, False)[0], want),
                e4m3=distance(reference(*wide, scale), want),
                each_step=distance(attention(*wide, scale), want),
                one_sum=distance(attention(*wide, scale, one_sum=True), want),
            )


def measure(command: str, divide: int = 1) -> Report:
    return Report(machine(torch.device("cpu")), command, list(cases(divide)))


def table(report: Report) -> str:
    """As docs/kernels/attention.md has it."""
    lines = [
        "| inputs | keys | channels | bf16 | e4m3, fp32 sums | 14 bits a step | 14 bits in all |",
        "|" + "---|" * 7,
    ]
    for e in report.errors:
        shares = (f"{100 * x:.2g} %" for x in (e.bf16, e.e4m3, e.each_step, e.one_sum))
        lines.append(f"| {e.inputs} | {e.keys} | {e.channels} | " + " | ".join(shares) + " |")
    return "\n".join(lines) + "\n"


def save(report: Report, path: Path) -> None:
    with written_whole([path]) as (partial,):
        partial.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")


def load(path: Path) -> Report:
    data = json.loads(path.read_text())
    errors = [Error(**e) for e in data["errors"]]
    return Report(Machine(**data["machine"]), data["command"], errors)
