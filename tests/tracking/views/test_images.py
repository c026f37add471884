import json
import math

import numpy as np
import pandas
import pytest
from PIL import Image

from next.tracking.run import open_run, replay
from next.tracking.views.images import add_image, write_table


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "wide.png"
    Image.effect_noise((1600, 400), 50).save(path)
    return path


def test_an_image_is_kept_whole_and_as_a_copy_that_can_still_be_read(picture, tmp_path):
    whole, small = add_image(tmp_path / "images", picture, "figures/cmc", 7)
    assert whole.name.startswith("figures~cmc+step+7+timestamp+")
    assert small.name == whole.stem + "+compressed.webp"
    assert whole.read_bytes() == picture.read_bytes()
    with Image.open(small) as shown:
        assert shown.size == (720, 180)


def test_an_image_of_the_same_key_and_step_replaces_the_earlier_one(picture, tmp_path):
    folder = tmp_path / "images"
    first = add_image(folder, picture, "figures/cmc", 7)
    Image.new("RGB", (10, 10)).save(picture)
    assert add_image(folder, picture, "figures/cmc", 7) == first
    assert first[0].read_bytes() == picture.read_bytes()
    add_image(folder, picture, "figures/cmc", 70)
    add_image(folder, picture, "figures/cmc2", 7)
    assert len(list(folder.iterdir())) == 6


def test_a_key_that_mlflow_would_refuse_is_refused(picture, tmp_path):
    with pytest.raises(ValueError, match="the key of an image must be made of letters"):
        add_image(tmp_path, picture, "figures/größe", 0)


def test_a_table_is_json_that_pandas_and_mlflow_read(tmp_path):
    path = write_table(
        tmp_path / "a" / "t.json", {"query": np.array([1, 2]), "AP": [0.5, math.nan]}
    )
    assert json.loads(path.read_text()) == {
        "columns": ["query", "AP"],
        "data": [[1, 0.5], [2, None]],
    }


def test_a_table_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be of one length, but got \{'a': 1, 'b': 2\}"):
        write_table(tmp_path / "t.json", {"a": [1], "b": [1, 2]})
    with pytest.raises(ValueError, match=r"written as \.json, but got 't\.csv'"):
        write_table(tmp_path / "t.csv", {"a": [1]})


def test_mlflow_finds_images_tables_schema_and_the_experiment_description(
    server, client, picture, tmp_path
):
    place = {"uri": server.uri, "experiment": "images", "name": "r", "folder": tmp_path / "run"}
    with open_run(**place) as run:
        run.log_image(picture, "figures/cmc", step=0)
        run.log_table({"query": ["a"], "AP": [50.0]}, "queries.json")
        run.log_data(
            "demo", "d" * 64, "/data", "train", schema={"pid": "long", "texts": "string[]"}, rows=9
        )
        run.describe_experiment({"mlflow.note.content": "# what this is"})
    with open_run(**place) as run:  # goes on: the first table stays listed
        run.log_table({"query": ["b"], "AP": [1.0]}, "more.json")
        run_id, experiment_id = run.run_id, run.experiment_id
    stored = client.get_run(run_id)
    assert stored.data.tags["mlflow.loggedImages"] == "true"
    assert json.loads(stored.data.tags["mlflow.loggedArtifacts"]) == [
        {"path": "tables/queries.json", "type": "table"},
        {"path": "tables/more.json", "type": "table"},
    ]
    table = client.download_artifacts(run_id, "tables/queries.json", str(tmp_path))
    found = pandas.read_json(table, orient="split")
    assert found.to_dict("list") == {"query": ["a"], "AP": [50.0]}
    assert len(client.list_artifacts(run_id, "images")) == 2
    [data] = stored.inputs.dataset_inputs
    columns = json.loads(data.dataset.schema)["mlflow_colspec"]
    assert [(column["name"], column["type"]) for column in columns] == [
        ("pid", "long"),
        ("texts", "array"),
    ]
    assert json.loads(data.dataset.profile) == {"num_rows": 9}
    tags = client.get_experiment(experiment_id).tags
    assert tags["mlflow.note.content"] == "# what this is"
    assert replay(run.folder, server.uri).refused == 0
