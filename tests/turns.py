"""Threads side by side: one operation each in turn, or freely from one step to the next."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PATIENCE = 60  # seconds that a thread waits for another before the test fails


class Turns:
    """Of several threads, that one runs which has the turn."""

    def __init__(self, count: int) -> None:
        self._left = list(range(count))
        self._changed = threading.Condition()
        self.passed = 0

    def wait(self, me: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._left[0] == me, PATIENCE), "no turn came"

    def give(self, me: int) -> None:
        """The turn goes on; returns when it comes back."""
        with self._changed:
            if self._left[0] == me:
                self.passed += len(self._left) > 1
                self._left.append(self._left.pop(0))
                self._changed.notify_all()
        self.wait(me)

    def leave(self, me: int) -> None:
        with self._changed:
            self._left.remove(me)
            self._changed.notify_all()


class _EachOperation(TorchDispatchMode):
    def __init__(self, turns: Turns, me: int) -> None:
        super().__init__()
        self._turns, self._me = turns, me

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._turns.give(self._me)
        return func(*args, **(kwargs or {}))


class StepByStep:
    """A callback for all threads: nobody begins a step before all have ended theirs."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, self._count, PATIENCE)
        self.met = 0

    def __call__(self, info: Any) -> None:
        self._barrier.wait()

    def _count(self) -> None:
        self.met += 1


def together(works: Sequence[Callable[[], Any]], turns: Turns | None = None) -> list[Any]:
    """What each work gives, run in a thread of its own, on a stream of its own where there are
    any; with `turns` operation by operation. Raises what one of them raises."""
    results: list[Any] = [None] * len(works)
    errors: list[BaseException] = []
    start = threading.Barrier(len(works), timeout=PATIENCE)

    def run(me: int) -> None:
        try:
            with contextlib.ExitStack() as stack:
                if torch.cuda.is_available():
                    stream = torch.cuda.Stream()
                    stack.enter_context(torch.cuda.stream(stream))
                    stack.callback(stream.synchronize)
                start.wait()
                if turns is not None:
                    turns.wait(me)
                    stack.callback(turns.leave, me)
                    stack.enter_context(_EachOperation(turns, me))
                results[me] = works[me]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * PATIENCE)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)
    return results
