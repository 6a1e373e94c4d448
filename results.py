"""Turns result logs into Markdown tables of best test accuracy and training time.

    python3 results.py output/*.txt
    python3 results.py --csv output/*.txt

One table a dataset, one row a model, one column a norm type. Accuracies are in percent.
"""

import argparse
import csv
import signal
import sys

from utils.errors import reported
from utils.log_reader import RunLog, read_log

FIELDS = "dataset,model,norm,pretrained,best_accuracy_percent,minutes,steps,finished".split(",")


def markdown_tables(runs: list[RunLog]) -> str:
    """The runs' results, one table a dataset; several runs of one cell stand side by side in it."""
    tables = []
    for dataset in sorted({run.dataset for run in runs}):
        of_dataset = [run for run in runs if run.dataset == dataset]
        rows = sorted({_row(run) for run in of_dataset})
        # LN, the baseline, comes first.
        columns = sorted({_column(run) for run in of_dataset}, key=lambda c: (c[0] != "LN", c))
        lines = [
            f"### {dataset}",
            "",
            "| model | " + " | ".join(norm + " pretrained" * pre for norm, pre in columns) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for row in rows:
            cells = [
                ", ".join(_cell(r) for r in of_dataset if (_row(r), _column(r)) == (row, column))
                for column in columns
            ]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _row(run: RunLog) -> str:
    return run.model_type if run.img_size == 224 else f"{run.model_type} at {run.img_size} px"


def _column(run: RunLog) -> tuple[str, bool]:
    return run.norm_type, run.pretrained


def _cell(run: RunLog) -> str:
    """`67.6 (68.5 min)`, or of an unfinished run `31.1 (at step 200 of 20000)`."""
    if not run.steps:
        return "no evaluation"
    accuracy = f"{100 * run.best_accuracy:.1f}"
    if not run.finished:
        return f"{accuracy} (at step {run.steps[-1]} of {run.flags.get('num_steps', '?')})"
    return accuracy if run.minutes is None else f"{accuracy} ({run.minutes:.1f} min)"


def write_csv(runs: list[RunLog], file) -> None:
    """One line a run; what its log does not hold is left empty."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(FIELDS)
    for run in runs:
        accuracy = "" if run.best_accuracy is None else f"{100 * run.best_accuracy:.1f}"
        writer.writerow(
            (run.dataset, run.model_type, run.norm_type, "FT"[run.pretrained])
            + (accuracy, run.minutes, run.steps[-1] if run.steps else 0, "FT"[run.finished])
        )


@reported
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", nargs="+", metavar="LOG", help="result logs of training runs")
    parser.add_argument("--csv", action="store_true", help="write CSV, one line a log")
    args = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    runs = [read_log(path) for path in args.logs]
    if args.csv:
        write_csv(runs, sys.stdout)
    else:
        print(markdown_tables(runs))


if __name__ == "__main__":
    sys.exit(main())
