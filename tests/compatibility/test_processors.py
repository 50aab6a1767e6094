"""What replaces attention processors: slicing, xFormers, fused projections, backends, processors with weights."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import (
    AttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    XFormersAttnProcessor,
)
from models import tiny_sd, tiny_unet
from torch.nn.attention import SDPBackend, sdpa_kernel

import agentsd
from agentsd import AgentSDConfig

from .support import (
    AgentsdWarnings,
    assert_differs,
    assert_no_trace,
    check_cycle,
    fingerprint,
    generate,
    in_both_phases,
    predict,
    predict_both,
    processor_names,
)


EVERYTHING = AgentSDConfig(merge_mlp=True, merge_crossattn=True)


@pytest.fixture
def xformers(monkeypatch):
    """
    The one function of xFormers that diffusers calls, where the package is not installed.

    xFormers computes softmax attention; so does this. The processor class and the switch are diffusers' own.
    """
    if attention_processor.xformers is None:

        def attend(query, key, value, attn_bias=None, op=None, scale=None):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_bias, scale=scale)

        package = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=attend))
        monkeypatch.setattr(attention_processor, "xformers", package)


def use_xformers(unet):
    unet.set_attn_processor(XFormersAttnProcessor())


def check_replaced(switch, config, undo=None):
    """
    While `switch` is on, a patched model is exactly a baseline one with the same switch on, after exactly one warning;
    removing the patch leaves the switch on; patching again afterwards works.
    """
    baseline = tiny_sd()
    plain = generate(baseline)
    switch(baseline)
    expected, found = generate(baseline), fingerprint(baseline.unet)

    pipe = agentsd.apply_patch(tiny_sd(), config=config)
    with AgentsdWarnings() as caught:
        patched = generate(pipe)
        assert caught.count == 0
        switch(pipe)
        assert torch.equal(generate(pipe), expected)
        generate(pipe)
        assert caught.count == 1
    assert_differs(patched, expected)
    agentsd.remove_patch(pipe)
    assert torch.equal(generate(pipe), expected)
    assert fingerprint(pipe.unet) == found

    # Patched with the switch on already, the patch is active, and the switch stays what it was.
    check_cycle(pipe, lambda: generate(pipe), config=config)
    if undo is not None:
        undo(pipe)
        assert torch.equal(generate(pipe), plain)
        assert_no_trace(pipe.unet)


@pytest.mark.parametrize("config", [AgentSDConfig(), EVERYTHING], ids=["attention", "everything"])
def test_attention_slicing(config):
    """`enable_attention_slicing` on a patched pipeline: exact baseline and one warning; off and on again."""
    check_replaced(
        lambda pipe: pipe.enable_attention_slicing(1), config, undo=lambda pipe: pipe.disable_attention_slicing()
    )


@pytest.mark.parametrize("config", [AgentSDConfig(), EVERYTHING], ids=["attention", "everything"])
def test_xformers_switch(xformers, config):
    """The xFormers switch on a patched pipeline: exactly the baseline, one warning; off by diffusers' own method."""
    check_replaced(
        lambda pipe: use_xformers(pipe.unet),
        config,
        undo=lambda pipe: pipe.disable_xformers_memory_efficient_attention(),
    )


@pytest.mark.parametrize("config", [AgentSDConfig(), EVERYTHING], ids=["attention", "everything"])
def test_fused_qkv_projections(config):
    """`fuse_qkv_projections` on a patched model: exact baseline and one warning while fused."""
    check_replaced(
        lambda pipe: pipe.fuse_qkv_projections(vae=False),
        config,
        undo=lambda pipe: pipe.unfuse_qkv_projections(vae=False),
    )


@in_both_phases
def test_unfused_qkv_projections_are_patched_again(config):
    """`unfuse_qkv_projections` on a patched model brings the patch back, although `fused_projections` stays set."""
    pipe = agentsd.apply_patch(tiny_sd(), config=config)
    patched = generate(pipe)
    pipe.fuse_qkv_projections(vae=False)
    with pytest.warns(UserWarning, match="without agentsd"):
        generate(pipe)
    pipe.unfuse_qkv_projections(vae=False)
    assert torch.equal(generate(pipe), patched)
    agentsd.remove_patch(pipe)
    assert torch.equal(generate(pipe), generate(tiny_sd()))
    assert_no_trace(pipe.unet)


def test_unfused_qkv_projections_after_removal():
    """A patch removed while the projections were fused does not come back when they are unfused."""
    pipe = agentsd.apply_patch(tiny_sd())
    patched = generate(pipe)
    pipe.fuse_qkv_projections(vae=False)
    agentsd.remove_patch(pipe)
    pipe.unfuse_qkv_projections(vae=False)
    assert_no_trace(pipe.unet)
    assert processor_names(pipe.unet) == processor_names(tiny_sd().unet)
    plain = generate(tiny_sd())
    assert torch.equal(generate(pipe), plain)
    assert torch.equal(generate(agentsd.apply_patch(pipe)), patched)


def test_processors_kept_from_a_patched_model():
    """Processors saved while patched and set again after removal: plain attention, and no obstacle to a new patch."""
    unet = agentsd.apply_patch(tiny_unet())
    patched, kept = predict_both(unet), unet.attn_processors
    agentsd.remove_patch(unet)
    plain = predict_both(unet)
    unet.set_attn_processor(kept)
    assert torch.equal(predict_both(unet), plain)
    assert torch.equal(predict_both(agentsd.apply_patch(unet)), patched)
    agentsd.remove_patch(unet)
    assert torch.equal(predict_both(unet), plain)
    assert_no_trace(unet)


@pytest.mark.parametrize(
    ("options", "size"),
    [({"ratio": 0}, {}), ({"merge_attn": False, "merge_mlp": True}, {}), ({}, {"height": 128, "width": 16})],
    ids=["nothing", "mlp", "narrow"],
)
def test_sliced_attention_that_is_left_alone(options, size):
    """Its processor takes fewer arguments than the others."""
    pipe = tiny_sd()
    pipe.enable_attention_slicing(1)
    plain = generate(pipe, **size)
    agentsd.apply_patch(pipe, **options)
    patched = generate(pipe, **size)
    # the narrow image holds no cell of the agent phase
    assert torch.equal(patched, plain) == (options == {"ratio": 0})


def test_patched_while_fused_then_unfused():
    """A model patched while fused: unfusing replaces the processors, so baseline and one warning."""
    pipe = tiny_sd()
    plain = generate(pipe)
    pipe.fuse_qkv_projections(vae=False)
    agentsd.apply_patch(pipe)
    assert_differs(generate(pipe), plain)
    pipe.unfuse_qkv_projections(vae=False)
    with AgentsdWarnings() as caught:
        assert torch.equal(generate(pipe), plain)
        assert caught.count == 1
    agentsd.remove_patch(pipe)
    assert torch.equal(generate(pipe), plain)
    assert_no_trace(pipe.unet)


def test_weights_can_change_while_fused_projections_are_kept():
    """Patched layers read `to_q`, `to_k` and `to_v`, which stay the truth after fusing and unfusing."""
    pipe = tiny_sd()
    pipe.fuse_qkv_projections(vae=False)
    pipe.unfuse_qkv_projections(vae=False)
    agentsd.apply_patch(pipe)
    before = generate(pipe)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if name.endswith("attn1.to_v.weight"):
                parameter.mul_(2)
    assert_differs(generate(pipe), before)


@pytest.mark.usefixtures("default_backend")
@in_both_phases
def test_attention_backend(config):
    """`set_attention_backend` works on patched layers; the patch is removed without a trace."""
    unet = tiny_unet()
    plain = predict_both(unet)
    agentsd.apply_patch(unet, config=config)
    patched = predict_both(unet)
    unet.set_attention_backend("_native_math")
    ours = [p for p in unet.attn_processors.values() if type(p).__name__ == "AgentAttnProcessor"]
    assert ours
    assert {p._attention_backend.value for p in ours} == {"_native_math"}
    math = predict_both(unet)
    torch.testing.assert_close(math, patched, rtol=1e-3, atol=1e-4)
    with sdpa_kernel(SDPBackend.MATH):
        unet.reset_attention_backend()
        torch.testing.assert_close(predict_both(unet), math, rtol=1e-3, atol=1e-4)
    agentsd.remove_patch(unet)
    assert torch.equal(predict_both(unet), plain)
    assert_no_trace(unet)


@pytest.mark.usefixtures("default_backend")
@in_both_phases
def test_the_backend_of_a_model_is_called_for_it_and_no_other(config, monkeypatch):
    """Both products of agent attention. A model without one attends as if not patched, whatever diffusers' default."""
    unet, other = (agentsd.apply_patch(tiny_unet(), config=config) for _ in range(2))
    unet.set_attention_backend("_native_math")
    backend = next(p._attention_backend for p in unet.attn_processors.values() if hasattr(p, "_attention_backend"))
    assert _AttentionBackendRegistry._active_backend == backend
    compute, calls = _AttentionBackendRegistry._backends[backend], []

    def counting(*args, **kwargs):
        calls.append(1)
        return compute(*args, **kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, backend, counting)
    predict(other, 500)
    assert not calls
    predict(unet, 500)
    layers = len(agentsd.report(unet).rows)
    assert len(calls) == (2 * layers if config.agent_until else layers)


def custom_diffusion(unet, only):
    """The processors that a Custom Diffusion checkpoint brings, on the layers whose names `only` accepts."""
    processors = {}
    for name, processor in unet.attn_processors.items():
        attn = unet.get_submodule(name.removesuffix(".processor"))
        crossing = not name.endswith("attn1.processor")
        if only(name):
            processor = CustomDiffusionAttnProcessor2_0(
                train_kv=crossing,
                train_q_out=False,
                hidden_size=attn.inner_dim,
                cross_attention_dim=attn.cross_attention_dim if crossing else None,
            )
        processors[name] = processor
    unet.set_attn_processor(processors)


@in_both_phases
def test_custom_diffusion_on_cross_attention(config):
    """CustomDiffusion on cross-attention: keeps working under the patch, with its weights where they were."""
    unet = tiny_unet()
    plain = predict_both(unet)
    custom_diffusion(unet, only=lambda name: name.endswith("attn2.processor"))
    with_custom = predict_both(unet)
    assert_differs(with_custom, plain)
    check_cycle(unet, lambda: predict_both(unet), config=config)


def test_module_processor_on_some_layers_is_skipped_and_reported():
    """CustomDiffusion and other `nn.Module` processors: such a layer is left alone, and the report says so."""
    unet = tiny_unet()
    custom_diffusion(unet, only=lambda name: name.startswith("down_blocks.0"))
    check_cycle(unet, lambda: predict_both(unet))
    found = fingerprint(unet)
    agentsd.apply_patch(unet)
    skipped = {row.name: row.skipped for row in agentsd.report(unet).rows}
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert "CustomDiffusionAttnProcessor2_0" in skipped.pop(name)
    assert set(skipped.values()) == {None}
    assert "skipped" in str(agentsd.report(unet))
    assert isinstance(unet.get_submodule(name).processor, CustomDiffusionAttnProcessor2_0)
    agentsd.remove_patch(unet)
    assert fingerprint(unet) == found


def test_module_processor_on_all_layers_is_an_error():
    """CustomDiffusion on every self-attention: nothing is left to patch, which is an error that names the reason."""
    unet = tiny_unet()
    custom_diffusion(unet, only=lambda name: True)
    before, found = predict_both(unet), fingerprint(unet)
    with pytest.raises(ValueError, match="CustomDiffusionAttnProcessor2_0"):
        agentsd.apply_patch(unet)
    assert torch.equal(predict_both(unet), before)
    assert fingerprint(unet) == found


class ScaledAttention(torch.nn.Module):
    """A processor with a weight, as users write them."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))
        self.plain = AttnProcessor()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return self.scale * self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def test_module_processor_set_on_a_patched_layer():
    """An `nn.Module` processor set after patching: it runs as in a baseline model, with one warning, and stays."""
    name = "up_blocks.2.attentions.0.transformer_blocks.0.attn1"
    baseline, unet = tiny_unet(), agentsd.apply_patch(tiny_unet())
    for model in (baseline, unet):
        model.get_submodule(name).set_processor(ScaledAttention())
    expected, found = predict_both(baseline), fingerprint(baseline)
    with AgentsdWarnings() as caught:
        assert_differs(predict_both(unet), expected)  # the other layers are still patched
        predict_both(unet)
        assert caught.count == 1
    agentsd.remove_patch(unet)
    assert torch.equal(predict_both(unet), expected)
    assert fingerprint(unet) == found


def slice_attention(pipe):
    pipe.enable_attention_slicing(1)


def fuse_projections(pipe):
    pipe.fuse_qkv_projections(vae=False)


def choose_backend(pipe):
    pipe.unet.set_attention_backend("_native_math")


def set_weighted_processor(pipe):
    pipe.unet.get_submodule("up_blocks.2.attentions.0.transformer_blocks.0.attn1").set_processor(ScaledAttention())


@pytest.mark.usefixtures("default_backend")
@pytest.mark.parametrize("inside", [lambda pipe: None, agentsd.remove_patch], ids=["patched", "removed"])
@pytest.mark.parametrize("change", [slice_attention, fuse_projections, choose_backend, set_weighted_processor])
def test_patched_for_a_while_gives_back_what_was_there(change, inside):
    """A patched model whose processors were changed since: after `patched` it has the very processors of before."""
    pipe = agentsd.apply_patch(tiny_sd())
    change(pipe)
    before, kept = dict(pipe.unet.attn_processors), dict(getattr(pipe.unet, "original_attn_processors", None) or {})
    backends = {name: getattr(processor, "_attention_backend", None) for name, processor in before.items()}
    with agentsd.patched(pipe, ratio=0.2):
        inside(pipe)
    assert pipe.unet.attn_processors == before
    assert dict(getattr(pipe.unet, "original_attn_processors", None) or {}) == kept
    assert {name: getattr(processor, "_attention_backend", None) for name, processor in before.items()} == backends
    agentsd.remove_patch(pipe)
    assert not hasattr(pipe.unet, "agentsd_patch")
    if kept:
        pipe.unfuse_qkv_projections(vae=False)
        assert_no_trace(pipe.unet)


def test_slicing_switched_on_for_good_stays():
    """Attention slicing switched on inside `patched` is not the patch's to undo."""
    pipe = agentsd.apply_patch(tiny_sd())
    with agentsd.patched(pipe, ratio=0.2):
        slice_attention(pipe)
    assert processor_names(pipe.unet) == {"SlicedAttnProcessor": len(pipe.unet.attn_processors)}


@pytest.mark.parametrize("setting", ["_attention_backend", "_parallel_config"])
def test_patching_again_keeps_the_backend(setting):
    """What `set_attention_backend` and `enable_parallelism` put on patched layers is kept by the next patch."""
    unet, chosen = agentsd.apply_patch(tiny_unet()), object()
    for name, processor in unet.attn_processors.items():
        if name.endswith("attn1.processor") and hasattr(processor, setting):
            setattr(processor, setting, chosen)
    agentsd.apply_patch(unet, ratio=0.2)
    ours = [p for p in unet.attn_processors.values() if type(p).__name__ == "AgentAttnProcessor"]
    assert ours
    assert all(getattr(processor, setting) is chosen for processor in ours)


def test_naive_attention_processor():
    """`set_default_attn_processor` before patching: the layers get back the very processors they had."""
    unet = tiny_unet()
    unet.set_default_attn_processor()
    before = dict(unet.attn_processors)
    check_cycle(unet, lambda: predict_both(unet))
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())
