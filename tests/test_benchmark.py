"""benchmark.py's count of floating-point operations, which shares and costs rest on."""

import pytest
import torch

import benchmark
from models.configs import vit_config
from models.fast_cpu import OneDnnLinear, OneDnnMlp, accelerate
from models.modeling import Mlp, VisionTransformer, build_model
from utils.args import parse_args
from utils.peer_trial import PeerTrial
from utils.trial import CLASSES

SIZES = {  # patch, width, depth, MLP width
    "ViT-Ti_16": (16, 192, 12, 768),
    "ViT-S_16": (16, 384, 12, 1536),
    "ViT-B_16": (16, 768, 12, 3072),
    "ViT-B_32": (32, 768, 12, 3072),
    "ViT-L_16": (16, 1024, 24, 4096),
    "ViT-L_32": (32, 1024, 24, 4096),
    "ViT-H_14": (14, 1280, 32, 5120),
}


def multiply_adds(side, patch, width, depth, mlp, classes=10):
    """Of the patches, and of the whole forward pass of one image. Counted by hand."""
    patches = (side // patch) ** 2
    tokens = patches + 1
    embedding = patches * 3 * patch**2 * width
    block = tokens * (4 * width**2 + 2 * width * mlp) + 2 * tokens**2 * width
    # In the last block keys and values are for all tokens, the rest for the class token alone.
    last = tokens * 2 * width**2 + 2 * tokens * width + 2 * width**2 + 2 * width * mlp
    return embedding, embedding + (depth - 1) * block + last + width * classes


def test_cost():
    """A gradient takes two products for each of the forward pass, but the images need none."""
    rows = {row["row"]: row for row in benchmark.cost_rows()}
    assert rows.keys() == {f"cost, {name}" for name in SIZES}
    for name, sizes in SIZES.items():
        embedding, forward = multiply_adds(224, *sizes)
        training = 2 * (3 * forward - embedding) * 20000 * 128
        evaluation = 2 * forward * 200 * 10000
        row = rows[f"cost, {name}"]
        assert row["training_PFLOP"] == pytest.approx(training / 1e15, rel=0.006)  # 3 digits
        assert row["evaluation_PFLOP"] == pytest.approx(evaluation / 1e15, rel=0.006)


@pytest.mark.parametrize("kernels", ["PyTorch", "chosen here", "oneDNN"])
@pytest.mark.parametrize("side", [16, 68])  # 17 and 290 tokens: products, and fused attention
def test_flops_of_all_kernels(side, kernels):
    """Those that a processor chooses, and those that only another one would."""
    model = VisionTransformer(vit_config(4, 24, 2, 3, 40), side, "LN", 10)
    if kernels != "PyTorch":
        accelerate(model)
    if kernels == "oneDNN":
        swaps = {torch.nn.Linear: OneDnnLinear, Mlp: OneDnnMlp}
        for module in model.modules():
            module.__class__ = swaps.get(type(module), type(module))
    images, labels = torch.randn(2, 3, side, side), torch.tensor([1, 2])
    embedding, forward = multiply_adds(side, 4, 24, 2, 40)
    training = benchmark.flops(lambda: model(images, labels).backward())
    assert training == 2 * 2 * (3 * forward - embedding)
    model.eval()
    with torch.inference_mode():
        assert benchmark.flops(lambda: model(images)) == 2 * 2 * forward


def test_peers_are_of_our_size():
    """The same number of parameters."""
    flags = parse_args("--name x --model_type ViT-Ti_4 --img_size 32 --train_batch_size 1".split())
    with torch.device("meta"):
        ours = build_model(flags, CLASSES)
    count = sum(p.numel() for p in ours.parameters())
    for library in ("timm", "torchvision"):
        peer = PeerTrial(flags, torch.device("cpu"), None, [library])
        assert sum(p.numel() for p in peer.model.parameters()) == count
