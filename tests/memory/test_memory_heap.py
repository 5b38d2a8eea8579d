"""The simulated heap keeps what glibc's would."""

from __future__ import annotations

import json
import platform
import random
import subprocess
import sys

import pytest

from pixeldiff.memory.heap import KEPT, LARGEST_THRESHOLD, TENSOR, TOP_PAD, Heap
from pixeldiff.memory.process import PROCESSES, Blocks

MB = 1 << 20
FULL = dict.fromkeys(range(32, 1041, 16), KEPT)  # so that all that is freed grows together


def test_a_mapped_block_goes_back_and_its_size_is_cut_from_then_on():
    heap = Heap()
    heap.allocate("a", 3 * MB)
    assert 3 * MB < heap.resident < 3 * MB + 3 * 4096
    heap.release("a")
    assert heap.resident == 0
    heap.allocate("b", 3 * MB)
    heap.allocate("c", MB)
    heap.release("b")
    assert heap.resident > 4 * MB
    heap.allocate("d", 3 * MB // 2)
    assert heap.resident < 4 * MB + 4096


def test_a_block_of_the_largest_threshold_is_mapped_forever():
    heap = Heap()
    for _ in range(3):
        heap.allocate("a", LARGEST_THRESHOLD)
        heap.release("a")
        assert heap.resident == 0


def test_a_free_end_goes_back_at_twice_the_threshold():
    heap = Heap(FULL, threshold=2 * MB)
    for key in "abc":
        heap.allocate(key, MB)
    for key in "cb":
        heap.release(key)
    assert heap.resident > 3 * MB  # 2 MB are free, 4 MB would have to be
    heap.release("a")
    assert heap.resident > 3 * MB
    for key in "abcde":
        heap.allocate(key, MB)
    for key in "edcb":
        heap.release(key)
    assert heap.resident < MB + 2 * TOP_PAD
    assert heap.most > 5 * MB


def test_the_smallest_hole_that_is_enough_is_taken():
    heap = Heap()
    for key, count in {"a": MB, "1": 1000, "b": 3 * MB // 2, "2": 1000}.items():
        heap.allocate(key, count)
    before = heap.resident
    heap.release("a")
    heap.release("b")
    heap.allocate("c", MB - 200)
    heap.allocate("d", 3 * MB // 2 - 200)
    assert heap.resident == before


def test_small_chunks_that_are_kept_stay_between_free_ones():
    """So that two holes side by side do not hold what both together would."""
    grown = {}
    for kept in (0, KEPT):
        heap = Heap({32: kept, 48: kept, 64: kept, 80: kept, 96: kept})
        for key in "abc":
            heap.allocate(key, MB + 8)
        before = heap.resident
        heap.release("a")
        heap.release("b")
        heap.allocate("d", 2 * MB)
        grown[kept] = heap.resident - before
    assert grown[0] > 2 * MB  # what a and b gave back of their ends is kept
    assert grown[KEPT] == 0  # no room to keep it: all grew together


def test_a_small_object_is_what_was_kept_last():
    heap = Heap()
    heap.allocate("a", 96, aligned=False)
    heap.allocate("b", 96, aligned=False)
    top = heap.resident
    heap.release("a")
    heap.allocate("c", 90, aligned=False)
    assert heap.resident == top


# What glibc itself holds after each of a list of allocations and releases, without PyTorch.
GLIBC = """
import ctypes, json, sys
libc = ctypes.CDLL(None)
class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
libc.mallinfo2.restype = Info
libc.memalign.restype = ctypes.c_void_p
libc.memalign.argtypes = [ctypes.c_size_t] * 2
libc.free.argtypes = [ctypes.c_void_p]
def held():
    info = libc.mallinfo2()
    return info.arena + info.hblkhd
events, first = json.loads(sys.argv[1])
blocks, sizes = [0] * len(events), [0] * len(events)  # lists that grow would be blocks too
libc.malloc.restype = ctypes.c_void_p
for size in range(24, 1040, 16):  # chunks kept of every size, as many as there can be
    for chunk in [libc.malloc(size) for _ in range(16)]:
        libc.free(chunk)
libc.free(libc.memalign(64, first))  # the threshold follows it
start = held()
for i, (key, count) in enumerate(events):
    if count:
        blocks[key] = libc.memalign(64, count)
    else:
        libc.free(blocks[key])
    sizes[i] = held() - start
print(json.dumps(sizes))
"""


@pytest.mark.skipif(
    platform.libc_ver() < ("glibc", "2.26") or platform.libc_ver() >= ("glibc", "2.38"),
    reason="another C library, or a glibc with other rules for aligned blocks",
)
@pytest.mark.parametrize("seed", range(5))
def test_it_holds_what_glibc_does(seed):
    """After every single call: only small objects of its own, of which there are none here, can
    make a real process differ."""
    draw, living, events = random.Random(seed), [], []
    for i in range(200):
        if draw.random() < len(living) / 16:
            events.append((living.pop(draw.randrange(len(living))), 0))
        else:
            events.append((i, int(2 ** draw.uniform(17, 22))))
            living.append(i)
    first = 3 * MB
    command = [sys.executable, "-c", GLIBC, json.dumps((events, first))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    heap = Heap(FULL, threshold=first)
    for (key, count), real in zip(events, json.loads(done.stdout), strict=True):
        heap.allocate(key, count) if count else heap.release(key)
        assert heap._mapped + heap._end - TOP_PAD == pytest.approx(real, abs=MB // 4)


def test_processes_differ_in_luck_and_the_median_is_always_the_same():
    def told(blocks):
        for i in range(40):
            blocks.allocate(i, MB + 64 * i)
            if i % 3:
                blocks.release(i - 1)
        return blocks

    found = told(Blocks())
    of_each = [found._simulated(luck) for luck in range(PROCESSES)]
    assert len(set(of_each)) > 1
    assert found.resident == told(Blocks()).resident == sorted(of_each)[PROCESSES // 2]
    assert found.resident > 14 * MB  # that live


def test_a_tensor_is_aligned_by_what_its_chunk_has_more():
    heap = Heap()
    for i in range(10):
        heap.allocate(i, 1000 + i)
        assert (heap._blocks[i][0] + 16) % TENSOR == 0
