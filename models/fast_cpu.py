"""Layers that are faster on this processor than PyTorch's own, swapped in by `accelerate(model)`.

The model is the same without them, up to rounding and to dropout's random numbers. What is chosen
depends only on the processor's instructions, never on a timing: each start of a run must choose
the same, or resuming would not be exact.
"""

import ctypes
import math
from contextlib import contextmanager, suppress

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models.modeling import Attention, Mlp
from models.norm_layers import GroupNorm

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
DTYPES = (torch.float32, torch.bfloat16)  # what oneDNN is given; few processors have it for fp16
MAX_TOKENS = 256  # up to here two batched products are faster than fused attention in bf16


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

    Parameters, names and hooks stay. Only on a CPU does anything change. `compiled`: the model is
    to be compiled, which does the rest.
    """
    device = next(model.parameters()).device.type
    if device != "cpu":
        return f"PyTorch's layers on {device}"
    _keep_freed_memory()
    swaps, words = {nn.Dropout: FastDropout, GroupNorm: ImageGroupNorm}, "fast dropout"
    if has_bf16_units() and not compiled:
        swaps |= {nn.Linear: OneDnnLinear, Mlp: OneDnnMlp, Attention: Bf16Attention}
        swaps[nn.Conv2d] = PatchConv
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
    "rescalevit::keep_mask", mutates_args=(), tags=[torch.Tag.nondeterministic_seeded]
)
def keep_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """0 with probability p, else 1, independently: x's shape, in bfloat16, on the CPU.

    PyTorch's generator seeds NumPy's. A random byte per element gives p rounded down to a 256th;
    for the rest, each element is also hit a Poisson number of times. As a custom operation this is
    left alone by torch.compile, whose own random numbers take a quarter of a training step.
    """
    seed = torch.empty(2, dtype=torch.int64).random_()
    generator = np.random.Generator(np.random.SFC64(seed.numpy()))
    n, threshold = x.numel(), int(256 * p)
    mask = torch.empty(n, dtype=torch.int16)  # first, or freed words would leave a hole below
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


# Linear layers


def _as_image(x):
    """Rows (..., C) as an image (1, C, rows, 1), channels-last, as they already are in memory."""
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def _as_rows(image, x):
    """The reverse of `_as_image(x)`, for another number of channels."""
    return image.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class _OneDnnLinear(torch.autograd.Function):
    """A linear layer as a 1x1 convolution, which PyTorch has oneDNN compute.

    In one thread it does so only because of the dilation, which has no effect on a 1x1 kernel.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _as_rows(F.conv2d(_as_image(x), weight[:, :, None, None], bias, dilation=2), x)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, half = grad.reshape(-1, grad.shape[-1]), grad.dtype == torch.bfloat16
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
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if half else grad_weight.view_as(weight)
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return _as_rows(grad_x, x) if wanted[0] else None, grad_weight, grad_bias


@contextmanager
def fixed_weights(model):
    """Within it no weight of `model` changes, so layers may keep theirs packed for oneDNN."""
    layers = [m for m in model.modules() if isinstance(m, OneDnn) and m.weight.dtype in DTYPES]
    for layer in layers:
        layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().flatten(1))
    try:
        yield
    finally:
        for layer in layers:
            layer.packed = None


class OneDnn:
    """A layer with `weight` and `bias` that is one product of rows, which oneDNN computes."""

    packed = None  # the packed weight, within fixed_weights

    def takes(self, x):
        in_kind = x.dtype == self.weight.dtype and x.dtype in DTYPES
        return in_kind and not torch.is_autocast_enabled("cpu")

    def product(self, x, gelu=False):
        """(..., in) -> (..., out). Where no gradients are wanted, GELU is part of the product."""
        weight = self.weight.flatten(1)
        if torch.is_grad_enabled():
            y = _OneDnnLinear.apply(x, weight, self.bias)
            return F.gelu(y) if gelu else y
        then = ("gelu", [], "none") if gelu else ("none", [], "")
        weight = weight if self.packed is None else self.packed
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, *then)


class OneDnnLinear(OneDnn, nn.Linear):
    """`nn.Linear` by oneDNN, which adds the bias within the product."""

    def forward(self, x, gelu=False):
        if self.takes(x):
            return self.product(x, gelu)
        y = super().forward(x)
        return F.gelu(y) if gelu else y


class PatchConv(OneDnn, nn.Conv2d):
    """`nn.Conv2d` of adjacent patches, as a product of their pixels, (B, C, S, S) -> (B, D, s, s).

    oneDNN's own convolution takes twice as long for large patches.
    """

    def forward(self, x):
        height, width = self.kernel_size
        options = (self.stride, self.padding, self.dilation, self.groups)
        if options != (self.kernel_size, (0, 0), (1, 1), 1) or not self.takes(x):
            return super().forward(x)
        patches = x.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, C, s, h, s, w)
        rows = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  #              (B, s, s, C h w)
        return self.product(rows).permute(0, 3, 1, 2)


class OneDnnMlp(Mlp):
    def forward(self, x):
        if type(self.fc1) is not OneDnnLinear or self.fc1._forward_hooks:
            return super().forward(x)  # reparametrized, or with hooks
        x = self.dropout(self.fc1(x, gelu=True))
        return self.drop_path(self.dropout(self.fc2(self.inner_norm(x))))


# Norms and attention


class ImageGroupNorm(GroupNorm):
    """The tokens as an image one pixel high: PyTorch's kernel for these is over twice as fast."""

    def forward(self, x):
        return self.layer(x.mT.unsqueeze(2)).squeeze(2).mT


class Bf16Attention(Attention):
    """In bf16 two batched products: faster for few tokens than PyTorch's fused attention."""

    def attend(self, q, k, v):
        if self.vis or self.attn_dropout.p or q.dtype != torch.bfloat16 or k.shape[-2] > MAX_TOKENS:
            return super().attend(q, k, v)
        q, k, v = (t.contiguous() for t in (q, k, v))
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
