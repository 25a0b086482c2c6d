"""What ends a command with one clear line in place of a traceback.  No torch here."""


class UserError(ValueError):
    """Something the user gave is wrong.  Its text names the file or flag and the values; scripts then exit with 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its type where it has no text."""
    return next(iter(str(error).splitlines()), type(error).__name__)
