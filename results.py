"""Turns result logs into Markdown tables and figures.

    python3 results.py output/*.txt                     # prints the tables
    python3 results.py --update README.md output/*.txt  # writes them between the file's markers
    python3 results.py --figures img output/*.txt       # draws accuracy_by_*.png
    python3 results.py --best_rates output/*.txt        # METHOD LEARNING_RATE [NEXT_RATE] lines

Runs of the reference's recipe are shown as the reference published its own: best test accuracy and
minutes. Other recipes' runs count at the end of their schedule, over seeds; a * marks pretrained
weights. Runs with --val_split are a sweep: validation accuracy by learning rate. Files that are no
result logs are passed over.
"""

import argparse
import os
import re
import shutil
import signal
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from utils.comparison import best_learning_rates, grouped, rates_beyond, settings, split
from utils.errors import UserError, reported
from utils.log_reader import RunLog, read_log
from utils.vis_utils import compute_figure, learning_rate_figure, method_figure, save_figure

MARKERS = "<!-- results -->", "<!-- /results -->"  # each a line of its own
# CIFAR-10 from scratch: PFLOP of training, test accuracy. CCT and ViT-Lite, 200 epochs: Hassani et
# al. 2021, "Escaping the Big Data Paradigm with Compact Transformers". MiniViT, 80 epochs: the
# repository of tonelli. ViT-B_16: the reference's README, the best of its evaluations.
PUBLISHED = [
    ("CCT-2/3x2", 2.0, 0.8917),
    ("CCT-4/3x2", 2.8, 0.9145),
    ("ViT-Lite-7/4", 14.3, 0.9138),
    ("MiniViT (tonelli)", 3.0, 0.8218),
    ("ViT-B_16 (reference)", 252, 0.697),
]


def read_logs(paths) -> list[RunLog]:
    """The runs of the files that are result logs; reports the others. Raises UserError, OSError."""
    runs, faults = [], []
    for path in paths:
        try:
            runs.append(read_log(path))
        except UserError as error:
            faults.append(str(error))
    if not runs:
        raise UserError("; ".join(faults))
    for fault in faults:
        print(f"results.py: passed over: {fault}", file=sys.stderr)
    return runs


def markdown_tables(runs: list[RunLog]) -> str:
    """All tables, each under its heading."""
    reference, others, sweeps = split(runs)
    tables = {}
    for dataset in sorted({run.dataset for run in reference}):
        tables[dataset] = _reference_table([run for run in reference if run.dataset == dataset])
    for group, members in grouped(others):
        tables[_heading(group)] = _test_table(members)
    for group, members in grouped(sweeps):
        heading = f"{_heading(group)}: final validation accuracy (%) by peak learning rate"
        tables[heading] = _sweep_table(members)
    return "\n\n".join(f"### {heading}\n\n{table}" for heading, table in tables.items())


def _heading(group) -> str:
    dataset, recipe, model, steps = group
    return f"{dataset}, recipe {recipe}, {model}, {steps} steps"


def _reference_table(runs) -> str:
    """A row per model, a column per norm type; several runs of one cell stand side by side."""
    cells = defaultdict(list)
    for run in runs:
        row = run.model_type if run.img_size == 224 else f"{run.model_type} at {run.img_size} px"
        usual = {"qk_norm": "none", "optimizer": "sgd"}
        words = [f"{name}={run.flags[name]}" for name in usual if run.flags[name] != usual[name]]
        words += ["pretrained"] * run.pretrained
        cells[row, " ".join([run.norm_type, *words])].append(_cell(run))
    rows, columns = (sorted(set(names)) for names in zip(*cells))
    columns.sort(key=lambda name: name.split()[0] != "LN")  # LN, the baseline, comes first
    body = [[row, *(", ".join(cells[row, column]) for column in columns)] for row in rows]
    return _markdown(["model", *columns], body)


def _cell(run: RunLog) -> str:
    """`67.6 (68.5 min)`, or of an unfinished run `31.1 (at step 200 of 20000)`."""
    if not run.steps:
        return "no evaluation"
    accuracy = f"{100 * run.best_accuracy:.1f}"
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


def update(path, tables: str) -> None:
    """Puts `tables` between the MARKERS in the file at `path`. Raises UserError, OSError."""
    text = Path(path).read_bytes().decode(errors="surrogateescape")
    begin, end = MARKERS
    if re.findall(r"^<!-- /?results -->(?=\r?$)", text, re.M) != [begin, end]:
        raise UserError(f"{path} must hold the line {begin} once and, below it, {end} once")
    pattern = rf"(?ms)^({begin}\r?\n).*?^(?={end}\r?$)"
    text = re.sub(pattern, lambda found: f"{found[1]}\n{tables}\n\n", text)
    target = Path(path).resolve()  # where a link leads
    temporary = target.with_name(target.name + ".tmp")
    try:
        temporary.write_bytes(text.encode(errors="surrogateescape"))
        shutil.copymode(target, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def draw(runs: list[RunLog], folder) -> list[Path]:
    """Draws the figures that `runs` have numbers for; returns their paths. Raises UserError."""
    reference, others, sweeps = split(runs)
    figures = {}
    for heading, members, suffix in _suffixed(others):
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
        points += [(_heading(group), run.pflop, run.final_accuracy) for run in ended]
    if points:
        figures["accuracy_by_compute"] = compute_figure(points, PUBLISHED)
    if not figures:
        raise UserError("no log holds anything to draw")
    return [save_figure(figures[name], Path(folder) / f"{name}.png") for name in figures]


def _suffixed(runs):
    """(heading, its runs, suffix) of each group; the suffix is what the groups differ in."""
    groups = grouped(runs)
    differing = [i for i in range(4) if len({group[i] for group, _ in groups}) > 1]
    return [(_heading(g), runs, "".join(f"_{g[i]}" for i in differing)) for g, runs in groups]


def _best_rates(runs) -> str:
    """The lines of --best_rates, without spaces in method names. NEXT_RATE is beyond the rates
    tried; it is given if the best is the lowest or highest of them."""
    sweeps = split(runs)[2]
    if len(grouped(sweeps)) != 1:
        found = "; ".join(_heading(group) for group, _ in grouped(sweeps)) or "none"
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
    parser.add_argument("logs", nargs="+", metavar="LOG", help="result logs of training runs")
    parser.add_argument("--update", metavar="FILE", help="write the tables into FILE")
    parser.add_argument("--figures", metavar="DIR", help="draw the figures into this folder")
    parser.add_argument("--best_rates", action="store_true", help="print what a sweep chose")
    args = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    runs = read_logs(args.logs)
    if args.best_rates:
        print(_best_rates(runs))
    if args.update:
        update(args.update, markdown_tables(runs))
        print(args.update)
    if args.figures:
        print(*draw(runs, args.figures), sep="\n")
    if not (args.best_rates or args.update or args.figures):
        print(markdown_tables(runs))


if __name__ == "__main__":
    sys.exit(main())
