"""Checkpoints: written atomically, verified when read, without executing anything."""

import os
import pickle
import zipfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from filelock import FileLock, Timeout

from models.configs import CONFIGS
from models.modeling import build_model
from models.norms import NORM_TYPES
from recipes import reference
from utils import dist_util
from utils.args import ENTRIES
from utils.data_utils import CLASSES, DATASETS
from utils.errors import UserError, is_out_of_memory
from utils.run_files import result_flags

FORMAT = 4  # of the checkpoints that continue a run


def save_checkpoint(content, path):
    """Write `content` to `path`, whole or not at all, as `write_file` does.

    A checkpoint is a plain torch.save file, a zip archive with a CRC for each of its entries.
    """
    write_file(path, lambda file: torch.save(content, file))


def write_file(path, write):
    """Have `write(file)` fill a temporary file; fsync it, rename it to `path`, fsync the folder.

    Raises OSError (disk full, read-only folder, ...); a file already at `path` stays as it was.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        while error.__context__ and not isinstance(error, OSError):
            error = error.__context__  # torch.save hides the OSError behind its own
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
        raise error from None


def load_checkpoint(path):
    """The dict in `path`: ours, or {"model": state dict} for a bare state dict of others.

    Tensors are on the CPU. Only tensors and plain containers are read (weights_only): a file with
    anything else is refused. Raises UserError.
    """
    path = Path(path)
    try:
        if zipfile.is_zipfile(path):  # torch.load does not check the CRCs of these
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise UserError(f"{path}: damaged, the CRC of {damaged} does not match")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused, it holds more than tensors") from None
    except UserError:
        raise
    except Exception as error:  # torch.load raises almost anything on a damaged file
        if isinstance(error, PermissionError) or is_out_of_memory(error):
            raise  # the file may be good
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: no readable checkpoint ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: no checkpoint (it holds a {type(content).__name__})")
    return content if isinstance(content.get("model"), dict) else {"model": content}


def load_weights(model, state_dict, path):
    """Load `state_dict`, of the file `path`, into `model`; UserError names what does not fit."""
    ours = model.state_dict()
    for key in [*ours, *state_dict]:
        want, got = (getattr(state.get(key), "shape", None) for state in (ours, state_dict))
        if want is None or got is None or want != got:
            shapes = [shape if shape is None else tuple(shape) for shape in (got, want)]
            raise UserError(
                f"{path}: its weights do not fit the model: {key} is {shapes[0]}, the model's is"
                f" {shapes[1]}".replace("None", "missing")
            )
    model.load_state_dict(state_dict)


def load_model(path, vis=False):
    """The model in the checkpoint `path` of a run, and the run's flags. Raises UserError."""
    saved = load_checkpoint(path)
    if "flags" not in saved:
        raise UserError(f"{path} holds only weights, not the flags of their run")
    flags = SimpleNamespace(**flags_of(saved))
    check_flags(flags, f"{path}: its ")
    model = build_model(flags, len(CLASSES[flags.dataset]), vis)
    load_weights(model, saved["model"], path)
    return model, flags


def flags_of(saved):
    """A checkpoint's flags; those added since then get the values for what its run did."""
    return {"qk_norm": "none", "val_split": 0} | reference().to_dict() | saved["flags"]


def check_flags(flags, source):
    """Raise UserError, which names their `source`, if there is no model of these flags."""
    for flag, known in (("model_type", CONFIGS), ("norm_type", NORM_TYPES), ("dataset", DATASETS)):
        value = getattr(flags, flag, None)
        if value not in known:
            raise UserError(f"{source}{flag} {value} is unknown here; known are {', '.join(known)}")
    size, patch = flags.img_size, CONFIGS[flags.model_type].patches.size[0]
    if not isinstance(size, int) or size < 1 or size % patch:
        raise UserError(f"{source}img_size {size} is not a multiple of the patch of {patch} pixels")


def find_checkpoint(args, files):
    """What the run continues from: a checkpoint's content or None, and lines for its log.

    Raises UserError if files of the run exist but it is not to be resumed, if --resume FILE cannot
    be read, or if a checkpoint's flags are not the run's.
    """
    if not args.resume:
        if files.existing() and not args.overwrite:
            raise UserError(
                f"this run exists ({files.existing()}): --resume continues it, --overwrite starts"
                " over"
            )
        return None, []
    notes = []
    for path in files.steps() if args.resume == "auto" else [Path(args.resume)]:
        try:
            saved = load_checkpoint(path)
        except UserError as error:
            if args.resume != "auto":
                raise UserError(f"--resume {error}") from None
            notes.append(f"{error}; passed over")
        else:
            _check_continues(args, saved, path)
            return saved, notes
    if dist_util.is_main():
        print(f"--resume: {args.output_dir} has no good checkpoint of these flags: from the start")
    return None, notes


def _check_continues(args, saved, path):
    """Raise UserError if `saved`, of `path`, cannot continue a run with these flags."""
    if "run" not in saved:
        raise UserError(f"--resume {path}: holds weights only, a run cannot continue from it")
    if saved.get("format") != FORMAT:
        raise UserError(f"--resume {path}: was written by another version of this program")
    ours, theirs = result_flags(args), flags_of(saved)
    differing = {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)}
    if ours["num_steps"] > theirs["num_steps"] and saved["run"]["step"] <= args.warmup_steps:
        differing -= {"num_steps"}  # during the warmup the schedule does not depend on it
    if differing:
        texts = (
            f"{'' if k in ENTRIES else '--'}{k} {ours.get(k)} (there {theirs.get(k)!r})"
            for k in sorted(differing)
        )
        raise UserError(f"--resume {path}: the run was made with other flags: {', '.join(texts)}")


def restore(saved, precision, machine, files):
    """Give `precision` the weights and the rest of `saved`; returns the run's state and notes.

    The notes are lines for its log. `machine` says what was chosen for this machine.
    """
    precision.load_state_dict(saved)
    run, notes = saved["run"], []
    if run["machine"] != machine:
        notes = [f"Not exact from here on: {machine}; before, {run['machine']}"]
        run["machine"] = machine
    if not files.best.exists():  # e.g. --resume FILE continues under another name
        run["best_accuracy"] = 0.0
    return run, notes


def save_run(files, precision, run, args):
    """Save all that the run needs to continue; keep this checkpoint and the one before it.

    Randomness needs no saving: it is a function of the seed and the step.
    """
    content = {"format": FORMAT, "run": run, "flags": result_flags(args)}
    content["log"] = {files.log.name: files.log.read_text(encoding="utf-8")}
    newest = files.step(run["step"])
    save_checkpoint(content | precision.state_dict(), newest)
    steps = files.steps()
    place = steps.index(newest)  # newer ones are damaged, or undone by resuming an earlier one
    for path in steps[:place] + steps[place + 2 :]:
        path.unlink(missing_ok=True)


def save_weights(path, precision, run, args):
    """Save only the weights, in fp32, with the flags and the test accuracy."""
    content = {"model": precision.model_state_dict(), "flags": result_flags(args)}
    save_checkpoint(content | {"step": run["step"], "accuracy": run["accuracy"]}, path)


@contextmanager
def lock(files):
    """Hold the run's two lock files, or raise UserError. The end of the process frees them."""
    with ExitStack() as stack:
        for path in (files.lock, files.tensorboard_lock) if dist_util.is_main() else ():
            try:
                stack.enter_context(FileLock(path, timeout=0))
            except Timeout:
                raise UserError(f"this run is already under way: {path} is locked") from None
        for part in files.leftovers():
            part.unlink(missing_ok=True)  # of a process that was killed while it wrote
        yield
