"""Errors that end a program with one line instead of a traceback."""

import functools
import os
import re
import sys
from pathlib import Path

OUT_OF_MEMORY = re.compile("out of memory|allocate memory|bad_alloc")  # it has no type on a CPU


class UserError(ValueError):
    """The user's mistake, or a fault of the machine that the user can fix: one line, status 2."""


class DivergedError(ArithmeticError):
    """Training met a loss or gradient that is not finite: one line, status 1."""


def reported(main):
    """Decorator of a program's main(): its errors become one line on stderr and an exit status."""
    program = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def run():
        sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be text
        try:
            return main()
        except KeyboardInterrupt:
            return 130
        except (UserError, DivergedError) as error:
            line, status = str(error), 1 if isinstance(error, DivergedError) else 2
        except OSError as error:
            line, status = str(error), 2
            if error.filename:
                line = f"{os.fsdecode(error.filename)}: {error.strerror}"
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error))):
                raise
            line = (
                "not enough memory: lower --train_batch_size, --eval_batch_size or --img_size,"
                " raise --gradient_accumulation_steps, or use --grad_checkpointing"
            )
            status = 2
        # The error no longer keeps main()'s objects alive: a progress bar has ended its line.
        sys.stderr.write(f"{program}: error: {line}\n")
        return status

    return run
