"""Make an HDF5 shard of training samples from a text shard (one sentence a line, a blank line between documents).

    python3 create_pretraining_data.py --input_file shard.txt --output_file shard.hdf5 --vocab_file vocab.txt \\
        --max_seq_length 128

The procedure is that of Devlin et al. 2018.  A document is cut into pairs of segments; half the pairs get a random
second segment from another document (next_sentence_label 1).  15 % of the tokens are to be predicted: 80 % of these
become [MASK], 10 % a random word, and 10 % stay unchanged.  Each of --dupe_factor passes over the text gives different
pairs and masks.  With --dynamic_masking, samples are stored without masks, and training draws new ones in every epoch.
With --whole_word_mask all pieces of a word are predicted or none; with --no_nsp there is no second segment: a sample
holds full sentences.
data/bertPrep.py --action create_hdf5_files does this for all shards of a data set.
"""

import sys
from contextlib import nullcontext

from common import cli
from common.download import local_file
from common.errors import UserError
from common.locks import file_lock
from common.object_locks import object_lock
from common.object_store import is_s3, staged_file
from data.preparation.named_files import named_files
from data.preparation.samples import SampleOptions, add_sample_flags, create_shard
from data.preparation.text_counts import TextCounts
from data.tokenizer import load_vocabulary
from data.vocabulary import check_case

# of google-research/bert and of NVIDIA's copy of it; the defaults here are those of bertPrep.py
REFERENCE_DEFAULTS = {"max_seq_length": 128, "max_predictions_per_seq": 20, "dupe_factor": 10}


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--input_file", "--input_files", type=cli.path_or_url, required=True, nargs="+", metavar="FILE",
                        help="text shards, which make one HDF5 shard: one sentence a line, a blank line between "
                             "documents; several names (also separated by commas), patterns, folders of .txt files")
    parser.add_argument("--output_file", type=cli.path_or_s3, required=True, help="HDF5 shard (or s3:// object) to "
                        "write")
    parser.add_argument("--vocab_file", type=cli.path_or_url, required=True,
                        help="WordPiece vocabulary, one token a line; a path or URL")
    add_sample_flags(parser)
    args = parser.parse_args(argv)
    options = cli.options_from(args, SampleOptions)
    for line in other_defaults(sys.argv[1:] if argv is None else argv, options):
        print(line)
    if limit := options.limit_warning():
        print(f"warning: {limit}")
    first, *others = named_files(args.input_file, "*.txt", "--input_file")
    tokens = load_vocabulary(local_file(args.vocab_file))
    check_case(tokens, options.do_lower_case, f"--vocab_file {args.vocab_file}")
    remote = is_s3(args.output_file)
    try:
        with ((object_lock if remote else file_lock)(args.output_file, f"--output_file {args.output_file}"),
              staged_file(args.output_file) if remote else nullcontext(args.output_file) as path):
            counts = create_shard(first, path, tokens, options, tuple(others))
    except OSError as error:
        raise UserError(f"--output_file {args.output_file}: cannot be written: {error.strerror}") from None
    counts = TextCounts(**counts)
    print(f"{args.output_file}: {counts.samples:,} samples of {counts.documents:,} documents, {counts.tokens:,} tokens")
    print(f"text: {counts.description}")
    for line in counts.warnings():
        print(f"warning: {line}")


def other_defaults(words: list[str], options: SampleOptions) -> list[str]:
    """A line for each flag that is not among the words and has another value here than in the reference's command."""
    typed = {cli.with_underscores(str(word)).partition("=")[0] for word in words}
    untyped = [(flag, getattr(options, flag), there) for flag, there in REFERENCE_DEFAULTS.items()
               if f"--{flag}" not in typed]
    return [f"--{flag} is not given: {here} here, {there} in the reference's create_pretraining_data.py"
            for flag, here, there in untyped if here != there]


if __name__ == "__main__":
    cli.run(main)
