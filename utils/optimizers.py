"""The optimizer that a recipe names, over the parameters of a model by name."""

import re

import torch

MATRIX = re.compile(
    r"transformer\.encoder\.layer\..*\.(attn|ffn)\.\w+\.(\w+\.)?weight(\.original)?"
)
WEIGHT = re.compile(r"(.*\.)?weight(\.original)?")


def make_optimizers(flags, parameters):
    """A list of optimizers, each group with the `factor` on the learning rate that it is to have.

    `parameters` is a dict by name. Weights decay: matrices and kernels alone, unless
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
    """The parameters whose weights decay, and the others, those without a member left out."""
    decays = {
        n: flags.decay_all or bool(WEIGHT.fullmatch(n) and p.ndim > 1)
        for n, p in parameters.items()
    }
    groups = [
        {
            "params": [p for name, p in parameters.items() if decays[name] == decay],
            "weight_decay": flags.weight_decay * decay,
            "factor": factor,
        }
        for decay in (True, False)
    ]
    return [group for group in groups if group["params"]]


class Muon(torch.optim.Muon):
    """PyTorch's Muon, which orthogonalizes all matrices of one shape at once.

    Source: as torch.optim.Muon with adjust_lr_fn="original": momentum as a moving average,
    Nesterov's, five steps of Newton-Schulz, and lr sqrt(max(1, rows/columns)).
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                updates = orthogonalized(self._momentum(group, params), group)
                lr = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates.to(params[0].dtype)), alpha=-lr)

    def _momentum(self, group, params):
        """The gradients with momentum, stacked: (matrices, rows, columns)."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        grads = [p.grad for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        return torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))


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
