"""A document of one's own text as one line with tabs between its paragraphs, or the reason why there is none.

Empty lines separate paragraphs.  In a field without any, every line is one: web corpora end paragraphs that way.
"""

import json
import re

from data.preparation.wikitext import one_line

PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n")


def text_line(data: bytes) -> tuple[str, str | None]:
    """(line, None) of the bytes of a .txt file, or ("", fault)."""
    try:
        return checked_line(PARAGRAPH_END.split(data.decode("utf-8").replace("\r\n", "\n")))
    except UnicodeDecodeError:
        return "", "not_utf8"


def field_line(value) -> tuple[str, str | None]:
    """(line, None) of the value of a field, or ("", fault)."""
    if not isinstance(value, str):
        return "", "empty" if value is None else "no_string"
    value = value.replace("\r\n", "\n")
    paragraphs = PARAGRAPH_END.split(value)
    return checked_line(paragraphs if len(paragraphs) > 1 else value.split("\n"))


def json_text(data: bytes, field: str) -> tuple[str, str | None]:
    """(line, None) of a field of the JSON object in a line, or ("", fault)."""
    try:
        document = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        return "", "not_utf8"
    except (ValueError, RecursionError):
        return "", "not_json"
    if not isinstance(document, dict):
        return "", "not_json"
    return field_line(document[field]) if field in document else ("", "without_the_field")


def checked_line(paragraphs: list[str]) -> tuple[str, str | None]:
    line = one_line(paragraphs)
    if "\0" in line:
        return "", "with_nul_bytes"
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, or bytes that were none of UTF-8
        return "", "not_utf8"
    return (line, None) if line else ("", "empty")
