"""The weights of an adopted network at a call: their dtype, whether they changed, cast copies."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn

from ...errors import AccelerationError
from .network import PiDNet

PLAIN = {nn.Parameter, Tensor}  # torch.func.functional_call puts tensors in
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Weights:
    """The parameters of a network, looked up anew whenever they are asked for."""

    def __init__(self, net: PiDNet, who: str) -> None:
        self._who = who
        owners = [(path, m) for path, m in net.named_modules() if m._parameters]
        # Names are taken now: a dict that is shared may hold a parameter the network has not.
        self._slots = [
            (m._parameters, name, f"{path}.{name}" if path else name)
            for path, m in owners
            for name, p in m._parameters.items()
            if p is not None
        ]

    def now(self) -> list[nn.Parameter]:
        """In order.

        Raises:
            AccelerationError: one is no parameter any more.
        """
        try:
            return [parameters[name] for parameters, name, _ in self._slots]
        except KeyError:
            gone = next(full for parameters, name, full in self._slots if name not in parameters)
            raise self._refusal(f"{gone} is no parameter any more") from None

    def one_kind(self) -> tuple[torch.dtype, torch.device]:
        """The dtype and the device that all parameters have.

        Raises:
            AccelerationError: they differ, or are not plain parameters (quantised, sharded).
        """
        now = self.now()
        first = now[0]
        if not PLAIN.issuperset(map(type, now)):
            which = next(i for i, p in enumerate(now) if type(p) not in PLAIN)
            raise self._refusal(
                f"{self._slots[which][2]} is a {type(now[which]).__name__}, not a plain "
                "torch.nn.Parameter; quantised and sharded weights are not supported"
            )
        if first.dtype not in DTYPES:
            raise self._refusal(f"its weights are {first.dtype}, not {_listed(DTYPES)}")
        for what in ("dtype", "device"):
            if len(set(map(attrgetter(what), now))) > 1:
                want = getattr(first, what)
                which = next(i for i, p in enumerate(now) if getattr(p, what) != want)
                raise self._refusal(
                    f"its weights must have one {what}: {self._slots[0][2]} has {want}, "
                    f"{self._slots[which][2]} {getattr(now[which], what)}; use module.to(...)"
                )
        return first.dtype, first.device

    def _refusal(self, reason: str) -> AccelerationError:
        return AccelerationError(f"accelerate: {self._who}: {reason}")


class State:
    """What tensors held at some time, as far as their version counters tell. Holds none of them.

    `None` among the tensors stands for itself.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        when_freed: Callable[[object], None] | None = None,
    ) -> None:
        self._refs = [_nothing if t is None else weakref.ref(t, when_freed) for t in tensors]
        self._marks = [_mark(t) for t in tensors]

    def is_of(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these are the same tensors, unchanged."""
        return len(tensors) == len(self._refs) and all(
            ref() is t and _mark(t) == mark
            for t, ref, mark in zip(tensors, self._refs, self._marks, strict=True)
        )


def has_version(tensors: Sequence[Tensor | None]) -> bool:
    """Whether changes can be seen: tensors made under inference_mode do not count theirs."""
    return not any(t is not None and t.is_inference() for t in tensors)


def cast(net: PiDNet, dtype: torch.dtype) -> PiDNet:
    """The network with its weights in another dtype; the given one is left as it is."""
    return _with_cast_weights(net, dtype)


def _with_cast_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    # Module by module: making a PiDNet takes ten times as long as copying one without its weights.
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__.update(module.__dict__)
    copied.__dict__["_parameters"] = {
        name: None if p is None else p.detach().to(dtype) for name, p in module._parameters.items()
    }
    copied.__dict__["_modules"] = {
        name: None if m is None else _with_cast_weights(m, dtype)
        for name, m in module._modules.items()
    }
    return copied


def _nothing() -> None:
    """A weak reference to None. To a tensor that is gone it is one too, but with another mark."""


def _mark(t: Tensor | None) -> tuple | None:
    return None if t is None else (t._version, t.data_ptr(), t.shape, t.stride(), t.dtype)


def _listed(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
