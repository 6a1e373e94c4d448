"""benchmark.py's count of floating-point operations, which shares and costs rest on."""

import json
import subprocess
import sys

import pytest
from programs import ROOT

SIZES = {  # patch, width, depth, MLP width
    "ViT-Ti_16": (16, 192, 12, 768),
    "ViT-S_16": (16, 384, 12, 1536),
    "ViT-B_16": (16, 768, 12, 3072),
    "ViT-B_32": (32, 768, 12, 3072),
    "ViT-L_16": (16, 1024, 24, 4096),
    "ViT-L_32": (32, 1024, 24, 4096),
    "ViT-H_14": (14, 1280, 32, 5120),
}


def multiply_adds(patch, width, depth, mlp):
    """Of the patches, and of the whole forward pass of one image at 224x224 with 10 classes."""
    patches = (224 // patch) ** 2
    tokens = patches + 1
    embedding = patches * 3 * patch**2 * width
    block = tokens * (4 * width**2 + 2 * width * mlp) + 2 * tokens**2 * width
    # In the last one only the class token asks, and is worked on after that.
    last = tokens * 3 * width**2 + 2 * tokens * width + width**2 + 2 * width * mlp
    return embedding, embedding + (depth - 1) * block + last + width * 10


def test_cost(tmp_path):
    """Truth: products counted by hand; a gradient takes two for each, but images need none."""
    command = [sys.executable, ROOT / "benchmark.py", "--rows", "cost", "--json", "cost.json"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    rows = {row["row"]: row for row in json.loads((tmp_path / "cost.json").read_text())}
    assert rows.keys() == {f"cost, {name}" for name in SIZES}
    for name, sizes in SIZES.items():
        embedding, forward = multiply_adds(*sizes)
        training = 2 * (3 * forward - embedding) * 20000 * 128
        evaluation = 2 * forward * 200 * 10000
        row = rows[f"cost, {name}"]
        assert row["training_PFLOP"] == pytest.approx(training / 1e15, rel=0.006)  # 3 digits
        assert row["evaluation_PFLOP"] == pytest.approx(evaluation / 1e15, rel=0.006)
