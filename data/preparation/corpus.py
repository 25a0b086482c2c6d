"""One's own text: .txt, .jsonl, .csv, .tsv and .parquet files, compressed or not, become one document a line.

A .txt file is a document; a line of .jsonl, a row of .csv, .tsv and .parquet is one, by its field --text_field.  Files
are read as streams.  The main process decompresses and cuts, the workers parse.  What a file is follows from its
ending, or from --input_format; unlike_its_format (formats.py) says where its first bytes contradict.
"""

import csv
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.errors import UserError
from data.preparation import archives, formats, records
from data.preparation.formats import TextSource
from data.preparation.formatting import MOST_FAULTY, TextFormat
from data.preparation.text_fields import field_line, json_text, text_line

BATCH_BYTES = 1 << 20  # of text handed to a worker at a time
LONGEST_DOCUMENT = 1 << 24  # bytes; a longer .txt file becomes several documents
LONGEST_LINE = 1 << 28  # bytes; a .jsonl file without the end of a line within this is none
LONGEST_FIELD = 1 << 28  # characters of a .csv field
FAULTS = ("not_utf8", "not_json", "with_nul_bytes", "without_the_field", "no_string", "skipped_files")


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """The flags that say how one's own text is read."""

    input_format: str | None = None  # of every file; None: by their endings
    text_field: str = "text"


def corpus_format(options: CorpusOptions) -> TextFormat:
    return TextFormat(batches=partial(corpus_batches, options), read_batch=partial(read_documents, options.text_field),
                      pattern=formats.pattern(options.input_format), fingerprints=corpus_fingerprint, faults=FAULTS,
                      flags={"input_format": options.input_format, "text_field": options.text_field})


def corpus_fingerprint(paths: list[Path]) -> dict:
    """One fingerprint of all files, of which there can be many thousands."""
    return {"input_files": records.combined_fingerprint(paths)}


def corpus_batches(options: CorpusOptions, paths, progress=lambda size: None):
    """Yield (kind, content): the arguments of read_documents, about 1 MB of text each.

    UserError where more than a few per cent of the files are not what they should be; fewer are skipped and listed.
    """
    sources = [TextSource(path, options.input_format) for path in paths]
    faults = {source.path: fault for source in sources
              if (fault := formats.unlike_its_format(source, options.text_field))}
    if len(faults) > MOST_FAULTY * len(sources):
        path, fault = next(iter(faults.items()))
        more = f" (and {len(faults) - 1} more of {len(sources)} files)" if len(faults) > 1 else ""
        raise UserError(f"{path}: {fault}{more}")
    if faults:
        yield "faults", [f"{path.name}: {fault}" for path, fault in faults.items()]
    texts = []
    for source in sources:
        if source.path in faults:
            progress(source.size)
        elif source.format == "txt":
            texts.append(source)
        else:
            yield from guarded(source, READERS[source.format](source, options.text_field, progress))
    yield from text_batches(texts, progress)


def guarded(source: TextSource, batches):
    """The batches; errors of a damaged file name it."""
    try:
        yield from batches
    except (*archives.DAMAGED, UnicodeError) as error:
        raise UserError(f"{source.path}: damaged or cut short ({error})") from None


def text_batches(sources: list[TextSource], progress):
    """Yield ("txt", [(name of a file, its bytes), …])."""
    batch, size = [], 0
    for source in sources:
        for piece in guarded(source, pieces_of_text(source, progress)):
            batch.append((source.path.name, piece))
            size += len(piece)
            if size >= BATCH_BYTES:
                yield "txt", batch
                batch, size = [], 0
    if batch:
        yield "txt", batch


def pieces_of_text(source: TextSource, progress):
    """The bytes of a .txt file; a long one is cut at the end of a paragraph, else of a line, else anywhere."""
    rest, cut = b"", 0
    with source.open(progress) as stream:
        while block := stream.read(BATCH_BYTES):
            rest += block
            while len(rest) > LONGEST_DOCUMENT:
                cut = max(rest.rfind(b"\n\n", 0, LONGEST_DOCUMENT), rest.rfind(b"\r\n\r\n", 0, LONGEST_DOCUMENT))
                cut = cut if cut > 0 else rest.rfind(b"\n", 0, LONGEST_DOCUMENT)
                cut = cut if cut > 0 else start_of_character(rest, LONGEST_DOCUMENT)
                yield rest[:cut]
                rest = rest[cut:]
    if rest.strip() or not cut:
        yield rest


def start_of_character(data: bytes, place: int) -> int:
    """The nearest place before this one at which a character of UTF-8 begins."""
    while data[place] & 0xC0 == 0x80 and place > 1:
        place -= 1
    return place


def json_batches(source: TextSource, field: str, progress):
    """Yield ("jsonl", bytes of whole lines)."""
    rest = b""
    with source.open(progress) as stream:
        while block := stream.read(BATCH_BYTES):
            cut = block.rfind(b"\n") + 1
            if cut:
                yield "jsonl", rest + block[:cut]
                rest = block[cut:]
            else:
                rest += block
            if len(rest) > LONGEST_LINE:
                raise UserError(f"{source.path}: no end of a line in {len(rest)} bytes; is it JSON lines?")
    if rest:
        yield "jsonl", rest


def table_batches(source: TextSource, field: str, progress):
    """Yield ("rows", the texts of some rows)."""
    csv.field_size_limit(LONGEST_FIELD)
    batch, size = [], 0
    with source.open_lines(progress) as lines:
        try:
            for row in csv.DictReader(lines, delimiter=source.delimiter(), strict=True):
                batch.append(row[field])
                size += len(row[field] or "")
                if size >= BATCH_BYTES:
                    yield "rows", batch
                    batch, size = [], 0
        except csv.Error as error:
            raise UserError(f"{source.path}: no {source.format} file ({error}); a field that begins with a quote must "
                            f"end with one, and quotes in it be doubled") from None
    yield "rows", batch


def parquet_batches(source: TextSource, field: str, progress):
    """Yield ("rows", the texts of some rows).  Row groups are read in pieces, however large they are."""
    with formats.parquet_file(source.path, buffer_size=BATCH_BYTES) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        rows, size = max(1, file.metadata.num_rows), max(1, sum(group.total_byte_size for group in groups))
        done, batches = 0, file.iter_batches(max(1, BATCH_BYTES * rows // size), columns=[field], use_threads=False)
        for batch in formats.whole_batches(source.path, batches):
            yield "rows", batch.column(0).to_pylist()
            progress(source.size * (done + batch.num_rows) // rows - source.size * done // rows)
            done += batch.num_rows


READERS = {"jsonl": json_batches, "csv": table_batches, "tsv": table_batches, "parquet": parquet_batches}


def read_documents(field: str, kind: str, content) -> tuple[list[str], dict, list[str]]:
    """The documents of a batch as lines; counts of them, and of others by the reason; the files that were skipped."""
    if kind == "faults":
        return [], {"skipped_files": len(content)}, content
    if kind == "txt":
        outcomes = [(name, *text_line(data)) for name, data in content]
    elif kind == "jsonl":
        outcomes = [("", *json_text(line, field)) for line in content.split(b"\n") if line.strip()]
    else:
        outcomes = [("", *field_line(value)) for value in content]
    counts = Counter(fault or "documents" for _, _, fault in outcomes)
    skipped = [f"{name}: {fault.replace('_', ' ')}" for name, _, fault in outcomes if name and fault]
    return [line for _, line, fault in outcomes if not fault], dict(counts), skipped
