"""Compares runs: which ones differ only in their seeds, and what they reached."""

from collections import defaultdict
from dataclasses import dataclass
from statistics import mean

from recipes import OPTIMIZERS, RECIPES
from utils.log_reader import OPERATIONAL, RunLog

# Flags that do not distinguish methods: how a run was carried out, and what its group, its name or
# its column in a table says already.
NO_METHOD = {*OPERATIONAL, "eval_every", "dataset", "recipe", "model_type", "num_steps"}
NO_METHOD |= {"norm_type", "learning_rate", "seed", "img_size", "pretrained_dir"}
# What a recipe sets that has a flag. The rest are entries for --set.
FLAGS = "model_type img_size train_batch_size num_steps learning_rate weight_decay".split()
FLAGS += "warmup_steps decay_type max_grad_norm eval_every".split()


@dataclass(frozen=True)
class Setting:
    """Runs of one method and peak learning rate, which differ only in their seeds."""

    method: str
    rate: float
    runs: list[RunLog]

    @property
    def accuracies(self) -> list[float]:
        """In [0, 1], at the end of the schedule, one per seed; a run that did not end has none."""
        ended = [run for run in self.runs if run.finished and run.steps]
        return list({run.flags.get("seed"): run.final_accuracy for run in ended}.values())

    @property
    def mean(self) -> float | None:
        return mean(self.accuracies) if self.accuracies else None

    @property
    def diverged(self) -> int:
        return sum(run.diverged for run in self.runs)


def grouped(runs) -> list[tuple]:
    """((dataset, recipe, model and image size, num_steps), its runs) of all of these, sorted."""
    groups = defaultdict(list)
    for run in runs:
        steps = run.flags.get("num_steps", 0)
        model = f"{run.model_type} at {run.img_size} px"
        groups[run.dataset, run.flags["recipe"], model, steps].append(run)
    return sorted(groups.items())


def settings(runs: list[RunLog]) -> list[Setting]:
    """The runs by method, then by learning rate.

    A method is its norm type, with a * if it started from pretrained weights, and the other flags
    that are not the same in all of `runs`.
    """
    names = {name for run in runs for name in run.flags} - NO_METHOD
    names = [n for n in sorted(names) if len({str(run.flags.get(n)) for run in runs}) > 1]
    found = defaultdict(list)
    for run in runs:
        values = [(name, run.flags.get(name)) for name in names]
        words = [f"{name}={value}" for name, value in values if value not in (None, "none")]
        method = ", ".join([run.norm_type + "*" * run.pretrained, *words])
        found[method, run.flags.get("learning_rate", 0.0)].append(run)
    return [Setting(*key, members) for key, members in sorted(found.items())]


def changes(runs: list[RunLog]) -> list[str]:
    """`name=value` of the entries without a flag that all of these runs of one recipe have in
    common, but not with the recipe.
    """
    recipe = dict(RECIPES.get(runs[0].flags["recipe"], dict)())
    recipe = OPTIMIZERS.get(recipe.get("optimizer"), {}) | recipe
    changed = []
    for name in sorted(recipe.keys() - set(FLAGS)):
        value, *others = [run.flags.get(name) for run in runs]
        if value not in (None, recipe[name]) and all(other == value for other in others):
            changed.append(f"{name}={value}")
    return changed


def split(runs) -> tuple[list, list, list]:
    """The test runs of the reference's recipe, those of others, and the runs on held-out images."""
    tests = [run for run in runs if not run.flags["val_split"]]
    reference = [run for run in tests if run.flags["recipe"] == "reference"]
    others = [run for run in tests if run.flags["recipe"] != "reference"]
    return reference, others, [run for run in runs if run.flags["val_split"]]


def best_learning_rates(runs: list[RunLog]) -> dict[str, float]:
    """{method: learning rate} of the best final validation accuracy among the finished runs."""
    best = {}
    for setting in settings(split(runs)[2]):
        if setting.mean is not None and setting.mean > best.get(setting.method, (-1,))[0]:
            best[setting.method] = setting.mean, setting.rate
    return {method: rate for method, (_, rate) in best.items()}


def rates_beyond(runs: list[RunLog]) -> dict[str, float]:
    """{method: half or twice its best learning rate}, where that is the lowest or highest tried."""
    tried = defaultdict(list)
    for setting in settings(split(runs)[2]):
        tried[setting.method].append(setting.rate)
    beyond = {}
    for method, rate in best_learning_rates(runs).items():
        if rate in (min(tried[method]), max(tried[method])):
            beyond[method] = rate / 2 if rate == min(tried[method]) else 2 * rate
    return beyond
