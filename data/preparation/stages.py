"""The stages of data preparation: each does what its record does not show as done.

download → text_formatting → sharding → (create_vocabulary) → create_hdf5_files
"""

import glob
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from common.download import TRIES, local_file
from common.errors import NO_SPACE, UserError
from common.files import remove_leftovers
from common.locks import FileLocks, folder_lock
from data.preparation import (
    estimates,
    formatting,
    inputs,
    layout,
    records,
    sentences,
    shard_numbers,
    sharding,
    wikipedia,
)
from data.preparation.datasets import GOOGLE_VOCABULARY, NAMES, Dataset
from data.preparation.document_filters import DocumentFilters
from data.preparation.downloads import DownloadOptions, mirror_pairs
from data.preparation.extended_vocabulary import describe_extension, extend, read_words
from data.preparation.formatting import describe_counts
from data.preparation.samples import SampleOptions, counts_of_words, create_shard
from data.preparation.text_counts import TextCounts
from data.shard_index import write_index
from data.shards import INDEX
from data.tokenizer import load_vocabulary, sample_lines, save_vocabulary, train_vocabulary, vocabulary_path
from data.upload import upload_set
from data.vocabulary import check_case
from data.workers import open_pool, ordered_map

WORDS = "words"  # in the record of a vocabulary: the file of --extend_vocab
COUNTED_BYTES = 1 << 20  # of text, for what create_vocabulary says of its words


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """The flags of bertPrep.py."""

    dataset: Dataset
    samples: SampleOptions
    input_files: list[str]
    n_processes: int
    dump_date: str
    mirror: list
    filters: DocumentFilters
    n_training_shards: int | None
    n_test_shards: int | None
    fraction_test_set: float
    segmentation_method: str | None  # None: the default of the language
    language: str | None  # None: that of the data set
    vocab_file: str | None
    vocab_size: int
    unused_tokens: int
    extend_vocab: str | None
    upload_to: str | None
    skip_wikiextractor: bool
    part: tuple[int, int]  # (K, N): the Kth of N calls that share the work

    def shard_numbers(self, untyped: tuple[int, int]) -> tuple[int, int]:
        """Those typed, else the data set's own, else these."""
        return (self.n_training_shards or self.dataset.training_shards or untyped[0],
                self.n_test_shards or self.dataset.test_shards or untyped[1])

    def text_shards(self) -> list[Path]:
        """Those that --input_files names, else those that sharding made."""
        name, numbers = self.dataset.name, (0, 0)
        if not self.input_files and 0 in self.shard_numbers(numbers):
            numbers = shard_numbers.numbers_made(name, self.fraction_test_set)
            if not numbers:
                raise UserError(f"{layout.working_folder()}: no text shards of {name} in it; run --action sharding "
                                f"--dataset {name} first, or name files with --input_files")
        numbers = self.shard_numbers(numbers)
        return inputs.text_shards(layout.sharded_folder(*numbers, self.fraction_test_set), name, self.input_files,
                                  layout.shard_names(name, *numbers))

    def trained_vocabulary(self) -> Path:
        return layout.vocabulary_file(self.dataset.name, self.samples.do_lower_case)


def run_stage(action: str, options: StageOptions) -> None:
    if options.part[1] > 1 and action != "create_hdf5_files":
        raise UserError(f"--part is for --action create_hdf5_files, not for {action}")
    try:
        ACTIONS[action](options)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UserError(f"{error.filename or layout.working_folder()}: {error.strerror}; finished files are kept: "
                        f"free some space, and the same command continues from there") from None


def estimate(options: StageOptions) -> None:
    dataset, parts = options.dataset, options.dataset.parts or (options.dataset,)
    if not any(part.download_bytes for part in parts):
        raise UserError(f"--dataset {dataset.name}: no estimate; its size is not known in advance")
    unknown = "".join(f", {part.name} not counted" for part in parts if not part.download_bytes)
    print(f"{dataset.name}, {options.n_processes} processes{unknown}:")
    print("\n".join(f"  {line}" for line in estimates.whole_chain(parts, options.samples, options.n_processes)))


def download(options: StageOptions) -> None:
    dataset, folder = options.dataset, layout.download_folder()
    if not dataset.built_in:
        raise UserError(f"--dataset {dataset.name}: neither {NAMES}. One's own text needs no download: --action "
                        f"text_formatting --input_files takes s3:// and https:// names too")
    if not dataset.download:
        raise UserError(f"--dataset {dataset.name}: download {' and '.join(part.name for part in dataset.parts)} one "
                        f"by one")
    paths = inputs.named_files(options.input_files)
    made_from, recorded_options = records.file_fingerprints(paths), {"dump_date": options.dump_date}
    record = records.finished_record(folder, dataset.name, made_from, recorded_options)
    if not record or record["skipped"]:
        with sole_run(folder, dataset.name):
            found, skipped = dataset.download(folder / dataset.name, DownloadOptions(
                mirrors=mirror_pairs(options.mirror), input_files=tuple(paths), dump_date=options.dump_date,
                threads=options.n_processes))
            outputs = {path.relative_to(folder).as_posix(): {} for path in found}
            counts = {"files": len(found), "skipped": len(skipped)}
            record = records.write_record(folder, dataset.name, made_from, recorded_options, outputs, counts, skipped)
    print_result("download", record, folder / dataset.name)


def format_text(options: StageOptions) -> None:
    dataset, folder = options.dataset, layout.formatted_folder()
    text_format = dataset.text_format
    if text_format is None:
        raise UserError(f"--dataset {dataset.name}: nothing to format; its parts are formatted one by one")
    if options.skip_wikiextractor and text_format is wikipedia.DUMP:
        text_format = wikipedia.EXTRACTED
    options.filters.check()
    text_format = replace(text_format, filters=options.filters)
    text_share = 1.0 if text_format.extracted else dataset.text_share
    paths = inputs.for_text_formatting(dataset, text_format, options.input_files)
    made_from = text_format.fingerprints(paths)
    record = records.finished_record(folder, dataset.name, made_from, text_format.options())
    if not record:
        if records.read_record(folder, dataset.name):
            print(f"text_formatting: {dataset.name} was made of other files or with other flags, or is "
                  "not whole: it is made anew")
        with (sole_run(folder, dataset.name),
              stage_pool("text_formatting", paths, text_share, options, folder) as pool,
              tqdm(total=sum(path.stat().st_size for path in paths), unit="B", unit_scale=True,
                   desc="text_formatting") as bar):
            batches = text_format.batches(paths, bar.update)
            record = formatting.format_documents(folder, dataset.name, text_format, batches, made_from, pool)
    print_result("text_formatting", record, folder / dataset.name)


def shard_text(options: StageOptions) -> None:
    dataset, texts = options.dataset.name, inputs.for_sharding(options.dataset, options.input_files)
    made_from = records.file_fingerprints(texts)
    training, test = options.shard_numbers((0, 0))
    if not training or not test:
        training, test = options.shard_numbers(shard_numbers.numbers_for(texts, options.fraction_test_set))
    folder = layout.sharded_folder(training, test, options.fraction_test_set)
    language = options.language or options.dataset.language
    method = options.segmentation_method or sentences.default_method(language)
    sentences.splitter(method, language)
    print(f"sharding: {sentences.description(method, language)}", flush=True)
    recorded_options = {"training_shards": training, "test_shards": test,
                        "fraction_test_set": options.fraction_test_set, "segmentation_method": method,
                        **({} if language == "en" else {"language": language})}  # records of English lack it
    record = records.finished_record(folder, dataset, made_from, recorded_options)
    if not record:
        with sole_run(folder, dataset), stage_pool("sharding", texts, 1.0, options, folder) as pool:
            record = sharding.shard_documents(folder, dataset, texts, made_from, recorded_options, pool)
    print_result("sharding", record, folder / dataset)


def create_vocabulary(options: StageOptions) -> Path:
    """Train a vocabulary on the training shards, or extend one where --extend_vocab names words; returns its file."""
    return extend_vocabulary(options) if options.extend_vocab else learn_vocabulary(options)


def extend_vocabulary(options: StageOptions) -> Path:
    """Put the words of --extend_vocab into the vocabulary of --vocab_file, or Google's."""
    path, lower_case = options.trained_vocabulary(), options.samples.do_lower_case
    folder, name = path.parent.parent, f"{path.parent.name}/{path.name}"
    words = local_file(options.extend_vocab)
    lines = read_words(words)
    if not options.vocab_file:
        check_google_fits(options)
    base = vocabulary_path(local_file(options.vocab_file)) if options.vocab_file else google_vocabulary(options, TRIES)
    tokens = load_vocabulary(base)
    check_case(tokens, lower_case, f"--vocab_file {base}")
    made_from = {"vocabulary": records.file_fingerprint(base), WORDS: records.file_fingerprint(words)}
    recorded_options = {"do_lower_case": lower_case}
    record = records.finished_record(folder, name, made_from, recorded_options)
    if not record:
        with sole_run(folder, path.parent.name):
            extended = extend(tokens, lines, lower_case)
            save_vocabulary(path, extended.tokens)
            record = records.write_record(folder, name, made_from, recorded_options, {name: {}}, extended.counts,
                                          extended.no_tokens)
    print(f"create_vocabulary: {record['counts']['tokens']:,} tokens in {path}, those of {base} with the words of "
          f"{words}: {describe_extension(record['counts'], record['skipped'])}", flush=True)
    return path


def learn_vocabulary(options: StageOptions) -> Path:
    """Train a vocabulary on the training shards; returns its file."""
    path, lower_case = options.trained_vocabulary(), options.samples.do_lower_case
    folder, name = path.parent.parent, f"{path.parent.name}/{path.name}"
    texts = training_texts(options.text_shards())
    made_from = records.file_fingerprints(texts)
    recorded_options = {"vocab_size": options.vocab_size, "do_lower_case": lower_case,
                        **({"unused_tokens": options.unused_tokens} if options.unused_tokens else {})}
    record = records.finished_record(folder, name, made_from, recorded_options)
    if not record:
        with sole_run(folder, path.parent.name):
            tokens = train_vocabulary(texts, options.vocab_size, lower_case, options.unused_tokens)
            save_vocabulary(path, tokens)
            counts = {"tokens": len(tokens)} | {f"text_{figure}": count for figure, count in counts_of_words(
                sample_lines(texts, COUNTED_BYTES), tokens, lower_case).items()}
            record = records.write_record(folder, name, made_from, recorded_options, {name: {}}, counts)
    print(f"create_vocabulary: {record['counts']['tokens']:,} tokens in {path}", flush=True)
    if "text_words" in record["counts"]:  # older records lack them
        print_text_counts([{figure.removeprefix("text_"): count for figure, count in record["counts"].items()
                            if figure.startswith("text_")}])
    return path


def training_texts(texts: list[Path]) -> list[Path]:
    """The text shards to train on, by their names; all that are not to be held out, where no name says "training"."""
    chosen = [text for text in texts if "training" in text.name] or [text for text in texts if "test" not in text.name]
    if not chosen:
        raise UserError(f"{texts[0]}: held-out text by its name, and there is no other to train a vocabulary on")
    return chosen


def create_hdf5_files(options: StageOptions) -> None:
    folder, dataset = layout.hdf5_folder(options.samples), options.dataset.name
    texts, recorded_options = options.text_shards(), options.samples.recorded()
    names = {text: f"{dataset}/{text.stem}.hdf5" for text in texts}
    if len(set(names.values())) < len(names):
        raise UserError(f"--input_files: two of the {len(texts)} files have the same name, and so would their shards")
    number, parts = options.part
    texts = texts[number - 1::parts]
    vocab_file = find_vocabulary(options)
    tokens = load_vocabulary(vocab_file)
    check_case(tokens, options.samples.do_lower_case, f"--vocab_file {vocab_file}")
    if limit := options.samples.limit_warning():
        print(f"warning: {limit}", flush=True)
    vocabulary = {"vocabulary": records.file_fingerprint(vocab_file)}
    made_from = {text: records.file_fingerprints([text]) | vocabulary for text in texts}
    finished = {text: records.finished_record(folder, names[text], made_from[text], recorded_options)
                for text in texts}
    todo = [text for text in texts if not finished[text]]
    if todo:
        hdf5_share = estimates.hdf5_share(options.samples)
        with (stage_pool("create_hdf5_files", todo, hdf5_share, options, folder) as pool, FileLocks() as locks,
              tqdm(total=len(todo), unit="shard", desc="create_hdf5_files") as bar):
            tasks = ((text, taken(locks, folder, names[text]), tokens, options.samples) for text in todo)
            for text, counts in zip(todo, ordered_map(pool, create_shard, tasks), strict=True):
                finished[text] = records.write_record(folder, names[text], made_from[text], recorded_options,
                                                      {names[text]: {}}, counts)
                locks.drop(folder / names[text])
                bar.update()
    if not options.input_files:
        records.delete_outdated(folder, f"{dataset}/{dataset}_*.hdf5", names.values())
        if todo or not (folder / dataset / INDEX).is_file():  # of a part of the set, an upload makes it
            write_index(folder / dataset)
    counts = [record["counts"] for record in finished.values()]
    shown = TextCounts.total(counts).totals() | {"shards": len(texts)}
    part = f"part {number} of {parts}, " if parts > 1 else ""
    print(f"create_hdf5_files: {part}{describe_counts(shown)} in {folder / dataset}")
    print(f"vocabulary: {vocab_file} ({len(tokens):,} tokens)")
    print_text_counts(counts)
    if options.upload_to:
        upload_set(folder / dataset, options.upload_to, overwrite=False, show_progress=True)
        print(f"create_hdf5_files: uploaded to {options.upload_to}")


def find_vocabulary(options: StageOptions) -> Path:
    """With --extend_vocab the extended vocabulary; else --vocab_file, else one that create_vocabulary made, else
    Google's, else one trained here where allowed."""
    made, may_train = options.trained_vocabulary(), options.dataset.may_train_vocabulary
    if options.extend_vocab:
        return extend_vocabulary(options)
    if options.vocab_file:
        return vocabulary_path(local_file(options.vocab_file))
    if made.is_file():  # where the stage trained it by itself, it follows changes of the text
        return learn_vocabulary(options) if may_train and not was_extended(made) else made
    check_google_fits(options)
    try:
        return google_vocabulary(options, 1 if may_train else TRIES)
    except UserError as error:
        if not may_train:
            raise
        print(f"Google's vocabulary cannot be downloaded ({error}); training one on the data set", flush=True)
        return learn_vocabulary(options)


def was_extended(vocabulary: Path) -> bool:
    record = records.read_record(vocabulary.parent.parent, f"{vocabulary.parent.name}/{vocabulary.name}")
    return bool(record) and WORDS in record["inputs"]


def check_google_fits(options: StageOptions) -> None:
    """UserError where Google's vocabulary is of another language or case than the text."""
    language = options.language or options.dataset.language
    if language not in ("en", "simple"):
        raise UserError(f"--dataset {options.dataset.name}: Google's vocabulary is English, the text's language is "
                        f"{language}: give --vocab_file, or train one with --action create_vocabulary")
    if not options.samples.do_lower_case:
        raise UserError("--do_lower_case 0: Google's vocabulary is of lower case; give --vocab_file, or train one with "
                        "--action create_vocabulary --do_lower_case 0")


def google_vocabulary(options: StageOptions, tries: int) -> Path:
    """Google's vocabulary, which is downloaded."""
    download_options = DownloadOptions(mirrors=mirror_pairs(options.mirror), tries=tries)
    found, _ = GOOGLE_VOCABULARY.download(layout.download_folder() / GOOGLE_VOCABULARY.name, download_options)
    return found[0]


@contextmanager
def sole_run(folder: Path, dataset: str):
    """A block in which no other run makes this data set in the folder of a stage.  A killed one's leftovers go."""
    with folder_lock(folder / dataset, str(folder / dataset)):
        remove_leftovers(folder / dataset)
        remove_leftovers(folder / "records" / dataset)
        remove_leftovers(folder / "records", f".{dataset}.*")
        yield


def taken(locks: FileLocks, folder: Path, name: str) -> Path:
    """The path of an output file that no other run is making; others of its folder may be under way elsewhere."""
    path = locks.take(folder / name)
    for place in (path, records.record_path(folder, name)):
        remove_leftovers(place.parent, f".{glob.escape(place.name)}.*")
    return path


@contextmanager
def stage_pool(stage: str, paths, share: float, options: StageOptions, folder: Path):
    """Print an estimate, and yield the worker pool of a stage.

    share: the bytes that the stage writes for each byte that it reads.
    """
    with open_pool(options.n_processes) as pool:
        size = estimates.input_size(paths)
        print(estimates.announcement(stage, size, size * share, pool, folder), flush=True)
        yield pool


def print_text_counts(counts: list[dict]) -> None:
    """The shares that these records of TextCounts add up to, and what they warn of."""
    totals = TextCounts.total(counts)
    print(f"text: {totals.description}")
    for line in totals.warnings():
        print(f"warning: {line}")


def print_result(stage: str, record: dict, where: Path) -> None:
    print(f"{stage}: {describe_counts(record['counts'])} in {where}", flush=True)
    for line in record["skipped"]:
        print(f"  skipped {line}")


ACTIONS = {"estimate": estimate, "download": download, "text_formatting": format_text, "sharding": shard_text,
           "create_vocabulary": create_vocabulary, "create_hdf5_files": create_hdf5_files}
