"""Processes: how many, that helpers end with the one that started them, and how one with foreign threads ends."""

import atexit
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

POLL = 0.2  # seconds


def available_cores() -> int:
    """The CPU cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with(parent: int) -> None:
    """Ends this process once its parent is gone; run it in a daemon thread. A new run may be at work by then."""
    while os.getppid() == parent:
        time.sleep(POLL)
    os._exit(1)


@contextmanager
def leaving() -> Iterator[None]:
    """Ends the process after the block with the status that it would have had, but without taking the interpreter down.

    Gloo's threads outlive `destroy_process_group`, since FSDP2 and device meshes keep the groups. One that still holds a
    tensor while the interpreter goes aborts the process, minutes of work after everything was written (PyTorch issue
    190489). What was registered with `atexit` runs, and both streams are flushed; an exception goes its usual way.
    """
    status = 0
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise  # a message, which the interpreter prints
        status = end.code or 0
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
