"""From a model version that was asked for to its verdict: the thread that walks versions through their states.

waiting → auditing: its files are found, and an audit of them is submitted. auditing → judging: the audit has ended, and a
gate is made on it, against the audit of the version that holds the baseline's alias by then. judging → ended: the gate is
decided. Each step may be broken off anywhere and done again: what it submits carries the key of the round.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from safer_engine.errors import SaferError, SpecError
from safer_engine.gate.policy import Policy
from service.errors import Conflict, LeaseLost, NotFound, QuotaExceeded, RequestInvalid, Unavailable
from service.gate_schemas import SubmitGate
from service.http.gate_requests import create_gate, policy_of
from service.http.services import Services
from service.http.submissions import audit_spec, new_audit
from service.jobs.access import Principal, Role
from service.jobs.model import JobState
from service.mlflow.fetching import ACTOR, Fetching
from service.mlflow.hook import MlflowHook
from service.mlflow.layout import FOLDER_TAG, model_files, walk
from service.mlflow.places import Proxied, find_place
from service.mlflow.registry import ModelVersion, ProxyFile
from service.mlflow.store import CLAIM_SECONDS, VersionRecord, VersionState
from service.mlflow.tags import BASELINE, Tags, decided_tags, pause, policy_tag, refused_tags, tags_of
from service.mlflow.template import Entry
from service.submission_schemas import SubmitAudit

_POLL_SECONDS = 1.0
_BASELINE_SECONDS = 10.0
_LABEL = 200
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Baseline:
    """The audit to compare with (None: there is none), and what to say of it."""

    audit: str | None
    told: str


class RegistryAudits:
    """Walks versions. Several processes may run one: a version is taken by compare-and-set.

    Raises:
        SpecError: an entry of the template holds a spec that no audit can have.
    """

    def __init__(self, services: Services, hook: MlflowHook) -> None:
        self._services = services
        self._hook = hook
        for entry in hook.template.audits:
            try:
                audit_spec(_spec(entry, "org/name"))
            except RequestInvalid as error:
                raise SpecError(f"SAFER_MLFLOW_TEMPLATE: {error.message}", error.hint) from None

    def run(self, stop: threading.Event) -> None:
        """Work until told to stop."""
        while not stop.is_set():
            try:
                worked = self.step()
            except Unavailable as error:
                _LOG.warning("model versions wait: %s", error.message)
                worked = False
            if not worked:
                stop.wait(_POLL_SECONDS)

    def step(self) -> bool:
        """Take one version a step further; whether there was one. Raises Unavailable: the database is away."""
        held = self._hook.versions.take()
        if held is None:
            return False
        entry = self._hook.template.entry(held.model)
        try:
            if entry is None:
                self._end(held, None, "no entry of the template is for it any more")
            elif held.state is not VersionState.WAITING and self._is_another(held):
                self._hook.versions.begin_anew(held)
            elif held.state is VersionState.WAITING:
                self._begin(held, entry)
            elif held.state is VersionState.AUDITING:
                self._judge(held, entry)
            else:
                self._decide(held)
        except SaferError as error:
            self._failed(held, error)
        return True

    def _is_another(self, held: VersionRecord) -> bool:
        """Whether the model was deleted and registered anew since its audit was submitted."""
        return self._hook.registry.version(held.model, held.version).created != held.made

    def _failed(self, held: VersionRecord, error: SaferError) -> None:
        """Try again later what may pass, and tell of what will not."""
        told = f"{error.message} ({error.hint})" if error.hint else error.message
        full = isinstance(error, QuotaExceeded)
        if full or error.retryable or isinstance(error, Conflict):
            seconds = pause(held.attempts)
            _LOG.warning("%s waits %.0f s: %s", _name(held), seconds, told)
            self._hook.versions.put_off(held, seconds, refused_tags(error, "waiting") if full else None)
        else:
            self._end(held, refused_tags(error), f"refused: {told}")

    def _end(self, held: VersionRecord, tags: Tags | None, told: str) -> None:
        if self._hook.versions.move(held, VersionState.ENDED, tags):
            _LOG.info("%s: %s", _name(held), told)

    def _begin(self, held: VersionRecord, entry: Entry) -> None:
        """Submit the audit, or find that the version has one."""
        try:
            found = self._hook.registry.version(held.model, held.version)
        except NotFound:
            self._end(held, None, "is not in the registry")
            return
        if found.created == held.made and held.request is None and self._audited(held):
            self._audit(held, held.job_id or "", "has an audit, which is judged again")
            return
        if found.status == "PENDING_REGISTRATION":
            raise Unavailable("MLflow is still taking its files")
        other = found.created != held.made
        if other and held.request is not None:
            self._hook.versions.begin_anew(held)
            return
        known = {"made": found.created, "job_id": None, "gate_id": None}
        if (other or held.attempts == 0) and not self._hook.versions.keep(held, tags_of("waiting", "pending"), **known):
            return
        request = SubmitAudit.model_validate(held.request) if held.request else self._request(held, entry, found)
        kept = request.model_dump(mode="json")
        if self._hook.versions.keep(held, request=kept, made=found.created, project=entry.project):
            new = new_audit(self._services, _who(entry), request, held.key)
            job = self._services.jobs.submit(entry.project, new).job
            self._services.sender.wake()
            self._audit(held, job.id, f"audit {job.id}")

    def _audited(self, held: VersionRecord) -> bool:
        """Whether the version has an audit that is good, or may become so."""
        if held.job_id is None or held.project is None:
            return False
        try:
            state = self._services.jobs.get(held.project, held.job_id).state
        except NotFound:
            return False
        return state not in (JobState.FAILED, JobState.CANCELLED)

    def _audit(self, held: VersionRecord, job_id: str, told: str) -> None:
        tags = tags_of("running", "pending", audit=job_id, url=self._url(job_id))
        if self._hook.versions.move(held, VersionState.AUDITING, tags, job_id=job_id, gate_id=None):
            _LOG.info("%s: %s", _name(held), told, extra={"audit_id": job_id})

    def _request(self, held: VersionRecord, entry: Entry, found: ModelVersion) -> SubmitAudit:
        labels = {"mlflow.model": held.model[:_LABEL], "mlflow.version": held.version}
        if held.alias is not None:
            labels["mlflow.alias"] = held.alias[:_LABEL]
        spec = _spec(entry, self._model(held, entry, found))
        return SubmitAudit(spec=spec, labels={**entry.labels, **labels}, priority=entry.priority)

    def _model(self, held: VersionRecord, entry: Entry, found: ModelVersion) -> str:
        """What the spec names as the model: the place where its files are, or an upload of them."""
        place, folder = find_place(self._hook.registry, found), found.tags.get(FOLDER_TAG)
        if not isinstance(place, Proxied):
            return f"{place.name.rstrip('/')}/{folder.strip('/')}" if folder else place.name
        beat = self._beat(held)

        def listing(folder: str) -> Sequence[ProxyFile]:
            beat()
            return self._hook.registry.files(folder)

        files = model_files(walk(listing, place.folder), place.folder, folder)
        fetching = Fetching(self._services, self._hook.registry, entry.project, beat)
        return fetching.fetch(files, f"{held.model} {held.version}")

    def _beat(self, held: VersionRecord) -> Callable[[], None]:
        """Goes on holding a version while its files come."""
        renewed = time.monotonic()

        def beat() -> None:
            nonlocal renewed
            if self._services.stopping.is_set():
                raise Unavailable("the service stops")
            if time.monotonic() - renewed > CLAIM_SECONDS / 4:
                renewed = time.monotonic()
                if not self._hook.versions.renew(held):
                    raise LeaseLost("another process has taken the version")

        return beat

    def _judge(self, held: VersionRecord, entry: Entry) -> None:
        """Make a gate on the audit, which has ended."""
        try:
            job = self._services.jobs.get(held.project or "", held.job_id or "")
        except NotFound:
            self._end(held, tags_of("failed", "error", audit=held.job_id, error="audit_removed"), "the audit was removed")
            return
        if job.state is not JobState.SUCCEEDED:
            code = job.error.code if job.error else str(job.state)
            self._end(held, tags_of("failed", "error", error=code, **self._links(held)), f"the audit ended: {code}")
            return
        baseline = self._baseline(held, entry)
        if baseline is None:
            self._hook.versions.put_off(held, _BASELINE_SECONDS)
            return
        policy = policy_of(entry.policy)
        key = f"{held.key}-{policy.digest[:12]}-{baseline.audit or 'none'}"
        asked = SubmitGate(audit=job.id, policy=entry.policy, baseline=baseline.audit)
        gate = create_gate(self._services, _who(entry, held.project), asked, key).gate
        tags = tags_of("running", "pending", **self._told(held, policy, baseline))
        if self._hook.versions.move(held, VersionState.JUDGING, tags, gate_id=gate.id):
            _LOG.info("%s: gate %s", _name(held), gate.id, extra={"audit_id": job.id})

    def _baseline(self, held: VersionRecord, entry: Entry) -> Baseline | None:
        """What the version is compared with; None while that is not audited yet but will be."""
        alias = entry.baseline_alias
        if alias is None:
            return Baseline(None, "none")
        version = self._hook.registry.version_of_alias(held.model, alias)
        if version is None or version == held.version:
            return Baseline(None, f"none: {'no version holds' if version is None else 'it holds itself'} the alias {alias}")
        other = self._hook.versions.find(held.model, version)
        if other is not None and other.state in (VersionState.WAITING, VersionState.AUDITING):
            return None
        if other is None or other.job_id is None or other.project != held.project or not self._succeeded(other):
            return Baseline(None, f"none: version {version} ({alias}) has no finished audit here")
        return Baseline(other.job_id, f"version {version} ({alias})")

    def _succeeded(self, other: VersionRecord) -> bool:
        try:
            return self._services.jobs.get(other.project or "", other.job_id or "").state is JobState.SUCCEEDED
        except NotFound:
            return False

    def _decide(self, held: VersionRecord) -> None:
        """Tell of the decision."""
        try:
            gate = self._services.gates.record(held.gate_id or "")
        except NotFound:
            self._end(held, tags_of("failed", "error", error="gate_removed"), "the gate was removed")
            return
        told = {**self._links(held), "baseline": held.tags.get(BASELINE)}
        self._end(held, decided_tags(gate, **told), f"gate {gate.id}: {gate.verdict}")

    def _told(self, held: VersionRecord, policy: Policy, baseline: Baseline) -> dict[str, str | None]:
        return {**self._links(held), "policy": policy_tag(policy.name, policy.digest), "baseline": baseline.told}

    def _links(self, held: VersionRecord) -> dict[str, str | None]:
        return {"audit": held.job_id, "url": self._url(held.job_id)} if held.job_id else {}

    def _url(self, job_id: str | None) -> str | None:
        public = self._services.settings.public_url
        return f"{public.rstrip('/')}/audits/{job_id}" if public and job_id else None


def _spec(entry: Entry, model: str) -> dict[str, object]:
    """The entry's spec for one model."""
    given = entry.spec.get("model")
    return {**entry.spec, "model": {**(given if isinstance(given, dict) else {}), "path": model}}


def _who(entry: Entry, project: str | None = None) -> Principal:
    return Principal(project or entry.project, ACTOR, "MLflow's webhook", frozenset((Role.SUBMIT,)))


def _name(held: VersionRecord) -> str:
    return f"model {held.model!r} version {held.version}"
