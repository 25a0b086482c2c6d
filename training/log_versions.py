"""Logs of the reference scripts and of earlier versions, read as logs of this one.  No torch here.

The reference scripts (Habana's and NVIDIA's) log their flags as the text of a Namespace, the time of a micro-batch and
the rate of one card.  Earlier versions of this repository logged the time of a step and the rate of all cards under the
same names.
"""

import ast

from training.log import read_log

# Flags of the reference scripts that mean the same here; --train_batch_size is not among them, since they log a part
REFERENCE_FLAGS = ("bert_model", "output_dir", "phase2", "phase1_end_step", "resume_from_checkpoint", "learning_rate",
                   "warmup_proportion", "max_steps", "world_size")


def read_current_log(path) -> list[dict]:
    """The lines of a log with the figures under their present names.

    Each start of a run has one "PARAMETER" line, with its flags; other "PARAMETER" lines are left out.
    """
    lines, flags, is_reference = [], {}, False
    for line in read_log(path):
        step, data = line["step"], line["data"]
        if step == "PARAMETER":
            if "output_dir" not in data and "Config" not in data:
                continue
            is_reference = "output_dir" not in data
            flags = reference_flags(data["Config"]) if is_reference else data
            lines.append({"step": step, "data": {name: flags[name] for name in REFERENCE_FLAGS if name in flags}
                          if is_reference else flags})
        else:
            lines.append({"step": step, "data": from_reference(data, flags) if is_reference else
                          from_earlier_version(data)})
    return lines


def reference_flags(config) -> dict:
    """The flags in the text of a Namespace, as far as they are plain values; whole numbers as int.

        >>> reference_flags(["Namespace(max_steps=7038.0, output_dir='out', phase2=False)"])
        {'max_steps': 7038, 'output_dir': 'out', 'phase2': False}
    """
    try:
        call = ast.parse(config[0], mode="eval").body
        found = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords
                 if isinstance(keyword.value, ast.Constant | ast.UnaryOp)}
    except (SyntaxError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return {}
    return {name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in found.items()}


def from_reference(data: dict, flags: dict) -> dict:
    """The figures of a line, with those of a step and of all cards where the flags tell them.

    The line of the last step has only final_loss, which is its average_loss; the summary repeats it.
    """
    data = data | products(data, {"step_time": ("average_training_time_step", flags.get("gradient_accumulation_steps")),
                                  "sequences_per_second": ("average_perf_per_step", flags.get("world_size"))})
    ends_steps = "final_loss" in data and "e2e_train_time" not in data
    return {"average_loss": data["final_loss"], **data} if ends_steps else data


def from_earlier_version(data: dict) -> dict:
    """The figures of a line; those whose names had another meaning get their present names."""
    if "step_mean_loss" in data or "steady_sequences_per_second" in data:
        return data
    new_names = {"step_loss": "step_mean_loss", "average_training_time_step": "step_time",
                 "average_perf_per_step": "sequences_per_second",
                 "training_sequences_per_second": "steady_sequences_per_second"}
    return {new_names.get(name, name): value for name, value in data.items()}


def products(data: dict, factors: dict[str, tuple]) -> dict:
    """name → a figure of the line times a number, for those names whose figure and number are there."""
    return {name: data[figure] * number for name, (figure, number) in factors.items()
            if isinstance(data.get(figure), int | float) and isinstance(number, int) and number > 0}
