"""The agent attention module against the paper's formula, written out, and as a layer of models that are trained."""

import copy
import pickle

import pytest
import torch
from graphs import Graphs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from agentsd import AgentAttention, agent_attention


BIASES = ("an_bias", "ah_bias", "aw_bias", "na_bias", "ha_bias", "wa_bias", "ac_bias", "ca_bias")
HEADS, DIM = 2, 6


def make(seed=0, dtype=torch.float64, dim=DIM, num_heads=HEADS, **options):
    """A module whose biases weigh as much as its products, so that a wrong one shows."""
    torch.manual_seed(seed)
    attn = AgentAttention(dim, num_heads, **options).to(dtype)
    with torch.no_grad():
        for name, parameter in attn.named_parameters():
            parameter.normal_(std=1.0 if name in BIASES else 0.5)
    return attn


def tokens_of(attn, height, width, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, attn.class_token + height * width, attn.dim, generator=generator, dtype=torch.float64)
    return x.to(attn.proj.weight.dtype)


def interpolation(coarse, fine):
    """The `(fine, coarse)` matrix that reads a coarse axis in a straight line between the centres of its cells."""
    matrix = torch.zeros(fine, coarse, dtype=torch.float64)
    for row in range(fine):
        place = min(max((row + 0.5) * coarse / fine - 0.5, 0.0), coarse - 1.0)
        left = int(place)
        matrix[row, left] += 1 - (place - left)
        matrix[row, min(left + 1, coarse - 1)] += place - left
    return matrix


def cells(fine, coarse):
    """The `(coarse, fine)` matrix that averages an axis over the cells that adaptive pooling gives it."""
    matrix = torch.zeros(coarse, fine, dtype=torch.float64)
    for row in range(coarse):
        start, end = row * fine // coarse, -(-(row + 1) * fine // coarse)
        matrix[row, start:end] = 1 / (end - start)
    return matrix


def reference(attn, x, height, width):
    """The formula with each of its parts written out in float64; no function of the library or of `nn.functional`."""
    p = {name: value.detach().double() for name, value in attn.state_dict().items()}
    x, first, (rows, columns) = x.double(), int(attn.class_token), attn.grid_size
    q, k, v = torch.einsum("bnc,tdc->tbnd", x, p["qkv.weight"].unflatten(0, (3, -1)))
    if "qkv.bias" in p:
        q, k, v = (part + bias for part, bias in zip((q, k, v), p["qkv.bias"].chunk(3), strict=True))

    pool = [cells(fine, coarse) for fine, coarse in zip((height, width), attn.agent_size, strict=True)]
    agents = torch.einsum("yh,xw,bhwc->byxc", *pool, q[:, first:].unflatten(1, (height, width))).flatten(1, 2)

    block = interpolation(7, height), interpolation(7, width)
    along = interpolation(rows, height), interpolation(columns, width)
    b1 = torch.einsum("yh,xw,nahw->nayx", *block, p["an_bias"])
    b1 = b1 + torch.einsum("yh,nah->nay", along[0], p["ah_bias"][0, ..., 0])[..., :, None]
    b1 = b1 + torch.einsum("xw,naw->nax", along[1], p["aw_bias"][0, ..., 0, :])[..., None, :]
    b2 = torch.einsum("yh,xw,nahw->nyxa", *block, p["na_bias"])
    b2 = b2 + torch.einsum("yh,nha->nya", along[0], p["ha_bias"][0, :, :, 0])[:, :, None]
    b2 = b2 + torch.einsum("xw,nwa->nxa", along[1], p["wa_bias"][0, :, 0])[:, None]
    b1, b2 = b1.flatten(2), b2.flatten(1, 2)
    if first:
        b1 = torch.cat([p["ac_bias"][0], b1], dim=2)
        b2 = torch.cat([p["ca_bias"][0], b2], dim=1)

    def heads(tokens):
        return tokens.unflatten(2, (attn.num_heads, -1))

    scale = (attn.dim / attn.num_heads) ** -0.5
    gather = (torch.einsum("band,bmnd->bnam", heads(agents), heads(k)) * scale + b1).softmax(-1)
    spread = (torch.einsum("bmnd,band->bnma", heads(q), heads(agents)) * scale + b2).softmax(-1)
    out = torch.einsum("bnma,bnal,blnd->bmnd", spread, gather, heads(v)).flatten(2)

    padded = torch.zeros(len(x), height + 2, width + 2, attn.dim, dtype=torch.float64)
    padded[:, 1:-1, 1:-1] = v[:, first:].unflatten(1, (height, width))
    restored = sum(
        padded[:, y : y + height, x : x + width] * p["dwc.weight"][:, 0, y, x] for y in range(3) for x in range(3)
    )
    out[:, first:] += (restored + p["dwc.bias"]).flatten(1, 2)
    return out @ p["proj.weight"].T + p["proj.bias"]


GRIDS = {"its own": (4, 4), "larger": (9, 9), "smaller": (3, 3), "wide": (5, 12), "tall": (16, 2), "one row": (1, 7)}


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_agrees_with_the_formula_on_any_grid(grid, class_token):
    attn = make(class_token=class_token, agent_size=(2, 3), grid_size=(4, 4), qkv_bias=True)
    x = tokens_of(attn, *grid)
    torch.testing.assert_close(attn(x, size=grid), reference(attn, x, *grid))
    with torch.no_grad():  # by another kernel
        torch.testing.assert_close(attn(x, size=grid), reference(attn, x, *grid))


@pytest.mark.parametrize("options", [{}, {"agent_size": (1, 1)}, {"num_heads": 1}, {"grid_size": (5, 8)}])
def test_agrees_with_the_formula_for_other_sizes_of_itself(options):
    attn = make(**options)
    x = tokens_of(attn, 8, 8)
    torch.testing.assert_close(attn(x), reference(attn, x, 8, 8))


@pytest.mark.parametrize("class_token", [False, True])
def test_a_square_is_the_default_grid(class_token):
    attn = make(class_token=class_token)
    x = tokens_of(attn, 6, 6)
    assert torch.equal(attn(x), attn(x, size=(6, 6)))
    assert not torch.allclose(attn(x), attn(x, size=(4, 9)))


def without_biases_and_convolution(**options):
    attn = make(**options)
    with torch.no_grad():
        for name in BIASES:
            getattr(attn, name, torch.empty(0)).zero_()
        attn.dwc.weight.zero_()
        attn.dwc.bias.zero_()
    return attn


@pytest.mark.parametrize("class_token", [False, True])
def test_without_biases_and_convolution_it_is_agent_attention(class_token):
    attn = without_biases_and_convolution(class_token=class_token, agent_size=(2, 2))
    x = tokens_of(attn, 4, 6)
    q, k, v = attn.qkv(x).chunk(3, dim=2)
    agents = q[:, int(class_token) :].reshape(2, 2, 2, 2, 3, DIM).mean(dim=(2, 4)).flatten(1, 2)
    q, k, v, agents = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (q, k, v, agents))
    expected = agent_attention(q, k, v, agents, k_scale2=1, k_shortcut=0)
    torch.testing.assert_close(attn(x, size=(4, 6)), attn.proj(expected.transpose(1, 2).flatten(2)))


def test_is_linear_attention_with_softmax_feature_maps():
    """Keys and values meet in a state that does not grow with the tokens, and each query reads that state alone."""
    attn = make(agent_size=(2, 3))
    x = tokens_of(attn, 5, 4)
    q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in attn.qkv(x).chunk(3, dim=2))
    agents = torch.einsum("yh,xw,bnhwd->bnyxd", cells(5, 2), cells(4, 3), q.unflatten(2, (5, 4))).flatten(2, 3)
    scale = (DIM / HEADS) ** -0.5
    phi_q = (q @ agents.mT * scale + attn._query_bias((5, 4))).softmax(-1)
    phi_k = (agents @ k.mT * scale + attn._agent_bias((5, 4))).softmax(-1).mT
    state = phi_k.mT @ v
    assert state.shape == (2, HEADS, 6, DIM // HEADS)
    linear = torch.stack([phi_q[:, :, n : n + 1] @ state for n in range(20)], dim=2).squeeze(3)
    values = v.transpose(1, 2).flatten(2).mT.unflatten(2, (5, 4))
    expected = attn.proj(linear.transpose(1, 2).flatten(2) + attn.dwc(values).flatten(2).mT)
    torch.testing.assert_close(attn(x, size=(5, 4)), expected)


def test_the_cost_is_linear_in_the_tokens():
    attn, agents = AgentAttention(dim=32, num_heads=4).eval(), 49

    def operations(side):
        # Of this way to compute attention, torch counts all operations on a CPU.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            attn(torch.randn(1, side * side, 32))
        return counter.get_total_flops()

    for side in (14, 28, 56):
        projections, products, convolution = 8 * 32 * 32, 8 * agents * 32, 2 * 9 * 32
        assert operations(side) == side * side * (projections + products + convolution)


def deit(dim, heads, side, agents=49):
    """The attention of a block in the authors' DeiT checkpoints."""
    return {
        "qkv.weight": (3 * dim, dim),
        "qkv.bias": (3 * dim,),
        "proj.weight": (dim, dim),
        "proj.bias": (dim,),
        "dwc.weight": (dim, 1, 3, 3),
        "dwc.bias": (dim,),
        "an_bias": (heads, agents, 7, 7),
        "na_bias": (heads, agents, 7, 7),
        "ah_bias": (1, heads, agents, side, 1),
        "aw_bias": (1, heads, agents, 1, side),
        "ha_bias": (1, heads, side, 1, agents),
        "wa_bias": (1, heads, 1, side, agents),
        "ac_bias": (1, heads, agents, 1),
        "ca_bias": (1, heads, 1, agents),
    }


@pytest.mark.parametrize(
    "dim, heads, side",
    [(192, 3, 14), (384, 6, 14), (384, 6, 28), (768, 12, 14)],
    ids=["tiny", "small", "small-448", "base"],
)
def test_loads_the_layout_of_the_published_deit_checkpoints(dim, heads, side):
    attn = AgentAttention(dim, heads, grid_size=(side, side), class_token=True, qkv_bias=True)
    layout = deit(dim, heads, side)
    assert {name: tuple(value.shape) for name, value in attn.state_dict().items()} == layout
    checkpoint = {name: torch.rand(shape) for name, shape in layout.items()}
    attn.load_state_dict(checkpoint, strict=True)
    assert all(torch.equal(value, checkpoint[name]) for name, value in attn.state_dict().items())
    assert attn(torch.randn(1, 1 + side * side, dim)).shape == (1, 1 + side * side, dim)


def test_without_a_class_token_nothing_is_kept_for_one():
    layout = deit(dim=DIM, heads=HEADS, side=14)
    names = set(layout) - {"ac_bias", "ca_bias", "qkv.bias"}
    assert set(AgentAttention(DIM, HEADS).state_dict()) == names


def test_new_biases_are_small_and_are_there():
    torch.manual_seed(0)
    attn = AgentAttention(64, 4, class_token=True)
    for name in BIASES:
        assert getattr(attn, name).std().item() == pytest.approx(0.02, rel=0.25)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda attn: pickle.loads(pickle.dumps(attn))])
def test_copies_are_equal_and_share_nothing(clone):
    attn = make(class_token=True)
    x = tokens_of(attn, 4, 4)
    other = clone(attn)
    assert torch.equal(other(x), attn(x))
    with torch.no_grad():
        other.an_bias.add_(1.0 * torch.arange(7))
    assert not torch.allclose(other(x), attn(x))
    assert torch.equal(attn(x), make(class_token=True)(x))


def test_state_dict_round_trip():
    attn, other = make(class_token=True), make(seed=5, class_token=True)
    x = tokens_of(attn, 4, 4)
    assert not torch.allclose(other(x), attn(x))
    other.load_state_dict(attn.state_dict())
    assert torch.equal(other(x), attn(x))


@pytest.mark.parametrize("class_token", [False, True])
def test_gradients_are_right(class_token):
    attn = make(dim=2, num_heads=1, agent_size=(1, 2), grid_size=(2, 2), class_token=class_token)
    x = tokens_of(attn, 2, 3, batch=1).requires_grad_()
    names, parameters = zip(*attn.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(attn, dict(zip(names, values, strict=True)), (x, (2, 3)))

    assert torch.autograd.gradcheck(call, (x, *parameters))


def test_every_parameter_learns():
    attn = make(class_token=True, qkv_bias=True)
    attn(tokens_of(attn, 5, 5)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in attn.parameters())


@pytest.mark.parametrize("class_token", [False, True])
def test_bfloat16_under_autocast(class_token):
    attn = make(dtype=torch.float32, dim=32, num_heads=4, class_token=class_token)
    with torch.no_grad():
        attn.qkv.weight.mul_(0.3)  # a softmax over logits in the tens turns rounding into another choice
    x = tokens_of(attn, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = attn(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    expected = reference(attn, x, 6, 6)
    assert (out.double() - expected).norm() < 2e-2 * expected.norm()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in attn.parameters())


def test_in_bfloat16_as_a_whole():
    attn = make(dtype=torch.bfloat16, dim=32, num_heads=4)
    out = attn(tokens_of(attn, 4, 4))
    out.square().sum().backward()
    assert out.dtype == torch.bfloat16 and torch.isfinite(attn.an_bias.grad).all()


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("class_token", [False, True])
def test_compiled_it_is_one_graph_whatever_comes_after(class_token):
    attn, graphs = make(class_token=class_token), Graphs()
    compiled = torch.compile(attn, backend=graphs, fullgraph=True)
    for seed in (1, 2, 3):
        x = tokens_of(attn, 4, 4, seed=seed)
        torch.testing.assert_close(compiled(x), attn(x))
    assert graphs.count == 1
    for size in ((6, 6), (3, 8), (5, 5), (9, 9)):
        x = tokens_of(attn, *size)
        torch.testing.assert_close(compiled(x, size), attn(x, size))
        captured = graphs.count
        torch.testing.assert_close(compiled(x, size), attn(x, size))
        assert graphs.count == captured, "recompiled for a grid that it has seen"


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("batch", [1, 2])
def test_compiled_it_infers_the_same(batch):
    """The fast kernel that it chooses while tracing gets agents in the layout that it reads."""
    attn = make(dim=32, num_heads=4)
    compiled = torch.compile(attn, backend="aot_eager", fullgraph=True)
    x = tokens_of(attn, 14, 14, batch=batch)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), reference(attn, x, 14, 14))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_it_trains():
    attn = make(class_token=True, qkv_bias=True)
    compiled = torch.compile(copy.deepcopy(attn), backend="aot_eager", fullgraph=True)
    x = tokens_of(attn, 4, 4)
    for model in (attn, compiled):
        model(x).square().sum().backward()
    for (name, parameter), other in zip(attn.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, msg=name)


def test_dropout_is_on_both_softmaxes_and_on_the_output():
    attn = make(attn_drop=0.5, proj_drop=0.0)
    x = tokens_of(attn, 4, 4)
    assert not torch.equal(attn(x), attn(x))
    attn.attn_drop.p = 1.0
    values = attn.qkv(x).chunk(3, dim=2)[2].mT.unflatten(2, (4, 4))
    torch.testing.assert_close(attn(x), attn.proj(attn.dwc(values).flatten(2).mT))
    attn.eval()
    assert torch.equal(attn(x), make()(x))
    dropped = make(proj_drop=1.0)
    assert not dropped(x).any() and dropped.eval()(x).any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dim": 10, "num_heads": 4}, "multiple of `num_heads`.*10 and 4"),
        ({"dim": 8, "num_heads": 0}, "multiple of `num_heads`.*8 and 0"),
        ({"dim": 8, "num_heads": 2, "agent_size": 7}, "`agent_size` must be two positive integers.*7"),
        ({"dim": 8, "num_heads": 2, "agent_size": (7, 0)}, "`agent_size` must be two positive integers"),
        ({"dim": 8, "num_heads": 2, "grid_size": (14, 14, 1)}, "`grid_size` must be two positive integers"),
        ({"dim": 8, "num_heads": 2, "attn_drop": 1.5}, "1.5"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AgentAttention(**options)


@pytest.mark.parametrize(
    "class_token, tokens, size, message",
    [
        (False, 12, None, "12 tokens make no square: pass `size="),
        (True, 16, None, "15 tokens behind the class token make no square"),
        (True, 1, None, "0 tokens behind the class token make no square"),
        (False, 12, (3, 5), r"grid of 12 tokens, but got \(3, 5\)"),
        (True, 12, (3, 4), r"grid of 11 tokens behind the class token, but got \(3, 4\)"),
        (False, 12, (12,), r"`size` must be \(height, width\).*got \(12,\)"),
    ],
)
def test_tokens_that_fill_no_grid_are_named(class_token, tokens, size, message):
    attn = AgentAttention(DIM, HEADS, class_token=class_token)
    with pytest.raises(ValueError, match=message):
        attn(torch.randn(1, tokens, DIM), size=size)


@pytest.mark.parametrize("shape", [(16, DIM), (1, 16, DIM + 1), (1, DIM, 4, 4)])
def test_inputs_of_another_shape_are_named(shape):
    with pytest.raises(ValueError, match=r"shape \(batch, tokens, 6\)"):
        AgentAttention(DIM, HEADS)(torch.randn(shape))


@pytest.mark.parametrize("mask", [{"attn_mask": torch.ones(16, 16)}, {"is_causal": True}])
def test_masks_are_refused(mask):
    with pytest.raises(ValueError, match="takes no mask"):
        AgentAttention(DIM, HEADS)(torch.randn(1, 16, DIM), **mask)


class ViTAttention(AgentAttention):
    """For layers of transformers' ViT, which want the softmaxes, too."""

    def forward(self, hidden_states, attention_mask=None, **options):
        return super().forward(hidden_states), None


def test_a_vision_transformer_learns_with_it():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vit = ViTForImageClassification(ViTConfig(**sizes, image_size=24, patch_size=4, num_labels=8))
    for layer in vit.vit.layers:
        layer.attention = ViTAttention(32, 4, agent_size=(2, 2), grid_size=(6, 6), class_token=True, qkv_bias=True)
    images, labels = torch.randn(8, 3, 24, 24), torch.arange(8)
    optimizer = torch.optim.AdamW(vit.parameters(), lr=3e-3)
    for _ in range(30):
        loss = vit(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (vit.eval()(images).logits.argmax(-1) == labels).all()


def test_replaces_the_attention_of_timm():
    """Called as `timm` calls it, it takes over the projections of the attention that it replaces."""
    timm = pytest.importorskip("timm")
    vit = timm.create_model("deit_tiny_patch16_224", depth=2, num_classes=5)
    for block in vit.blocks:
        attn = AgentAttention(192, 3, class_token=True, qkv_bias=True)
        assert not attn.load_state_dict(block.attn.state_dict(), strict=False).unexpected_keys
        block.attn = attn
    vit(torch.randn(1, 3, 224, 224)).sum().backward()
    assert vit.blocks[0].attn.an_bias.grad.any()
