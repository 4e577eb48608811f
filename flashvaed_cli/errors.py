"""Errors that a user can fix. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

import errno

from flashvaed_cli.limits import MAX_MESSAGE_CHARS


class FlashVaedError(Exception):
    """A mistake that the user can fix: the message says what, where and what to do.

    The command line prints it on stderr and exits with `exit_code`. With `is_told_elsewhere`, another process of
    the same launch prints it. A message longer than `MAX_MESSAGE_CHARS` loses its middle.
    """

    exit_code = 2
    is_told_elsewhere = False

    def __init__(self, message: str = "") -> None:
        super().__init__(_shortened(message))


class RecipeError(FlashVaedError):
    """A recipe or a flag does not fit its schema."""


class ArtifactError(FlashVaedError):
    """A checkpoint cannot be read, recognised, matched or written."""


class SpecError(FlashVaedError):
    """A decoder spec contradicts itself, or a name matches no layer."""


class DecodeError(FlashVaedError):
    """A clip cannot be decoded as requested: no plan fits the memory, or there is no compiler."""


class NonFiniteError(FlashVaedError):
    """Frames hold NaN or infinite values: the number format is too narrow, or weights are damaged."""


class OutOfMemory(FlashVaedError):
    """The work does not fit the memory of this machine or device."""


class MediaError(FlashVaedError):
    """A video or latent file cannot be found, read or written."""


class CalibrationError(FlashVaedError):
    """The statistics cannot support what was requested: too few positions, NaN, dead channels."""


class TensorFileError(ArtifactError, MediaError):
    """A file that should hold tensors, weights or latents, is damaged or refused."""


class MetricUnavailableError(FlashVaedError):
    """A metric needs weights or a package that this machine does not have.

    `short` is a clause for those who did not ask for the metric by name, where there is one.
    """

    def __init__(self, message: str, *, short: str | None = None) -> None:
        super().__init__(message)
        self.short = short


class DistillationError(FlashVaedError):
    """Training cannot start, resume or continue."""


class ExportError(FlashVaedError):
    """The decoder does not fit the target, or its export does not reproduce it."""


class Interrupted(FlashVaedError):
    """The user or the system asked to stop (SIGINT, SIGTERM, SIGHUP); what could be saved has been.

    `exit_code` is 128 plus the signal's number, as a shell reports it: 130, 143 or 129.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


class GateFailed(FlashVaedError):
    """The work is done and written, but a given condition failed."""

    exit_code = 1


_OUT_OF_MEMORY = (  # wordings of torch, oneDNN, CUDA's libraries and C++, for errors whose type does not tell
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "could not create a memory",
    "_ALLOC_FAILED",
    "std::bad_alloc",
    "unable to mmap",
)


_NO_ROOM_FOR_CODE = "could not create a primitive"
"""All that oneDNN says where it cannot map the code that it generates; with more words after it, it means others."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device; torch need not be loaded."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return isinstance(error, RuntimeError) and (
        text.strip() == _NO_ROOM_FOR_CODE or any(words in text for words in _OUT_OF_MEMORY)
    )


def _shortened(message: str) -> str:
    if len(message) <= MAX_MESSAGE_CHARS:
        return message
    kept = MAX_MESSAGE_CHARS // 2 - 30  # the advice comes at the end
    return f"{message[:kept]} [... {len(message) - 2 * kept} characters ...] {message[-kept:]}"
