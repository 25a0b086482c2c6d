"""Data preparation for BERT, stage by stage.  Every stage skips what is done and goes on where it was stopped.

    python3 data/bertPrep.py --action download            --dataset wikicorpus_en
    python3 data/bertPrep.py --action text_formatting     --dataset wikicorpus_en
    python3 data/bertPrep.py --action sharding            --dataset wikicorpus_en
    python3 data/bertPrep.py --action create_hdf5_files   --dataset wikicorpus_en --vocab_file vocab.txt \\
        --max_seq_length 128 --max_predictions_per_seq 20

Everything is kept below the folder that the environment variable BERT_PREP_WORKING_DIR names (default: data/).
create_datasets_from_start.sh runs the whole chain.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository's root, in place of data/

from common import cli  # noqa: E402
from data.preparation import stages  # noqa: E402
from data.preparation.datasets import DATASETS  # noqa: E402
from data.preparation.samples import SampleOptions, add_sample_flags  # noqa: E402
from data.preparation.sentences import METHODS  # noqa: E402


def parse(argv):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--action", required=True, choices=stages.ACTIONS, help="the stage to run")
    parser.add_argument("--dataset", required=True, choices=DATASETS, help="what to run it on")
    parser.add_argument("--input_files", nargs="+", default=[], metavar="FILE",
                        help="take these in place of what the stage before made: dumps or folders of books for "
                             "text_formatting, one-document-a-line files for sharding, text shards for "
                             "create_hdf5_files; for download of bookscorpus, a file of URLs or an archive")
    parser.add_argument("--n_processes", type=cli.positive_int, default=4,
                        help="worker processes; under mpirun … -m mpi4py.futures the ranks are the workers instead")
    group = parser.add_argument_group("download")
    group.add_argument("--dump_date", default="latest", metavar="YYYYMMDD", help="which dump of Wikipedia")
    group.add_argument("--mirror", nargs=2, action="append", default=[], metavar=("FROM", "TO"),
                       help="take every source that starts with FROM from TO, a URL, s3:// or a local path; also as "
                            "BERT_PREP_MIRRORS=\"FROM TO …\"; e.g. https://dumps.wikimedia.org /mnt/wikimedia")
    group = parser.add_argument_group("sharding")
    group.add_argument("--n_training_shards", type=cli.positive_int, help="default 256; 8 for the sample")
    group.add_argument("--n_test_shards", type=cli.positive_int, help="default 256; 2 for the sample")
    group.add_argument("--fraction_test_set", type=cli.proportion, default=0.1,
                       help="share of the sentences that is held out in the test shards")
    group.add_argument("--segmentation_method", choices=METHODS, default="punkt",
                       help="how documents are split into sentences: Punkt with a list of abbreviations, exactly "
                            "as NLTK does, or by other libraries (to be installed: pip install NAME)")
    group = parser.add_argument_group("vocabulary")
    group.add_argument("--vocab_file", help="WordPiece vocabulary; default: Google's, and for the sample, where that "
                                            "cannot be had, one trained on it")
    group.add_argument("--vocab_size", type=cli.positive_int, default=8192, help="tokens of a trained vocabulary")
    add_sample_flags(parser)
    group = parser.add_argument_group("text_formatting")
    group.add_argument("--skip_wikiextractor", type=cli.boolean, default=False, metavar="1|0",
                       help="read the <doc> files that wikiextractor wrote to extracted/DATASET/ (or --input_files) "
                            "in place of a dump")
    parser.add_argument("--interactive_json_config_generator", nargs="?", const=True,
                        help="accepted for old command lines, unused")
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
