import torch

from habana_frameworks import standin

MARKS_PER_GROUP = 4


def mark_step() -> None:
    standin.record("FusedLamb.mark_step")
    if standin.lazy():
        torch._lazy.mark_step()


class FusedLamb(torch.optim.Optimizer):
    """LAMB that clips by the norm of all gradients; a decaying weight of norm 0 has trust 0.

    A step marks steps of its own, four for each group.
    """

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01,
                 amsgrad=False, adam_w_mode=True, grad_averaging=True, set_grad_none=True, max_grad_norm=1.0,
                 use_lamb=False, fused=False, dtype=None):
        if amsgrad:
            raise RuntimeError("FusedLamb does not support the AMSGrad variant.")
        if not isinstance(lr, float) or not isinstance(eps, float) or len(betas) != 2:
            raise TypeError(f"lr {lr!r}, eps {eps!r} and betas {betas!r} must be numbers")
        assert bias_correction and adam_w_mode and grad_averaging and not use_lamb, "not stood in for"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                                  "max_grad_norm": max_grad_norm})
        standin.record("FusedLamb", groups=[len(group["params"]) for group in self.param_groups],
                       weight_decay=[group["weight_decay"] for group in self.param_groups])

    def zero_grad(self) -> None:
        for param in self.params():
            param.grad = None

    def params(self) -> list:
        return [param for group in self.param_groups for param in group["params"]]

    @torch.no_grad()
    def step(self, closure=None) -> None:
        params = [param for param in self.params() if param.grad is not None]
        if any(tensor.device.type != standin.device_type() for param in params for tensor in (param, param.grad)):
            raise RuntimeError("FusedLamb takes HPU tensors only")
        standin.record("FusedLamb.step", dtypes=sorted({str(param.grad.dtype) for param in params}))
        norm = sum((param.grad * param.grad).sum() for param in params).sqrt()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for _ in range(MARKS_PER_GROUP - 1):
                mark_step()
            self.update(group, (norm / group["max_grad_norm"]).clamp(min=1.0))
            mark_step()

    def update(self, group, divisor) -> None:
        (beta1, beta2), step = group["betas"], group["step"]
        rate, weight1, weight2 = (torch.tensor(value).to(divisor.device)  # as tensors: no new graph for a new value
                                  for value in (float(group["lr"]), 1 / (1 - beta1**step), 1 / (1 - beta2**step)))
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state.update(exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
            gradient = param.grad / divisor
            state["exp_avg"].mul_(beta1).add_(gradient * (1 - beta1))
            state["exp_avg_sq"].mul_(beta2).add_(gradient * gradient * (1 - beta2))
            update = state["exp_avg"] * weight1 / ((state["exp_avg_sq"] * weight2).sqrt() + group["eps"])
            if group["weight_decay"]:
                update = update + param * group["weight_decay"]
                update = update * ((param * param).sum() / (update * update).sum()).sqrt()
            param.sub_(update * rate)
