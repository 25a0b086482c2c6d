"""The best words for the [MASK] in a sentence, from a checkpoint.

    python3 fill_mask.py --checkpoint results/checkpoints/ckpt_8601.pt --config_file bert_config.json \\
        --vocab_file vocab.txt "The capital of France is [MASK]." "He put the [MASK] on the [MASK]."

Without a sentence, sentences are read line by line from the terminal or a pipe.  Runs on the CPU.
"""

import sys

from common import cli
from common.errors import UserError

PROMPT = "a sentence with [MASK] (empty line: end)> "


def main(argv=None) -> None:
    args = parse_arguments(argv)
    from checkpoint.huggingface import read_vocabulary, tokenizer_of
    from modeling import BertConfig

    config = BertConfig.from_json_file(args.config_file)
    tokenizer = tokenizer_of(read_vocabulary(args.vocab_file, config), args.do_lower_case)
    model = load_model(config, args.checkpoint)
    for sentence in args.sentences:
        print(answer(model, tokenizer, sentence, args.top))
    for sentence in typed_sentences() if not args.sentences else ():
        try:
            print(answer(model, tokenizer, sentence, args.top))
        except UserError as error:  # a mistyped sentence does not end the conversation
            print(error)


def parse_arguments(argv):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE", help="text with one [MASK] or more")
    parser.add_argument("--checkpoint", required=True, help="ckpt_<step>.pt, or a folder of transformers")
    parser.add_argument("--config_file", required=True, help="its model config, JSON")
    parser.add_argument("--vocab_file", required=True, help="the vocabulary that its data was tokenized with")
    parser.add_argument("--do_lower_case", type=cli.boolean, default=True, metavar="1|0",
                        help="whether the data was lower-cased (an uncased vocabulary)")
    parser.add_argument("--top", type=cli.positive_int, default=5, help="words to show for each [MASK]")
    return parser.parse_args(argv)


def load_model(config, path: str):
    from checkpoint.load import load_weights
    from modeling import BertForPreTraining

    model = BertForPreTraining(config).eval()
    load_weights(model, path)
    return model


def typed_sentences():
    """Yield lines from standard input up to an empty one; on a terminal, after a prompt."""
    while True:
        if sys.stdin.isatty():
            print(PROMPT, end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def answer(model, tokenizer, sentence: str, top: int) -> str:
    """The sentence, and below it the best words for each [MASK] with their probabilities."""
    lines = [sentence]
    for words in best_words(model, tokenizer, sentence, top):
        lines.append("    " + ", ".join(f"{word} ({probability:.1%})" for word, probability in words))
    return "\n".join(lines)


def best_words(model, tokenizer, sentence: str, top: int) -> list[list[tuple[str, float]]]:
    """For each [MASK], the likeliest tokens and their probabilities, best first; special tokens are no words.

    Raises UserError where the sentence has no [MASK] or is too long for the model.
    """
    import torch

    from data.tokenizer import SPECIAL_TOKENS

    ids = tokenizer.encode(sentence).ids
    mask = tokenizer.token_to_id("[MASK]")
    places = [place for place, token in enumerate(ids) if token == mask]
    if not places:
        raise UserError(f"no [MASK] in {sentence!r}")
    if len(ids) > model.config.max_position_embeddings:
        raise UserError(f"{len(ids)} tokens in {sentence[:40]!r}…, but the model takes "
                        f"{model.config.max_position_embeddings}")
    with torch.no_grad():
        scores, _ = model.logits(one_row(ids, places))  # (1, P, V)
    scores = scores[0, :, :model.config.vocab_size]
    scores[:, [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]] = float("-inf")
    found = scores.softmax(-1).topk(min(top, scores.shape[-1] - len(SPECIAL_TOKENS)))
    return [[(tokenizer.id_to_token(token), probability) for token, probability in zip(*pair, strict=True)]
            for pair in zip(found.indices.tolist(), found.values.tolist(), strict=True)]


def one_row(ids: list[int], places: list[int]) -> dict:
    """A batch of one sequence in the packed form of shards.SCHEMA, to be predicted at the given places."""
    import torch

    row = {"input_ids": ids, "input_mask": [1] * len(ids), "segment_ids": [0] * len(ids),
           "positions": range(len(ids)), "masked_lm_positions": places, "next_sentence_positions": [0]}
    return {key: torch.tensor([list(values)], dtype=torch.int32) for key, values in row.items()}


if __name__ == "__main__":
    cli.run(main)
