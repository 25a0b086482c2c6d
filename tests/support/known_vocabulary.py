"""Small data sets whose shards say of which vocabulary and text they are, and models trained on them."""

from data.preparation.samples import SampleOptions, create_shard
from data.tokenizer import SPECIAL_TOKENS, save_vocabulary
from tests.support import preparation, samples

WORDS = [*preparation.LETTERS, *(f"##{letter}" for letter in preparation.LETTERS), *preparation.WORDS, "."]
TOKENS = [*SPECIAL_TOKENS, "[unused0]", "[unused1]", *WORDS]
OTHER_TOKENS = [*SPECIAL_TOKENS, "[unused0]", "[unused1]", *reversed(WORDS)]  # as many
EXTENDED_TOKENS = [*SPECIAL_TOKENS, "gulls'", "[unused1]", *WORDS]
CASED_TOKENS = [token.capitalize() if token.isalpha() else token for token in TOKENS]
OPTIONS = {"max_seq_length": samples.SEQUENCE_LENGTH, "max_predictions_per_seq": samples.PREDICTIONS}


def write(folder) -> None:
    """A config, vocabularies, and the folders of shards `data` and `held_out` and, of other vocabularies, `other`,
    `extended`, `cased` and `cased_held_out`."""
    samples.write_config(folder / "config.json", vocab_size=len(TOKENS))
    for name, tokens in (("vocab", TOKENS), ("other", OTHER_TOKENS), ("cased", CASED_TOKENS)):
        save_vocabulary(folder / f"{name}.txt", tokens)
    write_shards(folder, "data", TOKENS)
    write_shards(folder, "held_out", TOKENS, "test")
    write_shards(folder, "other", OTHER_TOKENS)
    write_shards(folder, "other_held_out", OTHER_TOKENS, "test")
    write_shards(folder, "extended", EXTENDED_TOKENS)
    write_shards(folder, "cased_held_out", TOKENS, "test", do_lower_case=False)


def write_shards(folder, name: str, tokens: list[str], split: str = "training", **options):
    """Two shards of a split, of texts of their own; the folder.  All data sets of a split are of the same text."""
    (folder / name).mkdir(exist_ok=True)
    for number in range(2):
        text = folder / f"{name}_{split}_{number}.txt"
        first = 100 * number + 1000 * (split == "test")
        text.write_text("\n\n".join("\n".join(preparation.sentences(6, first + document)) for document in range(5)))
        create_shard(text, folder / name / f"text_{split}_{number}.hdf5", tokens, SampleOptions(**OPTIONS | options))
    return folder / name
