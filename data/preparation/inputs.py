"""Which files a stage reads: those that --input_files names, else the output of the stage before."""

from pathlib import Path

from common.download import local_file
from common.errors import UserError
from data.preparation import layout, records
from data.preparation.datasets import Dataset
from data.preparation.formatting import TextFormat


def named_files(names: list[str]) -> list[Path]:
    """The files that --input_files names, remote ones as local copies."""
    paths = [local_file(name) for name in names]
    for name, path in zip(names, paths, strict=True):
        if not path.is_file():
            raise UserError(f"--input_files {name}: no such file")
    if len({records.file_key(path) for path in paths}) < len(paths):
        raise UserError("--input_files: a file is named twice")
    return paths


def recorded_files(stage: str, folder: Path, dataset: str) -> list[Path]:
    """The output of a finished stage."""
    record = records.read_record(folder, dataset)
    if record is None:
        raise UserError(f"{folder}: no finished {dataset} in it; run --action {stage} --dataset {dataset} first, "
                        f"or name files with --input_files")
    return [folder / name for name in record["outputs"]]


def for_text_formatting(dataset: Dataset, text_format: TextFormat, names: list[str]) -> list[Path]:
    """The files of this format in what --input_files names, else those downloaded or extracted."""
    if not text_format.pattern:
        return named_files(names) or recorded_files("download", layout.download_folder(), dataset.name)
    places = [local_file(name) for name in names]
    if not places:
        places = ([layout.working_folder() / "extracted" / dataset.name] if text_format.extracted
                  else recorded_files("download", layout.download_folder(), dataset.name))
    return [path for place in places for path in files_below(place, text_format.pattern)]


def files_below(place: Path, pattern: str) -> list[Path]:
    """The file itself, or the files below a folder that match the pattern, in the order of their names."""
    if place.is_file():
        return [place]
    found = [path for path in sorted(place.rglob(pattern)) if not path.name.startswith(".")]
    if not found:
        raise UserError(f"{place}: neither a file nor a folder with {pattern} files in it")
    return found


def for_sharding(dataset: Dataset, names: list[str]) -> list[Path]:
    """The formatted text of the data set, or of its parts."""
    return named_files(names) or [path for part in dataset.parts or (dataset,)
                                  for path in recorded_files("text_formatting", layout.formatted_folder(), part.name)]
