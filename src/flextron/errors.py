"""The errors that users meet: each message names what is wrong and the remedy, in one sentence.

The command line prints such an error without a traceback and exits with code 2; anything else that escapes is a bug.
"""

__all__ = ["FlextronError", "UnsupportedModelError"]


class FlextronError(ValueError):
    """Bad input: a wrong value, file or combination that the user can mend."""


class UnsupportedModelError(FlextronError):
    """A checkpoint whose architecture no family describes."""
