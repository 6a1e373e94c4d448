"""Turns result logs into Markdown tables and figures.

    python3 results.py output/*.txt                # prints the tables
    python3 results.py --brief output/*.txt        # prints one table, one row per model
    python3 results.py --update README.md          # writes the file's tables again, see below
    python3 results.py --figures img output/*.txt  # draws accuracy_by_*.png
    python3 results.py --best_rates output/*.txt   # METHOD LEARNING_RATE [NEXT_RATE] lines

Runs of the reference's recipe are shown as the reference published its own: best test accuracy and
minutes. Other recipes' runs count at the end of their schedule, over seeds; a * marks pretrained
weights. Runs with --val_split are a sweep: validation accuracy by learning rate. Files that are no
result logs are passed over. A .csv file holds published results, like docs/reference_results.csv.

--update writes tables between lines `<!-- results output/*.txt -->` and `<!-- /results -->`. The
first names the logs, relative to the file's folder; it may also say --brief.
"""

import argparse
import re
import signal
import sys
from collections import defaultdict
from glob import glob
from pathlib import Path
from statistics import mean, stdev

from utils.comparison import best_learning_rates, changes, grouped, rates_beyond, settings, split
from utils.errors import UserError, reported
from utils.log_reader import RunLog, read_log, read_published
from utils.vis_utils import compute_figure, learning_rate_figure, method_figure, save_figure

BEGIN, END = "<!-- results LOGS -->", "<!-- /results -->"  # each a line of its own
MARKER = re.compile(r"^(<!-- results .+ -->|<!-- /results -->)$", re.M)
# CIFAR-10 from scratch: PFLOP of training, test accuracy, as published by others. CCT, CVT and
# ViT-Lite: Hassani et al. 2021, "Escaping the Big Data Paradigm with Compact Transformers". The
# others: their repositories' READMEs. airbench and ConvMixer are CNNs; airbench's accuracy is with
# augmentation of the test images. Points without a name in the figure have theirs beside them.
PUBLISHED = [
    ("airbench94", 0.29, 0.9401),
    ("ConvMixer", 1.1, 0.926),
    ("", 1.4, 0.9501),  # airbench95
    ("CCT-2/3x2", 2.0, 0.8917),
    ("", 2.8, 0.9145),  # CCT-4/3x2
    ("MiniViT (tonelli)", 3.0, 0.8218),
    ("airbench96", 3.1, 0.96),
    ("", 12.1, 0.9258),  # CVT-6/4
    ("", 12.3, 0.9094),  # ViT-Lite-6/4
    ("", 14.2, 0.9243),  # CVT-7/4
    ("", 14.3, 0.9138),  # ViT-Lite-7/4
    ("", 14.5, 0.9356),  # CCT-6/3x2
    ("", 16.5, 0.9383),  # CCT-7/3x2
    ("", 16.9, 0.9358),  # ViT 192/9 of SPT_LSA_ViT
    ("SPT + LSA", 17.7, 0.9453),  # the same repository
    ("ViT 384/7 (omihub777)", 25.6, 0.9092),
    ("ViT 512/6 (kentaroy47)", 38, 0.80),
    ("CCT-6/3x1", 122, 0.9529),
    ("CCT-7/3x1", 1420, 0.98),
]


def read_logs(paths) -> list[RunLog]:
    """The runs of the files that are result logs; reports the others. Raises UserError, OSError."""
    runs, faults = [], []
    for path in paths:
        try:
            runs += read_published(path) if str(path).endswith(".csv") else [read_log(path)]
        except UserError as error:
            faults.append(str(error))
    if not runs:
        raise UserError("; ".join(faults) or "no LOG is given")
    for fault in faults:
        print(f"results.py: passed over: {fault}", file=sys.stderr)
    return runs


def markdown_tables(runs: list[RunLog]) -> str:
    """All tables, each under its heading."""
    reference, others, sweeps = split(runs)
    tables = {"Recipe reference": _brief_table(reference)} if reference else {}
    for group, members in grouped(others):
        tables[_heading(group, members)] = _test_table(members)
    for group, members in grouped(sweeps):
        heading = f"{_heading(group, members)}: final validation accuracy (%) by peak learning rate"
        tables[heading] = _sweep_table(members)
    return "\n\n".join(f"### {heading}\n\n{table}" for heading, table in tables.items())


def _heading(group, members) -> str:
    dataset, recipe, model, steps = group
    recipe = " ".join([recipe, *changes(members)])
    return f"{dataset}, recipe {recipe}, {model}, {steps} steps"


def _brief_table(runs) -> str:
    """A row per model and number of steps, a column per norm type; not for held-out images."""
    runs = [run for run in runs if not run.flags["val_split"]]
    if not runs:
        raise UserError("--brief: no log is of a run that was evaluated on the test images")
    cells, pflop = defaultdict(list), defaultdict(list)
    for run in runs:
        recipe, model = run.flags["recipe"], run.model_type + "*" * run.pretrained
        model += f" at {run.img_size} px" * (run.img_size != 224)
        recipe = " ".join([recipe, *changes([run])])
        row = run.dataset, recipe, model, run.flags.get("num_steps", 0)
        qk_norm = run.flags["qk_norm"]
        column = run.norm_type if qk_norm == "none" else f"{run.norm_type} qk_norm={qk_norm}"
        cells[row, column].append(_cell(run))
        pflop[row] += [run.pflop] if run.pflop else []
    rows, columns = (sorted(set(names)) for names in zip(*cells))
    columns.sort(key=lambda name: name.split()[0] != "LN")  # LN, the baseline, comes first
    body = []
    for row in rows:
        ends = [end(pflop[row], default=0) for end in (min, max)]
        ends = [f"{value:.0f}" if value > 10 else f"{value:.2g}" for value in ends]
        compute = " to ".join(dict.fromkeys(ends)) if pflop[row] else ""
        body.append([*map(str, row), compute, *(", ".join(cells[row, name]) for name in columns)])
    return _markdown(["dataset", "recipe", "model", "steps", "PFLOP", *columns], body)


def _cell(run: RunLog) -> str:
    """`67.6 (68.5 min)`, or of an unfinished run `31.1 (at step 200 of 20000)`."""
    if not run.steps:
        return "no evaluation"
    as_reference = run.flags["recipe"] == "reference"
    accuracy = f"{100 * (run.best_accuracy if as_reference else run.final_accuracy):.1f}"
    if not run.finished:
        return f"{accuracy} (at step {run.steps[-1]} of {run.flags.get('num_steps', '?')})"
    return accuracy if run.minutes is None else f"{accuracy} ({run.minutes:.1f} min)"


def _test_table(runs) -> str:
    """A row per method and learning rate, the best on top."""
    rows = []
    for setting in sorted(settings(runs), key=lambda s: -(s.mean or 0)):
        percent = [100 * accuracy for accuracy in setting.accuracies]
        spread = f" ± {stdev(percent):.2f}" if len(percent) > 1 else ""
        result = f"{mean(percent):.2f}{spread} (n = {len(percent)})" if percent else "none finished"
        row = [setting.method, f"{setting.rate:g}", setting.runs[0].total_parameters or ""]
        for name, form in ("pflop", ".3g"), ("images_per_s", ".0f"), ("minutes", ".1f"):
            values = [getattr(run, name) for run in setting.runs]
            values = [value for value in values if value is not None]
            row.append(f"{mean(values):{form}}" if values else "")
        rows.append([*row, result, str(setting.diverged)])
    result = "final test accuracy (%) as mean ± sample standard deviation"
    titles = ["method", "peak learning rate", "parameters", "PFLOP", "images/s", "minutes"]
    titles += [result, "diverged"]
    return _markdown(titles, rows)


def _sweep_table(runs) -> str:
    """A row per method, a column per learning rate, the best of each row in bold."""
    found, best = {(s.method, s.rate): s for s in settings(runs)}, best_learning_rates(runs)
    methods, rates = (sorted(set(names)) for names in zip(*found))

    def cell(method, rate):
        setting = found.get((method, rate))
        if setting is None or setting.mean is None:
            return "" if setting is None else "diverged" if setting.diverged else "unfinished"
        text = f"{100 * setting.mean:.2f}"
        text = f"**{text}**" if rate == best[method] else text
        return text + f" ({setting.diverged} diverged)" * bool(setting.diverged)

    body = [[method, *(cell(method, rate) for rate in rates)] for method in methods]
    return _markdown(["method", *(f"{rate:g}" for rate in rates)], body)


def _markdown(titles, rows) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def update(path) -> None:
    """Write the tables of the file at `path` again. Raises UserError, OSError."""
    from utils.checkpoint import write_file  # imports torch, which takes seconds

    path = Path(path)
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    parts = MARKER.split(text)
    begins, ends = parts[1::4], parts[3::4]
    if not begins or END in begins or set(ends) != {END} or len(begins) != len(ends):
        raise UserError(f"{path} must hold the lines {BEGIN} and, below each, {END}")
    for i, begin in enumerate(begins):
        words = begin.split()[2:-1]
        patterns = [word for word in words if word != "--brief"]
        found = (sorted(glob(pattern, root_dir=path.parent)) for pattern in patterns)
        paths = list(dict.fromkeys(path.parent / name for names in found for name in names))
        if not paths:
            raise UserError(f"{path}: no file is called {' or '.join(patterns)}, for {begin}")
        parts[4 * i + 2] = f"\n{_tables(read_logs(paths), '--brief' in words)}\n"
    text = "".join(parts).encode(errors="surrogateescape")
    write_file(path.resolve(), lambda file: file.write(text))


def _tables(runs, brief) -> str:
    return _brief_table(runs) if brief else markdown_tables(runs)


def draw(runs: list[RunLog], folder) -> list[Path]:
    """Draw the figures that `runs` have numbers for; returns their paths. Raises UserError."""
    reference, others, sweeps = split(runs)
    ours = [run for run in others if run.flags["recipe"] != "published"]
    figures = {}
    for heading, members, suffix in _suffixed(ours):
        found = [s for s in settings(members) if s.accuracies or s.diverged]
        methods = [setting.method for setting in found]
        values = {}
        for s in found:
            label = s.method if methods.count(s.method) == 1 else f"{s.method}, rate {s.rate:g}"
            values[label + f" ({s.diverged} diverged)" * bool(s.diverged)] = s.accuracies
        if values:
            figures["accuracy_by_method" + suffix] = method_figure(values, heading)
    for heading, members, suffix in _suffixed(sweeps):
        curves = defaultdict(dict)
        for s in settings(members):
            if s.accuracies or s.diverged:
                curves[s.method][s.rate] = s.mean
        if curves:
            figures["accuracy_by_learning_rate" + suffix] = learning_rate_figure(curves, heading)
    points = []
    for group, members in grouped(r for r in reference + others if r.dataset == "cifar10"):
        ended = [r for r in members if r.finished and r.steps and r.pflop and not r.pretrained]
        label = _heading(group, members).removeprefix("cifar10, recipe ")
        if group[1] == "published":
            label = "ViT-B and ViT-L (reference)"
        points += [(label, run.pflop, run.final_accuracy) for run in ended]
    if points:
        figures["accuracy_by_compute"] = compute_figure(points, PUBLISHED)
    if not figures:
        raise UserError("no log holds anything to draw")
    paths = {name: Path(folder) / f"{name.replace(' ', '_')}.png" for name in figures}
    return [save_figure(figures[name], path) for name, path in paths.items()]


def _suffixed(runs):
    """(heading, its runs, suffix) of each group of three methods or more, which can be compared.

    The suffix is what the groups differ in.
    """
    groups = [(g, runs) for g, runs in grouped(runs) if len({s.method for s in settings(runs)}) > 2]
    differing = [i for i in range(4) if len({group[i] for group, _ in groups}) > 1]
    return [(_heading(g, runs), runs, "".join(f"_{g[i]}" for i in differing)) for g, runs in groups]


def _best_rates(runs) -> str:
    """The lines of --best_rates, without spaces in method names. NEXT_RATE is beyond the rates
    tried; it is given if the best is the lowest or highest of them."""
    sweeps = split(runs)[2]
    if len(grouped(sweeps)) != 1:
        found = "; ".join(_heading(*group) for group in grouped(sweeps)) or "none"
        raise UserError(f"--best_rates needs the runs with --val_split of one sweep: {found}")
    best = best_learning_rates(sweeps)
    for method in dict.fromkeys(s.method for s in settings(sweeps) if s.method not in best):
        print(f"results.py: no finished run of {method}", file=sys.stderr)
    beyond = rates_beyond(sweeps)
    lines = (f"{m.replace(', ', ',')} {rate} {beyond.get(m, '')}" for m, rate in best.items())
    return "\n".join(line.strip() for line in lines)


@reported
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", nargs="*", metavar="LOG", help="result logs of training runs")
    parser.add_argument("--brief", action="store_true", help="print one table, one row per model")
    parser.add_argument("--update", metavar="FILE", help="write the tables of FILE again")
    parser.add_argument("--figures", metavar="DIR", help="draw the figures into this folder")
    parser.add_argument("--best_rates", action="store_true", help="print what a sweep chose")
    args = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    if args.update:
        if args.logs:
            raise UserError(f"--update {args.update}: the file names the logs, not the command")
        update(args.update)
        print(args.update)
        return
    runs = read_logs(args.logs)
    if args.best_rates:
        print(_best_rates(runs))
    if args.figures:
        print(*draw(runs, args.figures), sep="\n")
    if not (args.best_rates or args.figures):
        print(_tables(runs, args.brief))


if __name__ == "__main__":
    sys.exit(main())
