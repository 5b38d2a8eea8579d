"""The student's decode as CUDA graphs: `prepare` and each step as a graph of its own.

So fresh noise, previews and interruption stay between them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..graphs import Recorder, Recording
from .network import PiDNet, Tables
from .samplers import Advance, Draw


@dataclass(frozen=True)
class Student:
    """One decode of a distilled network: its inputs, and what the sampler does with them."""

    latent: Tensor
    caption: Tensor
    sigma: Tensor
    size: tuple[int, int]
    times: tuple[float, ...]
    tables: Tables
    sample_type: str
    prediction_type: str
    state_dtype: torch.dtype
    want_x0: bool
    keep_features: bool = True
    pixel_chunk: int | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.latent, self.caption, self.sigma

    @property
    def what(self) -> str:
        return f"a decode at {self.size[0]} x {self.size[1]}"

    @property
    def device(self) -> torch.device:
        return self.latent.device

    @property
    def like(self) -> Hashable:
        """What two decodes share that differ in the values of their inputs and noise alone."""
        shapes = tuple((tuple(t.shape), t.dtype, t.device) for t in self.inputs)
        sampler = (self.sample_type, self.prediction_type, self.state_dtype, self.want_x0)
        room = (self.keep_features, self.pixel_chunk)
        return (shapes, self.size, self.times, sampler, room)

    def on(self, net: PiDNet) -> Advance:
        """The steps, kernel by kernel."""
        return partial(net.student_step, self.prepare(net, *self.inputs), **self.options)

    def captured(self, net: PiDNet, recorder: Recorder) -> Captured:
        return Captured(net, self, recorder)

    def prepare(self, net: PiDNet, latent: Tensor, caption: Tensor, sigma: Tensor):
        return net.prepare(
            latent,
            caption,
            sigma,
            size=self.size,
            tables=self.tables,
            keep_features=self.keep_features,
            pixel_chunk=self.pixel_chunk,
        )

    def draws(self, t_next: float) -> bool:
        """Whether the step to t_next takes noise."""
        return self.sample_type == "sde" and t_next != 0

    @property
    def options(self) -> dict:
        return {
            "sample_type": self.sample_type,
            "prediction_type": self.prediction_type,
            "state_dtype": self.state_dtype,
        }


class Captured:
    """The recordings of one decode, and the tensors at fixed addresses that they work on."""

    def __init__(self, net: PiDNet, student: Student, recorder: Recorder) -> None:
        self._recorder = recorder
        size = (student.latent.shape[0], net.config.in_channels, *student.size)
        with torch.inference_mode(False):  # to be written in any mode
            self._inputs = [torch.empty_like(t) for t in student.inputs]
            self._x, self._noise, self._x0 = (
                torch.zeros(
                    size if needed else 0, dtype=torch.float32, device=student.latent.device
                )
                for needed in (True, any(map(student.draws, student.times[1:])), student.want_x0)
            )
        self._load(student)
        self._tables = student.tables  # read by the recordings

        def prepare() -> None:
            self._condition = student.prepare(net, *self._inputs)

        def step(t: float, t_next: float) -> None:
            draw = (lambda shape: self._noise) if student.draws(t_next) else None
            x, x0 = net.student_step(
                self._condition, self._x, t, t_next, draw, student.want_x0, **student.options
            )
            self._x.copy_(x)
            if x0 is not None:
                self._x0.copy_(x0)

        steps = [partial(step, *pair) for pair in itertools.pairwise(student.times)]

        def warm_up() -> None:
            for work in (prepare, steps[0], steps[-1]):  # the last takes no noise
                work()
            del self._condition

        self._prepare, *self._steps = recorder.record(warm_up, (prepare, *steps))
        del self._condition  # its memory is the pool's

    @contextlib.contextmanager
    def run(self, student: Student) -> Iterator[Advance]:
        """`student.on(net)`, replayed."""
        fixed = (*self._inputs, self._x, self._noise, self._x0, *self._tables.tensors)
        with self._recorder.turn(*fixed):
            self._load(student)
            self._prepare.replay()
            yield partial(self._advance, iter(self._steps))

    def _load(self, student: Student) -> None:
        for ours, given in zip(self._inputs, student.inputs, strict=True):
            ours.copy_(given)

    def _advance(
        self,
        steps: Iterator[Recording],
        x: Tensor,
        t: float,
        t_next: float,
        draw: Draw | None,
        want_x0: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if x is not self._x:  # the first step
            self._x.copy_(x)
        if draw is not None:
            self._noise.copy_(draw(tuple(x.shape)))
        next(steps).replay()
        return self._x, self._x0.clone() if want_x0 else None
