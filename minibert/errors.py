"""Errors that are the user's to mend: the command line prints them in one line and exits with 2."""


class UserError(ValueError):
    """Bad input. The message says what was expected, what came and what to do."""
