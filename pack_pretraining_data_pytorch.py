"""Pack several sequences into each row of a pre-training data set, so that hardly any of a row is padding.

    python3 pack_pretraining_data_pytorch.py --input_dir hdf5_lower_case_1_seq_len_128/books_wiki_en_corpus \\
        --output_dir packed/phase1 --max_sequence_length 128 --max_predictions_per_sequence 20

Writes packed/phase1/mixed_strategies_part_N.hdf5 and packed/phase1_metadata.json.  Every sequence of the input
is in exactly one row of the output.  run_pretraining.py takes the folder as its --input_dir, and what --split test
packs as its --eval_dir.
"""

import os

from common import cli
from data.packing.methods import METHODS
from data.packing.output import PART_NAMES
from data.packing.packer import PackingOptions, pack


def parse_options(argv) -> PackingOptions:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--input_dir", type=cli.path_or_url, required=True,
                        help="folder of unpacked HDF5 shards: those with the --split in the name")
    parser.add_argument("--split", choices=PART_NAMES, default="training", help="test: pack the held-out shards, for "
                        "--eval_dir; they need an --output_dir of their own")
    parser.add_argument("--output_dir", type=cli.path_or_s3, required=True, help="folder (or s3:// prefix) for the "
                        "packed shards; NAME_metadata.json is written beside it")
    parser.add_argument("--max_sequence_length", type=cli.positive_int, required=True,
                        help="tokens in a row, packed or not")
    parser.add_argument("--max_predictions_per_sequence", type=cli.positive_int,
                        help="a packed row has room for this many masked tokens plus "
                             "--max_sequences_per_pack (default: as many as a row of the input has)")
    parser.add_argument("--max_sequences_per_pack", type=cli.positive_int, default=3,
                        help="maximum number of sequences in a row")
    parser.add_argument("--packing_method", choices=METHODS, default=next(iter(METHODS)),
                        help="how sequences are combined into rows. "
                             + "; ".join(f"{method.name}: {method.help}" for method in METHODS.values()))
    parser.add_argument("--seed", type=cli.whole, default=42,
                        help="random seed for the order of the rows and for which sequences share one")
    parser.add_argument("--n_processes", type=cli.positive_int, default=min(4, os.cpu_count() or 1),
                        help="number of processes, each with less than 1 GB of memory; it does not affect the result")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace existing packed data in --output_dir, once the new set is complete")
    parser.add_argument("--plot", metavar="FILE.png",
                        help="plot the sequence lengths, how full the rows are, and the sequences per row")
    parser.add_argument("--disable_progress_bar", action="store_true", help="print no progress bars")
    for flag in ("--train_batch_size", "--local_rank"):
        parser.add_argument(flag, type=cli.whole, help="accepted for old command lines; has no effect")
    args = parser.parse_args(argv)
    method = METHODS[args.packing_method]
    if args.max_sequences_per_pack > method.max_depth:
        parser.error(f"--packing_method {method.name} packs at most {method.max_depth} sequences a row, "
                     f"--max_sequences_per_pack is {args.max_sequences_per_pack}: choose another method")
    return cli.options_from(args, PackingOptions)


def main(argv=None) -> None:
    options = parse_options(argv)
    with cli.sigterm_as_interrupt():
        figures = pack(options)
    print(f"{figures['original_number_of_samples']:,} sequences in {figures['new_number_of_samples']:,} rows "
          f"(no packing has fewer than {figures['lower_bound_of_samples']:,}): "
          f"{figures['packing_efficiency']:.3%} real tokens, {figures['avg_seq_per_sample']:.3f} sequences a row, "
          f"in {options.output_dir}")


if __name__ == "__main__":
    cli.run(main)
