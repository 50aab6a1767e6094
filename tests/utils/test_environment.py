"""What a measurement says of the machine that it ran on."""

import json
from pathlib import Path

import torch

from agentsd.utils import environment as environment_module
from agentsd.utils.environment import environment


def test_the_environment_is_plain_data():
    facts = json.loads(json.dumps(environment("cpu", torch.bfloat16)))
    assert facts["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["threads"] == torch.get_num_threads()
    assert facts["dtype"] == "bfloat16"
    assert facts["tomesd"] == "0.1.3"
    assert facts["cpu"]


def test_local_changes_are_said_with_the_commit(monkeypatch):
    top = str(Path(environment_module.__file__).parents[2])

    def git(folder, command, *more):
        if command == "status":
            return " M changed.py"
        return top if more == ("--show-toplevel",) else "0123456789ab"

    monkeypatch.setattr(environment_module, "_git", git)
    assert environment("cpu", torch.float32)["commit"] == "0123456789ab (with local changes)"
