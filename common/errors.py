"""The error that ends a command with one line instead of a traceback.  No torch here."""


class UserError(ValueError):
    """An error in the user's input.  The text names the file or flag and the values; commands exit with code 2."""
