"""What ``--dry-run`` says of a run."""

import json

import pytest
import torch

from next.config import override
from next.data.shards.reader import open_manifest
from next.training.inputs import resolve
from next.training.rehearsal import rehearse


def test_a_dry_run_says_what_a_step_costs_and_warns_of_too_little_memory(tiny_config):
    manifest = open_manifest(tiny_config.data.uri)
    config = resolve(override(tiny_config, {"optim.accumulate": 2}), manifest)
    found = rehearse(config, manifest, torch.device("cpu"))
    lines = "\n".join(found.lines())
    assert 0 < found.gflops_per_sample < 5
    resident = 16 * found.trainable_parameters
    activations = found.memory_bytes - resident
    assert activations == pytest.approx(
        config.batch.size / 2 * found.activation_bytes_per_sample, rel=0.05
    ), "half of the batch is held at a time"
    assert f"{found.gflops_per_sample:,.1f} GFLOPs a sample" in lines
    assert "\nval           4 identities with 32 queries; standard error about 15.0 mAP" in lines
    assert "\nWARNING       few: settings that differ by less than 9.8 mAP cannot be told" in lines
    assert "\ntest          6 identities with 36 queries; standard error about 12.2 mAP" in lines
    assert json.loads(json.dumps(found.as_json()))["held_out"]["queries"] == 32
    assert "GiB are free" not in lines
    small = found._replace(free_bytes=found.memory_bytes // 2)
    assert "GiB are free: set optim.accumulate" in "\n".join(small.lines())
