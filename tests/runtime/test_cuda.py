"""What only a GPU can show. Run by name: `make test PYTEST_ARGS="-m cuda"`."""

import pytest
import torch
from models import tiny_sd, tiny_unet
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import agentsd
from agentsd.bench import BenchSettings, run_bench
from agentsd.ops.merging import match_tokens, merge_tokens, plan_merging
from agentsd.ops.partitioning import cell_grid, mix_key, partition_tokens, random_members
from agentsd.runtime.steps import TimestepReader


pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float16, 0.05), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("timestep", [900, 100])
def test_the_gpu_computes_what_the_cpu_computes(dtype, tolerance, timestep, monkeypatch):
    """Up to rounding: with TF32 convolutions other tokens would match."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    noise = torch.Generator().manual_seed(0)
    sample, text = torch.randn(3, 4, 17, 23, generator=noise), torch.randn(3, 77, 32, generator=noise)
    unet = agentsd.apply_patch(tiny_unet(), merge_mlp=True, merge_crossattn=True)
    with torch.no_grad():
        expected = unet(sample, timestep, text).sample
        unet.to("cuda", dtype)
        got = unet(sample.to("cuda", dtype), torch.tensor(timestep, device="cuda"), text.to("cuda", dtype)).sample
    assert got.dtype == dtype
    assert (got.cpu().float() - expected).norm() / expected.norm() < tolerance


def test_the_partition_is_the_same_on_every_device():
    key = mix_key(torch.arange(64), seed=3)
    assert torch.equal(random_members(4096, 16, key), random_members(4096, 16, key.cuda()).cpu())


def test_merging_is_the_same_every_time():
    """Sums over merged tokens must not depend on the order in which threads come."""
    tokens = torch.randn(2, 16384, 320, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    partition = partition_tokens(*cell_grid(128, 128, 2, 2, tokens.device))
    merging = plan_merging(partition, match_tokens(tokens, partition), 8192)
    first = merge_tokens(tokens, merging)
    assert first.isfinite().all()
    assert all(torch.equal(first, merge_tokens(tokens, merging)) for _ in range(20))


def test_the_same_seed_gives_the_same_image():
    """Sums over merged tokens must not depend on the order in which threads come."""
    pipe = agentsd.apply_patch(tiny_sd().to("cuda", torch.float16))
    images = [
        pipe("a", num_inference_steps=5, output_type="pt", generator=torch.Generator().manual_seed(0)).images
        for _ in range(3)
    ]
    assert images[0].isfinite().all()
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


def test_a_generation_copies_from_the_device_at_most_once_more_than_without_agentsd():
    pipe = tiny_sd().to("cuda", torch.float16)

    def copies() -> int:
        pipe("a", num_inference_steps=2, output_type="latent")
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            pipe("a", num_inference_steps=20, output_type="latent")
        return sum("DtoH" in event.name for event in record.events())

    plain = copies()
    assert plain >= 20, "the scheduler reads its table in each step, or nothing was recorded"
    agentsd.apply_patch(pipe)
    assert copies() <= plain + 1


@pytest.mark.parametrize("options", [{}, {"preset": "balanced", "min_tokens": 0}, {"match_interval": 2}], ids=str)
def test_cuda_graphs_give_what_other_compiled_code_gives(options):
    """Recorded and run again, also with what is kept from step to step."""

    def draw(**settings):
        pipe = agentsd.apply_patch(tiny_sd().to("cuda"), **options)
        pipe.unet = torch.compile(pipe.unet, **settings)
        pipe("a", num_inference_steps=12, output_type="pt")
        return pipe("a", num_inference_steps=12, output_type="pt", generator=torch.Generator().manual_seed(0)).images

    torch.compiler.reset()
    expected = draw()
    counters.clear()
    torch.testing.assert_close(draw(mode="reduce-overhead"), expected, rtol=1e-3, atol=1e-3)
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch.compiler.reset()


def test_a_timestep_with_a_batch_dimension_is_no_reason_to_read_again():
    reader, timesteps = TimestepReader(), torch.arange(0, 1000, 50, device="cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        values = [reader.read(timestep.unsqueeze(0)) for timestep in timesteps]
    assert values == [[float(value)] for value in range(0, 1000, 50)]
    assert sum("DtoH" in event.name for event in record.events()) == 1


def test_the_benchmark_counts_memory_and_launches(tmp_path):
    tiny_sd().save_pretrained(tmp_path / "tiny")
    settings = BenchSettings(
        models=(str(tmp_path / "tiny"),), methods=("baseline", "agentsd"), sizes=((128, 128),), steps=2, repeats=1
    )
    baseline, patched = run_bench(settings).rows
    assert 0 < baseline.peak_bytes < 2**30
    assert 0 < baseline.launches < patched.launches
