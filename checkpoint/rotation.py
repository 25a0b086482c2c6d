"""Which checkpoints of a folder a new one supersedes."""

import re
from collections.abc import Collection

KEPT = 3
STEP_NAME = re.compile(r"ckpt_(\d+)\.pt")


def superseded(steps: list[int], step: int, protected: Collection[int]) -> tuple[list[int], list[int]]:
    """Those to be set aside, which are newer than the new one, and those to be removed, which are older than the
    newest three; never the steps `protected`.

        >>> superseded([5, 10, 15, 20, 30], 20, protected={5})
        ([30], [])
        >>> superseded([5, 10, 15, 20, 25], 25, protected={5})
        ([], [10])
    """
    newer = [one for one in steps if one > step]
    rest = [one for one in steps if one <= step and one not in protected]
    return newer, rest[:-KEPT]
