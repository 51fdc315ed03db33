"""Where steps queue: a few lanes for holds, one for settles on its own connection, one for the books, one for those that wait for a lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..commits import Commits, Job
from .order import Ticket

__all__ = ["Lane"]

LONGEST_WAIT = 0.25
"""Seconds between two tries of what waits for a server that is away."""


class Lane(Commits):
    """
    Does its steps a batch at a time, in the order they came, each batch by `work` on one connection.

    A lone caller's step is done in the caller's thread. While a batch is on its way the next one gathers.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Lane, list[Job]], list[Job]],
        alone: Callable[[Lane, Ticket], object],
        out_of_patience: Callable[[Job], Exception],
        *,
        is_settle: bool = False,
    ) -> None:
        self.is_settle = is_settle

        def do_alone(ticket: Ticket) -> object:
            return alone(self, ticket)

        def do_batch(jobs: list[Job]) -> list[Job]:
            return work(self, jobs)

        super().__init__(do_alone, do_batch, out_of_patience, name, shares=True, longest_wait=LONGEST_WAIT)

    def hand_over(self, job: Job) -> None:
        """Leave a job to the writer thread. What it has waited elsewhere counts."""
        since = job.since
        super().hand_over(job)
        job.since = since or job.since

    def _share(self, step: Any, patience: float) -> Any:
        goes_on, step.goes_on = step.goes_on, None
        if goes_on is not None:
            step.where = goes_on
            return goes_on._share(step, patience)
        return super()._share(step, patience)
