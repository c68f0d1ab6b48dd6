"""A drill as a job: seeds are its parts, arms are kept one by one, and what is poisoned never leaves the machine.

A finished arm's record is published in the work area, so that any machine goes on from it. Poisoned data, the models trained on
them and their audits lie in the work area's folder on this machine while their arm is worked on, and are removed with it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from safer_engine.drill import JSON, PAGE, arms_of_seed, watched
from safer_engine.drill_arms import RECORD, Arm, Bench
from safer_engine.drill_document import document_of
from safer_engine.drill_spec import DrillSpec
from safer_engine.errors import Interrupted
from safer_engine.events import Observer
from safer_engine.redteam import log_use
from safer_engine.report.drill_page import render_drill
from safer_engine.report.model_drill import DrillDocument
from safer_engine.sources.resolved import ResolvedDataset
from safer_engine.store import WorkArea
from workers.inputs import Names

DRILLED = "Drill"
"""Artifact type of a drill's document and page."""
_FOLDER = "arms"


@dataclass(frozen=True)
class Drilling:
    """One drill in a work area.

    Attributes:
        spec: as submitted. located: the same, its inputs as this machine opens them.
        key: `drill_key`. inputs: digests of base, dataset and evaluation set.
        log: folder of this machine's log of uses. who: as it is logged.
    """

    spec: DrillSpec
    located: DrillSpec
    key: str
    inputs: dict[str, str]
    dataset: ResolvedDataset
    work: WorkArea
    log: Path
    who: str

    def seed(self, seed: int, observer: Observer, *, alone: bool = False) -> None:
        """Train and audit the arms of a seed that are not there yet. Raises as `run_drill`."""
        bench, every = self._bench(), arms_of_seed(self.spec, seed)
        before, total = (0, len(every)) if alone else (seed * len(every), self.spec.seeds * len(every))
        for done, arm in enumerate(every):
            if observer.cancelled():
                raise Interrupted("stopped on request")
            observer.progress("drill", before + done, total, "arms")
            self._arm(bench, arm, watched(observer, arm, before + done, total))

    def all(self, observer: Observer) -> DrillDocument:
        """Every seed, and what follows."""
        for seed in range(self.spec.seeds):
            self.seed(seed, observer)
        wanted = [arm for seed in range(self.spec.seeds) for arm in arms_of_seed(self.spec, seed) if arm.rule is not None]
        found = document_of(self.spec, self._bench(), self.inputs, wanted)
        shutil.rmtree(self._folder, ignore_errors=True)
        return found

    def _bench(self) -> Bench:
        self._folder.mkdir(parents=True, exist_ok=True)
        return Bench(self.located, self.key, self._folder, self.dataset)

    @property
    def _folder(self) -> Path:
        return self.work.scratch / _FOLDER

    def _arm(self, bench: Bench, arm: Arm, observer: Observer) -> None:
        name, record = f"{arm.name.replace('/', '-')}.json", self._folder / arm.name / RECORD
        published = self.work.scratch / name
        if published.is_file() and not record.is_file():
            record.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(published, record)
        if not record.is_file():
            log_use(self.log, "drill.arm", self.key, self.who, arm=arm.name)
        bench.run(arm, observer)
        if not published.is_file():
            with self.work.publish(name, scratch=True) as target:
                shutil.copyfile(record, target)


def publish_drill(found: DrillDocument, work: WorkArea, names: Names) -> None:
    """Publish document and page; paths of this machine become names."""
    text = names(found.model_dump_json(indent=1) + "\n")
    for name, content in ((JSON, text), (PAGE, render_drill(DrillDocument.model_validate_json(text)))):
        with work.publish(name) as path:
            path.write_text(content, encoding="utf-8")
