"""Registration of ops with PyTorch and the choice of a backend for each call.

An op is one schema in `torch.library`, one reference implementation in plain PyTorch (its
definition) and any number of fused backends. A backend is a module with two functions that take
the op's arguments in schema order:

    why_not(*args) -> str | None     None if it can take the call, else the reason
    launch(*args)  -> Tensor(s)      the result, contiguous

Free choice tries what measurement lists for such calls (`choice.py`; nothing on a CPU), then walks
the op's backends in order, those that offer themselves for the call, and ends at the reference. A
forced backend never falls through: it raises with its reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import choice

BACKENDS = ("cuda", "triton", "cpu", "reference")
_log = logging.getLogger("pixeldiff.ops")


@dataclass(frozen=True)
class Backend:
    """A fused implementation of one op.

    `module` is a module, or "module:attribute" for something in it with the same two functions.
    `automatic` is False for one that runs only when it is asked for by name (not yet proven on the
    hardware it is written for), or a function of the op's arguments that is true of the calls it
    should take unasked (where the backends after it, the reference above all, do poorly). It is
    asked before the module is imported and does not repeat what `why_not` refuses.
    """

    name: str
    module: str
    automatic: bool | Callable[..., bool] = True

    def offers(self, *args: Any) -> bool:
        """Whether free choice considers it for such a call where nothing was measured."""
        return self.automatic(*args) if callable(self.automatic) else self.automatic

    def load(self) -> Any:
        """Its module, or what `module` names in one.

        Raises:
            ImportError: it cannot be imported here, for want of Triton or the extension.
        """
        found = _import(self.module)
        if isinstance(found, str):
            raise ImportError(found)
        return found


@dataclass(frozen=True, eq=False)  # by identity: a key of what is cached for it
class Op:
    name: str
    reference: Callable[..., Any]
    backends: tuple[Backend, ...]


OPS: dict[str, Op] = {}
_forced: ContextVar[dict[str, str] | None] = ContextVar("pixeldiff_backend", default=None)


@functools.cache
def _import(place: str) -> Any:
    """What a backend's `module` names, or why it is not there, a string: asked by every call, and
    found out once."""
    module, _, attribute = place.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as e:
        return f"{module} cannot be imported: {e}"
    return getattr(found, attribute) if attribute else found


@functools.cache
def _environment() -> dict[str, str]:
    name = os.environ.get("PIXELDIFF_BACKEND", "")
    if name in ("", "auto"):
        return {}
    if name not in BACKENDS:
        raise ValueError(
            f"PIXELDIFF_BACKEND must be one of auto, {', '.join(BACKENDS)}, got {name!r}"
        )
    return {"*": name}


@contextlib.contextmanager
def backend(default: str | None = None, /, **per_op: str) -> Iterator[None]:
    """Force backends inside a `with` block, for this thread or task only.

        with pixeldiff.backend("reference"): ...
        with pixeldiff.backend(rms_norm_modulate="cpu"): ...      # the others stay free

    Args:
        default: backend of every op: "cuda", "triton", "cpu" or "reference"; None or "auto" frees.
        per_op: backend of single ops, by op name; also those that an op alone has.

    Raises:
        ValueError: an unknown backend or op. Calls inside raise NotImplementedError when a forced
            backend cannot take them.
    """
    table = {}
    for key, name in {"*": default, **per_op}.items():
        if key != "*" and key not in OPS:
            raise ValueError(f"backend: unknown op {key!r}; ops are {', '.join(sorted(OPS))}")
        if name is None or name == "auto":
            continue
        own = () if key == "*" else (b.name for b in OPS[key].backends)
        known = tuple(dict.fromkeys((*BACKENDS, *own)))
        if name not in known:
            raise ValueError(
                f"backend: {name!r} is not a backend; choose one of auto, {', '.join(known)}"
            )
        table[key] = name
    token = _forced.set(table)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend(op: str) -> str | None:
    """The backend forced for `op` by a `backend(...)` block or PIXELDIFF_BACKEND, else None."""
    table = _forced.get()
    if table is None:
        table = _environment()
    return table.get(op, table.get("*"))


@torch.compiler.assume_constant_result
def named_backend(op: str) -> str | None:
    """The backend asked for by a `backend(op=...)` block that names `op` itself, else None.

    Of an op that stands for several others: unnamed, those others are called, each with its own
    choice. Under `torch.compile` the choice is made while tracing.
    """
    return (_forced.get() or {}).get(op)


@torch.compiler.assume_constant_result
def _reference_forced(op: str) -> bool:
    # Dynamo cannot trace a ContextVar. Evaluated while tracing, this decides whether the compiler
    # sees plain PyTorch or the opaque op; the op itself still reads the choice at every call.
    return forced_backend(op) == "reference"


def explain(op: str, *args: Any) -> list[tuple[str, str | None]]:
    """(backend, reason it cannot take this call or None) for every backend of `op`, in order.

    What measurement lists for such calls comes first. One that can take the call may still run on
    request only: see `on_request`.
    """
    listed, rest = _walk(OPS[op], choice.order(op, args))
    rows = [_row(b, args) for b in (*listed, *rest)]
    return rows if None in listed else [*rows, _row(None, args)]


def on_request(op: str, *args: Any) -> dict[str, str]:
    """Backends of `op` that take this call only when they are forced, each with a word on it."""
    return {
        b.name: "runs on request only" + (" for such a call" if callable(b.automatic) else "")
        for b in _walk(OPS[op], choice.order(op, args))[1]
        if not b.offers(*args)
    }


def prefers(op: str, *args: Any) -> bool:
    """Whether measurement puts a backend of `op` that takes this call before its reference.

    For an op that stands for several others, which are called unless it is named or preferred.
    Never where a backend is forced or a gradient is needed.
    """
    order = choice.order(op, args)
    if not order or forced_backend(op) is not None or needs_grad(*args):
        return False
    for b in _walk(OPS[op], order)[0]:
        if b is None or _reason(b, args) is None:
            return b is not None
    return False


def _row(b: Backend | None, args: tuple[Any, ...]) -> tuple[str, str | None]:
    return ("reference", None) if b is None else (b.name, _reason(b, args))


@functools.cache
def _walk(op: Op, order: tuple[str, ...]) -> tuple[tuple[Backend | None, ...], tuple[Backend, ...]]:
    """The backends that `order` names, None for the reference; and the others, in the op's order.

    Raises:
        ValueError: `order` names one that the op does not have.
    """
    by_name: dict[str, Backend | None] = {b.name: b for b in op.backends}
    by_name["reference"] = None
    for name in order:
        if name not in by_name:
            raise ValueError(
                f"{choice.path(op.name)} lists {name!r}, which {op.name} does not have; its "
                f"backends are {', '.join(by_name)}; write it again with `{choice.CHOOSE}`"
            )
    rest = tuple(b for b in op.backends if b.name not in order)
    return tuple(by_name[name] for name in order), rest


def _reason(b: Backend, args: tuple[Any, ...]) -> str | None:
    try:
        module = b.load()
    except ImportError as e:
        return str(e)
    return module.why_not(*args)


def _run(op: Op, args: tuple[Any, ...]) -> Any:
    name = forced_backend(op.name)
    if name == "reference":
        return op.reference(*args)
    order = choice.order(op.name, args) if name is None else ()
    listed, rest = _walk(op, order) if order else ((), op.backends)
    for b in listed:
        if b is None:
            return op.reference(*args)
        reason = _reason(b, args)
        if reason is None:
            return b.load().launch(*args)
        _log.debug("%s: %s cannot run: %s", op.name, b.name, reason)
    for b in rest:
        if b.name != name if name is not None else not b.offers(*args):
            continue
        reason = _reason(b, args)
        if reason is None:
            return b.load().launch(*args)
        if name is not None:
            raise NotImplementedError(f'{op.name}(backend="{name}"): {reason}')
        _log.debug("%s: %s cannot run: %s", op.name, b.name, reason)
    if name is not None:
        have = ", ".join([b.name for b in op.backends] + ["reference"])
        raise NotImplementedError(
            f'{op.name}(backend="{name}"): there is no such implementation; choose from {have}'
        )
    return op.reference(*args)


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backends: tuple[Backend, ...] = (),
) -> Callable[..., Any]:
    """Register an op under `torch.ops.pixeldiff` and return the function that calls it.

    Calls that need gradients, and calls under `backend("reference")`, go to the reference directly,
    so autograd and `torch.compile` see plain PyTorch. Fused backends are inference only.
    """
    op = Op(name, reference, backends)
    OPS[name] = op
    qualified = f"pixeldiff::{name}"
    torch.library.define(qualified, schema)
    torch.library.register_fake(qualified, fake)

    def kernel(*args: Any) -> Any:
        return _contiguous(_run(op, args))

    torch.library.register_kernel(qualified, "default", kernel)
    registered = getattr(torch.ops.pixeldiff, name).default

    def call(*args: Any) -> Any:
        if needs_grad(*args) or _reference_forced(name):
            return _contiguous(reference(*args))
        return registered(*args)

    return call


def _contiguous(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.contiguous()
    return tuple(r.contiguous() for r in result)


def needs_grad(*args: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def upcast(t: Tensor) -> Tensor:
    """fp32, the arithmetic of every op; fp64 stays, so that a reference can be its own oracle."""
    return t if t.dtype == torch.float64 else t.float()
