"""Arrays to matplotlib figures: attention maps and training curves. Needs no torch."""

import math
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure  # not pyplot: no display, no global state

LOSS_COLOR, ACCURACY_COLOR = "tab:red", "tab:blue"


def attention_rollout(weights: list[np.ndarray]) -> np.ndarray:
    """How much of each patch reaches the class token through all blocks.

    weights: one (heads, N, N) array a block, in the blocks' order; rows are queries and sum to 1.
    Returns (N-1,): the class token's row of the product of 0.5 A + 0.5 I, A the mean over heads.

    Source: Abnar & Zuidema, "Quantifying Attention Flow in Transformers" (2020), section 3.
    """
    rollout = np.eye(weights[0].shape[-1])
    for attention in weights:
        mixed = 0.5 * attention.mean(axis=0) + 0.5 * np.eye(len(rollout))
        rollout = mixed / mixed.sum(axis=-1, keepdims=True) @ rollout
    return rollout[0, 1:]


def attention_map_figure(attention: np.ndarray, title: str) -> Figure:
    """One head's attention (N, N), queries down, keys across; token 0 is the class token.

    The largest 0.5% of the weights share the brightest color: else a few would darken the rest.
    """
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(attention, interpolation="nearest", vmax=np.quantile(attention, 0.995))
    axes.set(title=title, xlabel="key token (0: class token)", ylabel="query token")
    figure.colorbar(image, label="attention weight", extend="max")
    return figure


def class_token_figure(image: np.ndarray, maps: dict[str, np.ndarray], title: str) -> Figure:
    """The image beside itself under each map of the class token's attention.

    image: (S, S, 3) in [0, 1]. maps: title -> attention to each patch, (N-1,), N-1 a square number.
    Each map has its own color scale, given above it.
    """
    figure = Figure(figsize=(2.1 * (len(maps) + 1), 2.9), layout="constrained")
    first, *others = figure.subplots(1, len(maps) + 1)
    first.imshow(image)
    first.set_title(f"{title}\n")
    edge = len(image) - 0.5
    for axes, (name, patches) in zip(others, maps.items(), strict=True):
        axes.imshow(
            image.mean(axis=-1), cmap="gray", vmin=-0.5, vmax=1
        )  # pale: no shade hides heat
        grid = patches.reshape(math.isqrt(len(patches)), -1)
        extent = (-0.5, edge, edge, -0.5)
        axes.imshow(grid, cmap="inferno", alpha=0.6, interpolation="bilinear", extent=extent)
        axes.set_title(f"{name}\n{100 * grid.min():.2g} to {100 * grid.max():.2g}%")
    for axes in (first, *others):
        axes.set_axis_off()
    figure.supxlabel(
        "the class token's attention to each patch, from the least (dark) to the most (bright)",
        fontsize="medium",
    )
    return figure


def loss_accuracy_figure(steps, loss, accuracy, title: str) -> Figure:
    """Test loss (left axis) and test accuracy (right, given in [0, 1]) over optimizer steps."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    loss_axes = figure.add_subplot()
    accuracy_axes = loss_axes.twinx()
    percent = 100 * np.asarray(accuracy)
    loss_axes.plot(steps, loss, color=LOSS_COLOR, marker=_marker(steps))
    accuracy_axes.plot(steps, percent, color=ACCURACY_COLOR, marker=_marker(steps))
    loss_axes.set(title=title, xlabel="optimizer step")
    loss_axes.set_ylabel("test loss (cross entropy, nats)", color=LOSS_COLOR)
    accuracy_axes.set_ylabel("test accuracy (%)", color=ACCURACY_COLOR)
    loss_axes.tick_params(axis="y", colors=LOSS_COLOR)
    accuracy_axes.tick_params(axis="y", colors=ACCURACY_COLOR)
    for axes in (loss_axes, accuracy_axes):
        axes.spines["top"].set_visible(False)
    loss_axes.grid(axis="x", alpha=0.3)
    return figure


def comparison_figure(curves: list[tuple]) -> Figure:
    """Test accuracy and test loss of several runs over optimizer steps, one color a run.

    curves: (label, steps, loss, accuracy in [0, 1]) of each run.
    """
    figure = Figure(figsize=(10, 4 + 0.1 * len(curves)), layout="constrained")
    accuracy_axes, loss_axes = figure.subplots(1, 2)
    colors = colormaps["tab10"].colors
    if len(curves) > len(colors):
        colors = colormaps["turbo"](np.linspace(0.05, 0.95, len(curves)))
    for color, (label, steps, loss, accuracy) in zip(colors, curves, strict=False):
        style = {"color": color, "linewidth": 1.2, "marker": _marker(steps)}
        accuracy_axes.plot(steps, 100 * np.asarray(accuracy), label=label, **style)
        loss_axes.plot(steps, loss, **style)
    accuracy_axes.set_ylabel("test accuracy (%)")
    loss_axes.set_ylabel("test loss (cross entropy, nats)")
    for axes in (accuracy_axes, loss_axes):
        axes.set_xlabel("optimizer step")
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes `figure` to `path`, making its folder. Returns `path`; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path


def _marker(steps) -> str | None:
    """Marks the points of a short curve: a line through a single one would not be seen."""
    return "." if len(steps) <= 20 else None
