"""What is downloaded for each data set, and from where."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cli import UserError
from data import records
from file_utils import replacing

SAMPLE_PACKAGE = "gensim==4.4.0"
SAMPLE_MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SAMPLE_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
SAMPLE_FILE = "enwiki-sample-pages-articles.xml.bz2"


def download_sample(folder: Path) -> Path:
    """106 articles of English Wikipedia, out of the test data in the wheel of gensim (only the file is kept)."""
    target = folder / "wikicorpus_en_sample" / SAMPLE_FILE
    if target.is_file() and records.fingerprint(target)["sha256"] == SAMPLE_SHA256:
        return target
    with tempfile.TemporaryDirectory() as scratch:
        take_member(pip_download(SAMPLE_PACKAGE, scratch), SAMPLE_MEMBER, target, SAMPLE_SHA256)
    return target


def pip_download(package: str, folder: str) -> Path:
    """Fetch the wheel of a package with pip, without its dependencies; nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder,
               "--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--implementation", "cp",
               "--disable-pip-version-check", "--quiet", package]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(Path(folder).glob("*.whl"))
    if outcome.returncode or len(wheels) != 1:
        raise UserError(f"pip could not download {package}: {outcome.stderr.strip().splitlines()[-1:]}")
    return wheels[0]


def take_member(archive: Path, member: str, target: Path, sha256: str) -> None:
    """Copy one file out of a zip archive and verify it before it gets its name."""
    with replacing(target) as temporary:
        with zipfile.ZipFile(archive) as file:
            temporary.write_bytes(file.read(member))
        found = records.fingerprint(temporary)["sha256"]
        if found != sha256:
            raise UserError(f"{member} of {archive.name} has sha256 {found}, expected {sha256}")


def google_vocabulary(folder: Path) -> Path | None:
    """The vocabulary of Google's BERT, where it was downloaded."""
    path = folder / "google_pretrained_weights" / "uncased_L-24_H-1024_A-16" / "vocab.txt"
    return path if path.is_file() else None
