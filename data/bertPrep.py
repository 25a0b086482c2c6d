"""Prepare data for BERT, one stage at a time.  A stage skips finished work, and continues after an interruption.

    python3 data/bertPrep.py --action download            --dataset wikicorpus_en
    python3 data/bertPrep.py --action text_formatting     --dataset wikicorpus_en
    python3 data/bertPrep.py --action sharding            --dataset wikicorpus_en
    python3 data/bertPrep.py --action create_hdf5_files   --dataset wikicorpus_en --vocab_file vocab.txt \\
        --max_seq_length 128 --max_predictions_per_seq 20

text_formatting writes one document a line, in UTF-8, with tabs between its paragraphs.  For your own text in that form,
start with --action sharding --dataset wikicorpus_en --input_files my_text.txt; --dataset then only names the folders.
All files are kept below the folder that the environment variable BERT_PREP_WORKING_DIR names (default: data/).
create_datasets_from_start.sh runs all stages.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository's root, in place of data/

from common import cli  # noqa: E402
from data.preparation import stages  # noqa: E402
from data.preparation.datasets import DATASETS, SAMPLE, Dataset  # noqa: E402
from data.preparation.samples import SampleOptions, add_sample_flags  # noqa: E402
from data.preparation.sentences import SPLITTERS  # noqa: E402


def parse(argv):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--action", required=True, choices=stages.ACTIONS, help="the stage to run")
    parser.add_argument("--dataset", required=True, choices=DATASETS, help="the data set to run it on")
    parser.add_argument("--input_files", nargs="+", default=[], metavar="FILE",
                        help="read these instead of the output of the stage before: dumps or .txt books for "
                             "text_formatting; files of one document a line, tabs between its paragraphs, for "
                             "sharding; text shards for create_vocabulary and create_hdf5_files; files of URLs or "
                             "archives for download of bookscorpus.  Commas may separate them; patterns and folders "
                             "of .txt files are taken too")
    parser.add_argument("--n_processes", type=cli.positive_int, default=4,
                        help="worker processes; with mpirun … python3 -m mpi4py.futures data/bertPrep.py … the ranks "
                             "are the workers instead")
    group = parser.add_argument_group("download")
    group.add_argument("--dump_date", default="latest", metavar="YYYYMMDD", help="date of the Wikipedia dump")
    group.add_argument("--mirror", nargs=2, action="append", default=[], metavar=("FROM", "TO"),
                       help="download what starts with FROM from TO instead: a URL, s3:// or a local path, e.g. "
                            "https://dumps.wikimedia.org /mnt/wikimedia; the environment variable "
                            "BERT_PREP_MIRRORS=\"FROM TO …\" does the same")
    group = parser.add_argument_group("text_formatting")
    group.add_argument("--skip_wikiextractor", **cli.BOOLEAN, default=False,
                       help="read the <doc> files that wikiextractor has written to extracted/DATASET/ (or those of "
                            "--input_files) instead of a dump")
    group = parser.add_argument_group("sharding")
    group.add_argument("--n_training_shards", type=cli.positive_int,
                       help=f"default: {Dataset.training_shards}, or {SAMPLE.training_shards} for the sample")
    group.add_argument("--n_test_shards", type=cli.positive_int,
                       help=f"default: {Dataset.test_shards}, or {SAMPLE.test_shards} for the sample")
    group.add_argument("--fraction_test_set", type=cli.proportion, default=0.1,
                       help="proportion of the sentences that go to the test shards, held out from training")
    group.add_argument("--segmentation_method", choices=SPLITTERS, default="punkt",
                       help="how documents are split into sentences: punkt is NLTK's English model with more "
                            "abbreviations, nltk gives exactly NLTK's sentences; the others need pip install NAME")
    group = parser.add_argument_group("vocabulary")
    group.add_argument("--vocab_file", help="WordPiece vocabulary, a path or URL; default: the one that "
                                            "create_vocabulary trained on the data set, else Google's (uncased); if "
                                            "that cannot be downloaded for the sample, one is trained on it")
    group.add_argument("--vocab_size", type=cli.positive_int, default=8192,
                       help="number of tokens that create_vocabulary trains")
    add_sample_flags(parser)
    parser.add_argument("--interactive_json_config_generator", nargs="?", const=True,
                        help="accepted for old command lines; has no effect")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse(argv)
    dataset = DATASETS[args.dataset]
    options = cli.options_from(
        args, stages.StageOptions, dataset=dataset, samples=cli.options_from(args, SampleOptions),
        n_training_shards=args.n_training_shards or dataset.training_shards,
        n_test_shards=args.n_test_shards or dataset.test_shards)
    with cli.sigterm_as_interrupt():
        stages.run_stage(args.action, options)


if __name__ == "__main__":
    cli.run(main)
