"""results.py: its tables against tables by hand, its figures against their numbers, as run."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from statistics import mean, stdev

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from programs import ROOT, call, refused, run, write_log

import results
from recipes import reference
from utils.args import ENTRIES, parse_args
from utils.comparison import FLAGS, best_learning_rates
from utils.flops import training_pflop
from utils.log_reader import read_log, read_published
from utils.vis_utils import compute_figure, learning_rate_figure, method_figure

OUR_LOGS = sorted((ROOT / "output").glob("*.txt"))
TITLES = (
    "| method | peak learning rate | parameters | PFLOP | images/s | minutes |"
    " final test accuracy (%) as mean ± sample standard deviation | diverged |"
)


@pytest.fixture
def log(tmp_path):
    """log(norm type, its last accuracy, flags): a log whose middle accuracy is the best, 0.99.

    An accuracy of None: the run diverged; "stopped": it has not come to its end.
    """
    number = iter(range(1000))

    def log(norm_type, accuracy, **flags):
        flags = {
            "name": f"run{next(number)}",
            "dataset": "cifar10",
            "fp16": False,
            "img_size": 32,
            "model_type": "ViT-64x4_4",
            "norm_type": norm_type,
            "num_steps": 200,
            "pretrained_dir": None,
            "recipe": "small",
            "optimizer": "muon",
            "qk_norm": "none",
            "val_split": 0,
            "seed": 1,
            "learning_rate": 0.02,
            "betas": (0.9, 0.95),
        } | flags
        lines = ["Process rank: -1, device: cpu"]
        lines += [
            f"Training parameters Namespace({', '.join(f'{k}={v!r}' for k, v in flags.items())})"
        ]
        lines += ["Total Parameter: \t0.2M", "Compute: 0.012345 PFLOP"]
        lines += ["Global Steps: 100", "Valid Loss: 1.00000", "Valid Accuracy: 0.99000"]
        if accuracy is None:
            lines += ["Training images of the step: [1, 2]"]
        elif accuracy != "stopped":
            lines += ["Global Steps: 200", "Valid Loss: 1.00000", f"Valid Accuracy: {accuracy:.5f}"]
            lines += ["Best Accuracy: \t0.990000", "Training speed: 1234 images/s"]
            lines += ["End Training!", "last 12.3 min"]
        path = tmp_path / f"{flags['name']}.txt"
        path.write_text("".join(f"04/27/2021 13:52:23 - INFO - train - {li}\n" for li in lines))
        return path

    return log


def table(*args):
    done = call(results.main, *args)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def figures(monkeypatch):
    """The figures that results.py draws, by name."""
    saved = {}
    real = results.save_figure

    def save_figure(figure, path):
        saved[path.stem] = figure
        return real(figure, path)

    monkeypatch.setattr(results, "save_figure", save_figure)
    return saved


def test_the_reference_s_recipe(tmp_path, log):
    evaluations = {"LN": [(500, 0.1, 0.98449)], "BN": [(100, 2, 0.2), (200, 2, 0.3111)], "GN": []}
    minutes = {"LN": 12.0, "BN": None, "GN": None}
    logs = [
        write_log(tmp_path / f"{norm}.txt", norm, evaluations[norm], minutes[norm])
        for norm in ("BN", "GN", "LN")
    ]
    usual = {"recipe": "reference", "optimizer": "sgd", "img_size": 224}
    logs += [log("LN", 0.5, **usual), log("LN", 0.5, **usual), log("LNS", "stopped", **usual)]
    logs += [log("LN", 0.5, **usual, pretrained_dir="x.npz", train_batch_size=64)]
    logs += [log("LN", 0.5, **usual | {"optimizer": "adamw"}, qk_norm="rms")]
    assert table(*logs) == [
        "### Recipe reference",
        "",
        "| dataset | recipe | model | steps | PFLOP | LN | LN qk_norm=rms | BN | GN | LNS |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| cifar10 | reference | ViT-64x4_4 | 200 | 0.012 | 99.0 (12.3 min), 99.0 (12.3 min) |"
        "  |  |  | 99.0 (at step 100 of 200) |",
        "| cifar10 | reference | ViT-64x4_4* | 200 | 0.012 | 99.0 (12.3 min) |  |  |  |  |",
        "| cifar10 | reference optimizer=adamw | ViT-64x4_4 | 200 | 0.012 |  | 99.0 (12.3 min) |"
        "  |  |  |",
        "| digits | reference | ViT-Ti_16 at 32 px | 500 |  | 98.4 (12.0 min) |  |"
        " 31.1 (at step 200 of 500) | no evaluation |  |",
    ]


def test_flags_are_told_from_entries():
    """Truth: the names that --set takes."""
    assert {*reference()} - ENTRIES.keys() == {*FLAGS}


def test_brief(log):
    logs = [log("LN", 0.6), log("LN", 0.61, seed=2), log("LN", 0.62, pretrained_dir="auto")]
    logs += [log("BN", 0.5, num_steps=40), log("BN", None), log("GN", 0.4, optimizer="adamw")]
    logs[3].write_text(logs[3].read_text().replace("0.012345 PFLOP", "0.05 PFLOP"))
    logs += [log("LN", 0.3, num_steps=40), held_out := log("LN", 0.9, val_split=5000)]
    refused(call(results.main, "--brief", held_out), "--brief", program="results.py")
    assert table("--brief", *logs) == [
        "| dataset | recipe | model | steps | PFLOP | LN | BN | GN |",
        "|---|---|---|---|---|---|---|---|",
        "| cifar10 | small | ViT-64x4_4 at 32 px | 40 | 0.012 to 0.05 | 30.0 (12.3 min) |"
        " 50.0 (12.3 min) |  |",
        "| cifar10 | small | ViT-64x4_4 at 32 px | 200 | 0.012 | 60.0 (12.3 min), 61.0 (12.3 min) |"
        " 99.0 (at step 100 of 200) |  |",
        "| cifar10 | small | ViT-64x4_4* at 32 px | 200 | 0.012 | 62.0 (12.3 min) |  |  |",
        "| cifar10 | small optimizer=adamw | ViT-64x4_4 at 32 px | 200 | 0.012 |  |  |"
        " 40.0 (12.3 min) |",
    ]


def test_other_recipes_count_at_their_end_over_seeds(log):
    values = {"LN": [0.61, 0.62, 0.66], "RMS": [0.7, 0.71]}
    logs = [log(m, a, seed=s) for m, some in values.items() for s, a in enumerate(some)]
    logs += [log("RMS", None, seed=2), log("BN", None), log("BN", None, seed=2)]
    logs += [log("LN", 0.655, learning_rate=0.04), log("GN", "stopped")]
    logs += [log("LN", 0.5, dataset="cifar100"), logs[0]]  # a log given twice counts once
    spread = {m: f"{100 * mean(a):.2f} ± {100 * stdev(a):.2f}" for m, a in values.items()}
    assert spread == {"LN": "63.00 ± 2.65", "RMS": "70.50 ± 0.71"}
    assert table(*logs) == [
        "### cifar10, recipe small, ViT-64x4_4 at 32 px, 200 steps",
        "",
        TITLES,
        "|---|---|---|---|---|---|---|---|",
        "| RMS | 0.02 | 0.2M | 0.0123 | 1234 | 12.3 | 70.50 ± 0.71 (n = 2) | 1 |",
        "| LN | 0.04 | 0.2M | 0.0123 | 1234 | 12.3 | 65.50 (n = 1) | 0 |",
        "| LN | 0.02 | 0.2M | 0.0123 | 1234 | 12.3 | 63.00 ± 2.65 (n = 3) | 0 |",
        "| BN | 0.02 | 0.2M | 0.0123 |  |  | none finished | 2 |",
        "| GN | 0.02 | 0.2M | 0.0123 |  |  | none finished | 0 |",
        "",
        "### cifar100, recipe small, ViT-64x4_4 at 32 px, 200 steps",
        "",
        TITLES,
        "|---|---|---|---|---|---|---|---|",
        "| LN | 0.02 | 0.2M | 0.0123 | 1234 | 12.3 | 50.00 (n = 1) | 0 |",
    ]


def test_published_results_beside_ours(tmp_path, log):
    """What the reference published; where its own table is at hand, the file has the same rows."""
    ours, path = log("LN", 0.7), ROOT / "docs" / "reference_results.csv"
    assert [row for row in table("--brief", path, ours) if "ViT-B_32" in row or "64x4" in row] == [
        "| cifar10 | published | ViT-B_32 | 20000 | 67 | 67.6 (68.5 min) | 67.1 (68.6 min) |"
        " 65.5 (73.0 min) | 66.1 (66.7 min) |",
        "| cifar10 | published | ViT-B_32* | 20000 | 67 | 98.4 (67.7 min) |  |  |  |",
        "| cifar10 | small | ViT-64x4_4 at 32 px | 200 | 0.012 | 70.0 (12.3 min) |  |  |  |",
        "| cifar100 | published | ViT-B_32 | 20000 | 67 | 42.8 (68.4 min) | 39.9 (68.7 min) |"
        " 40.0 (73.1 min) | 37.8 (67.5 min) |",
        "| cifar100 | published | ViT-B_32* | 20000 | 67 | 91.0 (65.6 min) |  |  |  |",
    ]
    if folder := os.environ.get("RESCALEVIT_REFERENCE"):
        theirs = Path(folder).parent / "results.csv"
        ours = [line.rpartition(",")[0] for line in path.read_text().splitlines()]
        assert ours == theirs.read_text().splitlines()  # but for the PFLOP


@pytest.mark.parametrize("model", ["ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32"])
def test_the_reference_s_compute(model):
    """Truth: our count for GN, whose last block computes all tokens, as the reference's does."""
    flags = ["--name", "x", "--model_type", model, "--norm_type", "GN"]
    flags += ["--train_batch_size", "64"] * (model == "ViT-L_16")
    expected = training_pflop(parse_args(flags), 10)
    rows = read_published(ROOT / "docs" / "reference_results.csv")
    (found,) = {run.pflop for run in rows if run.model_type == model}
    assert found == pytest.approx(expected, rel=0.002)


def test_a_damaged_table_of_published_results(tmp_path):
    path = tmp_path / "x.csv"
    for text in ("dataset,model\ncifar10,ViT-B_16\n", "a\n1\n", "", "\xff\n1\n"):
        path.write_text(text)
        refused(call(results.main, "--brief", path), path, program="results.py")


def test_a_star_marks_pretrained_weights(log):
    logs = [log("LN", 0.5), log("LN", 0.9, pretrained_dir="auto"), log("BN", 0.4)]
    methods = [row.split(" | ")[0] for row in table(*logs)[4:]]
    assert methods == ["| LN*", "| LN", "| BN"]


def test_a_row_names_the_flags_that_are_not_the_same_in_all(log):
    logs = [log("LN", 0.5, seed=1, name="a"), log("LN", 0.6, seed=2, output_dir="elsewhere")]
    logs += [log("LN", 0.7, qk_norm="rms"), log("LN", 0.8, betas=(0.9, 0.99))]
    methods = [(row.split(" | ")[0], row.split(" | ")[-2]) for row in table(*logs)[4:]]
    assert methods == [
        ("| LN, betas=(0.9, 0.99)", "80.00 (n = 1)"),
        ("| LN, betas=(0.9, 0.95), qk_norm=rms", "70.00 (n = 1)"),
        ("| LN, betas=(0.9, 0.95)", "55.00 ± 7.07 (n = 2)"),
    ]


@pytest.fixture
def sweep(log):
    """Final accuracies of a sweep, {method: {learning rate: accuracy}}, as logs."""
    values = {
        "LN": {0.01: 0.5, 0.02: 0.55, 0.04: None},
        "RMS": {0.01: 0.5, 0.02: 0.4, 0.03162278: 0.61},
        "BN": {0.01: None, 0.02: "stopped"},
    }
    return [
        log(method, accuracy, val_split=5000, learning_rate=rate)
        for method, rates in values.items()
        for rate, accuracy in rates.items()
    ]


def test_a_sweep_and_its_best_rates(log, sweep):
    test_run = log("LN", 0.9)
    assert table(test_run, *sweep)[6:] == [
        "### cifar10, recipe small, ViT-64x4_4 at 32 px, 200 steps:"
        " final validation accuracy (%) by peak learning rate",
        "",
        "| method | 0.01 | 0.02 | 0.0316228 | 0.04 |",
        "|---|---|---|---|---|",
        "| BN | diverged | unfinished |  |  |",
        "| LN | 50.00 | **55.00** |  | diverged |",
        "| RMS | 50.00 | 40.00 | **61.00** |  |",
    ]
    best = best_learning_rates([read_log(path) for path in (test_run, *sweep)])
    assert best == {"LN": 0.02, "RMS": 0.03162278}
    done = call(results.main, "--best_rates", test_run, *sweep)
    assert (done.returncode, done.stdout) == (0, "LN 0.02\nRMS 0.03162278 0.06324556\n")
    assert done.stderr == "results.py: no finished run of BN\n"


def test_of_several_seeds_at_a_rate_the_mean_counts(log):
    flags = {"val_split": 5000}
    logs = [log("LN", a, **flags, seed=s, learning_rate=0.01) for s, a in enumerate((0.5, 0.7))]
    logs += [log("LN", a, **flags, seed=s, learning_rate=0.02) for s, a in enumerate((0.65, None))]
    assert table(*logs)[-1] == "| LN | 60.00 | **65.00** (1 diverged) |"
    logs += [log("LN", 0.4, **flags, learning_rate=0.01, qk_norm="rms", optimizer="adamw")]
    done = call(results.main, "--best_rates", *logs)
    assert done.stdout == (
        "LN,optimizer=adamw,qk_norm=rms 0.01 0.005\nLN,optimizer=muon 0.02 0.04\n"
    )


def test_best_rates_are_of_one_sweep(log, sweep):
    for logs in ([*sweep, log("LN", 0.5, val_split=5000, num_steps=400)], [log("LN", 0.5)]):
        done = call(results.main, "--best_rates", *logs)
        refused(done, "--best_rates", "of one sweep", program="results.py")
        assert done.stdout == ""


def test_what_is_no_log_is_passed_over_in_one_line(tmp_path, log):
    good, cut = log("LN", 0.5), tmp_path / "cut.txt"
    cut.write_text("04/27/2021 13:52:23 - WARNING - train - Process rank: -1\n")
    done = call(results.main, cut, good)
    assert done.returncode == 0 and done.stdout.splitlines() == table(good)
    assert re.fullmatch(f"results.py: passed over: {cut} is no result log: .*\n", done.stderr)


def test_nothing_but_what_is_no_log_is_refused_in_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("no log")
    for path in (tmp_path / "notes.txt", tmp_path / "missing.txt", tmp_path):
        done = call(results.main, path)
        refused(done, path, program="results.py")
        assert done.stdout == "" and done.stderr.count("\n") == 1


def test_update_writes_between_the_markers(tmp_path, log):
    log("LN", 0.5, name="a1"), log("RMS", 0.6, name="a2"), log("BN", 0.7, name="b")
    folder = tmp_path / "docs"
    folder.mkdir()
    readme = folder / "README.md"
    lines = ["# Title \\1 café", "In text: <!-- results x -->"]
    lines += ["<!-- results ../a*.txt ../b.txt ../a1.txt -->", "old", "<!-- /results -->"]
    lines += ["", "## Next"]
    lines += ["<!-- results --brief ../b.txt -->", "<!-- /results -->"]
    readme.write_text("\n".join(lines), encoding="utf-8")
    assert table("--update", readme) == [str(readme)]
    text = readme.read_text(encoding="utf-8")
    a1, a2, b = (tmp_path / f"{name}.txt" for name in ("a1", "a2", "b"))
    expected = [*lines[:3], *table(a1, a2, b), *lines[4:8], *table("--brief", b)]
    assert text.split("\n") == [*expected, lines[8]]
    assert table("--update", readme) == [str(readme)]
    assert readme.read_text(encoding="utf-8") == text  # the second time changes nothing


BEGIN, END = "<!-- results run*.txt -->", results.END


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [BEGIN],
        [END],
        [END, BEGIN],
        [BEGIN, BEGIN, END],
        [BEGIN, END, END],
        [BEGIN + END],
        ["<!-- results -->", END],
        ["<!-- results none*.txt -->", END],
        ["<!-- results --brief -->", END],
    ],
)
def test_update_refuses_a_file_without_pairs_of_markers(tmp_path, log, lines):
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(lines))
    log("LN", 0.5)
    refused(call(results.main, "--update", readme), readme, "<!-- results", program="results.py")
    assert readme.read_text() == "\n".join(lines)
    refused(call(results.main, "--update", tmp_path / "none"), program="results.py")


def test_update_takes_no_logs(tmp_path, log):
    done = call(results.main, "--update", "README.md", log("LN", 0.5))
    refused(done, "--update README.md", program="results.py")


def test_an_update_that_fails_leaves_the_file(tmp_path, log, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\nold\n{END}\n")
    log("LN", 0.5)

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    refused(call(results.main, "--update", readme), program="results.py")
    assert readme.read_text() == f"{BEGIN}\nold\n{END}\n" and not list(tmp_path.glob("*.part"))


def points(line):
    return [(round(x, 9), round(y, 9)) for x, y in line.get_xydata()]


def drawn_whole(figure):
    """Asserts that all lies within the figure, and that its legend covers no panel or label."""
    FigureCanvasAgg(figure).draw()
    boxes = [axes.get_tightbbox() for axes in figure.axes if axes.get_visible()]
    (legend,) = figure.legends
    for box in [*boxes, legend.get_tightbbox()]:
        assert box.x0 >= -1 and box.y0 >= -1
        assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
    assert not any(box.overlaps(legend.get_tightbbox()) for box in boxes)


def test_figure_of_methods(tmp_path, log, figures):
    logs = [log("LN", a, seed=s) for s, a in enumerate((0.61, 0.62, 0.66))]
    logs += [log("RMS", 0.7), log("BN", None), log("BN", None, seed=2), log("GN", "stopped")]
    logs += [log("RMS", 0.5, learning_rate=0.04)]
    paths = table("--figures", tmp_path / "img", *logs)
    names = ["accuracy_by_method", "accuracy_by_compute"]
    assert paths == [f"{tmp_path}/img/{name}.png" for name in names]
    assert all(imread(path).std() > 0.01 for path in paths)
    (axes,) = figures["accuracy_by_method"].axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["BN (2 diverged)", "RMS, rate 0.04", "LN", "RMS, rate 0.02"]
    dots, means, baseline = axes.lines
    assert points(dots) == [(50, 1), (61, 2), (62, 2), (66, 2), (70, 3)]
    assert points(means)[1:] == [(50, 1), (63, 2), (70, 3)] and str(means.get_xdata()[0]) == "nan"
    assert set(baseline.get_xdata()) == {63}
    assert "%" in axes.get_xlabel() and "recipe small" in axes.get_title()
    legend = [text.get_text() for text in figures["accuracy_by_method"].legends[0].texts]
    assert legend == ["one seed", "mean over the seeds", "mean of LN"]


def test_figure_of_learning_rates(tmp_path, sweep, figures):
    paths = table("--figures", tmp_path, *sweep)
    assert paths == [f"{tmp_path}/accuracy_by_learning_rate.png"]
    panels = {axes.get_title(): axes for axes in figures["accuracy_by_learning_rate"].axes}
    assert list(panels) == ["BN", "LN", "RMS"]
    found = {
        method: {line.get_label(): points(line) for line in axes.lines}
        for method, axes in panels.items()
    }
    ln, rms = [(0.01, 50), (0.02, 55)], [(0.01, 50), (0.02, 40), (0.03162278, 61)]
    own, others = "the panel's method", "other methods"
    assert found["BN"] == {"LN": ln, others: rms, "diverged": [(0.01, 0.06)]}
    assert found["LN"] == {own: ln, others: rms, "diverged": [(0.04, 0.06)]}
    assert found["RMS"] == {own: rms, "LN": ln}
    for axes in panels.values():
        (marked,) = [li for li in axes.lines if li.get_label() == "diverged"] or [None]
        if marked:  # a share of the panel's height
            assert marked.get_transform() == axes.get_xaxis_transform()
        assert axes.get_xscale() == "log" and axes.get_xlabel() == "peak learning rate"
    legend = figures["accuracy_by_learning_rate"].legends[0]
    assert {text.get_text() for text in legend.texts} == {own, others, "LN", "diverged"}


def test_figure_of_compute(tmp_path, log, figures):
    logs = [log("LN", 0.6), log("RMS", 0.7, num_steps=400), log("BN", None), log("GN", "stopped")]
    logs += [log("LN", 0.5, val_split=5000), log("LN", 0.5, dataset="cifar100")]
    logs += [
        log("LN", 0.98, pretrained_dir="x.npz"),
        log("LN", 0.55, recipe="reference", optimizer="sgd"),
    ]
    published = tmp_path / "published.csv"
    columns = "dataset,model,norm,pretrained,best_accuracy_percent,minutes,pflop"
    rows = ["cifar10,ViT-B_32,LN,F,67.6,68.5,67.1", "cifar10,ViT-B_32,LN,T,98.4,67.7,67.1"]
    published.write_text("\n".join([columns, *rows]))
    table("--figures", tmp_path, *logs, published)
    (axes,) = figures["accuracy_by_compute"].axes
    found = {line.get_label(): points(line) for line in axes.lines}
    assert found == {
        "reference, ViT-64x4_4 at 32 px, 200 steps": [(0.012345, 55)],
        "small, ViT-64x4_4 at 32 px, 200 steps": [(0.012345, 60)],
        "small, ViT-64x4_4 at 32 px, 400 steps": [(0.012345, 70)],
        "ViT-B and ViT-L (reference)": [(67.1, 67.6)],
        "published": [pytest.approx((pflop, 100 * value)) for _, pflop, value in results.PUBLISHED],
    }
    assert axes.get_xscale() == "log" and "PFLOP" in axes.get_xlabel()
    assert {text.get_text() for text in axes.texts} == {name for name, *_ in results.PUBLISHED}
    # Groups of three methods have figures of their own, named by what they differ in.
    assert [name for name in figures if "method" in name] == ["accuracy_by_method"]
    logs += [log(norm, 0.6, dataset="cifar100", num_steps=9) for norm in ("LN", "BN", "GN")]
    table("--figures", tmp_path, *logs)
    assert {name for name in figures if "method_" in name} == {
        "accuracy_by_method_cifar100_9",
        "accuracy_by_method_cifar10_200",
    }


def test_nothing_to_draw_is_said_in_one_line(tmp_path, log):
    done = call(results.main, "--figures", tmp_path / "img", log("LN", "stopped"))
    refused(done, "to draw", program="results.py")
    assert not (tmp_path / "img").exists()


def test_figures_of_21_methods_lie_within_their_edges():
    methods = ["LN", *(f"Method{i}, optimizer=muon" for i in range(20))]
    rates = (0.005, 0.01, 0.02, 0.04, 0.08)
    sweeps = {m: {r: 0.5 + 0.01 * i + r for r in rates} for i, m in enumerate(methods)}
    figure = learning_rate_figure(sweeps | {"Fixup": dict.fromkeys(rates)}, "title")
    assert sum(axes.get_visible() for axes in figure.axes) == 22
    drawn_whole(figure)
    drawn_whole(method_figure({m: [0.5, 0.51, 0.5 + 0.01 * len(m)] for m in methods}, "title"))
    drawn_whole(method_figure({"Fixup (3 diverged)": []}, "title"))
    drawn_whole(learning_rate_figure({"Fixup": dict.fromkeys(rates)}, "title"))
    runs = [(f"recipe small, ViT-Ti_4, {i} steps", 0.01 * (i + 1), 0.6) for i in range(8)]
    drawn_whole(compute_figure(runs, results.PUBLISHED))


@pytest.mark.skipif(not OUR_LOGS, reason="output/ holds no logs")
def test_the_program_on_the_logs_of_this_repository(tmp_path):
    done = run(list(map(str, OUR_LOGS)), tmp_path, program="results.py")
    assert done.stderr == ""
    ours = [read_log(path) for path in OUR_LOGS]
    for log in ours:
        if log.flags["recipe"] == "reference" and not log.flags["val_split"] and log.steps:
            assert f"{100 * log.best_accuracy:.1f} (" in done.stdout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone: any log may be a user's own")
@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_tables_of_this_repository_are_those_of_its_logs(tmp_path, page):
    listed = subprocess.run(
        ["git", "ls-files", page, "output", "docs/*.csv"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    table("--update", tmp_path / page)
    assert (tmp_path / page).read_text() == (ROOT / page).read_text()


@pytest.mark.skipif(
    not os.environ.get("RESCALEVIT_REFERENCE"),
    reason="RESCALEVIT_REFERENCE does not name a folder of the reference's logs",
)
def test_the_reference_s_own_logs(tmp_path):
    logs = sorted(Path(os.environ["RESCALEVIT_REFERENCE"]).glob("*.txt"))
    lines = table(*logs)
    for log in map(read_log, logs):
        if log.finished and log.steps:
            model = log.model_type + "*" * log.pretrained
            cell = f"{100 * log.best_accuracy:.1f} ({log.minutes:.1f} min)"
            row = f"| {log.dataset} | reference | {model} | 20000 |"
            assert any(line.startswith(row) and cell in line for line in lines)
