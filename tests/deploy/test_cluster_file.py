"""``cluster.yaml`` through Ray's own schema, defaults and AWS set-up, on a real EC2 API."""

import copy
import re
from pathlib import Path

import boto3
import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "cluster.yaml").read_text()


@pytest.fixture
def config() -> dict:
    return yaml.safe_load(TEXT)


def validate(config: dict) -> dict:
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole = prepare_config(copy.deepcopy(config))
    validate_config(whole)
    return whole


def test_ray_accepts_the_file_and_refuses_one_with_a_typing_error(config):
    whole = validate(config)
    assert whole["available_node_types"]["gpu_spot"]["max_workers"] == 4
    config["idle_timeout"] = config.pop("idle_timeout_minutes")
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate(config)


def test_workers_are_spot_and_the_head_is_not_and_idle_nodes_go(config):
    head = config["available_node_types"][config["head_node_type"]]
    others = [
        node for name, node in config["available_node_types"].items() if node is not head and name
    ]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert others
    for node in others:
        assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert node["min_workers"] == 0
    assert 0 < config["idle_timeout_minutes"] <= 30


def test_no_secret_is_in_the_file_and_the_token_comes_from_the_users_own(config):
    assert not re.search(r"AKIA|aws_secret|RAY_AUTH_TOKEN=|BEGIN .*PRIVATE KEY", TEXT)
    assert not re.search(r"\b[0-9a-f]{32,}\b", TEXT)
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in config[name][-1]
        assert "NEXT_STORAGE=s3://" in config[name][-1]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


def test_what_ray_sets_up_from_it_opens_ssh_to_the_world_and_nothing_else(
    config, s3_server, monkeypatch, tmp_path
):
    from ray.autoscaler._private.aws.config import bootstrap_aws

    for name, value in s3_server.new_user("ec2:*", "iam:*").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    whole = bootstrap_aws(validate(config))
    nodes = whole["available_node_types"].values()
    groups = {name for node in nodes for name in node["node_config"]["SecurityGroupIds"]}
    client = boto3.client("ec2", region_name=config["provider"]["region"])
    open_to_the_world = [
        (rule.get("FromPort"), rule.get("ToPort"), rule["IpProtocol"])
        for group in client.describe_security_groups(GroupIds=sorted(groups))["SecurityGroups"]
        for rule in group["IpPermissions"]
        if rule.get("IpRanges") or rule.get("Ipv6Ranges")
    ]
    assert set(open_to_the_world) == {(22, 22, "tcp")}
    for node in nodes:
        assert node["node_config"]["SubnetIds"], "each node type has a place to start in"
