"""The chart renders, and what it renders is what Kubernetes, KEDA and the Prometheus operator take."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.infra.settings import Settings, load_settings
from service.jobs.model import QUEUES
from tests.deploy import generate
from tests.deploy.rendering import (
    CHART,
    GOLDEN,
    NEWEST,
    OLDEST,
    ROOT,
    SETS,
    VALUES,
    Object,
    containers,
    helm,
    objects,
    objects_of,
    of_kind,
    pods,
    render,
    template,
    text_of,
    tools_folder,
)  # fmt: skip
from tests.helpers.servers import missing

OPERATORS = ("keda.sh/v1alpha1", "monitoring.coreos.com/v1")
FREE = "unknown key /spec/jobTargetRef/template/metadata/"
"""KEDA's own type leaves a pod template's metadata open; it is checked as that of a job."""
by_set = pytest.mark.parametrize("name", SETS)


@by_set
def test_helm_lints(name: str) -> None:
    done = helm("lint", "--strict", str(CHART), f"--values={VALUES / f'{name}.yaml'}")
    assert done.returncode == 0, done.stdout + done.stderr


def faults(found: list[Object], version: str) -> list[str]:
    """What the strict schemas of a version of Kubernetes say of the kinds that are its own."""
    said = []
    for each in found:
        try:
            kubernetes_validate.validate(each, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            said.append(f"{each['kind']} {each['metadata']['name']}: {error.message}")
    return said


def job_of(scaled: Object) -> Object:
    """The job that KEDA makes from a ScaledJob."""
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": scaled["metadata"], "spec": scaled["spec"]["jobTargetRef"]}


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@by_set
def test_objects_fit_the_schemas_of_kubernetes(name: str, version: str) -> None:
    found = objects(text_of(name, version))
    own = [each for each in found if each["apiVersion"] not in OPERATORS]
    assert len(own) > 8
    assert faults([*own, *map(job_of, of_kind(found, "ScaledJob"))], version) == []


def test_the_schemas_notice_what_they_do_not_know() -> None:
    deployment = of_kind(objects_of("minimal"), "Deployment")[0]
    deployment["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    assert any("livenesProbe" in said for said in faults([deployment], OLDEST))


def operator_faults(found: list[Object]) -> list[str]:
    """What the types of KEDA and of the Prometheus operator say of their kinds."""
    node, tools = shutil.which("node"), tools_folder()
    if node is None or not (tools / "node_modules" / "@kubernetes-models").is_dir():
        missing("node with the types of KEDA and of the Prometheus operator (`make check` installs them)")
    own = [each for each in found if each["apiVersion"] in OPERATORS]
    program = str(Path(__file__).parent / "tools" / "check_types.cjs")
    done = subprocess.run([node, program, str(tools)], input=json.dumps(own), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if FREE not in line]


@pytest.mark.parametrize(
    "values",
    [
        *((name,) for name in SETS),
        ("production", "worker.keda.trigger=prometheus", "worker.keda.prometheusAddress=http://prometheus:9090"),
        ("production", "monitoring.podMonitor.jobs=true"),
    ],
    ids="+".join,
)
def test_objects_of_operators_fit_their_types(values: tuple[str, ...]) -> None:
    assert operator_faults(objects_of(*values)) == []


def test_the_operators_types_notice_wrong_values_and_unknown_keys() -> None:
    found = objects_of("production")
    (scaled,) = of_kind(found, "ScaledJob")
    (monitor,) = of_kind(found, "ServiceMonitor")
    scaled["spec"]["maxReplicaCount"] = "four"
    scaled["spec"]["scalingStrategy"]["stratgy"] = "default"
    monitor["spec"]["endpoints"][0]["intervall"] = "15s"
    said = "\n".join(operator_faults([scaled, monitor]))
    assert "maxReplicaCount must be integer" in said
    assert "unknown key /spec/scalingStrategy/stratgy" in said
    assert "unknown key /spec/endpoints/0/intervall" in said


def test_files_that_follow_from_others_are_up_to_date() -> None:
    for path, text in generate.generated().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.relative_to(ROOT)} is old: `make chart` writes it"
    assert {path.stem for path in GOLDEN.iterdir()} == set(SETS)


def test_every_value_has_its_row_and_its_type() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    rows = [path for path, _ in generate.documented_values((CHART / "values.yaml").read_text(encoding="utf-8"))]
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    assert len(rows) == len(set(rows))

    def walk(value: Any, types: Any, path: str) -> None:
        if "$ref" in types:
            types = schema["definitions"][types["$ref"].rpartition("/")[2]]
        covered = any(path == row or path.startswith(f"{row}.") for row in rows)
        if isinstance(value, dict) and "properties" in types:
            assert types["additionalProperties"] is False, path
            assert covered or set(types["properties"]) - {"global"} == set(value), path
            for name, inside in value.items():
                walk(inside, types["properties"][name], f"{path}.{name}".lstrip("."))
        else:
            assert covered, f"{path} has no description"

    walk(values, schema, "")


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (["store.url=file:///tmp"], "store.url"),
        (["store.url="], "store.url"),
        (["worker.mode=jobs"], "worker.mode"),
        (["worker.gpus=2"], "gpus"),
        (["images.worker.tag=latest"], "images.worker.tag"),
        (["images.worker.digest=sha256:abc"], "images.worker.digest"),
        (["settings.retention_day=3"], "retention_day"),
        (["settings.retention_days=0"], "retention_days"),
        (["settings.log_level=LOUD"], "log_level"),
        (["settings.database_url=x"], "database_url"),
        (["extraEnv[0].name=MY_PASSWORD", "extraEnv[0].value=x"], "valueFrom"),
        (["api.port=80"], "api.port"),
        (["api.ingress.enabled=true"], "host"),
        (["worker.cpu.resources.limits.memory=1e9"], "memory"),
        (["api.resources.limits=null"], "limits"),
        (["monitoring.serviceMonitor.enabled=true"], "api.metricsPublic"),
        (["worker.gpu.enabled=true", "worker.mode=scaledjob"], "monitoring.key.secretName"),
        (["worker.gpu.enabled=true", "worker.mode=scaledjob", "worker.keda.trigger=prometheus"], "prometheusAddress"),
        (["worker.gpu.minJobs=9"], "worker.gpu.maxJobs"),
        (["api.autoscaling.minReplicas=9"], "api.autoscaling.maxReplicas"),
    ],
)
def test_wrong_values_are_refused_and_named(assignments: list[str], said: str) -> None:
    done = template("minimal", *(f"--set={each}" for each in assignments))
    assert done.returncode != 0
    assert said in done.stderr


def test_a_cluster_that_is_too_old_is_refused() -> None:
    assert template("minimal", version="1.28.0").returncode != 0


def environment(found: list[Object], component: str) -> dict[str, str]:
    """Variables of a component that are not secret."""
    (pod,) = [each for each in pods(found) if each.component == component]
    return {each["name"]: each["value"] for each in containers(pod)[0]["env"] if "value" in each}


def test_settings_arrive_as_the_service_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given = environment(objects_of("production"), "gpu-job")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert settings.default_max_bytes == 5 * 1024**4
    assert settings.allowed_sources == ("upload:", "hub:example-org/", "s3://example-rm-registry/")
    assert settings.retention_days == 14
    assert (settings.device, settings.precision_device, settings.terminate_seconds) == ("cuda", "cuda", 90)
    assert settings.worker_memory_bytes == 64 * 1024**3 * 9 // 10
    assert settings.cache_bytes + settings.artifact_cache_bytes == 500 * 1024**3 * 7 // 10
    assert (settings.s3_sse, settings.s3_kms_key, settings.s3_access_key) == ("aws:kms", "alias/safer-audit", None)


def test_the_api_knows_the_names_it_is_reached_by() -> None:
    found = objects_of("production")
    (service,) = of_kind(found, "Service")
    name, hosts = service["metadata"]["name"], environment(found, "api")["SAFER_ALLOWED_HOSTS"].split(",")
    assert {name, f"{name}.audits.svc", "safer-audit.example.com", "127.0.0.1"} <= set(hosts)
    assert environment(found, "api")["SAFER_PUBLIC_URL"] == "https://safer-audit.example.com"


@pytest.mark.parametrize("values", [*((name,) for name in SETS), ("production", "worker.mode=deployment")], ids="+".join)
def test_every_queue_has_workers(values: tuple[str, ...]) -> None:
    served: list[str] = []
    for pod in pods(objects_of(*values)):
        arguments = containers(pod)[0]["args"]
        if arguments[0] == "worker":
            served += arguments[arguments.index("--queues") + 1].split(",")
    assert sorted(served) == sorted(QUEUES)


def test_selectors_and_references_meet() -> None:
    for values in (
        *((name,) for name in SETS),
        ("production", "monitoring.podMonitor.jobs=true"),
        ("production", "worker.mode=deployment"),
    ):
        found = objects_of(*values)
        labels = [pod.metadata["labels"] for pod in pods(found)]
        for each in found:
            if each["kind"] in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
                wanted = each["spec"]["selector"]
                matching = [one for one in labels if matches(wanted, one)]
                assert matching, each["metadata"]["name"]
            if each["kind"] == "Service":
                assert any(each["spec"]["selector"].items() <= one.items() for one in labels)
            if each["kind"] == "ServiceMonitor":
                services = [one["metadata"]["labels"] for one in of_kind(found, "Service")]
                assert any(matches(each["spec"]["selector"], one) for one in services)
        accounts = {each["metadata"]["name"] for each in of_kind(found, "ServiceAccount")} | {"default"}
        assert {pod.spec["serviceAccountName"] for pod in pods(found)} <= accounts


def matches(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector (matchLabels and In) selects these labels."""
    listed = all(labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", ()))
    return listed and selector.get("matchLabels", {}).items() <= labels.items()


def test_an_autoscaler_is_not_overruled_by_an_upgrade() -> None:
    scaled, fixed = (
        next(each for each in of_kind(objects_of(name), "Deployment") if each["metadata"]["name"].endswith("-api"))
        for name in ("production", "minimal")
    )
    assert "replicas" not in scaled["spec"]
    assert fixed["spec"]["replicas"] == 1
    (autoscaler,) = of_kind(objects_of("production"), "HorizontalPodAutoscaler")
    assert autoscaler["spec"]["scaleTargetRef"]["name"] == scaled["metadata"]["name"]


def test_what_runs_before_the_release_needs_nothing_of_it() -> None:
    found = objects_of("production")
    hooks = [each for each in found if "pre-install" in each["metadata"].get("annotations", {}).get("helm.sh/hook", "")]
    assert sorted(each["kind"] for each in hooks) == ["Job", "NetworkPolicy"]
    (job,) = of_kind(hooks, "Job")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert job["spec"]["template"]["spec"]["serviceAccountName"] == "default"
    text = json.dumps(job)
    assert "configMapRef" not in text
    assert "configMapKeyRef" not in text


def test_gpu_jobs_scale_by_the_queue_to_none_and_are_admitted_by_kueue() -> None:
    (scaled,) = of_kind(objects_of("production"), "ScaledJob")
    spec = scaled["spec"]
    assert spec["minReplicaCount"] == 0
    assert spec["rollout"] == {"strategy": "gradual"}
    (trigger,) = spec["triggers"]
    assert trigger["metadata"]["valueLocation"] == 'safer_queue_depth{queue="gpu"}'
    assert (
        trigger["authenticationRef"]["name"] == of_kind(objects_of("production"), "TriggerAuthentication")[0]["metadata"]["name"]
    )
    for labels in (scaled["metadata"]["labels"], spec["jobTargetRef"]["template"]["metadata"]["labels"]):
        assert labels["kueue.x-k8s.io/queue-name"] == "audits"
    limits = spec["jobTargetRef"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"


def test_alerts_and_dashboard_of_the_chart_are_those_of_deploy() -> None:
    alerts = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    (rule,) = of_kind(objects_of("air-gapped"), "PrometheusRule")
    assert rule["spec"]["groups"] == alerts
    (fewer,) = of_kind(objects_of("production", "monitoring.prometheusRule.disabled={SaferSaePoor}"), "PrometheusRule")
    assert fewer["spec"]["groups"][0]["rules"] == [each for each in alerts[0]["rules"] if each["alert"] != "SaferSaePoor"]
    (board,) = of_kind(objects_of("production"), "ConfigMap")
    shown = json.loads(board["data"]["safer-audit.json"])
    assert shown == json.loads((ROOT / "deploy" / "grafana" / "safer-audit.json").read_text(encoding="utf-8"))


def test_a_packaged_chart_has_everything_in_it(tmp_path: Path) -> None:
    done = helm("package", str(CHART), f"--destination={tmp_path}")
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("*.tgz")
    with tarfile.open(package) as archive:
        assert not [each.name for each in archive if each.issym()]
        archive.extractall(tmp_path, filter="data")
    packed = template("production", chart=tmp_path / "safer-audit")
    assert packed.stdout == text_of("production")


@by_set
def test_notes_say_what_to_type_next(name: str, tmp_path: Path) -> None:
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    (chart / "templates" / "shown.yaml").write_text(
        'notes: {{ include (print $.Template.BasePath "/NOTES.txt") . | quote }}\n', encoding="utf-8"
    )
    done = template(name, "--show-only=templates/shown.yaml", chart=chart)
    assert done.returncode == 0, done.stderr
    notes = yaml.safe_load(done.stdout)["notes"]
    api = next(
        each["metadata"]["name"] for each in of_kind(objects_of(name), "Deployment") if each["metadata"]["name"].endswith("api")
    )
    assert f"deploy/{api} -- safer-audit admin keys create --name first --role admin" in notes
    assert "helm test safer-audit --namespace audits" in notes
    assert ("https://safer-audit.example.com" in notes) == (name == "production")


def test_names_stay_within_what_kubernetes_allows() -> None:
    for each in objects(render("production", f"fullnameOverride={'a' * 40}")):
        assert len(each["metadata"]["name"]) <= 63


def test_the_settings_of_the_chart_exist() -> None:
    assert set(Settings.model_fields) >= generate.OF_THE_CHART
