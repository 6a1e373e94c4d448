"""What is faster on this processor than PyTorch's own layers, swapped in by `accelerate(model)`.

The model is the same without it, up to rounding and to the numbers that dropout draws. What is
chosen depends on the processor's instructions alone, never on a timing: each start of a run must
choose alike, or resuming would not be exact.
"""

import ctypes
import math
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from models.modeling import Attention, Mlp

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
MAX_TOKENS = 256  # up to here two batched products are faster than PyTorch's fused attention


def has_bf16_units():
    """Whether bf16 products are fast here: AVX-512 with bf16, as PyTorch and oneDNN may use it."""
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.cpu._is_avx512_bf16_supported()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def capability():
    """The kind of processor in words, such as "AVX2" or "AVX512 with bf16"."""
    return torch.backends.cpu.get_cpu_capability() + " with bf16" * has_bf16_units()


def accelerate(model, compiled=False):
    """Swap the layers of `model`, in place; returns what was chosen, in words.

    Parameters, names and hooks stay. Nothing changes on another device than a CPU. `compiled`: the
    model is to be compiled, which does the rest.
    """
    if next(model.parameters()).device.type != "cpu":
        return "PyTorch's layers"
    _keep_freed_memory()
    swaps, words = {nn.Dropout: FastDropout}, "fast dropout"
    if not compiled:
        swaps |= {nn.Conv2d: PatchConv2d, nn.GroupNorm: FastGroupNorm, Attention: FastAttention}
        words += ", patches, GroupNorm and attention"
    if not compiled and has_bf16_units():
        swaps |= {nn.Linear: OneDnnLinear, Mlp: OneDnnMlp}
        words += ", linears by oneDNN"
    for module in model.modules():
        module.__class__ = swaps.get(type(module), type(module))
    return f"{words} ({capability()})"


def _keep_freed_memory():
    """Have glibc keep what PyTorch frees, so that the next step finds its pages mapped."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)


# Dropout


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


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        mask = keep_mask(x, p)
        ctx.save_for_backward(mask)
        ctx.scale = 1 / (1 - p)
        return _Dropout.scaled(x, mask, ctx.scale)

    @staticmethod
    def backward(ctx, grad):
        return _Dropout.scaled(grad, *ctx.saved_tensors, ctx.scale), None

    @staticmethod
    def scaled(x, mask, scale):
        """x * mask * scale in one pass."""
        return torch.addcmul(x.new_zeros(()), x, mask.to(x.dtype), value=scale)


class FastDropout(nn.Dropout):
    """`nn.Dropout` with a faster generator."""

    def forward(self, x):
        if not self.training or not 0 < self.p < 1:
            return super().forward(x)
        return _Dropout.apply(x, self.p)


# Patches and attention


class PatchConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel, as one matrix product over the patches."""

    def forward(self, x):
        P = self.kernel_size[0]
        is_patches = self.kernel_size == self.stride == (P, P) and self.groups == 1
        if not is_patches or self.padding != (0, 0) or self.dilation != (1, 1):
            return super().forward(x)
        x = x.unflatten(-1, (-1, P)).unflatten(-3, (-1, P))  #  (B, C, h, P, w, P)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3)  #           (B, h, w, C P P)
        return F.linear(x, self.weight.flatten(1), self.bias).movedim(-1, 1)


class FastAttention(Attention):
    """For few tokens by two batched products."""

    def attend(self, q, k, v):
        if self.vis or self.attn_dropout.p > 0 or k.shape[-2] > MAX_TOKENS:
            return super().attend(q, k, v)
        q, k, v = (t.contiguous() for t in (q, k, v))
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


# Linear layers


def _as_image(x):
    """Rows (..., C) as an image (1, C, rows, 1), channels-last: what they are in memory already."""
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def _as_rows(image, x):
    """The reverse of `_as_image(x)`, for another number of channels."""
    return image.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class _OneDnnLinear(torch.autograd.Function):
    """A linear layer as a convolution of single pixels, which PyTorch has oneDNN compute.

    In one thread it would not; but a dilation, which means nothing to single pixels, makes it.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _as_rows(F.conv2d(_as_image(x), weight[:, :, None, None], bias, dilation=2), x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, half = grad.flatten(0, -2), grad.dtype == torch.bfloat16
        wanted = [ctx.needs_input_grad[0], not half, False]
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
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
        grad_weight = rows.t() @ x.flatten(0, -2) if half else grad_weight.view_as(weight)
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return _as_rows(grad_x, x) if wanted[0] else None, grad_weight, grad_bias


class OneDnnLinear(nn.Linear):
    """`nn.Linear` by oneDNN, which adds the bias within the product.

    Where no gradients are wanted the weights are first brought into the order that its kernels
    read, and kept so until they change; then GELU can be part of the product too.
    """

    packed, packed_version = None, None

    def forward(self, x, gelu=False):
        in_kind = x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.bfloat16)
        if not in_kind or torch.is_autocast_enabled("cpu"):
            y = super().forward(x)
        elif torch.is_grad_enabled():
            y = _OneDnnLinear.apply(x, self.weight, self.bias)
        else:
            then = ("gelu", [], "none") if gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(x, self._packed(), self.bias, *then)
        return F.gelu(y) if gelu else y

    def _packed(self):
        if self.packed is None or self.packed_version != self.weight._version:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
            self.packed_version = self.weight._version
        return self.packed

    def train(self, mode=True):
        self.packed = None
        return super().train(mode)


class OneDnnMlp(Mlp):
    def forward(self, x):
        x = self.dropout(self.fc1(x, gelu=True))
        return self.dropout(self.fc2(x))


# GroupNorm


class _GroupNorm(torch.autograd.Function):
    """GroupNorm of (B, N, D) in passes over the tokens as they lie, statistics in fp32.

    y = h * weight + bias with h = (x - mean) * rstd, statistics over a group's channels and tokens.
    With g = grad * weight, x's gradient is rstd * (g - mean(g) - h * mean(g * h)).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        weight, bias = weight.view(groups, -1), bias.view(groups, -1)  #    (G, D/G)
        rough = _token_means(x, groups).mean(-1, keepdim=True)  #           (B, G, 1)
        # Most of the mean goes first: a large one would be rounded, and cancel in bf16.
        x = x - _by_channel(rough.expand(-1, -1, weight.shape[1]), x)
        mean = _token_means(x, groups).mean(-1, keepdim=True)  #            of what is left
        square = _token_means(x * x, groups).mean(-1, keepdim=True)
        rstd = (square - mean * mean).clamp(min=0).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd)
        scale = rstd * weight  #                                            (B, G, D/G)
        return torch.addcmul(_by_channel(bias - mean * scale, x), x, _by_channel(scale, x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, mean, rstd = ctx.saved_tensors
        grad_bias = _token_means(grad, len(weight))
        grad_weight = (_token_means(grad * x, len(weight)) - mean * grad_bias) * rstd
        mean_g, mean_gh = ((t * weight).mean(-1, keepdim=True) for t in (grad_bias, grad_weight))
        slope = (-rstd * rstd * mean_gh).expand_as(grad_bias)
        shift = -rstd * mean_g - slope * mean
        grad_x = torch.addcmul(_by_channel(shift, x), grad, _by_channel(rstd * weight, x))
        grad_x.addcmul_(x, _by_channel(slope, x))
        sums = (t.sum(0).mul_(x.shape[1]).flatten() for t in (grad_weight, grad_bias))
        return grad_x, *(t.to(weight.dtype) for t in sums), None, None


def _token_means(x, groups):
    """(B, N, D) to (B, G, D/G), in fp32. Sums in x's own type are several times as fast."""
    return (x.sum(1).float() / x.shape[1]).view(len(x), groups, -1)


def _by_channel(t, x):
    """(B, G, D/G) to (B, 1, D), in x's type."""
    return t.reshape(len(x), 1, -1).to(x.dtype)


class FastGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` of (B, D, N), a view of tokens (B, N, D): no transpose copy."""

    def forward(self, x):
        in_kind = x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.bfloat16)
        if not in_kind:
            return super().forward(x)
        tokens = x.transpose(1, 2)
        return _GroupNorm.apply(tokens, self.weight, self.bias, self.num_groups, self.eps).mT
