"""The data sets.  A new one is one entry here, and one file that downloads it.

That file also defines a TextFormat if the files are neither MediaWiki dumps nor .txt books.  books.py is an example.
"""

from collections.abc import Callable
from dataclasses import dataclass

from data.preparation import books, downloads, wikipedia
from data.preparation.formatting import TextFormat


@dataclass(frozen=True, kw_only=True)
class Dataset:
    name: str
    download: Callable | None = None  # (folder, DownloadOptions): its files, and what was skipped and why
    download_bytes: float = 0.0  # for the estimate; 0: not known in advance
    text_share: float = 1.0  # for the estimate: bytes of text in a byte of its uncompressed files
    text_format: TextFormat | None = None  # of its files; None: there is nothing to format
    parts: tuple["Dataset", ...] = ()  # the data sets that it combines, if it has no files of its own
    training_shards: int = 256
    test_shards: int = 256
    may_train_vocabulary: bool = False  # on it, if Google's cannot be downloaded


WIKIPEDIA = Dataset(name="wikicorpus_en", download=wikipedia.download_dump, download_bytes=25e9,
                    text_share=0.16, text_format=wikipedia.DUMP)
BOOKS = Dataset(name="bookscorpus", download=books.download_books, text_format=books.BOOKS)
WIKIPEDIA_AND_BOOKS = Dataset(name="books_wiki_en_corpus", parts=(WIKIPEDIA, BOOKS))
GOOGLE_VOCABULARY = Dataset(name="google_pretrained_weights", download=downloads.download_google_vocabulary)
SAMPLE = Dataset(name="wikicorpus_en_sample", download=wikipedia.download_sample, download_bytes=1.7e6,
                 text_share=0.4, text_format=wikipedia.DUMP, training_shards=8, test_shards=2,
                 may_train_vocabulary=True)

DATASETS = {dataset.name: dataset for dataset in (WIKIPEDIA, BOOKS, WIKIPEDIA_AND_BOOKS, GOOGLE_VOCABULARY, SAMPLE)}
