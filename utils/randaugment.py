"""RandAugment for batches of uint8 images, each image with ops of its own.

Source: Cubuk et al. 2020, with the ops, magnitudes and arithmetic of torchvision.transforms.v2's
RandAugment (31 magnitudes, nearest pixel, black outside). That one draws once for a whole batch.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from utils.data_utils import SIDE

MOVES = ["Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"]
BLENDS = ["Brightness", "Color", "Contrast", "Sharpness"]
UNSIGNED = ["Posterize", "Solarize", "AutoContrast", "Equalize"]  # no use for the sign
OPS = MOVES + BLENDS + UNSIGNED


class RandAugment:
    """num_ops ops an image, each drawn uniformly from OPS, at `magnitude` (0 to 30) of 30.

    A round applies each op to the images that drew it; a GPU waits once a call, to count them.
    """

    def __init__(self, num_ops=2, magnitude=9):
        def level(first, last):
            return torch.linspace(first, last, 31)[magnitude].item()

        self.num_ops = num_ops
        shear, shift, turn = level(0, 0.3), int(level(0, 150 / 331 * SIDE)), level(0, 30)
        sources = [_sources(s * shear, s * shift, math.radians(s * turn)) for s in (1, -1)]
        self.sources = torch.stack(sources, dim=1)  # (6, 2, 1024): of a move and sign
        self.recolors = [
            partial(blend, factor=1 + s * level(0, 0.9))
            for blend in (_brightness, _color, _contrast, _sharpness)
            for s in (1, -1)
        ]
        bits = 8 - round(magnitude / 7.5)
        self.recolors.append(partial(torch.bitwise_and, other=256 - 2 ** (8 - bits)))
        self.recolors += [partial(_solarize, threshold=255 * level(1, 0)), _autocontrast, _equalize]

    def draw(self, n, rng):
        """Draws for n images from a numpy Generator, (n, num_ops, 2) int64: op, sign (1: minus)."""
        return torch.from_numpy(rng.integers([len(OPS), 2], size=(n, self.num_ops, 2)))

    def __call__(self, images, draws):
        """images (B, 3, 32, 32) uint8, draws (B, num_ops, 2) on one device; returns new images."""
        images = images.clone(memory_format=torch.contiguous_format)
        self.sources = self.sources.to(images.device)
        op, sign = draws.unbind(-1)
        # The groups: identity, the other moves, each blend with each sign, each unsigned op.
        blend, plain = op - len(MOVES), op - len(MOVES) - len(BLENDS)
        group = torch.where(plain < 0, 2 + 2 * blend + sign, 2 + 2 * len(BLENDS) + plain)
        group = torch.where(blend < 0, op.clamp(max=1), group)
        sizes = F.one_hot(group, 2 + len(self.recolors)).sum(0).tolist()
        for r, order in enumerate(group.argsort(0).unbind(1)):
            _, moved, *recolored = order.split(sizes[r])
            source = self.sources[op[moved, r], sign[moved, r]].unsqueeze(1).expand(-1, 3, -1)
            padded = F.pad(images[moved].flatten(2), (1, 0))  # number 0 is black
            images[moved] = padded.gather(2, source).unflatten(2, (SIDE, SIDE))
            for recolor, part in zip(self.recolors, recolored):
                if len(part):
                    images[part] = recolor(images[part])
        return images


def _sources(shear, shift, turn):
    """Of each pixel after each of MOVES, where it was: 1 + row * 32 + column, or 0 for outside.

    (6, 1024) int64. By the same float32 operations as torchvision, so that a point midway between
    two pixels goes to the same one.
    """
    cos, sin, offset = math.cos(turn), math.sin(turn), shear * SIDE / 2
    maps = torch.tensor(  # (x, y) before from (x, y, 1) after, (0, 0) being the image's center
        [
            [[1, 0, 0], [0, 1, 0]],
            [[1, shear, offset], [0, 1, 0]],
            [[1, 0, 0], [shear, 1, offset]],
            [[1, 0, -shift], [0, 1, 0]],
            [[1, 0, 0], [0, 1, -shift]],
            [[cos, -sin, 0], [sin, cos, 0]],
        ]
    )
    x = torch.arange(SIDE) - (SIDE - 1) / 2
    pixels = torch.stack([x.repeat(SIDE), x.repeat_interleave(SIDE), torch.ones(SIDE**2)], dim=1)
    grid = (pixels @ maps.transpose(1, 2) / (SIDE / 2)).view(-1, SIDE, SIDE, 2)
    numbers = torch.arange(1.0, SIDE**2 + 1).view(1, 1, SIDE, SIDE).expand(len(maps), -1, -1, -1)
    return F.grid_sample(numbers, grid, mode="nearest", align_corners=False).flatten(1).long()


def _blend(images, others, factor):
    """images * factor + others * (1 - factor), cut off to uint8, as all results below."""
    return images.mul(factor).add_(others, alpha=1 - factor).clamp_(0, 255).to(torch.uint8)


def _brightness(images, factor):
    return images.mul(factor).clamp_(0, 255).to(torch.uint8)


def _grey(images):
    """(n, 1, 32, 32) whole numbers, in float32."""
    red, green, blue = images.float().split(1, dim=1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _color(images, factor):
    return _blend(images, _grey(images), factor)


def _contrast(images, factor):
    return _blend(images, _grey(images).mean((1, 2, 3), keepdim=True), factor)


def _sharpness(images, factor):
    """Blends with the mean of 3x3 pixels, the center with weight 5; the border stays."""
    x = images.float()
    inner = x[..., 1:-1, 1:-1]
    blurred = ((F.avg_pool2d(x, 3, stride=1) * 9 + inner * 4) / 13).round_()
    inner.add_(blurred - inner, alpha=1 - factor)
    return x.clamp_(0, 255).to(torch.uint8)


def _solarize(images, threshold):
    return torch.where(images >= threshold, ~images, images)


def _autocontrast(images):
    """Stretches each channel to 0..255; one of a single grey stays."""
    x = images.float()
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    scale = ((high - low) * (1 / 255)).masked_fill_(low == high, 1)
    return ((x - low.masked_fill(low == high, 0)) / scale).clamp_(0, 255).to(torch.uint8)


def _equalize(images):
    """Flattens each channel's histogram as PIL; one with < 255 pixels below its brightest stays."""
    pixels = images.flatten(2).long()
    counts = pixels.new_zeros(*pixels.shape[:2], 256)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels))
    brightest = pixels.amax(2, keepdim=True)
    step = (SIDE**2 - counts.gather(2, brightest)) // 255
    below = counts.cumsum(2) - counts
    greys = (below + step // 2) // step.clamp(min=1)
    greys = torch.where(step == 0, torch.arange(256, device=images.device), greys.clamp_(max=255))
    return greys.to(torch.uint8).gather(2, pixels).view_as(images)
