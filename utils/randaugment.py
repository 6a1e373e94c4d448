"""RandAugment for batches of uint8 images, with separate ops for each image.

Source: Cubuk et al. 2020. The ops and their magnitudes are those of torchvision's RandAugment,
which draws once for a whole batch.
"""

import torch
import torch.nn.functional as F

from utils.data_utils import SIDE

MAGNITUDES = 31


class RandAugment:
    """num_ops ops per image, each drawn uniformly from torchvision's, at `magnitude` (0 to 30).

    A round applies each op to the images that drew it; counting them waits once for a GPU.
    """

    def __init__(self, num_ops=2, magnitude=9):
        from torchvision.transforms import v2  # slow to import, and seldom needed

        self.num_ops, self.torchvisions = num_ops, v2.RandAugment()
        self.kinds = []  # (name of the op, its magnitude) without and with a minus sign
        for name, (magnitudes, signed) in self.torchvisions._AUGMENTATION_SPACE.items():
            table = magnitudes(MAGNITUDES, SIDE, SIDE)
            value = 0.0 if table is None else float(table[magnitude])
            self.kinds += [(name, value), (name, -value if signed else value)]

    def draw(self, n, rng):
        """Draw for n images from a numpy Generator, (n, num_ops, 2) int64: op, sign (1: minus)."""
        return torch.from_numpy(rng.integers([len(self.kinds) // 2, 2], size=(n, self.num_ops, 2)))

    def __call__(self, images, draws):
        """images (B, 3, 32, 32) uint8, draws (B, num_ops, 2) on one device; returns new images."""
        theirs = self.torchvisions
        images = images.clone(memory_format=torch.contiguous_format)
        kind = 2 * draws[..., 0] + draws[..., 1]  # (B, num_ops)
        sizes = F.one_hot(kind, len(self.kinds)).sum(0).tolist()
        for order, counts in zip(kind.argsort(0).unbind(1), sizes):
            for (name, value), part in zip(self.kinds, order.split(counts)):
                if len(part):
                    images[part] = theirs._apply_image_or_video_transform(
                        images[part], name, value, theirs.interpolation, theirs._fill
                    )
        return images
