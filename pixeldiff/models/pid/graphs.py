"""The student's decode as CUDA graphs: what is launched once per kernel is launched once per step.

A decode is captured when its like comes for the second time, `prepare` and each step as a graph of
its own, so that fresh noise, previews and interruption stay between them. Its inputs, the state and
the noise live at fixed addresses; everything else in one pool of memory that all graphs of a
decoder share, as no two of them ever run at the same time.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ...ops.registry import OPS, forced_backend
from .network import PiDNet, Tables
from .recent import Recent
from .samplers import Advance, Draw

REMEMBERED = 64  # keys of decodes that came once, or that cannot be captured
_KINDS = {"_parameters": nn.Parameter, "_buffers": Tensor}
_METHODS = ("forward", "prepare", "student_step")
_one_capture = threading.Lock()  # CUDA allows no more at a time in a process


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

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.latent, self.caption, self.sigma

    @property
    def like(self) -> Hashable:
        """What two decodes share that differ in the values of their inputs and noise alone."""
        shapes = tuple((tuple(t.shape), t.dtype, t.device) for t in self.inputs)
        sampler = (self.sample_type, self.prediction_type, self.state_dtype, self.want_x0)
        return (shapes, self.size, self.times, sampler, self.keep_features)

    def on(self, net: PiDNet) -> Advance:
        """The steps, kernel by kernel."""
        return partial(net.student_step, self.prepare(net, *self.inputs), **self.options)

    def prepare(self, net: PiDNet, latent: Tensor, caption: Tensor, sigma: Tensor):
        return net.prepare(
            latent,
            caption,
            sigma,
            size=self.size,
            tables=self.tables,
            keep_features=self.keep_features,
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
        fixed = (*self._inputs, self._x, self._noise, self._x0)
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


class Graphs:
    """Captured decodes of a decoder, the `limit` last used; 0 captures none.

    The first decode of its like runs kernel by kernel (a size that comes once pays nothing), the
    second captures, later ones replay. What cannot be captured runs kernel by kernel.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.recorder_for: Callable[[torch.device], Recorder | None] = _recorder_for
        self._recorders: dict[torch.device, Recorder | None] = {}
        self._captured: Recent[Captured] = Recent(limit)
        self._seen: Recent[bool] = Recent(REMEMBERED)
        self._hopeless: Recent[bool] = Recent(REMEMBERED)
        self._addresses: tuple[int, ...] = ()  # of the weights at the last decode
        self._in_use = threading.Lock()

    @contextlib.contextmanager
    def run(self, net: PiDNet, student: Student) -> Iterator[Advance]:
        """Around a decode: prepared on entry, yields the function that makes its steps."""
        with self._turn(net, student) as captured:
            if captured is not None:
                with captured.run(student) as advance:
                    yield advance
                return
        yield student.on(net)

    def release(self) -> None:
        """Free all memory that captured decodes hold. Waits for one that is running."""
        with self._in_use:
            self._forget()

    def _forget(self) -> None:
        held = len(self._captured)
        for decodes in (self._captured, self._seen, self._hopeless):
            decodes.clear()
        for recorder in filter(None, self._recorders.values() if held else ()):
            recorder.release()

    @contextlib.contextmanager
    def _turn(self, net: PiDNet, student: Student) -> Iterator[Captured | None]:
        if self.limit == 0 or not self._in_use.acquire(blocking=False):
            yield None
            return
        try:
            yield self._find(net, student)
        finally:
            self._in_use.release()

    def _find(self, net: PiDNet, student: Student) -> Captured | None:
        weights, device = Weights.of(net), student.latent.device
        if weights.addresses != self._addresses:  # weights that were moved do not come back
            self._forget()
            self._addresses = weights.addresses
        if device not in self._recorders:
            self._recorders[device] = self.recorder_for(device)
        recorder = self._recorders[device]
        if recorder is None or recorder.why_not() or weights.why_not or why_not():
            return None
        key = (student.like, net.config, settings())
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
            return self._captured.put(key, Captured(net, student, recorder))
        except Exception as e:
            self._hopeless.put(key, True)
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            warnings.warn(
                f"a decode at {student.size[0]} x {student.size[1]} could not be captured as CUDA "
                f"graphs and runs without them: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None


def why_not() -> str | None:
    """Why a decode cannot be replayed here and now, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile traces the call"
    if "reference" in forced():
        return "the reference backend is forced"
    if _get_current_dispatch_mode() is not None:
        return "a dispatch mode watches the operations"
    return None


@dataclass(frozen=True)
class Weights:
    """What a look at a network's weights shows, in one walk: a decode does it each time.

    `addresses` is where they lie; what they are is read by every replay. `why_not` is the reason
    that a decode cannot be replayed, which calls none of the network's Python code: what watches
    or changes its calls must see them made.
    """

    addresses: tuple[int, ...]
    why_not: str | None

    @classmethod
    def of(cls, net: PiDNet) -> Weights:
        addresses, reason, left = [], None, [net]
        while left:
            module = vars(left.pop())
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
            if not module.keys().isdisjoint(_METHODS):
                reason = "a module's method is replaced"
        return cls(tuple(addresses), reason)


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
