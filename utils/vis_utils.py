"""Arrays to matplotlib figures: attention maps, training curves, results. Needs no torch."""

import math
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure  # not pyplot: no display, no global state
from matplotlib.image import imread

from utils.errors import UserError

LOSS_COLOR, ACCURACY_COLOR = "tab:red", "tab:blue"
# Told apart by the color-blind too. Source: Wong 2011 (Nature Methods 8, 441), without the yellow.
SAFE_COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
BLUE, VERMILION = SAFE_COLORS[4:6]
MARKERS = "osv^DPX*"
SIGNAL_LABELS = {
    "activation_rms": "RMS of the block's output",
    "grad_norm": "norm of the block's gradients",
    "attention_entropy": "entropy of the attention (nats)",
    "effective_rank": "effective rank of the block's output",
}


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

    The largest 0.5% of the weights share the brightest color: else a few would darken the rest.
    """
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(attention, interpolation="nearest", vmax=np.quantile(attention, 0.995))
    axes.set(title=title, xlabel="key token (0: class token)", ylabel="query token")
    figure.colorbar(image, label="attention weight", extend="max")
    return figure


def patches_figure(image: np.ndarray, maps: dict, title: str, class_token=True) -> Figure:
    """The image beside itself under each map of the attention to its patches.

    image: (S, S, 3) in [0, 1]. maps: title -> attention of `to_patches`, a square number of them.
    Each map has its own color scale, given above it.
    """
    figure = Figure(figsize=(2.1 * (len(maps) + 1), 3.1), layout="constrained")
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
    whose = "the class token's" if class_token else "all tokens' mean"
    figure.supxlabel(
        f"{whose} attention to each patch, from the least (dark) to the most (bright)",
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


def stacked_figure(paths: list[Path]) -> Figure:
    """The pictures in these files, one below the other, all as wide as the first.

    Raises UserError for a file that is no picture.
    """
    pictures = []
    for path in paths:
        try:
            pictures.append(imread(path))
        except (OSError, SyntaxError) as error:  # PIL's for what is no picture
            raise UserError(f"{path} is no picture that can be read ({error})") from None
    heights = [picture.shape[0] / picture.shape[1] for picture in pictures]
    figure = Figure(figsize=(10, 10 * sum(heights)), layout="none")
    for axes, picture in zip(figure.subplots(len(paths), height_ratios=heights), pictures):
        axes.imshow(picture)
        axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1, 0, 0)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes `figure` to `path`, making its folder. Returns `path`; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path


def _marker(steps) -> str | None:
    """Marks the points of a short curve: a line through a single one would not be seen."""
    return "." if len(steps) <= 20 else None


def signal_figure(lines: list[tuple]) -> Figure:
    """Four quantities over the blocks, a panel each; one color a group, one marker a line.

    lines: (label, group, solid, {quantity: one value a block}) of each, dashed if not `solid`.
    The quantities are those of utils/signal_stats.py.
    """
    figure = Figure(figsize=(10, 7 + 0.1 * len(lines)), layout="constrained")
    panels = dict(zip(SIGNAL_LABELS, figure.subplots(2, 2, sharex=True).flat))
    groups = list(dict.fromkeys(group for _, group, _, _ in lines))
    for i, (label, group, solid, values) in enumerate(lines):
        style = {
            "color": SAFE_COLORS[groups.index(group) % len(SAFE_COLORS)],
            "linestyle": "-" if solid else "--",
            "marker": MARKERS[i % len(MARKERS)],
        }
        for name, axes in panels.items():
            blocks = range(1, len(values[name]) + 1)
            axes.plot(blocks, values[name], label=label, linewidth=1.2, markersize=4, **style)
    for name, axes in panels.items():
        if name in ("activation_rms", "grad_norm"):
            axes.set_yscale("log")
        axes.set_ylabel(SIGNAL_LABELS[name])
        axes.locator_params(axis="x", integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        if axes.get_subplotspec().is_last_row():
            axes.set_xlabel("block")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small"
    )
    return figure


def method_figure(accuracies: dict[str, list], title: str) -> Figure:
    """Each method's final test accuracy, the best on top: a dot a seed, a bar their mean.

    accuracies: method -> accuracies in [0, 1]; without any the method stands at the bottom. The
    mean of LN is a line.
    """
    means = {m: 100 * np.mean(values) if values else math.nan for m, values in accuracies.items()}
    methods = sorted(means, key=lambda method: np.nan_to_num(means[method], nan=-1))
    dots = [(100 * value, row) for row, m in enumerate(methods) for value in accuracies[m]]
    figure = Figure(figsize=(7, 1.6 + 0.27 * len(methods)), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*np.reshape(dots, (-1, 2)).T, "o", color=BLUE, alpha=0.6, label="one seed")
    bar = {"color": "black", "markersize": 13, "markeredgewidth": 2}
    bars = [means[method] for method in methods]
    axes.plot(bars, range(len(methods)), "|", label="mean over the seeds", **bar)
    baseline = _baseline({m: value for m, value in means.items() if accuracies[m]})
    if baseline:
        style = {"color": VERMILION, "linestyle": "--", "linewidth": 1, "zorder": 0}
        axes.axvline(means[baseline], label=f"mean of {baseline}", **style)
    axes.set(title=title, xlabel="test accuracy at the end of the schedule (%)")
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(-0.6, len(methods) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def learning_rate_figure(sweeps: dict[str, dict], title: str) -> Figure:
    """Validation accuracy over the peak learning rate, a panel a method; LN's line is in each.

    sweeps: method -> {learning rate: accuracy in [0, 1], or None where all runs diverged}.
    """
    rows = math.ceil(len(sweeps) / 6)
    columns = math.ceil(len(sweeps) / rows)
    size = (max(2.2 * columns, 6), 2 * rows + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel in grid.flat[len(sweeps) :]:
        panel.set_visible(False)
    curves = {
        method: [(rate, 100 * value) for rate, value in sorted(sweep.items()) if value is not None]
        for method, sweep in sweeps.items()
    }
    baseline = _baseline(
        {m: max(value for _, value in curve) for m, curve in curves.items() if curve}
    )
    rates = sorted({rate for sweep in sweeps.values() for rate in sweep})
    for panel, method in zip(grid.flat, sweeps, strict=False):
        for other in sorted(curves, key=lambda other: (other == baseline, other)):
            if other != method and curves[other]:
                style = {"color": "0.85", "linewidth": 1, "label": "other methods"}
                if other == baseline:
                    style = {"color": "black", "linestyle": "--", "label": baseline}
                panel.plot(*zip(*curves[other]), **style)
        if curves[method]:
            style = {"color": BLUE, "marker": "o", "markersize": 4}
            panel.plot(*zip(*curves[method]), label="the panel's method", **style)
        diverged = [rate for rate, value in sweeps[method].items() if value is None]
        if diverged:  # at the panel's bottom, whatever its scale
            style = {"color": VERMILION, "transform": panel.get_xaxis_transform()}
            panel.plot(diverged, [0.06] * len(diverged), "X", label="diverged", **style)
        panel.set_title(method.replace(", ", "\n"), fontsize="small")
        panel.set_xscale("log")
        panel.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=60, fontsize="x-small")
        panel.minorticks_off()
        panel.margins(x=0.1)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    for column in range(columns):  # the lowest panel of a column that an empty place ends
        lowest = [panel for panel in grid[:, column] if panel.get_visible()][-1]
        lowest.tick_params(axis="x", labelbottom=True)
        lowest.set_xlabel("peak learning rate", fontsize="small")
    figure.suptitle(title)
    figure.supylabel("final validation accuracy (%)")
    legend = {}
    for panel in grid.flat:
        legend |= {text: handle for handle, text in zip(*panel.get_legend_handles_labels())}
    place = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": "small"}
    figure.legend(legend.values(), legend.keys(), **place)
    return figure


def compute_figure(runs: list[tuple], published: list[tuple]) -> Figure:
    """CIFAR-10 test accuracy over the compute of training.

    runs, published: (label, PFLOP, accuracy in [0, 1]) each; runs of one label share a color.
    """
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for number, label in enumerate(dict.fromkeys(label for label, *_ in runs)):
        points = [(pflop, 100 * value) for text, pflop, value in runs if text == label]
        color = SAFE_COLORS[1:][number % 6]  # black is for the published
        style = {"color": color, "marker": MARKERS[number % 7], "linestyle": "", "alpha": 0.7}
        axes.plot(*zip(*points), label=label, **style)
    points = [(pflop, 100 * value) for _, pflop, value in published]
    axes.plot(*zip(*points), "*", color="black", markersize=9, label="published")
    for (text, *_), point in zip(published, points):
        place = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(text, point, fontsize="x-small", **place)
    axes.set_xscale("log")
    axes.margins(x=0.1, y=0.1)
    axes.set(xlabel="compute of training (PFLOP)", ylabel="CIFAR-10 test accuracy (%)")
    axes.set_title("From scratch, at the end of training")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def _baseline(accuracies: dict[str, float]) -> str | None:
    """LN, of several settings with it the best."""
    of_ln = [method for method in accuracies if method.replace(",", " ").split()[0] == "LN"]
    return max(of_ln, key=accuracies.get, default=None)
