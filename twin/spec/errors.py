"""The errors that a user may meet. Anything else is a bug and shows a traceback.

EptwinError
 ├─ SpecError     bad input: file:line, field, what was expected, a hint      exit 2
 ├─ Infeasible    no plan fits: the binding constraint and by how much        exit 1
 ├─ SLOMissed / NotSteady / OutOfBand     an honest "no"                      exit 1
 ├─ RankFailed    which rank, where, what the runtime did about it            exit 1
 └─ Overloaded    429/503 with Retry-After at the gateway
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class EptwinError(Exception):
    """Base of the expected errors; `exit_code` is what the command line ends with."""

    exit_code = 1

    def __reduce__(self) -> tuple[object, ...]:
        """How worker processes send it back: Python would call the class with the message alone."""
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[EptwinError], args: tuple[object, ...], fields: dict[str, object]) -> EptwinError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


@dataclass(frozen=True)
class Problem:
    """One thing wrong with an input. `field` is a dotted path, `line` counts from 1."""

    message: str
    field: str = ""
    line: int | None = None
    expected: str = ""
    hint: str = ""


class SpecError(EptwinError):
    """Bad input. Carries every problem found, so that a user mends a file once."""

    exit_code = 2

    def __init__(
        self,
        problems: Problem | list[Problem] | str,
        *,
        file: Path | str | None = None,
        field: str = "",
        expected: str = "",
        hint: str = "",
    ) -> None:
        if isinstance(problems, str):
            problems = Problem(problems, field=field, expected=expected, hint=hint)
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        self.file = None if file is None else str(file)
        super().__init__(self._render())

    def _render(self) -> str:
        lines = []
        for problem in self.problems[:20]:
            where = self.file or ""
            if self.file and problem.line is not None:
                where += f":{problem.line}"
            parts = [p for p in (where, problem.field) if p]
            text = ": ".join([*parts, problem.message])
            if problem.expected:
                text += f" (expected {problem.expected})"
            if problem.hint:
                text += f"\n  hint: {problem.hint}"
            lines.append(text)
        if len(self.problems) > 20:
            lines.append(f"... and {len(self.problems) - 20} more")
        return "\n".join(lines)


class Infeasible(EptwinError):
    """No plan fits. `constraint` names what binds; `needed` and `available` are in `unit`."""

    def __init__(
        self, message: str, *, constraint: str, needed: float | None = None, available: float | None = None, unit: str = ""
    ) -> None:
        self.constraint, self.needed, self.available, self.unit = constraint, needed, available, unit
        super().__init__(message)


class SLOMissed(EptwinError):
    """The plan runs but misses its objectives."""


class NotSteady(EptwinError):
    """The run never reached a steady state, so its averages mean nothing."""


class OutOfBand(EptwinError):
    """Prediction and measurement differ by more than the stated band."""


class RankFailed(EptwinError):
    """A rank died, hung or raised. `rank` and `where` say which and in what phase."""

    def __init__(self, message: str, *, rank: int, where: str = "") -> None:
        self.rank, self.where = rank, where
        super().__init__(message)


class Overloaded(EptwinError):
    """The service refuses work for now; `retry_after_s` says when to come back."""

    def __init__(self, message: str, *, retry_after_s: float, status: int = 503) -> None:
        self.retry_after_s, self.status = retry_after_s, status
        super().__init__(message)
