"""What is PyTorch's own, but faster on a CPU; the model is the same without this file."""

import math
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@torch.library.custom_op(
    "rescalevit::keep_mask", mutates_args=(), tags=torch.Tag.nondeterministic_seeded
)
def keep_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """0 with probability p, else 1, independently: x's shape, in bfloat16, on the CPU.

    From a generator that PyTorch's seeds. A byte an element decides to the 256th below p; for the
    rest, further elements are hit, each a Poisson number of times. As one operation it stays whole
    under torch.compile, whose own random numbers take a quarter of a training step.
    """
    seed = torch.empty(2, dtype=torch.int64).random_()
    generator = np.random.Generator(np.random.SFC64(seed.numpy()))
    n, threshold = x.numel(), int(256 * p)
    mask = torch.empty(n, dtype=torch.int16)  # before the words, or they would leave a hole below
    words = generator.integers(2**64, size=-(-n // 8), dtype=np.uint64)
    mask.copy_(torch.from_numpy(words.view(np.uint8)[:n]))
    mask.ge_(threshold).mul_(0x3F80)  # the bit pattern of 1
    hits = generator.poisson(n * math.log((1 - threshold / 256) / (1 - p)))
    mask.index_fill_(0, torch.from_numpy(generator.integers(n, size=hits)), 0)
    return mask.view(torch.bfloat16).view(x.shape)


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
    """`nn.Dropout`, several times as fast on a CPU."""

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if x.device.type == "cpu" and self.p < 1:
            return _FastDropout.apply(x, self.p)
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
        of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return _as_rows(of_x, x) if wanted[0] else None, of_weight, of_bias


def linear(x, weight, bias=None):
    """`F.linear`, on a CPU by oneDNN: the bias is added in the product."""
    if not _suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _FastLinear.apply(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` by `linear`, then GELU where asked.

    Within `packed_weights` GELU is part of the product too.
    """

    packing, packed = False, None

    def forward(self, x, gelu=False):
        if self.packing and _suits_onednn(x, self.weight):
            if self.packed is None:
                self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
            then = ("gelu", [], "none") if gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *then)
        y = linear(x, self.weight, self.bias)
        return F.gelu(y) if gelu else y


def _suits_onednn(x, weight):
    if torch.compiler.is_compiling():
        return False
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


class _FastGroupNorm(torch.autograd.Function):
    """GroupNorm of (B, N, D) in passes over the tokens as they lie, statistics in fp32.

    y = h * weight + bias with h = (x - mean) * rstd, statistics over a group's channels and tokens.
    With g = grad * weight, x's gradient is rstd * (g - mean(g) - h * mean(g * h)).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        weight, bias = weight.view(groups, -1), bias.view(groups, -1)  #    (G, D/G)
        near = _token_means(x, groups).mean(-1, keepdim=True)  #            (B, G, 1)
        # Most of the mean goes first: a large one would be rounded, and cancel in bf16.
        x = x - _by_channel(near.expand(-1, -1, weight.shape[1]), x)
        mean = _token_means(x, groups).mean(-1, keepdim=True)  #            of what is left
        square = _token_means(x * x, groups).mean(-1, keepdim=True)
        rstd = (square - mean * mean).clamp(min=0).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd)
        scale = rstd * weight  #                                            (B, G, D/G)
        return torch.addcmul(_by_channel(bias - mean * scale, x), x, _by_channel(scale, x))

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, rstd = ctx.saved_tensors
        of_bias = _token_means(grad, len(weight))
        of_weight = (_token_means(grad * x, len(weight)) - mean * of_bias) * rstd
        mean_g, mean_gh = ((t * weight).mean(-1, keepdim=True) for t in (of_bias, of_weight))
        slope = (-rstd * rstd * mean_gh).expand_as(of_bias)
        shift = -rstd * mean_g - slope * mean
        of_x = torch.addcmul(_by_channel(shift, x), grad, _by_channel(rstd * weight, x))
        of_x.addcmul_(x, _by_channel(slope, x))
        sums = (t.sum(0).mul_(x.shape[1]).flatten().to(weight.dtype) for t in (of_weight, of_bias))
        return of_x, *sums, None, None


def _token_means(x, groups):
    """(B, N, D) to (B, G, D/G), in fp32. Sums in x's own type are several times as fast."""
    return (x.sum(1).float() / x.shape[1]).view(len(x), groups, -1)


def _by_channel(t, x):
    """(B, G, D/G) to (B, 1, D), in x's type."""
    return t.reshape(len(x), 1, -1).to(x.dtype)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` of tokens (B, N, D), each group over D/G channels and all N tokens."""

    def forward(self, x):
        fast = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
        if fast and x.dtype == self.weight.dtype and not torch.compiler.is_compiling():
            return _FastGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        # Seen as (B, D, N, 1), tokens with their channels together are what PyTorch calls
        # channels-last, which its kernel reads in place: no transpose copy.
        return super().forward(x.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
