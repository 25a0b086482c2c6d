"""Make an HDF5 shard of training samples from a text shard (one sentence a line, a blank line between documents).

    python3 create_pretraining_data.py --input_file shard.txt --output_file shard.hdf5 --vocab_file vocab.txt \\
        --max_seq_length 128 --max_predictions_per_seq 20

The procedure is that of Devlin et al. 2018.  A document is cut into pairs of segments; half the pairs get a random
second segment from another document (next_sentence_label 1).  15 % of the tokens are to be predicted: 80 % of these
become [MASK], 10 % a random word, and 10 % stay unchanged.  Each of --dupe_factor passes over the text gives different
pairs and masks.  With --dynamic_masking, samples are stored without masks, and training draws new ones in every epoch.
data/bertPrep.py --action create_hdf5_files does this for all shards of a data set.
"""

from common import cli
from common.download import local_file
from common.errors import UserError
from common.locks import file_lock
from data.preparation.samples import SampleOptions, add_sample_flags, create_shard
from data.tokenizer import load_vocabulary


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--input_file", required=True,
                        help="text shard: one sentence a line, a blank line between documents")
    parser.add_argument("--output_file", required=True, help="HDF5 shard to write")
    parser.add_argument("--vocab_file", required=True, help="WordPiece vocabulary, one token a line; a path or URL")
    add_sample_flags(parser)
    args = parser.parse_args(argv)
    options = cli.options_from(args, SampleOptions)
    tokens = load_vocabulary(local_file(args.vocab_file))
    try:
        with file_lock(args.output_file, f"--output_file {args.output_file}"):
            counts = create_shard(args.input_file, args.output_file, tokens, options)
    except OSError as error:
        raise UserError(f"--output_file {args.output_file}: cannot be written: {error.strerror}") from None
    print(f"{args.output_file}: {counts['samples']:,} samples of {counts['documents']:,} documents, "
          f"{counts['tokens']:,} tokens")


if __name__ == "__main__":
    cli.run(main)
