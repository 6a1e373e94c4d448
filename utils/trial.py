"""train.py's training without files or logs, for benchmark.py and check_gpu.py."""

from functools import cached_property
from itertools import count

import torch

from models.fast_cpu import accelerate
from models.modeling import build_model
from utils.augmentation import Augmentation
from utils.data_utils import Resizer, TestBatches, TrainBatches, load_dataset
from utils.evaluation import evaluate
from utils.optimizers import make_optimizers
from utils.precision import Precision

CLASSES = 10


def random_batch(flags, device, dtype):
    size, side = flags.train_batch_size, flags.img_size
    images, labels = torch.randn(size, 3, side, side), torch.arange(size) % CLASSES
    return images.to(device, dtype), labels.to(device)


class Trial:
    """The model for `flags`, and a batch. `plain`: with PyTorch's own layers."""

    def __init__(self, flags, device, level="O0", half=None, loss_scale=0.0, plain=False):
        torch.manual_seed(0)
        self.flags, self.device, self.model = flags, device, build_model(flags, CLASSES).to(device)
        self.model.transformer.encoder.grad_checkpointing = flags.grad_checkpointing
        self.precision = Precision(self.model, level, half, loss_scale)
        self.precision.attach(make_optimizers(flags, self.precision.named_masters()))
        self.dtype = self.precision.input_dtype
        if not plain:
            accelerate(self.model, flags.compile)
        self.forward = torch.compile(self.model, dynamic=False) if flags.compile else self.model
        self.batch = random_batch(flags, device, self.dtype)

    @cached_property
    def data(self):
        """Endless training batches of CIFAR-10, and its test batches."""
        dataset, size = load_dataset("cifar10", self.flags.data_dir), self.flags.train_batch_size
        resizer = Resizer(self.flags.img_size, self.device, self.dtype)
        augmentation = Augmentation(self.flags, resizer, CLASSES)
        training = TrainBatches(dataset, size, augmentation, 0, self.device)
        return map(training, count()), TestBatches(dataset, size, resizer, self.device)

    def train(self, images, labels, rate=1e-3, factor=1.0):
        """A step, with its loss multiplied by `factor`."""
        with self.precision.autocast():
            loss = self.forward(images, labels)
        self.precision.backward(loss * factor)
        self.precision.clip(1.0)
        self.precision.update(rate)

    def evaluate(self, batches):
        evaluate(self.forward, batches, self.precision)
