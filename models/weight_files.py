"""Reads the weight files that --pretrained_dir takes, each kind into arrays by name.

Google's `.npz`; checkpoints of ours and of the reference; timm's and DINOv2's, `.safetensors` or
`.pth`. Nothing in a file is executed: no pickles in a `.npz`, only tensors from the others.
"""

import json
from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors import safe_open

from models.download import DOWNLOADABLE
from models.google_layout import RESIZE
from models.norms import NORM_TYPES
from models.timm_layout import IMAGENET, fold_normalization, from_timm, is_timm
from utils.checkpoint import load_checkpoint
from utils.errors import UserError


@dataclass
class WeightFile:
    """What a file holds, and how to interpret it."""

    arrays: dict  # NumPy arrays by name
    norm_type: str | None = "LN"  # of the model that they are for; None if it is not known
    qk_norm: str = "none"
    is_google: bool = False  # names and layouts are Google's; else they are ours
    resize: str = "bilinear"  # of its position embeddings, to another grid
    may_lack_head: bool = False
    notes: list = field(default_factory=list)  # lines to log


def read_weights(file, wanted):
    """The `WeightFile` in `file`, for a model of ours with arrays of these names.

    Raises UserError.
    """
    if not file.is_file():
        raise UserError(
            f"--pretrained_dir {file}: no such file; --pretrained_dir auto gets it for"
            f" {', '.join(DOWNLOADABLE)}"
        )
    try:
        values, metadata = _read(file)
    except UserError as error:
        raise UserError(f"--pretrained_dir {error}") from None
    except Exception as error:  # a damaged file fails in a dozen ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        message = f"--pretrained_dir {file}: cannot be read, is it damaged? ({reason})"
        raise UserError(message) from None
    arrays = {name: _to_numpy(file, name, value) for name, value in values.items()}
    if file.suffix == ".npz":
        resize = str(arrays.pop(RESIZE, "bilinear"))
        may_lack_head = resize == "bicubic"
        return WeightFile(arrays, is_google=True, resize=resize, may_lack_head=may_lack_head)
    if not is_timm(arrays):
        return WeightFile(arrays, metadata.get("norm_type"), metadata.get("qk_norm", "none"))
    norm_type = metadata.get("norm_type", "LN")  # an export of ours says which it was
    if norm_type in NORM_TYPES and NORM_TYPES[norm_type].equals_ln:
        norm_type = "LN"  # its gains are folded
    normalization = _normalization(file, arrays, metadata)
    try:
        arrays = from_timm(arrays, wanted)
        notes = []
        if normalization:
            fold_normalization(arrays, *normalization)
        else:
            notes = ["The file does not say how its input was normalized: taken to be as ours"]
    except (ValueError, KeyError, IndexError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"--pretrained_dir {file}: {reason}") from None
    return WeightFile(arrays, norm_type, resize="bicubic", may_lack_head=True, notes=notes)


def _read(file):
    """Its arrays or tensors by name, and the metadata of a .safetensors or the flags of our run."""
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as npz:
            return {name: np.asarray(npz[name]) for name in npz.files}, {}
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            return tensors, opened.metadata() or {}
    content = load_checkpoint(file)
    weights, flags = content["model"], content.get("flags")
    inner = weights.get("state_dict")  # where some files keep them
    return inner if isinstance(inner, dict) else weights, flags or {}


def _to_numpy(file, name, value):
    """An array as it is, a tensor as an array, in fp32 if it holds floats."""
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise UserError(f"--pretrained_dir {file}: no state dict, {name!r} is no tensor")
    value = value.detach()
    return (value.float() if value.is_floating_point() else value).numpy()


def _normalization(file, arrays, metadata):
    """Mean and deviation that the file's model subtracts and divides by; None if it is unknown.

    From the metadata, or the config.json that timm publishes beside a file, or else DINOv2's.
    """
    config = file.with_name("config.json")
    try:
        if "mean" in metadata:
            return json.loads(metadata["mean"]), json.loads(metadata["std"])
        if config.is_file():
            described = json.loads(config.read_text())
            described = described.get("pretrained_cfg", described)
            return described["mean"], described["std"]
    except (ValueError, KeyError, TypeError, OSError):
        pass  # treated as missing
    return IMAGENET if "mask_token" in arrays else None
