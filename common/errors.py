"""Errors that users can fix, and checks of values from files.  No torch here."""

import errno

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit


class UserError(ValueError):
    """An error in the user's input.  The text names the file or flag, and the values; commands exit with code 2."""


def whole_number(values: dict, key: str, what: str, default: int = 0) -> int:
    """A count from a file; UserError for anything but a whole number of at least 0."""
    value = values.get(key, default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 <= value < 2**63:
        raise UserError(f"{what}: {key} is {repr(value)[:50]}, not a whole number of at least 0")
    return value


def dictionary(values: dict, key: str, what) -> dict:
    """A dictionary from a file, empty where the key is missing; UserError for anything else."""
    value = values.get(key, {})
    if not isinstance(value, dict):
        raise UserError(f"{what}: {key} is no dictionary")
    return value


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its type where it has no text."""
    return next(iter(str(error).splitlines()), type(error).__name__)
