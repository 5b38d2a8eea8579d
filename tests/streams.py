"""CUDA streams on a machine without one: who has waited for whom, and what is touched unordered.

Work is done at once, on the CPU. What is simulated is only what the host may rely on: each stream
knows how far the others were when it last waited for them. An operation that touches watched memory
without knowing all that it must come after is a race, whatever came of it here.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pixeldiff.models.offload.lanes import CudaLane


class Event:
    def __init__(self, knows: dict[int, int]) -> None:
        self.knows = knows

    def synchronize(self) -> None:
        raise AssertionError("the host waits for the device")


class Stream:
    device = torch.device("cpu")

    def __init__(self, world: Streams) -> None:
        self.world, self.cuda_stream = world, len(world.streams)
        self.knows = {self.cuda_stream: 0}  # of each stream, up to which of its operations
        world.streams.append(self)

    def operation(self) -> int:
        self.knows[self.cuda_stream] += 1
        return self.knows[self.cuda_stream]

    def record_event(self) -> Event:
        return Event(dict(self.knows))

    def wait_event(self, event: Event) -> None:
        for stream, count in event.knows.items():
            self.knows[stream] = max(count, self.knows.get(stream, 0))

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    synchronize = Event.synchronize


class Memory:
    """What was done to a buffer: (stream, operation) of every access."""

    def __init__(self, owner: int, before: int) -> None:
        # Whoever had this memory before may still be at work, on the stream it is taken from.
        self.owner, self.writes, self.reads = owner, [(owner, before)], []
        self.recorded = {owner}


class Streams(TorchDispatchMode):
    """Stands in for `torch.cuda`'s streams; races are raised where they happen."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.streams: list[Stream] = []
        self.capturing = False
        self.current = Stream(self)
        self._watched: dict[int, Memory] = {}
        self.freed_early: list[str] = []

        @contextlib.contextmanager
        def on(stream: Stream) -> Iterator[None]:
            before, self.current = self.current, stream
            try:
                yield
            finally:
                self.current = before

        def refuse(*args) -> None:
            raise AssertionError("the host waits for the device")

        cuda = {
            "Stream": lambda device=None: Stream(self),
            "current_stream": lambda device=None: self.current,
            "stream": on,
            "synchronize": refuse,
            "is_current_stream_capturing": lambda: self.capturing,
        }
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
        monkeypatch.setattr(Tensor, "record_stream", lambda t, stream: self._record(t, stream))

    def watch(self, buffer: Tensor) -> Tensor:
        """Memory just taken from the allocator, on the current stream."""
        storage = buffer.untyped_storage()
        memory = Memory(self.current.cuda_stream, self.current.operation())
        self._watched[storage._cdata] = memory
        weakref.finalize(storage, self._freed, storage._cdata)
        return buffer

    def _record(self, t: Tensor, stream: Stream) -> None:
        self._watched[t.untyped_storage()._cdata].recorded.add(stream.cuda_stream)

    def _freed(self, key: int) -> None:
        memory = self._watched.pop(key)
        used = {stream for stream, _ in (*memory.writes, *memory.reads)}
        if used - memory.recorded:
            self.freed_early.append(f"streams {used - memory.recorded} were not told of")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        arguments = func._schema.arguments
        given = [*zip(arguments, args, strict=False)]
        given += [(a, kwargs[a.name]) for a in arguments if a.name in kwargs]
        writes = [v for a, v in given if a.alias_info is not None and a.alias_info.is_write]
        is_view = not writes and any(r.alias_info is not None for r in func._schema.returns)
        if not is_view:
            self._touch(func, writes, [v for _, v in given])
        return func(*args, **kwargs)

    def _touch(self, func, writes, given) -> None:
        written = self._memories(writes)
        touched = self._memories(given)
        if not touched:
            return
        stream, now = self.current, self.current.operation()
        for key, memory in touched.items():
            before = [*memory.writes, *(memory.reads if key in written else ())]
            for other, count in before:
                if stream.knows.get(other, 0) < count:
                    what = "is written" if key in written else "is read"
                    raise AssertionError(f"race: a buffer {what} by {func} before stream {other}")
            (memory.writes if key in written else memory.reads).append((stream.cuda_stream, now))

    def _memories(self, values) -> dict[int, Memory]:
        keys = {t.untyped_storage()._cdata for t in tree_leaves(values) if isinstance(t, Tensor)}
        return {k: self._watched[k] for k in keys if k in self._watched}


class WatchedLane(CudaLane):
    """The lane of CUDA devices with its buffers watched; what it sends and waits for is noted."""

    def __init__(self, streams: Streams) -> None:
        super().__init__(torch.device("cpu"))
        self.streams, self.events = streams, []

    def buffer(self, nbytes: int) -> Tensor:
        # Watched before anything is known of it, as an allocator would have it.
        watch, empty = self.streams.watch, torch.empty

        def watched(*size, **options):
            return watch(empty(*size, **options))

        torch.empty = watched
        try:
            return super().buffer(nbytes)
        finally:
            torch.empty = empty

    def send(self, kept, buffer, after):
        self.events.append(("send", id(kept)))
        return super().send(kept, buffer, after)

    def wait(self, sent, buffer):
        self.events.append(("wait", None))
        super().wait(sent, buffer)
