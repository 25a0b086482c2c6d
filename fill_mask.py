"""Predict the most likely words for each [MASK] in a sentence, with the model of a checkpoint.

    python3 fill_mask.py --checkpoint results/checkpoints "The capital of France is [MASK]." "He put the [MASK] on it."

Where the checkpoint holds the token frequencies of its training set, what these alone say stands below.  Without a
sentence, sentences are read line by line from the terminal or a pipe.  Runs on the CPU.
"""

import os
import sys
from pathlib import Path
from random import Random

from common import cli
from common.errors import UserError
from common.files import write_json
from common.text import decoded, lines_of_text
from data.token_counts import TOKEN_COUNTS
from data.tokenizer import SPECIAL_TOKENS
from devices import gaudi_environment

LONGEST_LINE = 100_000  # characters, far more than a model takes: what is longer is no sentence
WORDS_IN_SENTENCE = range(8, 31)  # of those taken at random


def main(argv=None) -> None:
    args = parse_arguments(argv)
    gaudi_environment.load_software(use_habana=False)
    from checkpoint.huggingface import tokenizer_of
    from checkpoint.trained_model import open_trained_model
    from modeling import BertForPreTraining

    trained = open_trained_model(args.checkpoint, args.config_file)
    vocabulary = trained.full_vocabulary(args.vocab_file, args.do_lower_case)
    model = BertForPreTraining(trained.config).eval()
    trained.load_into(model)
    counts = usable_counts(trained.contents.get(TOKEN_COUNTS), trained.config.vocab_size)
    predictor = MaskPredictor(model, tokenizer_of(vocabulary.tokens, vocabulary.lower_case), args.top, counts)
    examples = []
    for sentence in args.sentences:
        examples.append(predictor.answer(in_utf8(sentence, "SENTENCE")))
        print(example_text(examples[-1]))
    for sentence in random_sentences(args.random_from, args.random_count, args.seed) if args.random_from else ():
        masked = predictor.mask_a_word(sentence, args.seed)
        if masked:
            examples.append(predictor.answer(*masked))
            print(example_text(examples[-1]))
    for sentence in typed_sentences() if not args.sentences and not args.random_from else ():
        try:
            print(example_text(predictor.answer(sentence)))
        except UserError as error:  # a mistyped sentence does not end the command
            print(error)
    if args.json:
        write_json(args.json, examples)


def parse_arguments(argv):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("sentences", nargs="*", type=cli.free_text, metavar="SENTENCE",
                        help="text with one [MASK] or more")
    parser.add_argument("--checkpoint", type=cli.path_or_url, required=True,
                        help="ckpt_<step>.pt, a folder of them, of which the newest is taken, or a Hugging "
                             "Face model folder")
    parser.add_argument("--config_file", help="its model config, JSON (default: the one in the checkpoint)")
    parser.add_argument("--vocab_file", type=cli.path_or_url,
                        help="the vocabulary of its data (default: the one in the checkpoint)")
    parser.add_argument("--do_lower_case", **cli.BOOLEAN, help="whether the data was lower-cased (default: what the "
                        "checkpoint says; where it does not, whether the vocabulary has capital letters)")
    parser.add_argument("--top", type=cli.positive_int, default=5, help="words to show for each [MASK]")
    parser.add_argument("--random_from", metavar="TEXT", help="a text shard (a sentence a line): take sentences from "
                        "it at random, hide a word in each, and tell the true word's rank")
    parser.add_argument("--random_count", type=cli.positive_int, default=3, help="how many of them")
    parser.add_argument("--seed", type=cli.whole, default=1, help="random seed of these sentences and words")
    parser.add_argument("--json", metavar="FILE", help="also write sentences and words to a file")
    return parser.parse_args(argv)


def typed_sentences():
    """Yield lines from standard input: on a terminal, after a prompt, up to an empty one; from a pipe all but those."""
    if sys.stdin is None:  # closed
        return
    on_terminal, number = sys.stdin.isatty(), 0
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        number += 1
        if on_terminal:
            print("a sentence with [MASK] (empty line: end)> ", end="", flush=True)
        line = in_utf8(sys.stdin.readline(LONGEST_LINE), f"standard input: line {number}")
        if len(line) == LONGEST_LINE and not line.endswith("\n"):
            while sys.stdin.readline(LONGEST_LINE)[-1:] not in ("\n", ""):
                """Pass over the rest of it."""
            print(f"line {number} is longer than {LONGEST_LINE} characters: passed over")
        elif line.strip():
            yield line.strip()
        elif on_terminal or not line:
            return


def in_utf8(words: str, where: str) -> str:
    """Words from outside, also where the locale knows no UTF-8, and Python reads its bytes as surrogates."""
    try:
        words.encode("utf-8")
        return words
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(words).decode("utf-8")
    except UnicodeError:
        raise UserError(f"{where} is not UTF-8") from None


def random_sentences(path: str, count: int, seed: int) -> list[str]:
    """Sentences of a text shard at random, neither very short nor very long.  UserError where it has too few."""
    try:
        lines = lines_of_text(decoded(Path(path).read_bytes()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--random_from {path}: cannot be read: {error}") from None
    usable = [line for line in lines if len(line.split()) in WORDS_IN_SENTENCE]
    if len(usable) < count:
        raise UserError(f"--random_from {path}: {len(usable)} sentences of {WORDS_IN_SENTENCE.start} to "
                        f"{WORDS_IN_SENTENCE.stop - 1} words in it, --random_count is {count}")
    return Random(seed).sample(usable, count)


def usable_counts(counts, vocab_size: int) -> list[int] | None:
    """How often each token occurs in the training set, from a checkpoint; None where it does not hold that."""
    counts = counts.tolist() if getattr(counts, "shape", None) == (vocab_size,) else None
    return counts if counts and sum(counts) else None


class MaskPredictor:
    """Predicts masked tokens by a model and, for comparison, by the frequencies of the training tokens."""

    def __init__(self, model, tokenizer, top: int, counts: list[int] | None):
        self.model = model
        self.tokenizer = tokenizer
        self.top = top
        self.special = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
        self.shares = [count / sum(counts) for count in counts] if counts else None
        for token in self.special if counts else ():
            self.shares[token] = -1.0

    def answer(self, sentence: str, true_word: str | None = None) -> dict:
        """The sentence, and for each [MASK] the likeliest tokens with their probabilities, best first.

        Beside them what the frequencies alone say; with `true_word` its rank by both.
        """
        masks = []
        for probabilities in self.probabilities(sentence):
            true_id = self.tokenizer.token_to_id(true_word) if true_word else None
            masks.append({"words": self.best(probabilities),
                          "frequent": self.best(self.shares) if self.shares else [],
                          "true_word": true_word, "rank": rank_of(true_id, probabilities),
                          "frequency_rank": rank_of(true_id, self.shares)})
        return {"sentence": sentence, "masks": masks}

    def best(self, values: list[float]) -> list[tuple[str, float]]:
        """The tokens with the highest values."""
        best = sorted(range(len(values)), key=lambda token: -values[token])[:min(self.top, len(values) - 5)]
        return [(self.tokenizer.id_to_token(token), values[token]) for token in best]

    def probabilities(self, sentence: str) -> list[list[float]]:
        """The probability of every token at each [MASK]; −1 for special tokens.

        Raises UserError where the sentence has no [MASK] or is too long for the model.
        """
        import torch

        ids = self.tokenizer.encode(sentence).ids
        mask = self.tokenizer.token_to_id("[MASK]")
        positions = [position for position, token in enumerate(ids) if token == mask]
        if not positions:
            raise UserError(f"no [MASK] in {sentence[:80]!r}{'…' * (len(sentence) > 80)}")
        if len(ids) > self.model.config.max_position_embeddings:
            raise UserError(f"{len(ids)} tokens in {sentence[:40]!r}…, but the model takes "
                            f"{self.model.config.max_position_embeddings}")
        with torch.no_grad():
            logits, _ = self.model.logits(one_row(ids, positions))  # (1, P, V)
        logits = logits[0, :, :self.model.config.vocab_size]
        logits[:, self.special] = float("-inf")
        probabilities = logits.softmax(-1)
        probabilities[:, self.special] = -1.0
        return probabilities.tolist()

    def mask_a_word(self, sentence: str, seed: int) -> tuple[str, str] | None:
        """The sentence with [MASK] in place of a random word that is one token, and that word; None without one."""
        words = sentence.split()
        single = [(place, self.tokenizer.encode(word, add_special_tokens=False).tokens)
                  for place, word in enumerate(words) if word.isalpha()]
        single = [(place, tokens[0]) for place, tokens in single if len(tokens) == 1 and tokens[0].isalpha()]
        if not single:
            return None
        place, token = Random(f"{seed} {sentence}").choice(single)
        return " ".join([*words[:place], "[MASK]", *words[place + 1:]]), token


def rank_of(token: int | None, values: list[float] | None) -> int | None:
    """1 for the token with the highest value."""
    return None if token is None or values is None else 1 + sum(value > values[token] for value in values)


def example_text(example: dict) -> str:
    """The sentence, and below it lines for each [MASK]."""
    lines = [example["sentence"]]
    for mask in example["masks"]:
        lines.append("    " + listed(mask["words"]))
        if mask["frequent"]:
            lines.append(f"    by frequency alone: {listed(mask['frequent'])}")
        if mask["true_word"]:
            by_frequency = f", by frequency {mask['frequency_rank']}" if mask["frequency_rank"] else ""
            lines.append(f"    the word was {mask['true_word']}: rank {mask['rank']}{by_frequency}")
    return "\n".join(lines)


def listed(words: list[tuple[str, float]]) -> str:
    return ", ".join(f"{word} ({probability:.1%})" for word, probability in words)


def one_row(ids: list[int], masked_positions: list[int]) -> dict:
    """A batch of one sequence in the packed form of shards.SCHEMA."""
    import torch

    row = {"input_ids": ids, "input_mask": [1] * len(ids), "segment_ids": [0] * len(ids),
           "positions": range(len(ids)), "masked_lm_positions": masked_positions, "next_sentence_positions": [0]}
    return {key: torch.tensor([list(values)], dtype=torch.int32) for key, values in row.items()}


if __name__ == "__main__":
    cli.run(main)
