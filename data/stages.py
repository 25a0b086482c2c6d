"""The stages of data preparation: what each reads, what it writes, and when there is nothing left to do.

download → text_formatting → sharding → (create_vocabulary) → create_hdf5_files
"""

from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from cli import UserError
from create_pretraining_data import create_shard
from data import downloads, formatting, layout, records, sharding, vocabulary, wikipedia
from data.formatting import describe
from data.pool import open_pool, ordered_map
from file_utils import remove_leftovers

SAMPLE = "wikicorpus_en_sample"
DATASETS = ("wikicorpus_en", "bookscorpus", "books_wiki_en_corpus", "google_pretrained_weights", SAMPLE)
DEFAULT_SHARDS = {SAMPLE: (8, 2)}  # training and test; 256 each for the others


def run(args, options) -> None:
    """Run the stage that --action names.  `options`: the SampleOptions of create_hdf5_files."""
    ACTIONS[args.action](args, options)


def download(args, _) -> None:
    print(f"download: {downloads.download_sample(layout.download_folder())}")


def text_formatting(args, _) -> None:
    folder, dataset = layout.formatted_folder(), args.dataset
    dumps = input_files(args, layout.download_folder() / dataset, "*pages-articles*.xml*", "download")
    inputs = records.fingerprints(dumps)
    record = records.done(folder, dataset, inputs, formatting.OPTIONS)
    if not record:
        remove_leftovers(folder / dataset)
        with open_pool(args.n_processes) as pool, position_bar(dumps, "text_formatting") as advance:
            batches = ((batch,) for path in dumps for batch in wikipedia.page_batches(path, advance))
            record = formatting.format_documents(folder, dataset, batches, wikipedia.extract_articles, inputs, pool)
    report("text_formatting", record, folder / dataset)


def shard_text(args, _) -> None:
    folder, dataset = sharded_folder(args), args.dataset
    texts = input_files(args, layout.formatted_folder() / dataset, "part_*.txt", "text_formatting")
    training_shards, test_shards = shard_counts(args)
    options = {"training_shards": training_shards, "test_shards": test_shards,
               "fraction_test_set": args.fraction_test_set, "segmentation_method": args.segmentation_method}
    inputs = records.fingerprints(texts)
    record = records.done(folder, dataset, inputs, options)
    if not record:
        remove_leftovers(folder / dataset)
        with open_pool(args.n_processes) as pool:
            record = sharding.shard_documents(folder, dataset, texts, inputs, options, pool)
    report("sharding", record, folder / dataset)


def create_vocabulary(args, options) -> Path:
    """Train a vocabulary on the training shards of a data set.  Returns its file."""
    path = layout.vocabulary_file(args.dataset)
    folder, name = path.parent.parent, f"{args.dataset}/{path.name}"
    texts = input_files(args, sharded_folder(args) / args.dataset, "*_training_*.txt", "sharding")
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
    texts = input_files(args, sharded_folder(args) / dataset, f"{dataset}_*.txt", "sharding")
    vocab_file = find_vocabulary(args, options)
    tokens = vocabulary.read(vocab_file)
    inputs = {text: records.fingerprints([text]) | {"vocabulary": records.fingerprint(vocab_file)} for text in texts}
    names = {text: f"{dataset}/{text.stem}.hdf5" for text in texts}
    finished = {text: records.done(folder, names[text], inputs[text], asdict(options)) for text in texts}
    todo = [text for text in texts if not finished[text]]
    remove_leftovers(folder / dataset)
    with open_pool(args.n_processes) as pool, tqdm(total=len(todo), unit="shard", desc="create_hdf5_files") as bar:
        results = ordered_map(pool, create_shard, ((text, folder / names[text], tokens, options) for text in todo))
        for text, counts in zip(todo, results, strict=True):
            outputs = {names[text]: {}}
            finished[text] = records.write(folder, names[text], inputs[text], asdict(options), outputs, counts)
            bar.update()
    totals = sum((Counter(record["counts"]) for record in finished.values()), Counter())
    report("create_hdf5_files", {"counts": totals | {"shards": len(texts)}}, folder / dataset)


def find_vocabulary(args, options) -> Path:
    """--vocab_file, else Google's vocabulary, else, for the sample alone, one trained on it."""
    if args.vocab_file:
        return Path(args.vocab_file)
    google = downloads.google_vocabulary(layout.download_folder())
    if google:
        return google
    if args.dataset != SAMPLE:
        raise UserError("no vocabulary: give --vocab_file, or run --action download --dataset "
                        "google_pretrained_weights for Google's, or --action create_vocabulary to train one")
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
    return paths


def shard_counts(args) -> tuple[int, int]:
    """Training and test shards, as asked for or by default."""
    training, test = DEFAULT_SHARDS.get(args.dataset, (256, 256))
    return args.n_training_shards or training, args.n_test_shards or test


def sharded_folder(args) -> Path:
    return layout.sharded_folder(*shard_counts(args), args.fraction_test_set)


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
           "create_vocabulary": create_vocabulary, "create_hdf5_files": create_hdf5_files}
