import torch


class Metric:
    def __init__(self, values):
        self.values = values

    def stats(self) -> list[tuple]:
        return list(self.values().items())


def compilations() -> dict:
    total = torch._lazy.metrics.counter_value("UncachedCompile") or 0
    return {"TotalNumber": total, "TotalTime": 0, "AvgTime": 0}


def fallbacks() -> dict:
    names = [name for name in torch._lazy.metrics.counter_names()
             if name.startswith("aten::") and name != "aten::_local_scalar_dense"]
    return {"TotalNumber": sum(map(torch._lazy.metrics.counter_value, names)), "FallbackOps": " ".join(names)}


METRICS = {"graph_compilation": Metric(compilations), "cpu_fallback": Metric(fallbacks)}


def metric_global(name: str) -> Metric | None:
    return METRICS.get(name)
