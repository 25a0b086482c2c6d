"""What a stage made from what, in a small JSON beside its files: that is how work already done is recognised.

A record holds the inputs (size and SHA-256 of each), the options, the outputs (name, size and counts), the totals, and
what was skipped for what reason.
Files and options decide, never dates, so a folder that was copied elsewhere is still recognised, and records of equal
runs are equal.  A record is written last: a stage without one starts over.
"""

import hashlib
import json
from pathlib import Path

from common.download import checksum
from common.files import write_json


def fingerprint(path) -> dict:
    """{"size": bytes, "sha256": hex} of a file."""
    return {"size": Path(path).stat().st_size, "sha256": checksum(path)}


def combined_fingerprint(paths) -> dict:
    """One fingerprint of many files, names included, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{key(path)} {fingerprint(path)}\n".encode())
    return {"files": len(paths), "sha256": digest.hexdigest()}


def fingerprints(paths) -> dict:
    """The fingerprint of each file, under its key."""
    return {key(path): fingerprint(path) for path in paths}


def key(path) -> str:
    """FOLDER/NAME: tells the parts of two data sets apart, and stays the same where all was copied elsewhere."""
    path = Path(path).absolute()
    return f"{path.parent.name}/{path.name}"


def path_for(folder, name: str) -> Path:
    """The record of `name` among the files of a stage's folder."""
    return Path(folder) / "records" / f"{name}.json"


def read(folder, name: str) -> dict | None:
    """The record, or None where there is none or it cannot be read (then the work is done again)."""
    try:
        return json.loads(path_for(folder, name).read_text())
    except (FileNotFoundError, ValueError):
        return None


def done(folder, name: str, inputs: dict, options: dict) -> dict | None:
    """The record, where it tells of the same inputs and options and every output is still there with its size."""
    record = read(folder, name)
    if record is None or record["inputs"] != inputs or record["options"] != options:
        return None
    for output, facts in record["outputs"].items():
        path = Path(folder) / output
        if not path.is_file() or path.stat().st_size != facts["size"]:
            return None
    return record


def write(folder, name: str, inputs: dict, options: dict, outputs: dict[str, dict], counts: dict, skipped=()) -> dict:
    """Record a finished piece of work.

    outputs: for each file, relative to the folder, what is worth knowing.  skipped: what was left out, and why.
    """
    sized = {output: {"size": (Path(folder) / output).stat().st_size, **facts} for output, facts in outputs.items()}
    record = {"inputs": inputs, "options": options, "counts": counts, "skipped": list(skipped), "outputs": sized}
    write_json(path_for(folder, name), record)
    return record


def forget(folder, name: str) -> None:
    """Remove a record before its files are made anew."""
    path_for(folder, name).unlink(missing_ok=True)


def prune(folder, pattern: str, keep) -> None:
    """Delete what earlier runs made and this one did not: files that match the pattern but are not in `keep`.

    Names are relative to the folder.  Without this, fewer parts than last time would leave old ones among the new.
    """
    for path in Path(folder).glob(pattern):
        name = path.relative_to(folder).as_posix()
        if name not in keep:
            path.unlink()
            forget(folder, name)
