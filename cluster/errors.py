"""Errors that reach the user as one sentence."""


class PrismError(Exception):
    """Base of every error whose message is meant for the user."""

    exit_code = 1


class UserError(PrismError):
    """Bad input (configuration, data, weights): names the field or file and the remedy. Exit code 2."""

    exit_code = 2


class RunError(PrismError):
    """Something failed while running; finished work is kept and re-running resumes. Exit code 1."""

    exit_code = 1
