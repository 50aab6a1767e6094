"""Agent attention against a plain float64 einsum of the formula, and against its linear-attention form."""

import pytest
import torch

from agentsd import agent_attention


def make_inputs(batch=2, heads=3, tokens=19, agents=5, head_dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, heads, tokens, head_dim)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return q, k, v, torch.randn(batch, heads, agents, head_dim, generator=generator, dtype=torch.float64).to(dtype)


def make_biases(heads=3, tokens=19, agents=5):
    generator = torch.Generator().manual_seed(1)
    shapes = {"agent_bias": (1, heads, agents, tokens), "query_bias": (1, heads, tokens, agents)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def reference(q, k, v, agents, k_scale2=0.3, k_shortcut=0.075, agent_bias=0.0, query_bias=0.0):
    q, k, v, agents = (x.double() for x in (q, k, v, agents))
    scale = q.shape[-1] ** -0.5
    gather = torch.einsum("bhad,bhnd->bhan", agents, k).mul(scale).add(agent_bias).softmax(-1)
    spread = torch.einsum("bhnd,bhad->bhna", q, agents).mul(scale**k_scale2).add(query_bias).softmax(-1)
    return torch.einsum("bhna,bham,bhmd->bhnd", spread, gather, v) + k_shortcut * v


@pytest.mark.parametrize("sizes", [{}, {"tokens": 1}, {"agents": 1}, {"batch": 1, "heads": 1}, {"head_dim": 40}])
@pytest.mark.parametrize(
    "constants", [{}, {"k_scale2": 1.0, "k_shortcut": 0.0}, {"k_scale2": 0.5, "k_shortcut": -0.3}]
)
def test_agrees_with_the_formula(sizes, constants):
    inputs = make_inputs(**sizes)
    torch.testing.assert_close(agent_attention(*inputs, **constants), reference(*inputs, **constants))


@pytest.mark.parametrize("names", [["agent_bias"], ["query_bias"], ["agent_bias", "query_bias"]])
def test_biases_are_added_to_the_logits(names):
    inputs, biases = make_inputs(), make_biases()
    chosen = {name: biases[name] for name in names}
    torch.testing.assert_close(agent_attention(*inputs, **chosen), reference(*inputs, **chosen))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_keeps_the_dtype_and_its_precision(dtype, tolerance):
    inputs = make_inputs(tokens=64, agents=16, dtype=dtype)
    output = agent_attention(*inputs)
    assert output.dtype == dtype
    error = (output.double() - reference(*inputs)).norm() / reference(*inputs).norm()
    assert error < tolerance


def test_is_linear_attention_with_softmax_feature_maps():
    """The paper's generalised linear attention: the key–value state is formed once, whatever the number of queries."""
    q, k, v, agents = make_inputs()
    scale = q.shape[-1] ** -0.5
    phi_q = (q @ agents.transpose(2, 3) * scale**0.3).softmax(-1)
    phi_k = (agents @ k.transpose(2, 3) * scale).softmax(-1).transpose(2, 3)
    linear = phi_q @ (phi_k.transpose(2, 3) @ v) + 0.075 * v
    torch.testing.assert_close(agent_attention(q, k, v, agents), linear)


def test_does_not_depend_on_the_order_of_tokens_or_agents():
    q, k, v, agents = make_inputs()
    order = torch.randperm(q.shape[2], generator=torch.Generator().manual_seed(1))
    shuffled = agent_attention(q[:, :, order], k[:, :, order], v[:, :, order], agents.flip(2))
    torch.testing.assert_close(shuffled, agent_attention(q, k, v, agents)[:, :, order])


def test_gradients_are_right():
    inputs = [x.requires_grad_() for x in make_inputs(batch=1, heads=1, tokens=4, agents=2, head_dim=3)]
    assert torch.autograd.gradcheck(lambda *x: agent_attention(*x), inputs)


@pytest.mark.parametrize("broken", [0, 1, 2, 3])
def test_shapes_that_do_not_fit_are_named(broken):
    inputs = list(make_inputs())
    inputs[broken] = inputs[broken][..., :-1]
    with pytest.raises(ValueError, match="shape"):
        agent_attention(*inputs)
