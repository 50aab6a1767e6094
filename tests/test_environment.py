"""What a measurement says of the machine that it ran on."""

import json

import torch

from agentsd.environment import environment


def test_the_environment_is_plain_data():
    facts = json.loads(json.dumps(environment("cpu", torch.bfloat16)))
    assert facts["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["threads"] == torch.get_num_threads()
    assert facts["dtype"] == "bfloat16"
    assert facts["tomesd"] == "0.1.3"
    assert facts["cpu"]
