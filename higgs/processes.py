"""Helper processes: how many, and that they end with the one that started them."""

import os
import time

POLL = 0.2  # seconds


def available_cores() -> int:
    """The CPU cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with(parent: int) -> None:
    """Ends this process once its parent is gone; run it in a daemon thread. A new run may be at work by then."""
    while os.getppid() == parent:
        time.sleep(POLL)
    os._exit(1)
