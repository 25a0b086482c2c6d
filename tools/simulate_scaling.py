"""Calculate the seconds per optimizer step on 8 to 1,024 cards from compute, buckets and links; see docs/scaling.md.

Nothing here was measured on cards.  The global batch is that of the recipe, so more cards have fewer sequences each.

    python tools/simulate_scaling.py [--json] [--links host] [--reduction ddp] [--cards 8 16 32]
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cli
from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CARDS_PER_SERVER = 8
LATENCY = 20e-6  # seconds per message, in addition to the time for its bytes
MEMORY_BANDWIDTH = 1e12  # bytes per second of a card
LAMB_BYTES = 44  # of memory traffic per parameter in a LAMB step
FLATTEN_BYTES = 24  # of memory traffic per parameter to fill and empty the flat buckets
INSIDE = 70e9  # bytes per second and direction between a card and the others of its server
OUTSIDE = {"card": 30e9, "host": 1.25e9}  # the same to other servers: ports of the card; 100 Gb/s that 8 cards share
WIRE_BYTES = {"flat_16_bits": 2, "flat": 4, "ddp": 4}  # per gradient element
GAIN_WORTH_IT = 1.5  # the least speed-up for which doubling the cards is worth it


@dataclass(frozen=True)
class Workload:
    """A phase of a recipe; `batch` is the sequences per step over all cards."""

    name: str
    config: str
    length: int
    batch: int
    micro_batch: int
    rate: float  # sequences per second of BERT-Large on one card
    zero: bool = False


PHASES = (
    Workload("BERT-Large, phase 1", "bert_config.json", 128, 65536, 64, 186.0),
    Workload("BERT-Large, phase 2", "bert_config.json", 512, 32768, 8, 61.0),
    Workload("1.2B with ZeRO, phase 1", "bert_config_1.2B.json", 128, 8192, 8, 186.0, zero=True),
    Workload("1.2B with ZeRO, phase 2", "bert_config_1.2B.json", 512, 8192, 2, 61.0, zero=True),
)


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--cards", type=cli.positive_int, nargs="+", default=[8, 32, 256, 1024],
                        help="numbers of cards")
    parser.add_argument("--links", choices=OUTSIDE, default="card", help="links between servers")
    parser.add_argument("--reduction", choices=WIRE_BYTES, default="flat_16_bits",
                        help="how gradients are reduced")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    odd = [cards for cards in args.cards if cards > CARDS_PER_SERVER and cards % CARDS_PER_SERVER]
    if odd:
        raise UserError(f"--cards {odd[0]} does not fill servers of {CARDS_PER_SERVER}")
    found = {phase.name: simulate(phase, args) for phase in PHASES}
    print(json.dumps(found, indent=2) if args.json else "\n".join(markdown_table(found)))


def simulate(phase: Workload, args) -> dict:
    sizes, speed = tensor_sizes(phase.config), relative_speed(phase)

    def step(cards: int) -> dict:
        return step_seconds(phase, sizes, speed, cards, OUTSIDE[args.links], args.reduction)

    base = step(CARDS_PER_SERVER)["step"] * CARDS_PER_SERVER
    steps = {cards: step(cards) for cards in args.cards if cards <= phase.batch}
    return {"steps": {cards: {**parts, "efficiency": base / cards / parts["step"]} for cards, parts in steps.items()},
            "worth_doubling_up_to": last_worth_doubling(step, phase.batch)}


def last_worth_doubling(step, most: int) -> int:
    """The largest number of cards, doubled from one server on, to which each doubling gained GAIN_WORTH_IT."""
    cards = CARDS_PER_SERVER
    while 2 * cards <= most and step(cards)["step"] >= GAIN_WORTH_IT * step(2 * cards)["step"]:
        cards *= 2
    return cards


def step_seconds(phase: Workload, sizes: list[int], speed: float, cards: int, outside: float, reduction: str) -> dict:
    """The seconds of each part of a step, and of the step; `sizes`: of the weights in the order of the forward pass."""
    rate, total = phase.rate * speed, sum(sizes)
    sequences = phase.batch / cards
    compute = sequences / rate
    backward = 2 / 3 * min(sequences, phase.micro_batch) / rate  # of the last micro-batch
    filled = [sum(bucket) for bucket in bucket_sizes(sizes)]
    seconds = [all_reduce_seconds(WIRE_BYTES[reduction] * size, cards, outside) for size in filled]
    if reduction == "ddp":
        waiting = exposed(filled[::-1], seconds[::-1], backward)
    else:
        waiting = sum(seconds) + FLATTEN_BYTES * total / MEMORY_BANDWIDTH
    share = max(total / cards, max(sizes)) if phase.zero else total  # ZeRO does not split a weight
    weights = send_weights(4 * total, len(sizes), cards, outside) if phase.zero else 0.0
    optimizer = LAMB_BYTES * share / MEMORY_BANDWIDTH
    return {"sequences_per_card": sequences, "compute": compute, "all_reduce": waiting, "weights": weights,
            "optimizer": optimizer, "step": compute + waiting + weights + optimizer}


def all_reduce_seconds(size: float, cards: int, outside: float) -> float:
    """Reduce-scatter over a ring in each server, all-reduce of the shards over rings between servers, all-gather."""
    here, servers = min(cards, CARDS_PER_SERVER), max(1, cards // CARDS_PER_SERVER)
    return (2 * (here - 1) / here * size / INSIDE + 2 * (servers - 1) / servers * size / here / outside
            + 2 * (here - 1 + servers - 1) * LATENCY)


def send_weights(size: float, messages: int, cards: int, outside: float) -> float:
    """All-gather of the ranks' shares of the new weights over the slowest link, one message per weight."""
    return size / (INSIDE if cards <= CARDS_PER_SERVER else outside) + messages * LATENCY


def exposed(sizes: list[int], seconds: list[float], backward: float) -> float:
    """The seconds that DDP needs after the backward pass: a bucket starts once it is filled and the one before is done.

        >>> exposed([1, 1], [2.0, 2.0], backward=2.0)
        3.0
    """
    filled, free = 0, 0.0
    for size, needed in zip(sizes, seconds, strict=True):
        filled += size
        free = max(free, backward * filled / sum(sizes)) + needed
    return free - backward


def bucket_sizes(sizes: list[int]) -> list[list[int]]:
    """The sizes of the weights, grouped into buckets as parallel/gradient_reduction.py does."""
    import torch

    from parallel import gradient_reduction

    return [[weight.numel() for weight in bucket]
            for bucket in gradient_reduction.buckets([torch.empty(size, device="meta") for size in sizes])]


def tensor_sizes(config: str) -> list[int]:
    import torch

    from common.bert_config import BertConfig
    from modeling import BertForPreTraining

    with torch.device("meta"):
        model = BertForPreTraining(BertConfig.from_json_file(ROOT / config))
    return [weight.numel() for weight in model.parameters()]


def relative_speed(phase: Workload) -> float:
    """A card's speed on this model relative to BERT-Large, by the FLOPs per token in the encoder."""
    def flops(config: str) -> float:
        shape = json.loads((ROOT / config).read_text(encoding="utf-8"))
        hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
        weights = layers * (4 * hidden**2 + 2 * hidden * shape["intermediate_size"])
        return 6 * weights + 12 * layers * hidden * phase.length

    return flops("bert_config.json") / flops(phase.config)


def markdown_table(found: dict) -> list[str]:
    """The figures as a Markdown table, times in milliseconds."""
    lines = ["| | cards | sequences a card | compute | all-reduce | weights | LAMB | step | of perfect |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name, figures in found.items():
        for cards, parts in figures["steps"].items():
            times = " | ".join(f"{1000 * parts[part]:,.1f}"
                               for part in ("compute", "all_reduce", "weights", "optimizer", "step"))
            lines.append(f"| {name} | {cards:,} | {parts['sequences_per_card']:g} | {times} | "
                         f"{math.floor(100 * parts['efficiency'] + 0.5)} % |")
    worth = "; ".join(f"{name} {figures['worth_doubling_up_to']:,}" for name, figures in found.items())
    return [*lines, "", f"Twice the cards make a step {GAIN_WORTH_IT} times as fast or more, up to: {worth}."]


if __name__ == "__main__":
    cli.run(main)
