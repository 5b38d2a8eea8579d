"""Live memory of a PiD decode: the decode itself, run on the meta device.

Nothing is computed, so that a decode of released size takes a fraction of a second; what lives when
is what the network's own code keeps, whatever it is changed to. Only repetition is cut short: a
teacher's many steps, and tiles, of which each further one adds the same.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..jobs import Stages
from ..models.devices import standing_for
from ..models.graphs import Graphs
from ..models.pid.config import PiDConfig
from ..models.pid.decoding import Decoding, run
from ..models.pid.network import PiDNet
from ..models.pid.samplers import network_time
from ..models.pid.tiling import Tiles, independent_rows, sample_independent
from ..models.tiles import Layout
from ..ops.registry import backend as forced
from . import heap
from .counts import (
    BAND,
    META,
    WRITER,
    WRITER_WIDTH,
    Counts,
    Watched,
    converted,
    pictures,
    storage_bytes,
    visiting_weights,
)
from .op_memory import OpMemory

GROUPS_RUN = 2  # of tiles: each further one adds what the second does to the first
INDEPENDENT_RUN = 4  # the last of a row, the first of the next, and two that find both done
# Network calls that are run: the first, which draws noise, and the last, which draws none. A
# teacher's third is the first that holds all it ever does.
_STEPS = {True: 2, False: 3}  # by whether it is a student


FILES = ("file", "whole file")  # as `output`
PHASES = {
    "latent_stack": "latent",
    "prepare": "prepare",
    "recaption": "prepare",
    "step": "network",
    "student_step": "network",
}


class MetaNoise:
    """A `NoiseSource` and a `SquareNoise` whose noise takes memory and nothing else."""

    def __init__(self, batch: int = 1, channels: int = 3) -> None:
        self.batch, self.channels = batch, channels

    def __call__(self, shape: Any, *place: Any) -> Tensor:
        if place:  # a step's, from a row and a column on, of a size
            shape = (self.batch, self.channels, *place[-1])
        return torch.empty(shape, device=META)


@dataclass(frozen=True)
class Decode:
    """What is decoded, by its sizes.

    Args:
        config: of the network. dtype, fp8: of its weights.
        latent_hw, size: cells of the latent, pixels of the image. batch: images.
        text_rows: T of the captions.
        times: of the schedule. student: whether it is a distilled network's.
        guided: whether there is a negative caption.
        keep_features, pixel_chunk, layout, tile_mode, together, state_dtype: as of `Decoding`.
        output: "pil", "pt", "np", "file" or "whole file".
        previews: whether a callback wants every estimate.
    """

    config: PiDConfig
    dtype: torch.dtype
    fp8: bool
    latent_hw: tuple[int, int]
    size: tuple[int, int]
    batch: int
    text_rows: int
    times: tuple[float, ...]
    student: bool
    guided: bool
    keep_features: bool
    pixel_chunk: int | None
    layout: Layout | None
    tile_mode: str
    together: int
    state_dtype: torch.dtype
    output: str
    previews: bool


@functools.lru_cache(maxsize=256)
def counted(decode: Decode, device: str, backend: str | None) -> Counts:
    """Live memory of a decode on a device, "cpu" or "cuda"."""
    with torch.no_grad(), standing_for(device), forced(None):
        net = _network(decode.config, decode.dtype, decode.fp8, device)
        weights = storage_bytes(net)
        groups = 0 if decode.layout is None else -(-len(decode.layout.tiles) // decode.together)
        if groups <= GROUPS_RUN:
            return Counts.of(weights, _recorded(net, decode, decode.layout, device, backend))

        def of(tiles: int) -> Counts:
            layout = _some(decode.layout, tiles)
            return Counts.of(weights, _recorded(net, decode, layout, device, backend))

        if decode.tile_mode == "independent":
            found = of(INDEPENDENT_RUN * decode.together)
        else:
            some, one_more = (of(n * decode.together) for n in (GROUPS_RUN - 1, GROUPS_RUN))
            found = some.extended(one_more, groups - GROUPS_RUN + 1)
        rest = len(decode.layout.tiles) % decode.together
        if not rest or not found.products:
            return found
        return dataclasses.replace(found, products=found.products | of(rest).products)


@functools.lru_cache(maxsize=64)
def resident_weights(
    config: PiDConfig, dtype: torch.dtype, fp8: bool, device: str, offload: bool
) -> int:
    """Bytes of the weights that stay on the device."""
    net = _network(config, dtype, fp8, device)
    if not offload:
        return storage_bytes(net)
    blocks = [(block, lambda name: name.startswith("adaLN_")) for block in net.patch_blocks]
    return visiting_weights(net, [*blocks, *((block, None) for block in net.pixel_blocks)])


def _network(config: PiDConfig, dtype: torch.dtype, fp8: bool, device: str) -> PiDNet:
    net = PiDNet(config, device=META, dtype=dtype).requires_grad_(False).eval()
    if fp8:
        net.quantize_()
    return net.pack_() if device == "cuda" else net


def _some(layout: Layout, count: int) -> Layout:
    """The same image with a few tiles alone: from the last of the first row on, since a new row is
    what independent tiles hold most for."""
    cut = Layout(layout.size, layout.tile, layout.overlap, layout.step, layout.pixels)
    first = max(0, min(len(layout.starts[1]) - 1, len(layout.tiles) - count))
    vars(cut)["tiles"] = layout.tiles[first : first + count]
    return cut


def _recorded(
    net: PiDNet, decode: Decode, layout: Layout | None, device: str, backend: str | None
) -> OpMemory:
    c, times = decode.config, decode.times
    with OpMemory(device, backend, _gaps(decode, backend)) as memory, memory.phase("prepare"):
        own = decode.size if layout is None else layout.tile_pixels
        taus = tuple(network_time(t) for t in times[:-1])
        tables = net.tables(own, min(decode.text_rows, c.txt_max_length), taus)
        text = (decode.batch, decode.text_rows, c.txt_embed_dim)
        what = Decoding(
            torch.empty(decode.batch, c.lq_latent_channels, *decode.latent_hw, device=META),
            torch.empty(text, device=META),
            torch.empty(decode.batch, device=META),
            torch.empty(text, device=META) if decode.guided else None,
            size=decode.size,
            times=(*times[:-1][: _STEPS[decode.student]], times[-1]),
            tables=tables,
            student=decode.student,
            sample_type="sde",
            prediction_type="velocity",
            state_dtype=decode.state_dtype,
            cfg_scale=2.0 if decode.guided else 1.0,
            keep_features=decode.keep_features,
            pixel_chunk=decode.pixel_chunk,
            layout=layout,
            tile_mode=decode.tile_mode,
            together=decode.together,
        )
        watched = Watched(net, memory, PHASES)
        if decode.output in FILES and layout is not None and decode.tile_mode == "independent":
            with memory.phase("sampler"):
                _streamed(watched, what, decode, memory)
            return memory
        with memory.phase("sampler"):
            x = _sampled(watched, what, _keep_nothing if decode.previews else None)
        del what, tables
        with memory.phase("result"):
            torch.isnan(x)
            memory.moment(converted(x, decode.output, device), f"result as {decode.output}")
    return memory


def _gaps(decode: Decode, backend: str | None) -> float:
    if backend == "reference":
        return heap.REFERENCE
    if decode.layout is not None and decode.tile_mode == "independent":
        return heap.PID_INDEPENDENT
    if decode.layout is not None:
        return heap.PID_SYNC if decode.pixel_chunk is None else heap.PID_CHUNKS
    if decode.pixel_chunk is not None:
        return heap.PID_CHUNKS
    return heap.PID_WHOLE if decode.dtype == torch.float32 else heap.PID_WHOLE_16_BITS


def _sampled(net: Any, what: Decoding, callback: Any) -> Tensor:
    noise = MetaNoise(what.latent.shape[0], net.config.in_channels)
    stages = Stages(None, noise, META)
    if what.layout is not None and what.tile_mode == "independent":
        return sample_independent(Tiles(net, what.tiled, stages), noise).clamp_(-1, 1)
    return run(net, what, noise, graphs=Graphs(0), stages=stages, callback=callback)


def _streamed(net: Any, what: Decoding, decode: Decode, memory: OpMemory) -> None:
    """Rows that are written as they are finished."""
    count = pictures(decode.output, decode.batch, decode.size, memory.device)
    picture = torch.empty(count, dtype=torch.uint8, device=META)
    writer = WRITER + WRITER_WIDTH * decode.size[1] if decode.output == "file" else 0
    noise = MetaNoise(decode.batch, net.config.in_channels)
    tiles = Tiles(net, what.tiled, Stages(None, noise, META))
    for _ in independent_rows(tiles, noise):
        memory.moment(BAND + writer, "rows in 8 bits, and their encoder")
    del picture


def _keep_nothing(info: Any) -> None:
    """A callback."""
