"""The arguments of someone else's PiD forward: which are taken over, which must stay unused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ...errors import AccelerationError

REQUIRED = ("x", "t", "y")
OPTIONAL = ("lq_latent", "degrade_sigma")
# Arguments of the published forward that no released pipeline gives a value to, and what to do
# instead where there is something.
UNUSED = {
    "s": "precomputed patch tokens",
    "mask": "every text token takes part in attention, as released; shorten y instead",
    "lq_video_or_image": "released networks take the latent alone; pass lq_latent",
    "lq_mask": "to leave the latent out pass lq_latent=None",
    "feature_indices": "features of single blocks are the module's own forward's",
    "return_features_early": "features of single blocks are the module's own forward's",
    "return_lq_aux": "the RGB head is for training",
}
_PLAIN = (bool, int, float, str)


class Call:
    """The signature of a forward, read once.

    Raises:
        AccelerationError: it is not a PiD network's.
    """

    def __init__(self, forward: Callable[..., Any], who: str) -> None:
        self.who, self.signature = who, inspect.signature(forward)
        self._order: list[str] = []  # by position
        self._required: list[str] = []
        self._defaults: dict[str, Any] = {}
        self._any_name = False
        lacks = [n for n in REQUIRED if n not in self.signature.parameters]
        if lacks:
            raise AccelerationError(
                f"accelerate: {who}.forward{self.signature} is not called as a PiD network, "
                f"forward(x, t, y, lq_latent=..., degrade_sigma=...): it takes no "
                f"{', '.join(lacks)}"
            )
        for p in self.signature.parameters.values():
            if p.kind is p.VAR_KEYWORD:
                self._any_name = True
                continue
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
                self._order.append(p.name)
            if p.default is not p.empty:
                self._defaults[p.name] = p.default
            elif p.name in (*REQUIRED, *OPTIONAL):
                self._required.append(p.name)
            else:
                raise AccelerationError(
                    f"accelerate: {who}.forward{self.signature} needs an argument {p.name!r} that "
                    "PiD networks do not have"
                )

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """x, t, y, lq_latent and degrade_sigma of a call.

        Raises:
            TypeError: the forward does not take such arguments, in its own words.
            AccelerationError: an argument that would have no effect.
        """
        given = {**dict(zip(self._order, args, strict=False)), **kwargs}
        named_twice = len(given) != len(args) + len(kwargs)
        unknown = not self._any_name and any(k not in self.signature.parameters for k in kwargs)
        if named_twice or unknown or any(n not in given for n in (*REQUIRED, *self._required)):
            self.signature.bind(*args, **kwargs)
            raise AccelerationError(
                f"accelerate: {self.who}: x, t and y must be given, each once, got {len(args)} "
                f"unnamed arguments and {', '.join(kwargs) or 'no named ones'}"
            )
        for name, value in given.items():
            if name not in REQUIRED and name not in OPTIONAL and not self._unused(name, value):
                raise self._refusal(name, value)
        values = {name: given[name] for name in REQUIRED}
        for name in OPTIONAL:
            values[name] = given.get(name, self._defaults.get(name))
        if values["lq_latent"] is not None and values["degrade_sigma"] is None:
            raise AccelerationError(
                f"accelerate: {self.who}: degrade_sigma must be given with lq_latent, as to the "
                "module's own forward; torch.zeros(B) says that the latent is clean"
            )
        return values

    def _unused(self, name: str, value: Any) -> bool:
        default = self._defaults.get(name)
        if value is None or value is default:
            return True
        return isinstance(value, _PLAIN) and type(value) is type(default) and value == default

    def _refusal(self, name: str, value: Any) -> AccelerationError:
        shape = getattr(value, "shape", None)
        what = f"a {type(value).__name__} of shape {tuple(shape)}" if shape is not None else value
        why = UNUSED.get(name, "pixeldiff does not know this argument")
        return AccelerationError(
            f"accelerate: {self.who}: {name} must be {self._defaults.get(name)!r}, got {what}: "
            f"{why}. pixeldiff.accelerate(module, fallback=True) runs such calls on the module's "
            "own forward"
        )
