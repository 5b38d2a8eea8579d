"""The timer: what it leaves out, in which order it runs, and what memory its calls see."""

from __future__ import annotations

import time
import weakref

import pytest
import torch

from bench.timing import (
    CACHE_MULTIPLE,
    Candidate,
    CpuClock,
    Rotation,
    first_call,
    interleave,
    summarise,
    tensor_bytes,
)


def busy(ms: float) -> None:
    end = time.perf_counter() + ms / 1e3
    while time.perf_counter() < end:
        pass


class Slow:
    """A call of `ms`, whose first one takes `first` more, as if it compiled."""

    def __init__(self, ms: float, first: float = 0.0) -> None:
        self.ms, self.first = ms, first

    def __call__(self, *_args) -> None:
        busy(self.ms + self.first)
        self.first = 0.0


ONE = Rotation((torch.ones(4),), cache=0)


def test_the_first_call_is_not_in_the_samples():
    """A timer that includes the compilation would show it in max_ms."""
    c = Candidate("a", Slow(2.0, first=300.0))
    first = first_call(c, ONE, CpuClock())
    t = interleave([c], ONE, CpuClock(), rounds=5, seconds=60)["a"]
    assert first >= 302
    assert len(t.samples_ms) == 5
    assert 2.0 <= t.min_ms <= t.median_ms
    assert t.median_ms < 150


def test_a_sample_is_the_time_of_one_call():
    """Short calls are timed several at a time, and divided by their number."""
    c = Candidate("a", Slow(0.05))
    first_call(c, ONE, CpuClock())
    t = interleave([c], ONE, CpuClock(), rounds=7, seconds=60)["a"]
    assert 0.05 <= t.min_ms < 0.25  # a sample holds about ten calls: half a millisecond


def test_candidates_take_turns():
    order: list[str] = []

    def call(name: str):
        return lambda *_: (order.append(name), busy(0.6))

    names = ["a", "b", "c"]
    candidates = [Candidate(n, call(n)) for n in names]
    interleave(candidates, ONE, CpuClock(), rounds=4, seconds=60)
    assert order[:6] == ["a", "a", "b", "b", "c", "c"]  # warm-up
    assert order[6:] == names * 4


def test_the_context_is_entered_for_every_sample_and_not_timed():
    class Slowly:
        depth = 0

        def __enter__(self):
            busy(20)
            Slowly.depth += 1

        def __exit__(self, *_):
            busy(20)
            Slowly.depth -= 1

    def call(*_):
        assert Slowly.depth == 1
        busy(0.6)

    t = interleave([Candidate("a", call, Slowly)], ONE, CpuClock(), rounds=3, seconds=60)["a"]
    assert Slowly.depth == 0
    assert t.min_ms < 20


def test_rounds_stop_at_the_time_but_not_below_three():
    c = Candidate("a", Slow(5.0))
    assert len(interleave([c], ONE, CpuClock(), rounds=50, seconds=0)["a"].samples_ms) == 3


@pytest.mark.parametrize("cache", [4096, 10_000])
def test_a_rotation_exceeds_the_cache_before_it_comes_back(cache):
    """A rotation that reuses one buffer, or too few, fails here."""
    args = (torch.randn(16, 8), None, torch.randn(32), 3)
    rotation = Rotation(args, cache)
    seen: list[tuple[int, int]] = []

    def call(x, nothing, y, number):
        assert (nothing, number) == (None, 3)
        assert torch.equal(x, args[0])
        assert torch.equal(y, args[2])
        seen.append((x.data_ptr(), y.data_ptr()))
        return x + 1

    count = len(rotation.copies)
    assert count * tensor_bytes(args) >= CACHE_MULTIPLE * cache
    for _ in range(2 * count):
        rotation(call)
    assert len({x for x, _ in seen}) == len({y for _, y in seen}) == count
    assert seen[:count] == seen[count:]


def test_a_rotation_keeps_results_so_that_outputs_rotate_too():
    """The memory of a result is free for the next one only when its copy comes round again."""
    rotation = Rotation((torch.randn(64),), cache=1024)
    results: list[weakref.ref] = []

    def call(x):
        y = x * 2
        results.append(weakref.ref(y))
        return y

    count = len(rotation.copies)
    for _ in range(count + 2):
        rotation(call)
    assert [r() is not None for r in results] == [False] * 2 + [True] * count
    rotation.release()
    assert all(r() is None for r in results)


def test_large_arguments_still_alternate():
    assert len(Rotation((torch.ones(10_000),), cache=64).copies) == 2


def test_tensor_bytes_counts_the_element_size():
    assert tensor_bytes((torch.ones(3), torch.ones(5, dtype=torch.bfloat16), None, 7)) == 12 + 10


def test_summary():
    t = summarise([3.0, 1.0, 2.0, 10.0])
    assert (t.min_ms, t.median_ms, t.max_ms, t.mad_ms) == (1.0, 2.5, 10.0, 1.0)
    assert t.samples_ms == [3.0, 1.0, 2.0, 10.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_clock_times_the_gpu_and_not_the_queue():
    """A matrix product of known size runs between 5 TFLOP/s and the fastest GPU there is, and the
    spin before it is not counted."""
    from bench.timing import CudaClock

    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    c = Candidate("mm", torch.mm)
    rotation = Rotation((x, x), cache=2**20)
    first_call(c, rotation, CudaClock(device))
    t = interleave([c], rotation, CudaClock(device), rounds=5, seconds=60)["mm"]
    assert 2 * 4096**3 / 5e15 * 1e3 < t.median_ms < 2 * 4096**3 / 5e12 * 1e3
    assert t.host_ms is not None
