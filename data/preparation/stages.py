"""The stages of data preparation: each finds out whether there is anything to do, does it, and records it.

download → text_formatting → sharding → (create_vocabulary) → create_hdf5_files
"""

import errno
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from common.download import local_file
from common.errors import UserError
from common.files import remove_leftovers
from data.preparation import books, downloads, estimates, formatting, inputs, layout, records, sharding, wikipedia
from data.preparation.formatting import describe_counts
from data.preparation.inputs import BOOKS, BOTH, GOOGLE, SAMPLE, SOURCES, WIKIPEDIA
from data.preparation.samples import create_shard
from data.tokenizer import load_vocabulary, save_vocabulary, train_vocabulary
from data.workers import open_pool, ordered_map

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DUMP_SIZES = {WIKIPEDIA: estimates.WIKIPEDIA_DUMP, BOTH: estimates.WIKIPEDIA_DUMP, SAMPLE: estimates.SAMPLE_DUMP}


def run_stage(args, options) -> None:
    """Run the stage that --action names.  `options`: the SampleOptions of create_hdf5_files."""
    try:
        ACTIONS[args.action](args, options)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UserError(f"{error.filename or layout.working_folder()}: {error.strerror}; what is finished is whole and "
                        f"kept: make room, and the same command goes on from there") from None


def estimate(args, _) -> None:
    """Print what the whole chain will take."""
    if args.dataset not in DUMP_SIZES:
        raise UserError(f"--dataset {args.dataset}: no estimate; its size is not known in advance")
    print(f"{args.dataset}, {args.n_processes} processes{', books not counted' * (args.dataset == BOTH)}:")
    print("\n".join(f"  {line}" for line in estimates.plan(DUMP_SIZES[args.dataset], args.n_processes)))


def download(args, _) -> None:
    if args.dataset in SOURCES:
        raise UserError(f"--dataset {args.dataset}: download {' and '.join(SOURCES[args.dataset])} one by one")
    folder, lists = layout.download_folder(), inputs.named_files(args)
    made_from, options = records.fingerprints(lists), {"dump_date": args.dump_date}
    record = records.finished_record(folder, args.dataset, made_from, options)
    if not record or record["skipped"]:
        remove_leftovers(folder / args.dataset, folder / "records")
        mirrors = downloads.mirror_pairs(args.mirror)
        found, skipped = DOWNLOADS[args.dataset](args, folder / args.dataset, lists, mirrors)
        outputs = {path.relative_to(folder).as_posix(): {} for path in found}
        counts = {"files": len(found), "skipped": len(skipped)}
        record = records.write_record(folder, args.dataset, made_from, options, outputs, counts, skipped)
    print_result("download", record, folder / args.dataset)


def download_books(args, folder: Path, lists: list[Path], mirrors) -> tuple[list[Path], list[str]]:
    """The books that the user lists, and those that could not be had."""
    if not lists:
        raise UserError("--dataset bookscorpus: BookCorpus has no official source any more; name a file of URLs of "
                        ".txt books, or an archive of them, with --input_files (for a folder of .txt books, give it "
                        "to --action text_formatting and skip this)")
    found, failed = downloads.books(folder, lists, args.n_processes, mirrors)
    if not found:
        raise UserError(f"{lists[0]}: none of its books could be had{': ' * bool(failed)}{''.join(failed[:1])}")
    return found, failed


DOWNLOADS = {  # each gives the files, and what was skipped
    WIKIPEDIA: lambda args, folder, _, mirrors: (
        [downloads.wikipedia_dump(folder, args.dump_date, mirrors)], []),
    GOOGLE: lambda args, folder, _, mirrors: ([downloads.google_weights(folder, mirrors)], []),
    SAMPLE: lambda args, folder, _, mirrors: ([downloads.sample(folder, mirrors)], []),
    BOOKS: download_books,
}


def text_formatting(args, _) -> None:
    folder, dataset = layout.formatted_folder(), args.dataset
    paths = inputs.for_text_formatting(args)
    made_from = ({"books": records.combined_fingerprint(paths)} if dataset == BOOKS else records.fingerprints(paths))
    options = formatting.options(args.skip_wikiextractor)
    record = records.finished_record(folder, dataset, made_from, options)
    if not record:
        with (stage_pool("text_formatting", paths, args, folder) as pool,
              position_bar(paths, "text_formatting") as advance):
            batches, work = formatting_work(args, paths, advance)
            record = formatting.format_documents(folder, dataset, batches, work, made_from, options, pool)
    print_result("text_formatting", record, folder / dataset)


def formatting_work(args, paths, advance):
    """The tasks of text_formatting, and the function that the workers apply to them."""
    if args.dataset == BOOKS:
        return ((batch,) for batch in books.batches(paths, advance)), books.read_books
    end, work = ((wikipedia.DOC_END, wikipedia.read_extracted) if args.skip_wikiextractor
                 else (wikipedia.PAGE_END, wikipedia.extract_articles))
    return (batch for path in paths for batch in wikipedia.batches(path, advance, end)), work


def shard_text(args, _) -> None:
    folder, dataset = inputs.sharded_folder(args), args.dataset
    texts = inputs.for_sharding(args)
    training_shards, test_shards = inputs.shard_counts(args)
    options = {"training_shards": training_shards, "test_shards": test_shards,
               "fraction_test_set": args.fraction_test_set, "segmentation_method": args.segmentation_method}
    made_from = records.fingerprints(texts)
    record = records.finished_record(folder, dataset, made_from, options)
    if not record:
        with stage_pool("sharding", texts, args, folder) as pool:
            record = sharding.shard_documents(folder, dataset, texts, made_from, options, pool)
    print_result("sharding", record, folder / dataset)


def create_vocabulary(args, options) -> Path:
    """Train a vocabulary on the training shards of a data set.  Returns its file."""
    path = layout.vocabulary_file(args.dataset, options.do_lower_case)
    folder, name = path.parent.parent, f"{path.parent.name}/{path.name}"
    texts = [text for text in inputs.text_shards(args) if "_training_" in text.name]
    made_from = records.fingerprints(texts)
    wanted = {"vocab_size": args.vocab_size, "do_lower_case": options.do_lower_case}
    record = records.finished_record(folder, name, made_from, wanted)
    if not record:
        remove_leftovers(path.parent, folder / "records")
        tokens = train_vocabulary(texts, args.vocab_size, options.do_lower_case)
        save_vocabulary(path, tokens)
        record = records.write_record(folder, name, made_from, wanted, {name: {}}, {"tokens": len(tokens)})
    print_result("create_vocabulary", record, path)
    return path


def create_hdf5_files(args, options) -> None:
    folder, dataset = layout.hdf5_folder(options), args.dataset
    texts = inputs.text_shards(args)
    vocab_file = find_vocabulary(args, options)
    tokens = load_vocabulary(vocab_file)
    words = {"vocabulary": records.fingerprint(vocab_file)}
    made_from = {text: records.fingerprints([text]) | words for text in texts}
    names = {text: f"{dataset}/{text.stem}.hdf5" for text in texts}
    finished = {text: records.finished_record(folder, names[text], made_from[text], asdict(options)) for text in texts}
    todo = [text for text in texts if not finished[text]]
    if todo:
        with (stage_pool("create_hdf5_files", todo, args, folder) as pool,
              tqdm(total=len(todo), unit="shard", desc="create_hdf5_files") as bar):
            tasks = ((text, folder / names[text], tokens, options) for text in todo)
            for text, counts in zip(todo, ordered_map(pool, create_shard, tasks), strict=True):
                finished[text] = records.write_record(folder, names[text], made_from[text], asdict(options),
                                                      {names[text]: {}}, counts)
                bar.update()
    if not args.input_files:
        records.delete_outdated(folder, f"{dataset}/{dataset}_*.hdf5", names.values())
    totals = sum((Counter(record["counts"]) for record in finished.values()), Counter(shards=len(texts)))
    print(f"create_hdf5_files: {describe_counts(totals)} in {folder / dataset}")
    print(f"vocabulary: {vocab_file} ({len(tokens):,} tokens)")


def find_vocabulary(args, options) -> Path:
    """--vocab_file, else one trained by create_vocabulary, else Google's, else, for the sample, one trained on it."""
    if args.vocab_file:
        return local_file(args.vocab_file)
    if layout.vocabulary_file(args.dataset, options.do_lower_case).is_file():
        if args.dataset == SAMPLE:  # made without being asked for, and so kept up to date in the same way
            return create_vocabulary(args, options)
        return layout.vocabulary_file(args.dataset, options.do_lower_case)
    if not options.do_lower_case:
        raise UserError("--do_lower_case 0: Google's vocabulary is of lower case; give --vocab_file, or train one with "
                        "--action create_vocabulary --do_lower_case 0")
    folder, mirrors = layout.download_folder() / GOOGLE, downloads.mirror_pairs(args.mirror)
    if args.dataset != SAMPLE:
        return downloads.google_weights(folder, mirrors)
    try:
        return downloads.google_weights(folder, mirrors, tries=1)
    except UserError as error:
        print(f"Google's vocabulary cannot be had ({error}); training one on the sample", flush=True)
        return create_vocabulary(args, options)


@contextmanager
def stage_pool(stage: str, paths, args, folder: Path):
    """The pool for a stage that has work to do: clean up after a run that was killed, and say what this one takes."""
    remove_leftovers(folder / args.dataset, folder / "records")
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


def print_result(stage: str, record: dict, where: Path) -> None:
    """Say what a stage made, and what it left out."""
    print(f"{stage}: {describe_counts(record['counts'])} in {where}", flush=True)
    for line in record["skipped"]:
        print(f"  skipped {line}")


ACTIONS = {"estimate": estimate, "download": download, "text_formatting": text_formatting, "sharding": shard_text,
           "create_vocabulary": create_vocabulary, "create_hdf5_files": create_hdf5_files}
