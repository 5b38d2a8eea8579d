"""What a decode does once its arguments are checked: from tensors to an unclamped image and back.

Apart from `PiDDecoder.decode`, so that its memory can be counted on the meta device and a decode
that ran out of memory can be made again in another way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...jobs import Stages
from ..graphs import Graphs
from ..guards import Watch
from ..noise import NoiseSource
from ..steps import Callback, TileCallback
from ..tiles import Layout
from .graphs import Student
from .network import PiDNet, Tables
from .samplers import Advance, run_student, sample_teacher
from .tiling import TiledSampling, sample_tiled


@dataclass(frozen=True)
class Decoding:
    """One decode's tensors, and all that decides what is made of them.

    Args:
        latent, caption, sigma: (B, Cz, zh, zw), (B, T, E), (B,), as for `PiDNet.prepare`.
        negative: (B, T', E) for guidance, or None.
        size: (H, W) of the image.
        times, tables: of the schedule, and of what the network sees: the image, or a tile.
        student: whether the network is a distilled one; `sample_type` and `state_dtype` are its
            sampler's, `cfg_scale` is the teacher's.
        keep_features: see `PiDNet.prepare`; for an image in one piece.
        pixel_chunk: see `PiDNet.prepare`.
        layout: tiles of the latent, or None for one piece.
        tile_mode: "sync" or "independent". together: tiles in one network call.
    """

    latent: Tensor
    caption: Tensor
    sigma: Tensor
    negative: Tensor | None
    size: tuple[int, int]
    times: tuple[float, ...]
    tables: Tables
    student: bool
    sample_type: str
    prediction_type: str
    state_dtype: torch.dtype
    cfg_scale: float
    keep_features: bool
    pixel_chunk: int | None
    layout: Layout | None
    tile_mode: str
    together: int

    @property
    def tiled(self) -> TiledSampling:
        """As the tiled samplers take it."""
        return TiledSampling(
            self.latent,
            self.caption,
            self.sigma,
            self.negative,
            layout=self.layout,
            together=self.together,
            times=self.times,
            tables=self.tables,
            student=self.student,
            sample_type=self.sample_type,
            prediction_type=self.prediction_type,
            state_dtype=self.state_dtype,
            cfg_scale=self.cfg_scale,
            pixel_chunk=self.pixel_chunk,
        )


def run(
    net: PiDNet,
    what: Decoding,
    draw: NoiseSource,
    *,
    graphs: Graphs[Advance],
    stages: Stages,
    watch: Watch | None = None,
    callback: Callback | None = None,
    tile_callback: TileCallback | None = None,
) -> Tensor:
    """(B, 3, H, W) fp32 in [-1, 1].

    Args:
        stages: what is kept on the way, and what was found of it.
        watch: told of every step and of the state after it.

    Raises:
        Interrupted: a callback returned False.
    """
    if what.layout is not None:
        x = sample_tiled(
            net, what.tiled, what.tile_mode, draw, callback, tile_callback, stages, watch
        )
        return x.clamp_(-1, 1)
    if what.student:
        return _student(net, what, draw, graphs, callback, stages, watch)
    return _teacher(net, what, draw, callback, stages, watch).clamp(-1, 1)


def _student(
    net: PiDNet,
    what: Decoding,
    draw: NoiseSource,
    graphs: Graphs[Advance],
    callback: Callback | None,
    stages: Stages,
    watch: Watch | None,
) -> Tensor:
    student = Student(
        what.latent,
        what.caption,
        what.sigma,
        size=what.size,
        times=what.times,
        tables=what.tables,
        sample_type=what.sample_type,
        prediction_type=what.prediction_type,
        state_dtype=what.state_dtype,
        want_x0=callback is not None,
        keep_features=what.keep_features,
        pixel_chunk=what.pixel_chunk,
    )
    shape = (what.latent.shape[0], net.config.in_channels, *what.size)
    with graphs.run(net, student) as advance:
        x = run_student(
            advance,
            stages.held("x", partial(draw, shape)),  # not named: it would be kept for all steps
            what.times,
            draw,
            sample_type=what.sample_type,
            callback=callback,
            stages=stages,
            watch=watch,
        )
        return x.clamp(-1, 1)  # a copy: x may be a graph's


def _teacher(
    net: PiDNet,
    what: Decoding,
    draw: NoiseSource,
    callback: Callback | None,
    stages: Stages,
    watch: Watch | None,
) -> Tensor:
    condition = net.prepare(
        what.latent,
        what.caption,
        what.sigma,
        size=what.size,
        tables=what.tables,
        keep_features=what.keep_features,
        pixel_chunk=what.pixel_chunk,
    )
    negative = None if what.negative is None else net.recaption(condition, what.negative)
    shape = (what.latent.shape[0], net.config.in_channels, *what.size)
    return sample_teacher(
        lambda x, tau: net.step(x, tau, condition),
        lambda x, tau: net.step(x, tau, negative),
        stages.held("x", partial(draw, shape)),
        what.times,
        cfg_scale=what.cfg_scale,
        prediction_type=what.prediction_type,
        callback=callback,
        stages=stages,
        watch=watch,
    )
