"""The files that --input_files names: words, comma-separated names, folders and patterns.  No torch here."""

import re
from fnmatch import fnmatch
from glob import glob
from pathlib import Path

from common.download import is_remote, local_file
from common.errors import UserError
from common.remote_sources import s3_keys


def named_files(words: list[str], pattern: str = "", flag: str = "--input_files") -> list[Path]:
    """The files, remote ones as local copies; with a pattern, also those in folders that are named.

    A pattern is one or several, separated by spaces.
    """
    paths = [path for name in names_in(words) for path in matching_files(name, pattern, flag)]
    if words and not paths:
        raise UserError(f"{flag} {' '.join(words)}: names no file")
    if len({path.absolute() for path in paths}) < len(paths):
        raise UserError(f"{flag}: a file is named twice")
    return paths


def names_in(words: list[str]) -> list[str]:
    """The names in the words of a flag.  As in the reference, commas separate them too; not in a name that exists.

    >>> names_in(["a.txt,b.txt", "c.txt", "https://host/d,e.txt,https://host/f.txt"])
    ['a.txt', 'b.txt', 'c.txt', 'https://host/d,e.txt', 'https://host/f.txt']
    """
    parts = [part for word in words for part in re.split(r",(?=\w+://)", word)]
    return [name for part in parts
            for name in ([part] if is_remote(part) or Path(part).exists() else part.split(",")) if name]


def matching_files(name: str, pattern: str, flag: str) -> list[Path]:
    """The file of this name; or the files in the folder of this name that match the pattern; or those that the name,
    which is a pattern itself, matches.
    """
    if pattern and name.startswith("s3://") and name.endswith("/"):
        return remote_files_below(name, pattern, flag)
    path = local_file(name)
    if pattern and path.is_dir():
        return files_below(path, pattern)
    found = [path] if path.exists() else [Path(other) for other in sorted(glob(name))]
    found = [other for other in found if not other.is_dir()]
    if not found:
        raise UserError(f"{flag} {name}: no such file")
    return found


def remote_files_below(prefix: str, pattern: str, flag: str) -> list[Path]:
    """Local copies of the objects below an s3:// prefix that match the pattern, in the order of their names."""
    found = [key for key in s3_keys(prefix) if matches(key.rpartition("/")[2], pattern)]
    if not found:
        raise UserError(f"{flag} {prefix}: no {shortened(pattern)} object below it")
    return [local_file(key) for key in found]


def matches(name: str, pattern: str) -> bool:
    return any(fnmatch(name.lower(), one) for one in pattern.split()) and not name.startswith(".")


def shortened(pattern: str) -> str:
    """A few of the patterns, for a message.

    >>> shortened("*.a *.b *.c *.d *.e *.f *.g *.h *.i")
    '*.a, *.b, *.c, *.d, *.e, *.f, *.g …'
    """
    patterns = pattern.split()
    return ", ".join(patterns[:7]) + " …" * (len(patterns) > 7)


def files_below(place: Path, pattern: str) -> list[Path]:
    """The file itself, or the files below a folder whose names match the pattern in any case, in the order of their
    names.  Hidden ones are none of them: macOS leaves files ._NAME beside those of that name.
    """
    if place.is_file():
        return [place]
    found = [path for path in sorted(place.rglob("*")) if matches(path.name, pattern) and path.is_file()
             and not any(part.startswith(".") for part in path.relative_to(place).parts)]
    if not found:
        raise UserError(f"{place}: neither a file nor a folder with {shortened(pattern)} files in it")
    return found
