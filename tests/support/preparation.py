"""What the tests of data preparation share: the commands as a user types them, tiny corpora, the sample."""

import bz2
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from xml.sax.saxutils import escape

from data.tokenizer import SPECIAL_TOKENS, save_vocabulary

ROOT = Path(__file__).resolve().parent.parent.parent
SAMPLE = "wikicorpus_en_sample"
STAGES = (("text_formatting",), ("sharding",), ("create_hdf5_files", "--max_seq_length", 128))  # after download
WORDS = ["the", "sea", "is", "deep", "and", "old", "ships", "sail", "far", "out", "over", "gulls", "cry", "wind"]
LETTERS = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]


def command(action: str, *flags, dataset: str = SAMPLE) -> list[str]:
    """bertPrep.py as a user types it, from the root of the repository."""
    return [sys.executable, "data/bertPrep.py", "--action", action, "--dataset", dataset, *map(str, flags)]


def prepare(folder, action: str, *flags, dataset: str = SAMPLE, status: int = 0, **environment) -> str:
    """Run a stage in a working folder; returns what it printed, errors included."""
    outcome = subprocess.run(command(action, *flags, dataset=dataset), cwd=ROOT, capture_output=True, text=True,
                             env=os.environ | {"BERT_PREP_WORKING_DIR": str(folder)} | environment, check=False)
    printed = outcome.stdout + outcome.stderr
    assert outcome.returncode == status, printed
    assert "Traceback" not in printed, printed
    return printed


def files_below(folder) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its bytes."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def formatted(work: Path, dataset: str) -> list[str]:
    """The documents that text_formatting made, one a line."""
    return [line for path in sorted(work.glob(f"formatted_*/{dataset}/part_*.txt"))
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def sentences(count: int, seed: int = 0) -> list[str]:
    random = Random(seed)
    return [" ".join(random.choices(WORDS, k=random.randint(3, 12))).capitalize() + "." for _ in range(count)]


def write_vocabulary(path) -> Path:
    save_vocabulary(path, [*SPECIAL_TOKENS, ".", *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS])
    return Path(path)


def write_documents(path, sizes, seed: int = 0) -> Path:
    """A file of one document a line, with so many sentences each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(" ".join(sentences(size, seed + number)) + "\n" for number, size in enumerate(sizes)))
    return path


def page(title: str, text, namespace: int = 0, redirect: bool = False) -> bytes:
    """A page of a MediaWiki XML dump."""
    body = text if isinstance(text, bytes) else escape(text).encode()
    return (f"  <page>\n    <title>{title}</title>\n    <ns>{namespace}</ns>\n    <id>1</id>\n".encode()
            + (b'    <redirect title="Other" />\n' if redirect else b"")
            + b'    <revision>\n      <text bytes="9" xml:space="preserve">' + body
            + b"</text>\n    </revision>\n  </page>\n")


def write_dump(path, pages) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bz2.compress(b"<mediawiki>\n  <siteinfo></siteinfo>\n" + b"".join(pages) + b"</mediawiki>\n"))
    return path


def text_shards(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"sharded_*/{SAMPLE}/*.txt"))
