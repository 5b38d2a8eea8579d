"""The calls of PyTorch's operators that a network makes, each with the least work it could be.

`Calls` notes them; under `Numbers` the same calls are made again, each inside an annotation with
its number, so that a trace tells which kernels are whose. The registered ops of pixeldiff are one
call each, whatever they are made of; their work is that of bench/work.py. Of PyTorch's own,
products count as in its flop counter, and all move what they are given and return.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .trace import CALL, TraceError
from .work import WORK

_SHAPES = 3  # of a call's tensors: as many tell one place in a network from another
# What these are given first is written and not read.
_WRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_"}
_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_NOTHING |= {"_unsafe_view", "_reshape_alias"}
VIEWS = "views"  # calls that move nothing, whatever their names and shapes


@dataclass(frozen=True)
class Call:
    """Args:
    op: its name, without a namespace. site: shapes of its first tensors.
    bytes, flops: at least. speed: see `bench.work.Work`.
    """

    op: str
    site: str
    bytes: int
    flops: int
    speed: float = 1.0


class Calls(TorchDispatchMode):
    """Every operator's call, in `made`, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.made.append(call_of(func, args, kwargs, result))
        return result


class Numbers(TorchDispatchMode):
    """The calls of `like` once more, annotated with their places in it. As quick as can be: what it
    does is between the kernels.

    Raises:
        TraceError: another call than there.
    """

    def __init__(self, like: list[Call]) -> None:
        super().__init__()
        self._names = [f"{CALL}{i}" for i in range(len(like))]
        self._next = iter(zip(self._names, like, strict=True))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, call = next(self._next, (None, None))
        if call is None or call.op not in (VIEWS, func._overloadpacket.__name__):
            raise TraceError(f"{func} is called where {call and call.op} was the time before")
        with record_function(name):
            return func(*args, **kwargs) if kwargs else func(*args)


def call_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Call:
    packet = func._overloadpacket
    name = packet.__name__
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    site = " ".join("x".join(map(str, t.shape)) or "1" for t in given[:_SHAPES])
    if func.namespace == "pixeldiff" and name in WORK:
        work = WORK[name]
        return Call(name, site, work.bytes(args), work.flops(args), work.speed)
    if name in _NOTHING or any(
        r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
    ):
        return Call(VIEWS, "", 0, 0)
    read = given[1:] if name in _WRITES else given
    moved = _bytes(read) + _bytes(t for t in tree_leaves(result) if isinstance(t, Tensor))
    if packet not in flop_registry:
        return Call(name, site, moved, 0)
    flops = flop_registry[packet](*args, **kwargs, out_val=result)
    return Call(name, site, moved, flops, 2.0 if given[0].dtype == torch.float8_e4m3fn else 1.0)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """What is repeated along an axis counts once."""
    total = 0
    for t in tensors:
        count = t.element_size()
        for length, stride in zip(t.shape, t.stride(), strict=True):
            count *= 1 if stride == 0 and length else length
        total += count
    return total
