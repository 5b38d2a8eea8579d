"""The first operation that makes NaN or infinity, and whose it is.

Forward hooks would not do: the blocks change their streams in place and hand parameters to fused
ops, so that most of the work is no module's call; and a hook on a network that threads share is
every thread's. A dispatch mode is one thread's own, sees every operation, and changes no module.
"""

from __future__ import annotations

import bisect
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...errors import NonFiniteError
from ...finite import ends, tally

# What they return has no values yet.
_UNWRITTEN = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty"}
_UNWRITTEN |= {"new_empty_strided", "resize_", "resize_as_", "set_"}
SHOWN = 3  # inputs of an operation; behind the first ones come tables
_NARROW = (torch.float16, torch.bfloat16)


class Inspection(TorchDispatchMode):
    """Checks the result of every operation of the thread that entered it.

    Args:
        net: whose modules and parameters are named.
        precision: of its weights, for advice.
        place: where in the run it is, for the message.

    Raises, where the operation is called:
        NonFiniteError: its result holds NaN or infinity.
    """

    def __init__(self, net: nn.Module, precision: str, place: Callable[[], Any]) -> None:
        super().__init__()
        self._net, self._precision, self._place = net, precision, place
        self._paused = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._paused or _is_view(func) or func.overloadpacket.__name__ in _UNWRITTEN:
            return result
        for made in _floats(result):
            if not _finite(made):
                raise self._error(func, args, kwargs, made)
        return result

    def _error(self, func, args, kwargs, made: Tensor) -> NonFiniteError:
        named = _Parameters(self._net)
        inputs, parameters = [], []
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is None or not argument.alias_info.is_write:
                for tensor in _floats(value):
                    name = named.of(tensor)
                    (parameters if name else inputs).append((name, tensor))
        for tensor in _floats(list(kwargs.values())):
            name = named.of(tensor)
            (parameters if name else inputs).append((name, tensor))
        module = _common([name for name, _ in parameters]) or _calling(self._net)
        op = func._schema.name.rpartition("::")[2]
        place = self._place()
        text = (
            f"{module or 'the sampler'} ({op}) made {tally(made)} in {_dtype(made)}, {place}: its "
            f"input is {_ranges([t for _, t in inputs])}"
        )
        damaged = next((name for name, t in parameters if not _finite(t)), None)
        if damaged is not None:
            held = tally(named.whole(damaged))
            text += f"; its parameter {damaged} holds {held}: the weights are bad"
        elif any(not _finite(t) for _, t in inputs):
            text += ", which was not finite before"
        elif made.dtype in _NARROW or self._precision != "fp32":
            text += f'; {_dtype(made)} overflowed: try precision="fp32"'
        else:
            text += "; are the weights, the latent and the embeddings of one and the same model?"
        return NonFiniteError(text, step=place.step, module=module)


def _is_view(func) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


def _floats(values: Any) -> list[Tensor]:
    leaves = [values] if isinstance(values, Tensor) else tree_leaves(values)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point() and t.numel() > 0]


def _finite(t: Tensor) -> bool:
    if t.device.type == "meta":
        return True
    return bool(ends(t).isfinite().all())


def _ranges(tensors: Sequence[Tensor]) -> str:
    return " and ".join(map(_range, tensors[:SHOWN])) or "none"


def _range(t: Tensor) -> str:
    values = t.detach().double()
    finite = values[values.isfinite()]
    ends = f"in [{finite.min():.3g}, {finite.max():.3g}]" if len(finite) else "nowhere finite"
    held = "" if len(finite) == t.numel() else f" but for {tally(t)}"
    return f"{tuple(t.shape)} {_dtype(t)} {ends}{held}"


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


class _Parameters:
    """The names of a network's parameters by their place in memory, views of them included."""

    def __init__(self, net: nn.Module) -> None:
        self._held = {
            f"{path}.{name}".lstrip("."): t
            for path, module in _modules(net).items()
            for name, t in (*module._parameters.items(), *module._buffers.items())
            if t is not None and not t.is_meta
        }
        spans = [(t.data_ptr(), t.nbytes, name, t.device) for name, t in self._held.items()]
        self._spans = sorted(spans, key=lambda span: span[0])
        self._starts = [start for start, *_ in self._spans]

    def whole(self, name: str) -> Tensor:
        return self._held[name]

    def of(self, t: Tensor) -> str | None:
        at = bisect.bisect_right(self._starts, t.data_ptr()) - 1
        if at < 0:
            return None
        start, length, name, device = self._spans[at]
        return name if t.data_ptr() < start + length and t.device == device else None


def _modules(net: nn.Module) -> dict[str, nn.Module]:
    """By name; of blocks whose weights visit the device, the one that has them."""
    offload = getattr(net, "offload", None)
    return dict(net.named_modules()) if offload is None else offload.as_running(net)


def _common(names: Sequence[str | None]) -> str | None:
    """The innermost module that holds all these parameters."""
    if not names:
        return None
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or None


def _calling(net: nn.Module) -> str | None:
    """The module of the network whose code is running: the innermost one on the call stack."""
    names = {id(module): name for name, module in _modules(net).items()}
    frame = sys._getframe()
    while frame is not None:
        for local in list(frame.f_locals.values()):
            if isinstance(local, nn.Module) and names.get(id(local)):
                return names[id(local)]
        frame = frame.f_back
    return None
