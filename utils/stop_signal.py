"""Signals that ask a run to stop."""

import os
import signal
import sys
import time

from utils import dist_util

# SIGUSR1 is SLURM's notice that time runs out: the job is queued again, which is no failure.
EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}


class StopSignal:
    """SIGTERM, SIGINT or SIGUSR1 asks to stop after the step; a second one stops at once.

    Until `began` is set, after a first step, there is nothing to save: the first stops at once too.
    """

    def __init__(self):
        self.received, self.began = None, False
        for number in EXIT_STATUS:
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if self.received:
            # torchrun forwards a signal that all processes may have received already.
            if dist_util.world_size() == 1 or time.monotonic() > self.time + 2:
                os._exit(128 + number)
            return
        self.received, self.time = signal.Signals(number), time.monotonic()
        if not self.began:
            sys.exit(self.exit_status)
        if dist_util.is_main():  # no print: the signal may have interrupted one
            text = f"{self.received.name}: stops after this step; a second one stops at once\n"
            os.write(2, text.encode())

    @property
    def now(self):
        """Whether to stop before the next step; several processes wait until they can agree."""
        return self.received is not None and dist_util.world_size() == 1

    def agreed(self):
        """Whether any process was asked to stop; all processes must call it."""
        return dist_util.any_process(self.received is not None)

    @property
    def exit_status(self):
        return EXIT_STATUS[self.received] if self.received else 0
