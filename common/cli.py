"""What all command lines share: flags and their types, units in text, errors in one line.  No torch here."""

import argparse
import difflib
import errno
import os
import re
import select
import signal
import sys
from contextlib import contextmanager
from dataclasses import fields
from itertools import pairwise

from common.errors import NO_SPACE, UserError

FIRST_NOTICE, LONGEST_NOTICE = 30.0, 600.0  # seconds between two lines about one wait, doubled each time


class ArgumentParser(argparse.ArgumentParser):
    """Takes --train_batch_size and --train-batch-size alike; flags are declared with underscores.

    Abbreviated flags are errors, so that a typing mistake cannot become another flag.
    """

    def __init__(self, **options):
        options.setdefault("formatter_class", HelpFormatter)
        options.setdefault("epilog", "Every flag is also taken with dashes in place of underscores.")
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(map(str, args))
        problem = typing_slip(args)
        if problem:
            self.error(problem)
        words = [with_underscores(word) for word in args]
        self.check_names(words)
        namespace, others = super().parse_known_args(self.with_values(words), namespace)
        self.check_urls(namespace)
        return namespace, others

    def check_urls(self, namespace) -> None:
        """End with one line where a flag that takes no URL got one: it would name a local folder called s3:."""
        for action in self._actions:
            values = getattr(namespace, action.dest, None)
            schemes = URL_SCHEMES.get(action.type, ()) if action.type != free_text else None
            for value in values if isinstance(values, list) else [values]:
                match = SCHEME.match(value) if isinstance(value, str) and schemes is not None else None
                if match and match.group(1) not in schemes:
                    taken = f"only {' and '.join(f'{scheme}://' for scheme in schemes)}" if schemes else "no URL"
                    name = action.option_strings[0] if action.option_strings else action.metavar
                    self.error(f"{name} {value}: this flag takes a path of this machine"
                               f"{' or ' if schemes else ', and '}{taken}")

    def check_names(self, words: list[str]) -> None:
        """End with one line where a flag is unknown; it names the known one that is most like it."""
        for word in words:
            if word == "--":
                return
            flag = word.partition("=")[0]
            if word.startswith("--") and " " not in flag and flag not in self._option_string_actions:
                closest = closest_name(flag, list(self._option_string_actions))
                self.error(f"unrecognized arguments: {word}" + (f": did you mean {closest}?" if closest else ""))

    def with_values(self, words: list[str]) -> list[str]:
        """The words with "=True" at each bare boolean flag that a positional argument, not its value, follows."""
        if all(action.option_strings for action in self._actions):
            return words
        bare = [(action := self._option_string_actions.get(word)) is not None and action.type is boolean
                and action.nargs == "?" and following.strip().lower() not in TRUE + FALSE
                for word, following in pairwise([*words, ""])]
        return [f"{word}=True" if is_bare else word for word, is_bare in zip(words, bare, strict=True)]

    def _print_message(self, message, file=None):
        """Without argparse's disregard of errors, so that run() can tell of them."""
        print(message, end="", file=file or sys.stderr)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions, and shows defaults except None, False and empty ones."""

    def _get_help_string(self, action):
        if action.default in (None, "", False, [], argparse.SUPPRESS) or action.required:
            return action.help
        return super()._get_help_string(action)


def closest_name(flag: str, known: list[str]) -> str | None:
    """The known flag that begins with `flag`, or else that is written most like it; None where none is.

        >>> closest_name("--max_step", ["--max_seq_length", "--max_steps"])
        '--max_steps'
    """
    longer = [name for name in known if name.startswith(flag)]
    return next(iter(longer or difflib.get_close_matches(flag, known, 1)), None)


def with_underscores(word: str) -> str:
    """'--a-b=c-d' becomes '--a_b=c-d'; other words stay as they are."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word[2:].partition("=")
    return "--" + flag.replace("-", "_") + equals + value


def typing_slip(words: list[str]) -> str | None:
    """A blank that a shell splits a command at, or takes into a word, and that nobody meant; None where there is none.

        >>> typing_slip(["--output_dir=", "results"])
        '--output_dir= is followed by a space: write --output_dir=results'
        >>> typing_slip(["--do_train", " --seed=3"])
        'a backslash with a space behind it stands before --seed=3: a backslash may only end a line'
    """
    for number, (word, following) in enumerate(pairwise([*words, ""])):
        if word.strip() == "" and word or word[:1].isspace() and word.lstrip().startswith("--"):
            where = f"before {word.strip() or following}" if word.strip() or following else "at the end"
            return f"a backslash with a space behind it stands {where}: a backslash may only end a line"
        if not word.startswith("--"):
            continue
        if word.endswith("=") and following and not following.startswith("-"):
            return f"{word} is followed by a space: write {word}{following}"
        if "=" not in word and following.startswith("="):
            value = following[1:] or next(iter(words[number + 2:]), "")
            return f"{word} is followed by a space: write {word}={value}"
    return None


TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")


def free_text(text: str) -> str:
    """The type of a flag that is no path: it may look like a URL."""
    return text


def path_or_s3(text: str) -> str:
    """The type of a flag that takes a local path, or one in object storage."""
    return text


def path_or_url(text: str) -> str:
    """The type of a flag that takes a local path, or a URL that is read from."""
    return text


SCHEME = re.compile(r"(?:[\w.-]+=)?([A-Za-z][A-Za-z0-9+.-]*)://")  # also in a part of a mixture: NAME=s3://…:1
URL_SCHEMES = {path_or_s3: ("s3",), path_or_url: ("s3", "http", "https")}  # by the type of the flag


def boolean(text: str) -> bool:
    """The type of a flag that takes true/false, 1/0 or yes/no in any case."""
    word = text.strip().lower()
    if word in TRUE + FALSE:
        return word in TRUE
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false (true/false, 1/0, yes/no)")


# Of a flag that takes such a value, and means True without one
BOOLEAN = {"nargs": "?", "const": True, "type": boolean, "metavar": "BOOL"}


def whole(text: str) -> int:
    """The type of a flag that takes a whole number, also one written as a float: 7038.0, 1e4."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not number.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(number)


def positive_int(text: str) -> int:
    try:
        number = whole(text)
    except argparse.ArgumentTypeError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def positive_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def proportion(text: str) -> float:
    """The type of a flag from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


def format_bytes(count: float) -> str:
    """1234567 → 1.23 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_duration(seconds: float) -> str:
    """93784 → 26 h 3 min, 75 → 1 min 15 s, 0.1234 → 0.123 s."""
    if seconds < 59.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def times_to_tell():
    """When to tell of a wait that has no known end: (seconds to wait on, seconds since it began), again and again."""
    pause = total = FIRST_NOTICE
    while True:
        yield pause, total
        pause = min(2 * pause, LONGEST_NOTICE)
        total += pause


def options_from(args, kind: type, **values):
    """An object of the dataclass `kind`: the fields in `values`, and the others from the flags of the same names."""
    flags = {field.name: getattr(args, field.name) for field in fields(kind) if field.name not in values}
    return kind(**flags, **values)


def run(main) -> None:
    """Run a command, and end this process with its exit code.

    A UserError, and what the system says of a file or disk, becomes one line on stderr and exit code 2, an interrupt
    exit code 130.  Where nobody reads the output any more (`… | head -1`), the command ends without a word, and with
    the exit code of a process that SIGPIPE has ended.
    """
    escape_output()
    try:
        code = flushed(outcome(main))
    except BrokenPipeError:
        if not nobody_reads():
            raise
        discard_output()
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def flushed(code):
    """The same exit code, or that of an error where the output cannot be written."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        return print_error(f"standard output: cannot be written: {error.strerror}")
    return code


def outcome(main):
    """The exit code of a command, after the line that tells of its error."""
    try:
        return main()
    except SystemExit as end:  # argparse's
        return end.code
    except UserError as error:
        return print_error(str(error))
    except KeyboardInterrupt:
        print(f"{sys.argv[0]}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename is None and error.errno not in (*NO_SPACE, errno.ENOENT):  # the latter: no temporary folder
            raise
        return print_error(file_error(error))


def print_error(text: str) -> int:
    """Print the one line of an error that the user can mend; returns its exit code."""
    print(f"{sys.argv[0]}: error: {' '.join(text.split())}", file=sys.stderr)
    return 2


def file_error(error: OSError) -> str:
    """What the system says of a file; below the folder of temporary files also how to choose another."""
    path = os.fsdecode(error.filename or "")
    text = f"{path}: {error.strerror}" if path else error.strerror
    if path.startswith(os.environ.get("TMPDIR", "/tmp")) or "temporary" in text:
        text += " (the environment variable TMPDIR names another folder for temporary files)"
    return text


def escape_output() -> None:
    """Let stdout and stderr show what their encoding lacks as escapes, such as \\u2192, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def nobody_reads() -> bool:
    """Whether the reader of stdout or stderr, a pipe, is gone."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def discard_output() -> None:
    """Let what is written to stdout from now on, and what waits in its buffer, go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


@contextmanager
def sigterm_as_interrupt():
    """In the block, SIGTERM raises KeyboardInterrupt, so that temporary files are removed."""
    def interrupt(signal_number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
