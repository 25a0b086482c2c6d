from habana_frameworks import standin

if standin.release() <= (1, 12):
    from habana_frameworks.torch.hpex import _hmp as hmp  # noqa: F401
