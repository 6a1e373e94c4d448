"""Writes a trained model, from its checkpoint, as a file that other programs load.

    python3 export.py output/NAME_checkpoint.bin                     # for timm
    python3 export.py output/NAME_checkpoint.bin --output NAME.onnx  # for ONNX Runtime and others

A .safetensors file has the weights by timm's names. timm's blocks are x + F(Norm(x)), so it is
for norm types that fold into such blocks without a change of the logits. An .onnx file has the
model itself, of any norm type, from images (B, 3, S, S) in [-1, 1] to logits. The metadata of both
tell the classes' names and what else is needed to use the model.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn
from torch.nn.utils import parametrize

from models.configs import model_config
from models.folding import fold
from models.norm_layers import LayerNorm, RMSNorm
from models.timm_layout import TIMM_NAMES
from utils.checkpoint import load_model, write_file
from utils.data_utils import CLASSES
from utils.errors import UserError, reported

# The norms that folding leaves, and timm's argument for each if JSON can express it
NORM_ARGUMENTS = {LayerNorm: {}, RMSNorm: {"norm_layer": "rmsnorm"}, nn.Identity: {}}


def timm_state(model):
    """The arrays of a folded model by timm's names, in fp32."""
    state, parts = model.float().state_dict(), {}
    for block in range(len(model.transformer.encoder.layer)):
        for ours, theirs in TIMM_NAMES.items():
            for kind in ("", ".weight", ".bias"):
                array = state.pop(ours.replace("*", str(block)) + kind, None)
                if array is not None:
                    parts.setdefault(theirs.replace("*", str(block)) + kind, []).append(array)
    return {name: torch.cat(arrays) for name, arrays in parts.items()}


def timm_arguments(flags, classes, norm):
    """Keyword arguments of timm.models.VisionTransformer, but for a `norm_layer` of Identity."""
    config = model_config(flags)
    blocks, token = config.transformer, config.classifier == "token"
    return {
        "img_size": flags.img_size,
        "patch_size": config.patches.size[0],
        "num_classes": classes,
        "embed_dim": config.hidden_size,
        "depth": blocks.num_layers,
        "num_heads": blocks.num_heads,
        "mlp_ratio": blocks.mlp_dim / config.hidden_size,
        "qk_norm": flags.qk_norm != "none",
        "class_token": token,
        "global_pool": "token" if token else "avg",
        "fc_norm": False,
        **NORM_ARGUMENTS[norm],
    }


def to_safetensors(model, flags, metadata):
    """The .safetensors file as bytes; `metadata` gets how to make timm's model. Folds `model`."""
    norm = fold(model, flags)
    metadata["timm"] = timm_arguments(flags, model.num_classes, norm)
    identity = ", norm_layer=torch.nn.Identity" if norm is nn.Identity else ""
    metadata["model"] = f"timm.models.VisionTransformer(**json.loads(metadata['timm']){identity})"
    return save(timm_state(model), texts(metadata))


class Logits(nn.Module):
    """The model without the attention weights it returns: images (B, 3, S, S) to logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images)[0]


def to_onnx(model, flags, metadata):
    """The .onnx file as bytes, for batches of any size."""
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"an .onnx file needs pip install {' '.join(missing)}")
    images = torch.zeros(2, 3, flags.img_size, flags.img_size)
    program = torch.onnx.export(
        Logits(model).eval(),
        (images,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    proto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # places in the source code, with the names of folders
    for key, value in texts(metadata).items():
        proto.metadata_props.add(key=key, value=value)
    return proto.SerializeToString()


FORMATS = {".safetensors": to_safetensors, ".onnx": to_onnx}


def texts(metadata):
    """Text as it is, all else as JSON."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}


@reported
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    text = "NAME.safetensors or NAME.onnx (the checkpoint's name, with .safetensors)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=text)
    args = parser.parse_args()
    model, flags = load_model(args.checkpoint)
    output = args.output or Path(args.checkpoint).with_suffix(".safetensors")
    if output.suffix not in FORMATS:
        raise UserError(f"--output {output}: its name must end with one of {', '.join(FORMATS)}")
    for module in [m for m in model.eval().modules() if parametrize.is_parametrized(m)]:
        parametrize.remove_parametrizations(module, "weight")  # keeps the weight they compute
    metadata = {
        "model_type": flags.model_type,
        "norm_type": flags.norm_type,
        "classes": CLASSES[flags.dataset],
        "img_size": flags.img_size,
        "mean": [0.5, 0.5, 0.5],  # of each channel, for pixels from 0 to 1
        "std": [0.5, 0.5, 0.5],
    }
    content = FORMATS[output.suffix](model, flags, metadata)
    write_file(output, lambda file: file.write(content))
    print(output)
    if "model" in metadata:
        print(f"loads into {metadata['model']}")


if __name__ == "__main__":
    sys.exit(main())
