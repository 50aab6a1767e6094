"""What patched layers compute: bit for bit nothing else where they are inactive, and the method where they run."""

import gc
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import tiny_sd, tiny_sdxl, tiny_unet
from runs import EARLY, LATE, hook_count, image, inputs, run

import agentsd
from agentsd.models.unet import find_layers
from agentsd.ops.agent_attention import agent_attention
from agentsd.ops.merging import match_tokens, merge_tokens, plan_merging, unmerge_tokens
from agentsd.ops.partitioning import cell_grid, partition_tokens


# --- exactness


@pytest.mark.parametrize("timestep", [EARLY, LATE])
def test_ratio_zero_is_bit_identical(unet, timestep):
    plain = run(unet, timestep)
    agentsd.apply_patch(unet, ratio=0, merge_mlp=True, merge_crossattn=True)
    assert torch.equal(run(unet, timestep), plain)


def test_removing_is_bit_identical_and_leaves_nothing(unet):
    plain, keys, processors, hooks = run(unet), list(unet.state_dict()), dict(unet.attn_processors), hook_count(unet)
    for _ in range(3):
        agentsd.apply_patch(unet, merge_mlp=True, merge_crossattn=True)
        assert list(unet.state_dict()) == keys
        agentsd.remove_patch(unet)
    assert torch.equal(run(unet), plain)
    assert unet.attn_processors == processors
    assert hook_count(unet) == hooks
    assert not [name for m in unet.modules() for name in vars(m) if "agentsd" in name]
    agentsd.remove_patch(unet)


@pytest.mark.parametrize("height, width", [(3, 64), (2, 2), (1, 16)])
def test_layers_smaller_than_a_cell_are_bit_identical(unet, height, width):
    """An image of a few latents must work as it did, in the phase whose cells it is too small for."""
    size = {"height": 4 * height, "width": 4 * width}
    deepest = lambda name, module: name.startswith("mid_block")  # noqa: E731
    plain = run(unet, **size)
    agentsd.apply_patch(unet, max_downsample=8, filter_fn=deepest)
    assert torch.equal(run(unet, **size), plain)


@pytest.mark.parametrize("timestep", [EARLY, LATE])
@pytest.mark.parametrize("height, width", [(16, 16), (17, 23), (8, 40), (19, 5)])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_sample_does_not_depend_on_its_batch(unet, timestep, height, width, batch):
    """Also what makes split and batched classifier-free guidance the same."""
    agentsd.apply_patch(unet, merge_mlp=True, merge_crossattn=True)
    sample, text = inputs(unet, batch, height, width)
    with torch.no_grad():
        together = unet(sample, timestep, text).sample
        alone = torch.cat([unet(s[None], timestep, t[None]).sample for s, t in zip(sample, text, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"merge_mlp": True, "merge_crossattn": True}, {"ratio": 0.9}])
def test_a_batch_of_different_timesteps_gives_each_sample_its_own_phase(unet, options):
    """Training draws a timestep a sample."""
    agentsd.apply_patch(unet, **options)
    sample, text = inputs(unet, batch=4)
    timesteps = torch.tensor([EARLY, LATE, EARLY, 950])
    with torch.no_grad():
        together = unet(sample, timesteps, text).sample
        alone = torch.cat([unet(s[None], t, e[None]).sample for s, t, e in zip(sample, timesteps, text, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_layer_whose_samples_would_keep_different_numbers_of_tokens_is_left_alone(unet):
    """Its input is one tensor. The cells of the ToMe phase find room in this image, those of the other do not."""
    sample, text = inputs(unet, height=3, width=24)

    def predict(timesteps, **options):
        agentsd.apply_patch(unet, **options)
        with torch.no_grad():
            return unet(sample, torch.tensor(timesteps), text).sample

    everything = {"merge_mlp": True, "merge_crossattn": True}
    assert torch.equal(predict([EARLY, LATE], **everything), predict([EARLY, LATE]))
    assert not torch.equal(predict([LATE, LATE], **everything), predict([LATE, LATE]))


def test_the_same_seed_gives_the_same_image_run_after_run():
    pipe = agentsd.apply_patch(tiny_sd())
    first, other, again = image(pipe, 0), image(pipe, 1), image(pipe, 0)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_seed_and_randomness_change_the_partition(unet):
    outputs = [run(agentsd.apply_patch(unet, **o)) for o in ({}, {"seed": 1}, {"use_rand": False}, {"seed": 0})]
    assert torch.equal(outputs[0], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


# --- what a patched layer computes


@pytest.mark.parametrize("timestep, cell", [(EARLY, 4), (LATE, 2)])
def test_a_patched_layer_computes_the_method_step_by_step(unet, timestep, cell):
    """The hooks feed the right tensors to the mathematics: the metric from before the norm, the layer's own size."""
    agentsd.apply_patch(unet, use_rand=False, ratio=0.3)
    layer = find_layers(unet)[0]
    seen = {}
    layer.block.register_forward_pre_hook(lambda module, args: seen.update(metric=args[0]))
    layer.attn.register_forward_hook(lambda module, args, output: seen.update(x=args[0], output=output))
    run(unet, timestep, height=12, width=20)

    partition = partition_tokens(*cell_grid(12, 20, cell, cell, torch.device("cpu")))
    matches = match_tokens(seen["metric"], partition)
    merging = plan_merging(partition, matches, int(240 * 0.3))
    tokens = merge_tokens(seen["x"], merging)

    def heads(x):
        return x.unflatten(2, (layer.attn.heads, -1)).transpose(1, 2)

    q, k, v = (heads(to(tokens)) for to in (layer.attn.to_q, layer.attn.to_k, layer.attn.to_v))
    if cell == 4:
        agents = merge_tokens(seen["x"], plan_merging(partition, matches, 240 - 15))
        attended = agent_attention(q, k, v, heads(layer.attn.to_q(agents)))
    else:
        attended = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, dim=3) @ v
    expected = unmerge_tokens(layer.attn.to_out[0](attended.transpose(1, 2).flatten(2)), merging)
    torch.testing.assert_close(seen["output"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part, flag", [("ff", "merge_mlp"), ("attn2", "merge_crossattn")])
@pytest.mark.parametrize("timestep, cell", [(EARLY, 4), (LATE, 2)])
def test_a_merged_layer_is_the_layer_itself_on_merged_tokens(unet, part, flag, timestep, cell):
    """Cross-attention merges its queries only; in the agent phase, too, it stays plain softmax."""
    block = find_layers(unet)[0].block
    layer, seen = getattr(block, part), {}
    # Before the patch's own hook, which merges, and behind the other one, which unmerges.
    layer.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    block.register_forward_pre_hook(lambda module, args: seen.update(metric=args[0]))
    agentsd.apply_patch(unet, use_rand=False, ratio=0.3, merge_attn=False, **{flag: True})
    layer.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(kwargs=kwargs, output=output), with_kwargs=True
    )
    run(unet, timestep, height=12, width=20)

    partition = partition_tokens(*cell_grid(12, 20, cell, cell, torch.device("cpu")))
    merging = plan_merging(partition, match_tokens(seen["metric"], partition), int(240 * 0.3))
    text = {name: value for name, value in seen["kwargs"].items() if name == "encoder_hidden_states"}
    assert bool(text) == (part == "attn2")
    output = seen["output"]
    with torch.no_grad():
        # Outside its block, the layer is as without agentsd.
        expected = unmerge_tokens(layer(merge_tokens(seen["x"], merging), **text), merging)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", ["attention_mask", "encoder_hidden_states"])
def test_a_layer_given_a_mask_or_other_keys_is_standard_attention(unet, given):
    layer = find_layers(unet)[0]
    x, text = torch.randn(2, layer.transformer.in_channels, 16, 16), torch.randn(2, 77, 32)
    more = {}
    if given == "attention_mask":
        more["attention_mask"] = torch.rand(2, 256) < 0.5
    else:
        keys = torch.randn(2, 7, layer.attn.inner_dim)
        layer.attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "encoder_hidden_states": keys}), with_kwargs=True
        )

    @torch.no_grad()
    def call(**options):
        return layer.transformer(x, encoder_hidden_states=text, return_dict=False, **options)[0]

    plain, unmasked = call(**more), call()
    agentsd.apply_patch(unet)
    run(unet)  # tells the phase
    assert torch.equal(call(**more), plain)
    if given == "attention_mask":
        assert not torch.equal(call(), unmasked), "without the mask it is patched"


@pytest.mark.parametrize("option", ["k_scale2", "k_shortcut"])
def test_options_of_agent_attention_reach_it(unet, option):
    default = {timestep: run(agentsd.apply_patch(unet), timestep) for timestep in (EARLY, LATE)}
    agentsd.apply_patch(unet, **{option: 0.9})
    assert not torch.equal(run(unet, EARLY), default[EARLY])
    assert torch.equal(run(unet, LATE), default[LATE])  # no agents there


def test_random_choices_vary_with_layer_timestep_and_seed(unet):
    """Within a phase, and for layers of one size."""

    def choices(timestep=LATE, seed=0):
        agentsd.apply_patch(unet, seed=seed)
        with recorded_partitions(unet) as partitions:
            run(unet, timestep)
        return partitions

    down, *up = choices()
    assert not any(torch.equal(down.dst, other.dst) for other in up)
    assert torch.equal(choices()[0].dst, down.dst)
    assert not torch.equal(choices(timestep=LATE - 20)[0].dst, down.dst)
    assert not torch.equal(choices(seed=1)[0].dst, down.dst)


@contextmanager
def recorded_partitions(unet):
    """The partitions of all patched layers, in the order in which they run."""
    found, handles = [], []
    for layer in find_layers(unet):
        if hasattr(layer.attn, "agentsd_layer"):
            note = lambda attn, *_: found.append(attn.agentsd_layer.call.parts[0].match.partition)  # noqa: E731
            handles.append(layer.attn.register_forward_hook(note))
    yield found
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("timestep", [EARLY, LATE])
def test_half_precision_stays_near_float32(unet, dtype, timestep):
    agentsd.apply_patch(unet, use_rand=False)
    expected = run(unet, timestep)
    got = run(unet.to(dtype), timestep)
    assert got.dtype == dtype
    assert (got.float() - expected).norm() / expected.norm() < 0.05


@pytest.fixture
def half_precision_logits():
    """The math backend materialises the logits, and in half precision if it is allowed to."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


@pytest.mark.usefixtures("half_precision_logits")
@pytest.mark.parametrize("timestep", [EARLY, LATE])
def test_fp32_attention_keeps_logits_finite_that_overflow_half_precision(timestep):
    """Stable Diffusion 2.x: no outer autocast needed."""
    unet = tiny_unet().eval()
    for layer in find_layers(unet):
        layer.attn.to_q.weight.data *= 1000
        layer.attn.to_k.weight.data *= 1000
    unet.half()
    assert not run(agentsd.apply_patch(unet, max_downsample=8), timestep).isfinite().all()
    precise = run(agentsd.apply_patch(unet, max_downsample=8, attn_precision="fp32"), timestep)
    assert precise.dtype == torch.float16
    assert precise.isfinite().all()


@pytest.mark.parametrize("precision, expected", [("fp32", torch.float32), (None, torch.bfloat16)])
@pytest.mark.parametrize("timestep", [EARLY, LATE])
def test_fp32_attention_holds_inside_an_autocast(unet, monkeypatch, timestep, precision, expected):
    """An outer autocast would otherwise take the attention back to half precision."""
    seen = set()

    def look(q, k, v, **options):
        output = F.scaled_dot_product_attention(q, k, v, **options)
        seen.add(output.dtype)
        return output

    monkeypatch.setattr("agentsd.runtime.processor.F", SimpleNamespace(scaled_dot_product_attention=look))
    agentsd.apply_patch(unet, attn_precision=precision)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(unet, timestep)
    assert seen == {expected}


@pytest.mark.parametrize("precision", [None, "fp32"])
@pytest.mark.parametrize("timestep", [EARLY, LATE])
def test_shapes_can_be_found_out_without_a_device(unet, timestep, precision):
    agentsd.apply_patch(unet, attn_precision=precision)
    sample, text = (x.to("meta") for x in inputs(unet))
    assert unet.to("meta")(sample, timestep, text).sample.shape == sample.shape


def test_only_the_layers_asked_for_are_patched(unet):
    asked = []

    def down_only(name, module):
        asked.append(name)
        assert module is unet.get_submodule(name)
        return name.startswith("down_blocks")

    agentsd.apply_patch(unet, max_downsample=2, filter_fn=down_only)
    run(unet)
    rows = [row.name for row in agentsd.report(unet).rows]
    assert rows and all(name.startswith("down_blocks") for name in rows)
    assert len(asked) == len(set(asked)) == sum(layer.level <= 1 for layer in find_layers(unet))


def test_levels_count_from_the_highest_resolution_with_attention():
    """SDXL has no attention at its top level: counting from the input would find nothing there."""
    pipe = agentsd.apply_patch(tiny_sdxl())
    rows = agentsd.report(pipe).rows
    assert rows
    assert {row.level for row in rows} == {0}


@pytest.mark.parametrize("flag", ["merge_attn", "merge_mlp", "merge_crossattn"])
@pytest.mark.parametrize("timestep", [EARLY, LATE])
def test_each_kind_of_merging_works_alone(unet, flag, timestep):
    plain = run(unet, timestep)
    agentsd.apply_patch(unet, **{"merge_attn": False, flag: True})
    assert not torch.equal(run(unet, timestep), plain)
    agentsd.apply_patch(unet, merge_attn=False)
    assert torch.equal(run(unet, timestep), plain)


@pytest.mark.parametrize("timestep", [EARLY, LATE])
def test_without_merging_of_attention_the_layer_is_as_it_was(unet, timestep):
    """The first one: those behind it see merged cross-attention and MLPs."""
    outputs = []
    find_layers(unet)[0].attn.register_forward_hook(lambda module, args, output: outputs.append(output))
    run(unet, timestep)
    agentsd.apply_patch(unet, merge_attn=False, merge_mlp=True, merge_crossattn=True)
    run(unet, timestep)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dim", [0, 1])
def test_chunked_feed_forward_is_not_merged_across_chunks(unet, dim):
    for layer in find_layers(unet):
        layer.block.set_chunk_feed_forward(1 if dim == 0 else 16, dim)
    agentsd.apply_patch(unet, merge_mlp=True)
    chunked = run(unet)
    agentsd.apply_patch(unet, merge_mlp=False)
    torch.testing.assert_close(chunked, run(unet))


def test_keyword_arguments_reach_the_hooks(unet):
    agentsd.apply_patch(unet)
    sample, text = inputs(unet)
    with torch.no_grad():
        by_name = unet(sample=sample, timestep=EARLY, encoder_hidden_states=text).sample
    assert torch.equal(by_name, run(unet))


def test_activations_are_let_go(unet):
    agentsd.apply_patch(unet, merge_mlp=True)
    run(unet)
    gc.collect()
    for layer in find_layers(unet):
        state = getattr(layer.attn, "agentsd_layer", None)
        assert state is None or (state.call.metric is None and state.call.parts is None)


@pytest.mark.parametrize("moment", ["register_forward_pre_hook", "register_forward_hook"])
@pytest.mark.parametrize("part", ["attn1", "attn2", "ff"])
def test_activations_are_let_go_after_an_exception(unet, part, moment):
    """A web page stops a run by raising: nothing is held, and the layer, called by itself, is plain attention."""
    agentsd.apply_patch(unet, merge_mlp=True, merge_crossattn=True)
    layer = find_layers(unet)[0]

    def stop(*args):
        raise InterruptedError("stopped")

    handle = getattr(getattr(layer.block, part), moment)(stop)
    with warnings.catch_warnings(action="error"), pytest.raises(InterruptedError):
        run(unet)
    handle.remove()
    state = layer.attn.agentsd_layer
    assert (state.call.metric, state.call.parts, state.call.entered) == (None, None, None)
    x = torch.randn(2, 256, 32)
    assert torch.equal(layer.attn(x), state.original(layer.attn, x))
