"""Errors that reach the user as one sentence, and what such sentences need."""

from collections.abc import Sequence

INTERRUPTED = "interrupted: what was finished is kept; run the same command again to resume"


class PrismError(Exception):
    """Base of every error whose message is meant for the user."""

    exit_code = 1


class UserError(PrismError):
    """Bad input (configuration, data, weights): names the field or file and the remedy. Exit code 2."""

    exit_code = 2


class RunError(PrismError):
    """Something failed while running; finished work is kept and re-running resumes. Exit code 1."""

    exit_code = 1


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of many names, for a sentence."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """What a library's exception says, without the pages that may follow; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
