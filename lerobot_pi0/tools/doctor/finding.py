"""Findings of checks: severity, description, evidence and fix."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

# The fix of a symptom on the data that the policy was trained on.
TRAIN_LONGER = "the policy was trained on this dataset and has not learned it yet: train for more steps"


class Severity(StrEnum):
    """Worst first: it cannot work; it reduces quality; for information; in order."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"
    FINE = "fine"


@dataclass(frozen=True)
class Finding:
    """One result of a check. FINE is a result too, without evidence or fix."""

    severity: Severity
    what: str
    evidence: str = ""
    fix: str = ""


def error(what: str, evidence: str, fix: str) -> Finding:
    """It cannot work so."""
    return Finding(Severity.ERROR, what, evidence, fix)


def warning(what: str, evidence: str, fix: str) -> Finding:
    """It may work, with reduced quality."""
    return Finding(Severity.WARNING, what, evidence, fix)


def note(what: str, evidence: str = "", fix: str = "") -> Finding:
    """For information."""
    return Finding(Severity.NOTE, what, evidence, fix)


def fine(what: str) -> Finding:
    """The check passed."""
    return Finding(Severity.FINE, what)


def listed(things: Iterable[object], most: int = 4, separator: str = ", ") -> str:
    """The first of them, and how many more there are."""
    words = [str(thing) for thing in things]
    more = len(words) - most
    return separator.join(words[:most]) + (f" and {more} more" if more > 0 else "")
