"""A patched model on a device that is not the CPU, without one: what a GPU would refuse, or would be waited for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration


CASES = ["agents", "merging", "everything", "without randomness", "in float32"]
PEERS = ["attention-free", "baseline-naive", "todo"]
SEVERAL_TIMESTEPS = "a timestep each"

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch knows no devices made in Python",
)


@pytest.fixture(scope="module")
def measured():
    script = Path(__file__).parents[1] / "pretend_device.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", [*CASES, *PEERS, SEVERAL_TIMESTEPS])
def test_it_computes_what_the_cpu_computes(measured, case):
    """Prediction and gradient; no tensor of the CPU gets in between. The tolerance is rounding in float32."""
    found = measured[case]
    assert found["device"] == "pretend:0"
    assert found["error"] < 1e-5
    assert found["gradient_error"] < 1e-5
    if case != "baseline-naive":
        assert found["changed"] > 0.01


@pytest.mark.parametrize("case", [*CASES, *PEERS])
def test_nothing_is_read_from_the_device(measured, case):
    """A value read in a layer would have the GPU waited for there."""
    assert measured[case]["reads"] == []


def test_a_timestep_for_each_sample_is_read_once(measured):
    assert measured[SEVERAL_TIMESTEPS]["reads"] == ["tolist"]


def test_a_preset_merges_from_as_many_tokens_on_as_pays_there(measured):
    """More than on a CPU."""
    assert measured["at 2,304 tokens"] == {
        "changed": [True, False],
        "reason": 'it has 2304 tokens, fewer than `min_tokens=16384`, which is what "auto" is on pretend',
    }


def test_the_device_refuses_tensors_of_the_cpu(measured):
    """Or none of this would show anything."""
    assert measured["mixed"] == "add meets tensors of two devices"
