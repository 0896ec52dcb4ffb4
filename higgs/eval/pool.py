"""Processes that score samples, one CPU core each; a sample that ends its process becomes an error, not the end of a run."""

import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Protocol

import torch
from threadpoolctl import threadpool_limits

from higgs.eval.judges.base import Judge
from higgs.processes import available_cores, end_with

Row = dict[str, Any]


class Job(Protocol):
    """What is computed for one sample, from arrays that it brings along; it must be importable by name."""

    def run(self, judges: dict[str, Judge]) -> Row:
        """The columns of the sample's row that this job finds. What fails stands in its `error`."""


@dataclass
class Ticket:
    """A job on its way."""

    job: Job
    future: Future | None
    executor: ProcessPoolExecutor | None


class ScoringPool:
    """Runs jobs in `processes` processes, each with its own light judges; 0 runs them in this process.

    Results do not depend on the number of processes: each works with one thread, and 0 as well.

    Args:
        processes: None: one a core; where this process needs cores itself one for every second, but two if there are two.
        busy: whether this process computes on the CPU meanwhile. It then takes the cores that the others leave, for
            threads that wait for a core which another process holds cost more than they bring (here a half).
    """

    def __init__(self, judges: dict[str, Judge], processes: int | None = None, busy: bool = False) -> None:
        self.judges = judges
        cores = available_cores()
        self.processes = (max(min(cores, 2), cores // 2) if busy else cores) if processes is None else processes
        self._threads = torch.get_num_threads()
        if busy and self.processes:
            torch.set_num_threads(max(1, min(self._threads, cores - self.processes)))
        self._executor = self._start(self.processes) if self.processes else None
        if not self.processes:
            for judge in judges.values():
                judge.load()

    def submit(self, job: Job) -> Ticket:
        if self._executor is None:
            return Ticket(job, None, None)
        try:
            return Ticket(job, self._executor.submit(run_job, job), self._executor)
        except BrokenProcessPool:
            self._replace(self._executor)
            return Ticket(job, self._executor.submit(run_job, job), self._executor)

    def result(self, ticket: Ticket) -> Row:
        """The row of a job, once it is done."""
        if ticket.future is None:
            return with_one_thread(ticket.job, self.judges)
        try:
            return ticket.future.result()
        except BrokenProcessPool:
            # Some process died, perhaps of another job: this one gets a process of its own.
            self._replace(ticket.executor)
            with self._start(1) as alone:
                try:
                    return alone.submit(run_job, ticket.job).result()
                except BrokenProcessPool:
                    return {
                        "error": "The process that scored this sample died; perhaps it needs more memory than there is."
                    }

    def map(self, jobs: Sequence[Job]) -> list[Row]:
        return [self.result(ticket) for ticket in [self.submit(job) for job in jobs]]

    def _replace(self, broken: ProcessPoolExecutor | None) -> None:
        if self._executor is broken:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = self._start(self.processes)

    def _start(self, processes: int) -> ProcessPoolExecutor:
        context = get_context("spawn")  # a forked process could not use a GPU, nor trust its threads
        return ProcessPoolExecutor(processes, context, begin, (self.judges, os.getpid()))

    def __enter__(self) -> "ScoringPool":
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


_judges: dict[str, Judge] = {}  # of a scoring process


def begin(judges: dict[str, Judge], parent: int) -> None:
    """The start of a scoring process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends this one
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    threadpool_limits(1)  # of NumPy's and SciPy's libraries: their threads would wait for each other's cores
    for judge in judges.values():
        judge.load()
    _judges.update(judges)


def run_job(job: Job) -> Row:
    return job.run(_judges)


def with_one_thread(job: Job, judges: dict[str, Judge]) -> Row:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            return job.run(judges)
    finally:
        torch.set_num_threads(threads)
