"""What the smoke test asks of a card, each part in a process of its own, on one rank or on several:

    python3 scripts/smoke/on_card.py software | all_reduce | dropout
"""

import inspect
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from common import cli
from common.errors import UserError
from devices import gaudi_environment
from devices.options import DeviceOptions, PrecisionOptions
from parallel import rendezvous

DROPOUT, VALUES = 0.1, 1 << 20


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=sorted(PARTS))
    args = parser.parse_args(argv)
    info = rendezvous.rank_info(os.environ)
    rendezvous.set_variables(info, os.environ)
    with gaudi_environment.prepared(DeviceOptions(use_habana=True), PrecisionOptions(), info.local_rank):
        PARTS[args.part]()


def print_software() -> None:
    """Releases, number of cards, and the signatures that this repository relies on."""
    import torch
    import torch.distributed as dist

    from devices.hpu import HpuDevice

    device = HpuDevice(lazy=True)
    print(f"releases: {gaudi_environment.releases()}")
    for name, function in (("torch.save", torch.save), ("torch.distributed.new_group", dist.new_group),
                           ("FusedLamb", device.fused_lamb())):
        print(f"signature: {name}{inspect.signature(function) if function else ': not in this release'}")
    print(f"cards: {device.cards()}")


def check_all_reduce() -> None:
    """On each rank: sum the numbers of all ranks in fp32 and in bf16, the types of the gradients on the wire."""
    import torch
    import torch.distributed as dist

    device = connected()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.full((1000,), rank + 1, dtype=dtype).to(device.torch_device)
        dist.all_reduce(values)
        device.mark_step()
        total = set(values.float().tolist())
        if total != {ranks * (ranks + 1) / 2}:
            raise UserError(f"rank {rank}: the {dtype} sum of 1 to {ranks} is {sorted(total)}")
    print(f"rank {rank} on card {os.environ.get(gaudi_environment.CARD)}: all-reduce is right")
    dist.destroy_process_group()


def check_dropout() -> None:
    """On each rank: dropout keeps the share that it should, the same seed gives the same mask, each rank another."""
    import torch
    import torch.distributed as dist
    from torch.nn import functional as F

    from checkpoint.resume import Phase
    from training.trainer import step_seed

    device = connected()
    rank = dist.get_rank()

    def mask(step: int) -> torch.Tensor:
        device.seed(step_seed(42, Phase(), step, rank))
        kept = F.dropout(torch.ones(VALUES).to(device.torch_device), DROPOUT)
        device.mark_step()
        return (kept.cpu() > 0).float()

    first, again, other = mask(1), mask(1), mask(2)
    share, checksum = first.mean().item(), int((first * torch.arange(VALUES) % 65521).sum().item())
    spread = (DROPOUT * (1 - DROPOUT) / VALUES) ** 0.5
    if abs(share - (1 - DROPOUT)) > 6 * spread:
        raise UserError(f"rank {rank}: dropout of {DROPOUT} keeps {share:.4f}")
    if not torch.equal(first, again) or torch.equal(first, other):
        raise UserError(f"rank {rank}: the mask does not follow from the seed alone")
    print(f"rank {rank}: keep rate {share:.4f}, mask {checksum}")
    dist.destroy_process_group()


def connected():
    """The card of this rank, in the process group of all."""
    import torch.distributed as dist

    from devices.hpu import HpuDevice

    device = HpuDevice(lazy=True)
    device.register_backend()
    dist.init_process_group(device.backend)
    return device


PARTS = {"software": print_software, "all_reduce": check_all_reduce, "dropout": check_dropout}

if __name__ == "__main__":
    cli.run(main)
