"""Matplotlib figures of training curves, of the signal in the blocks, and of results."""

import math
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure  # not pyplot: no display, no global state
from matplotlib.image import imread

from utils.errors import UserError

LOSS_LABEL, ACCURACY_LABEL = "test loss (cross entropy, nats)", "test accuracy (%)"
# For the color-blind, too. Source: Wong 2011 (Nature Methods 8, 441), without the yellow.
SAFE_COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
BLUE, VERMILION = SAFE_COLORS[4:6]
MARKERS = "osv^DPX*"
BELOW = {"loc": "outside lower center", "ncols": 3, "frameon": False, "fontsize": "small"}
SIGNAL_LABELS = {
    "activation_rms": "RMS of the block's output",
    "grad_norm": "norm of the block's gradients",
    "attention_entropy": "entropy of the attention (nats)",
    "effective_rank": "effective rank of the block's output",
}


def distinct(labels: list[str], paths) -> list[str]:
    """The labels of these files' runs, with file names in place of duplicates."""
    names = [Path(path).stem for path in paths]
    return [name if labels.count(text) > 1 else text for text, name in zip(labels, names)]


def _style(axes) -> None:
    """A pale grid, and no frame at the top and right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def _marker(steps) -> str | None:
    """Mark the points of a short curve: a line through a single one would not be seen."""
    return "." if len(steps) <= 20 else None


def loss_accuracy_figure(steps, loss, accuracy, title: str, classes: int) -> Figure:
    """Test loss (left axis) and test accuracy (right, given in [0, 1]) over optimizer steps.

    The axes are the same for all runs on a dataset: accuracy up to 100 %, and loss up to a tenth
    above that of a guess among the `classes`, unless it is higher.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    loss_axes = figure.add_subplot()
    loss_axes.set(title=title, xlabel="optimizer step")
    loss_axes.grid(axis="x", alpha=0.3)
    percent = 100 * np.asarray(accuracy)
    highest = 1.1 * max([math.log(classes), *(value for value in loss if math.isfinite(value))])
    for axes, values, label, color, top in (
        (loss_axes, loss, LOSS_LABEL, VERMILION, highest),
        (loss_axes.twinx(), percent, ACCURACY_LABEL, BLUE, 100),
    ):
        axes.plot(steps, values, color=color, marker=_marker(steps))
        axes.set_ylim(0, top)
        axes.set_ylabel(label, color=color)
        axes.tick_params(axis="y", colors=color)
        axes.spines["top"].set_visible(False)
    return figure


def comparison_figure(curves: list[tuple]) -> Figure:
    """Test accuracy and test loss of several runs over optimizer steps, one color per run.

    curves: (label, steps, loss, accuracy in [0, 1]) of each run.
    """
    figure = Figure(figsize=(10, 4 + 0.1 * len(curves)), layout="constrained")
    accuracy_axes, loss_axes = figure.subplots(1, 2)
    colors = SAFE_COLORS
    if len(curves) > len(colors):
        colors = colormaps["viridis"](np.linspace(0, 0.95, len(curves)))
    for color, (label, steps, loss, accuracy) in zip(colors, curves, strict=False):
        style = {"color": color, "linewidth": 1.2, "marker": _marker(steps)}
        accuracy_axes.plot(steps, 100 * np.asarray(accuracy), label=label, **style)
        loss_axes.plot(steps, loss, **style)
    for axes, label in ((accuracy_axes, ACCURACY_LABEL), (loss_axes, LOSS_LABEL)):
        axes.set(xlabel="optimizer step", ylabel=label)
        axes.locator_params(axis="x", nbins=5)
        _style(axes)
    figure.legend(**BELOW)
    return figure


def reference_figure(runs: list[tuple], references: list[tuple]) -> Figure:
    """Our test accuracy and test loss as points on the reference's curves, one color per label.

    runs, references: (label, steps, loss, accuracy in [0, 1]) each; the curves are shown up to
    five times our last step.
    """
    last = 5 * max(steps[-1] for _, steps, _, _ in runs)
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    both = figure.subplots(1, 2)
    labels = list(dict.fromkeys(label for label, *_ in [*references, *runs]))
    for kind, style in ((references, "-"), (runs, "o")):
        for label, steps, loss, accuracy in kind:
            shown = np.asarray(steps) <= last
            color = SAFE_COLORS[labels.index(label) % len(SAFE_COLORS)]
            whose = "ours" if kind is runs else "the reference"
            for axes, values in zip(both, (100 * np.asarray(accuracy), np.asarray(loss))):
                text = f"{label}, {whose}"
                axes.plot(np.asarray(steps)[shown], values[shown], style, color=color, label=text)
    for axes, label in zip(both, (ACCURACY_LABEL, LOSS_LABEL)):
        axes.set(xlabel="optimizer step", ylabel=label)
        _style(axes)
    legend = dict(zip(*reversed(axes.get_legend_handles_labels())))  # two seeds, one entry
    figure.legend(legend.values(), legend.keys(), **BELOW | {"ncols": 4})
    return figure


def stacked_figure(paths: list[Path]) -> Figure:
    """The pictures in these files, one below the other, all as wide as the first.

    Raises UserError for a file that is no picture.
    """
    pictures = []
    for path in paths:
        try:
            pictures.append(imread(path))
        except (OSError, SyntaxError) as error:  # PIL's, for what is not a picture
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


def signal_figure(lines: list[tuple]) -> Figure:
    """Four quantities over the blocks, a panel each; a color per group, a marker per line.

    lines: (label, group, solid, {quantity: one value per block}) of each, dashed if not `solid`.
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
        _style(axes)
        if axes.get_subplotspec().is_last_row():
            axes.set_xlabel("block")
    figure.legend(*axes.get_legend_handles_labels(), **BELOW)
    return figure


def method_figure(accuracies: dict[str, list], title: str) -> Figure:
    """Each method's final test accuracy, the best on top: a dot per seed, a bar for the mean.

    accuracies: method -> accuracies in [0, 1]; methods without any are at the bottom. The
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
    _style(axes)
    figure.legend(**BELOW)
    return figure


def learning_rate_figure(sweeps: dict[str, dict], title: str) -> Figure:
    """Validation accuracy over the peak learning rate, a panel per method; LN's line is in each.

    sweeps: method -> {learning rate: accuracy in [0, 1], or None where all runs diverged}.
    """
    rows = math.ceil(len(sweeps) / 6)
    columns = math.ceil(len(sweeps) / rows)
    figure = Figure(figsize=(max(2.2 * columns, 6), 2 * rows + 1.2), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for panel in panels[len(sweeps) :]:
        panel.set_visible(False)
    curves = {
        method: [(rate, 100 * value) for rate, value in sorted(sweep.items()) if value is not None]
        for method, sweep in sweeps.items()
    }
    baseline = _baseline({m: max(y for _, y in curve) for m, curve in curves.items() if curve})
    rates = sorted({rate for sweep in sweeps.values() for rate in sweep})
    legend = {}
    for number, (panel, method) in enumerate(zip(panels, sweeps, strict=False)):
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
        legend |= {text: handle for handle, text in zip(*panel.get_legend_handles_labels())}
        panel.set_title(method.replace(", ", "\n"), fontsize="small")
        panel.set_xscale("log")
        panel.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=60, fontsize="x-small")
        panel.minorticks_off()
        panel.margins(x=0.1)
        _style(panel)
        if number + columns >= len(sweeps):  # no panel below it
            panel.tick_params(axis="x", labelbottom=True)
            panel.set_xlabel("peak learning rate", fontsize="small")
    figure.suptitle(title)
    figure.supylabel("final validation accuracy (%)")
    figure.legend(legend.values(), legend.keys(), **BELOW | {"ncols": 4})
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
    _style(axes)
    figure.legend(**BELOW | {"ncols": 2})
    return figure


def _baseline(accuracies: dict[str, float]) -> str | None:
    """LN; if several settings have it, the best of them."""
    ln_settings = [method for method in accuracies if method.replace(",", " ").split()[0] == "LN"]
    return max(ln_settings, key=accuracies.get, default=None)
