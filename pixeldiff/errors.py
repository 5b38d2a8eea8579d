"""What pixeldiff raises and warns when a file, a latent or a size cannot be used.

Every error is a `ValueError`, so a host that knows none of these names still catches them; but
`NonFiniteError` is an `ArithmeticError`, as nothing that was passed need be wrong.
"""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be used. Nothing of it has been loaded."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No such file, directory, packaged model or hub repository; or several where one is needed."""

    # FileNotFoundError would show a lone argument as an errno.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class CheckpointFormatError(CheckpointError):
    """Not a format that is read, or a damaged (truncated, garbled) file."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle that holds more than tensors. It has not been executed."""


class ForeignCheckpointError(CheckpointError):
    """A readable file, but of another kind of model."""


class IncompleteCheckpointError(CheckpointError):
    """A checkpoint that lacks tensors of its network. `missing` holds their names."""

    def __init__(self, message: str, missing: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing


class CheckpointShapeError(CheckpointError):
    """A tensor has another shape than the network's."""


class NonFiniteCheckpointError(CheckpointError):
    """A tensor holds NaN or infinity."""


class UnknownGeometryError(CheckpointError):
    """A network that was never released, and nothing says what its settings are."""


class AmbiguousCheckpointError(CheckpointError):
    """Several released networks fit the file. `choices` holds their short names."""

    def __init__(self, message: str, choices: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.choices = choices


class BackboneMismatchError(CheckpointError):
    """The backbone (or variant) asked for cannot be the file's."""


class UnknownNameError(ValueError):
    """No released variant or backbone has this name. The message lists those that exist."""


class LatentError(ValueError):
    """A latent whose shape, dtype or values the named backbone cannot have produced."""


class SizeError(ValueError):
    """An image size the network cannot produce."""


class ResumeError(ValueError):
    """A folder of kept work that cannot be gone on with: another job's, or in use."""


class NonFiniteError(ArithmeticError):
    """A network made NaN or infinity. No image was made.

    `step` is that of the network call, 1-based, 0 before the first one; `module` the name of the
    module that made it, where `debug=True` found one.
    """

    def __init__(self, message: str, *, step: int = 0, module: str | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.module = module


class BudgetError(ValueError):
    """Nothing fits the memory allowed. `smallest` holds the bytes that would do, or None."""

    def __init__(self, message: str, smallest: int | None = None) -> None:
        super().__init__(message)
        self.smallest = smallest


class MemoryWarning(UserWarning):
    """A picture is made in another way than it was asked for, for want of memory."""


class AccelerationError(ValueError):
    """`accelerate` cannot stand in for a module, or for one call of it. Nothing was computed."""


class CheckpointWarning(UserWarning):
    """A checkpoint was read, but something about it had to be assumed."""


class LatentWarning(UserWarning):
    """A latent that decodes, but does not look like one of its backbone."""


class UntrainedSizeWarning(UserWarning):
    """The network runs at this size, but was not trained near it."""


class NotAcceleratedWarning(UserWarning):
    """An accelerated network ran its own forward, because gradients were asked for."""
