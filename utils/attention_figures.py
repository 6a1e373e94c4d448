"""Turns attention weights (arrays) into maps over the image and matplotlib figures."""

import math

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no display, no global state


def to_patches(attention: np.ndarray, class_token=True) -> np.ndarray:
    """The class token's attention to the patches, (N-1,); without one the tokens' mean, (N,).

    attention: (N, N), rows are queries.
    """
    return attention[0, 1:] if class_token else attention.mean(axis=0)


def attention_rollout(weights: list[np.ndarray], class_token=True) -> np.ndarray:
    """How much of each patch reaches the class token through all blocks; without one, the mean.

    weights: one (heads, N, N) array a block, in the blocks' order; rows are queries and sum to 1.
    Returns `to_patches` of the product of 0.5 A + 0.5 I, A the mean over heads.

    Source: Abnar & Zuidema, "Quantifying Attention Flow in Transformers" (2020), section 3.
    """
    rollout = np.eye(weights[0].shape[-1])
    for attention in weights:
        mixed = 0.5 * attention.mean(axis=0) + 0.5 * np.eye(len(rollout))
        rollout = mixed / mixed.sum(axis=-1, keepdims=True) @ rollout
    return to_patches(rollout, class_token)


def attention_map_figure(attention: np.ndarray, title: str) -> Figure:
    """One head's attention (N, N), queries down, keys across; token 0 is the class token.

    The largest 0.5% of the weights share the brightest color, or else a few would darken the rest.
    """
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(attention, interpolation="nearest", vmax=np.quantile(attention, 0.995))
    axes.set(title=title, xlabel="key token (0: class token)", ylabel="query token")
    figure.colorbar(image, label="attention weight", extend="max")
    return figure


def patches_figure(image: np.ndarray, maps: dict, title: str, class_token=True) -> Figure:
    """The image, and copies of it under each map of the attention to its patches.

    image: (S, S, 3) in [0, 1]. maps: title -> attention of `to_patches`, a square number of them.
    Each map has its own color scale, given above it. The highest 3 % share the brightest color: a
    few patches without an object draw much attention (Darcet et al. 2023).
    """
    figure = Figure(figsize=(2.1 * (len(maps) + 1), 3.1), layout="constrained")
    first, *others = figure.subplots(1, len(maps) + 1)
    first.imshow(image)
    first.set_title(f"{title}\n")
    edge = len(image) - 0.5
    for axes, (name, patches) in zip(others, maps.items(), strict=True):
        axes.imshow(
            image.mean(axis=-1), cmap="gray", vmin=-0.5, vmax=1
        )  # pale, so as not to hide the map
        grid = patches.reshape(math.isqrt(len(patches)), -1)
        extent = (-0.5, edge, edge, -0.5)
        top = np.quantile(grid, 0.97)
        style = {"cmap": "inferno", "alpha": 0.6, "interpolation": "bilinear"}
        axes.imshow(grid, vmax=top, extent=extent, **style)
        axes.set_title(f"{name}\n{100 * grid.min():.2g} to {100 * top:.2g}%")
    for axes in (first, *others):
        axes.set_axis_off()
    whose = "the class token's" if class_token else "all tokens' mean"
    figure.supxlabel(
        f"{whose} attention to each patch: dark the least, bright the highest 3%",
        fontsize="medium",
    )
    return figure
