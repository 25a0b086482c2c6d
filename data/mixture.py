"""Several training sets in one run: which micro-batch of the endless sequence comes from which.  No torch here."""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm

import numpy as np

from common.errors import UserError

FORM = "NAME=DIR:WEIGHT"
PART = re.compile(r"([\w.-]+)=(.+):([0-9.]+)")
LONGEST_PERIOD = 10_000  # micro-batches after which the order of the sources repeats


@dataclass(frozen=True)
class Source:
    """A training set by name; the name is empty where it is the only one."""

    name: str
    folder: str
    weight: Fraction = Fraction(1)


@dataclass(frozen=True)
class Mixture:
    """The order of the sources: at any point each has had its share, to less than one micro-batch.

    `parts`: how many micro-batches of a period each source gets.
    """

    parts: tuple[int, ...] = (1,)

    @classmethod
    def of(cls, sources: list[Source]) -> "Mixture":
        """UserError where the weights are not in the ratio of small whole numbers."""
        denominator = lcm(*(source.weight.denominator for source in sources))
        parts = np.array([int(source.weight * denominator) for source in sources], dtype=object)
        parts //= np.gcd.reduce(parts)
        if parts.sum() > LONGEST_PERIOD:
            raise UserError(f"--input_dir: the weights {', '.join(map(str, parts))} add up to more than "
                            f"{LONGEST_PERIOD}: round them")
        return cls(tuple(int(part) for part in parts))

    @property
    def period(self) -> int:
        return sum(self.parts)

    @cached_property
    def order(self) -> np.ndarray:
        """The source of each micro-batch of a period, so that each has its share at any point, to less than one.

        Tijdeman 1980, The chairman assignment problem: of the sources that are behind by at least 1 / (2n − 2), the one
        that would be ahead too far first.  All numbers here are multiplied by period · (2n − 2).
        """
        count, period = len(self.parts), self.period
        if count == 1:
            return np.zeros(period, np.int64)
        unit = 2 * count - 2
        behind, order = [0] * count, []
        for _ in range(period):
            behind = [owed + part * unit for owed, part in zip(behind, self.parts, strict=True)]
            eligible = [source for source in range(count) if behind[source] >= period]
            chosen = min(eligible, key=lambda source: Fraction(period * unit - period - behind[source],
                                                               self.parts[source]))
            behind[chosen] -= period * unit
            order.append(chosen)
        return np.array(order)

    def source(self, number: int) -> int:
        """The source of a micro-batch."""
        return int(self.order[number % self.period])

    @cached_property
    def counted(self) -> np.ndarray:
        """How many of the first 0, 1, …, period micro-batches each source has.  (period + 1, sources)"""
        chosen = self.order[:, None] == np.arange(len(self.parts))
        return np.concatenate([np.zeros((1, len(self.parts)), np.int64), chosen.cumsum(axis=0)])

    def count(self, source: int, numbers):
        """How many micro-batches of a source there are before each of `numbers`."""
        periods, rest = np.divmod(numbers, self.period)
        return periods * self.parts[source] + self.counted[rest, source]

    def number(self, source: int, own_number: int) -> int:
        """The number in the endless sequence of a source's micro-batch 0, 1, …"""
        periods, rest = divmod(own_number, self.parts[source])
        return periods * self.period + int(np.flatnonzero(self.order == source)[rest])


def is_part(word: str) -> bool:
    """Whether a word of --input_dir is a part of a mixture."""
    return PART.fullmatch(word) is not None


def parse_sources(input_dir: str | list[str]) -> list[Source]:
    """The sources that --input_dir names: one folder, or several as NAME=DIR:WEIGHT, in the order of
    their names.

        >>> parse_sources("/data/packed")
        [Source(name='', folder='/data/packed', weight=Fraction(1, 1))]
        >>> [(source.name, str(source.weight)) for source in parse_sources(["wiki=s3://b/wiki:0.7", "own=own:0.3"])]
        [('own', '3/10'), ('wiki', '7/10')]
    """
    words = [input_dir] if isinstance(input_dir, str) else input_dir
    found = [PART.fullmatch(word) for word in words]
    if len(words) == 1 and not found[0]:
        return [Source("", words[0])]
    sources = []
    for word, match in zip(words, found, strict=True):
        try:
            weight = Fraction(match.group(3)) if match else Fraction(0)
        except ValueError:
            weight = Fraction(0)
        if not weight:
            raise UserError(f"--input_dir {word}: several data sets are given as {FORM}, each with a weight above 0")
        sources.append(Source(match.group(1), match.group(2), weight))
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"--input_dir: two data sets have the name {twice}")
    return sorted(sources, key=lambda source: source.name)
