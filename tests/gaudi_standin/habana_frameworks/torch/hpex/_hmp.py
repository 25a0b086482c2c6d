"""hmp, found up to 1.12."""

from contextlib import contextmanager
from pathlib import Path

from habana_frameworks import standin
from habana_frameworks.casts import casts


def convert(*, opt_level="O1", bf16_file_path="", fp32_file_path="", isVerbose=False) -> None:
    assert opt_level in ("O1", "O2")
    standin.record("hmp.convert", opt_level=opt_level, bf16=ops(bf16_file_path), fp32=ops(fp32_file_path),
                   verbose=isVerbose)
    casts.use(ops(bf16_file_path), ops(fp32_file_path))
    casts.on = True  # in the whole process, from here on


def ops(path: str) -> list[str]:
    return Path(path).read_text().split() if path else []


@contextmanager
def disable_casts():
    standin.record("hmp.disable_casts", entered=True)
    with casts.switched(False):
        yield
    standin.record("hmp.disable_casts", entered=False)
