"""Books, one .txt file each: downloaded from lists of URLs or archives, and read as one line of text each."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from common.errors import UserError
from common.text import decoded, lines_of_text
from data.preparation import archives, records
from data.preparation.downloads import DownloadOptions, fetch_or_copy
from data.preparation.formatting import TextFormat
from data.preparation.wikitext import one_line

BATCH_BYTES = 1 << 20  # of books handed to a worker at a time


def download_books(folder: Path, options: DownloadOptions) -> tuple[list[Path], list[str]]:
    """The books in archives and in files of one URL a line; returns them, and what failed and why."""
    if not options.input_files:
        raise UserError("--dataset bookscorpus: BookCorpus has no official source any more; name a file of URLs of "
                        ".txt books, or an archive of them, with --input_files (give a folder of .txt books to "
                        "--action text_formatting instead; it needs no download)")
    found, failed, urls = [], [], []
    for path in options.input_files:
        if archives.is_archive(path) or archives.compression(path):
            found += [book for book in archives.unpack(path, folder) if is_book(book)]
        else:
            urls += listed_urls(path)
    with ThreadPoolExecutor(options.threads) as pool:
        tasks = [pool.submit(download_book, folder, number, url, options) for number, url in enumerate(urls)]
        for task in tqdm(tasks, unit="book", desc="download"):
            try:
                found.append(task.result())
            except UserError as error:
                failed.append(str(error))
    if not found:
        raise UserError(f"{options.input_files[0]}: none of its books could be downloaded"
                        f"{': ' * bool(failed)}{''.join(failed[:1])}")
    return found, failed


def is_book(path: Path) -> bool:
    return path.suffix.lower() == ".txt" and not path.name.startswith(".")


def listed_urls(path: Path) -> list[str]:
    """The lines of a file of URLs; UserError where it is no such file."""
    try:
        text = decoded(path.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: neither an archive nor a list of URLs ({error})") from None
    if archives.is_html(text.encode()):
        raise UserError(f"{path}: an HTML page, neither an archive nor a list of URLs: download it again")
    return [line.strip() for line in lines_of_text(text) if line.strip()]


def download_book(folder: Path, number: int, url: str, options: DownloadOptions) -> Path:
    """Fetch one book; `number` makes the name of its file unique."""
    name = unquote(PurePosixPath(urlsplit(url).path).stem).replace("/", "_") or "book"
    return fetch_or_copy(url, folder / f"{number:06d}_{name}.txt", replace(options, tries=3))


def book_batches(books: list[Path], progress=lambda size: None):
    """Yield (books,): lists of books that hold about 1 MB together."""
    batch, size = [], 0
    for book in books:
        batch.append(book)
        size += book.stat().st_size
        if size >= BATCH_BYTES:
            progress(size)
            yield batch,
            batch, size = [], 0
    if batch:
        progress(size)
        yield batch,


def read_books(books: list[Path]) -> tuple[list[str], dict, list[str]]:
    """The text of each readable book as one line with tabs between its paragraphs; counts; and what was skipped and
    why.  A paragraph ends at an empty line.
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
    """(text, None), or ("", why there is no text)."""
    try:
        text = decoded(book.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        return "", f"cannot be read ({error})"
    if "\0" in text:
        return "", "binary, or UTF-16 without a byte order mark"
    if archives.is_html(text[:archives.START].encode()):
        return "", "an HTML page"
    text = one_line(text.replace("\r\n", "\n").split("\n\n"))
    return text, None if text else "empty"


BOOKS = TextFormat(  # one fingerprint for all books, of which there can be thousands
    batches=book_batches, read_batch=read_books, pattern="*.txt",
    fingerprints=lambda books: {"books": records.combined_fingerprint(books)})
