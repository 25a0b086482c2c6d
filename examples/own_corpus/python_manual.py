"""Writes the reference manual that comes with Python as a .jsonl.gz file, a page a line: some text of one's own.

    python3 python_manual.py FILE.jsonl.gz
"""

import gzip
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from common import cli  # noqa: E402


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="the .jsonl.gz file to write")
    path = parser.parse_args(argv).file
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for title, page in sorted(topics.items()):
            file.write(json.dumps({"title": title, "text": unwrapped(page)}, ensure_ascii=False) + "\n")
    print(f"{path}: {len(topics)} pages of the manual of Python {sys.version.split()[0]}")


def unwrapped(page: str) -> str:
    """The page with a paragraph a line."""
    return "\n".join(" ".join(paragraph.split()) for paragraph in page.split("\n\n") if paragraph.strip())


if __name__ == "__main__":
    cli.run(main)
