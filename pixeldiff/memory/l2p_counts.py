"""Live memory of an L2P image: its steps themselves, run on the meta device.

Nothing is computed; what lives when is what the network's own code keeps. Two steps are run: the
third is as the second.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from ..jobs import Stages
from ..models.devices import standing_for
from ..models.l2p import bands
from ..models.l2p.config import L2PConfig
from ..models.l2p.network import L2PNet
from ..models.l2p.sampler import guided, sample
from ..models.l2p.scheduler import schedule
from ..models.l2p.tiling import TiledPrediction
from ..models.tiles import Layout
from ..ops.registry import backend as forced
from . import heap
from .counts import META, Counts, Watched, converted, storage_bytes, visiting_weights
from .op_memory import OpMemory

PHASES = {
    "prepare": "prepare",
    "features": "trunk",
    "_trunk": "trunk",
    "step": "network",
    "decoded": "local decoder",
}
_STEPS = 2


@dataclass(frozen=True)
class Image:
    """What is made, by its sizes.

    Args:
        config, dtype: of the network.
        size: (H, W) in pixels. batch: images.
        text_rows: tokens of the prompt and, under guidance, of the negative one; () for none.
        steps: of the schedule.
        together, decoder_memory, layout: as of `guided` and `TiledPrediction`.
        output: "pil", "pt" or "np". previews: whether a callback wants every estimate.
    """

    config: L2PConfig
    dtype: torch.dtype
    size: tuple[int, int]
    batch: int
    text_rows: tuple[int, ...]
    steps: int
    together: bool
    decoder_memory: int | None
    layout: Layout | None
    output: str
    previews: bool


@functools.lru_cache(maxsize=256)
def counted(image: Image, device: str, backend: str | None) -> Counts:
    """Live memory of an image on a device, "cpu" or "cuda"."""
    with torch.no_grad(), standing_for(device), forced(None):
        net = _network(image.config, image.dtype, device)
        layout = image.layout
        if layout is not None:  # the tiles hold nothing: two are as many
            layout = Layout(layout.size, layout.tile, layout.overlap, layout.step, layout.pixels)
            vars(layout)["tiles"] = layout.tiles[:2]
        with OpMemory(device, backend, _gaps(image, backend)) as memory, memory.phase("prepare"):
            _made(Watched(net, memory, PHASES), image, layout, memory)
        return Counts.of(storage_bytes(net), memory)


@functools.lru_cache(maxsize=64)
def resident_weights(config: L2PConfig, dtype: torch.dtype, device: str, offload: bool) -> int:
    """Bytes of the weights that stay on the device."""
    net = _network(config, dtype, device)
    if not offload:
        return storage_bytes(net)
    blocks = (*net.context_refiner, *net.noise_refiner, *net.layers)
    return visiting_weights(
        net, [(block, lambda name: name.startswith("adaLN_")) for block in blocks]
    )


def _network(config: L2PConfig, dtype: torch.dtype, device: str) -> L2PNet:
    net = L2PNet(config, device=META, dtype=dtype).requires_grad_(False).eval()
    return net.pack_() if device == "cuda" else net


def _gaps(image: Image, backend: str | None) -> float:
    if backend == "reference":
        return heap.REFERENCE
    if image.layout is not None:
        return heap.L2P_TILES
    whole = heap.L2P_WHOLE if image.dtype == torch.float32 else heap.L2P_WHOLE_16_BITS
    if image.decoder_memory is None:
        return whole
    batch = image.batch * len(image.text_rows)
    sizes = (image.config.in_channels, image.size, image.batch, batch, image.dtype.itemsize)
    cut = bands.plan(bands.Load(image.config.local_decoder, *sizes), image.decoder_memory)
    return heap.L2P_BANDS if cut.levels else whole


def _made(net: Any, image: Image, layout: Layout | None, memory: OpMemory) -> None:
    positive, *negative = (
        [torch.empty(rows, image.config.cap_feat_dim, device=META)] * image.batch
        for rows in image.text_rows
    )
    short = schedule(min(image.steps, _STEPS))
    others = tuple(schedule(image.steps).times[short.steps :]) if image.steps > _STEPS else ()
    prediction = guided(
        net,
        positive,
        negative[0] if negative else None,
        image.size if layout is None else layout.tile_pixels,
        guidance_scale=2.0 if negative else 1.0,
        times=(*short.times, *others),
        together=image.together,
        decoder_memory=image.decoder_memory,
    )
    predict = prediction
    if layout is not None:
        predict = TiledPrediction(prediction, layout, short.steps, Stages(None, None, META))
    shape = (image.batch, image.config.in_channels, *image.size)
    with memory.phase("sampler"):
        x = sample(
            predict,
            torch.empty(shape, device=META),
            short,
            callback=_keep_nothing if image.previews else None,
        )
    del predict, prediction
    with memory.phase("result"):
        memory.moment(converted(x.clamp_(-1, 1), image.output, memory.device), "result")


def _keep_nothing(info: Any) -> None:
    """A callback."""
