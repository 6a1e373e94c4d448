"""Ends a run whose loss or gradients are not finite."""

import torch

from utils.errors import DivergedError
from utils.run_logger import fault

MAX_SKIPPED = 50  # skipped steps in a row that end a run


def check_finite(run, step, records, precision, batches, parts, log, files):
    """Count skipped steps in `run`; `records` are the StepRecords of the steps up to `step`.

    One is too many without a loss scale, MAX_SKIPPED in a row with one: then the training images
    of that step are logged, and DivergedError is raised.
    """
    for number, record in enumerate(records, step - len(records) + 1):
        if record.finite:
            run["skipped_in_a_row"] = 0
            continue
        run["skipped_in_a_row"] += 1
        if precision.scaled and run["skipped_in_a_row"] < MAX_SKIPPED:
            continue
        indices = [batches.indices(i) for i in range((number - 1) * parts, number * parts)]
        log.info(f"Training images of the step: {torch.cat(indices).tolist()}")
        good = next(iter(files.steps()), "none")
        raise DivergedError(
            f"not finite: {fault(number, record)}; its images' indices are in {files.log}; last"
            f" good checkpoint: {good}"
        )
