"""Checkpoints: written atomically with a digest, read verified and without executing anything."""

import fcntl
import glob
import hashlib
import os
import pickle
import socket
import struct
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from utils import dist_util
from utils.args import UsageError, result_flags

# A checkpoint is a plain torch.save file, i.e. a zip archive. The archive's comment, its last
# bytes, holds the SHA-256 of all before it.
MARK = b"sha256:"
TAIL = struct.Struct(f"<H{len(MARK)}s64s")  # comment length, mark, hexadecimal digest


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message is one line for the user."""


class _HashingFile:
    """A file that hashes what is written to it, the last two bytes held back."""

    def __init__(self, file):
        self.file, self.sha, self.last = file, hashlib.sha256(), b""
        self.error = None  # torch.save hides it behind one of its own

    def write(self, data):
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        held = self.last + bytes(memoryview(data)[-2:])
        if len(data) >= 2:
            self.sha.update(self.last)
            self.sha.update(memoryview(data)[:-2])
        else:
            self.sha.update(held[:-2])
        self.last = held[-2:]
        return len(data)

    def flush(self):
        self.file.flush()


def save_checkpoint(content, path):
    """Write `content` to `path`: a temporary name, fsync, rename, fsync of the folder.

    Raises CheckpointError (disk full, read-only folder, ...); a file already at `path` is then
    as it was.
    """
    path = Path(path)
    part, hashing = path.with_name(path.name + ".part"), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # it may be deleted while the run goes on
        with open(part, "wb") as file:
            hashing = _HashingFile(file)
            torch.save(content, hashing)
            # torch.save ends with an empty comment's length, 0: replaced by ours.
            file.seek(-2, os.SEEK_END)
            digest = hashing.sha.hexdigest().encode()
            file.write(TAIL.pack(len(MARK) + len(digest), MARK, digest))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            part.unlink()
        error = (hashing and hashing.error) or error
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"cannot write {path}: {reason}") from None


def load_checkpoint(path, digest_required=False):
    """The dict in `path`: ours, or {"model": state dict} for a bare state dict of others.

    Tensors are on the CPU. Only tensors and plain containers are read (weights_only): a file that
    wants more is refused. Raises CheckpointError.
    """
    path = Path(path)
    try:
        _verify(path, digest_required)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path}: refused, it holds more than tensors") from None
    except CheckpointError:
        raise
    except Exception as error:  # torch.load raises almost anything on a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: no readable checkpoint ({reason})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: no checkpoint (it holds a {type(content).__name__})")
    return content if isinstance(content.get("model"), dict) else {"model": content}


def load_weights(model, state_dict, path):
    """Load `state_dict`, of the file `path`, into `model`; CheckpointError if it does not fit."""
    try:
        model.load_state_dict(state_dict)
    except Exception:  # a hand-made one fails in a dozen ways
        raise CheckpointError(f"{path}: its weights do not fit the model") from None


def _verify(path, digest_required):
    """Raise CheckpointError unless the digest, where there is one, fits the file."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        tail = b""
        if size >= TAIL.size:
            file.seek(-TAIL.size, os.SEEK_END)
            tail = file.read()
        length, mark, digest = TAIL.unpack(tail) if tail else (0, b"", b"")
        if length != len(MARK) + 64 or mark != MARK:
            if digest_required:
                raise CheckpointError(f"{path}: damaged, its end is missing")
            return
        sha, left = hashlib.sha256(), size - TAIL.size
        file.seek(0)
        while left:
            data = file.read(min(left, 1 << 22))
            sha.update(data)
            left -= len(data)
        if sha.hexdigest().encode() != digest:
            raise CheckpointError(f"{path}: damaged, its SHA-256 does not fit")


def find_checkpoint(args, files):
    """What the run goes on from: a checkpoint's content or None, and lines for its log.

    Raises UsageError where files of the run exist but it is not to be resumed, or where a
    checkpoint's flags are not the run's; CheckpointError where --resume FILE cannot be read.
    """
    if not args.resume:
        if files.existing() and not args.overwrite:
            raise UsageError(
                f"this run exists ({files.existing()}): --resume continues it, --overwrite starts"
                " anew"
            )
        return None, []
    notes = []
    for path in files.steps() if args.resume == "auto" else [Path(args.resume)]:
        try:
            saved = load_checkpoint(path, digest_required=True)
            _check_continues(args, saved, path)
            return saved, notes
        except CheckpointError as error:
            if args.resume != "auto":
                raise CheckpointError(f"--resume {error}") from None
            notes.append(f"{error}; passed over")
    if dist_util.is_main():
        print(f"--resume: {args.output_dir} has no good checkpoint of these flags: from the start")
    return None, notes


def _check_continues(args, saved, path):
    """Raise UsageError if `saved`, of `path`, does not continue a run of these flags."""
    if "run" not in saved:
        raise CheckpointError(f"{path}: holds weights only, a run cannot continue from it")
    run, ours, theirs = saved["run"], result_flags(args), saved.get("flags")
    if not (_is_run_state(run) and _are_flags(theirs)):
        raise CheckpointError(f"{path}: no checkpoint of this program")
    differing = {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)}
    if ours["num_steps"] > theirs["num_steps"] and run["step"] <= args.warmup_steps:
        differing -= {"num_steps"}  # during the warmup the schedule does not depend on it
    if differing:
        texts = (f"--{k} {ours.get(k)} (there {theirs.get(k)!r})" for k in sorted(differing))
        raise UsageError(f"--resume {path}: the run was made with other flags: {', '.join(texts)}")


def _is_run_state(run):
    """Whether `run` is what train.py keeps of where it stands."""
    counts = ("step", "window", "skipped", "skipped_in_a_row", "evaluated")
    return (
        isinstance(run, dict)
        and all(type(run.get(k)) is int and run[k] in range(10**12) for k in counts)
        and all(type(run.get(k)) is float for k in ("seconds", "accuracy", "best_accuracy"))
    )


def _are_flags(flags):
    """Whether `flags` is what `result_flags` gives: plain values by name."""
    return (
        isinstance(flags, dict)
        and all(isinstance(k, str) and k.isidentifier() for k in flags)
        and all(v is None or isinstance(v, (bool, int, float, str)) for v in flags.values())
        and type(flags.get("num_steps")) is int
    )


def save_run(files, precision, run, args):
    """Save all that the run needs to continue; keep this checkpoint and the one before it.

    Randomness needs no saving: it is a function of the seed and the place in the data.
    """
    content = {
        "model": precision.model_state_dict(),
        "precision": precision.state_dict(),
        "optimizer": precision.optimizer.state_dict(),
        "run": run,
        "flags": result_flags(args),
    }
    newest = files.step(run["step"])
    save_checkpoint(content, newest)
    steps = files.steps()
    place = steps.index(newest)  # what is beyond is damaged, or of a course that was given up
    for path in steps[:place] + steps[place + 2 :]:
        path.unlink(missing_ok=True)


def save_weights(path, precision, run, args):
    """Save the weights alone, in fp32, with the flags and the test accuracy."""
    content = {"model": precision.model_state_dict(), "flags": result_flags(args)}
    save_checkpoint(content | {"step": run["step"], "accuracy": run["accuracy"]}, path)


@contextmanager
def lock(path, active=True):
    """Hold the run's lock file, or raise CheckpointError naming the process that holds it.

    The operating system drops the lock with the process, however that ends.
    """
    if not active:
        yield
        return
    path = Path(path)
    while True:
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise CheckpointError(
                f"this run is under way already: {file.read().strip() or 'unknown process'}"
                f" holds {path}"
            ) from None
        if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            break
        file.close()  # its holder removed it in between
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on host {socket.gethostname()}\n")
        file.flush()
        for part in path.parent.glob(f"{glob.escape(path.stem)}_*.part"):
            part.unlink(missing_ok=True)  # of a process that was killed while it wrote
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        file.close()
