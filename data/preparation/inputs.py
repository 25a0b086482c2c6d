"""Which files a stage reads: those that --input_files names, else those that the stage before has finished."""

from pathlib import Path

from common.download import is_remote, local_file
from common.errors import UserError
from data.preparation import layout, records

WIKIPEDIA, BOOKS, BOTH = "wikicorpus_en", "bookscorpus", "books_wiki_en_corpus"
GOOGLE, SAMPLE = "google_pretrained_weights", "wikicorpus_en_sample"
DATASETS = (WIKIPEDIA, BOOKS, BOTH, GOOGLE, SAMPLE)
SOURCES = {BOTH: (WIKIPEDIA, BOOKS)}  # the data sets that a data set is made of, where not itself
SHARDS, SAMPLE_SHARDS = (256, 256), (8, 2)  # training and test, where not asked for


def named_files(args) -> list[Path]:
    """The files that --input_files names, remote ones as local copies."""
    paths = [local_file(name) for name in args.input_files]
    for name, path in zip(args.input_files, paths, strict=True):
        if not path.is_file():
            raise UserError(f"--input_files {name}: no such file")
    if len({records.file_key(path) for path in paths}) < len(paths):
        raise UserError("--input_files: a file is named twice")
    return paths


def recorded_files(stage: str, folder: Path, dataset: str) -> list[Path]:
    """The files that a finished stage recorded; those of an interrupted run are not among them."""
    record = records.read_record(folder, dataset)
    if record is None:
        raise UserError(f"{folder}: no finished {dataset} in it; run --action {stage} --dataset {dataset} first, "
                        f"or name files with --input_files")
    return [folder / name for name in record["outputs"]]


def for_text_formatting(args) -> list[Path]:
    """Dumps, files that wikiextractor wrote, or books."""
    if args.dataset not in (WIKIPEDIA, SAMPLE, BOOKS):
        raise UserError(f"--dataset {args.dataset}: nothing to format; its parts are formatted one by one")
    if args.dataset == BOOKS:
        return book_files(args)
    if args.skip_wikiextractor and not args.input_files:
        folder = layout.working_folder() / "extracted" / args.dataset
        found = sorted(folder.rglob("wiki_*"))
        if not found:
            raise UserError(f"{folder}: no wiki_* files of wikiextractor in it, for --skip_wikiextractor 1")
        return found
    return named_files(args) or recorded_files("download", layout.download_folder(), args.dataset)


def book_files(args) -> list[Path]:
    """The .txt books in the folders and files that --input_files names, or those that were downloaded."""
    places = [local_file(name) if is_remote(name) else Path(name) for name in args.input_files]
    for place in places:
        if not place.exists():
            raise UserError(f"--input_files {place}: no such folder or file of .txt books")
    books = places or recorded_files("download", layout.download_folder(), BOOKS)
    return [book for place in books for book in books_below(place)]


def books_below(place: Path) -> list[Path]:
    """A .txt book itself, or those in a folder and the folders in it, in the order of their names."""
    if not place.is_dir():
        return [place]
    found = [path for path in sorted(place.rglob("*.txt")) if not path.name.startswith(".")]
    if not found:
        raise UserError(f"{place}: no .txt file in it")
    return found


def for_sharding(args) -> list[Path]:
    """The formatted text of the data set, or of those that it is made of."""
    return named_files(args) or [path for source in SOURCES.get(args.dataset, (args.dataset,))
                           for path in recorded_files("text_formatting", layout.formatted_folder(), source)]


def text_shards(args) -> list[Path]:
    """The text shards of the data set."""
    return named_files(args) or recorded_files("sharding", sharded_folder(args), args.dataset)


def shard_counts(args) -> tuple[int, int]:
    """Training and test shards, as asked for or by default."""
    training, test = SAMPLE_SHARDS if args.dataset == SAMPLE else SHARDS
    return args.n_training_shards or training, args.n_test_shards or test


def sharded_folder(args) -> Path:
    return layout.sharded_folder(*shard_counts(args), args.fraction_test_set)
