"""Predict the most likely words for each [MASK] in a sentence, with the model of a checkpoint.

    python3 fill_mask.py --checkpoint results/checkpoints/ckpt_8601.pt --config_file bert_config.json \\
        --vocab_file vocab.txt "The capital of France is [MASK]." "He put the [MASK] on the [MASK]."

Without a sentence, sentences are read line by line from the terminal or a pipe.  Runs on the CPU.
"""

import sys

from common import cli
from common.errors import UserError


def main(argv=None) -> None:
    args = parse_arguments(argv)
    from checkpoint.huggingface import read_vocabulary, tokenizer_of
    from checkpoint.load import load_weights
    from modeling import BertConfig, BertForPreTraining

    config = BertConfig.from_json_file(args.config_file)
    tokenizer = tokenizer_of(read_vocabulary(args.vocab_file, config), args.do_lower_case)
    model = BertForPreTraining(config).eval()
    load_weights(model, args.checkpoint)
    for sentence in args.sentences:
        print(answer(model, tokenizer, sentence, args.top))
    for sentence in typed_sentences() if not args.sentences else ():
        try:
            print(answer(model, tokenizer, sentence, args.top))
        except UserError as error:  # a mistyped sentence does not end the command
            print(error)


def parse_arguments(argv):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE", help="text with one [MASK] or more")
    parser.add_argument("--checkpoint", required=True, help="ckpt_<step>.pt, or a Hugging Face model folder")
    parser.add_argument("--config_file", required=True, help="its model config, JSON")
    parser.add_argument("--vocab_file", required=True, help="the vocabulary that its data was tokenized with")
    parser.add_argument("--do_lower_case", type=cli.boolean, default=True, metavar="1|0",
                        help="whether the data was lower-cased (an uncased vocabulary)")
    parser.add_argument("--top", type=cli.positive_int, default=5, help="words to show for each [MASK]")
    return parser.parse_args(argv)


def typed_sentences():
    """Yield lines from standard input up to an empty one; on a terminal, after a prompt."""
    while True:
        if sys.stdin.isatty():
            print("a sentence with [MASK] (empty line: end)> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def answer(model, tokenizer, sentence: str, top: int) -> str:
    """The sentence, and below it a line for each [MASK]: the most likely words and their probabilities."""
    lines = [sentence]
    for words in best_words(model, tokenizer, sentence, top):
        lines.append("    " + ", ".join(f"{word} ({probability:.1%})" for word, probability in words))
    return "\n".join(lines)


def best_words(model, tokenizer, sentence: str, top: int) -> list[list[tuple[str, float]]]:
    """For each [MASK], the most likely tokens with their probabilities, best first, without special tokens.

    Raises UserError where the sentence has no [MASK] or is too long for the model.
    """
    import torch

    from data.tokenizer import SPECIAL_TOKENS

    ids = tokenizer.encode(sentence).ids
    mask = tokenizer.token_to_id("[MASK]")
    positions = [position for position, token in enumerate(ids) if token == mask]
    if not positions:
        raise UserError(f"no [MASK] in {sentence!r}")
    if len(ids) > model.config.max_position_embeddings:
        raise UserError(f"{len(ids)} tokens in {sentence[:40]!r}…, but the model takes "
                        f"{model.config.max_position_embeddings}")
    with torch.no_grad():
        logits, _ = model.logits(one_row(ids, positions))  # (1, P, V)
    logits = logits[0, :, :model.config.vocab_size]
    logits[:, [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]] = float("-inf")
    found = logits.softmax(-1).topk(min(top, logits.shape[-1] - len(SPECIAL_TOKENS)))
    return [[(tokenizer.id_to_token(token), probability) for token, probability in zip(*pair, strict=True)]
            for pair in zip(found.indices.tolist(), found.values.tolist(), strict=True)]


def one_row(ids: list[int], masked_positions: list[int]) -> dict:
    """A batch of one sequence in the packed form of shards.SCHEMA."""
    import torch

    row = {"input_ids": ids, "input_mask": [1] * len(ids), "segment_ids": [0] * len(ids),
           "positions": range(len(ids)), "masked_lm_positions": masked_positions, "next_sentence_positions": [0]}
    return {key: torch.tensor([list(values)], dtype=torch.int32) for key, values in row.items()}


if __name__ == "__main__":
    cli.run(main)
