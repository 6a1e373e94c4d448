"""Images to tokens: patches or a small convolutional stem, class token, positions.

Shapes: B batch, N tokens (patches, and the class token first), D hidden size.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Embeddings(nn.Module):
    """Images (B, 3, S, S) to tokens (B, N, D): patches, class token if any, position embeddings.

    Raises ValueError when S is no multiple of the patch.
    """

    def __init__(self, config, img_size):
        super().__init__()
        patch = config.patches.size[0]
        if img_size % patch:
            raise ValueError(f"img_size {img_size} is not a multiple of the patch size {patch}")
        dim, side = config.hidden_size, img_size // patch
        self.has_class_token = config.classifier == "token"
        tokens = side**2 + self.has_class_token
        if config.positions == "learned":
            self.position_embeddings = nn.Parameter(torch.zeros(1, tokens, dim))
        else:
            fixed = sincos_positions(side, dim)  #              (1, N, D), 0 for the class token
            fixed = F.pad(fixed, (0, 0, int(self.has_class_token), 0))
            self.register_buffer("position_embeddings", fixed)
        if self.has_class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if config.stem == "patch":
            self.patch_embeddings = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)
        else:
            norm = nn.BatchNorm2d(dim // 2) if config.stem == "conv_bn" else nn.Identity()
            first, second = nn.Conv2d(3, dim // 2, 3, 2, 1), nn.Conv2d(dim // 2, dim, 3, 2, 1)
            self.patch_embeddings = nn.Sequential(first, norm, nn.GELU(), second)
        self.patch_dropout = PatchDropout(config.patch_dropout, self.has_class_token)
        self.dropout = nn.Dropout(config.transformer.dropout_rate)

    def forward(self, x):
        x = self.patch_embeddings(x).flatten(2).transpose(1, 2)  #  (B, patches, D)
        if self.has_class_token:
            class_token = self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1)
            x = torch.cat([class_token, x], dim=1)  #               (B, N, D)
        x = x + self.position_embeddings.to(x.dtype)
        return self.dropout(self.patch_dropout(x))


class PatchDropout(nn.Module):
    """Leaves a random part of the patches out of each training image, (B, N, D) -> (B, n, D).

    At least one patch stays, and the class token always. Source: Liu et al. 2023 (PatchDropout).
    """

    def __init__(self, rate, has_class_token):
        super().__init__()
        self.rate, self.class_tokens = rate, int(has_class_token)
        self.active = True  # train.py switches it off for the last steps

    def forward(self, x):
        if not (self.training and self.rate and self.active):
            return x
        batch, tokens, dim = x.shape
        patches = tokens - self.class_tokens
        order = torch.rand(batch, patches, device=x.device).argsort(dim=1) + self.class_tokens
        kept = order[:, : kept_patches(patches, self.rate)]
        kept = F.pad(kept, (self.class_tokens, 0))  #           (B, n), 0 is the class token
        return x.gather(1, kept[:, :, None].expand(-1, -1, dim))


def kept_patches(patches, rate):
    """How many of an image's patches are kept when patch dropout leaves out `rate` of them."""
    return max(1, round(patches * (1 - rate)))


def sincos_positions(side, dim):
    """Fixed positions (1, side * side, dim) of a square grid. Source: MoCo v3, Chen et al. 2021."""
    frequencies = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) * 4 / dim)
    angles = torch.arange(side)[:, None] * frequencies  #       (side, D/4)
    x = torch.cat([angles.sin(), angles.cos()], dim=1).repeat(side, 1)
    y = torch.cat([angles.sin(), angles.cos()], dim=1).repeat_interleave(side, 0)
    return torch.cat([x, y], dim=1).float()[None]
