"""The errors that users meet: each message names what is wrong and the remedy, in one sentence.

The command line prints such an error without a traceback and exits with code 2; anything else that escapes is a bug.
"""

__all__ = ["FlextronError", "LongPromptError", "PromptError", "UnsupportedModelError", "shown"]

_MOST_SHOWN = 100


class FlextronError(ValueError):
    """Bad input: a wrong value, file or combination that the user can mend."""


class PromptError(FlextronError):
    """A prompt that the model, or the engine's memory, cannot take."""


class LongPromptError(PromptError):
    """A prompt that is too long, with what is to follow it."""


class UnsupportedModelError(FlextronError):
    """A checkpoint whose architecture no family describes."""


def shown(value: object) -> str:
    """A value of a user's or a file's in a message, however long it is."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
