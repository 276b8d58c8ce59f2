"""What a check says: how bad it is, what it is, the numbers that show it, and what mends it."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """From the worst: it cannot work; it will hurt; worth knowing; as it should be."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"
    FINE = "fine"


@dataclass(frozen=True)
class Finding:
    """One thing that a check found. What is fine is one too, without evidence or cure."""

    severity: Severity
    what: str
    evidence: str = ""
    cure: str = ""


def error(what: str, evidence: str, cure: str) -> Finding:
    """It cannot work so."""
    return Finding(Severity.ERROR, what, evidence, cure)


def warning(what: str, evidence: str, cure: str) -> Finding:
    """It may work, and will hurt."""
    return Finding(Severity.WARNING, what, evidence, cure)


def note(what: str, evidence: str = "", cure: str = "") -> Finding:
    """Worth knowing, and nothing to mend."""
    return Finding(Severity.NOTE, what, evidence, cure)


def fine(what: str) -> Finding:
    """What was looked at, and is as it should be."""
    return Finding(Severity.FINE, what)


def listed(things: Iterable[object], most: int = 4) -> str:
    """The first of them, and how many more there are."""
    words = [str(thing) for thing in things]
    more = len(words) - most
    return ", ".join(words[:most]) + (f" and {more} more" if more > 0 else "")
