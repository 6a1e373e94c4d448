"""Loads weights into a model, for --pretrained_dir. models/weight_files.py reads the files.

Only the names and shapes of `model.state_dict()` matter here: a norm's arrays go wherever the model
has arrays of the same name, so a new norm type needs nothing in this file.
"""

import re
from math import isqrt, prod
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrize import ParametrizationList

from models.google_layout import POSITIONS, from_google, google_name, google_shape
from models.norms import NORM_TYPES
from models.weight_files import read_weights
from utils.errors import UserError

BLOCK = re.compile(r"(encoder\.layer\.|encoderblock_)(\d+)")  # in our names, in Google's
HEAD = ("head.weight", "head.bias")
GAIN = "_gain"  # of a branch, as in LayerScale


def load_pretrained(model, file, position_resize="auto"):
    """Load `file`, of any format, into `model`; returns the lines to log about it.

    Position embeddings of another grid are resized: bilinear or bicubic, as is right for the kind
    of file, or as `position_resize` says. If the file's branches have no gains, ours become 1. Our
    head starts at zero if the file's has another size, or with `model.zero_head`. Raises
    `UserError`, and leaves the model as it was.
    """
    file = Path(file)
    state = model.state_dict()
    weights = read_weights(file, wanted={_plain(key) for key in state})
    arrays = weights.arrays
    if weights.is_google:
        names = {key: google_name(_plain(_weight(key))) or key for key in state}
    else:
        theirs = {_plain(name): name for name in arrays}
        names = {key: theirs.get(_plain(_weight(key)), key) for key in state}
        names |= {key: key for key in state if key in arrays}
    _check_names(file, names, arrays, weights.may_lack_head)

    lines, ours = list(weights.notes), {}
    has_head, own_classes = names["head.bias"] in arrays, len(state["head.bias"])
    classes = arrays[names["head.bias"]].size if has_head else 0
    if model.zero_head or classes != own_classes:
        ours = {key: torch.zeros_like(state[key]) for key in state if _weight(key) in HEAD}
        for key in state:
            if key.startswith("head."):
                arrays.pop(names[key], None)
        theirs = f"Left out: head of {classes} classes" if has_head else "No head in the file"
        lines.append(f"{theirs}; ours, of {own_classes}, starts at zero")
    gains = [key for key in state if key.endswith(GAIN) and names[key] not in arrays]
    if gains:
        ours |= {key: torch.ones_like(state[key]) for key in gains}
        lines.append(f"Set to 1, missing in the file: {_summary(gains)}")

    embeddings = model.transformer.embeddings
    if not isinstance(embeddings.position_embeddings, torch.nn.Parameter):
        ours[POSITIONS] = state.pop(POSITIONS)
        if arrays.pop(names[POSITIONS], None) is not None:
            lines.append("Left out: position embeddings; ours are fixed")
    new, heads = {}, model.transformer.encoder.layer[0].attn.num_heads
    for key, want in state.items():
        name, shape = names[key], tuple(want.shape)
        if name not in arrays:
            continue
        array = arrays.pop(name)
        if key == POSITIONS and array.ndim == 3 and (side := _side(array.shape[1])):
            if not embeddings.has_class_token:
                array = array[:, array.shape[1] - side**2 :]
            shape = (1, side**2 + embeddings.has_class_token, shape[2])  # any square grid will do
        layout = google_shape(name, shape, heads) if weights.is_google else shape
        array = _checked(file, name, array, layout, want.is_floating_point())
        new[key] = torch.from_numpy(from_google(array, shape) if weights.is_google else array)

    if POSITIONS in new:
        old, own = (_side(found[POSITIONS].shape[1]) for found in (new, state))
        if old != own:
            mode = weights.resize if position_resize == "auto" else position_resize
            new[POSITIONS] = _resize_positions(new[POSITIONS], old, own, mode)
            lines.append(
                f"Resized position embeddings {old}x{old} -> {own}x{own}"
                + ", bicubic" * (mode == "bicubic")
            )
    lines.insert(0, f"Loaded {len(new)} arrays from {file}")
    new |= ours
    model.load_state_dict(state | new)
    _start_parametrizations(model, new)
    if arrays:
        lines.append(f"Left out, missing in the model: {_summary(arrays)}")
    if kept := [key for key in state if key not in new]:
        lines.append(f"Kept at their initial values, missing in the file: {_summary(kept)}")
    before, now = weights.norm_type, model.norm_type
    same = before == now or (before == "LN" and NORM_TYPES[now].equals_ln)
    if before and not (same and weights.qk_norm == model.qk_norm):
        before, now = _method(before, weights.qk_norm), _method(now, model.qk_norm)
        lines.append(f"These are weights of {before}: {now} computes something different with them")
    return lines


def _method(norm_type, qk_norm):
    return norm_type if qk_norm == "none" else f"{norm_type} with qk_norm {qk_norm}"


def _plain(key):
    """Name without the extra level `layer` of BN's and GN's norms."""
    return re.sub(r"\.layer\.(?!\d)", ".", key)


def _weight(key):
    """Name of a parametrized weight as it would be without the parametrization."""
    return re.sub(r"\.parametrizations\.(\w+)\.original$", r".\1", key)


def _start_parametrizations(model, loaded):
    """Have parametrizations start from the loaded weights, if the file has only the weights."""
    for name, module in model.named_modules():
        if isinstance(module, ParametrizationList):
            for number, part in enumerate(module):
                if not any(f"{name}.{number}.{key}" in loaded for key in part.state_dict()):
                    part.start_from(module.original)


def _check_names(file, names, arrays, may_lack_head):
    """Raise if the file lacks parts of a plain ViT, or some of the norms, or has too many blocks.

    Norms may be missing altogether: the file or the model may be without.
    """
    roles = {_role(key) for key, name in names.items() if name in arrays}
    missing = [
        name
        for key, name in names.items()
        if name not in arrays
        and not (may_lack_head and _weight(key) in HEAD)
        and (_role(key) in roles or (google_name(key) and "_norm." not in key))
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
    """Names in one line; those that recur in all blocks once."""
    return ", ".join(dict.fromkeys(BLOCK.sub(r"\1*", name) for name in names))


def _side(tokens):
    """Side of the square grid of `tokens`, with or without a class token; 0 if it is no square."""
    side = isqrt(tokens)
    return side if tokens - side**2 in (0, 1) else 0


def _resize_positions(positions, old, new, mode):
    """(1, old*old, D) -> (1, new*new, D); a class token's, the first of one more, stays.

    bilinear: corner to corner, as the reference resizes; bicubic: as DINOv2 and timm do.
    """
    class_token, grid = positions.split([positions.shape[1] - old**2, old**2], dim=1)
    grid = grid.unflatten(1, (old, old)).movedim(-1, 1)  # (1, D, old, old)
    grid = F.interpolate(grid, (new, new), mode=mode, align_corners=mode == "bilinear")
    return torch.cat([class_token, grid.flatten(2).mT], dim=1)
