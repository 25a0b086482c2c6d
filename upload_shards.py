"""Upload a data set to object storage, or verify one that is there.

    python3 upload_shards.py --input_dir packed/phase1 --output_dir s3://bucket/packed/phase1
    python3 upload_shards.py --verify s3://bucket/packed/phase1

The upload takes the shards, the packer's metadata and an index (shard_index.json), by which a training that reads the
URL knows rows and checksums at once; it goes on where an interrupted one stopped.  --verify reads every byte there.
Exit code 0: no fault.  1: faults, a line each.  2: not possible, for example for lack of rights.
"""

import sys

from common import cli
from common.cli import format_bytes
from data.upload import upload_set, verify_set


def main(argv=None) -> int:
    args = parse_arguments(argv)
    if args.verify:
        return verify_url(args.verify, not args.disable_progress_bar)
    done = upload_set(args.input_dir, args.output_dir, args.overwrite, not args.disable_progress_bar)
    already = f", {done.skipped} were there" if done.skipped else ""
    print(f"{args.output_dir}: {done.files} shards of {format_bytes(done.nbytes)} uploaded{already}, and their index")
    return 0


def verify_url(url: str, show_progress: bool) -> int:
    shards, nbytes, faults = verify_set(url, show_progress)
    count = 0
    for fault in faults:
        count += 1
        print(fault, file=sys.stderr)
    print(f"{url}: {shards} shards, {format_bytes(nbytes)}: {f'{count} faults' if count else 'as in their index'}")
    return 1 if count else 0


def parse_arguments(argv):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--input_dir", help="folder of shards, packed or not")
    parser.add_argument("--output_dir", type=cli.path_or_s3, metavar="URL", help="s3://bucket/prefix to upload them to")
    parser.add_argument("--verify", type=cli.path_or_url, metavar="URL",
                        help="compare every byte there (s3:// or https://) with its index")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that are at the URL")
    parser.add_argument("--disable_progress_bar", action="store_true", help="print no progress bar")
    args = parser.parse_args(argv)
    if bool(args.verify) == bool(args.input_dir and args.output_dir):
        parser.error("give --input_dir and --output_dir, or --verify")
    if args.output_dir and not args.output_dir.startswith("s3://"):
        parser.error(f"--output_dir {args.output_dir}: not of the form s3://bucket/prefix")
    return args


if __name__ == "__main__":
    cli.run(main)
