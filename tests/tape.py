"""A recorder for CPUs that forgets Python as a CUDA graph does: only operations on tensors stay."""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """The operations made inside the block, their arguments and results at fixed addresses."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.calls, self.replays, self.released = [], 0, False
        self.inputs: dict[int, torch.Tensor] = {}  # by storage: read, made by no call, no weights
        self._own = own
        self.fixed: set[int] = set()  # storages that the turn at hand was told of

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        read = {t.untyped_storage()._cdata: t for t in _tensors((args, kwargs))}
        given = set(read)
        fresh_scalar = func is torch.ops.aten.lift_fresh.default  # torch.tensor(number)
        self._own |= {
            at for at, t in read.items() if fresh_scalar or isinstance(t, torch.nn.Parameter)
        }
        self.inputs |= {at: t for at, t in read.items() if at not in self._own}
        result = func(*args, **kwargs)
        fresh = [t for t in _tensors(result) if t.untyped_storage()._cdata not in given]
        self._own |= {t.untyped_storage()._cdata for t in fresh}
        self.calls.append((func, args, kwargs, fresh))
        return result

    def poison(self) -> None:
        """A CUDA graph that was captured has not been run."""
        for *_, fresh in self.calls:
            for t in fresh:
                t.fill_(float("nan") if t.is_floating_point() else 0)

    def replay(self) -> None:
        assert not self.released
        unnamed = [tuple(t.shape) for at, t in self.inputs.items() if at not in self.fixed]
        assert not unnamed, f"a turn must name what its recordings read; it left out {unnamed}"
        self.replays += 1
        with torch.inference_mode():  # may write to whatever mode the tensors were made in
            for func, args, kwargs, fresh in self.calls:
                again = _tensors(func(*args, **kwargs))
                for ours, theirs in zip(fresh, again if fresh else (), strict=True):
                    ours.copy_(theirs)


class TapeRecorder:
    """`refuse` is the reason it will not record, `fail` what goes wrong when it does."""

    def __init__(self) -> None:
        self.refuse: str | None = None
        self.fail: Exception | None = None
        self.decodes: list[list[Tape]] = []
        self.turns = self.releases = 0
        self._in_turn = False

    @property
    def replays(self) -> int:
        return sum(tape.replays for tapes in self.decodes for tape in tapes)

    def why_not(self) -> str | None:
        return self.refuse

    def record(self, warm_up, works):
        warm_up()
        tapes, own = [], set()
        for work in works:
            with Tape(own) as tape:
                work()
            tapes.append(tape)
            if self.fail is not None:
                raise self.fail
        for tape in tapes:
            tape.poison()
        self.decodes.append(tapes)
        return tapes

    @contextlib.contextmanager
    def turn(self, *fixed):
        assert not self._in_turn, "two decodes use the recordings at the same time"
        self._in_turn = True
        self.turns += 1
        for tape in (tape for tapes in self.decodes for tape in tapes):
            tape.fixed = {t.untyped_storage()._cdata for t in fixed}
        try:
            yield
        finally:
            self._in_turn = False

    def release(self) -> None:
        self.releases += 1
        for tapes in self.decodes:
            for tape in tapes:
                tape.released = True


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
