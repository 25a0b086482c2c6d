"""The learning rate as a pure function of the step: linear warm-up, then down with the square root of what is left."""


def learning_rate(step: int, peak: float, warmup_proportion: float, max_steps: int) -> float:
    """The rate of step 1, 2, …, max_steps.

    With p = step / max_steps: peak·p/warmup_proportion while p < warmup_proportion, then peak·√(1 − p).

        >>> [round(learning_rate(step, 1.0, 0.5, 4), 3) for step in (1, 2, 3, 4)]
        [0.5, 0.707, 0.5, 0.0]
    """
    progress = step / max_steps
    if progress < warmup_proportion:
        return peak * progress / warmup_proportion
    return peak * max(0.0, 1.0 - progress) ** 0.5
