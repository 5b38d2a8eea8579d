"""The errors of bf16 and fp8 in the demo network: layer by layer, and in its pictures.

Everything is held against the same network in fp32. Layers are given the inputs they have in a
real decode. `python -m bench precision` writes the raw figures as JSON and docs/precision.md.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pixeldiff.models.fp8 import Fp8Linear, Rows, quantize_
from pixeldiff.models.pid import PiDConfig
from pixeldiff.models.pid.decoder import PiDDecoder
from pixeldiff.models.pid.mmdit_block import MMDiTBlock
from pixeldiff.models.pid.network import PiDNet
from pixeldiff.models.pid.positions import rope_1d, rope_2d
from pixeldiff.models.pid.residual import Stream
from pixeldiff.models.pid.samplers import network_time, student_times
from pixeldiff.out_files import written_whole
from pixeldiff.sources import demo_autoencoder

from .machine import machine
from .models import fill
from .schema import Machine

VERSION = 1
LOW = ("bf16", "fp8")
# Layers quantised alone, by module name: what each costs. The last is all of them.
PARTS = {
    "image, attention": ("patch_blocks.*_x",),
    "image, feed-forward": ("patch_blocks.*.mlp_x.*",),
    "text": ("patch_blocks.*_y", "patch_blocks.*.mlp_y.*"),
    "pixel blocks, attention": ("pixel_blocks.*",),
    "all": ("*",),
}
TOKENS, TEXT = (16, 16), 32  # of the block at released width


@dataclass
class Error:
    """Of one layer or block: the root mean square of the error over that of the fp32 result."""

    name: str
    bf16: float
    fp8: float


@dataclass
class Picture:
    """One held-out picture: dB of its decodes against the original, and against the fp32 decode."""

    name: str
    group: str
    size: str
    original: dict[str, float]  # by precision
    fp32: dict[str, float]  # by precision, without fp32


@dataclass
class Report:
    machine: Machine
    command: str
    layers: list[Error] = field(default_factory=list)
    blocks: list[Error] = field(default_factory=list)
    released: list[Error] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)  # dB against fp32, mean
    bf16: float = math.nan  # the same of bf16 alone
    without: float = math.nan  # the same of bf16 with these layers' results set to zero
    pictures: list[Picture] = field(default_factory=list)
    weights: dict[str, int] = field(default_factory=dict)  # bytes by precision
    schema: int = VERSION


class Squares:
    """Sums of squares of results and of their errors, by name."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, name: str, result: Tensor, exact: Tensor) -> None:
        exact = exact.double()
        sums = self._sums.setdefault(name, [0.0, 0.0])
        sums[0] += (result.double() - exact).square().sum().item()
        sums[1] += exact.square().sum().item()

    def relative(self) -> dict[str, float]:
        return {name: math.sqrt(error / whole) for name, (error, whole) in self._sums.items()}


def errors(by_precision: Mapping[str, Squares]) -> list[Error]:
    found = {precision: squares.relative() for precision, squares in by_precision.items()}
    return [Error(name, *(found[p][name] for p in LOW)) for name in found[LOW[0]]]


@torch.no_grad()
def measure(device: torch.device, pictures: int, photographs: int, command: str) -> Report:
    """Everything, on held-out `pictures` of the generator and on `photographs`."""
    report = Report(machine(device), command)
    inputs = list(_inputs(device, pictures, photographs))
    decoders = {p: PiDDecoder.from_pretrained("demo", device=device, precision=p) for p in _ALL}
    report.weights = {p: _bytes(decoders[p].net) for p in _ALL}
    first = min(inputs, key=lambda i: i.latent.numel())
    nets = {p: copy.deepcopy(d.net) for p, d in decoders.items()}  # not packed: layers are called
    report.layers, report.blocks = in_a_decode(nets, decoders["fp32"], first)
    report.released = at_released_width(device)
    report.parts, report.bf16, report.without = parts(decoders, inputs[:2] + inputs[-2:])
    report.pictures = [_picture(decoders, i) for i in inputs]
    return report


_ALL = ("fp32", *LOW)


@dataclass(frozen=True)
class Input:
    name: str
    group: str
    original: np.ndarray  # (H, W, 3) uint8
    latent: Tensor
    caption: str


def _inputs(device: torch.device, pictures: int, photographs: int) -> Iterator[Input]:
    from training.evaluate import held_out, to_tensor
    from training.train_pid import low_quality

    encoder = demo_autoencoder()
    for name, group, original, caption in held_out(pictures)[: pictures + photographs]:
        # Rounded to bf16, as the latents are that the demo was trained on.
        latent = encoder.encode(low_quality(to_tensor(original))).bfloat16().float()
        yield Input(name, group, original, latent.to(device), caption)


# --- layers ---------------------------------------------------------------------------------------


def in_a_decode(
    nets: Mapping[str, PiDNet], decoder: PiDDecoder, given: Input
) -> tuple[list[Error], list[Error]]:
    """(layers, blocks): every step of one decode in fp32, and each layer and each network again on
    what that step was given."""
    names = fp8_names(nets["fp8"])
    layers, blocks = ({p: Squares() for p in LOW} for _ in range(2))
    condition = {p: _condition(net, decoder, given) for p, net in nets.items()}
    handles = [_judge(nets["fp32"].get_submodule(n), n, layers) for n in names]
    times = student_times(decoder.sampling.steps)
    shape = (1, 3, *condition["fp32"].size)
    generator = torch.Generator(decoder.device).manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, device=decoder.device)

    x = draw()
    for t, following in pairwise(times):
        tau = torch.tensor([network_time(t)], device=decoder.device)
        exact = _traced(nets["fp32"], x, tau, condition["fp32"])
        for p in LOW:
            for name, value in _traced(nets[p], x, tau, condition[p]).items():
                blocks[p].add(name, value, exact[name])
        x0 = x - t * exact["velocity"]
        x = (1 - following) * x0 + (following * draw() if following else 0)
    for handle in handles:
        handle.remove()
    return errors(layers), errors(blocks)


def fp8_names(module: nn.Module) -> list[str]:
    return [name for name, m in module.named_modules() if isinstance(m, Fp8Linear)]


def _condition(net: PiDNet, decoder: PiDDecoder, given: Input) -> Any:
    caption = decoder.encode_caption(given.caption).to(decoder.device)
    return net.prepare(given.latent, caption, size=given.original.shape[:2])


def _traced(net: PiDNet, x: Tensor, tau: Tensor, condition: Any) -> dict[str, Tensor]:
    kept = {}

    def trace(name: str, value: Tensor) -> None:
        if name.endswith((".x", ".y")) or name.startswith("pixel_blocks") or name == "s_cond":
            kept[name] = value.clone()  # the stream goes on in its memory

    kept["velocity"] = net.step(x, tau, condition, trace=trace)
    return kept


def _judge(layer: nn.Linear, name: str, into: Mapping[str, Squares]) -> Any:
    """Hold bf16 and fp8 copies of a fp32 layer against fp64, on whatever it is given."""
    low = Fp8Linear.of(layer)
    low.bias = None if low.bias is None else nn.Parameter(low.bias.bfloat16(), requires_grad=False)
    w, b = layer.weight, layer.bias
    half = (w.bfloat16(), None if b is None else b.bfloat16())

    def hook(_module: nn.Module, args: tuple[Tensor], _result: Tensor) -> None:
        (x,) = args
        exact = linear(x.double(), w.double(), None if b is None else b.double())
        into["bf16"].add(name, linear(x.bfloat16(), *half), exact)
        # As the fused ops do: the input is quantised from fp32, the result is bf16.
        rows = dataclasses.replace(Rows.of(x), dtype=torch.bfloat16)
        into["fp8"].add(name, low(rows), exact)

    return layer.register_forward_hook(hook)


def at_released_width(device: torch.device) -> list[Error]:
    """One MMDiT block of the released geometry, random weights, normal inputs: layers and block."""
    c = PiDConfig()
    block = MMDiTBlock(c.hidden_size, c.num_groups, c.ffn_size, device=device)
    fill(block, torch.float32)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(shape, generator=generator, device=device)

    x = draw(1, TOKENS[0] * TOKENS[1], c.hidden_size)
    y = draw(1, TEXT, c.hidden_size)
    mods = [draw(1, 6, c.hidden_size, std=0.5) for _ in range(2)]
    reference = (c.rope_ref_h // c.patch_size, c.rope_ref_w // c.patch_size)
    rope = rope_2d(TOKENS, c.head_dim, mode=c.rope_mode, reference=reference, device=device)
    txt_rope = rope_1d(TEXT, c.head_dim, theta=c.text_rope_theta, device=device)

    def run(block: MMDiTBlock, dtype: torch.dtype) -> dict[str, Tensor]:
        streams = Stream(x.to(dtype)), Stream(y.to(dtype))
        block(*streams, *(m.to(dtype) for m in mods), rope, txt_rope)
        # What the block adds: the stream itself is carried past every layer.
        return {n: s.x - v for n, s, v in zip(("image", "text"), streams, (x, y), strict=True)}

    nets = {"bf16": copy.deepcopy(block).bfloat16(), "fp8": copy.deepcopy(block).bfloat16()}
    quantize_(nets["fp8"], *_linears(block))
    squares = {p: Squares() for p in LOW}
    handles = [_judge(block.get_submodule(n), n, squares) for n in _linears(block)]
    exact = run(block, torch.float32)
    for handle in handles:
        handle.remove()
    for p, low in nets.items():
        for name, value in run(low, torch.bfloat16).items():
            squares[p].add(f"block, {name}", value, exact[name])
    return errors(squares)


def _linears(block: nn.Module) -> list[str]:
    """Linear layers of attention and feed-forward, as `PiDNet.quantize_` takes them."""
    return [
        n
        for n, m in block.named_modules()
        if isinstance(m, nn.Linear) and n.startswith(("attn.", "mlp_"))
    ]


# --- pictures -------------------------------------------------------------------------------------


def parts(
    decoders: Mapping[str, PiDDecoder], inputs: list[Input]
) -> tuple[dict[str, float], float, float]:
    """dB against the fp32 decode, mean over `inputs`: with only some layers in fp8, with none, and
    with what they add to the network taken away."""
    names = fp8_names(decoders["fp8"].net)
    exact = [_decode(decoders["fp32"], i) for i in inputs]

    def mean(decoder: PiDDecoder) -> float:
        pairs = zip(inputs, exact, strict=True)
        return float(np.mean([psnr(_decode(decoder, i), e) for i, e in pairs]))

    def in_bf16() -> PiDDecoder:
        device = decoders["bf16"].device
        return PiDDecoder.from_pretrained("demo", device=device, precision="bf16")

    found = {}
    for part, patterns in PARTS.items():
        some = in_bf16()
        quantize_(some.net, *(n for n in names if any(fnmatch(n, p) for p in patterns)))
        found[part] = mean(some)
    without = in_bf16()
    for name in names:
        if fnmatch(name, "*.proj*") or name.endswith(".w2"):  # the last layer of each branch
            for parameter in without.net.get_submodule(name).parameters():
                parameter.zero_()
    return found, mean(decoders["bf16"]), mean(without)


def _decode(decoder: PiDDecoder, given: Input) -> Tensor:
    return decoder.decode(given.latent, caption=given.caption, seed=0, output="pt").images.cpu()


def _picture(decoders: Mapping[str, PiDDecoder], given: Input) -> Picture:
    from training.evaluate import to_tensor

    original, height, width = to_tensor(given.original), *given.original.shape[:2]
    images = {p: _decode(d, given) for p, d in decoders.items()}
    return Picture(
        given.name,
        given.group,
        f"{width}x{height}",
        original={p: psnr(image, original) for p, image in images.items()},
        fp32={p: psnr(images[p], images["fp32"]) for p in LOW},
    )


def psnr(image: Tensor, want: Tensor) -> float:
    """dB of images in [-1, 1]."""
    return 10 * math.log10(4 / (image.double() - want.double()).square().mean().item())


def _bytes(net: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in net.parameters())


# --- files ----------------------------------------------------------------------------------------


def save(report: Report, path: Path) -> None:
    with written_whole([path]) as (partial,):
        partial.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")


def load(path: Path) -> Report:
    """Raises ValueError: not a report of this version."""
    data = json.loads(path.read_text())
    if data.get("schema") != VERSION or "pictures" not in data:
        raise ValueError(f"{path} is no precision report of schema {VERSION}")
    made: dict[str, Callable[..., Any]] = {
        "layers": Error,
        "blocks": Error,
        "released": Error,
        "pictures": Picture,
    }
    for name, kind in made.items():
        data[name] = [kind(**row) for row in data[name]]
    return Report(**{**data, "machine": Machine(**data["machine"])})
