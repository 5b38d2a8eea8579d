"""A few values, those last asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """Values by key, at most `limit` of them; the one that was not asked for longest goes first.

    Threads may share it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._values

    def __len__(self) -> int:
        with self._lock:
            return len(self._values)

    def get(self, key: Hashable) -> V | None:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Hashable, value: V) -> V:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self.limit:
                self._values.popitem(last=False)
        return value

    def made(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of `key`, made if it is not here. Threads that miss together make one each."""
        value = self.get(key)
        return self.put(key, make()) if value is None else value

    def make_room(self) -> None:
        """Let values go until another one fits."""
        with self._lock:
            while len(self._values) >= max(self.limit, 1):
                self._values.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
