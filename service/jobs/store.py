"""The job store: everything SQL decides about jobs, stages and units. Read `service.jobs.model` first."""

from __future__ import annotations

from sqlalchemy import Engine

from service.infra.settings import Settings
from service.jobs.dispatch_store import Dispatch
from service.jobs.facts import Facts
from service.jobs.job_listing import JobListing
from service.jobs.job_store import JobRequests
from service.jobs.unit_store import UnitLeases


class JobStore(JobRequests, JobListing, UnitLeases, Dispatch, Facts):
    """One database of jobs, for the API (requests, listing), the workers (leases), the dispatcher and the metrics (facts).

    Safe for threads. Every method is one or more short transactions and may raise Unavailable.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        JobRequests.__init__(self, engine, settings)
        JobListing.__init__(self, engine)
        UnitLeases.__init__(self, engine, settings)
        Dispatch.__init__(self, engine, settings)
        Facts.__init__(self, engine)
