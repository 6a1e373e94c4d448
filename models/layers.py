"""Dropout and Linear: PyTorch's own, but faster on a CPU. The model is the same without them."""

from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@torch.library.custom_op(
    "rescalevit::keep_mask", mutates_args=(), tags=torch.Tag.nondeterministic_seeded
)
def keep_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """0 with probability p, a multiple of 1/32768, else 1: x's shape, in bfloat16, on the CPU.

    15 bits an element from a generator that PyTorch's seeds. As one operation it stays whole under
    torch.compile, whose own random numbers take a quarter of a training step.
    """
    generator = np.random.SFC64(torch.empty(2, dtype=torch.int64).random_().numpy())
    words = np.random.Generator(generator).integers(2**64, size=-(-x.numel() // 4), dtype=np.uint64)
    mask = torch.from_numpy(words.view(np.int16)[: x.numel()]).view(x.shape)
    # 0..32767, negative below the threshold, -1 or 0, the bit pattern of bfloat16's 0 or 1
    mask.bitwise_and_(0x7FFF).sub_(int(p * 32768)).bitwise_right_shift_(15)
    return mask.bitwise_not_().bitwise_and_(0x3F80).view(torch.bfloat16)


@keep_mask.register_fake
def _(x, p):
    return torch.empty(x.shape, dtype=torch.bfloat16)


class _FastDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        mask = keep_mask(x, p)
        ctx.save_for_backward(mask)
        ctx.scale = 1 / (1 - p)
        return _FastDropout.scaled(x, mask, ctx.scale)

    @staticmethod
    def backward(ctx, grad):
        return _FastDropout.scaled(grad, *ctx.saved_tensors, ctx.scale), None

    @staticmethod
    def scaled(x, mask, scale):
        """x * mask * scale in one pass."""
        return torch.addcmul(x.new_zeros(()), x, mask.to(x.dtype), value=scale)


class Dropout(nn.Dropout):
    """`nn.Dropout`, several times as fast on a CPU, where p is rounded to multiples of 1/32768."""

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if x.device.type == "cpu" and self.p < 1:
            return _FastDropout.apply(x, round(self.p * 32768) / 32768)
        return F.dropout(x, self.p)


class Linear(nn.Linear):
    """`nn.Linear`, then GELU where asked; within `packed_weights` one kernel does both."""

    packed = None

    def forward(self, x, gelu=False):
        compiling, casting = torch.compiler.is_compiling(), torch.is_autocast_enabled("cpu")
        if compiling or casting or self.packed is None:
            y = super().forward(x)
            return F.gelu(y) if gelu else y
        then = ("gelu", [], "none") if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *then)


@contextmanager
def packed_weights(model):
    """Within it, weights on a CPU lie in the order in which oneDNN's kernels read them.

    For evaluation: no gradients flow, and changes of the weights go unnoticed.
    """
    packable = {torch.float32} if torch.backends.mkldnn.is_available() else set()
    if packable and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packable.add(torch.bfloat16)
    linears = [m for m in model.modules() if isinstance(m, Linear) and m.weight.dtype in packable]
    try:
        for m in linears:
            if m.weight.device.type == "cpu":
                m.packed = torch.ops.mkldnn._reorder_linear_weight(m.weight.detach())
        yield
    finally:
        for m in linears:
            m.packed = None
