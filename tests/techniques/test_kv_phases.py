"""Fewer keys and values than queries: down-sampled or merged, in a real layer of a real UNet."""

import pytest
import torch
from compat_models import image, with_unet
from compatibility.support import generate
from diffusers import StableDiffusionControlNetPipeline
from models import TEXT_WIDTH, tiny_controlnet, tiny_unet

import agentsd
from agentsd import AgentSDConfig
from agentsd.models.unet import find_layers
from agentsd.techniques.kv_downsampling import KVDownsamplingConfig
from agentsd.techniques.kv_merging import KVMergingConfig


SIZE = (16, 16)
LATE_PHASES = ("kv-mean", "kv-nearest", "kv-merged")


def late(late_phase, **options):
    return AgentSDConfig(agent_until=0.0, late_phase=late_phase, **options)


def predict(unet, timestep=100, size=SIZE, batch=2):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(batch, 4, *size, generator=generator)
    text = torch.randn(batch, 7, TEXT_WIDTH, generator=generator)
    with torch.no_grad():
        return unet(sample, timestep, encoder_hidden_states=text).sample


def layer_io(unet, timestep=100, size=SIZE):
    """Input and output of the first patched layer, and the layer."""
    layer = find_layers(unet)[0].attn
    seen = {}
    handle = layer.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(x=(args or (kwargs["hidden_states"],))[0], out=out),
        with_kwargs=True,
    )
    predict(unet, timestep, size)
    handle.remove()
    return layer, seen["x"], seen["out"]


def attention(layer, x, source, counts=None):
    """Softmax attention of all tokens of `x` to those of `source`, each counted so many times, in float64."""
    q, k, v = (
        part.unflatten(-1, (layer.heads, -1)).transpose(1, 2).double()
        for part in (layer.to_q(x), layer.to_k(source), layer.to_v(source))
    )
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).exp()
    if counts is not None:
        weights = weights * counts[:, None, None].double()
    weights = weights / weights.sum(-1, keepdim=True)
    return layer.to_out[0]((weights @ v).transpose(1, 2).flatten(2).float())


@torch.no_grad()
@pytest.mark.parametrize("late_phase", ["kv-mean", "kv-nearest"])
def test_all_tokens_attend_to_one_token_of_each_cell(late_phase):
    unet = agentsd.apply_patch(tiny_unet(), config=late(late_phase))
    layer, x, out = layer_io(unet)
    cells = x.unflatten(1, SIZE).unflatten(1, (8, 2)).unflatten(3, (8, 2))
    source = (cells.mean((2, 4)) if late_phase == "kv-mean" else cells[:, :, 0, :, 0]).flatten(1, 2)
    torch.testing.assert_close(out, attention(layer, x, source), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_all_tokens_attend_to_merged_tokens():
    """
    The three quarters of all tokens that are most like a destination in the block's input join it, and the others are
    left as they are. A key counts as often as it stands for a token.
    """
    unet = agentsd.apply_patch(tiny_unet(), config=late("kv-merged", use_rand=False))
    inputs = {}
    find_layers(unet)[0].block.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.update(x=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    layer, x, out = layer_io(unet)
    numbers = torch.arange(SIZE[0] * SIZE[1]).reshape(SIZE)
    destinations = numbers[::4, ::4].flatten()
    sources = torch.tensor([number for number in numbers.flatten() if number not in destinations])
    unit = torch.nn.functional.normalize(inputs["x"].double(), dim=-1)
    best = (unit[:, sources] @ unit[:, destinations].transpose(1, 2)).max(-1)
    for row, score, near, got in zip(x, best.values, best.indices, out, strict=True):
        joins = torch.zeros(len(sources), dtype=torch.bool)
        joins[score.topk(192).indices] = True
        groups = [torch.cat([d[None], sources[joins & (near == cell)]]) for cell, d in enumerate(destinations)]
        groups += [token[None] for token in sources[~joins]]
        assert len(groups) == 64
        merged = torch.stack([row[group].mean(0) for group in groups])
        counts = torch.tensor([[len(group) for group in groups]])
        expected = attention(layer, row[None], merged[None], counts)[0]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_attention_backend_weighs_merged_keys_too():
    unet = agentsd.apply_patch(tiny_unet(), config=late("kv-merged"))
    expected = predict(unet)
    unet.set_attention_backend("native")
    torch.testing.assert_close(predict(unet), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("late_phase", LATE_PHASES)
def test_the_agent_phase_is_the_papers(late_phase):
    unet = tiny_unet()
    early = predict(agentsd.apply_patch(unet), 900)
    changed = agentsd.apply_patch(unet, late_phase=late_phase)
    assert torch.equal(predict(changed, 900), early)
    assert not torch.equal(predict(changed, 100), predict(agentsd.apply_patch(unet), 100))


@pytest.mark.parametrize("late_phase", LATE_PHASES)
def test_off_is_off(late_phase):
    unet = tiny_unet()
    before = predict(unet)
    agentsd.apply_patch(unet, config=late(late_phase))
    assert not torch.equal(predict(unet), before)
    assert torch.equal(predict(agentsd.remove_patch(unet)), before)
    assert torch.equal(predict(agentsd.apply_patch(unet, config=late(late_phase, min_tokens=257))), before)
    assert torch.equal(predict(agentsd.apply_patch(unet, config=late(late_phase, ratio=0))), before)


@torch.no_grad()
@pytest.mark.parametrize("late_phase", LATE_PHASES)
def test_samples_of_a_batch_may_be_in_different_phases(late_phase):
    unet = agentsd.apply_patch(tiny_unet(), late_phase=late_phase)
    together = predict(unet, torch.tensor([900, 100]))
    for row, timestep in enumerate((900, 100)):
        torch.testing.assert_close(together[row], predict(unet, timestep)[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("late_phase", LATE_PHASES)
@pytest.mark.parametrize("options", [{"merge_mlp": True}, {"merge_crossattn": True}])
def test_only_the_agent_phase_merges_in_other_layers(late_phase, options):
    unet = tiny_unet()
    plain = predict(agentsd.apply_patch(unet, late_phase=late_phase), 100)
    assert torch.equal(predict(agentsd.apply_patch(unet, late_phase=late_phase, **options), 100), plain)


@pytest.mark.parametrize("late_phase", LATE_PHASES)
def test_the_report_tells_queries_and_keys(late_phase):
    unet = agentsd.apply_patch(tiny_unet(), late_phase=late_phase)
    phase = agentsd.report(unet, height=128, width=128).rows[0].phases[late_phase]
    assert (phase.merged_tokens, phase.keys, phase.agents) == (256, 64, None)
    assert late_phase in str(agentsd.report(unet))


@pytest.mark.parametrize("late_phase", LATE_PHASES)
def test_controlnets_are_patched_too(late_phase):
    pipe = with_unet(StableDiffusionControlNetPipeline, controlnet=tiny_controlnet())
    agentsd.apply_patch(pipe, config=late(late_phase))
    counts = {}
    for model in (pipe.unet, pipe.controlnet):
        counts[model] = []
        layer = find_layers(model)[0].attn
        layer.to_k.register_forward_hook(lambda _, args, out, seen=counts[model]: seen.append(out.shape[1]))
    generate(pipe, image=image())
    assert all(set(seen) == {64} for seen in counts.values()), "of 256 tokens"


@pytest.mark.parametrize("size", [(1, 16), (3, 5)])
@pytest.mark.parametrize("late_phase", LATE_PHASES)
def test_odd_sizes(late_phase, size):
    size = (size[0] * 4, size[1] * 4)
    unet = agentsd.apply_patch(tiny_unet(), config=late(late_phase))
    assert predict(unet, size=size).isfinite().all()


def test_a_phase_has_one_technique_for_keys():
    from agentsd.techniques.kv_downsampling import apply_kv_downsampling
    from agentsd.techniques.kv_merging import apply_kv_merging

    phase = apply_kv_downsampling(AgentSDConfig().phases[1], KVDownsamplingConfig())
    with pytest.raises(ValueError, match=r"KVMerging.* and KVDownsampling.* cannot both be the keys"):
        apply_kv_merging(phase, KVMergingConfig())


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: KVDownsamplingConfig("median"), "'mean' or 'nearest', but got 'median'"),
        (lambda: KVDownsamplingConfig(factor=0), "`factor` must be at least 1"),
        (lambda: KVMergingConfig(1.0), r"`ratio` must be in \[0"),
        (lambda: AgentSDConfig(late_phase="todo"), "`late_phase` must be one of 'tome', 'kv-mean'"),
        (lambda: AgentSDConfig(late_phase="kv-mean", sx=4), "`late_phase` would have no effect beside `sx`"),
        (lambda: AgentSDConfig(late_phase="kv-mean", merge_attn=False), "`merge_attn=False` leaves as it is"),
    ],
)
def test_bad_values_are_refused(make, error):
    with pytest.raises(ValueError, match=error):
        make()
