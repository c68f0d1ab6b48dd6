"""What every pod of the chart keeps to, whatever the values; and that each of these rules would notice."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest

from service.infra.settings import Settings
from tests.deploy.rendering import ROOT, SETS, Object, Pod, containers, objects_of, of_kind, pods

COMBINATIONS = [
    *((name,) for name in SETS),
    ("production", "worker.mode=deployment"),
    ("production", "worker.keda.trigger=prometheus", "worker.keda.prometheusAddress=http://prometheus:9090"),
    ("minimal", "worker.gpu.enabled=true"),
    ("minimal", "worker.gpu.enabled=true", "worker.mode=scaledjob", "api.metricsPublic=true", "worker.drainSeconds=5"),
]
ALL = pytest.mark.parametrize("values", COMBINATIONS, ids="+".join)
SECRETS = {f"SAFER_{name.upper()}" for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)}
SECRET_WORDS = ("SECRET", "PASSWORD", "TOKEN", "API_KEY", "ACCESS_KEY", "PEPPER")


def not_root(pod: Pod) -> bool:
    inside = [pod.spec["securityContext"], *(each["securityContext"] for each in containers(pod))]
    return all(each.get("runAsNonRoot") is True for each in inside) and pod.spec["securityContext"]["runAsUser"] >= 1000


def restricted(pod: Pod) -> bool:
    if any(pod.spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        return False
    return all(
        each["securityContext"]["allowPrivilegeEscalation"] is False
        and each["securityContext"]["readOnlyRootFilesystem"] is True
        and each["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        and each["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        and not each["securityContext"].get("privileged")
        for each in containers(pod)
    )


def volumes_allowed(pod: Pod) -> bool:
    allowed = {"configMap", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    return all(set(each) - {"name"} <= allowed for each in pod.spec.get("volumes", ()))


def scratch_is_bounded(pod: Pod) -> bool:
    return all("sizeLimit" in each["emptyDir"] for each in pod.spec.get("volumes", ()) if "emptyDir" in each)


def no_token(pod: Pod) -> bool:
    return pod.spec["automountServiceAccountToken"] is False


def no_service_links(pod: Pod) -> bool:
    return pod.spec["enableServiceLinks"] is False


def image_is_fixed(pod: Pod) -> bool:
    return all(
        "@sha256:" in each["image"] or each["image"].rpartition(":")[2] not in ("latest", "") for each in containers(pod)
    ) and all(":" in each["image"].rpartition("/")[2] for each in containers(pod))


def limits_on_all(pod: Pod) -> bool:
    return all({"cpu", "memory"} <= set(each["resources"][part]) for each in containers(pod) for part in ("requests", "limits"))


def watched(pod: Pod) -> bool:
    """What stays is probed; what ends by itself has a deadline instead: nobody is sent to it, and a hung one is ended."""
    if pod.ends:
        return pod.owner_spec.get("activeDeadlineSeconds", 0) > 0 and pod.spec["restartPolicy"] == "Never"
    return all(f"{kind}Probe" in each for each in containers(pod) for kind in ("startup", "liveness", "readiness"))


def no_secret_literal(pod: Pod) -> bool:
    for each in containers(pod):
        for variable in each.get("env", ()):
            secret = variable["name"] in SECRETS or any(word in variable["name"] for word in SECRET_WORDS)
            if secret and "value" in variable:
                return False
    return True


RULES: tuple[Callable[[Pod], bool], ...] = (
    not_root, restricted, volumes_allowed, scratch_is_bounded, no_token, no_service_links, image_is_fixed, limits_on_all, watched,
    no_secret_literal,
)  # fmt: skip


@ALL
def test_every_pod_keeps_every_rule(values: tuple[str, ...]) -> None:
    found = list(pods(objects_of(*values)))
    assert {"api", "migration", "cpu-worker", "test"} <= {pod.component for pod in found}
    broken = [(pod.owner, rule.__name__) for pod in found for rule in RULES if not rule(pod)]
    assert broken == []


def _container(change: Callable[[Object], object]) -> Callable[[Pod], object]:
    return lambda pod: change(containers(pod)[0])


BREACHES: dict[Callable[[Pod], bool], list[Callable[[Pod], Any]]] = {
    not_root: [
        lambda pod: pod.spec["securityContext"].update(runAsUser=0),
        _container(lambda each: each["securityContext"].pop("runAsNonRoot")),
    ],
    restricted: [
        lambda pod: pod.spec.update(hostNetwork=True),
        _container(lambda each: each["securityContext"].update(readOnlyRootFilesystem=False)),
        _container(lambda each: each["securityContext"]["capabilities"].update(add=["NET_ADMIN"])),
        _container(lambda each: each["securityContext"].update(seccompProfile={"type": "Unconfined"})),
        _container(lambda each: each["securityContext"].update(privileged=True)),
    ],
    volumes_allowed: [lambda pod: pod.spec["volumes"].append({"name": "host", "hostPath": {"path": "/"}})],
    scratch_is_bounded: [lambda pod: pod.spec["volumes"].append({"name": "more", "emptyDir": {}})],
    no_token: [lambda pod: pod.spec.update(automountServiceAccountToken=True)],
    no_service_links: [lambda pod: pod.spec.update(enableServiceLinks=True)],
    image_is_fixed: [
        _container(lambda each: each.update(image="registry.example.com:5000/safer")),
        _container(lambda each: each.update(image="safer:latest")),
    ],
    limits_on_all: [_container(lambda each: each["resources"]["limits"].pop("memory"))],
    watched: [_container(lambda each: each.pop("livenessProbe"))],
    no_secret_literal: [_container(lambda each: each["env"].append({"name": "SAFER_DATABASE_URL", "value": "postgresql://…"}))],
}


def test_every_rule_notices_a_breach() -> None:
    assert set(BREACHES) == set(RULES)
    api = next(pod for pod in pods(objects_of("minimal")) if pod.component == "api")
    for rule, changes in BREACHES.items():
        for change in changes:
            broken = copy.deepcopy(api)
            change(broken)
            assert not rule(broken), rule.__name__


def test_a_job_without_a_deadline_is_noticed() -> None:
    job = next(pod for pod in pods(objects_of("production")) if pod.component == "gpu-job")
    assert watched(job)
    del job.owner_spec["activeDeadlineSeconds"]
    assert not watched(job)


@ALL
def test_traffic_is_denied_but_for_what_is_listed(values: tuple[str, ...]) -> None:
    found = objects_of(*values)
    policies = of_kind(found, "NetworkPolicy")
    deny = [each for each in policies if not each["spec"].get("ingress") and not each["spec"].get("egress")]
    assert len(deny) == 1
    assert set(deny[0]["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    selector = deny[0]["spec"]["podSelector"]["matchLabels"]
    for pod in pods(found):
        assert selector.items() <= pod.metadata["labels"].items(), f"{pod.owner} is not covered"
    for each in policies:
        for rule in each["spec"].get("egress", ()):
            assert rule.get("ports"), f"{each['metadata']['name']} lets every port out"


def test_an_air_gapped_release_reaches_no_public_address() -> None:
    for policy in of_kind(objects_of("air-gapped"), "NetworkPolicy"):
        for rule in policy["spec"].get("egress", ()):
            assert rule["to"], "to anywhere"
            for peer in rule["to"]:
                assert not peer.get("ipBlock", {}).get("cidr", "10.").startswith(("0.0.0.0", "::")), policy["metadata"]["name"]


def test_only_who_needs_a_secret_gets_it() -> None:
    given: dict[str, set[str]] = {}
    for pod in pods(objects_of("production")):
        for each in containers(pod):
            names = {variable["name"] for variable in each.get("env", ()) if "secretKeyRef" in variable.get("valueFrom", {})}
            given[pod.component] = names
    both = {"SAFER_DATABASE_URL", "SAFER_BROKER_URL"}
    assert given == {
        "api": both | {"SAFER_SECRET_PEPPER", "SAFER_CALLBACK_SECRET"},
        "cpu-worker": both | {"SAFER_HUB_TOKEN", "SAFER_LABELLER_API_KEY"},
        "gpu-job": both | {"SAFER_HUB_TOKEN", "SAFER_LABELLER_API_KEY"},
        "migration": {"SAFER_DATABASE_URL"},
        "test": set(),
    }


def test_a_worker_has_time_for_its_checkpoint() -> None:
    for values in (("minimal",), ("production",), ("production", "worker.drainSeconds=10", "worker.terminateSeconds=300")):
        for pod in pods(objects_of(*values)):
            if pod.component in ("cpu-worker", "gpu-worker", "gpu-job"):
                container = containers(pod)[0]
                terminate = next(int(each["value"]) for each in container["env"] if each["name"] == "SAFER_TERMINATE_SECONDS")
                pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1]) if "lifecycle" in container else 0
                assert pod.spec["terminationGracePeriodSeconds"] >= pause + terminate + 20


@pytest.mark.parametrize("file", ["Dockerfile.service", "Dockerfile.gpu"])
def test_pods_run_as_the_user_of_the_images(file: str) -> None:
    (user,) = re.findall(r"^USER (\d+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert {str(pod.spec["securityContext"]["runAsUser"]) for pod in pods(objects_of("production"))} == {user}
