"""The folders of data preparation, all below one working folder.

    download/DATASET/                      what was downloaded, and what was unpacked from it
    extracted/DATASET/…/wiki_N             what wikiextractor's own command wrote, for --skip_wikiextractor 1
    formatted_one_article_per_line/DATASET/part_N.txt   a document a line, tabs between its paragraphs
    sharded_…/DATASET/DATASET_training_N.txt, DATASET_test_N.txt
    hdf5_…/DATASET/DATASET_training_N.hdf5, DATASET_test_N.hdf5
    vocab/DATASET/vocab.txt                a vocabulary trained on a data set (DATASET_cased with --do_lower_case 0)
    records/ in each of them               what each file was made from
"""

import os
from pathlib import Path

from common.files import folder_in_variable


def working_folder() -> Path:
    """BERT_PREP_WORKING_DIR, or data/."""
    named = os.environ.get("BERT_PREP_WORKING_DIR")
    return (folder_in_variable("BERT_PREP_WORKING_DIR") if named else Path(__file__).parent.parent).absolute()


def download_folder() -> Path:
    return working_folder() / "download"


def formatted_folder() -> Path:
    return working_folder() / "formatted_one_article_per_line"


def vocabulary_file(dataset: str, lower_case: bool) -> Path:
    return working_folder() / "vocab" / f"{dataset}{'' if lower_case else '_cased'}" / "vocab.txt"


def sharded_folder(training_shards: int, test_shards: int, fraction_test_set: float) -> Path:
    return working_folder() / (f"sharded_training_shards_{training_shards}_test_shards_{test_shards}"
                               f"_fraction_{fraction_test_set}")


def hdf5_folder(options) -> Path:
    """The folder of HDF5 shards made with these SampleOptions (samples.py)."""
    return working_folder() / (
        f"hdf5_lower_case_{int(options.do_lower_case)}_seq_len_{options.max_seq_length}"
        f"_max_pred_{options.max_predictions_per_seq}_masked_lm_prob_{options.masked_lm_prob}"
        f"_random_seed_{options.random_seed}_dupe_factor_{options.dupe_factor}"
        f"{'_dynamic_masking' * options.dynamic_masking}{'_whole_word_mask' * options.whole_word_mask}"
        f"{'_no_nsp' * options.no_nsp}")


def shard_names(dataset: str, training_shards: int, test_shards: int) -> list[str]:
    """The names of the text shards and HDF5 shards, without a suffix."""
    return [f"{dataset}_{split}_{number}" for split, count in (("training", training_shards), ("test", test_shards))
            for number in range(count)]
