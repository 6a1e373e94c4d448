"""Foreign weights in, behind --pretrained_dir: Google's .npz, the reference's checkpoints, our own.

Only the names and shapes of `model.state_dict()` matter here: a norm's arrays go wherever the model
has arrays of the same name, so a new norm type needs nothing in this file.
"""

import http.client
import os
import re
import socket
import zipfile
from math import isqrt, prod
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrize import ParametrizationList

from utils.checkpoint import load_checkpoint
from utils.errors import UserError

BASE_URL = "https://storage.googleapis.com/vit_models/imagenet21k"
PUBLISHED = ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14")
TIMEOUT_S = 30  # to connect, and for each read

POSITIONS = "transformer.embeddings.position_embeddings"
BLOCK = re.compile(r"(encoder\.layer\.|encoderblock_)(\d+)")  # in our names, in Google's
# Our names -> Google's: arrays by themselves, modules outside the blocks, modules of a block.
_ARRAYS = {
    POSITIONS: "Transformer/posembed_input/pos_embedding",
    "transformer.embeddings.cls_token": "cls",
}
_MODULES = {
    "transformer.embeddings.patch_embeddings": "embedding",
    "transformer.encoder.encoder_norm": "Transformer/encoder_norm",
    "head": "head",
}
_BLOCK = {
    "attention_norm": "LayerNorm_0",
    "attn.query": "MultiHeadDotProductAttention_1/query",
    "attn.key": "MultiHeadDotProductAttention_1/key",
    "attn.value": "MultiHeadDotProductAttention_1/value",
    "attn.out": "MultiHeadDotProductAttention_1/out",
    "ffn_norm": "LayerNorm_2",
    "ffn.fc1": "MlpBlock_3/Dense_0",
    "ffn.fc2": "MlpBlock_3/Dense_1",
}


def load_pretrained(model, file):
    """Load `file`, in any of the three formats, into `model`; returns the lines to log about it.

    Position embeddings of another grid are resized. A head of another size, or `model.zero_head`,
    makes ours start at zero. Raises `UserError`, and leaves the model as it was.
    """
    file = Path(file)
    arrays, from_google = _read(file)
    state = model.state_dict()
    if from_google:
        names = {key: _google_name(_plain(_weight(key))) or key for key in state}
    else:
        theirs = {_plain(name): name for name in arrays}
        names = {key: theirs.get(_plain(_weight(key)), key) for key in state}
        names |= {key: key for key in state if key in arrays}
    _check_names(file, names, arrays)

    lines, zeros = [], {}
    classes, own_classes = arrays[names["head.bias"]].size, len(state["head.bias"])
    if model.zero_head or classes != own_classes:
        for key in ("head.weight", "head.bias"):
            del arrays[names[key]]
            zeros[key] = torch.zeros_like(state[key])
        lines.append(f"Left out: head of {classes} classes; ours, of {own_classes}, starts at zero")

    new, heads = {}, model.transformer.encoder.layer[0].attn.num_heads
    for key, want in state.items():
        name, shape = names[key], tuple(want.shape)
        if name not in arrays:
            continue
        array = arrays.pop(name)
        if key == POSITIONS and array.ndim == 3 and _side(array.shape[1]):
            shape = (1, array.shape[1], shape[2])  # any square grid will do
        layout = _google_shape(name, shape, heads) if from_google else shape
        array = _checked(file, name, array, layout, want.is_floating_point())
        new[key] = torch.from_numpy(_from_google(array, shape) if from_google else array)

    old, own = _side(new[POSITIONS].shape[1]), _side(state[POSITIONS].shape[1])
    if old != own:
        new[POSITIONS] = _resize_positions(new[POSITIONS], old, own)
        lines.append(f"Resized position embeddings {old}x{old} -> {own}x{own}")
    lines.insert(0, f"Loaded {len(new)} arrays from {file}")
    new |= zeros
    model.load_state_dict(state | new)
    _start_parametrizations(model, new)
    if arrays:
        lines.append(f"Left out, as the model has none such: {_summary(arrays)}")
    if kept := [key for key in state if key not in new]:
        lines.append(f"Kept at their initial values, as the file has none such: {_summary(kept)}")
    return lines


def download(model_type, folder="pretrain"):
    """Path of `folder/{model_type}.npz`, fetched from Google's ViT release unless it is there.

    Raises `UserError` when it can't be had; nothing is left behind then.
    """
    file = Path(folder) / f"{model_type}.npz"
    if file.is_file():
        return file
    if model_type not in PUBLISHED:
        raise UserError(
            f"--pretrained_dir auto: no file is published for {model_type}, only for "
            f"{', '.join(PUBLISHED)}"
        )
    url = f"{BASE_URL}/{file.name}"
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, part)
        if not zipfile.is_zipfile(part):
            raise OSError("what came is not a whole .npz")
        os.replace(part, file)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"--pretrained_dir auto: cannot download {url}: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return file


def _read(file):
    """Arrays of `file` by name, and whether the names and layouts are Google's."""
    if not file.is_file():
        raise UserError(
            f"--pretrained_dir {file}: no such file; --pretrained_dir auto downloads it, or get it "
            f"from Google's ViT release, {BASE_URL}/{{{','.join(PUBLISHED)}}}.npz"
        )
    if not _is_npz(file):
        try:
            weights = load_checkpoint(file)["model"]
        except UserError as error:
            raise UserError(f"--pretrained_dir {error}; nor is it a .npz") from None
        return {name: _to_numpy(file, name, value) for name, value in weights.items()}, False
    arrays, name = {}, "its list of arrays"
    try:
        with np.load(file, allow_pickle=False) as npz:
            for name in npz.files:
                arrays[name] = np.asarray(npz[name])
    except Exception as error:  # a damaged zip fails in a dozen ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        message = f"--pretrained_dir {file}: cannot read {name}, is it damaged? ({reason})"
        raise UserError(message) from None
    return arrays, True


def _is_npz(file):
    """Whether `file` starts as a zip of .npy files does; its end may be missing."""
    with file.open("rb") as stream:
        start = stream.read(1024)
    name_length = int.from_bytes(start[26:28], "little")
    return start[:4] == b"PK\3\4" and start[30 : 30 + name_length].endswith(b".npy")


def _to_numpy(file, name, value):
    """Tensor of a checkpoint as an array, fp32 if it is one of floats."""
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise UserError(f"--pretrained_dir {file}: no state dict, {name!r} is no tensor")
    value = value.detach()
    return (value.float() if value.is_floating_point() else value).numpy()


def _plain(key):
    """Name without the level that BN and GN hold their norms down."""
    return re.sub(r"\.layer\.(?!\d)", ".", key)


def _weight(key):
    """Name of the weight that a parametrization works on, as it is without it."""
    return re.sub(r"\.parametrizations\.(\w+)\.original$", r".\1", key)


def _start_parametrizations(model, loaded):
    """Have those start from their loaded weights, of which the file has the weights alone."""
    for name, module in model.named_modules():
        if isinstance(module, ParametrizationList):
            for number, part in enumerate(module):
                if not any(f"{name}.{number}.{key}" in loaded for key in part.state_dict()):
                    part.start_from(module.original)


def _google_name(key):
    """Google's name of our array, by its plain name; None where Google's ViT has no such array."""
    module, _, kind = key.rpartition(".")
    block = re.fullmatch(r"transformer\.encoder\.layer\.(\d+)\.(.+)", module)
    if block and block[2] in _BLOCK:
        module = f"Transformer/encoderblock_{block[1]}/{_BLOCK[block[2]]}"
    else:
        module = _MODULES.get(module)
    kinds = {"weight": "scale" if "_norm" in key else "kernel", "bias": "bias"}
    return f"{module}/{kinds[kind]}" if module and kind in kinds else _ARRAYS.get(key)


def _google_shape(name, shape, heads):
    """Shape in Google's layout of what has `shape` in ours."""
    if len(shape) == 4:  # OIHW -> HWIO
        return (*shape[2:], shape[1], shape[0])
    if len(shape) == 2:  # (out, in) -> (in, out)
        shape = shape[::-1]
    if name.endswith("/out/kernel"):
        return (heads, shape[0] // heads, shape[1])
    if "Attention" in name and not name.endswith("/out/bias"):
        return (*shape[:-1], heads, shape[-1] // heads)
    return shape


def _from_google(array, shape):
    """Array of Google's layout in ours, of `shape`."""
    if len(shape) == 4:
        return array.transpose(3, 2, 0, 1)
    return array.reshape(shape[::-1]).T if len(shape) == 2 else array.reshape(shape)


def _check_names(file, names, arrays):
    """Raise unless the file has all of a plain ViT, norms for all places or none, no more blocks.

    Norms as a whole may be missing: the file or the model may be without.
    """
    roles = {_role(key) for key, name in names.items() if name in arrays}
    missing = [
        name
        for key, name in names.items()
        if name not in arrays
        and (_role(key) in roles or (_google_name(key) and "_norm." not in key))
    ]
    if missing:
        others = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(
            f"--pretrained_dir {file}: lacks {missing[0]}{others}: is it for another model?"
        )
    depth = 1 + max(map(_block, names))
    for name in arrays:
        if _block(name) >= depth:
            raise UserError(
                f"--pretrained_dir {file}: has {name}, the model only {depth} blocks: "
                "is it for another model?"
            )


def _block(name):
    """Number of the block that an array, of ours or Google's, belongs to; -1 outside of blocks."""
    found = BLOCK.search(name)
    return int(found[2]) if found else -1


def _role(key):
    """`norm.weight` for "transformer.encoder.layer.3.attention_norm.weight": one of many alike."""
    key = re.sub(r"^transformer\.encoder\.(layer\.\d+\.)?", "", _plain(key))
    return re.sub(r"^(attention|ffn|encoder)_norm\.", "norm.", key)


def _checked(file, name, array, shape, floats):
    """`array`, fp32 if it must hold floats. Raises for another shape or kind of numbers."""
    if array.size == prod(shape) == 1:  # a scalar may be () or (1,)
        array = array.reshape(shape)
    if array.shape != shape:
        raise UserError(
            f"--pretrained_dir {file}: {name} is {array.shape}, the model needs {shape}: "
            "is it for another model?"
        )
    if floats and (array.dtype.kind != "f" or array.itemsize > 8):
        raise UserError(
            f"--pretrained_dir {file}: {name} holds {array.dtype}, not float16, float32 or float64"
        )
    return array.astype(np.float32, copy=False) if floats else array


def _summary(names):
    """Names in a line, those of all blocks as one."""
    return ", ".join(dict.fromkeys(BLOCK.sub(r"\1*", name) for name in names))


def _side(tokens):
    """Side of the square grid of patches in `tokens`, less the class token; 0 if it is none."""
    side = isqrt(max(tokens - 1, 0))
    return side if side**2 == tokens - 1 else 0


def _resize_positions(positions, old, new):
    """(1, 1 + old*old, D) -> (1, 1 + new*new, D), bilinear, corner to corner; token 0 stays."""
    grid = positions[:, 1:].unflatten(1, (old, old)).movedim(-1, 1)  # (1, D, old, old)
    grid = F.interpolate(grid, (new, new), mode="bilinear", align_corners=True)
    return torch.cat([positions[:, :1], grid.flatten(2).mT], dim=1)
