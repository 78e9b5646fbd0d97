"""Errors meant for the user, one class per exit code.

A message says what is wrong and where; ``remedy`` says what to do. The command line prints
both and nothing else; anything that is not a :class:`ForgeError` is a bug and exits with 1.
"""

from __future__ import annotations


class ForgeError(Exception):
    """Base class. ``exit_code`` is documented in docs/exit-codes.md."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    @classmethod
    def of_child(cls, code: int, message: str, *, remedy: str | None = None) -> ForgeError:
        """The error of a child process that ended with ``code``, and with it its exit code: 1 to 9 as documented.

        A negative code is the number of the signal that ended it, as :mod:`subprocess` says it: -2 and -15 are an
        interruption (130, 143), like a shell's own 130 and 143. Any other end is a bug or a crash: 1.
        """
        error = cls(message, remedy=remedy)
        code = 128 - code if code < 0 else code
        error.exit_code = code if 0 < code < 10 or code in (130, 143) else 1
        return error

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.remedy}" if self.remedy else self.message


class ConfigurationError(ForgeError):
    """A config, an option or an argument is wrong."""

    exit_code = 2


class DataError(ForgeError):
    """The documents, the corpus or an adapter's content cannot be used."""

    exit_code = 3


class MachineError(ForgeError):
    """The machine lacks something: a GPU, a package in the right version, llama.cpp."""

    exit_code = 4


class GpuMemoryError(ForgeError):
    """The GPU's memory does not suffice."""

    exit_code = 5


class DiskError(ForgeError):
    """Disk full, read-only or not writable, or an output that exists already."""

    exit_code = 6


class DivergedError(ForgeError):
    """The loss or a gradient stopped being a finite number."""

    exit_code = 7


class CheckError(ForgeError):
    """A claim or a verification failed."""

    exit_code = 8


class LockedError(ForgeError):
    """Another process is using the run directory."""

    exit_code = 9


class Interrupted(ForgeError):
    """Stopped by a signal; the run can be resumed. 130 after Ctrl-C, 143 after SIGTERM."""

    def __init__(self, message: str, *, signal_number: int, remedy: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.exit_code = 128 + signal_number
