"""Checkpoints: written atomically with a digest, read verified and without executing anything."""

import fcntl
import hashlib
import os
import pickle
import socket
import struct
from contextlib import contextmanager
from pathlib import Path

import torch

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

    def write(self, data):
        self.file.write(data)
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
    part = path.with_name(path.name + ".part")
    try:
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
    except (OSError, RuntimeError) as error:  # torch.save wraps some OSErrors
        part.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {str(error).splitlines()[0]}") from None


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


@contextmanager
def lock(path, active=True):
    """Hold the run's lock file, or raise CheckpointError naming the process that holds it.

    The operating system drops the lock with the process, however that ends.
    """
    if not active:
        yield
        return
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
        yield
    finally:
        os.unlink(path)
        file.close()
