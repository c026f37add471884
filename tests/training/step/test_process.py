import pytest
import torch

from next.config import override
from next.training.step.process import assessing_device, device


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_head_without_a_gpu_assesses_what_workers_with_gpus_trained(tiny_config):
    config = override(tiny_config, {"scaling.use_gpu": True, "scaling.num_workers": 2})
    with pytest.raises(ValueError, match="torch sees no GPU here; leave it off"):
        device(config)
    assert assessing_device(config) == torch.device("cpu")
    assert assessing_device(tiny_config) == torch.device("cpu")
