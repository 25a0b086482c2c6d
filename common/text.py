"""Text files that users bring: their encoding and their lines.  No torch here.

UTF-8 is read with or without a byte order mark, UTF-16 and UTF-32 with one, as editors on Windows write it.  Only \\n
and \\r\\n end a line: str.splitlines also splits at U+2028, U+0085 and others, which are legal inside a line.
"""

import codecs
import io

from common.errors import UserError

MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),  # before UTF-16, whose mark begins alike
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
LONGEST_MARK = 4  # bytes


def encoding_of(start: bytes) -> str:
    """The encoding of a text, from the byte order mark that its first bytes may be; UTF-8 where there is none."""
    return next((name for mark, name in MARKS if start.startswith(mark)), "utf-8-sig")


def checked_encoding(start: bytes, path) -> str:
    """The same; UserError where the file looks like UTF-16 without a mark."""
    encoding = encoding_of(start)
    if encoding == "utf-8-sig" and b"\0" in start[:2]:
        raise UserError(f"{path}: not UTF-8 (a NUL byte at its start: binary, or UTF-16 without a byte order mark; "
                        f"iconv -f UTF-16{'BE' if start[:1] == bytes(1) else 'LE'} -t UTF-8 converts it)")
    return encoding


def open_text(path, errors: str = "strict") -> io.TextIOWrapper:
    """Open a text file for reading; only \\n ends a line."""
    file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    try:
        return io.TextIOWrapper(file, checked_encoding(file.peek(LONGEST_MARK), path), errors, newline="\n")
    except BaseException:
        file.close()
        raise


def decoded(data: bytes) -> str:
    """The text in the bytes of a whole file; UnicodeDecodeError where they are no text."""
    return data.decode(encoding_of(data))


def lines_of_text(text: str) -> list[str]:
    """The lines of a text without their ends.

    >>> lines_of_text("one\\u2028still one\\r\\ntwo\\n")
    ['one\\u2028still one', 'two']
    """
    lines = text.split("\n")
    return [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
