"""How the runs in a report were made: data, batch, schedule, speed, software, commands.  No torch here."""

import shlex
from dataclasses import dataclass
from html import escape
from statistics import median

from training.arguments import command_flags
from training.curves import RunCurves
from training.report.inputs import is_number, read_packing
from training.report.markup import bars, columns_table, count, heading, percent, row_picture, section, share_bar

MOST_ROWS = 8  # drawn of a packing


@dataclass(frozen=True)
class LoggedPhase:
    """One phase of a run: the parameters of its last start, and the steps (start, end] that it logged."""

    title: str
    run: RunCurves
    parameters: dict
    start: int
    end: int

    def number(self, *keys: str) -> float | None:
        """A number in the parameters, or in a dictionary there."""
        value = self.parameters
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value if is_number(value) else None

    def texts(self, key: str) -> dict[str, str]:
        values = self.parameters.get(key)
        return {name: str(value) for name, value in values.items()} if isinstance(values, dict) else {}

    def median(self, key: str) -> float | None:
        values = [value for step, value in self.run.curves.get(key, {}).items() if self.start < step <= self.end]
        return median(values) if values else None


def logged_phases_of(run: RunCurves) -> list[LoggedPhase]:
    last = max((step for curve in run.curves.values() for step in curve), default=0)
    by_number = {2 if parameters.get("phase2") else 1: parameters for parameters in run.parameters}
    bounds = {1: (0, min(last, run.phase2_start or last)), 2: (run.phase2_start, last)}
    return [LoggedPhase(f"Phase {number}", run, parameters, *bounds[number])
            for number, parameters in sorted(by_number.items())]


def of_each_run(runs: list[RunCurves], describe) -> list[str]:
    """What `describe` makes of each run's phases, each text once; where there are several runs, below their names."""
    names: dict[str, list[str]] = {}
    for run in runs:
        names.setdefault(describe(logged_phases_of(run)), []).append(run.name)
    return [(heading(", ".join(of_these)) if len(runs) > 1 else "") + part for part, of_these in names.items() if part]


def data_section(runs: list[RunCurves]) -> str:
    return section("Data", *of_each_run(runs, packing_part))


def packing_part(phases: list[LoggedPhase]) -> str:
    packings = {phase.title: read_packing(phase.parameters.get("input_dir")) for phase in phases}
    packings = {title: packing for title, packing in packings.items() if packing}
    pictures = [heading(title) + picture for title, packing in packings.items() if (picture := fill_picture(packing))]
    return columns_table({title: packing_column(packing) for title, packing in packings.items()}) + "".join(pictures)


def packing_column(packing: dict) -> dict[str, str]:
    before, after = real_token_shares(packing)
    values = {
        "Rows": counted(packing.get("new_number_of_samples")),
        "Sequences": counted(packing.get("original_number_of_samples")),
        "Row length": counted(packing.get("max_sequence_length"), "token"),
        "Sequences per row": rounded(packing.get("avg_seq_per_sample"), ".3f"),
        "Real tokens before packing": None if before is None else percent(before),
        "Real tokens after packing": None if after is None else percent(after),
        "[UNK]": None if packing.get("unknown_share") is None else f"{percent(packing['unknown_share'])} of the tokens",
        "Fewest rows possible": counted(packing.get("lower_bound_of_samples")),
        "Packing method": packing["packing_method"],
    }
    return {name: value for name, value in values.items() if value}


def real_token_shares(packing: dict) -> tuple[float | None, float | None]:
    """The share of the tokens that are no padding, before and after packing."""
    sequences, padding, length = (packing.get(key) for key in (
        "original_number_of_samples", "padding_tokens_original_dataset", "max_sequence_length"))
    before = 1 - padding / (sequences * length) if sequences and length and padding is not None else None
    return before, packing.get("packing_efficiency")


def fill_picture(packing: dict) -> str:
    """Bars for the share of real tokens, and the kinds of rows that occur most often."""
    shares = zip(("before packing", "after packing"), real_token_shares(packing), strict=True)
    lines = bars([share_bar(name, share) for name, share in shares if share is not None])
    length = packing.get("max_sequence_length")
    rows = packing["most_frequent_strategies"][:MOST_ROWS]
    if not rows or not length:
        return lines
    return (f'{lines}<p class="note">The most frequent kinds of rows of {count(length)} tokens, and the lengths of '
            f'the sequences in them:</p><div class="rows">{"".join(row_picture(row, length) for row in rows)}</div>')


def settings_section(runs: list[RunCurves]) -> str:
    def table(phases):
        return columns_table({phase.title: {**batch_rows(phase), **schedule_rows(phase), **speed_rows(phase),
                                            **model_rows(phase), **software_rows(phase)} for phase in phases})

    return section("Settings and speed", *of_each_run(runs, table))


def batch_rows(phase: LoggedPhase) -> dict[str, str]:
    """The equation of the batch; for logs without it, the flags."""
    micro_batch, accumulation, per_row = (phase.number("batch_plan", key) for key in (
        "micro_batch_size", "accumulation_steps", "sequences_per_row"))
    cards = phase.number("world_size")
    if None not in (micro_batch, accumulation, per_row, cards):
        return {"Batch": f"{count(micro_batch, 'row')} a micro-batch × {count(accumulation, 'accumulation step')} × "
                         f"{per_row:.4g} sequences a row × {count(cards, 'card')} = "
                         f"{count(micro_batch * accumulation * per_row * cards)} sequences"}
    size, accumulation = phase.number("train_batch_size"), phase.number("gradient_accumulation_steps")
    if None in (size, accumulation):
        return {}
    return {"Batch per card": f"{count(size, 'sequence')}, {count(accumulation, 'accumulation step')} (the flags)"}


def schedule_rows(phase: LoggedPhase) -> dict[str, str]:
    rate, warmup, steps = (phase.number(key) for key in ("learning_rate", "warmup_proportion", "max_steps"))
    rows = {}
    if phase.end > phase.start:
        rows["Steps"] = count(phase.end - phase.start) + (f" of {count(steps)}" if steps else "")
    if rate is not None:
        rows["Learning rate"] = f"{rate:g} at its peak" + "".join(
            f", --{flag} {phase.parameters[flag]}" for flag in ("lr_schedule", "optimizer") if flag in phase.parameters)
    if warmup is not None and steps:
        rows["Warm-up"] = f"{count(warmup * steps, 'step')} ({percent(warmup)})"
    return rows


def speed_rows(phase: LoggedPhase) -> dict[str, str]:
    speed, used = phase.median("sequences_per_second"), phase.median("model_flops_utilization")
    values = {"Throughput": None if speed is None else f"{count(speed) if speed >= 100 else f'{speed:.3g}'} "
                                                       "sequences/s (median)",
              "Share of the device's peak": None if used is None else f"{percent(used)} (median)"}
    return {name: value for name, value in values.items() if value}


def model_rows(phase: LoggedPhase) -> dict[str, str]:
    sizes = (("num_hidden_layers", "layers"), ("hidden_size", "wide"), ("num_attention_heads", "heads"),
             ("vocab_size", "tokens of vocabulary"))
    config = [f"{count(value)} {name}" for key, name in sizes if (value := phase.number("config", key)) is not None]
    rows = {"Model": ", ".join(config)} if config else {}
    for name, text in phase.texts("descriptions").items():
        rows[name.capitalize()] = text.removeprefix(f"{name}: ").removeprefix("--use_torch_compile: ")
    return rows


def software_rows(phase: LoggedPhase) -> dict[str, str]:
    software = [f"{name} {release}" for name, release in phase.texts("software").items() if name != "the device"]
    machine = phase.texts("machine")
    if "cores" in machine:
        machine["cores"] = f"{machine['cores']} cores"
    rows = {"Device": phase.parameters.get("device"), "Software": ", ".join(software),
            "Machine": ", ".join(machine.values())}
    return {name: str(value) for name, value in rows.items() if value}


def commands_section(runs: list[RunCurves]) -> str:
    return section("Commands", *of_each_run(runs, commands_part))


def commands_part(phases: list[LoggedPhase]) -> str:
    """The commands that repeat a run, in their order, each once."""
    commands = {}
    for parameters in phases[0].run.parameters if phases else []:
        flags = command_flags(parameters)
        if flags is not None:
            commands[command_text(flags)] = parameters.get("world_size")
    return "".join((f'<p class="note">On each of {count(cards)} cards, started by the launcher:</p>'
                    if is_number(cards) and cards > 1 else "") + f"<pre>{escape(text)}</pre>"
                   for text, cards in commands.items())


def command_text(flags: list[str]) -> str:
    """A command for a shell, one flag a line."""
    return " \\\n    ".join(["python3 run_pretraining.py", *map(shlex.quote, flags)])


def counted(value, name: str = "") -> str | None:
    return count(value, name) if is_number(value) else None


def rounded(value, form: str) -> str | None:
    return format(value, form) if is_number(value) else None
