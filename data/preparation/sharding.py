"""sharding: documents, one a line, into text shards of equal numbers of sentences.

Documents are read in windows, so that memory does not grow with the corpus.  Within a window the longest are assigned
first, each to the shard with the fewest sentences so far, of the split (training or test) that is furthest behind its
proportion.  Only the numbers of sentences count, so the shards are the same for any number of processes.
"""

from codecs import BOM_UTF8
from collections import Counter, deque
from heapq import heapify, heappop, heappush
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from common.files import replacing_files
from common.text import LONGEST_MARK, checked_encoding, open_text
from data.preparation import records
from data.preparation.formatting import describe_counts
from data.preparation.layout import shard_names
from data.preparation.sentences import split_lines
from data.workers import ordered_map

CHUNK_BYTES = 1 << 20  # of text for a worker at a time
WINDOW_BYTES = 1 << 23  # of text assigned at a time


class ShardAssignment:
    """Which shard each document goes to, from the documents' numbers of sentences."""

    def __init__(self, training_shards: int, test_shards: int, fraction_test_set: float):
        self.fraction_test_set = fraction_test_set
        self.sentences = [0] * (training_shards + test_shards)
        self.splits = ([(0, shard) for shard in range(training_shards)],
                       [(0, training_shards + shard) for shard in range(test_shards)])
        self.totals = [0, 0]  # sentences in training and test
        self.empty = [training_shards, test_shards]
        for split in self.splits:
            heapify(split)

    def assign(self, sizes: list[int], last: bool) -> list[int]:
        """The shard of each document of a window.  In the last one, the smallest documents go to empty shards."""
        shards = [0] * len(sizes)
        order = sorted(range(len(sizes)), key=lambda document: (-sizes[document], document))
        for assigned, document in enumerate(order):
            if last and sum(self.empty) >= len(sizes) - assigned:
                split = 0 if self.empty[0] else 1
            else:
                split = self.furthest_behind(sizes[document])
            shards[document] = self.add_to(split, sizes[document])
        return shards

    def furthest_behind(self, size: int) -> int:
        """The split (0 training, 1 test) whose proportion a document of this size improves."""
        behind = self.fraction_test_set * (sum(self.totals) + size) - self.totals[1]
        return 1 if 2 * behind >= size else 0

    def add_to(self, split: int, size: int) -> int:
        """Add a document to the shard of a split with the fewest sentences; returns the shard."""
        filled, shard = heappop(self.splits[split])
        self.empty[split] -= not filled
        heappush(self.splits[split], (filled + size, shard))
        self.sentences[shard] += size
        self.totals[split] += size
        return shard


def shard_documents(folder, dataset: str, texts: list[Path], inputs: dict, options: dict, pool) -> dict:
    """Write folder/DATASET/DATASET_training_N.txt and …_test_N.txt and return the record.

    options: training_shards, test_shards, fraction_test_set, segmentation_method, language unless it is en.
    """
    names = shard_names(dataset, options["training_shards"], options["test_shards"])
    assignment = ShardAssignment(options["training_shards"], options["test_shards"], options["fraction_test_set"])
    counts = Counter()
    records.delete_record(folder, dataset)
    with replacing_files(folder / dataset, [f"{name}.txt" for name in names]) as temporary:
        documents = [0] * len(names)
        for window, last in windows(split_all(texts, options, pool, counts)):
            shards = assignment.assign([sentences for _, sentences in window], last)
            append(temporary, window, shards)
            for shard in shards:
                documents[shard] += 1
        if not all(documents):
            raise UserError(f"{dataset}: {sum(documents)} documents are too few for {options['training_shards']} "
                            f"training and {options['test_shards']} test shards (--n_training_shards, --n_test_shards)")
    outputs = {f"{dataset}/{name}.txt": {"documents": documents[shard], "sentences": assignment.sentences[shard]}
               for shard, name in enumerate(names)}
    counts["sentences"] = sum(assignment.sentences)
    counts["test_sentences"] = assignment.totals[1]
    return records.write_record(folder, dataset, inputs, options, outputs, dict(counts))


def split_all(texts, options: dict, pool, counts: Counter):
    """Yield (sentences as lines, their number) for each document, and add to `counts`."""
    total = sum(path.stat().st_size for path in texts)
    with tqdm(total=total, unit="B", unit_scale=True, desc="sharding") as bar:
        how = options["segmentation_method"], options.get("language", "en")
        chunks = ((chunk, *how) for chunk in line_chunks(texts, bar.update))
        for documents, found in ordered_map(pool, split_lines, chunks):
            counts.update(found)
            bar.set_postfix_str(describe_counts(counts), refresh=False)
            yield from documents


def line_chunks(paths, progress):
    """Yield the text of the files, as UTF-8 without a byte order mark, in pieces of about 1 MB of whole lines."""
    for path in paths:
        with open(path, "rb") as file:
            encoding = checked_encoding(file.peek(LONGEST_MARK), path)
        yield from utf8_chunks(path, progress) if encoding == "utf-8-sig" else transcoded(path, encoding, progress)


def utf8_chunks(path, progress):
    """Bytes that are not UTF-8 stay as they are: split_lines counts the documents that hold them."""
    with open(path, "rb") as file:
        if file.peek(len(BOM_UTF8)).startswith(BOM_UTF8):
            file.seek(len(BOM_UTF8))
        while chunk := file.read(CHUNK_BYTES):
            if not chunk.endswith(b"\n"):
                chunk += file.readline()
            progress(len(chunk))
            yield chunk


def transcoded(path, encoding: str, progress):
    with open_text(path) as file:
        try:
            while lines := file.readlines(CHUNK_BYTES):
                yield "".join(lines).encode()
        except UnicodeError as error:
            raise UserError(f"{path}: not {encoding.upper()}, though it begins with its byte order mark "
                            f"({error})") from None
    progress(path.stat().st_size)


def windows(documents):
    """Yield (documents, whether these are the last), in order.

    A window holds about WINDOW_BYTES of text; the last one up to twice as much, so that it can even out the shards.
    """
    waiting, size = deque(), 0
    for document in documents:
        waiting.append(document)
        size += len(document[0])
        if size > 2 * WINDOW_BYTES:
            window = []
            while size > WINDOW_BYTES:
                window.append(waiting.popleft())
                size -= len(window[-1][0])
            yield window, False
    yield list(waiting), True


def append(paths: list[Path], window, shards: list[int]) -> None:
    """Append the documents of a window to their shards, with a blank line after each."""
    texts = [[] for _ in paths]
    for (text, _), shard in zip(window, shards, strict=True):
        texts[shard].append(text)
    for path, documents in zip(paths, texts, strict=True):
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{document}\n\n" for document in documents)
