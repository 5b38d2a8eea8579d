"""A network's hot path as CUDA graphs: what is launched once per kernel is launched once per step.

A model says what is recorded (`Job`); which of its runs are, and when a recording can be replayed,
is decided here. Inputs and state live at fixed addresses; everything else in one pool of memory
that all graphs of one `Graphs` share, as no two of them ever run at the same time.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..ops.registry import OPS, forced_backend
from .recent import Recent

GRAPHS = 2  # kinds of run kept, unless the user says otherwise
REMEMBERED = 64  # keys of runs that came once, or that cannot be captured
_KINDS = {"_parameters": nn.Parameter, "_buffers": Tensor}
_one_capture = threading.Lock()  # CUDA allows no more at a time in a process


Work = Callable[[], None]


class Recording(Protocol):
    def replay(self) -> None:
        """Do again what was recorded, to the same tensors."""


class Recorder(Protocol):
    """Turns functions of tensors at fixed addresses into recordings."""

    def why_not(self) -> str | None:
        """None if it can record and replay now, else the reason."""

    def record(self, warm_up: Work, works: Sequence[Work]) -> list[Recording]:
        """Run `warm_up`, then record each of `works`, in the order they will be replayed in.

        What they allocate is in one pool of memory, shared with all other recordings: it holds
        from one recording of this call to the next, until another call's are replayed.
        """

    def turn(self, *fixed: Tensor) -> contextlib.AbstractContextManager[None]:
        """Around the replays of one `record` and all uses of the tensors at fixed addresses.

        Waits for the turn before, whatever stream that was on.
        """

    def release(self) -> None:
        """Wait for the last turn and give the pool back; no recording is replayed after it."""


class CudaRecorder:
    """Records CUDA graphs on a stream of its own and replays them on the caller's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # one for all: memory is reused within a stream
        self._pool: tuple[int, int] | None = None
        self._last: torch.cuda.Event | None = None

    def why_not(self) -> str | None:
        if torch.cuda.is_current_stream_capturing():
            return "the caller is capturing a graph"
        return None

    def record(self, warm_up: Work, works: Sequence[Work]) -> list[torch.cuda.CUDAGraph]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with _one_capture, torch.cuda.device(self.device):
            self._vacate()
            self._stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(self._stream):
                    warm_up()
                    self._vacate()
                    return [self._capture(work) for work in works]
            finally:
                torch.cuda.current_stream().wait_stream(self._stream)
                self._vacate()

    @contextlib.contextmanager
    def turn(self, *fixed: Tensor) -> Iterator[None]:
        stream = torch.cuda.current_stream(self.device)
        if self._last is not None:
            stream.wait_event(self._last)
        for t in fixed:
            t.record_stream(stream)
        try:
            yield
        finally:
            self._last = stream.record_event()

    def release(self) -> None:
        if self._last is not None:
            self._last.synchronize()
        self._pool = self._last = None
        self._vacate()

    def _capture(self, work: Work) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of the host may go on allocating and synchronising.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            self._abandon()
            raise
        try:
            graph.capture_end()
        except BaseException:
            self._abandon()
            raise
        return graph

    def _vacate(self) -> None:
        """Leave nothing in the allocator's cache, which would stand beside the pool, and no
        workspace of cuBLAS: a graph would share one made before its capture with whoever
        multiplies on that stream. Made during a capture, it is in the pool."""
        torch.cuda.synchronize(self.device)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()

    def _abandon(self) -> None:
        """After a broken capture the allocator still sends this stream's memory to the pool."""
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
            torch._C._cuda_releasePool(self._stream.device_index, self._pool)
        self._pool = None


R = TypeVar("R", covariant=True)


class Captured(Protocol[R]):
    """The recordings of one job, and the tensors at fixed addresses that they work on."""

    def run(self, job: Any) -> contextlib.AbstractContextManager[R]:
        """Around the replays for a job of the same kind."""


class Job(Protocol[R]):
    """What a network is to do many times over: an image's steps."""

    what: str  # "a decode at 64 x 64", for a warning
    device: torch.device
    like: Hashable  # what two jobs share that the same recordings can serve

    def on(self, net: nn.Module) -> R:
        """Run kernel by kernel."""

    def captured(self, net: nn.Module, recorder: Recorder) -> Captured[R]:
        """Recorded, to be run later for this job and those like it."""


def graph_limit(cuda_graphs: bool | int) -> int:
    """How many kinds of run the argument `cuda_graphs` of a model asks for.

    Raises:
        ValueError: neither a bool nor an integer >= 0.
    """
    if isinstance(cuda_graphs, bool):
        return GRAPHS if cuda_graphs else 0
    if not isinstance(cuda_graphs, int) or cuda_graphs < 0:
        raise ValueError(f"cuda_graphs must be a bool or an integer >= 0, got {cuda_graphs!r}")
    return cuda_graphs


class Graphs(Generic[R]):
    """Captured jobs of a model, the `limit` last used; 0 captures none.

    The first job of its kind runs kernel by kernel (a size that comes once pays nothing), the
    second captures, later ones replay. What cannot be captured runs kernel by kernel.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.recorder_for: Callable[[torch.device], Recorder | None] = _recorder_for
        self._recorders: dict[torch.device, Recorder | None] = {}
        self._captured: Recent[Captured[R]] = Recent(limit)
        self._seen: Recent[bool] = Recent(REMEMBERED)
        self._hopeless: Recent[bool] = Recent(REMEMBERED)
        self._addresses: tuple[int, ...] = ()  # of the weights at the last job
        self._in_use = threading.Lock()

    @contextlib.contextmanager
    def run(self, net: nn.Module, job: Job[R]) -> Iterator[R]:
        """Around a job: what its `on` returns, or the same replayed."""
        with self._turn(net, job) as captured:
            if captured is not None:
                with captured.run(job) as replayed:
                    yield replayed
                return
        yield job.on(net)

    def release(self) -> None:
        """Free all memory that captured jobs hold. Waits for one that is running."""
        with self._in_use:
            self._forget()

    def _forget(self) -> None:
        held = len(self._captured)
        for jobs in (self._captured, self._seen, self._hopeless):
            jobs.clear()
        for recorder in filter(None, self._recorders.values() if held else ()):
            recorder.release()

    @contextlib.contextmanager
    def _turn(self, net: nn.Module, job: Job[R]) -> Iterator[Captured[R] | None]:
        if self.limit == 0 or not self._in_use.acquire(blocking=False):
            yield None
            return
        try:
            yield self._find(net, job)
        finally:
            self._in_use.release()

    def _find(self, net: nn.Module, job: Job[R]) -> Captured[R] | None:
        weights, device = Weights.of(net), job.device
        if weights.addresses != self._addresses:  # weights that were moved do not come back
            self._forget()
            self._addresses = weights.addresses
        if device not in self._recorders:
            self._recorders[device] = self.recorder_for(device)
        recorder = self._recorders[device]
        if recorder is None or recorder.why_not() or weights.why_not or why_not():
            return None
        key = (job.like, net.config, settings())
        if (found := self._captured.get(key)) is not None:
            return found
        if key in self._hopeless:
            return None
        if key not in self._seen:
            self._seen.put(key, True)
            return None
        self._captured.make_room()
        if not len(self._captured):
            recorder.release()
        try:
            return self._captured.put(key, job.captured(net, recorder))
        except Exception as e:
            self._hopeless.put(key, True)
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            warnings.warn(
                f"{job.what} could not be captured as CUDA graphs and runs without them: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None


def why_not() -> str | None:
    """Why nothing can be replayed here and now, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile traces the call"
    if "reference" in forced():
        return "the reference backend is forced"
    if _get_current_dispatch_mode() is not None:
        return "a dispatch mode watches the operations"
    return None


@dataclass(frozen=True)
class Weights:
    """What a look at a network's weights shows, in one walk: every job does it.

    `addresses` is where they lie; what they are is read by every replay. `why_not` is the reason
    that a replay cannot stand for them, which calls none of the network's Python code: what watches
    or changes its calls must see them made.
    """

    addresses: tuple[int, ...]
    why_not: str | None

    @classmethod
    def of(cls, net: nn.Module) -> Weights:
        addresses, reason, left = [], None, [net]
        while left:
            kind_of_module, module = type(left[-1]), vars(left.pop())
            left.extend(m for m in module["_modules"].values() if m is not None)
            for kind in ("_parameters", "_buffers"):
                for t in module[kind].values():
                    if t is None:
                        continue
                    if type(t) is not _KINDS[kind]:
                        reason = "a parameter is not a plain tensor"
                    elif t.requires_grad:
                        reason = "the network is trained: its parameters require gradients"
                    else:
                        addresses.append(t.data_ptr())
            if module["_forward_hooks"] or module["_forward_pre_hooks"]:
                reason = "a module has hooks"
            if not module.keys().isdisjoint(_methods(kind_of_module)):
                reason = "a module's method is replaced"
        return cls(tuple(addresses), reason)


@functools.cache
def _methods(kind: type) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name, None)))


def forced() -> tuple[str | None, ...]:
    return tuple(forced_backend(op) for op in OPS)


def settings() -> Hashable:
    """What decides, outside the network, which kernels run."""
    return (
        forced(),
        _fp32_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
    )


def _fp32_precision() -> Hashable:
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the host uses the newer settings, beside which these refuse to answer
        cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        return cuda.fp32_precision, cudnn.conv.fp32_precision


def _recorder_for(device: torch.device) -> Recorder | None:
    return CudaRecorder(device) if device.type == "cuda" else None
