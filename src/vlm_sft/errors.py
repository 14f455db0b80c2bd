"""The errors a user can meet. Imports nothing from the package.

Every error says what is wrong, where, why, and how to fix it. The command line prints the message without a
traceback and exits with `exit_code`; anything that is not a `VlmSftError` is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class VlmSftError(ValueError):
    """Base class of all mistakes that a user can correct.

    Args:
        what: one sentence: what is wrong, with the value and the place (file, line, key).
        fix: one sentence: what to do about it. Empty only when `what` already says it.
    """

    exit_code = 2
    label = "error"  # what the command line calls it
    everywhere = False  # whether all ranks of a run raise it together

    def __init__(self, what: str, fix: str = "") -> None:
        self.what = what
        self.fix = fix
        super().__init__(f"{what}\n  fix: {fix}" if fix else what)


class RecipeError(VlmSftError):
    """One or several mistakes in a recipe file or its overrides, reported together."""


class DataError(VlmSftError):
    """A data set, file, row or image that cannot be used."""


class SampleError(DataError):
    """One sample that cannot be used; the others can.

    Args:
        reason: a short class under which such samples are counted.
        what, fix: as for every error.
    """

    def __init__(self, reason: str, what: str, fix: str = "") -> None:
        super().__init__(what, fix)
        self.reason = reason


class ModelError(VlmSftError):
    """A base model or adapter that cannot be found, loaded or adapted."""


class RunError(VlmSftError):
    """An output folder, checkpoint or launch that cannot be used."""


class EvaluationError(VlmSftError):
    """Predictions or benchmarks that cannot be scored."""


class GuardError(VlmSftError):
    """A finished training no checkpoint of which keeps to its guard; everything is on disk."""

    exit_code = 3
    everywhere = True


class ForecastError(VlmSftError):
    """A run that does not fit into the memory or onto the disk that there is."""

    exit_code = 4


class NumericalError(VlmSftError):
    """A training whose numbers went bad: not finite too often in a row."""


class DeviceMemoryError(VlmSftError):
    """A forward or backward pass that does not fit into the memory of the device."""


class HostLostError(VlmSftError):
    """A machine or process of a run that is gone; the run can be started again as it was."""

    exit_code = 75  # as for an interrupted run
    label = "interrupted"


class InterruptedRunError(VlmSftError):
    """A run that a signal ended; it can be started again as it was.

    Args:
        what, fix: as for every error.
        everywhere: whether all ranks raise it together.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: "try again"; schedulers can requeue on it
    label = "interrupted"

    def __init__(self, what: str, fix: str = "", everywhere: bool = False) -> None:
        super().__init__(what, fix)
        self.everywhere = everywhere
