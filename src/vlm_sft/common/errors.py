"""The errors a user can meet.

Every error says what is wrong, where, why, and how to fix it. The command line prints the message without a
traceback and exits with `exit_code`; anything that is not a `VlmSftError` is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

QUOTED_CHARACTERS = 80  # of one value
LINE_CHARACTERS = 2_000  # of one line of a message: room for a list of long paths, not for a picture


# Characters that move the cursor, colour, ring, or turn the direction of what follows: only \n and \t are left.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_LOGIN = re.compile(r"(?<=\w\w:/)(/?)[^\s/?#'\"]+@")  # a path of one has a single slash
_KEY = re.compile(r"(?i)([?&][\w.%-]*(?:token|secret|sig|password|passwd|credential|key)[\w.%-]*=)[^\s&#'\"]+")
_TOKEN = re.compile(r"\b(?:hf_|gh[opsu]_|github_pat_|sk-)[A-Za-z0-9_-]{16,}")


def without_secrets(text: str) -> str:
    """A text without the logins, keys and signatures of the addresses in it, and without access tokens."""
    if ":/" in text:
        text = _KEY.sub(r"\1…", _LOGIN.sub(r"\1…@", text))
    return _TOKEN.sub("…", text)


def plain(text: str) -> str:
    r"""A text as people may be shown it: without secrets, and with its control characters written as \uXXXX.

    A terminal would obey them; JSON reads such a character back.
    """
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", without_secrets(text))


def quoted(value: object, characters: int = QUOTED_CHARACTERS) -> str:
    """A value from outside as a message may show it: as Python writes it, on one line, never longer than a line.

    Args:
        value: a text, bytes, or any value of JSON.
        characters: how much of it is shown; what is longer is cut, with its length behind it.
    """
    if isinstance(value, (str, bytes)):
        length = f" ({len(value):,} {'characters' if isinstance(value, str) else 'bytes'})"
        value = without_secrets(value) if isinstance(value, str) else value
        text = repr(value[: characters + 1])
    else:
        length = ""
        try:
            text = repr(value)
        except RecursionError:
            return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= characters else f"{text[: characters - 1]}…{length}"


def nearest(word: str, known: Iterable[str], form: str = "; did you mean {}?") -> str:
    """The known word that was probably meant, as the end of a message; "" where none is near."""
    lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower()[:QUOTED_CHARACTERS], lower, n=1, cutoff=0.6)
    return form.format(lower[close[0]]) if close else ""


def bounded(text: str, characters: int = LINE_CHARACTERS) -> str:
    """A text whose lines are cut in their middle where they are longer than `characters`; it says how much is gone."""
    return "\n".join(_cut(line, characters) for line in text.split("\n"))


def _cut(line: str, characters: int) -> str:
    if len(line) <= characters:
        return line
    head, tail = line[: characters * 2 // 3], line[len(line) - characters // 4 :]
    return f"{head} … [{len(line) - len(head) - len(tail):,} characters] … {tail}"


class VlmSftError(ValueError):
    """Base class of all mistakes that a user can correct.

    Args:
        what: one sentence: what is wrong, with the value and the place (file, line, key). Values from outside are
            written by `quoted`; whatever is longer than a line all the same is cut.
        fix: one sentence: what to do about it. Empty only when `what` already says it.
    """

    exit_code = 2
    label = "error"  # what the command line calls it
    everywhere = False  # whether all ranks of a run raise it together

    def __init__(self, what: str, fix: str = "") -> None:
        self.what = bounded(plain(what))
        self.fix = bounded(plain(fix))
        super().__init__(_message(self.what, self.fix))


def _message(what: str, fix: str) -> str:
    return f"{what}\n  fix: {fix}" if fix else what


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


class InterruptedRunError(KeyboardInterrupt):
    """A run that a signal ended; it can be started again as it was.

    It is raised wherever the signal finds the program, so it is no `Exception`: whoever reads a damaged file must not
    take it for the damage.

    Args:
        what, fix: as for every error.
        everywhere: whether all ranks raise it together.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: "try again"; schedulers can requeue on it
    label = "interrupted"

    def __init__(self, what: str, fix: str = "", everywhere: bool = False) -> None:
        self.what, self.fix, self.everywhere = bounded(plain(what)), bounded(plain(fix)), everywhere
        super().__init__(_message(self.what, self.fix))
