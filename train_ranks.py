"""The processes of a run (torchrun's ranks), the device of each, and what they tell each other."""

import os
import signal
import time


def watch_parent(parent: int, patience: float = 120.0) -> None:
    """End a rank whose torchrun was killed, which can no longer end it: by SIGTERM, so that a run saves first."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(patience)  # in a collective that others have left, nobody would come to handle the signal
    os._exit(128 + signal.SIGTERM)
