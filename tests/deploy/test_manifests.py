"""The Kubernetes manifests against Kubernetes' schemas, KubeRay's fields and Ray's own reading."""

import copy
import json
import re
from importlib import import_module, metadata
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from next.serving.settings import ServeSettings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
KUBERNETES = "1.34.0"
SCHEMA = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())
KUEUE = json.loads((Path(__file__).parent / "kueue.schema.json").read_text())
PAGE = (DEPLOY.parent / "docs" / "running.md").read_text()


def documents(name: str) -> list[dict]:
    return [document for document in yaml.safe_load_all((DEPLOY / name).read_text()) if document]


def find(name: str, kind: str) -> dict:
    [found] = [document for document in documents(name) if document["kind"] == kind]
    return found


def spec_of(document: dict) -> dict:
    place = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
    spec = document["spec"]
    return spec[place[document["kind"]]] if document["kind"] in place else spec


def groups(document: dict) -> list[dict]:
    return [spec_of(document)["headGroupSpec"], *spec_of(document)["workerGroupSpecs"]]


def validate(document: dict) -> None:
    """Every field of the document by a strict schema; pod templates as the pods they become."""
    if document["apiVersion"] == "kueue.x-k8s.io/v1beta2":
        reference = {"$ref": f"#/$defs/{document['kind']}"}
        jsonschema.validate(document.get("spec", {}), KUEUE | reference)
        return
    if document["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    kinds = {"RayCluster": "clusterSpec", "RayJob": "jobSpec", "RayService": "serviceSpec"}
    kind = kinds[document["kind"]]
    jsonschema.validate(document["spec"], SCHEMA | {"$ref": f"#/$defs/{kind}"})
    for group in groups(document):
        meta = {"metadata": {"name": "pod"} | group["template"].get("metadata", {})}
        pod = {"apiVersion": "v1", "kind": "Pod"} | group["template"] | meta
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


TRAINING = {"kuberay/raycluster.yaml": "RayCluster", "kuberay/rayjob.yaml": "RayJob"}
RAY_FILES = TRAINING | {"kuberay/rayservice.yaml": "RayService"}


ALL_FILES = [*RAY_FILES, "kuberay/queue.yaml", "mlflow/kubernetes.yaml"]


@pytest.mark.parametrize("name", ALL_FILES)
def test_every_field_is_one_that_kubernetes_and_kuberay_know(name):
    assert documents(name)
    for document in documents(name):
        validate(document)


@pytest.mark.parametrize(
    "path",
    [
        ["spec", "headGroupSpecs"],
        ["spec", "headGroupSpec", "template", "spec", "volume"],
        ["spec", "workerGroupSpecs", 0, "minReplica"],
        ["spec", "authOptions", "tokens"],
    ],
    ids=lambda path: str(path[-1]),
)
def test_a_misspelt_field_is_refused(path):
    document = copy.deepcopy(find("kuberay/raycluster.yaml", "RayCluster"))
    node = document
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = 1
    with pytest.raises(jsonschema.ValidationError, match=path[-1]):
        validate(document)


@pytest.mark.parametrize(("name", "kind"), TRAINING.items())
def test_ray_reads_from_it_the_nodes_that_are_meant(name, kind):
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )
    from ray.autoscaler._private.util import validate_config

    document = find(name, kind)
    placed = {"metadata": document["metadata"] | {"namespace": "research"}}  # as the API gives it
    config = _derive_autoscaling_config_from_ray_cr(document | placed | {"spec": spec_of(document)})
    validate_config(config)
    head = config["available_node_types"]["headgroup"]["resources"]
    worker = config["available_node_types"]["gpu"]["resources"]
    assert head["CPU"] == 0, "no worker trains on the head"
    assert (worker["CPU"], worker["GPU"]) == (4, 1)


@pytest.mark.parametrize(("name", "kind"), RAY_FILES.items())
def test_the_token_is_asked_for_and_no_secret_is_in_the_file(name, kind):
    document = find(name, kind)
    assert spec_of(document)["authOptions"] == {"mode": "token"}
    for document in documents(name):
        assert document["kind"] != "Secret"
    for group in groups(find(name, kind)):
        [container] = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "next-reid-services"}}]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False


@pytest.mark.parametrize(("name", "kind"), RAY_FILES.items())
def test_versions_are_those_of_the_lock_and_shared_memory_is_enough(name, kind):
    document = find(name, kind)
    assert spec_of(document)["rayVersion"] == metadata.version("ray")
    for group in groups(document):
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        assert int(volumes["shared-memory"]["emptyDir"]["sizeLimit"].removesuffix("Gi")) >= 2


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
def test_the_service_is_one_that_ray_serve_reads_and_that_our_own_function_builds(monkeypatch):
    from ray.serve.schema import ServeDeploySchema

    service = find("kuberay/rayservice.yaml", "RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    [application] = config.applications
    module, _, name = application.import_path.partition(":")
    build = getattr(import_module(module), name)
    monkeypatch.delenv("NEXT_REID_TOKEN", raising=False)
    with pytest.raises(ValueError, match="the environment variable NEXT_REID_TOKEN must hold a to"):
        build(application.args)
    monkeypatch.setenv("NEXT_REID_TOKEN", "of-the-secret-0123456789")
    deployed = build(application.args)
    assert "of-the-secret" not in repr(vars(deployed._bound_deployment)), "Ray stores this"
    assert deployed._bound_deployment.num_replicas == application.args["replicas"]
    with pytest.raises(ValueError, match="galery"):
        build(application.args | {"galery": "s3://a"})
    [workers] = spec_of(service)["workerGroupSpecs"]
    [container] = workers["template"]["spec"]["containers"]
    assert {"containerPort": config.http_options.port, "name": "serve"} in container["ports"]
    seconds = workers["template"]["spec"]["terminationGracePeriodSeconds"]
    assert seconds > ServeSettings.model_fields["drain_seconds"].default


def test_the_job_is_queued_retried_with_the_same_run_and_of_a_size_that_can_be_counted():
    job = find("kuberay/rayjob.yaml", "RayJob")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert job["spec"]["shutdownAfterJobFinishes"] is True, "Kueue takes no other"
    assert job["spec"]["backoffLimit"] > 0
    assert "--run.name " in job["spec"]["entrypoint"]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    [claim] = [v["persistentVolumeClaim"] for v in head["volumes"] if v["name"] == "runs"]
    assert (
        claim["claimName"]
        == find("kuberay/rayjob.yaml", "PersistentVolumeClaim")["metadata"]["name"]
    )
    assert "--run.storage_path /runs --checkpoint.storage_path s3://" in job["spec"]["entrypoint"]
    assert "enableInTreeAutoscaling" not in job["spec"]["rayClusterSpec"]
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["minReplicas"] == group["maxReplicas"]
    assert f"--scaling.num_workers {group['replicas']} " in job["spec"]["entrypoint"]


def quantity(text: str | int) -> float:
    """A Kubernetes quantity as a number: CPUs, GPUs, or bytes."""
    units = {"Gi": 2**30, "Mi": 2**20, "m": 1e-3}
    unit = next((unit for unit in units if str(text).endswith(unit)), "")
    return float(str(text).removesuffix(unit)) * units.get(unit, 1)


def test_the_queue_that_the_job_names_is_shipped_and_holds_the_job():
    job = find("kuberay/rayjob.yaml", "RayJob")
    queue, cluster_queue = (
        find("kuberay/queue.yaml", kind) for kind in ("LocalQueue", "ClusterQueue")
    )
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    assert queue["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    [group] = cluster_queue["spec"]["resourceGroups"]
    [flavor] = group["flavors"]
    assert flavor["name"] == find("kuberay/queue.yaml", "ResourceFlavor")["metadata"]["name"]
    quota = {one["name"]: quantity(one["nominalQuota"]) for one in flavor["resources"]}
    assert set(quota) == set(group["coveredResources"])
    needs = {"cpu": 0.5, "memory": 200 * 2**20}  # the submitter's pod, as KubeRay makes it
    for part in groups(job):
        [container] = part["template"]["spec"]["containers"]
        for name, amount in container["resources"]["requests"].items():
            needs[name] = needs.get(name, 0) + quantity(amount) * part.get("replicas", 1)
    assert set(needs) <= set(quota), "Kueue never admits what asks for a resource it does not count"
    assert all(needs[name] <= quota[name] for name in needs)
    said = f"{needs['cpu']:g} CPUs, {needs['memory'] / 2**30:.1f} GiB"
    assert said in " ".join((DEPLOY / "kuberay" / "queue.yaml").read_text().split())


@pytest.mark.parametrize("name", ALL_FILES)
def test_all_objects_go_into_the_current_namespace(name):
    assert [d["kind"] for d in documents(name) if "namespace" in d["metadata"]] == []


def test_the_lines_for_kuberay_1_7_fit_its_fields_and_the_volume_that_is_there():
    [block] = re.findall(r"```yaml\n(gcsFaultToleranceOptions:.*?)```", PAGE, re.DOTALL)
    document = copy.deepcopy(find("kuberay/raycluster.yaml", "RayCluster"))
    document["spec"] |= yaml.safe_load(block)
    validate(document)
    claim = find("kuberay/raycluster.yaml", "PersistentVolumeClaim")["metadata"]["name"]
    assert document["spec"]["gcsFaultToleranceOptions"]["storage"]["claimName"] == claim


@pytest.mark.parametrize("kind", ["StatefulSet", "Deployment"])
def test_mlflow_and_its_database_run_as_nobody_and_are_watched(kind):
    pod = find("mlflow/kubernetes.yaml", kind)["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    [container] = pod["containers"]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_password_of_mlflow_crosses_no_network_in_plain_http():
    [composed] = documents("mlflow/compose.yaml")
    services = composed["services"]
    assert services["mlflow"]["ports"] == ["${MLFLOW_LISTEN:-127.0.0.1}:5000:5000"]
    assert "ports" not in services["postgres"]
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert [port for port in published if not port.startswith("${MLFLOW_LISTEN")] == ["5443:5443"]
    words = services["tls"]["command"]
    assert "--from=https://${MLFLOW_HOST:-mlflow}:5443" in words
    assert "${MLFLOW_HOST:-mlflow}:5443" in services["mlflow"]["command"][-1], "the name is allowed"


def test_the_certificate_is_there_when_the_page_copies_it():
    [composed] = documents("mlflow/compose.yaml")
    up, copied = re.findall(r"^docker compose (?:up|cp) .*$", PAGE, re.MULTILINE)
    assert "--wait" in up.split(), "until all are healthy"
    path = copied.split("tls:")[1].split()[0]
    assert composed["services"]["tls"]["healthcheck"]["test"] == ["CMD", "test", "-s", path]


def test_the_jobs_flags_are_flags_of_the_training(demo_shards):
    from jobs.train import TrainJob
    from next.cli import parse

    words = find("kuberay/rayjob.yaml", "RayJob")["spec"]["entrypoint"].split()
    assert words[:2] == ["python", "/srv/next/jobs/train.py"]
    parsed = parse(TrainJob, words[2:])
    assert parsed.config.scaling.num_workers == 2
    assert parsed.config.tracking.uri == "http://mlflow:5000"


def test_the_standing_cluster_keeps_its_memory_on_a_volume():
    head = find("kuberay/raycluster.yaml", "RayCluster")["spec"]["headGroupSpec"]["template"]
    [container] = head["spec"]["containers"]
    environment = {item["name"]: item.get("value") for item in container["env"]}
    assert environment["RAY_gcs_storage"] == "rocksdb"
    mounts = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "head"]
    assert environment["RAY_gcs_storage_path"].startswith(mounts[0])
    [volume] = [v for v in head["spec"]["volumes"] if v["name"] == "head"]
    claim = find("kuberay/raycluster.yaml", "PersistentVolumeClaim")["metadata"]["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim


def test_both_ways_to_run_mlflow_start_the_same_server():
    [composed] = [documents("mlflow/compose.yaml")[0]["services"]["mlflow"]]
    deployed = find("mlflow/kubernetes.yaml", "Deployment")["spec"]["template"]["spec"]
    [container] = deployed["containers"]
    assert composed["command"][:-1] == container["command"][:-1]
    assert set(composed["environment"]) <= {item["name"] for item in container["env"]}
    ini = find("mlflow/kubernetes.yaml", "ConfigMap")["data"]["basic_auth.ini"]
    written = (DEPLOY / "mlflow" / "basic_auth.ini").read_text()
    assert ini == "".join(
        line for line in written.splitlines(keepends=True) if not line.startswith(";")
    )
