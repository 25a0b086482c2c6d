"""Records of finished work: a small JSON file beside the files of a stage says what they were made from.

A stage whose record matches its inputs and options has nothing to do.  Dates play no part: a folder that was copied
elsewhere still matches, and equal runs write equal records.  A record is written last: work without one starts over.
"""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

from common.download import file_checksum
from common.errors import UserError
from common.files import write_json


def file_fingerprint(path) -> dict:
    return {"size": Path(path).stat().st_size, "sha256": file_checksum(path)}


def combined_fingerprint(paths) -> dict:
    """One fingerprint of many files and their names, in this order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(f"{file_key(path)} {file_fingerprint(path)}\n"))
    return {"files": len(paths), "sha256": digest.hexdigest()}


def file_fingerprints(paths) -> dict:
    """UserError where the keys of two files are the same."""
    keys = Counter(map(file_key, paths))
    for key, count in keys.items():
        if count > 1:
            raise UserError(f"{key}: {count} input files of this name are in folders of this name; rename one")
    return {file_key(path): file_fingerprint(path) for path in paths}


def file_key(path) -> str:
    """FOLDER/NAME: differs for the parts of two data sets, and does not change when everything is copied elsewhere."""
    path = Path(path).absolute()
    return f"{path.parent.name}/{path.name}"


def record_path(folder, name: str) -> Path:
    return Path(folder) / "records" / f"{name}.json"


def read_record(folder, name: str) -> dict | None:
    """The record; None if there is none or it cannot be read: then the work is done again."""
    try:
        return json.loads(record_path(folder, name).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def finished_record(folder, name: str, inputs: dict, options: dict) -> dict | None:
    """The record, if it has these inputs and options and every output still exists with its size; else None."""
    record = read_record(folder, name)
    if record is None or record["inputs"] != inputs or record["options"] != options:
        return None
    for output, properties in record["outputs"].items():
        path = Path(folder) / output
        if not path.is_file() or path.stat().st_size != properties["size"]:
            return None
    return record


def write_record(folder, name: str, inputs: dict, options: dict, outputs: dict[str, dict], counts: dict,
                 skipped=()) -> dict:
    """Record finished work.  outputs: the counts of each file, by its path in `folder`; skipped: what, and why."""
    sized = {output: {"size": (Path(folder) / output).stat().st_size, **properties}
             for output, properties in outputs.items()}
    record = {"inputs": inputs, "options": options, "counts": counts, "skipped": list(skipped), "outputs": sized}
    write_json(record_path(folder, name), record)
    return record


def delete_record(folder, name: str) -> None:
    record_path(folder, name).unlink(missing_ok=True)


def delete_outdated(folder, pattern: str, keep) -> None:
    """Delete the files that match the pattern and are not in `keep`, and their records.

    They are left over from an earlier run that made more parts.
    """
    for path in Path(folder).glob(pattern):
        name = path.relative_to(folder).as_posix()
        if name not in keep:
            path.unlink(missing_ok=True)  # another call of the same stage may be at it
            delete_record(folder, name)
