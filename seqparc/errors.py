"""Everything seqparc raises. Each message says what happened, where in the user's code, and what to do next."""

from __future__ import annotations

from typing import Any


class SeqparcError(Exception):
    """The root of all errors seqparc raises on purpose."""


class TraceError(SeqparcError):
    """The cell cannot be traced; names the user's file and line and the operation."""


class SignatureError(SeqparcError):
    """How the cell wants to be called, or what it returns, is unknown or ambiguous."""


class StateError(SeqparcError):
    """The initial state cannot be found, or the state changes shape, dtype or structure from step to step."""


class InexactError(SeqparcError):
    """Integers of a call are larger than the arithmetic holds exactly; caught by what then takes another."""


class UnsupportedOpError(SeqparcError):
    """An operation in the core has no row in the operation table."""


class ShapeError(SeqparcError):
    """An input of the wrong shape, dtype or device."""


class ConvergenceError(SeqparcError):
    """The parallel iteration did not converge and `on_divergence="raise"`.

    Attributes: `best` (the last iterate: the states, flat), `gap` (the largest jump at a chunk boundary, relative to the
    tolerance's scale).
    """

    def __init__(self, message: str, best: Any = None, gap: float = float("nan")) -> None:
        super().__init__(message)
        self.best = best
        self.gap = gap


class ToolchainError(SeqparcError):
    """The compiler is missing or failed; carries the command and what the compiler printed."""

    def __init__(self, message: str, command: tuple[str, ...] = (), output: str = "") -> None:
        super().__init__(message)
        self.command = command
        self.output = output


class InternalError(SeqparcError):
    """A fault of seqparc itself, found by one of its own checks. Please report it."""


#: What torch's allocators say where an error of theirs is no more than a RuntimeError.
_SHORT = ("out of memory", "can't allocate memory", "not enough memory")


def pass_on(error: Exception) -> None:
    """Raise an error again if it tells of too little memory: it says nothing about the code in which it happened, whatever others would."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORT)):
        raise error


class SeqparcWarning(UserWarning):
    """Said once, when something works but not the way it was asked for."""
