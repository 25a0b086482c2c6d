"""The files beside the logs: evaluations, [MASK] examples, the packer's metadata.  No torch here."""

import json
from pathlib import Path

from common.errors import UserError
from data.shards import metadata_path


def read_evaluation(path: str) -> dict[str, float]:
    """The figures that evaluate.py --json printed."""
    figures = read_json(path, "--evaluation")
    if not isinstance(figures, dict) or not is_number(figures.get("mlm_loss")):
        raise UserError(f"--evaluation {path}: not the output of evaluate.py --json: it has no number mlm_loss")
    return {key: value for key, value in figures.items() if is_number(value)}


def read_examples(path: str) -> list[dict]:
    """Sentences with, for each [MASK], the words of the model and those of the word frequencies."""
    examples = read_json(path, "--examples")
    if not isinstance(examples, list):
        raise UserError(f"--examples {path}: not a list of sentences")
    for number, example in enumerate(examples, 1):
        problem = problem_in_example(example)
        if problem:
            raise UserError(f"--examples {path}: example {number}: {problem}")
    return examples


def problem_in_example(example) -> str | None:
    if not isinstance(example, dict) or not isinstance(example.get("sentence"), str):
        return "it has no text named sentence"
    if not isinstance(example.get("masks"), list):
        return "it has no list named masks"
    for mask in example["masks"]:
        if not isinstance(mask, dict) or not all(is_word_list(mask.get(key, [])) for key in ("words", "frequent")):
            return "words and frequent are not lists of [word, number from 0 to 1]"
        if not isinstance(mask.get("true_word"), str | None):
            return "true_word is not a text"
        if not all(mask.get(key) is None or is_number(mask[key]) for key in ("rank", "frequency_rank")):
            return "rank and frequency_rank are not numbers"
    return None


def is_word_list(words) -> bool:
    return isinstance(words, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and is_number(pair[1])
        and 0 <= pair[1] <= 1 for pair in words)


def read_packing(input_dir) -> dict | None:
    """The numbers in the packer's metadata of a training set, its most frequent rows, and its method.

    None where there are no metadata, as for unpacked and remote data.
    """
    if not isinstance(input_dir, str) or not metadata_path(input_dir).is_file():
        return None
    path = metadata_path(input_dir)
    metadata = read_json(str(path), "the packer's metadata")
    if not isinstance(metadata, dict):
        raise UserError(f"the packer's metadata {path}: no dictionary")
    strategies = metadata.get("most_frequent_strategies", metadata.get("top_8_strategies"))  # as in older sets
    rows = [row for row in (strategies if isinstance(strategies, list) else [])
            if isinstance(row, list) and row and all(map(is_number, row))]
    return {key: value for key, value in metadata.items() if is_number(value)} | {
        "most_frequent_strategies": rows, "packing_method": str(metadata.get("packing_method") or "")}


def read_json(path: str, what: str):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {path}: no JSON: {error}") from None


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # nor NaN
