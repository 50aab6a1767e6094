"""Which steps run agents, and that finding out does not stall the device."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler

from agentsd import AgentSDConfig
from agentsd.runtime.steps import StepCounter, TimestepReader, phase_at, timestep_key


def agent_steps(timesteps, config, train=1000) -> list[bool]:
    phases = config.phases
    return [phases[phase_at(float(t), train, phases)].name == "agent" for t in timesteps]


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_fifty_steps_begin_with_twenty_of_agents(scheduler):
    """The paper's schedule: 20 of 50 steps, and no going back."""
    scheduler = scheduler(steps_offset=1) if scheduler is DDIMScheduler else scheduler()
    scheduler.set_timesteps(50)
    runs = agent_steps(scheduler.timesteps, AgentSDConfig())
    assert runs == sorted(runs, reverse=True)
    assert abs(sum(runs) - 20) <= 1


def test_plms_repeats_a_step_in_the_same_phase():
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    scheduler.set_timesteps(50)
    assert sum(agent_steps(scheduler.timesteps, AgentSDConfig())) == 21


@pytest.mark.parametrize("until", [0.1, 0.3, 0.6, 0.7, 0.9])
@pytest.mark.parametrize("train", [10, 1000])
def test_the_edge_is_inside_in_spite_of_rounding(until, train):
    edge = round((1 - until) * train)
    assert agent_steps([edge, edge - 1], AgentSDConfig(agent_until=until), train) == [True, False]


def test_the_ends_of_the_range():
    assert agent_steps([999, 0], AgentSDConfig(agent_until=1.0)) == [True, True]
    assert agent_steps([999, 0], AgentSDConfig(agent_until=0.0)) == [False, False]


def test_a_run_of_views_is_read_once():
    """Reading a scalar on an accelerator waits for all its work: once a generation is enough."""
    timesteps = torch.tensor([801.0, 401.0, 1.0])
    values = timesteps.numpy()
    reader = TimestepReader()
    views = list(timesteps)
    assert reader._read_view(views[0]) == 801
    values[:] = -1  # Behind the reader's back: what it still answers, it did not read again.
    assert [reader._read_view(view) for view in views] == [801, 401, 1]


def test_timesteps_changed_in_place_are_read_again():
    timesteps = torch.tensor([801.0, 401.0])
    reader = TimestepReader()
    assert reader._read_view(timesteps[0]) == 801
    timesteps += 5
    assert reader._read_view(timesteps[0]) == 806


def test_another_run_is_read_anew():
    """The timesteps of the next generation lie elsewhere, and nothing else need tell them from the last."""
    reader = TimestepReader()
    runs = [torch.tensor([801.0, 401.0]), torch.tensor([701.0, 201.0])]
    assert [reader._read_view(timesteps[1]) for timesteps in runs] == [401, 201]


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.tensor(7).expand(3)])
def test_any_form_of_a_timestep_is_read(timestep):
    assert set(TimestepReader().read(timestep)) == {7.0}


def test_timesteps_are_read_in_inference_mode():
    with torch.inference_mode():
        reader = TimestepReader()
        assert [reader._read_view(t) for t in torch.arange(3)] == [0, 1, 2]


def test_a_buffer_in_inference_mode_is_read_at_every_step():
    with torch.inference_mode():
        buffer, reader = torch.tensor(801.0), TimestepReader()
        assert reader._read_view(buffer) == 801
        buffer.fill_(401)
        assert reader._read_view(buffer) == 401


def test_keys_are_equal_for_equal_timesteps_of_any_type_and_differ_otherwise():
    device = torch.device("cpu")
    forms = [981, 981.0, torch.tensor(981), torch.tensor(981.0, dtype=torch.float64), torch.tensor([981, 961])[0]]
    assert {timestep_key(form, device).item() for form in forms} == {timestep_key(981, device).item()}
    assert len({timestep_key(t / 8, device).item() for t in range(1000)}) == 1000


def counted(counter, timesteps):
    """The image and the step that each call belongs to."""
    seen = []
    for timestep in timesteps:
        counter.count(timestep, [float(timestep)])
        seen.append((counter.image, counter.step))
    return seen


def test_steps_are_counted_by_their_place_in_a_run():
    """Second-order samplers repeat a timestep at another place, the halves of split guidance at the same."""
    run = torch.tensor([900, 900, 600, 600])
    assert counted(StepCounter(), run) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert counted(StepCounter(), [run[0], run[0], run[2], run[2]]) == [(0, 0), (0, 0), (0, 1), (0, 1)]


def test_another_tensor_of_timesteps_is_another_image():
    """Also where it begins below the last timestep seen, as after an interruption."""
    counter = StepCounter()
    assert counted(counter, torch.tensor([900, 800, 700]))[-1] == (0, 2)
    assert counted(counter, torch.tensor([500, 400])) == [(1, 0), (1, 1)]
    assert counter.steps == 2


@pytest.mark.parametrize("make", [int, float, torch.tensor, lambda t: torch.tensor([t])])
def test_timesteps_that_stand_alone_begin_an_image_when_they_go_up(make):
    counter = StepCounter()
    seen = counted(counter, map(make, [900, 600, 600, 300, 900, 600]))
    assert seen == [(0, 0), (0, 1), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert counter.steps is None


def test_the_rest_of_a_run_is_known():
    counter = StepCounter()
    run = torch.arange(20, 0, -1)
    counted(counter, run[12:])
    assert counter.steps == 8
