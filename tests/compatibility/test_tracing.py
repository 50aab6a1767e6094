"""What keeps one run of a model for all of them refuses a patched one, and says what to do."""

import pytest
import torch
from models import TEXT_WIDTH, tiny_unet
from torch.fx.experimental.proxy_tensor import make_fx

import agentsd


@pytest.fixture
def call():
    """A UNet and its arguments."""
    noise = torch.Generator().manual_seed(0)
    text = torch.randn(2, 7, TEXT_WIDTH, generator=noise)
    return tiny_unet(), (torch.randn(2, 4, 16, 16, generator=noise), torch.tensor(900), text)


class TupleOutput(torch.nn.Module):
    """A UNet that gives a tensor, as a user wraps it for tracing."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, text):
        return self.unet(sample, timestep, text, return_dict=False)[0]


def export(unet, arguments):
    return torch.export.export(unet, arguments, strict=False)


def export_wrapped(unet, arguments):
    return torch.export.export(TupleOutput(unet), arguments, strict=False)


def export_strict(unet, arguments):
    return torch.export.export(unet, arguments, strict=True)


def trace(unet, arguments):
    return torch.jit.trace(TupleOutput(unet), arguments, check_trace=False)


def trace_fx(unet, arguments):
    return make_fx(TupleOutput(unet))(*arguments)


def vmap(unet, arguments):
    sample, timestep, text = arguments
    with torch.no_grad():
        return torch.vmap(lambda x, t: TupleOutput(unet)(x[None], timestep, t[None]))(sample, text)


def per_sample_gradients(unet, arguments):
    sample, timestep, text = arguments

    def loss(parameters, x, t):
        return torch.func.functional_call(TupleOutput(unet), parameters, (x[None], timestep, t[None])).sum()

    parameters = {name: value.detach() for name, value in TupleOutput(unet).named_parameters()}
    return torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, sample, text)


WAYS = [export, export_wrapped, export_strict, trace, trace_fx, vmap, per_sample_gradients]


@pytest.mark.parametrize("config", [{}, {"reuse": 2}, {"preset": "agent"}], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_patched_model_is_refused(call, way, config):
    """It would silently keep the phase and the tokens of one step."""
    if way is export_strict and torch.__version__.startswith("2.6."):
        pytest.skip("the strict export of torch 2.6 passes over the hooks of what it exports")
    unet, arguments = call
    agentsd.apply_patch(unet, **config)
    with pytest.raises(Exception, match=r"remove the patch first, with `agentsd.remove_patch`"):
        way(unet, arguments)
    # It still runs, and can be traced without the patch.
    assert torch.isfinite(unet(*arguments).sample).all()


@pytest.mark.parametrize("way", [export, trace, vmap])
def test_an_unpatched_model_is_none_of_our_business(call, way):
    unet, arguments = call
    agentsd.remove_patch(agentsd.apply_patch(unet))
    way(unet, arguments)


def test_one_patched_block_is_refused_as_well(call):
    """Its layers would keep what they did last."""
    unet, arguments = call
    agentsd.apply_patch(unet)(*arguments)
    block, x = unet.down_blocks[0].attentions[0], torch.randn(2, 32, 16, 16)
    with pytest.raises(RuntimeError, match="remove the patch first"):
        torch.export.export(block, (x, arguments[2]), strict=False)


def test_gradients_of_a_patched_model_are_not_refused(call):
    """`torch.func.grad` runs it as it is."""
    unet, (sample, timestep, text) = call
    agentsd.apply_patch(unet)
    found = torch.func.grad(lambda x: unet(x, timestep, text).sample.sum())(sample)
    sample.requires_grad_()
    unet(sample, timestep, text).sample.sum().backward()
    torch.testing.assert_close(found, sample.grad)
