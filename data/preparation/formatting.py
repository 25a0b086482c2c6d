"""text_formatting: from dumps and books to text files of one document a line.

The input is cut into batches, which the workers turn into lines.  A fixed number of batches makes a part file with its
own record: after an interruption the finished parts are kept, and their input is read without being processed.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from common.errors import UserError
from common.files import replacing
from data.preparation import records
from data.preparation.document_filters import DocumentFilters, read_filtered
from data.workers import ordered_map

BATCHES_PER_PART = 512  # about 500 MB of XML: what an interruption loses at most, 5 seconds on 16 cores
MOST_FAULTY = 0.05  # of the documents, where a text format names faults
HASHED_BYTES = 1 << 20  # of a finished part, at a time
LIST_SUFFIX = ".near_duplicates.tsv"  # in place of a part's .txt
COUNT_WORDS = {  # where the name in a record is not enough
    "random_next": "pairs with a random second segment", "unknown_tokens": "tokens that are [UNK]",
    "used_tokens": "tokens in samples",
    "below_min_words": "below --min_words", "below_min_letters": "below --min_letters",
    "no_string": "with a field that is no text"}


@dataclass(frozen=True, kw_only=True)
class TextFormat:
    batches: Callable  # (paths, progress): yields tasks for the workers; progress takes the bytes read
    read_batch: Callable  # what a worker does: (*task) gives (lines, counts, what was skipped and why)
    pattern: str = ""  # of the files in a folder; "": only single files are accepted
    extracted: bool = False  # wikiextractor wrote them
    fingerprints: Callable = records.file_fingerprints  # of the files, for the record
    faults: tuple[str, ...] = ()  # counts of documents of which more than a few per cent are an error
    flags: dict = field(default_factory=dict)  # that decide the text, for the record
    filters: DocumentFilters = DocumentFilters()

    def options(self) -> dict:
        """What decides the text besides the input, for the record."""
        return {"batches_per_part": BATCHES_PER_PART, "extracted": self.extracted, **self.flags,
                **self.filters.options()}

    def refuse_faulty(self, counts: Counter) -> None:
        """UserError where more than a few per cent of the documents have one of the faults."""
        faulty = sum(counts[fault] for fault in self.faults)
        if faulty > MOST_FAULTY * (faulty + counts["documents"]):
            raise UserError(f"--input_files: {faulty:,} of {faulty + counts['documents']:,} documents are not what "
                            f"they should be ({describe_counts(counts)}): do --input_format and --text_field fit?")


def format_documents(folder, dataset: str, text_format: TextFormat, batches, inputs: dict, pool) -> dict:
    """Write the documents of all batches to folder/DATASET/part_N.txt and return the record.

    inputs: the fingerprints of the input files.
    """
    options = text_format.options()
    records.delete_record(folder, dataset)
    (folder / dataset).mkdir(parents=True, exist_ok=True)
    outputs, skipped = {}, []
    filters = text_format.filters
    seen = filters.seen()
    for part, tasks in grouped(batches, BATCHES_PER_PART):
        name = f"{dataset}/part_{part:05d}.txt"
        record = records.finished_record(folder, name, inputs, options)
        if not record:
            results = ordered_map(pool, read_filtered, ((text_format.read_batch, filters, *task) for task in tasks))
            record = records.write_record(folder, name, inputs, options, {name: {}},
                                          *write_part(folder / name, results, text_format, seen))
        elif seen:
            see_part(folder / name, filters, seen)
        outputs[name] = record["counts"]
        skipped += record["skipped"]
    totals = sum((Counter(counts) for counts in outputs.values()), Counter())
    if not totals["documents"]:
        raise UserError(f"{', '.join(inputs)}: no document with text in it ({describe_counts(totals)})")
    records.delete_outdated(folder, f"{dataset}/part_*.txt", outputs)
    records.delete_outdated(folder, f"{dataset}/part_*{LIST_SUFFIX}", [list_path(name).as_posix() for name in outputs])
    return records.write_record(folder, dataset, inputs, options, outputs, dict(totals), skipped)


def grouped(items, size: int):
    """Yield (number, iterator over up to `size` items) until there are no more; what is not iterated is skipped."""
    for number, group in groupby(enumerate(items), key=lambda pair: pair[0] // size):
        yield number, (item for _, item in group)


def write_part(path, results, text_format: TextFormat, seen) -> tuple[dict, list[str]]:
    """Write the lines of the results to one file; returns their counts and what was skipped.

    Documents that were `seen` (DocumentFilters.seen) before are counted as duplicates and not written; those that only
    resemble one are listed beside the file.
    """
    totals, skipped, listed = Counter(), [], []
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for lines, counts, skipped_here, hashes in results:
            totals.update(counts)
            if seen:
                new = seen.add(hashes)
                totals.update({"documents": -int((~new).sum()), seen.counted_as: int((~new).sum())})
                listed += seen.listed(lines)
                lines = [line for line, is_new in zip(lines, new.tolist(), strict=True) if is_new]
            file.writelines(line + "\n" for line in lines)
            skipped += skipped_here
        text_format.refuse_faulty(totals)
        write_list(list_path(path), listed)
    return dict(totals), skipped


def list_path(part) -> Path:
    """The file beside a part that lists the documents which resemble others."""
    return Path(part).with_suffix(LIST_SUFFIX)


def write_list(path: Path, listed: list[str]) -> None:
    """Write the list of a part, if there is something to list; an earlier one goes."""
    path.unlink(missing_ok=True)
    if listed:
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in listed), encoding="utf-8")


def see_part(path, filters: DocumentFilters, seen) -> None:
    """Count the documents of a part that an earlier run finished as seen."""
    with open(path, encoding="utf-8", newline="\n") as file:
        while lines := file.readlines(HASHED_BYTES):
            seen.keep(filters.fingerprints([line.rstrip("\n") for line in lines]))


def describe_counts(counts: dict) -> str:
    """{"documents": 106, "redirects": 100} as "106 documents, 100 redirects"."""
    parts = [f"{count:,} {COUNT_WORDS.get(name, name.replace('_', ' '))}"
             for name, count in sorted(counts.items()) if count]
    return ", ".join(parts) or "nothing"
