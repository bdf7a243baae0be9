"""Errors that reach the user as one sentence, and what such sentences need."""

import os
import re
from collections.abc import Sequence

INTERRUPTED = "interrupted: what was finished is kept; run the same command again to resume"


class PrismError(Exception):
    """Base of every error whose message is meant for the user."""

    exit_code = 1

    def __init__(self, *args: object):
        # Here, where the environment is that of the failure: the sentence may be said and logged anywhere.
        super().__init__(*(redact(each) if isinstance(each, str) else each for each in args))


class UserError(PrismError):
    """Bad input (configuration, data, weights): names the field or file and the remedy. Exit code 2."""

    exit_code = 2


class RunError(PrismError):
    """Something failed while running; finished work is kept and re-running resumes. Exit code 1."""

    exit_code = 1


# Names of variables that hold a secret, not those that say where one lies.
_SECRET_NAME = re.compile(
    r"(SECRET|TOKEN|PASSWORD|PASSPHRASE|CREDENTIALS?|API_KEY|ACCESS_KEY)(?!.*_(ID|PATH|FILE|URI)$)", re.I
)
# A secret key may have slashes in it.
_USER_OF_ADDRESS = re.compile(r"(?<=://)(?:[^\s/@'\"]+|[^\s/@'\"]*:[^\s@'\"]+)(?=@)")
_SIGNED_QUERY = re.compile(r"([?&][\w-]*(?:signature|credential|token|accesskeyid)=)[^\s&'\"]+", re.I)


def redact(text: str) -> str:
    """Text that may go into a file, a log or a terminal: without the secrets of the environment, or in addresses."""
    for name, value in os.environ.items():
        # Shorter ones are words like "true", which a sentence may need.
        if len(value) >= 8 and value in text and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return _SIGNED_QUERY.sub(r"\1***", _USER_OF_ADDRESS.sub("***", text))


class TransientError(RunError):
    """A machine or a network failed, not what was asked of it: the same may succeed later, or elsewhere."""


class HelperLost(RunError):
    """An actor that another one made for itself died, or its machine did."""


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of many names, for a sentence."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """What a library's exception says, without the pages that may follow; its type where it says nothing."""
    lines = redact(str(error)).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
