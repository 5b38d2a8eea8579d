"""Run someone else's PiD network on pixeldiff's ops, in place and for as long as wanted."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...errors import AccelerationError, NotAcceleratedWarning
from ...ops.registry import needs_grad
from .call_cache import CallCache, for_batch
from .config import PiDConfig
from .foreign_call import Call
from .foreign_check import check_results
from .foreign_network import Structure, adopt, find, kind
from .foreign_weights import Weights
from .network import PiDNet

Module = TypeVar("Module", bound=nn.Module)
_ABSENT = object()
_GRADIENTS = (
    "accelerate: {} runs its own forward, because gradients are enabled and its weights or inputs "
    "ask for them; call it under torch.no_grad() or torch.inference_mode()"
)
_log = logging.getLogger("pixeldiff.accelerate")


def accelerate(
    module: Module,
    *,
    config: PiDConfig | None = None,
    cache: bool = False,
    fallback: bool = False,
    verify: bool = False,
) -> Module:
    """Make a PiD network that is not pixeldiff's run on pixeldiff's ops.

        pixeldiff.accelerate(net)          # or whatever holds it: model, pipeline part, wrapper
        v = net(x, t, y, lq_latent=latent, degrade_sigma=sigma)     # called as before
        pixeldiff.restore(net)             # everything as it was

    Every PiD network in `module` is found by its parameter names, and `forward` of that instance is
    replaced; class, parameters, hooks of the network itself and state dict stay as they are. The
    weights are the network's own: `.to()`, `load_state_dict`, an optimiser's step and a parameter
    that is replaced all count from the next call on. Calling it again changes the options.

    Results are the network's own to rounding, in the dtype its own forward would return: the
    weights', or autocast's inside `torch.autocast`. There the weights are cast before each call
    and dropped after it, as autocast does with those it casts; `module.bfloat16()` saves both.
    A call that needs gradients runs the network's own forward (in evaluation mode with a
    warning). `last_repa_tokens`, where the network has it, is None after an accelerated call.

    `copy.deepcopy` copies the acceleration too; a pickle holds the network without it.

    Args:
        module: a PiD network or a module that contains some. Not on pixeldiff's ops already.
        config: geometry, where neither shapes nor attributes nor a released network tell it.
        cache: keep what does not depend on x and t (and, under autocast, the cast weights) from one
            call to the next. Used again only for the same tensors `y`, `lq_latent` and
            `degrade_sigma`, unchanged, with unchanged weights; dropped as soon as one of the three
            is freed, and by `module.forward.clear()`. A change is seen through autograd's version
            counters, which writes through `.data`, raw pointers or a CUDA graph's replay pass by:
            leave it off where those happen.
        fallback: run the network's own forward where a call cannot be taken over (a mask, feature
            taps, context parallelism, changed modules) instead of raising.
        verify: call both forwards once with a random image of a few patches and compare. For copies
            of the published class that may have been changed where names, shapes and settings do
            not tell; needs the weights to be loaded.

    Returns:
        `module`.

    Raises:
        AccelerationError: no PiD network, one of another geometry, or one whose modules do more
            than their weights say (LoRA wrappers, quantised linears, forward hooks), or that failed
            to verify; names what and where, and has replaced nothing. The same from a call that
            cannot be taken over.

    Cost: some tens of ms once, about 0.2 ms of Python a call (0.5 ms with `cache`). Memory: the
    position tables of the last size (9 MB at 2048); with `cache` the condition too (up to 0.7 GB at
    2048 in bf16).
    """
    options = {"config": config, "cache": cache, "fallback": fallback}
    ready = [(net, Accelerated(net, **options)) for net in find(module).values()]
    if verify:
        for net, forward in ready:
            check_results(kind(net), _own(net), forward, *forward.describe())
            forward.clear()
    for net, forward in ready:
        _set_forward(net, forward)
    return module


def restore(module: Module) -> Module:
    """Undo `accelerate`: every network in `module` runs its own forward again. Returns `module`."""
    for inner in module.modules():
        forward = inner.__dict__.get("forward")
        if isinstance(forward, Accelerated):
            forward.remove()
    return module


@contextlib.contextmanager
def accelerated(module: Module, **options: Any) -> Iterator[Module]:
    """`accelerate` for the length of a `with` block; arguments and errors as there.

    with pixeldiff.accelerated(net, cache=True):
        ...
    """
    before = [(net, net.__dict__.get("forward", _ABSENT)) for net in find(module).values()]
    accelerate(module, **options)
    try:
        yield module
    finally:
        for net, forward in before:
            _set_forward(net, forward)


class Accelerated:
    """What stands as `forward` on an accelerated network.

    It does not keep the network alive and is no part of its state dict.

    Raises:
        AccelerationError: as `accelerate`.
    """

    def __init__(self, network: nn.Module, **options: Any) -> None:
        before = network.__dict__.get("forward", _ABSENT)
        if isinstance(before, Accelerated):
            before = before._before
        if before is not _ABSENT and before != _own(network):
            raise AccelerationError(
                f"accelerate: forward of {kind(network)} has been replaced on the instance by "
                f"{before!r}, which would be passed by; accelerate first, or undo that"
            )
        self._bind(network, before, options)
        self._adopted: _Adopted | None = _adopt(network, options["config"])

    def _bind(self, network: nn.Module, before: Any, options: dict[str, Any]) -> None:
        self._network, self._before, self._options = weakref.ref(network), before, options
        self._cache = CallCache(options["cache"])
        self.__signature__ = inspect.signature(_own(network))
        self.__doc__ = _own(network).__doc__

    def describe(self) -> tuple[PiDConfig, torch.dtype, torch.device]:
        """The geometry, the weights' dtype and their device."""
        return self._adopted.net.config, *self._adopted.weights.one_kind()

    def clear(self) -> None:
        """Free what was kept between calls."""
        self._cache.clear()

    def remove(self) -> None:
        """Put the network's own forward back."""
        self.clear()
        network = self._network()
        if network is not None and network.__dict__.get("forward") is self:
            _set_forward(network, self._before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        network = self._network()
        if network is None:
            raise AccelerationError(
                "accelerate: the network of this forward is gone; keep the module, not its forward"
            )
        try:
            if not (torch.is_grad_enabled() and self._needs_grad(network, args, kwargs)):
                return self._run(network, args, kwargs)
            if not network.training:
                warnings.warn(_GRADIENTS.format(kind(network)), NotAcceleratedWarning, stacklevel=4)
        except AccelerationError as error:
            if not self._options["fallback"]:
                raise
            _log.debug("own forward of %s: %s", kind(network), error)
        return _own(network)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Accelerated:
        network = self._network()
        # A network that is being copied is there already, but empty: it is adopted when called.
        copied = object.__new__(Accelerated)
        copied._bind(memo.get(id(network), network), _ABSENT, self._options)
        copied._adopted = None
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        # What unpickles it has the class, perhaps not pixeldiff: it gets the class's own forward.
        return getattr, (self._network(), "forward")

    def _needs_grad(self, network: nn.Module, args, kwargs) -> bool:
        if needs_grad(*args, *kwargs.values()):
            return True
        parameters = self._adopted.weights.now() if self._adopted else network.parameters()
        return any(p.requires_grad for p in parameters)

    def _run(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        adopted, compiling = self._adopted, torch.compiler.is_compiling()
        if compiling and (
            adopted is None or adopted.structure.changed() or _autocast_dtype(adopted.net)
        ):
            return self._run_outside_graph(network, args, kwargs)
        if not compiling and (adopted is None or adopted.structure.changed()):
            self.clear()
            self._adopted = adopted = _adopt(network, self._options["config"])
        values = adopted.call.read(args, kwargs)
        if getattr(network, "_cp_group", None) is not None:
            raise AccelerationError(
                f"accelerate: {kind(network)} has context parallelism enabled, which pixeldiff "
                "does not do; call its disable_context_parallel()"
            )
        if getattr(network, "last_repa_tokens", None) is not None:
            network.last_repa_tokens = None  # those of an earlier call of its own forward
        run = _traced if compiling else self._eager
        return run(adopted, **values)

    _run_outside_graph = torch.compiler.disable(_run)

    def _eager(self, adopted: _Adopted, x, t, y, lq_latent, degrade_sigma) -> Tensor:
        weights, net = adopted.weights, adopted.net
        dtype, device = weights.one_kind()
        if x.device != device:
            raise AccelerationError(
                f"accelerate: x must be on {device} as the weights are, got {x.device}"
            )
        other = _autocast_dtype(net)
        net = self._cache.in_dtype(net, weights, other)
        with _without_autocast(device):
            given, size = (y, lq_latent, degrade_sigma), tuple(x.shape[-2:])
            condition = self._cache.condition(net, weights, given, size)
            v = net.step(_as_image(x, dtype), t.reshape(-1), condition)
        return v.to(other or dtype)


@dataclass(frozen=True)
class _Adopted:
    """A network as it was found."""

    net: PiDNet
    weights: Weights
    structure: Structure
    call: Call


def _adopt(network: nn.Module, config: PiDConfig | None) -> _Adopted:
    who = kind(network)
    call, net = Call(_own(network), who), adopt(network, config)
    return _Adopted(net, Weights(net, who), Structure(network), call)


def _traced(adopted: _Adopted, x, t, y, lq_latent, degrade_sigma) -> Tensor:
    """The forward as torch.compile sees it: nothing is kept, guards notice what changes."""
    net = adopted.net
    with _without_autocast(net.device):
        sigma = for_batch(degrade_sigma, y)
        condition = net.prepare(lq_latent, y, sigma, size=tuple(x.shape[-2:]))
        v = net.step(_as_image(x, net.dtype), t.reshape(-1), condition)
    return v.to(net.dtype)


def _own(network: nn.Module) -> Callable[..., Any]:
    """The forward of the network's class."""
    return MethodType(type(network).forward, network)


def _set_forward(network: nn.Module, forward: Any) -> None:
    if forward is _ABSENT:
        network.__dict__.pop("forward", None)
    else:
        network.__dict__["forward"] = forward


def _autocast_dtype(net: PiDNet) -> torch.dtype | None:
    """What autocast would compute in, None if that is the weights' dtype anyway."""
    kind_of_device, dtype = net.device.type, net.dtype
    if dtype == torch.float64 or not _has_autocast(kind_of_device):
        return None  # autocast leaves fp64 alone
    if not torch.is_autocast_enabled(kind_of_device):
        return None
    wanted = torch.get_autocast_dtype(kind_of_device)
    return None if wanted == dtype else wanted


@torch.compiler.assume_constant_result
def _has_autocast(kind_of_device: str) -> bool:
    # The compiler of torch 2.11 cannot trace it.
    return torch.amp.is_autocast_available(kind_of_device)


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    if _has_autocast(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _as_image(x: Tensor, weights: torch.dtype) -> Tensor:
    return x.to(torch.float64 if weights == torch.float64 else torch.float32)
