"""Google's WordPiece vocabulary and config of BERT-Large, uncased, out of the archive of its weights."""

from pathlib import Path

from common.download import checksum
from common.errors import UserError
from common.remote_sources import Interrupted
from data.preparation import archives
from data.preparation.downloads import DownloadOptions, fetch_or_copy, mirrored

NAME = "uncased_L-24_H-1024_A-16"
ARCHIVE = f"https://storage.googleapis.com/bert_models/2018_10_18/{NAME}.zip"
FILES = ("vocab.txt", "bert_config.json")  # the rest of the archive is 1.2 GB of TensorFlow weights
VOCABULARY_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"


def download(folder: Path, options: DownloadOptions) -> tuple[list[Path], list[str]]:
    """Fetch the vocabulary to folder/NAME/vocab.txt, and the config beside it; the vocabulary is checked.

    Only these two files are read if the server answers range requests, else the whole archive is downloaded.
    """
    vocabulary = folder / NAME / "vocab.txt"
    if vocabulary.is_file() and checksum(vocabulary) == VOCABULARY_SHA256:
        return [vocabulary], []
    try:
        archives.unpack_remote(mirrored(ARCHIVE, options.mirrors), folder, [f"{NAME}/{name}" for name in FILES])
    except Interrupted:
        archives.unpack(fetch_or_copy(ARCHIVE, folder / f"{NAME}.zip", options), folder)
    found = checksum(vocabulary)
    if found != VOCABULARY_SHA256:
        vocabulary.unlink()
        raise UserError(f"{mirrored(ARCHIVE, options.mirrors)}: vocab.txt has sha256 {found}, expected "
                        f"{VOCABULARY_SHA256}")
    return [vocabulary], []
