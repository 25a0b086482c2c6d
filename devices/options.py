"""What a command asks of the device and of the precision, as plain values.  No torch here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Without one of the first three: CUDA where a GPU is found, else the CPU."""

    use_habana: bool = False
    use_torch_lazy: bool = False
    no_cuda: bool = False
    use_lazy_mode: bool | None = None  # Gaudi's lazy mode; None: --use_lazy_mode was not given
    use_torch_compile: bool = False


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """fp32 unless bf16 (--hmp) or fp16 is set."""

    bf16: bool = False
    fp16: bool = False
    bf16_list: str = ""  # path of a list of ops; "": the device's own choice
    fp32_list: str = ""
    opt_level: str = "O1"  # O2 ignores both lists
    verbose: bool = False  # print the dtypes of each op once
    loss_scale: float = 0.0  # of fp16; 0.0: dynamic
    init_loss_scale: float = 2.0**20  # of a dynamic loss scale
