"""Which files a stage reads: those that --input_files names, else the output of the stage before."""

from pathlib import Path

from common.errors import UserError
from data.preparation import layout, records
from data.preparation.datasets import Dataset
from data.preparation.formatting import TextFormat
from data.preparation.named_files import files_below, named_files

TEXTS = "*.txt"


def recorded_files(stage: str, folder: Path, dataset: str) -> list[Path]:
    """The output of a finished stage."""
    record = records.read_record(folder, dataset)
    if record is None:
        raise UserError(f"{folder}: no finished {dataset} in it; run --action {stage} --dataset {dataset} first, "
                        f"or name files with --input_files")
    return [folder / name for name in record["outputs"]]


def for_text_formatting(dataset: Dataset, text_format: TextFormat, names: list[str]) -> list[Path]:
    """The files of this format in what --input_files names, else those downloaded or extracted."""
    if names:
        return named_files(names, text_format.pattern)
    if not dataset.built_in:
        raise UserError(f"--dataset {dataset.name}: no built-in data set; name the files of your own text with "
                        f"--input_files")
    if not text_format.extracted:
        places = recorded_files("download", layout.download_folder(), dataset.name)
        return places if not text_format.pattern else [path for place in places
                                                       for path in files_below(place, text_format.pattern)]
    return files_below(layout.working_folder() / "extracted" / dataset.name, text_format.pattern)


def for_sharding(dataset: Dataset, names: list[str]) -> list[Path]:
    """The formatted text of the data set, or of its parts."""
    return named_files(names, TEXTS) or [
        path for part in dataset.parts or (dataset,)
        for path in recorded_files("text_formatting", layout.formatted_folder(), part.name)]


def text_shards(folder: Path, dataset: str, names: list[str], stems: list[str]) -> list[Path]:
    """The text shards that --input_files names, else the output of the sharding.

    A folder without records was not written by it: shards of the reference's scripts are taken under the names that
    both use, the `stems`, where all are there.
    """
    brought = [folder / dataset / f"{stem}.txt" for stem in stems]
    if names or (folder / "records").exists() or not any(path.is_file() for path in brought):
        return named_files(names, TEXTS) or recorded_files("sharding", folder, dataset)
    missing = [path for path in brought if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such file; {len(missing)} of the {len(brought)} text shards are missing in "
                        f"this folder, which has no records of its making (--n_training_shards, --n_test_shards)")
    print(f"{folder / dataset}: no records of its making: its {len(brought)} text shards are taken as they are")
    return brought
