import torch

from habana_frameworks import standin


def mark_step() -> None:
    standin.record("mark_step")
    if standin.lazy():
        torch._lazy.mark_step()
