"""The formats of one's own text: what the ending of a file says, what its first bytes are, and its stream of UTF-8."""

import codecs
import csv
import io
import json
import re
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError
from common.text import encoding_of
from data.preparation import archives

FORMATS = {"txt": (".txt",), "jsonl": (".jsonl", ".ndjson", ".json"), "csv": (".csv",), "tsv": (".tsv",),
           "parquet": (".parquet",)}
TAKEN = ", ".join(ending for endings in FORMATS.values() for ending in endings)
COMPRESSIONS = (*archives.COMPRESSED.values(), ".zstd")
LOOKED_AT = 1 << 16  # bytes of a file that are looked at before it is read
FEW_BAD = 0.05  # of the bytes that are not ASCII; in another encoding nearly all are no UTF-8
OTHER_CONTENT = {
    b"PK\x03\x04": "a zip archive, or an office document or e-book, which are zip archives: unpack or convert it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it (7z x)", b"Rar!": "a RAR archive: unpack it (unrar x)",
    b"%PDF": "a PDF: convert it (pdftotext)", b"{\\rtf": "RTF: convert it to .txt",
    b"\xd0\xcf\x11\xe0": "an old office document: convert it to .txt",
    b"PAR1": "parquet: name it .parquet, or give --input_format parquet",
    b"ARROW1": "Arrow IPC: convert it to .parquet", b"\x89HDF": "HDF5, which is no text", b"SQLite format 3": "SQLite",
    b"\x7fELF": "a program", b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture", b"GIF8": "a picture"}
NOT_ASCII = bytes(range(0x80, 0x100))
HALF_SURROGATES = re.compile("[\udc80-\udcff]")
TAR = (257, b"ustar")


def pattern(input_format: str | None) -> str:
    """Of the names of the files to read in a folder, separated by spaces."""
    endings = [ending for name in ([input_format] if input_format else FORMATS) for ending in FORMATS[name]]
    return " ".join(f"*{ending}{compression}" for compression in ("", *COMPRESSIONS) for ending in endings)


class TextSource:
    """A file of one's own text.  UserError where neither its ending nor --input_format says what it is."""

    def __init__(self, path: Path, input_format: str | None):
        self.path, self.size = path, path.stat().st_size
        self.format = input_format or self.format_by_ending()

    def format_by_ending(self) -> str:
        ending = next((suffix for suffix in reversed(self.path.suffixes) if suffix.lower() not in COMPRESSIONS), "")
        for name, endings in FORMATS.items():
            if ending.lower() in endings:
                return name
        raise UserError(f"{self.path}: its ending is none of {TAKEN} (each also with {', '.join(COMPRESSIONS)}): "
                        f"rename it, or give --input_format ({', '.join(FORMATS)})")

    @contextmanager
    def open(self, progress=lambda size: None):
        """The decompressed bytes as UTF-8 without a byte order mark; progress gets the bytes of the file read."""
        with self.buffered(progress) as (stream, encoding):
            if encoding != "utf-8-sig":
                yield codecs.EncodedFile(stream, "utf-8", encoding, "surrogatepass")
            else:
                stream.read(len(codecs.BOM_UTF8) if stream.peek(4).startswith(codecs.BOM_UTF8) else 0)
                yield stream

    @contextmanager
    def open_lines(self, progress=lambda size: None):
        """The same as text, of which only \\n ends a line; bytes that are no UTF-8 become half surrogates."""
        with self.buffered(progress) as (stream, encoding):
            yield io.TextIOWrapper(stream, encoding, "surrogateescape", newline="\n")

    @contextmanager
    def buffered(self, progress):
        """The decompressed bytes, and their encoding."""
        with open(self.path, "rb") as raw, archives.decompressed(self.path, raw) as stream:
            buffered = io.BufferedReader(Counted(raw, stream, progress), archives.START)
            yield buffered, encoding_of(buffered.peek(archives.START))

    def start(self) -> bytes:
        with self.open() as stream:
            return stream.read(LOOKED_AT)

    def delimiter(self) -> str:
        """Tab or comma, or the semicolon of spreadsheets in countries where the comma is the decimal point."""
        with self.open_lines() as lines:
            first = lines.readline(LOOKED_AT)
        return "\t" if self.format == "tsv" else ";" if ";" in first and "," not in first else ","


class Counted(io.RawIOBase):
    """A decompressed stream that tells how far the file below it was read."""

    def __init__(self, raw, stream, progress):
        self.raw, self.stream, self.progress, self.position = raw, stream, progress, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.stream.read(len(buffer))
        buffer[:len(data)] = data
        self.progress(self.raw.tell() - self.position)
        self.position = self.raw.tell()
        return len(data)


def parquet_file(path, **options):
    """An open pyarrow.parquet.ParquetFile."""
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow, which is not installed (pip install pyarrow)") from None
    try:
        return ParquetFile(path, **options)
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: no readable parquet file ({error})") from None


def whole_batches(path, batches):
    """The batches of a parquet file; UserError where it is damaged."""
    from pyarrow import ArrowException

    try:
        yield from batches
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged or cut short ({error})") from None


def unlike_its_format(source: TextSource, field: str) -> str | None:
    """What is wrong with the file by its beginning, and what would read it; None where it is what it should be."""
    if source.format == "parquet":
        columns = parquet_columns(source.path) if archives.first_bytes(source.path).startswith(b"PAR1") else None
        return "no parquet file by its first bytes: rename it, or give --input_format" if columns is None \
            else missing_field(field, columns, "columns")
    try:
        start = source.start()
    except UnicodeError as error:
        return f"not {error.encoding.upper()}, though it begins with its byte order mark"
    except archives.DAMAGED as error:
        return f"damaged or cut short ({error})"
    return other_content(start) or other_encoding(start) or CHECKS[source.format](start, source, field)


def parquet_columns(path) -> list[str]:
    with parquet_file(path) as file:
        return list(file.schema_arrow.names)


def missing_field(field: str, names, what: str) -> str | None:
    return None if field in names else \
        f"no {field!r} among its {what} {', '.join(map(str, names))}: name one with --text_field"


def other_content(start: bytes) -> str | None:
    """What a file is by its first bytes, if it is no text."""
    if archives.is_html(start):
        return "an HTML page: extract its text (a .jsonl file with --text_field takes it), or download it again"
    if start[TAR[0]:].startswith(TAR[1]):
        return "a tar archive: unpack it (tar xf), and name its folder"
    what = next((what for magic, what in OTHER_CONTENT.items() if start.startswith(magic)), None)
    if what is None and b"\0" in start:
        order = "BE" if start[:1] == b"\0" else "LE"
        what = (f"a NUL byte in its first {len(start)}: binary, or UTF-16 without a byte order mark "
                f"(iconv -f UTF-16{order} -t UTF-8 converts that)")
    return what


def other_encoding(start: bytes) -> str | None:
    """A guess of the encoding, where more than a few of the bytes that are not ASCII are no UTF-8."""
    text = start[:-3].decode("utf-8", "surrogateescape")  # [:-3]: the last character may be cut
    bad = len(HALF_SURROGATES.findall(text))
    foreign = len(start) - len(start.translate(None, NOT_ASCII))
    if bad <= FEW_BAD * foreign or bad < 2:
        return None
    try:
        from charset_normalizer import from_bytes  # comes with requests
        best = from_bytes(start).best()
    except ImportError:
        best = None
    guess = f"it looks like {best.encoding}: iconv -f {best.encoding}" if best else "iconv -f ITS_ENCODING"
    return f"not UTF-8 ({bad} of its first {len(start)} bytes); {guess} -t UTF-8 converts it"


def unlike_text(start: bytes, source: TextSource, field: str) -> str | None:
    first = first_line_with_text(start)
    if first.startswith(b"<mediawiki"):
        return "a Wikipedia dump: --dataset wikicorpus_XX with its language reads it"
    if isinstance(parsed(first), dict):
        return "JSON lines: name it .jsonl, or give --input_format jsonl"
    if first.startswith((b"[{", b'{"')):
        return "JSON: write one object a line (jq -c '.[]' or jq -c .) into a .jsonl file"
    return None


def unlike_json_lines(start: bytes, source: TextSource, field: str) -> str | None:
    first = first_line_with_text(start)
    document = parsed(first)
    if isinstance(document, dict):
        return missing_field(field, document, "fields")
    if not first or len(first) >= len(start.strip()) > LOOKED_AT - 8:  # empty, or one line that goes on
        return None
    if first.startswith(b"["):
        return "a JSON array, no JSON lines: jq -c '.[]' writes one object a line"
    if first.startswith(b"{"):
        return "JSON over several lines: jq -c . writes one object a line"
    return "no JSON object in its first line: is it plain text (.txt, --input_format txt)?"


def unlike_table(start: bytes, source: TextSource, field: str) -> str | None:
    line = first_line_with_text(start).decode("utf-8", "replace")
    names = next(csv.reader([line], delimiter=source.delimiter()), [])
    return missing_field(field, names, "columns") if line else None


CHECKS = {"txt": unlike_text, "jsonl": unlike_json_lines, "csv": unlike_table, "tsv": unlike_table}


def first_line_with_text(start: bytes) -> bytes:
    return next((line.strip() for line in start.split(b"\n") if line.strip()), b"")


def parsed(line: bytes):
    """The JSON value in the line; None where there is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
