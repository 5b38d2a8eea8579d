"""The residual stream between two sub-layers."""

from __future__ import annotations

from torch import Tensor

from ... import ops
from ...ops.registry import needs_grad
from ..devices import kind_of
from ..feed_forward import SwiGLU
from ..fp8 import Rows

# Devices on which a piece of the feed-forward is added to the stream at once, while it is in the
# caches. Elsewhere the next norm adds all of it.
ADD_EACH_PIECE = ("cpu",)


class Stream:
    """A residual stream x (B, N, D), and at most one update that is yet to be made to it.

    A sub-layer leaves its result with `add`, a gate of the latent its inputs with `inject`. The
    norm that opens the next sub-layer reads every token anyway: it makes the update in the same
    pass. The stream changes in place, so that nobody holds what it was.
    """

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self._ours = False  # whether x may be written to
        self._branch: tuple[Tensor, Tensor] | None = None  # (y, gate)
        self._gate: tuple[Tensor, Tensor, Tensor] | None = None  # (feature, weight, lq_logit)

    def add(self, gate: Tensor, y: Tensor) -> None:
        """x + gate * y for y (B, N, D) and gate (B, D)."""
        self._settle()
        self._branch = (y, gate)

    def feed(self, mlp: SwiGLU, gate: Tensor, h: Tensor | Rows, chunk: int | None = None) -> None:
        """x + gate * mlp(h) for h (B, N, D) and gate (B, D); `chunk` as for `SwiGLU`."""
        if kind_of(h.device) in ADD_EACH_PIECE:
            self.replace(mlp.add_gated(self.x, gate, h, chunk))
        else:
            self.add(gate, mlp(h, chunk))

    def inject(self, feature: Tensor, weight: Tensor, lq_logit: Tensor) -> None:
        """x + sigmoid(weight x + lq_logit) * feature, see `pixeldiff.ops.sigma_gate`."""
        self._settle()
        self._gate = (feature, weight, lq_logit)

    def norm(
        self, weight: Tensor, scale: Tensor, shift: Tensor, *, fp8: bool = False
    ) -> Tensor | Rows:
        """rms_norm(x) * weight * (1 + scale) + shift of the updated x; (B, N, D).

        `fp8` quantises it on its way to an `Fp8Linear`.
        """
        modulation = (weight, scale, shift)
        if fp8:
            return self._norm_fp8(*modulation)
        if self._branch is not None:
            x, h = ops.gated_residual_norm(self._x, *self._branch, *modulation)
            self.replace(x)
        elif self._gate is not None:
            x, h = ops.sigma_gate_norm(self._x, *self._gate, *modulation)
            self.replace(x)
        else:
            h = ops.rms_norm_modulate(self._x, *modulation)
        return h

    def _norm_fp8(self, *modulation: Tensor) -> Rows:
        if self._branch is not None:
            x, *rows = ops.gated_residual_norm_fp8(self._x, *self._branch, *modulation)
            self.replace(x)
        elif self._gate is not None:
            x, *rows = ops.sigma_gate_norm_fp8(self._x, *self._gate, *modulation)
            self.replace(x)
        else:
            rows = ops.rms_norm_modulate_fp8(self._x, *modulation)
        return Rows(*rows, self._x.dtype)

    @property
    def rows(self) -> int:
        """N."""
        return self._x.shape[1]

    @property
    def x(self) -> Tensor:
        """The stream, updated."""
        self._settle()
        return self._x

    def replace(self, x: Tensor) -> None:
        """Another stream, which is written to from now on.

        Not the property's setter: the compiler of torch 2.11 loses what setters do, and without a
        word.
        """
        self._x, self._ours, self._branch, self._gate = x, True, None, None

    def _settle(self) -> None:
        if self._branch is not None:
            y, gate = self._branch
            in_place = self._ours and not needs_grad(self._x, y, gate)
            add = self._x.addcmul_ if in_place else self._x.addcmul
            self.replace(add(gate[:, None], y))
        elif self._gate is not None:
            self.replace(ops.sigma_gate(self._x, *self._gate))
