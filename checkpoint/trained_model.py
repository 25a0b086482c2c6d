"""A trained model, as evaluate.py, fill_mask.py and export_to_huggingface.py read it: with all that its file knows."""

import sys
from dataclasses import dataclass
from pathlib import Path

from checkpoint.folder import checkpoint_path, newest_readable, read_checkpoint, saved_steps
from checkpoint.huggingface import fill_up, fresh_parts
from checkpoint.load import config_of, holds_nsp, load_model, without_nsp
from checkpoint.remote_folder import RemoteFolder
from common.bert_config import BertConfig
from common.download import local_file
from common.errors import UserError
from common.object_store import is_s3
from data.tokenizer import load_vocabulary
from data.vocabulary import (
    Vocabulary,
    case_words,
    check_case,
    check_same_vocabulary,
    check_size,
    is_cased,
    vocabulary_in,
)


@dataclass(frozen=True)
class TrainedModel:
    """The contents of a checkpoint or Hugging Face folder, and what they say of the model."""

    path: Path
    contents: dict
    config: BertConfig
    vocabulary: Vocabulary | None  # None: not known

    def load_into(self, model) -> None:
        """Load the weights; where they have no next-sentence head, the model loses its own."""
        if not holds_nsp(self.contents):
            model.without_nsp()
        load_model(model, self.contents, self.path)

    def full_vocabulary(self, vocab_file: str | None, lower_case: bool | None) -> Vocabulary:
        """The vocabulary with its tokens, vocab_size of them, and its case.

        `vocab_file` and `lower_case` are the flags, None where they were not typed.  UserError where they contradict
        the model, and where a vocabulary was not typed and the model does not carry one.
        """
        known = self.vocabulary
        if vocab_file:
            tokens, what = load_vocabulary(local_file(vocab_file)), f"--vocab_file {vocab_file}"
            check_size(len(tokens), self.config.vocab_size, what)
            check_same_vocabulary(Vocabulary.of(tokens, None), what, known, str(self.path))
        elif known and known.tokens:
            tokens, what = known.tokens, str(self.path)
        else:
            raise UserError(f"{self.path}: carries no vocabulary: give --vocab_file, that of its training data")
        return Vocabulary.of(fill_up(tokens, self.config.vocab_size, what), self.checked_case(tokens, lower_case, what))

    def checked_case(self, tokens: list[str], lower_case: bool | None, what: str) -> bool:
        """Whether text is lower-cased: as the model says, else the flag, else as the tokens look."""
        known = self.vocabulary and self.vocabulary.lower_case
        if None not in (known, lower_case) and known != lower_case:
            raise UserError(f"--do_lower_case {int(lower_case)}: the data of {self.path} was"
                            f"{case_words(known).strip(',')}")
        if known is None and lower_case is not None:
            check_case(tokens, lower_case, what)
        return next(case for case in (known, lower_case, not is_cased(tokens)) if case is not None)


def open_trained_model(checkpoint: str, config_file: str | None) -> TrainedModel:
    """Read --checkpoint: a file, a Hugging Face folder, or the newest complete file in a folder of ours.

    UserError where the config is not known, or the file is of another model than `config_file`.
    """
    is_remote_folder = is_s3(checkpoint) and not checkpoint.endswith(".pt")
    path = RemoteFolder(checkpoint) if is_remote_folder else local_file(checkpoint)
    if is_remote_folder or (path.is_dir() and saved_steps(path)):
        step, contents = newest_readable(path, say, to_resume=False)
        path = checkpoint_path(path, step)
        print(f"--checkpoint {checkpoint}: {path.name} is the newest", file=sys.stderr)
    else:
        contents = read_checkpoint(path)
    if not holds_nsp(contents):
        contents = without_nsp(contents)
    if fresh := fresh_parts(contents):
        say(f"{path}: no {fresh} in it: the weights of these are random")
    config, vocabulary = config_of(contents, path, config_file), vocabulary_in(contents, path)
    if vocabulary:
        check_size(vocabulary.size, config.vocab_size, f"{path}, its vocabulary")
    return TrainedModel(path, contents, config, vocabulary)


def say(warning: str) -> None:
    print(f"warning: {warning}", file=sys.stderr)
