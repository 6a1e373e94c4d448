"""The alternatives to compare with: timm's and torchvision's models, and PIL's images."""

from functools import cached_property

import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler
from torchvision import datasets, transforms
from torchvision.models import VisionTransformer

from models.configs import CONFIGS
from utils.trial import CLASSES, random_batch


class PeerTrial:
    """Like a Trial, with timm's or torchvision's model of the size that `flags` give.

    words: the library, and `autocast` or `half` (both in the type `half`), or `compiled`.
    """

    def __init__(self, flags, device, half, words):
        config = CONFIGS[flags.model_type]
        depth, width = config.transformer.num_layers, config.hidden_size
        same = {"patch_size": config.patches.size[0], "num_heads": config.transformer.num_heads}
        same["num_classes"] = CLASSES
        if "torchvision" in words:
            same |= {"image_size": flags.img_size, "num_layers": depth, "hidden_dim": width}
            model = VisionTransformer(**same, mlp_dim=4 * width, dropout=0.1)
        else:
            same |= {"img_size": flags.img_size, "depth": depth, "embed_dim": width}
            model = timm.models.VisionTransformer(**same, pos_drop_rate=0.1, proj_drop_rate=0.1)
        self.dtype = half if "half" in words else torch.float32
        self.flags, self.device, self.model = flags, device, model.to(device, self.dtype)
        self.forward = torch.compile(self.model) if "compiled" in words else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.autocast = torch.autocast(device.type, half, enabled="autocast" in words)
        self.batch = random_batch(flags, device, self.dtype)

    @cached_property
    def data(self):
        """Endless training and test batches, so that no loader's start is timed."""
        size = (self.flags.img_size, self.flags.img_size)
        crop = transforms.RandomResizedCrop(size, scale=(0.05, 1.0))
        return self._batches(True, crop), self._batches(False, transforms.Resize(size))

    def _batches(self, train, resize):
        normalize = transforms.Normalize((0.5,) * 3, (0.5,) * 3)
        transform = transforms.Compose([resize, transforms.ToTensor(), normalize])
        images = datasets.CIFAR10(self.flags.data_dir, train, transform)
        order, size = RandomSampler(images, replacement=True, num_samples=10**9), len(self.batch[1])
        loader = DataLoader(images, size, sampler=order, num_workers=2, prefetch_factor=1)
        return ((x.to(self.device), y.to(self.device)) for x, y in loader)

    def train(self, images, labels):
        self.optimizer.zero_grad()
        with self.autocast:
            loss = F.cross_entropy(self.forward(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    @torch.inference_mode()
    def evaluate(self, batches):
        self.model.eval()
        with self.autocast:
            sum((self.forward(x).argmax(1) == y).sum() for x, y in batches).item()
