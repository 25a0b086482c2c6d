"""Prepare data for BERT, one stage at a time.  A stage skips finished work, and continues after an interruption.

    python3 data/bertPrep.py --action download            --dataset wikicorpus_en
    python3 data/bertPrep.py --action text_formatting     --dataset wikicorpus_en
    python3 data/bertPrep.py --action sharding            --dataset wikicorpus_en
    python3 data/bertPrep.py --action create_hdf5_files   --dataset wikicorpus_en --vocab_file vocab.txt \\
        --max_seq_length 128 --max_predictions_per_seq 20

Your own text: any other name for --dataset, and its files for --input_files of text_formatting (.txt, .jsonl, .csv,
.tsv, .parquet; each also .gz, .bz2, .xz, .zst; folders, patterns, s3:// and https:// names).  A text of one document a
line, with tabs between its paragraphs, is what text_formatting writes: start with sharding --input_files my_text.txt.
All files are kept below the folder that the environment variable BERT_PREP_WORKING_DIR names (default: data/).
create_datasets_from_start.sh runs all stages.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository's root, in place of data/

from common import cli  # noqa: E402
from data.preparation import stages  # noqa: E402
from data.preparation.corpus import CorpusOptions  # noqa: E402
from data.preparation.datasets import NAMES, SAMPLE, Dataset, dataset_named  # noqa: E402
from data.preparation.document_filters import DEDUPLICATED, EXACT, DocumentFilters  # noqa: E402
from data.preparation.formats import FORMATS  # noqa: E402
from data.preparation.samples import SampleOptions, add_sample_flags  # noqa: E402
from data.preparation.sentences import SPLITTERS  # noqa: E402


def part(text: str) -> tuple[int, int]:
    """The value of --part: "2/16" as (2, 16)."""
    first, _, last = text.partition("/")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N, whole numbers with 1 <= K <= N")
    return int(first), int(last)


def parse(argv):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--action", required=True, choices=stages.ACTIONS, help="the stage to run")
    parser.add_argument("--dataset", required=True, help=f"{NAMES}; or a name for your own text")
    parser.add_argument("--input_files", type=cli.path_or_url, nargs="+", default=[], metavar="FILE",
                        help="read these instead of the output of the stage before: dumps, .txt books or your own text "
                             "for text_formatting; files of one document a line, tabs between its paragraphs, for "
                             "sharding; text shards for create_vocabulary and create_hdf5_files; files of URLs or "
                             "archives for download of bookscorpus.  Commas may separate them; patterns, folders "
                             "and s3:// prefixes that end in / are taken too")
    parser.add_argument("--n_processes", type=cli.positive_int, default=4,
                        help="worker processes; with mpirun … python3 -m mpi4py.futures data/bertPrep.py … the ranks "
                             "are the workers instead")
    group = parser.add_argument_group("download")
    group.add_argument("--dump_date", default="latest", metavar="YYYYMMDD", help="date of the Wikipedia dump")
    group.add_argument("--mirror", type=cli.free_text, nargs=2, action="append", default=[], metavar=("FROM", "TO"),
                       help="download what starts with FROM from TO instead: a URL, s3:// or a local path, e.g. "
                            "https://dumps.wikimedia.org /mnt/wikimedia; the environment variable "
                            "BERT_PREP_MIRRORS=\"FROM TO …\" does the same")
    group = parser.add_argument_group("text_formatting")
    group.add_argument("--skip_wikiextractor", **cli.BOOLEAN, default=False,
                       help="read the <doc> files that wikiextractor has written to extracted/DATASET/ (or those of "
                            "--input_files) instead of a dump")
    group.add_argument("--input_format", choices=FORMATS, help="of your own text; default: by the files' endings")
    group.add_argument("--text_field", default="text", metavar="NAME",
                       help="field of .jsonl, or column of .csv, .tsv and .parquet, that holds the text")
    group.add_argument("--deduplicate", nargs="?", const=EXACT, choices=DEDUPLICATED,
                       help="drop documents that occurred before: exact (without a value), but for case and white "
                            "space; near: also those that share 80 %% of their runs of three words with one, listed "
                            "beside the text, which takes up to 0.8 kB of memory for each document kept (exact: 8 "
                            "bytes) and needs pip install datasketch")
    group.add_argument("--min_words", type=cli.positive_int, default=0, metavar="N",
                       help="drop documents of fewer words (separated by spaces)")
    group.add_argument("--min_letters", type=cli.proportion, default=0.0, metavar="SHARE",
                       help="drop documents with a smaller share of letters among their visible characters")
    group = parser.add_argument_group("sharding")
    group.add_argument("--n_training_shards", type=cli.positive_int,
                       help=f"default: {Dataset.training_shards} for wikicorpus_en and books, {SAMPLE.training_shards} "
                            "for the sample, else by the size of the text, and in later stages as many as were made")
    group.add_argument("--n_test_shards", type=cli.positive_int,
                       help=f"the same; {Dataset.test_shards} and {SAMPLE.test_shards}")
    group.add_argument("--fraction_test_set", type=cli.proportion, default=0.1,
                       help="proportion of the sentences that go to the test shards, held out from training")
    group.add_argument("--language", metavar="XX",
                       help="code of the text's language, for its sentences; default: that of wikicorpus_XX, else en")
    group.add_argument("--segmentation_method", choices=SPLITTERS,
                       help="how documents are split into sentences: punkt is NLTK's model of the language with more "
                            "abbreviations, nltk gives exactly NLTK's sentences, rule knows no language; nupunkt needs "
                            "pip install nupunkt; default: the first of punkt, sentencex and rule that knows the "
                            "language")
    group = parser.add_argument_group("vocabulary")
    group.add_argument("--vocab_file", type=cli.path_or_url,
                       help="WordPiece vocabulary: path, URL or Hugging Face folder; default: the one that "
                            "create_vocabulary made for the data set, else Google's (uncased); if that cannot be "
                            "downloaded for the sample, one is trained on it")
    group.add_argument("--vocab_size", type=cli.positive_int, default=8192,
                       help="number of tokens that create_vocabulary trains")
    group.add_argument("--unused_tokens", type=cli.positive_int, default=0, metavar="N",
                       help="of them, tokens [unused0] … that no text has, to give a meaning to later")
    group.add_argument("--extend_vocab", type=cli.path_or_url, metavar="FILE",
                       help="a domain's words, one a line: create_vocabulary puts them into the [unusedN] places of "
                            "--vocab_file (default: Google's) and behind it, instead of training one; the training "
                            "makes rows for them in the model of --init_checkpoint")
    group = parser.add_argument_group("create_hdf5_files")
    group.add_argument("--part", type=part, default=(1, 1), metavar="K/N",
                       help="make the shards of every Nth text shard only, from the Kth on: N calls, such as the tasks "
                            "of a job array, share the work (1/N to N/N)")
    add_sample_flags(parser)
    parser.add_argument("--upload_to", type=cli.path_or_s3, metavar="URL", help="create_hdf5_files: also upload the "
                        "shards, with their index, to this s3:// prefix")
    parser.add_argument("--interactive_json_config_generator", nargs="?", const=True,
                        help="accepted for old command lines; has no effect")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse(argv)
    options = cli.options_from(
        args, stages.StageOptions, dataset=dataset_named(args.dataset, cli.options_from(args, CorpusOptions)),
        samples=cli.options_from(args, SampleOptions), filters=cli.options_from(args, DocumentFilters))
    with cli.sigterm_as_interrupt():
        stages.run_stage(args.action, options)


if __name__ == "__main__":
    cli.run(main)
