"""The Triton kernels: in Triton's interpreter, through its compiler, and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agentsd.ops import merging as reference
from agentsd.ops import partitioning
from agentsd.ops.merging import Matches, match_tokens, merge_tokens, plan_merging, unmerge_tokens
from agentsd.ops.partitioning import cell_grid, mix_key, partition_tokens, random_members, random_partition


triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
HALF = [torch.float16, torch.bfloat16]
CUDA = torch.device("cuda")


@pytest.mark.skipif(
    TRITON_VERSION < (3, 7),
    reason="the interpreters of older versions cannot count loops with a NumPy of today",
)
def test_the_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted_kernels.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


SIGNATURES = {
    "partition_kernel": "key:i64 dst:i64 src:i64",
    "plan_kernel": "src:i64 dst:i64 cell:i64 score:fp32 members:i64 merged:i64 target:i64 size:fp32 position:i64",
    "match_kernel": "metric:half dst:i64 src:i64 cell:i64 score:fp32",
    "order_kernel": "merged:i64 target:i64 order:i64 start:i32",
    "merge_kernel": "x:half members:i64 size:fp32 order:i64 start:i32 out:half",
    "take_kernel": "y:half position:i64 out:half",
}


@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", SIGNATURES)
def test_the_kernels_compile_without_a_gpu(name, capability, half):
    """The interpreter forgives what the compiler does not."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from agentsd.ops import kernels

    tiles = {
        "partition_kernel": {"SX": 2, "SY": 2, **kernels.PARTITION_TILE},
        "plan_kernel": {"SOURCES": kernels.PLANNED_AT_A_TIME},
        "match_kernel": kernels.MATCH_TILE,
        "order_kernel": kernels.ORDER_TILE,
        "merge_kernel": {"ROWS": kernels.MERGED_AT_A_TIME, "WIDTH": kernels.WIDEST},
        "take_kernel": kernels.TAKE_TILE,
    }
    kernel, pointers = getattr(kernels, name), dict(each.split(":") for each in SIGNATURES[name].split())
    constants = {**tiles[name], "CHANNELS": 320}
    constants = {each: value for each, value in constants.items() if each in kernel.arg_names}
    signature = dict.fromkeys(kernel.arg_names, "i32")
    signature |= {each: "*" + kind.replace("half", half) for each, kind in pointers.items()}
    signature |= dict.fromkeys(constants, "constexpr")
    if TRITON_VERSION >= (3, 3):
        constants = {(kernel.arg_names.index(each),): value for each, value in constants.items()}
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
    # What any GPU of these generations has for a program.
    assert compiled.metadata.shared < 99 * 2**10


def make_partition(height, width, samples, device=CUDA, sx=2, sy=2):
    cells, leftover = cell_grid(height, width, sx, sy, device)
    key = mix_key(torch.arange(samples, device=device), seed=0)
    return partition_tokens(cells, leftover, random_members(len(cells), sx * sy, key))


def tokens_of(batch, count, channels, dtype):
    return torch.randn(batch, count, channels, generator=torch.Generator().manual_seed(0)).to(CUDA, dtype)


@pytest.fixture
def calls(monkeypatch):
    """Of each call, whether it went to a kernel."""
    seen, original = [], reference.has_kernels

    def note(*args):
        seen.append(original(*args))
        return seen[-1]

    for module in (partitioning, reference):
        monkeypatch.setattr(module, "has_kernels", note)
    return seen


@pytest.mark.cuda
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("size, channels", [((64, 64), 320), ((64, 64), 640), ((32, 32), 1280), ((17, 23), 48)])
@pytest.mark.parametrize("dtype", HALF)
def test_matches(dtype, size, channels, samples, calls):
    metric, partition = tokens_of(2, size[0] * size[1], channels, dtype), make_partition(*size, samples)
    matches = match_tokens(metric, partition)
    assert calls == [True]
    unit = torch.nn.functional.normalize(metric.double(), dim=2)
    src, dst = (reference.take_tokens(unit, index) for index in (partition.src, partition.dst))
    similarity = src @ dst.transpose(1, 2)
    best = similarity.max(dim=2).values
    torch.testing.assert_close(matches.score.double(), best, atol=1e-3, rtol=0)
    chosen = similarity.gather(2, matches.cell.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(chosen, best, atol=1e-4, rtol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("size, channels", [((64, 64), 320), ((32, 32), 1280), ((17, 23), 48)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_merging_and_unmerging(dtype, tolerance, size, channels, samples, share, calls):
    """To a unit in the last place."""
    x, partition = tokens_of(2, size[0] * size[1], channels, dtype), make_partition(*size, samples)
    merging = plan_merging(partition, match_tokens(x, partition), int(share * partition.src.shape[1]))
    merged = merge_tokens(x, merging)
    restored = unmerge_tokens(merged, merging)
    assert calls == [True] * (4 if merging.merged.shape[1] else 3)
    torch.testing.assert_close(merged.double(), merge_tokens(x.double(), merging), atol=1e-6, rtol=tolerance)
    assert torch.equal(restored.double(), unmerge_tokens(merged.double(), merging))


@pytest.mark.cuda
def test_tokens_of_many_images_at_once():
    """More elements than 32 bits can count, in images that are not too large for the kernels that merge."""
    x = torch.zeros(129, 128 * 128, 1024, device="cuda", dtype=torch.float16)
    x[-1] = tokens_of(1, 128 * 128, 1024, torch.float16)[0]
    partition = make_partition(128, 128, 1, sx=16, sy=16)
    count = partition.src.shape[1]
    merging = plan_merging(partition, match_tokens(x, partition), count)
    restored = unmerge_tokens(merge_tokens(x, merging), merging)
    alone = plan_merging(partition, match_tokens(x[-1:], partition), count)
    assert torch.equal(restored[-1:], unmerge_tokens(merge_tokens(x[-1:], alone), alone))
    assert not restored[0].any()


@pytest.mark.cuda
def test_many_tokens_become_one():
    """As in an image of one colour, whose tokens all go to the first destination."""
    x = torch.ones(2, 4096, 320, device="cuda", dtype=torch.float16)
    partition = make_partition(64, 64, 2)
    matches = match_tokens(x, partition)
    assert not matches.cell.any()
    merging = plan_merging(partition, matches, 3000)
    assert torch.equal(unmerge_tokens(merge_tokens(x, merging), merging), x)


@pytest.mark.cuda
def test_repetitions_give_the_same():
    """Of all that is added, the order counts."""
    x, partition = tokens_of(2, 4096, 320, torch.float16), make_partition(64, 64, 2, sx=4, sy=4)

    def run():
        matches = match_tokens(x, partition)
        merging = plan_merging(partition, matches, 3000)
        return (*matches, merge_tokens(x, merging))

    first = run()
    for _ in range(20):
        assert all(torch.equal(one, other) for one, other in zip(first, run(), strict=True))


@pytest.mark.cuda
def test_partitions_and_plans_are_torchs(calls, monkeypatch):
    """Bit for bit, as long as no two scores are equal."""
    key = mix_key(torch.tensor([981, 2**40 + 7], device=CUDA), seed=5)
    partition = random_partition(67, 130, 4, 4, key)
    score = torch.rand(2, partition.src.shape[1], generator=torch.Generator().manual_seed(0)).to(CUDA)
    matches = Matches(torch.randint(partition.dst.shape[1], score.shape, device=CUDA), score)
    merging = plan_merging(partition, matches, 3000)
    assert calls == [True, True]
    for module in (partitioning, reference):
        monkeypatch.setattr(module, "has_kernels", lambda *args: False)
    assert all(map(torch.equal, random_partition(67, 130, 4, 4, key), partition))
    expected = plan_merging(partition, matches, 3000)
    for name in ("members", "size", "position"):
        assert torch.equal(getattr(merging, name), getattr(expected, name))


def reduce_and_restore(x, partition):
    matches = match_tokens(x, partition)
    merging = plan_merging(partition, matches, 1500)
    merged = merge_tokens(x, merging)
    return merged, unmerge_tokens(merged, merging)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", HALF)
@torch.no_grad()
def test_compiled_code_is_torchs(dtype, monkeypatch):
    """What its compiler makes of it is faster."""
    x, partition = tokens_of(2, 4096, 320, dtype), make_partition(64, 64, 2)
    got = torch.compile(reduce_and_restore, backend="eager", fullgraph=True)(x, partition)
    monkeypatch.setattr(reference, "has_kernels", lambda *args: False)
    assert all(map(torch.equal, got, reduce_and_restore(x, partition)))


@pytest.mark.cuda
@torch.no_grad()
def test_planning_and_merging_very_many_tokens_is_torchs(calls):
    x, partition = tokens_of(1, 36864, 16, torch.float16), make_partition(192, 192, 1)
    merged, _ = reduce_and_restore(x, partition)
    assert merged.shape[1] == 36864 - 1500
    assert calls == [True, True, True]  # the match, the merge of few, unmerging


@pytest.mark.cuda
@torch.no_grad()
def test_in_a_cuda_graph():
    x, partition = tokens_of(2, 4096, 320, torch.float16), make_partition(64, 64, 2)
    expected = reduce_and_restore(x, partition)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = reduce_and_restore(x, partition)
    for result in results:
        result.zero_()
    graph.replay()
    assert all(torch.equal(got, wanted) for got, wanted in zip(results, expected, strict=True))


@pytest.mark.cuda
def test_derivatives_are_torchs(calls):
    """Backward, forward, and for each sample."""
    x, partition = tokens_of(2, 63, 16, torch.float16), make_partition(7, 9, 2)
    merging = plan_merging(partition, match_tokens(x, partition), 20)
    calls.clear()

    def reduced(x):
        return unmerge_tokens(merge_tokens(x, merging), merging)

    leaf = x.clone().requires_grad_()
    reduced(leaf).float().sum().backward()
    backward = torch.func.grad(lambda x: reduced(x).float().sum())(x)
    forward = torch.func.jvp(reduced, (x,), (x,))[1]
    mapped = torch.func.vmap(reduced)(x.expand(3, -1, -1, -1))
    assert calls == [False] * 8
    assert torch.equal(leaf.grad, backward)
    torch.testing.assert_close(forward, reduced(x), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(mapped[2], reduced(x), atol=1e-3, rtol=1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_torchs(dtype, calls):
    x, partition = tokens_of(2, 63, 16, dtype), make_partition(7, 9, 2)
    matches = match_tokens(x, partition)
    merging = plan_merging(partition, matches, 20)
    unmerge_tokens(merge_tokens(x, merging), merging)
    # Planning is for any scores of float32.
    assert calls == [False, dtype == torch.float32, False, False]


def test_a_cpu_has_no_kernels():
    x, partition = torch.randn(2, 63, 16).half(), make_partition(7, 9, 2, device=torch.device("cpu"))
    assert not reference.has_kernels(x)
    assert isinstance(match_tokens(x, partition), Matches)
