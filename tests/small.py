"""Small models and their batches, and a guard, for several test files."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.configs import vit_config
from models.modeling import VisionTransformer
from recipes import reference
from utils.augmentation import Augmentation
from utils.optimizers import make_optimizers

NORMS = ("LN", "BN", "GN", "Rescale")  # the reference's norm types
SIDE, CLASSES = 16, 7  # of the images and of the head


def small_config(patch=8, dim=24, depth=2, heads=3, mlp_dim=40, dropout=0.0, attention_dropout=0.0):
    config = vit_config(patch, dim, depth, heads, mlp_dim)
    config.transformer.dropout_rate = dropout
    config.transformer.attention_dropout_rate = attention_dropout
    return config


def small_model(norm_type="LN", side=SIDE, classes=CLASSES, seed=0, vis=False, **config):
    """A model as it is at the start of training, but for random position embeddings.

    At zero they make tokens alike, and the gradient of LayerNorm so large that fp16 overflows.
    """
    torch.manual_seed(seed)
    model = VisionTransformer(small_config(**config), side, norm_type, classes, vis=vis)
    nn.init.normal_(model.transformer.embeddings.position_embeddings)
    return model


def random_state(model, count=8):
    """A state dict for `model` without special values such as 0 and 1; `count` for all counters."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, tensor in model.state_dict().items():
        value = torch.randn(tensor.shape, generator=generator)
        value *= 0.5 * tensor[0].numel() ** -0.5 if name.endswith("weight") else 0.3
        positive = name.endswith(("running_var", "mean_square", "_scale"))
        if positive or ("norm" in name and name.endswith("weight")):
            value = 1 + 0.1 * value
        elif name.endswith(("count", "num_batches_tracked")):
            value = torch.tensor(count)
        state[name] = value
    return state


def batch(seed=0, size=6, side=SIDE, classes=CLASSES):
    """Images and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, side, side, generator=generator)
    return images, torch.randint(classes, (size,), generator=generator)


def sgd(precision, weight_decay=0.0):
    """The reference recipe's optimizer, for `precision.attach`."""
    return make_optimizers(recipe(weight_decay=weight_decay), precision.named_masters())


def recipe(**entries):
    """The reference recipe, but for these entries."""
    return SimpleNamespace(**{"momentum": 0.9} | reference().to_dict() | entries)


def augmentation(resizer, classes=10, **entries):
    return Augmentation(recipe(**entries), resizer, classes)


class NoSynchronization(TorchDispatchMode):
    """Fails where the host reads a tensor's value, which on a GPU would wait for the device.

    It does not see what happens inside one operation: on a CPU the fused SGD reads its learning
    rate there, while on a GPU its kernel does.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "nonzero"), name
        return func(*args, **(kwargs or {}))
