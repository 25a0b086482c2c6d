"""Books, one .txt file each, as one line of text."""

from collections import Counter
from pathlib import Path

from data.preparation.wikipedia import one_line

BATCH_BYTES = 1 << 20  # of books handed to a worker at a time


def batches(books: list[Path], progress=lambda size: None):
    """Yield lists of books that hold about 1 MB together."""
    batch, size = [], 0
    for book in books:
        batch.append(book)
        size += book.stat().st_size
        if size >= BATCH_BYTES:
            progress(size)
            yield batch
            batch, size = [], 0
    if batch:
        progress(size)
        yield batch


def read_books(books: list[Path]) -> tuple[list[str], dict, list[str]]:
    """The text of each good book as one line, its paragraphs separated by tabs; counts; and the bad books with the
    reason why.  A paragraph ends at an empty line; the lines within are joined.
    """
    lines, counts, skipped = [], Counter(), []
    for book in books:
        text, fault = read_book(book)
        counts["skipped" if fault else "documents"] += 1
        if fault:
            skipped.append(f"{book.name}: {fault}")
        else:
            lines.append(text)
    return lines, dict(counts), skipped


def read_book(book: Path) -> tuple[str, str | None]:
    """(text, None), or ("", why the book is bad)."""
    try:
        text = book.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return "", f"cannot be read ({error})"
    if "\0" in text:
        return "", "binary"
    text = one_line(text.replace("\r\n", "\n").split("\n\n"))
    return text, None if text else "empty"
