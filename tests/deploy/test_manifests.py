"""The Kubernetes manifests against Kubernetes' schemas, KubeRay's fields and Ray's own reading."""

import copy
import json
from importlib import metadata
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
KUBERNETES = "1.34.0"
SCHEMA = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())


def documents(name: str) -> list[dict]:
    return [document for document in yaml.safe_load_all((DEPLOY / name).read_text()) if document]


def find(name: str, kind: str) -> dict:
    [found] = [document for document in documents(name) if document["kind"] == kind]
    return found


def spec_of(document: dict) -> dict:
    spec = document["spec"]
    return spec["rayClusterSpec"] if document["kind"] == "RayJob" else spec


def groups(document: dict) -> list[dict]:
    return [spec_of(document)["headGroupSpec"], *spec_of(document)["workerGroupSpecs"]]


def validate(document: dict) -> None:
    """Every field of the document by a strict schema; pod templates as the pods they become."""
    if document["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    kind = {"RayCluster": "clusterSpec", "RayJob": "jobSpec"}[document["kind"]]
    jsonschema.validate(document["spec"], SCHEMA | {"$ref": f"#/$defs/{kind}"})
    for group in groups(document):
        meta = {"metadata": {"name": "pod"} | group["template"].get("metadata", {})}
        pod = {"apiVersion": "v1", "kind": "Pod"} | group["template"] | meta
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


RAY_FILES = {"kuberay/raycluster.yaml": "RayCluster", "kuberay/rayjob.yaml": "RayJob"}


@pytest.mark.parametrize("name", [*RAY_FILES, "mlflow/kubernetes.yaml"])
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


@pytest.mark.parametrize(("name", "kind"), RAY_FILES.items())
def test_ray_reads_from_it_the_nodes_that_are_meant(name, kind):
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )
    from ray.autoscaler._private.util import validate_config

    document = find(name, kind)
    config = _derive_autoscaling_config_from_ray_cr(document | {"spec": spec_of(document)})
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
