"""Errors that end a program with one line instead of a traceback."""

import functools
import os
import re
import sys
from pathlib import Path

# On a CPU, PyTorch reports this as a plain RuntimeError.
OUT_OF_MEMORY = re.compile("out of memory|allocate memory|bad_alloc")


class UserError(ValueError):
    """The user's mistake, or a fault of the machine that the user can fix: one line, status 2."""


class DivergedError(ArithmeticError):
    """Training met a loss or gradient that is not finite: one line, status 1."""


def is_out_of_memory(error):
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


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
                reason = error.strerror or " ".join(map(str, error.args))
                line = f"{os.fsdecode(error.filename)}: {reason}"
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            line = (
                "not enough memory: lower --train_batch_size, --eval_batch_size or --img_size,"
                " raise --gradient_accumulation_steps, or use --grad_checkpointing"
            )
            status = 2
        # main()'s objects are gone by now, so a progress bar has ended its line.
        sys.stderr.write(f"{program}: error: {line}\n")
        return status

    return run
