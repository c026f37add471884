import os
import runpy
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from next.addresses import (
    reach_directly,
    redacted,
    require_no_secret,
    require_store,
    server_address,
    tracking_uri,
)
from next.cli import parse_run
from next.config import RunConfig, from_toml, override
from next.storage import open_folder
from next.training.distributed.cluster import check_address

ROOT = Path(__file__).resolve().parents[1]
SERVERS = [
    "http://user:hunter2@host:5000",
    "http://hunter2@host",
    "https://host/mlflow?token=hunter2",
    "https://host?hunter2",
    "https://host/#hunter2",
    "http://user:p/hunter2@host",
    "http://user:p?hunter2@host",
    "http://user:p#hunter2@host",
    "http://user:hunter2 and more@host",
    "HTTP://user:hunter2@host",
    "ftp://user:hunter2@host",
    "postgresql://user:hunter2@host/mlflow",
]
STORES = [
    "s3://key:hunter2@bucket/prefix",
    "s3://hunter2@bucket",
    "s3://key:hunter2/more@bucket",
    "s3://key:24682/hunter2@bucket",  # no port of a bucket, but the begin of a password
    "s3://bucket?endpoint_override=user:hunter2@host:9000",
    "s3://bucket?endpoint_override=http://user:hunter2@host:9000&scheme=http",
    "s3://bucket?endpoint_override=user%3Ahunter2%40host",
    "s3://bucket?secret_key=hunter2",
    "gs://user:hunter2@bucket/prefix",
    "gs://bucket?endpoint_override=user:hunter2@host",
    "abfs://user:hunter2@host/container",
    "hdfs://user:hunter2@host/path",
]


@pytest.mark.parametrize("address", [*SERVERS, *STORES])
def test_a_secret_in_an_address_is_refused_by_every_setting_and_never_repeated(address):
    for name in ("tracking.uri", "data.uri", "checkpoint.storage_path", "run.storage_path"):
        with pytest.raises(ValueError, match=f"^{name}") as refused:
            override(RunConfig(), {name: address})
        assert "hunter2" not in str(refused.value)
        section, _, leaf = name.partition(".")
        with pytest.raises(ValueError, match="must") as refused:
            from_toml(f'[{section}]\n{leaf} = "{address}"\n')
        assert "hunter2" not in str(refused.value)
    with pytest.raises(ValueError, match=r"://") as refused:
        open_folder(address)
    assert "hunter2" not in str(refused.value)
    assert "hunter2" not in redacted(address)
    assert "hunter2" not in redacted(f"{address.replace(' ', '')} cannot be reached")


@pytest.mark.parametrize(
    ("address", "instead"),
    [
        (
            "http://user:hunter2@host",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, "
            "instead",
        ),
        ("s3://user:hunter2@host", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"),
        ("gs://user:hunter2@host", "set GOOGLE_APPLICATION_CREDENTIALS instead"),
        ("ldap://user:hunter2@host", "set the environment variables of that server instead"),
    ],
)
def test_what_to_use_instead_is_named(address, instead):
    with pytest.raises(ValueError, match=rf"^it must hold no user.*\*\*\*@host; {instead}$"):
        require_no_secret(address, "it")


@given(st.text(min_size=8).filter(lambda text: text not in "s3://***@bucket/?"))
def test_no_password_at_all_is_ever_repeated(password):
    with pytest.raises(ValueError, match="must hold no user") as refused:
        require_no_secret(f"s3://user:{password}@bucket", "it")
    assert password not in str(refused.value).replace("must hold no user, no password", "")


@pytest.mark.parametrize(
    "uri",
    ["sqlite:///mlflow.db", "mlruns", "", "file:///tmp", "ftp://host", "databricks", "http://"],
)
def test_a_tracking_address_that_is_not_http_is_refused_as_a_setting_and_as_an_address(uri):
    with pytest.raises(ValueError, match=r"tracking\.uri must be an http:// or https:// address"):
        tracking_uri(uri)
    with pytest.raises(ValueError, match=r"tracking\.uri must be an http:// or https:// address"):
        override(RunConfig(), {"tracking.uri": uri})


def test_a_slash_at_the_end_of_an_address_is_dropped():
    assert tracking_uri("https://host:5000/mlflow/") == "https://host:5000/mlflow"
    assert server_address("http://[::1]:5000/", "it") == "http://[::1]:5000"


@pytest.mark.parametrize(
    "path",
    ["/data/a@b", "relative", "~/x", "s3://bucket/a@b", "s3://b?endpoint_override=h:9&scheme=http",
     "s3://b?region=x", "gs://bucket/prefix", "file:///tmp/x"],
)  # fmt: skip
def test_paths_and_addresses_without_secrets_pass_and_are_shown_as_they_are(path):
    require_store(path, "it")
    assert "@" in path or redacted(path) == path
    assert override(RunConfig(), {"data.uri": path}).data.uri == path


@pytest.mark.parametrize("scheme", ["abfs", "abfss", "hdfs", "ftps", "http", "unheard-of"])
def test_a_store_that_arrow_would_abort_on_or_that_is_not_known_is_refused_before_arrow(scheme):
    with pytest.raises(
        ValueError, match=rf"must be a local path or an s3:// URI, but got {scheme}:"
    ):
        open_folder(f"{scheme}://host/x")
    with pytest.raises(ValueError, match=r"^checkpoint.storage_path: .*endpoint_override=HOST"):
        override(RunConfig(), {"checkpoint.storage_path": f"{scheme}://host/x"})


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_of_the_environment_holds_no_secret_either(monkeypatch, variable):
    monkeypatch.setenv(variable, "http://user:hunter2@host:9000")
    with pytest.raises(ValueError, match=rf"^{variable} must hold .*@host:9000; set AWS_") as said:
        open_folder("s3://bucket")
    assert "hunter2" not in str(said.value)


@pytest.mark.parametrize(
    ("address", "spared"),
    [
        ("http://127.0.0.1:5000", "a.invalid,127.0.0.1"),
        ("http://127.3.2.1:5000", "a.invalid,127.3.2.1"),
        ("http://localhost:5000", "a.invalid,localhost"),
        ("http://[::1]:5000", "a.invalid,::1"),
        ("http://10.0.0.1:5000", "a.invalid"),
        ("http://mlflow.localhost:5000", "a.invalid,mlflow.localhost"),
        ("http://localhost.example.org", "a.invalid"),
        ("http://notlocalhost:5000", "a.invalid"),
    ],
)
def test_only_loopback_is_spared_the_proxy_and_only_where_there_is_one(
    monkeypatch, address, spared
):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "a.invalid")
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    reach_directly(address)
    assert os.environ["no_proxy"] == "a.invalid", "there is no proxy"
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:3128")
    reach_directly(address)
    reach_directly(address)
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == spared
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "*")
    reach_directly(address)
    assert os.environ["no_proxy"] == "*"


def test_the_address_of_a_cluster_is_repeated_without_its_secret():
    with pytest.raises(ValueError, match=r"RAY_ADDRESS must be .* but got 'ray://\*\*\*@host'"):
        check_address("ray://user:hunter2@host")


@pytest.mark.parametrize("flag", ["--tracking.uri", "--data", "--source", "--tracking_uri"])
def test_a_command_line_is_refused_by_the_name_of_the_flag(flag):
    from jobs.train import TrainJob

    for argv in ([flag, "http://user:hunter2@host"], [f"{flag}=http://user:hunter2@host"]):
        with pytest.raises(ValueError, match=rf"^{flag} must hold no user") as refused:
            parse_run(TrainJob, argv)
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--tracking.uri", "http://user:hunter2@host"],
        ["--tracking.uri", "https://host?token=hunter2"],
        ["--checkpoint.storage_path", "s3://bucket?endpoint_override=user:hunter2@host"],
        ["--checkpoint.storage_path", "gs://user:hunter2@bucket"],
        ["--checkpoint.storage_path", "abfs://container@account.dfs.core.windows.net/x"],
        ["--recipe", "recipe.toml"],
    ],
)
def test_a_job_with_a_secret_in_an_address_ends_with_one_line_and_writes_nothing(
    demo_shards, tmp_path, monkeypatch, capsys, flags
):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[tracking]\nuri = "http://user:hunter2@host"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(demo_shards), *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "jobs" / "train.py"), run_name="__main__")
    said = capsys.readouterr()
    assert end.value.code == 2
    assert said.err.count("\n") == 1, said.err
    assert "hunter2" not in said.out + said.err
    assert list(tmp_path.iterdir()) == [recipe]
