"""An L2P step as one CUDA graph that serves every step of every image of its kind.

What differs from step to step and from image to image lies at fixed addresses: the state, the
step's modulation vectors, and what `prepare` made of the captions. So neither a prompt nor the
number of steps, their schedule or the guidance scale is captured; the sampler's update, previews
and interruption stay between the replays. The local decoder is inside, in tiles where its budget
makes it so: how it is cut depends on shapes alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graphs import Recorder
from .network import L2PCondition, L2PNet, StepModulation
from .sampler import Prediction, Steps

_AT = 0.0  # the time under which the recorded step finds its modulation vectors


@dataclass(frozen=True)
class Trajectory:
    """One batch of images from noise: what predicts their steps, prepared for all their times.

    Args:
        shape: (B, 3, H, W) of the state.
    """

    prediction: Prediction
    shape: tuple[int, int, int, int]

    @property
    def what(self) -> str:
        return f"a step at {self.shape[2]} x {self.shape[3]}"

    @property
    def device(self) -> torch.device:
        return self.prediction.conditions[0].captions.device

    @property
    def like(self) -> Hashable:
        p = self.prediction
        tensors = tuple((tuple(t.shape), t.dtype, t.device) for t in _varying(p))
        masks = tuple(c.key_mask is not None for c in p.conditions)
        sizes = tuple(c.size for c in p.conditions)
        return (self.shape, tensors, masks, sizes, p.guidance is not None, p.decoder_memory)

    def on(self, net: L2PNet) -> Steps:
        """The steps, kernel by kernel."""
        return Steps(self.prediction)

    def captured(self, net: L2PNet, recorder: Recorder) -> Captured:
        return Captured(self, recorder)


class Captured:
    """The recorded step of one kind of image, and the tensors at fixed addresses it works on."""

    def __init__(self, trajectory: Trajectory, recorder: Recorder) -> None:
        self._recorder = recorder
        given = trajectory.prediction
        with torch.inference_mode(False):  # to be written in any mode
            self._x = torch.zeros(trajectory.shape, dtype=torch.float32, device=trajectory.device)
            self._modulation = _twin(_modulations(given)[0])
            self._prediction = _fixed(given, self._modulation)
        self._load(given)

        def step() -> None:
            self._u = self._prediction(self._x, _AT)

        def warm_up() -> None:
            step()
            del self._u

        (self._step,) = recorder.record(warm_up, (step,))

    @contextlib.contextmanager
    def run(self, trajectory: Trajectory) -> Iterator[Steps]:
        """`trajectory.on(net)`, replayed."""
        given = trajectory.prediction
        fixed = (*_varying(self._prediction), self._modulation.time, self._modulation.blocks)
        with self._recorder.turn(self._x, self._u, *fixed):
            self._load(given)

            def predict(x: Tensor, t: float) -> Tensor:
                if x is not self._x:
                    self._x.copy_(x)
                self._at(given.conditions[0].modulations[t])
                self._step.replay()
                return self._u

            yield Steps(predict, self._x)

    def _load(self, given: Prediction) -> None:
        for ours, theirs in zip(_varying(self._prediction), _varying(given), strict=True):
            ours.copy_(theirs)
        self._at(_modulations(given)[0])

    def _at(self, modulation: StepModulation) -> None:
        self._modulation.time.copy_(modulation.time)
        self._modulation.blocks.copy_(modulation.blocks)


def _varying(p: Prediction) -> list[Tensor]:
    """What a prediction reads that another one of its kind has other values of."""
    tensors = [] if p.guidance is None else [p.guidance]
    for c in p.conditions:
        tensors += (c.captions, *c.image_rope, *c.joint_rope)
        tensors += () if c.key_mask is None else (c.key_mask,)
    return tensors


def _modulations(p: Prediction) -> list[StepModulation]:
    return list(p.conditions[0].modulations.values())


def _fixed(p: Prediction, modulation: StepModulation) -> Prediction:
    """The same prediction from tensors of its own, at the one time `_AT`."""

    def own(c: L2PCondition) -> L2PCondition:
        return dataclasses.replace(
            c,
            captions=torch.empty_like(c.captions),
            image_rope=tuple(map(torch.empty_like, c.image_rope)),
            joint_rope=tuple(map(torch.empty_like, c.joint_rope)),
            key_mask=None if c.key_mask is None else torch.empty_like(c.key_mask),
            modulations={_AT: modulation},
        )

    guidance = None if p.guidance is None else torch.empty_like(p.guidance)
    return dataclasses.replace(p, conditions=tuple(map(own, p.conditions)), guidance=guidance)


def _twin(modulation: StepModulation) -> StepModulation:
    return StepModulation(torch.empty_like(modulation.time), torch.empty_like(modulation.blocks))
