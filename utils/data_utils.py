"""Datasets as uint8 tensors on the training device, and their batches made there.

On the device, images are (n, 32, 3, 32), rows x channels x columns. In that layout cropping and
resizing a batch is a batched matrix product for the columns and weighted sums of rows, with nothing
to transpose.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F

from utils.errors import UserError

SIDE = 32  # pixels, both ways, of every stored image
TRAIN_IMAGES = {"cifar10": 50000, "cifar100": 50000, "digits": 1437}
DATASETS = tuple(TRAIN_IMAGES)
CLASSES = {  # in the order of the labels, as the data sets have them
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    "cifar100": """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
        butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
        crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
        keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
        mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
        plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
        skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
        television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split(),
    "digits": list("0123456789"),
}


@dataclass
class Dataset:
    train_images: torch.Tensor  # (n, 3, 32, 32) uint8
    train_labels: torch.Tensor  # (n,) int64
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list


def load_dataset(name, data_dir="data"):
    """`cifar10`, `cifar100` (downloaded to data_dir when absent) or `digits` (scikit-learn's own).

    Raises UserError: damaged or missing files, no network, an unreadable folder.
    """
    if name == "digits":
        return _digits()
    # Imported here: it takes seconds, and mistakes in the flags should be reported at once.
    from torchvision.datasets import CIFAR10, CIFAR100

    cifar = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    folder = Path(data_dir) / cifar.base_folder
    try:
        if not folder.exists():
            print(f"Downloading {cifar.__name__} to {data_dir} ...")
            cifar(data_dir, download=True)
        train, test = cifar(data_dir, train=True), cifar(data_dir, train=False)
    except URLError as error:
        raise UserError(
            f"--dataset {name}: not in --data_dir {data_dir}, and the download failed"
            f" ({error.reason}); put {cifar.base_folder} there, or try --dataset digits"
        ) from None
    except RuntimeError:  # an MD5 sum is wrong
        raise UserError(
            f"--data_dir {data_dir}: {folder} is damaged or incomplete; delete it and it is"
            " downloaded anew"
        ) from None
    except OSError as error:
        raise UserError(f"--data_dir {data_dir}: {str(error).splitlines()[0]}") from None

    def tensors(split):
        images = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor(split.targets)

    return Dataset(*tensors(train), *tensors(test), CLASSES[name])


def hold_out(dataset, n):
    """The dataset with its last n training images in place of the test images."""
    if not n:
        return dataset
    images, labels = dataset.train_images, dataset.train_labels
    return Dataset(images[:-n], labels[:-n], images[-n:], labels[-n:], dataset.classes)


def _digits():
    """1,797 handwritten digits, 8x8 in 17 grays, as 32x32 RGB; every fifth is a test image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)
    images = images.repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = images.unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).long()
    test = torch.arange(len(labels)) % 5 == 0
    return Dataset(images[~test], labels[~test], images[test], labels[test], CLASSES["digits"])


def sample_boxes(n, generator, scale=(0.05, 1.0), ratio=(3 / 4, 4 / 3)):
    """n boxes (n, 4) int64: top, left, height, width in pixels, as RandomResizedCrop draws them.

    Area uniform in `scale`, aspect ratio log-uniform in `ratio`; the first of ten draws that fits
    is used, or the whole image if none fits. Source: torchvision's RandomResizedCrop.get_params.
    """

    def uniform(low, high, shape):
        return torch.rand(shape, dtype=torch.float64, generator=generator) * (high - low) + low

    area = SIDE * SIDE * uniform(*scale, (n, 10))
    aspect = uniform(math.log(ratio[0]), math.log(ratio[1]), (n, 10)).exp()
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (width > 0) & (width <= SIDE) & (height > 0) & (height <= SIDE)
    first = fits.int().argmax(dim=1, keepdim=True)  # 0 where none fits
    none = ~fits.any(dim=1)
    height = height.gather(1, first).squeeze(1).masked_fill(none, SIDE)
    width = width.gather(1, first).squeeze(1).masked_fill(none, SIDE)
    top = (uniform(0, 1, n) * (SIDE - height + 1)).floor()
    left = (uniform(0, 1, n) * (SIDE - width + 1)).floor()
    return torch.stack([top, left, height, width], dim=1).long()


class Resizer:
    """Crop and bilinear resize to (size, size), antialiased when shrinking, pixels to [-1, 1].

    Along one axis a resize is a product with a (size, 32) matrix of triangle weights, and there are
    only 528 spans (start, length): all matrices are made once and looked up. A matrix has few
    weights in each row ("taps", two when enlarging). Along the second axis, where nearly all the
    work is, only these are used: embedding_bag adds up weighted rows.
    """

    def __init__(self, size, device="cpu", dtype=torch.float32):
        self.size, self.dtype = size, dtype
        start, length = torch.triu_indices(SIDE, SIDE)
        length = length - start + 1
        self.matrix_index = torch.zeros(SIDE, SIDE + 1, dtype=torch.long)
        self.matrix_index[start, length] = torch.arange(len(start))
        self.matrix_index = self.matrix_index.to(device)
        self.whole = torch.tensor([[0, 0, SIDE, SIDE]], device=device)
        start, length = start.double().view(-1, 1, 1), length.double().view(-1, 1, 1)
        step = length / size  # input pixels per output pixel
        center = start + (torch.arange(size).view(1, -1, 1) + 0.5) * step
        pixel = torch.arange(SIDE).view(1, 1, -1)
        weights = 1 - (pixel + 0.5 - center).abs() / step.clamp(min=1)
        weights = weights.clamp(min=0) * ((pixel >= start) & (pixel < start + length))
        weights = weights / weights.sum(dim=-1, keepdim=True)
        taps = int((weights != 0).sum(dim=-1).max())
        tap_weights, tap_rows = weights.topk(taps, dim=-1)
        self.weights = weights.to(dtype).to(device)  #          (528, size, 32)
        self.tap_weights = tap_weights.to(dtype).to(device)  #  (528, size, taps)
        self.tap_rows = tap_rows.to(device)

    def __call__(self, images, boxes=None):
        """images (B, 32, 3, 32) uint8, boxes (B, 4) as `sample_boxes` or None for the whole image.

        Returns (B, 3, size, size), a view whose memory is rows x channels x columns.
        """
        B = len(images)
        x = (images.to(torch.float32) * (2 / 255) - 1).to(self.dtype).view(B, SIDE * 3, SIDE)
        if boxes is None:
            boxes = self.whole.expand(B, -1)
        top, left, height, width = boxes.unbind(1)
        vertical, horizontal = self.matrix_index[top, height], self.matrix_index[left, width]
        x = torch.bmm(x, self.weights[horizontal].transpose(1, 2))  # (B, 32 * 3, size)
        image = torch.arange(B, device=images.device).view(-1, 1, 1)
        x = F.embedding_bag(
            (image * SIDE + self.tap_rows[vertical]).flatten(0, 1),  # (B * size, taps)
            x.view(B * SIDE, 3 * self.size),
            per_sample_weights=self.tap_weights[vertical].flatten(0, 1),
            mode="sum",
        )
        return x.view(B, self.size, 3, self.size).transpose(1, 2)


def to_rows(images):
    """(n, 3, 32, 32) -> (n, 32, 3, 32), the stored layout."""
    return images.transpose(1, 2).contiguous()


def resize(images, size, dtype=torch.float32):
    """Test transform: images (B, 3, 32, 32) uint8 to (B, 3, size, size) in [-1, 1]."""
    return Resizer(size, images.device, dtype)(to_rows(images))


class TrainBatches:
    """Training batches by number, each made on the device: `images, targets = batches(i)`.

    Batch i, counted from the start of training, depends only on (seed, i): each epoch's order and
    draws come from generators seeded with (seed, epoch). An epoch's short last batch is used too.
    With several processes a batch has batch_size images for each; process `rank` takes its part.
    `augmentation` is an `Augmentation`.
    """

    def __init__(self, dataset, batch_size, augmentation, seed, device, rank=0, world_size=1):
        self.images = to_rows(dataset.train_images).to(device)
        self.labels = dataset.train_labels.to(device)
        self.batch_size, self.augmentation, self.seed = batch_size, augmentation, seed
        self.rank, self.world_size = rank, world_size
        total, n = batch_size * world_size, len(self.labels)
        # A remainder too small to give each process an image is skipped.
        self.per_epoch = n // total + (n % total >= world_size)
        self.epoch = None

    def _start_epoch(self, epoch):
        seeds = np.random.SeedSequence([self.seed, epoch])
        generator = torch.Generator().manual_seed(int(seeds.generate_state(1)[0]))
        n, device = len(self.labels), self.labels.device
        self.order = torch.randperm(n, generator=generator).to(device)
        draws = self.augmentation.draw(n, generator, np.random.default_rng(seeds))
        self.draws = {name: values.to(device) for name, values in draws.items()}
        self.epoch = epoch

    def indices(self, i):
        """Training-set indices of batch i, for all processes, (b * world_size,)."""
        epoch, place = divmod(i, self.per_epoch)
        if epoch != self.epoch:
            self._start_epoch(epoch)
        total = self.batch_size * self.world_size
        return self.order[place * total : (place + 1) * total]

    def __call__(self, i):
        """Images (b, 3, size, size) in [-1, 1] and targets of batch i, this process's part."""
        chosen = self.indices(i).tensor_split(self.world_size)[self.rank]
        draws = {name: values[chosen] for name, values in self.draws.items()}
        return self.augmentation(self.images[chosen], self.labels[chosen], draws)


class TestBatches:
    """Iterates over this process's part of the test images."""

    __test__ = False  # tells pytest that it is no test case

    def __init__(self, dataset, batch_size, resizer, device, rank=0, world_size=1):
        part = torch.arange(len(dataset.test_labels)).tensor_split(world_size)[rank]
        self.images = to_rows(dataset.test_images[part]).to(device)
        self.labels = dataset.test_labels[part].to(device)
        self.batch_size, self.resizer = batch_size, resizer

    def __len__(self):
        return -(-len(self.labels) // self.batch_size)

    def first(self, count):
        """The first images and labels, as a batch of `count` at most."""
        return self.resizer(self.images[:count]), self.labels[:count]

    def __iter__(self):
        for images, labels in zip(
            self.images.split(self.batch_size), self.labels.split(self.batch_size)
        ):
            yield self.resizer(images), labels
