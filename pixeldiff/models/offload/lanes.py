"""What carries weights to a device while it computes, and who waits for whom.

A lane knows two orders of events: its own, in which it fills buffers, and the caller's, in which
those are used. A mark is a point in one of them that the other can be made to wait for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from .layout import Layout
from .sources import Source

Mark = Any
SMALLEST_PINNED = 1 << 20


class Lane(Protocol):
    def check(self) -> None:
        """Raises RuntimeError: it cannot work here and now."""

    def keep(self, layout: Layout, sources: Sequence[Source]) -> Any:
        """The weights of a layout, in the form that this lane sends them from."""

    def buffer(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 on the device."""

    def send(self, kept: Any, buffer: Tensor, after: Collection[Mark]) -> Mark:
        """Fill a buffer, once the caller's work has passed the marks; does not wait for it."""

    def wait(self, sent: Mark, buffer: Tensor) -> None:
        """Whatever the caller does from now on comes after that. Raises what sending raised."""

    def mark(self) -> tuple[Hashable, Mark]:
        """All that the caller has begun so far, and in which order of events of his: of two marks
        with the same first value the later one comes after the other."""

    def stop(self) -> None:
        """After an error: nothing that was sent is waited for any more."""


class CudaLane:
    """Copies from pinned host memory on a stream of its own. The host waits for nothing.

    The caller's stream is the one that is current at each call; they may differ from call to call.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self.device = self._stream.device  # with its index: the current device may change

    def check(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "offload: a network whose weights visit the device cannot be captured in a CUDA "
                "graph; load it without offload, or do not capture"
            )

    def keep(self, layout: Layout, sources: Sequence[Source]) -> list[Tensor]:
        whole = torch.empty(layout.nbytes, dtype=torch.uint8)
        for source, view in zip(sources, layout.views(whole), strict=True):
            source.write(view)
        return [part.pin_memory() for part in whole.split(pinned_sizes(layout.nbytes))]

    def buffer(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):  # to be written in any mode
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        # Its memory may still be in use by what this stream did with it before.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        buffer.record_stream(self._stream)
        return buffer

    def send(
        self, kept: list[Tensor], buffer: Tensor, after: Collection[torch.cuda.Event]
    ) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            for mark in after:
                self._stream.wait_event(mark)
            for part, into in zip(kept, buffer.split([len(k) for k in kept]), strict=True):
                into.copy_(part, non_blocking=True)
            return self._stream.record_event()

    def wait(self, sent: torch.cuda.Event, buffer: Tensor) -> None:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(sent)
        buffer.record_stream(stream)  # freed, it is not given away before this stream is done

    def mark(self) -> tuple[int, torch.cuda.Event]:
        stream = torch.cuda.current_stream(self.device)
        return stream.cuda_stream, stream.record_event()

    def stop(self) -> None:
        """Buffers that are freed now are not given away before both streams are done with them."""


def pinned_sizes(nbytes: int) -> list[int]:
    """Sizes that add up to `nbytes`: powers of two, and a small rest.

    The allocator of pinned memory rounds up to a power of two, for one buffer almost twice as much.
    """
    sizes = []
    while nbytes >= SMALLEST_PINNED:
        sizes.append(1 << (nbytes.bit_length() - 1))
        nbytes -= sizes[-1]
    return [*sizes, nbytes] if nbytes else sizes


class ThreadLane:
    """Reads on a thread of its own. The caller's work on the CPU is done when it returns."""

    def __init__(self) -> None:
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pixeldiff-offload")
        self._sent: list[Future[None]] = []

    def check(self) -> None:
        return None

    def keep(self, layout: Layout, sources: Sequence[Source]) -> tuple[Layout, Sequence[Source]]:
        return layout, sources

    def buffer(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):  # to be written in any mode
            return torch.empty(nbytes, dtype=torch.uint8)

    def send(
        self, kept: tuple[Layout, Sequence[Source]], buffer: Tensor, after: Collection[Mark]
    ) -> Future[None]:
        sent = self._reader.submit(_fill, *kept, buffer)
        self._sent = [*(f for f in self._sent if not f.done()), sent]
        return sent

    def wait(self, sent: Future[None], buffer: Tensor) -> None:
        sent.result()

    def mark(self) -> tuple[None, None]:
        return None, None

    def stop(self) -> None:
        for sent in self._sent:
            sent.cancel()
            with contextlib.suppress(BaseException):
                sent.result()
        self._sent = []


@torch.no_grad()
def _fill(layout: Layout, sources: Sequence[Source], buffer: Tensor) -> None:
    for source, view in zip(sources, layout.views(buffer), strict=True):
        source.write(view)


def lane_for(device: torch.device) -> Lane:
    """Raises ValueError: neither CUDA nor the CPU."""
    if device.type == "cuda":
        return CudaLane(device)
    if device.type == "cpu":
        return ThreadLane()
    raise ValueError(
        f"offload: weights can visit a device of type cuda or cpu, not {device}; leave offload out"
    )
