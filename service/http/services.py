"""What the handlers work with, made once when the application starts."""

from __future__ import annotations

import threading
from array import array
from dataclasses import dataclass, field

from fastapi import Request
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine

from service.http.limits import RateLimit
from service.http.recent import Recent
from service.http.streaming import OpenStreams
from service.infra.metrics import ArtifactMetrics, HttpMetrics, ServiceCollector
from service.infra.settings import Settings
from service.infra.stores import ServiceStore, Stores
from service.jobs.access import AccessStore
from service.jobs.attachments import AttachmentStore
from service.jobs.database import open_database
from service.jobs.deliveries import DeliveryStore
from service.jobs.gates import GateStore
from service.jobs.outlook import Outlook
from service.jobs.queue import Sender
from service.jobs.reviews import ReviewStore
from service.jobs.store import JobStore
from service.jobs.uploads import UploadStore
from service.mlflow.hook import MlflowHook, open_hook
from service.outbound import Outbound

STRANGERS_PER_MINUTE = 60.0
LOGINS_PER_MINUTE = 10.0


@dataclass(frozen=True)
class PairTexts:
    """What a reviewer reads of a pair. A report cuts long texts; `omitted` counts the characters that are not here."""

    prompt: str
    chosen: str
    rejected: str
    omitted: int


@dataclass(frozen=True)
class ReportFigures:
    """What a history shows of a report.

    Attributes:
        accuracy: axis (None: all), pair accuracy, both ends of its interval, evaluation pairs.
        missing: why there is nothing.
    """

    accuracy: tuple[tuple[str | None, float, float | None, float | None, int], ...] = ()
    doubtful_share: float | None = None
    missing: str | None = None


@dataclass(frozen=True)
class Services:
    """Everything behind the API.

    Attributes:
        mlflow: None where no MLflow server is set.
        rate: requests by API key; strangers: refused requests, logins: attempts, by address.
        stopping: set when the process is asked to end: streams close.
    """

    settings: Settings
    engine: Engine
    jobs: JobStore
    gates: GateStore
    deliveries: DeliveryStore
    access: AccessStore
    reviews: ReviewStore
    uploads: UploadStore
    attachments: AttachmentStore
    outlook: Outlook
    stores: Stores
    sender: Sender
    registry: CollectorRegistry
    http_metrics: HttpMetrics
    pepper: bytes
    outbound: Outbound
    rate: RateLimit
    strangers: RateLimit
    logins: RateLimit
    edit_orders: Recent[array[int]] = field(default_factory=lambda: Recent(16))
    pair_texts: Recent[dict[str, PairTexts]] = field(default_factory=lambda: Recent(8))
    report_figures: Recent[ReportFigures] = field(default_factory=lambda: Recent(512))
    streams: OpenStreams = field(default_factory=OpenStreams)
    mlflow: MlflowHook | None = None
    stopping: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        """Let go of connections."""
        self.sender.close()
        self.engine.dispose()

    def store(self, project: str) -> ServiceStore:
        """The artifacts of one project."""
        return self.stores.project(project)


def open_services(settings: Settings) -> Services:
    """Everything behind the API, for these settings; connects to nothing yet.

    Raises:
        SpecError: a setting that the API needs is missing or cannot be used.
    """
    pepper = settings.pepper
    engine = open_database(settings)
    registry = CollectorRegistry()
    artifacts = ArtifactMetrics(registry)
    jobs = JobStore(engine, settings)
    registry.register(ServiceCollector(jobs.facts))
    stores = Stores(settings, engine, artifacts.observe)
    outbound = Outbound(settings.allowed_networks)
    return Services(
        settings=settings,
        engine=engine,
        jobs=jobs,
        gates=GateStore(engine, jobs),
        deliveries=DeliveryStore(engine),
        access=AccessStore(engine, settings),
        reviews=ReviewStore(engine),
        uploads=UploadStore(engine, settings),
        attachments=AttachmentStore(engine),
        outlook=Outlook(engine),
        stores=stores,
        sender=Sender(settings),
        registry=registry,
        http_metrics=HttpMetrics(registry),
        pepper=pepper,
        outbound=outbound,
        mlflow=open_hook(settings, engine, outbound),
        rate=RateLimit(settings.requests_per_minute),
        strangers=RateLimit(STRANGERS_PER_MINUTE),
        logins=RateLimit(LOGINS_PER_MINUTE),
    )


def services_of(request: Request) -> Services:
    """The services of the application that handles a request."""
    services: Services = request.app.state.services
    return services
