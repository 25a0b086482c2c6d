"""Stand-in (see ../README.md).  PyTorch calls autoload() as `import torch` ends."""

import os

from habana_frameworks import standin


def autoload() -> None:
    """From 1.18 on `import torch` loads the plugin by itself, except in lazy mode."""
    standin.record("import torch", **standin.environment())
    if standin.release() >= (1, 18) and not standin.lazy():
        import habana_frameworks.torch  # noqa: F401


if os.environ.get("PT_HPU_LAZY_MODE", "1") not in ("0", "1"):
    raise RuntimeError(f"PT_HPU_LAZY_MODE={os.environ['PT_HPU_LAZY_MODE']}: no such mode")
