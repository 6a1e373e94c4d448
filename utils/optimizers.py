"""The optimizer that a recipe names, over the parameters of a model by name."""

import re

import torch

MATRIX = re.compile(
    r"transformer\.encoder\.layer\..*\.(attn|ffn)\.\w+\.(\w+\.)?weight(\.original)?"
)
WEIGHT = re.compile(r"(.*\.)?weight(\.original)?")


def make_optimizers(flags, parameters):
    """A list of optimizers. The learning rate of a group is to be multiplied by its `factor`.

    `parameters` is a dict by name. Only matrices and kernels decay, unless
    `flags.decay_all`. Source of Muon: Jordan et al. 2024; AdamW: Loshchilov & Hutter 2019.
    """
    if flags.optimizer == "sgd":
        groups = _groups(flags, parameters)
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=flags.momentum, fused=True)
        for p in parameters.values():  # a skipped first step would leave them uninitialized
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return [optimizer]
    if flags.optimizer == "adamw":
        return [_adamw(flags, parameters)]
    matrices = {name: p for name, p in parameters.items() if is_matrix(name, p)}
    rest = {name: p for name, p in parameters.items() if name not in matrices}
    group = {"params": list(matrices.values()), "factor": 1.0}
    muon = Muon([group], lr=0.0, weight_decay=flags.weight_decay, momentum=flags.momentum)
    return [muon, _adamw(flags, rest, flags.adamw_factor)]


def is_matrix(name, parameter):
    """Whether it is one of the blocks' matrices: those of the attention's and MLP's linears."""
    return bool(MATRIX.fullmatch(name)) and parameter.ndim == 2


def _adamw(flags, parameters, factor=1.0):
    groups = _groups(flags, parameters, factor)
    return torch.optim.AdamW(groups, lr=0.0, betas=flags.betas, fused=True)


def _groups(flags, parameters, factor=1.0):
    """The parameters grouped by weight decay and by the factor of their learning rate."""
    groups = {}
    for name, p in parameters.items():
        decays = flags.decay_all or bool(WEIGHT.fullmatch(name) and p.ndim > 1)
        own = factor * (flags.head_factor if name.startswith("head.") else 1)
        groups.setdefault((not decays, own), []).append(p)
    return [
        {"params": params, "weight_decay": 0.0 if no_decay else flags.weight_decay, "factor": own}
        for (no_decay, own), params in sorted(groups.items(), key=lambda item: item[0])
    ]


class Muon(torch.optim.Muon):
    """PyTorch's Muon, which orthogonalizes all matrices of one shape at once.

    Source: as torch.optim.Muon with adjust_lr_fn="original": momentum as a moving average,
    Nesterov's, five steps of Newton-Schulz, and lr sqrt(max(1, rows/columns)).
    """

    _step_supports_amp_scaling = True  # like PyTorch's fused optimizers, it unscales and skips
    grad_scale = found_inf = None

    @torch.no_grad()
    def step(self, closure=None):
        taken = 1.0 if self.found_inf is None else 1 - self.found_inf  # 0: a skipped step
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for params in shapes.values():
                self._step(params, group, taken)

    def _step(self, params, group, taken):
        """The step of some matrices of one shape, stacked: (matrices, rows, columns)."""
        grads = torch.stack([p.grad for p in params])
        if self.found_inf is not None:
            grads = grads.where(self.found_inf == 0, 0)
        if self.grad_scale is not None:
            grads = grads / self.grad_scale
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        momentum = torch.stack(buffers).lerp(grads, (1 - group["momentum"]) * taken)
        torch._foreach_copy_(buffers, momentum.unbind())
        rows, columns = params[0].shape
        lr = group["lr"] * taken
        updates = orthogonalized(grads.lerp(momentum, group["momentum"]), group)
        updates = updates.to(grads.dtype) * (-lr * max(1, rows / columns) ** 0.5)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, updates.unbind())


def orthogonalized(x, group):
    """x (matrices, rows, columns) with all singular values near 1, by Newton-Schulz steps."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    a, b, c = group["ns_coefficients"]
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
