"""Op lists for bf16 training: reads, checks and translates them for Gaudi's autocast.  No torch here.

A list is a text file with one op a line, in the names of hmp, Gaudi's first mixed-precision package
(ops_bf16_bert_pt.txt, ops_fp32_bert_pt.txt).  Gaudi's software reads its lists while torch is imported.
"""

from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from devices.options import PrecisionOptions

# Other names of an op → the one used here.  `a / b` is div, so a list with truediv means it too.
SAME_OP = {"truediv": "div", "true_divide": "div", "divide": "div", "itruediv": "idiv", "multiply": "mul",
           "subtract": "sub", "cross_entropy_loss": "cross_entropy", "nll_loss_nd": "nll_loss"}

# The names used here → the aten ops that implement them, where the names differ.
ATEN_NAMES = {"cross_entropy": ("cross_entropy_loss",), "nll_loss": ("nll_loss", "nll_loss_nd"),
              "div": ("div", "true_divide")}

IN_PLACE = {"iadd", "isub", "imul", "idiv", "ipow"}  # never cast; Gaudi's autocast has no such names

# The default lists of Gaudi's autocast.
AUTOCAST_BF16 = frozenset({
    "addmm", "addbmm", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "dot", "dropout", "group_norm", "layer_norm",
    "leaky_relu", "linear", "log_softmax", "matmul", "mean", "mm", "mul", "mv", "scaled_dot_product_attention",
    "softmax"})
AUTOCAST_FP32 = frozenset({"cross_entropy", "div", "embedding", "exp", "log", "nll_loss", "pow", "rsqrt"})


@dataclass(frozen=True)
class OpLists:
    """The ops that run in bf16 and those that run in fp32; no op is in both."""

    bf16: frozenset[str] = AUTOCAST_BF16
    fp32: frozenset[str] = AUTOCAST_FP32


def read_lists(precision: PrecisionOptions) -> OpLists | None:
    """The lists that --hmp_bf16 and --hmp_fp32 name; None where neither is given or the opt level ignores them.

    Where only one is given, the other is Gaudi's default without the ops of the given one.
    """
    if precision.opt_level == "O2" or not (precision.bf16_list or precision.fp32_list):
        return None
    bf16 = read_list(precision.bf16_list, "--hmp_bf16") if precision.bf16_list else None
    fp32 = read_list(precision.fp32_list, "--hmp_fp32") if precision.fp32_list else None
    both = sorted((bf16 or frozenset()) & (fp32 or frozenset()))
    if both:
        raise UserError(f"--hmp_bf16 {precision.bf16_list} and --hmp_fp32 {precision.fp32_list} both list "
                        f"{', '.join(both)}")
    return OpLists(AUTOCAST_BF16 - fp32 if bf16 is None else bf16, AUTOCAST_FP32 - bf16 if fp32 is None else fp32)


def read_list(path, flag: str) -> frozenset[str]:
    """The ops of a list file in the names used here.  UserError where it cannot be read or a line is not one word."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{flag} {path}: not a text file") from None
    for number, line in enumerate(lines, start=1):
        if len(line.split()) != 1:
            raise UserError(f"{flag} {path}: line {number} is {line[:50]!r}, not the name of one op")
    names = [line.strip() for line in lines]
    return frozenset(SAME_OP.get(name, name) for name in names)


def aten_names(ops) -> list[str]:
    """The names of these ops in Gaudi's autocast.

        >>> aten_names({"cross_entropy", "iadd", "mm"})
        ['cross_entropy_loss', 'mm']
    """
    return sorted(name for op in ops - IN_PLACE for name in ATEN_NAMES.get(op, (op,)))
