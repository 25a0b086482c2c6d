"""The data sets.  A new one is one entry here, and one file that downloads it.

That file also defines a TextFormat if the files are neither MediaWiki dumps nor .txt books.  books.py is an example.
Wikipedias of other languages and one's own text (corpus.py) are entries that follow from the name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from common.errors import UserError
from data.preparation import books, downloads, wikipedia
from data.preparation.corpus import CorpusOptions, corpus_format
from data.preparation.formatting import TextFormat


@dataclass(frozen=True, kw_only=True)
class Dataset:
    name: str
    download: Callable | None = None  # (folder, DownloadOptions): its files, and what was skipped and why
    download_bytes: float = 0.0  # for the estimate; 0: not known in advance
    text_share: float = 1.0  # for the estimate: bytes of text in a byte of its uncompressed files
    text_format: TextFormat | None = None  # of its files; None: there is nothing to format
    parts: tuple["Dataset", ...] = ()  # the data sets that it combines, if it has no files of its own
    language: str = "en"
    training_shards: int | None = 256  # None: as many as the text fills
    test_shards: int | None = 256
    may_train_vocabulary: bool = False  # on it, if Google's cannot be downloaded
    built_in: bool = True  # False: one's own text


WIKIPEDIA = Dataset(name="wikicorpus_en", download=wikipedia.download_dump, download_bytes=25e9,
                    text_share=0.16, text_format=wikipedia.DUMP)
BOOKS = Dataset(name="bookscorpus", download=books.download_books, text_format=books.BOOKS)
WIKIPEDIA_AND_BOOKS = Dataset(name="books_wiki_en_corpus", parts=(WIKIPEDIA, BOOKS))
GOOGLE_VOCABULARY = Dataset(name="google_pretrained_weights", download=downloads.download_google_vocabulary)
SAMPLE = Dataset(name="wikicorpus_en_sample", download=wikipedia.download_sample, download_bytes=1.7e6,
                 text_share=0.4, text_format=wikipedia.DUMP, training_shards=8, test_shards=2,
                 may_train_vocabulary=True)

DATASETS = {dataset.name: dataset for dataset in (WIKIPEDIA, BOOKS, WIKIPEDIA_AND_BOOKS, GOOGLE_VOCABULARY, SAMPLE)}
NAMES = f"{', '.join(DATASETS)}, wikicorpus_XX with a language code"

OWN_NAME = re.compile(r"[A-Za-z0-9_-]+")
OTHER_WIKIPEDIA = re.compile(r"wikicorpus_((?:[a-z]{2,3}|simple)(?:[_-][a-z]+)*)")
TAKEN = re.compile(r"records|.*_cased|.*training.*|.*test.*")  # names of other folders; the splits in a shard's name


def dataset_named(name: str, corpus: CorpusOptions) -> Dataset:
    """The built-in data set of this name, a Wikipedia, or else one's own text.  UserError for a name that cannot be."""
    if name in DATASETS:
        return DATASETS[name]
    if not OWN_NAME.fullmatch(name) or name.startswith("-"):
        raise UserError(f"--dataset {name}: neither {NAMES}, nor a name of your own (letters, digits, - and _)")
    if TAKEN.fullmatch(name.lower()):
        raise UserError(f"--dataset {name}: the names of shards hold 'training' and 'test', and 'records' and '_cased' "
                        f"name folders: choose another name")
    wiki = OTHER_WIKIPEDIA.fullmatch(name)
    if wiki:
        return Dataset(name=name, download=partial(wikipedia.download_dump, language=wiki[1]), text_share=0.2,
                       text_format=wikipedia.DUMP, language=wiki[1], training_shards=None, test_shards=None)
    return Dataset(name=name, text_format=corpus_format(corpus), training_shards=None, test_shards=None,
                   built_in=False)
