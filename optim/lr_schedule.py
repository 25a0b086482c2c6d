"""The learning rate as a pure function of the step: linear warm-up, then one of SCHEDULES.  No torch here."""

import math

COOL_DOWN = 0.2  # of the steps after the warm-up, in which `wsd` falls


def poly(progress: float, left: float) -> float:
    """The published recipe's: it falls from √(1 − warmup_proportion), as if it had begun at step 0."""
    return math.sqrt(max(0.0, 1.0 - progress))


def linear(progress: float, left: float) -> float:
    return left


def cosine(progress: float, left: float) -> float:
    """Half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts)."""
    return 0.5 - 0.5 * math.cos(math.pi * left)


def constant(progress: float, left: float) -> float:
    return 1.0


def wsd(progress: float, left: float) -> float:
    """Warm-up, stable, decay: constant, then down by 1 − √ (Hägele et al. 2024, arXiv 2405.18392)."""
    return 1.0 if left >= COOL_DOWN else 1.0 - math.sqrt(1.0 - left / COOL_DOWN)


SCHEDULES = {schedule.__name__: schedule for schedule in (poly, linear, cosine, constant, wsd)}


def learning_rate(step: int, peak: float, warmup_proportion: float, max_steps: int, schedule: str = "poly") -> float:
    """The rate of step 1, 2, …, max_steps.

    With p = step / max_steps: peak·p/warmup_proportion while p < warmup_proportion.  Then peak times the factor of the
    schedule, a function of p and of the share of the steps after the warm-up that is still to come; `poly` is √(1 − p).

        >>> [round(learning_rate(step, 1.0, 0.5, 4), 3) for step in (1, 2, 3, 4)]
        [0.5, 0.707, 0.5, 0.0]
        >>> [round(learning_rate(step, 1.0, 0.5, 4, "linear"), 3) for step in (1, 2, 3, 4)]
        [0.5, 1.0, 0.5, 0.0]
    """
    progress = step / max_steps
    if progress < warmup_proportion:
        return peak * progress / warmup_proportion
    left = (1.0 - progress) / (1.0 - warmup_proportion) if warmup_proportion < 1.0 else 0.0
    return peak * SCHEDULES[schedule](progress, left)
