"""Factors and shifts that go into the weights of a linear map beside them."""

import numpy as np

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of its pixels
PATCHES = "transformer.embeddings.patch_embeddings"


def fold_gain(weights, module, gain):
    """g (W x + b) as a linear map, in place: diag(g) W and g b. `gain`: one factor a channel."""
    weights[f"{module}.weight"] = gain[:, None] * weights[f"{module}.weight"]
    weights[f"{module}.bias"] = gain * weights[f"{module}.bias"]


def fold_normalization(weights, mean, std):
    """Have the patch embedding take our input, (x - 0.5) / 0.5, where it took (x - mean) / std."""
    mean, std = (np.asarray(values)[:, None, None] for values in (mean, std))
    weight = weights[f"{PATCHES}.weight"]  # (D, 3, patch, patch)
    bias = weights[f"{PATCHES}.bias"] + (weight * ((0.5 - mean) / std)).sum((1, 2, 3))
    weights[f"{PATCHES}.weight"] = (weight * (0.5 / std)).astype(weight.dtype)
    weights[f"{PATCHES}.bias"] = bias.astype(weight.dtype)


def fold_input(weights, module, scale, shift):
    """W (s x + t) + b as a linear map of x, in place: W diag(s) and b + W t; s, t: by channel."""
    weight = weights[f"{module}.weight"]
    weights[f"{module}.bias"] = weights[f"{module}.bias"] + weight @ shift
    weights[f"{module}.weight"] = weight * scale
