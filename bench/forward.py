"""One L2P network call: pixeldiff with CUDA graphs and without, plain PyTorch eager and compiled,
and the latent transformer that the network was converted from at the same output size.

All in one process, as the networks are large: the pixel variants share their weights. Each is
called alone first, which gives its peak of memory; then they take turns.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import pixeldiff
from pixeldiff.models.devices import PRECISIONS
from pixeldiff.models.graphs import Graphs
from pixeldiff.models.l2p import VARIANTS, L2PConfig, L2PNet
from pixeldiff.models.l2p.bands import DECODER_MEMORY
from pixeldiff.models.l2p.config import DECODERS, SEQ_MULTIPLE
from pixeldiff.models.l2p.graphs import Trajectory
from pixeldiff.models.l2p.sampler import Prediction, Steps, guided

from . import models
from .decode import compare
from .machine import machine
from .memory import Meter
from .schema import Memory, Rates, Row
from .timing import Candidate, Clock, Rotation, clock_for, first_call, interleave

FIRST, SOURCE = "pixeldiff", "source"
CHOICES = (FIRST, "pixeldiff-no-graphs", "reference", "compile", SOURCE)
VAE_CELL = 8  # pixels along a side of a cell of the source's latent
SCALE = 4.0
# A network of the released form that a CPU runs in a moment: (side of its images, geometry).
_WIDTHS = {16: 4, 32: 8, 64: 8, 128: 16, 256: 16, 512: 32}
_TINY = L2PConfig(
    dim=192,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=2,
    cap_feat_dim=64,
    axes_dims=(32, 32, 32),
    local_decoder=DECODERS["1k"].with_widths(_WIDTHS),
)
NETWORKS: dict[str, tuple[int, L2PConfig]] = {
    "tiny": (128, _TINY),
    **{v.name: (v.native_size, v.config) for v in VARIANTS.values() if v.config.local_decoder},
}
# Relative RMS difference from the reference's result beyond which a time is of something else.
NEAR = {"fp32": 1e-3, "bf16": 0.1}


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        config: of `NETWORKS`. side: pixels of the square image; 0 is the network's own.
        variants: of `CHOICES`; "pixeldiff" comes first whether named or not.
        guided: both branches of guidance in one call.
        caption: tokens of each caption.
        decoder_memory: see `L2PNet.decoded`.
        rounds: samples of each, at least 3. seconds: after which no further round starts.
    """

    config: str
    side: int
    device: torch.device
    precision: str
    variants: tuple[str, ...] = ()
    guided: bool = False
    caption: int = 128
    batch: int = 1
    decoder_memory: int | None = DECODER_MEMORY
    rounds: int = 7
    seconds: float = 20.0
    threads: int | None = None


def run(plan: Plan) -> Iterator[list[Row]]:
    """One list with a row for each variant.

    Raises:
        ValueError: an unknown config, or a size it cannot make.
    """
    if plan.config not in NETWORKS:
        raise ValueError(f"config must be one of {', '.join(NETWORKS)}, got {plan.config!r}")
    if plan.threads:
        torch.set_num_threads(plan.threads)
    plan = dataclasses.replace(plan, side=plan.side or NETWORKS[plan.config][0])
    L2PNet(geometry_of(plan, FIRST), device="meta").prepare(_captions(plan, "meta"), _size(plan))
    found: list[Variant] = []
    with torch.no_grad():
        try:
            _measure(plan, found)
        except KeyboardInterrupt:
            yield _finished(found)
            raise
        yield _finished(found)


@dataclass
class Variant:
    """A way of making the call, and what came of it."""

    row: Row
    net: L2PNet | None = None
    call: Callable[[Tensor], Tensor] | None = None
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    first_ms: float | None = None
    captured: bool = False

    def candidate(self) -> Candidate:
        return Candidate(self.row.backend, lambda x: self.call(x), self.around)


def _measure(plan: Plan, found: list[Variant]) -> None:
    clock = clock_for(plan.device)
    nets: dict[L2PConfig, L2PNet] = {}
    reference: Tensor | None = None
    # The reference first: the others' results are held against its. With graphs last: their memory
    # would show in the peaks of those that follow.
    names = {FIRST, *plan.variants}
    for name in sorted(names, key=lambda name: (name != "reference", name == FIRST, name)):
        v = Variant(row_of(plan, name))
        found.append(v)
        try:
            geometry = geometry_of(plan, name)
            if geometry not in nets:
                nets[geometry] = network(geometry, plan.device, PRECISIONS[plan.precision])
            v.net = nets[geometry]
            prepare(plan, v)
            u = _alone(plan, v, clock)
        except Exception as e:  # every failure of a variant is a row
            text = (str(e).strip() or type(e).__name__).splitlines()[0]
            v.row.status, v.row.reason = "failed", f"{type(e).__name__}: {text}"[:300]
            continue
        reference = u if name == "reference" else reference
        if name != SOURCE:
            _check(v.row, u, reference, NEAR[plan.precision])
    for latent in (False, True):  # they take other inputs
        same = [
            v
            for v in found
            if v.row.status == "measured" and (v.net.config.local_decoder is None) == latent
        ]
        if same:
            _take_turns(plan, same, clock)


def _alone(plan: Plan, v: Variant, clock: Clock) -> Tensor:
    """The result; the first call's time and the peak of memory go to the variant."""
    meter, x = Meter(plan.device), image_of(plan, v.net.config)
    clock.synchronize()
    before, rotation = meter.now(), Rotation((x,), 0)
    v.first_ms = first_call(v.candidate(), rotation, clock)
    if v.row.backend == FIRST:
        first_call(v.candidate(), rotation, clock)  # captured; what follows is replayed
    rotation.release()
    del rotation
    meter.reset()
    with v.around():
        u = v.call(x).clone()
    clock.synchronize()
    if before is not None:
        weights = sum(p.numel() * p.element_size() for p in v.net.parameters())
        # What other variants hold is there too: its own, and what its calls added.
        used = max(0, meter.peak() - before)
        given = 0 if v.captured else x.numel() * x.element_size()  # else in the graph's own state
        v.row.memory = Memory(
            peak_bytes=weights + given + used,
            activation_bytes=used,
            weight_bytes=weights,
            source=meter.source,
        )
    return u


def _take_turns(plan: Plan, variants: list[Variant], clock: Clock) -> None:
    times = interleave(
        [v.candidate() for v in variants],
        Rotation((image_of(plan, variants[0].net.config),), 0),
        clock,
        rounds=plan.rounds,
        seconds=plan.seconds,
    )
    for v in variants:
        v.row.timing = dataclasses.replace(times[v.row.backend], first_ms=v.first_ms)
        v.row.rates = _rates(plan, v)


def _finished(found: list[Variant]) -> list[Row]:
    rows = sorted((v.row for v in found), key=lambda row: CHOICES.index(row.backend))
    for row in rows:
        if row.status == "measured" and row.timing is None:
            row.status, row.reason = "skipped", "interrupted before it was timed"
    compare(rows)
    return rows


def prepare(plan: Plan, v: Variant) -> None:
    """What the variant calls, and the context it does so in."""
    net, name, t = v.net, v.row.backend, 0.5
    prediction = _prediction(plan, net, t)
    if name == FIRST:
        graphs: Graphs[Steps] = Graphs(1)
        trajectory = Trajectory(prediction, tuple(image_of(plan, net.config, "meta").shape))
        running: list[Steps] = []

        @contextlib.contextmanager
        def around() -> Iterator[None]:
            with graphs.run(net, trajectory) as steps:
                running[:] = [steps]
                yield

        def call(x: Tensor) -> Tensor:
            (steps,) = running
            v.captured = steps.state is not None
            return steps.predict(x if steps.state is None else steps.state, t)

        v.call, v.around = call, around
    elif name in ("pixeldiff-no-graphs", SOURCE):
        v.call = lambda x: prediction(x, t)
    else:
        step = net.step
        if name == "compile":
            step = torch.compile(step, dynamic=False, fullgraph=True)
        given = {"guidance": prediction.guidance, "decoder_memory": plan.decoder_memory}
        v.call = lambda x: step(x, t, prediction.conditions[0], **given)
        v.around = lambda: pixeldiff.backend("reference")


def network(config: L2PConfig, device: torch.device, dtype: torch.dtype) -> L2PNet:
    """Random weights, made on the device in their dtype; the same for the same config."""
    net = L2PNet(config, device="meta", dtype=dtype).to_empty(device=device)
    models.fill(net, dtype)
    net.requires_grad_(False).eval()
    return net.pack_() if device.type == "cuda" else net


def geometry_of(plan: Plan, name: str) -> L2PConfig:
    config = NETWORKS[plan.config][1]
    if name != SOURCE:
        return config
    return dataclasses.replace(config, patch_size=2, in_channels=16, local_decoder=None)


def _size(plan: Plan, config: L2PConfig | None = None) -> tuple[int, int]:
    latent = config is not None and config.local_decoder is None
    side = plan.side // VAE_CELL if latent else plan.side
    return side, side


def _captions(plan: Plan, device: torch.device | str) -> list[Tensor]:
    width = NETWORKS[plan.config][1].cap_feat_dim
    count = plan.batch * (2 if plan.guided else 1)
    if torch.device(device).type == "meta":
        return [torch.empty(plan.caption, width, device="meta") for _ in range(count)]
    generator = torch.Generator().manual_seed(3)
    shape = (count, plan.caption, width)
    return list(torch.randn(shape, generator=generator).to(device))


def _prediction(plan: Plan, net: L2PNet, t: float) -> Prediction:
    captions = _captions(plan, plan.device)
    return guided(
        net,
        captions[: plan.batch],
        captions[plan.batch :] or None,
        _size(plan, net.config),
        guidance_scale=SCALE if plan.guided else 1.0,
        times=(t,),
        decoder_memory=plan.decoder_memory,
    )


def image_of(plan: Plan, config: L2PConfig, device: torch.device | str | None = None) -> Tensor:
    """The noisy image, or the source's noisy latent."""
    shape = (plan.batch, config.in_channels, *_size(plan, config))
    if device is not None:
        return torch.empty(shape, device=device)
    generator = torch.Generator(plan.device).manual_seed(4)
    return torch.randn(shape, generator=generator, device=plan.device)


def _check(row: Row, u: Tensor, reference: Tensor | None, near: float) -> None:
    """A result that is not finite, or not the reference's, is no result."""
    if not torch.isfinite(u).all():
        row.status, row.reason, row.timing = "failed", "its result is not finite", None
    elif reference is not None and row.backend != "reference":
        error = ((u - reference).square().mean() / reference.square().mean()).sqrt().item()
        row.reference_error = error
        if error > near:
            row.status, row.timing = "failed", None
            row.reason = f"its result differs from the reference's by {error:.2g} of its RMS"


def row_of(plan: Plan, name: str) -> Row:
    config = geometry_of(plan, name)
    tokens = (_size(plan, config)[0] // config.patch_size) ** 2
    return Row(
        kind="forward",
        name=plan.config,
        site="guided" if plan.guided else "",
        shape={
            "height": plan.side,
            "width": plan.side,
            "batch": plan.batch,
            "tokens": tokens,
            "caption": plan.caption,
        },
        dtype=plan.precision,
        backend=name,
        status="measured",
        machine=machine(plan.device),
    )


def _rates(plan: Plan, v: Variant) -> Rates:
    config = v.net.config
    work = flops(config, _size(plan, config), plan.caption, plan.batch, guided=plan.guided)
    x = image_of(plan, config, "meta")
    moved = v.row.memory.weight_bytes if v.row.memory else 0
    moved += 2 * x.numel() * x.element_size()
    seconds = v.row.timing.median_ms / 1e3
    return Rates(moved, work, moved / seconds / 1e9, work / seconds / 1e12)


def flops(
    config: L2PConfig, size: tuple[int, int], caption: int, batch: int = 1, *, guided: bool = False
) -> int:
    """Least FLOPs of a network call, everything shared that may be; a multiply-add is two.

    Args:
        caption: tokens of each caption. What `prepare` does is not counted.
    """
    c, d = config, config.dim
    tokens = size[0] * size[1] // c.patch_size**2
    rows, text = _whole(tokens), _whole(caption)
    branches = 2 * batch if guided else batch
    refined = batch if rows == tokens else branches
    length = rows + text

    def block(count: int, keys: int, queries: int) -> int:
        linear = 2 * keys * 2 * d * d + 2 * queries * (2 * d * d + 3 * d * c.ffn_hidden)
        return count * (linear + 4 * keys * queries * d)

    total = batch * 2 * tokens * c.in_channels * c.patch_size**2 * d
    total += c.n_refiner_layers * block(refined, rows, rows)
    total += (c.n_layers - 1) * block(branches, length, length) + block(branches, length, tokens)
    if c.local_decoder is None:
        return total + branches * 2 * tokens * d * c.in_channels * c.patch_size**2
    return total + _decoder_flops(config, size, batch, branches)


def _decoder_flops(config: L2PConfig, size: tuple[int, int], images: int, branches: int) -> int:
    """Of the nine taps on doubled rows, those that meet the same value are one: four."""
    levels, total = config.local_decoder.levels, 0
    before, area = config.in_channels, size[0] * size[1]
    for i, level in enumerate(levels):
        here = area >> 2 * i
        below = levels[i + 1].out if i + 1 < len(levels) else config.local_decoder.bottleneck
        total += here * images * 18 * (before * level.skip + level.skip * level.out)
        total += here * branches * (8 * below * level.up + 18 * level.up * level.out)
        before = level.skip
    narrow, tokens = config.local_decoder.bottleneck, area // config.patch_size**2
    total += 2 * narrow * (images * (area >> 2 * len(levels)) * before)
    total += 2 * narrow * branches * tokens * config.dim
    return total + 2 * images * area * levels[0].out * config.in_channels


def _whole(rows: int) -> int:
    return -(-rows // SEQ_MULTIPLE) * SEQ_MULTIPLE
