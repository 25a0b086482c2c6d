"""Does pre-training pay?  Fine-tune an exported model, and the same architecture untrained, to classify sentences.

    python3 examples/fine_tuning/classify.py --model exported \\
        --text_dir quickstart_output/data/sharded_…/wikicorpus_en_sample

The task is made here, of the text shards that data preparation leaves, so that nothing is downloaded: a sentence of
Wikipedia is either as it was (label 0), or has some of its words replaced with random words of the vocabulary (1).
Sentences to learn from come from the training shards, those to be judged from the test shards: articles that neither
pre-training nor fine-tuning has seen.  Labels are few, so what counts is what the model knew before.  Everything is
done by transformers and torch.
"""

import json
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # the repository's root, for cli

from common import cli  # noqa: E402
from common.errors import UserError  # noqa: E402

FEWEST_WORDS, MOST_WORDS = 8, 30  # of a sentence
BATCH_SIZE = 16
TEST_SEED = 99  # of the test sentences: the same for all models


def main(argv=None) -> None:
    args = parse_arguments(argv)
    from tqdm import tqdm
    from transformers import AutoTokenizer

    if not (Path(args.model) / "config.json").is_file():
        raise UserError(f"--model {args.model}: no folder with a config.json (export_to_huggingface.py writes one)")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha())
    test = examples(sentences(args, "test"), args.test_examples, words, args, TEST_SEED)
    training = sentences(args, "training")
    scores = {"pre-trained": [], "untrained": []}
    runs = [(kind, seed) for seed in range(args.seeds) for kind in scores]
    for kind, seed in tqdm(runs, unit="run", desc="fine-tuning", disable=args.disable_progress_bar or None):
        learned = examples(training, args.training_examples, words, args, seed)
        scores[kind].append(accuracy_after_fine_tuning(args, tokenizer, kind, seed, learned, test))
    print(json.dumps(scores) if args.json else table(scores))


def parse_arguments(argv):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder that export_to_huggingface.py wrote")
    parser.add_argument("--text_dir", required=True, help="folder of text shards: …_training_N.txt and …_test_N.txt")
    parser.add_argument("--seeds", type=cli.positive_int, default=3, help="runs of each model, with other examples")
    parser.add_argument("--training_examples", type=cli.positive_int, default=1000, help="sentences to learn from")
    parser.add_argument("--test_examples", type=cli.positive_int, default=600, help="sentences to be judged")
    parser.add_argument("--replaced", type=cli.proportion, default=0.3, help="share of the words that are replaced")
    parser.add_argument("--epochs", type=cli.positive_int, default=8, help="passes over the training examples")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="peak rate of AdamW")
    parser.add_argument("--json", action="store_true", help="print the accuracies as JSON")
    parser.add_argument("--disable_progress_bar", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def sentences(args, split: str) -> list[str]:
    """The sentences of the text shards of a split that are neither very short nor very long."""
    paths = sorted(Path(args.text_dir).glob(f"*_{split}_*.txt"))
    if not paths:
        raise UserError(f"--text_dir {args.text_dir}: no text shard *_{split}_*.txt in it")
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if FEWEST_WORDS <= len(line.split()) <= MOST_WORDS]


def examples(lines: list[str], count: int, words: list[str], args, seed: int) -> list[tuple[str, int]]:
    """(sentence, label) in turn of either label."""
    if count > len(lines):
        raise UserError(f"--text_dir {args.text_dir}: {len(lines)} sentences to choose {count} from")
    rng = random.Random(seed)
    return [(spoiled(line, words, args.replaced, rng) if number % 2 else line, number % 2)
            for number, line in enumerate(rng.sample(lines, count))]


def spoiled(line: str, words: list[str], share: float, rng: random.Random) -> str:
    """The sentence with a share of its words, at least one, replaced with random ones."""
    found = line.split()
    for place in rng.sample(range(len(found)), max(1, round(share * len(found)))):
        found[place] = rng.choice(words)
    return " ".join(found)


def accuracy_after_fine_tuning(args, tokenizer, kind: str, seed: int, training, test) -> float:
    import torch

    torch.manual_seed(seed)
    model = build(args.model, kind)
    fine_tune(model, tokenizer, training, args, random.Random(seed))
    model.eval()
    right = 0
    with torch.no_grad():
        for batch, labels in batches(tokenizer, test):
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(test)


def build(folder: str, kind: str):
    """A classifier for two labels on the exported weights, or the same architecture with fresh ones."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()  # that the classifier is new is meant so
    logging.disable_progress_bar()
    if kind == "untrained":
        return AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder, num_labels=2))
    variant = "encoder" if (Path(folder) / "model.encoder.safetensors").is_file() else None
    return AutoModelForSequenceClassification.from_pretrained(folder, variant=variant, num_labels=2)


def fine_tune(model, tokenizer, training, args, rng: random.Random) -> None:
    """AdamW; the rate rises over a tenth of the steps and falls to 0."""
    import torch
    from transformers import get_linear_schedule_with_warmup

    steps = args.epochs * -(-len(training) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    for _ in range(args.epochs):
        for batch, labels in batches(tokenizer, rng.sample(training, len(training))):
            model(**batch, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def batches(tokenizer, pairs: list[tuple[str, int]]):
    """Yield (inputs of the model, labels)."""
    import torch

    for start in range(0, len(pairs), BATCH_SIZE):
        texts, labels = zip(*pairs[start:start + BATCH_SIZE], strict=True)
        yield (tokenizer(list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt"),
               torch.tensor(labels))


def table(scores: dict[str, list[float]]) -> str:
    """The accuracies of each model, a column a seed, with their mean and standard deviation."""
    seeds = len(next(iter(scores.values())))
    lines = [f"{'accuracy':<12}" + "".join(f"{f'seed {seed}':>9}" for seed in range(seeds)) + f"{'mean':>9}  spread"]
    for kind, values in scores.items():
        lines.append(f"{kind:<12}" + "".join(f"{value:>9.1%}" for value in values)
                     + f"{statistics.mean(values):>9.1%}  ± {statistics.pstdev(values):.1%}")
    margins = [one - other for one, other in zip(*scores.values(), strict=True)]
    return "\n".join([*lines, f"margin of pre-training: {statistics.mean(margins):+.1%} (least {min(margins):+.1%})"])


if __name__ == "__main__":
    cli.run(main)
