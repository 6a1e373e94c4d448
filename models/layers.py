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
    """0 with probability p, a multiple of 1/65536, else 1: x's shape, in bfloat16, on the CPU.

    16 bits an element from a generator that PyTorch's seeds. As one operation it stays whole under
    torch.compile, whose own random numbers take a quarter of a training step.
    """
    generator = np.random.SFC64(torch.empty(2, dtype=torch.int64).random_().numpy())
    words = np.random.Generator(generator).integers(2**64, size=-(-x.numel() // 4), dtype=np.uint64)
    mask = torch.from_numpy(words.view(np.int16)[: x.numel()]).view(x.shape)
    mask.ge_(int(p * 65536) - 32768)  # 0 or 1
    return mask.mul_(0x3F80).view(torch.bfloat16)  # the bit pattern of its 1


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
    """`nn.Dropout`, several times as fast on a CPU, where p is rounded to multiples of 1/65536."""

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if x.device.type == "cpu" and self.p < 1:
            return _FastDropout.apply(x, round(self.p * 65536) / 65536)
        return F.dropout(x, self.p)


def _as_image(x):
    """Rows (..., C) as an image (1, C, rows, 1), channels-last: what they are in memory already."""
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def _as_rows(image, x):
    """The reverse of `_as_image(x)`, for another number of channels."""
    return image.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class _FastLinear(torch.autograd.Function):
    """A linear layer as a convolution of single pixels, which PyTorch has oneDNN compute.

    In one thread it would not; but a dilation, which means nothing to single pixels, makes it.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _as_rows(F.conv2d(_as_image(x), weight[:, :, None, None], bias, dilation=2), x)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, half = grad.flatten(0, -2), grad.dtype == torch.bfloat16
        wanted = [ctx.needs_input_grad[0], not half, False]
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            *(_as_image(grad), _as_image(x), weight[:, :, None, None]),
            bias_sizes=None,
            stride=(1, 1),
            padding=(0, 0),
            dilation=(2, 2),
            transposed=False,
            output_padding=(0, 0),
            groups=1,
            output_mask=wanted,
        )
        # In half precision the weight's gradient is faster as a plain product.
        of_weight = rows.t() @ x.flatten(0, -2) if half else of_weight.view_as(weight)
        return _as_rows(of_x, x) if wanted[0] else None, of_weight, rows.sum(0)


class Linear(nn.Linear):
    """`nn.Linear`, then GELU where asked, on a CPU by oneDNN: the bias is added in the product.

    Within `packed_weights` GELU is part of it too.
    """

    packing, packed = False, None

    def forward(self, x, gelu=False):
        if torch.compiler.is_compiling() or not _suits_onednn(x, self.weight):
            y = super().forward(x)
        elif self.packing:
            if self.packed is None:
                self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
            then = ("gelu", [], "none") if gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *then)
        else:
            y = _FastLinear.apply(x, self.weight, self.bias)
        return F.gelu(y) if gelu else y


def _suits_onednn(x, weight):
    if x.device.type != "cpu" or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    if x.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


@contextmanager
def packed_weights(model):
    """Within it, weights on a CPU are copied into the order in which oneDNN's kernels read them.

    For evaluation: no gradients flow, and changes of the weights go unnoticed.
    """
    linears = [m for m in model.modules() if isinstance(m, Linear)]
    try:
        for m in linears:
            m.packing = True
        yield
    finally:
        for m in linears:
            m.packing, m.packed = False, None
