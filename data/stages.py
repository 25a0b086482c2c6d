"""The stages of data preparation: what each reads, what it writes, and when there is nothing left to do.

download → text_formatting → sharding → (create_vocabulary) → create_hdf5_files
"""

import errno
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from cli import UserError
from create_pretraining_data import create_shard
from data import books, downloads, estimates, formatting, layout, records, sharding, vocabulary, wikipedia
from data.formatting import describe
from data.pool import open_pool, ordered_map
from file_utils import local_file, remove_leftovers

WIKIPEDIA, BOOKS, BOTH = "wikicorpus_en", "bookscorpus", "books_wiki_en_corpus"
GOOGLE, SAMPLE = "google_pretrained_weights", "wikicorpus_en_sample"
DATASETS = (WIKIPEDIA, BOOKS, BOTH, GOOGLE, SAMPLE)
SOURCES = {BOTH: (WIKIPEDIA, BOOKS)}  # the data sets that a data set is made of, where not itself
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DEFAULT_SHARDS = {SAMPLE: (8, 2)}  # training and test; 256 each for the others


def run(args, options) -> None:
    """Run the stage that --action names.  `options`: the SampleOptions of create_hdf5_files."""
    try:
        ACTIONS[args.action](args, options)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UserError(f"{error.filename or layout.working_folder()}: {error.strerror}; what is finished is whole and "
                        f"kept: make room, and the same command goes on from there") from None


def estimate(args, _) -> None:
    dumps = sorted((layout.download_folder() / args.dataset).glob("*.xml.bz2"))
    size = sum(path.stat().st_size for path in dumps) or estimates.WIKIPEDIA_DUMP
    print(f"{args.dataset} with {args.n_processes} processes: bytes written and time of each stage")
    print("\n".join(f"  {line}" for line in estimates.plan(size, args.n_processes)))


def download(args, _) -> None:
    folder, replacements = layout.download_folder() / args.dataset, downloads.mirrors(args.mirror)
    if args.dataset == WIKIPEDIA:
        found = downloads.wikipedia_dump(folder, args.dump_date, replacements)
    elif args.dataset == GOOGLE:
        found = downloads.google_weights(folder, replacements)
    elif args.dataset == SAMPLE:
        found = downloads.sample(folder, replacements)
    elif args.dataset == BOOKS:
        found = download_books(args, folder, replacements)
    else:
        raise UserError(f"--dataset {args.dataset}: download {' and '.join(SOURCES[args.dataset])} one by one")
    print(f"download: {found}")


def download_books(args, folder: Path, replacements) -> str:
    """Fetch the books that the user lists; what failed is listed in records/bookscorpus.json."""
    lists = [Path(name) for name in args.input_files]
    if not lists:
        raise UserError("--dataset bookscorpus: BookCorpus has no official source any more; name a file of URLs of "
                        ".txt books, or an archive of them, with --input_files (for a folder of .txt books, give it "
                        "to --action text_formatting and skip this)")
    for path in lists:
        if not path.is_file():
            raise UserError(f"--input_files {path}: no such file")
    found, failed = downloads.books(folder, lists, args.n_processes, replacements)
    if not found:
        raise UserError(f"none of {len(failed)} books could be fetched; the first: {next(iter(failed.values()), '-')}")
    outputs = {f"{BOOKS}/{path.relative_to(folder)}": {} for path in found}
    records.write(folder.parent, BOOKS, records.fingerprints(lists), {"skipped": failed}, outputs,
                  {"books": len(found), "skipped": len(failed)})
    return f"{len(found)} books in {folder}, {len(failed)} skipped" + "".join(f"\n  {line}" for line in failed.values())


def text_formatting(args, _) -> None:
    folder, dataset = layout.formatted_folder(), args.dataset
    paths, inputs = formatting_inputs(args)
    options = formatting.options(args.skip_wikiextractor)
    record = records.done(folder, dataset, inputs, options)
    if not record:
        remove_leftovers(folder / dataset)
        with (opened_pool("text_formatting", paths, args, folder) as pool,
              position_bar(paths, "text_formatting") as advance):
            batches, work = formatting_work(args, paths, advance)
            record = formatting.format_documents(folder, dataset, batches, work, inputs, options, pool)
    report("text_formatting", record, folder / dataset)
    for facts in record["outputs"].values():
        for line in facts["skipped"]:
            print(f"  skipped {line}")


def formatting_inputs(args) -> tuple[list[Path], dict]:
    """The files that text_formatting reads, and their fingerprints."""
    if args.dataset == BOOKS:
        places = [Path(name) for name in args.input_files] or [layout.download_folder() / BOOKS]
        if not all(place.exists() for place in places):
            raise UserError(f"--input_files {places[0]}: no such folder of .txt books (--action download fetches "
                            f"books from a list of URLs)")
        paths = books.find(places)
        return paths, {"books": records.combined_fingerprint(paths)}
    if args.dataset not in (WIKIPEDIA, SAMPLE):
        raise UserError(f"--dataset {args.dataset}: nothing to format; its parts are formatted one by one")
    if args.skip_wikiextractor:
        paths = input_files(args, layout.working_folder() / "extracted" / args.dataset, "**/wiki_*", "text_formatting")
    else:
        paths = input_files(args, layout.download_folder() / args.dataset, "*pages-articles*.xml*", "download")
    return paths, records.fingerprints(paths)


def formatting_work(args, paths, advance):
    """The tasks of text_formatting, and the function that the workers apply to them."""
    if args.dataset == BOOKS:
        return ((batch,) for batch in books.batches(paths, advance)), books.read_books
    end, work = ((wikipedia.DOC_END, wikipedia.read_extracted) if args.skip_wikiextractor
                 else (wikipedia.PAGE_END, wikipedia.extract_articles))
    return ((batch,) for path in paths for batch in wikipedia.page_batches(path, advance, end)), work


def shard_text(args, _) -> None:
    folder, dataset = sharded_folder(args), args.dataset
    texts = formatted_files(args)
    training_shards, test_shards = shard_counts(args)
    options = {"training_shards": training_shards, "test_shards": test_shards,
               "fraction_test_set": args.fraction_test_set, "segmentation_method": args.segmentation_method}
    inputs = records.fingerprints(texts)
    record = records.done(folder, dataset, inputs, options)
    if not record:
        remove_leftovers(folder / dataset)
        with opened_pool("sharding", texts, args, folder) as pool:
            record = sharding.shard_documents(folder, dataset, texts, inputs, options, pool)
    report("sharding", record, folder / dataset)


def formatted_files(args) -> list[Path]:
    """What sharding reads: --input_files, else the formatted text of the data set or of those it is made of."""
    if args.input_files:
        return input_files(args, Path(), "", "text_formatting")
    return [path for source in SOURCES.get(args.dataset, (args.dataset,))
            for path in made_by("text_formatting", layout.formatted_folder(), source)]


def sharded_files(args) -> list[Path]:
    """What create_hdf5_files reads: --input_files, else the text shards of the data set."""
    if args.input_files:
        return input_files(args, Path(), "", "sharding")
    return made_by("sharding", sharded_folder(args), args.dataset)


def made_by(stage: str, folder: Path, dataset: str) -> list[Path]:
    """The files that a finished stage recorded: never some of a run that was interrupted."""
    record = records.read(folder, dataset)
    if record is None:
        raise UserError(f"{folder}: no finished {dataset} in it; run --action {stage} --dataset {dataset} first, "
                        f"or name files with --input_files")
    return [folder / name for name in record["outputs"]]


def create_vocabulary(args, options) -> Path:
    """Train a vocabulary on the training shards of a data set.  Returns its file."""
    path = layout.vocabulary_file(args.dataset)
    folder, name = path.parent.parent, f"{args.dataset}/{path.name}"
    texts = [path for path in sharded_files(args) if "_training_" in path.name]
    inputs = records.fingerprints(texts)
    wanted = {"vocab_size": args.vocab_size, "do_lower_case": options.do_lower_case}
    record = records.done(folder, name, inputs, wanted)
    if not record:
        tokens = vocabulary.train(texts, args.vocab_size, options.do_lower_case)
        vocabulary.write(path, tokens)
        record = records.write(folder, name, inputs, wanted, {name: {}}, {"tokens": len(tokens)})
    report("create_vocabulary", record, path)
    return path


def create_hdf5_files(args, options) -> None:
    folder, dataset = layout.hdf5_folder(options), args.dataset
    texts = sharded_files(args)
    vocab_file = find_vocabulary(args, options)
    tokens = vocabulary.read(vocab_file)
    vocab = {"vocabulary": records.fingerprint(vocab_file)}
    made_from = {text: records.fingerprints([text]) | vocab for text in texts}
    names = {text: f"{dataset}/{text.stem}.hdf5" for text in texts}
    finished = {text: records.done(folder, names[text], made_from[text], asdict(options)) for text in texts}
    todo = [text for text in texts if not finished[text]]
    if todo:
        remove_leftovers(folder / dataset)
        with (opened_pool("create_hdf5_files", todo, args, folder) as pool,
              tqdm(total=len(todo), unit="shard", desc="create_hdf5_files") as bar):
            tasks = ((text, folder / names[text], tokens, options) for text in todo)
            for text, counts in zip(todo, ordered_map(pool, create_shard, tasks), strict=True):
                outputs = {names[text]: {}}
                finished[text] = records.write(folder, names[text], made_from[text], asdict(options), outputs, counts)
                bar.update()
    if not args.input_files:
        records.prune(folder, f"{dataset}/{dataset}_*.hdf5", names.values())
    totals = sum((Counter(record["counts"]) for record in finished.values()), Counter())
    report("create_hdf5_files", {"counts": totals | {"shards": len(texts)}}, folder / dataset)
    print(f"vocabulary: {vocab_file} ({len(tokens):,} tokens)")


def find_vocabulary(args, options) -> Path:
    """--vocab_file, else one trained by create_vocabulary, else Google's, else, for the sample, one trained on it."""
    if args.vocab_file:
        return local_file(args.vocab_file)
    trained = layout.vocabulary_file(args.dataset)
    if trained.is_file() and args.dataset != SAMPLE:
        return trained
    if not trained.is_file() and options.do_lower_case:
        try:
            return downloads.google_weights(layout.download_folder() / GOOGLE, downloads.mirrors(args.mirror), tries=1)
        except UserError as error:
            if args.dataset != SAMPLE:
                raise
            print(f"Google's vocabulary cannot be had ({error}); training one on the sample", flush=True)
    elif args.dataset != SAMPLE:
        raise UserError("--do_lower_case 0: Google's vocabulary is of lower case; give --vocab_file, or train one with "
                        "--action create_vocabulary")
    return create_vocabulary(args, options)


def input_files(args, folder: Path, pattern: str, stage_before: str) -> list[Path]:
    """--input_files, else what the stage before left in its folder, in the order of the names."""
    paths = [Path(name) for name in args.input_files] or sorted(folder.glob(pattern))
    if not paths:
        raise UserError(f"{folder}: no {pattern} in it; run --action {stage_before} --dataset {args.dataset} first, "
                        f"or name files with --input_files")
    for path in paths:
        if not path.is_file():
            raise UserError(f"--input_files {path}: no such file")
    if len({path.name for path in paths}) < len(paths):
        raise UserError("--input_files: two of the files have the same name")
    return paths


def shard_counts(args) -> tuple[int, int]:
    """Training and test shards, as asked for or by default."""
    training, test = DEFAULT_SHARDS.get(args.dataset, (256, 256))
    return args.n_training_shards or training, args.n_test_shards or test


def sharded_folder(args) -> Path:
    return layout.sharded_folder(*shard_counts(args), args.fraction_test_set)


@contextmanager
def opened_pool(stage: str, paths, args, folder: Path):
    """The pool for a stage that has work to do, after saying what it will take."""
    with open_pool(args.n_processes) as pool:
        print(estimates.announcement(stage, estimates.input_size(paths), pool, folder), flush=True)
        yield pool


@contextmanager
def position_bar(paths, name: str):
    """A progress bar over the bytes of files; yields a function that takes the position in the file being read."""
    with tqdm(total=sum(path.stat().st_size for path in paths), unit="B", unit_scale=True, desc=name) as bar:
        before = 0

        def advance(position: int) -> None:
            nonlocal before
            bar.update(position - before if position >= before else position)
            before = position

        yield advance


def report(stage: str, record: dict, where: Path) -> None:
    print(f"{stage}: {describe(record['counts'])} in {where}", flush=True)


ACTIONS = {"download": download, "text_formatting": text_formatting, "sharding": shard_text,
           "create_vocabulary": create_vocabulary, "create_hdf5_files": create_hdf5_files, "estimate": estimate}
