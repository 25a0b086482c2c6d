"""What ends a command with one clear line in place of a traceback.  No torch here."""


class UserError(ValueError):
    """Something the user gave is wrong.  Its text names the file or flag and the values; scripts then exit with 2."""
