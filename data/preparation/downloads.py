"""What is downloaded for each data set, from where, and how it is verified.

Every source can be taken from somewhere else: --mirror FROM TO (or BERT_PREP_MIRRORS="FROM TO …") replaces FROM at the
start of a source by TO, a URL, s3://… or a local path.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from common.download import TRIES, checksum, fetch, is_remote
from common.errors import UserError
from common.files import replacing
from common.remote_sources import Interrupted
from data.preparation import archives

MIRRORS_VARIABLE = "BERT_PREP_MIRRORS"

DUMPS = "https://dumps.wikimedia.org/enwiki"
DUMP_ENDING = "-pages-articles-multistream.xml.bz2"  # many bzip2 streams, which workers decompress side by side

GOOGLE_NAME = "uncased_L-24_H-1024_A-16"
GOOGLE_ARCHIVE = f"https://storage.googleapis.com/bert_models/2018_10_18/{GOOGLE_NAME}.zip"
GOOGLE_FILES = ("vocab.txt", "bert_config.json")  # the rest of the archive is 1.2 GB of TensorFlow weights
GOOGLE_VOCABULARY_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"

SAMPLE_WHEEL = "pip:gensim==4.4.0"
SAMPLE_MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SAMPLE_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
SAMPLE_FILE = "enwiki-sample-pages-articles.xml.bz2"


def mirror_pairs(flag) -> list[tuple[str, str]]:
    """(FROM, TO) pairs: those of --mirror first, then those of the environment variable."""
    words = os.environ.get(MIRRORS_VARIABLE, "").split()
    if len(words) % 2:
        raise UserError(f"{MIRRORS_VARIABLE}: {len(words)} words, expected pairs of FROM and TO")
    return [*map(tuple, flag), *zip(words[::2], words[1::2], strict=True)]


def mirrored(source: str, mirrors) -> str:
    """Where a source is fetched from: FROM at its start is replaced by TO, for the first pair that fits."""
    for original, other in mirrors:
        if source.startswith(original):
            return other + source[len(original):]
    return source


def fetch_or_copy(source: str, target: Path, mirrors, tries: int = TRIES, **checksums) -> Path:
    """Fetch a source, or copy it where it is a local file, to `target`, verified."""
    origin = mirrored(source, mirrors)
    if is_remote(origin):
        return fetch(origin, target, tries=tries, **checksums)
    if not Path(origin).is_file():
        raise UserError(f"{origin}: no such file (in place of {source})")
    with replacing(target) as temporary:
        shutil.copyfile(origin, temporary)
        for name, expected in checksums.items():
            if checksum(temporary, name) != expected:
                raise UserError(f"{origin}: {name} is {checksum(temporary, name)}, expected {expected}")
    return target


def wikipedia_dump(folder: Path, date: str, mirrors) -> Path:
    """English Wikipedia's dump of a date (YYYYMMDD), or the newest.

    Wikimedia's list of checksums says which dump the newest is; once it is here, it stays the newest, so that an
    interrupted download goes on with the same dump.  Delete the list, or name a date, for another.
    """
    sums = folder / f"enwiki-{date}-sha1sums.txt"
    if not sums.is_file():
        fetch_or_copy(f"{DUMPS}/{date}/{sums.name}", sums, mirrors)
    for line in sums.read_text().splitlines():
        sha1, _, name = line.partition("  ")
        if name.startswith("enwiki-") and name.endswith(DUMP_ENDING):
            source = f"{DUMPS}/{name.split('-')[1]}/{name}"
            return fetch_or_copy(source, folder / name, mirrors, sha1=sha1)
    raise UserError(f"{sums}: no …{DUMP_ENDING} in it; that dump is not finished (--dump_date names another)")


def google_vocabulary(folder: Path) -> Path:
    return folder / GOOGLE_NAME / "vocab.txt"


def google_weights(folder: Path, mirrors, tries: int = TRIES) -> Path:
    """Google's vocabulary and config, out of the archive of its weights; returns the vocabulary.

    Only these two files are read where the server answers ranges, else the whole archive is fetched.
    """
    vocabulary = google_vocabulary(folder)
    if vocabulary.is_file() and checksum(vocabulary) == GOOGLE_VOCABULARY_SHA256:
        return vocabulary
    origin = mirrored(GOOGLE_ARCHIVE, mirrors)
    try:
        archives.unpack_remote(origin, folder, [f"{GOOGLE_NAME}/{name}" for name in GOOGLE_FILES])
    except Interrupted:
        archives.unpack(fetch_or_copy(GOOGLE_ARCHIVE, folder / f"{GOOGLE_NAME}.zip", mirrors, tries), folder)
    found = checksum(vocabulary)
    if found != GOOGLE_VOCABULARY_SHA256:
        vocabulary.unlink()
        raise UserError(f"{origin}: vocab.txt has sha256 {found}, expected {GOOGLE_VOCABULARY_SHA256}")
    return vocabulary


def sample(folder: Path, mirrors) -> Path:
    """106 articles of English Wikipedia, out of the test data in the wheel of gensim; only that file is kept."""
    target = folder / SAMPLE_FILE
    if target.is_file() and checksum(target) == SAMPLE_SHA256:
        return target
    origin = mirrored(SAMPLE_WHEEL, mirrors)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = pip_download(origin.removeprefix("pip:"), scratch) if origin.startswith("pip:") \
            else fetch_or_copy(SAMPLE_WHEEL, Path(scratch) / "gensim.whl", mirrors)
        file, = archives.unpack(wheel, scratch, [SAMPLE_MEMBER])
        return fetch_or_copy(str(file), target, [], sha256=SAMPLE_SHA256)


def pip_download(package: str, folder: str) -> Path:
    """Fetch the wheel of a package with pip, without its dependencies; nothing is installed.

    The wheel is named by platform and version of Python, so that it is the same one wherever this runs.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder,
               "--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--implementation", "cp",
               "--disable-pip-version-check", "--quiet", "--timeout", "15", "--retries", "2", package]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(Path(folder).glob("*.whl"))
    if outcome.returncode or len(wheels) != 1:
        reason = (outcome.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"pip could not download {package}: {reason}")
    return wheels[0]


def books(folder: Path, lists: list[Path], threads: int, mirrors) -> tuple[list[Path], list[str]]:
    """The books of archives and of files of URLs, one URL a line; returns them, and what failed and why."""
    found, urls = [], []
    for path in lists:
        if path.suffix in archives.ENDINGS:
            found += [book for book in archives.unpack(path, folder) if book.suffix == ".txt"]
        else:
            urls += [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    failed = []
    with ThreadPoolExecutor(threads) as pool:
        tasks = [pool.submit(one_book, folder, number, url, mirrors) for number, url in enumerate(urls)]
        for task in tqdm(tasks, unit="book", desc="download"):
            try:
                found.append(task.result())
            except UserError as error:
                failed.append(str(error))
    return found, failed


def one_book(folder: Path, number: int, url: str, mirrors) -> Path:
    """Fetch one book; its number in the list makes its name unique."""
    name = unquote(PurePosixPath(urlsplit(url).path).stem).replace("/", "_") or "book"
    return fetch_or_copy(url, folder / f"{number:06d}_{name}.txt", mirrors, tries=3)
