"""Errors that a user caused and can correct: the command line prints their message, without a traceback.

Every other exception is a fault of the program and keeps its traceback.
"""


class UserError(ValueError):
    """An input, a flag or a file is wrong. The message names the value, and what corrects it."""


class CheckpointError(UserError):
    """A checkpoint cannot be taken as π0 weights. The message says why and what to do."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that was named does not exist."""


class OutputExistsError(UserError, FileExistsError):
    """What a command would write exists already; nothing is overwritten."""


class UnavailableError(UserError, OSError):
    """Something outside the process cannot be reached: the hub, a port, a device."""


class CommandError(UserError, RuntimeError):
    """A command could not do what it was asked to. The message says what stopped it."""


def printable(text: str, limit: int = 2000) -> str:
    """A text from elsewhere, for a log or a terminal: cut to `limit` characters, control characters escaped.

    Lines after the first are indented, so that none of them looks like a message of its own.
    """
    cut = text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"
    lines = cut.split("\n")
    escaped = (
        "".join(
            letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in line
        )
        for line in lines
    )
    return "\n    ".join(escaped)
