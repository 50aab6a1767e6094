"""What feature reuse keeps, and where: offloading, compilation, copies, memory, resets, threads; and bad input."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers.hooks import HookRegistry, ModelHook
from graphs import Graphs
from models import tiny_sd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import agentsd

from .reuse_runs import STEPS, assert_forwards_are_their_own, check, deep, run_of
from .support import assert_differs, fingerprint, generate, predict
from .test_offload import group_offload_leaves


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """float16 and bfloat16."""
    pipe = tiny_sd().to(dtype)
    check(pipe, run_of(pipe))


@pytest.mark.parametrize("way", ["model", "sequential", "group", "casting"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_offload_and_casting(way, order):
    """Model, sequential and group offload and layerwise casting, before and after patching."""
    expected = run_of(agentsd.apply_patch(tiny_sd(), ratio=0, reuse=2))()
    pipe = tiny_sd()
    if order == "after":
        agentsd.apply_patch(pipe, ratio=0, reuse=2)
    cpu = torch.device("cpu")
    if way == "group":
        group_offload_leaves(pipe.unet)
    elif way == "casting":
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    else:
        from accelerate import cpu_offload, cpu_offload_with_hook

        {"sequential": cpu_offload, "model": cpu_offload_with_hook}[way](pipe.unet, execution_device=cpu)
    if order == "before":
        agentsd.apply_patch(pipe, ratio=0, reuse=2)
    calls = deep(pipe)
    tolerance = 2e-2 if way == "casting" else 1e-5
    torch.testing.assert_close(run_of(pipe)(), expected, rtol=tolerance, atol=tolerance)
    assert calls.take() == STEPS // 2


def test_removed_below_an_offload_that_came_later():
    """Sequential offloading wraps what the patch put there: it keeps on working, plain, and nothing is kept."""
    from accelerate import cpu_offload

    expected = run_of(tiny_sd())()
    pipe = agentsd.apply_patch(tiny_sd(), ratio=0, reuse=2)
    reuse = pipe.unet.agentsd_patch.reuse[1]
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    run_of(pipe)()
    agentsd.remove_patch(pipe)
    torch.testing.assert_close(run_of(pipe)(), expected)
    assert reuse.state.slots == {}
    assert reuse.calls.get().kept is None


@pytest.mark.parametrize("way", ["whole", "regional"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_compiled(way, order):
    """`torch.compile`, whole and by block: one graph for full steps and one for the others; none at later steps."""
    torch.compiler.reset()
    expected = run_of(agentsd.apply_patch(tiny_sd(), ratio=0, reuse=2), num_inference_steps=12)()
    pipe, graphs = tiny_sd(), Graphs()
    if order == "after":
        agentsd.apply_patch(pipe, ratio=0, reuse=2)
    if way == "whole":
        pipe.unet = torch.compile(pipe.unet, backend=graphs, fullgraph=True)
    else:
        pipe.unet.compile_repeated_blocks(backend=graphs, fullgraph=True)
    if order == "before":
        agentsd.apply_patch(pipe, ratio=0, reuse=2)
    run = run_of(pipe, num_inference_steps=12)
    torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-3)
    captured = graphs.count
    assert way == "regional" or captured == 2
    torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-3)
    assert graphs.count == captured
    torch.compiler.reset()


def test_copies():
    """deepcopy, pickle and `from_pipe`: a copy reuses by itself, with its own modules."""
    pipe = agentsd.apply_patch(tiny_sd(), reuse=2)
    expected = run_of(pipe)()
    for unet in (copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):
        other = tiny_sd()
        other.unet = unet
        assert torch.equal(run_of(other)(), expected)
        agentsd.remove_patch(other)
        assert_forwards_are_their_own(other.unet)
        assert torch.equal(run_of(other)(), run_of(tiny_sd())())
    assert torch.equal(run_of(pipe)(), expected)
    assert torch.equal(run_of(type(pipe).from_pipe(pipe))(), expected)


def test_removing_keeps_nothing_in_memory():
    """Off is off."""
    pipe = agentsd.apply_patch(tiny_sd(), ratio=0, reuse=2)
    run_of(pipe)()
    history = pipe.unet.agentsd_patch.reuse[1].state.slots[0].history
    kept = [weakref.ref(value) for _, value in history]
    assert len(kept) == 2
    del history
    agentsd.remove_patch(pipe)
    gc.collect()
    assert all(reference() is None for reference in kept)


class PeakMemory(TorchDispatchMode):
    """The most memory that tensors made while it is on took at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return output

    def _note(self, storage):
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.known and size > 0:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self.known.discard(key)
        self.now -= size


def peak_of(pipe) -> int:
    run = run_of(pipe)
    gc.collect()
    with PeakMemory() as memory:
        run()
    return memory.most


@pytest.mark.parametrize("interval", [2, 3])
def test_memory(interval):
    """At most three tensors more of the size of the one that is forecast, and some numbers."""
    plain = peak_of(tiny_sd())
    reuse = peak_of(agentsd.apply_patch(tiny_sd(), ratio=0, reuse=interval))
    forecast = 4 * 2 * 32 * 16 * 16  # float32, both halves of guidance
    assert plain > 8 * forecast
    assert forecast < reuse - plain <= 3 * forecast + 256


def full_steps(unet, reset) -> list[int]:
    """Which of six steps run everything, with a reset before the fourth."""
    steps = []
    timesteps = torch.arange(999, 0, -50)
    with torch.no_grad():
        for number, timestep in enumerate(timesteps[:6]):
            if number == 3:
                reset()
            handle = unet.mid_block.resnets[0].register_forward_hook(lambda *_, step=number: steps.append(step))
            predict(unet, timestep)
            handle.remove()
    return steps


def test_diffusers_resets_what_is_kept():
    """In the middle of a run, the next step is full; in a copy, a reset is the copy's own."""
    unet = agentsd.apply_patch(tiny_sd(), ratio=0, reuse=2).unet
    for each in (unet, copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert full_steps(each, each._diffusers_hook.reset_stateful_hooks) == [0, 2, 3, 5]


def test_a_reset_is_the_threads_own():
    """Another thread's run goes on as if nothing was."""
    unet = agentsd.apply_patch(tiny_sd(), ratio=0, reuse=2).unet

    def reset():
        thread = threading.Thread(target=unet._diffusers_hook.reset_stateful_hooks)
        thread.start()
        thread.join()

    assert full_steps(unet, reset) == [0, 2, 4]


def test_the_listener_leaves_nothing_behind():
    """Nor does it come in the way of hooks of diffusers that were put in before it or after it."""
    pipe = tiny_sd()
    before = fingerprint(pipe.unet)
    agentsd.apply_patch(pipe, reuse=2)
    agentsd.apply_patch(pipe, reuse=3)
    assert not hasattr(agentsd.remove_patch(pipe).unet, "_diffusers_hook")
    assert fingerprint(pipe.unet) == before
    for ours_first in (True, False):
        calls = []
        hook = ModelHook()
        hook.pre_forward = lambda module, *args, calls=calls, **kwargs: (calls.append(1), (args, kwargs))[1]
        if ours_first:
            agentsd.apply_patch(pipe, reuse=2)
        registry = HookRegistry.check_if_exists_or_initialize(pipe.unet)
        registry.register_hook(hook, "counting")
        if not ours_first:
            agentsd.apply_patch(pipe, reuse=2)
        with torch.no_grad():
            predict(pipe.unet, 500)
            registry.remove_hook("counting")
            predict(pipe.unet, 500)
        assert len(calls) == 1
        agentsd.remove_patch(pipe)
        assert not hasattr(pipe.unet, "_diffusers_hook") or not pipe.unet._diffusers_hook.hooks


def test_threads_that_share_a_unet():
    """The maintainers' recipe for servers: pipelines made by `from_pipe`, each in a thread of its own."""
    pipe = agentsd.apply_patch(tiny_sd(), ratio=0, reuse=2)
    seeds = range(3)
    one = lambda pipe, seed: generate(  # noqa: E731
        pipe, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(seed)
    )
    expected = [one(pipe, seed) for seed in seeds]
    results = {}

    def work(seed):
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        # With one tokenizer for all, a prompt now and then gets the padding of another call, also without agentsd.
        own = type(pipe).from_pipe(pipe, scheduler=scheduler, tokenizer=copy.deepcopy(pipe.tokenizer))
        results[seed] = one(own, seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], expected[seed]) for seed in seeds)


@pytest.mark.parametrize(
    "reuse, error, words",
    [
        (0, ValueError, "interval"),
        (-2, ValueError, "interval"),
        (1.5, TypeError, "reuse"),
        (True, TypeError, "reuse"),
        ("2", TypeError, "reuse"),
        ({"interval": 2, "order": 2}, ValueError, "order"),
        ({"every": 2}, TypeError, "'every'.*interval, order, branch"),
        ({"branch": -1}, ValueError, "branch"),
        ({"branch": 99}, ValueError, "branch.*below 6"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(reuse, error, words):
    pipe = tiny_sd()
    with pytest.raises(error, match=words):
        agentsd.apply_patch(pipe, reuse=reuse)
    assert not agentsd.is_patched(pipe)
    assert_forwards_are_their_own(pipe.unet)


def test_other_caches_in_the_same_role_are_refused():
    """The DeepCache package, enabled, skips the same modules on its own schedule."""
    pipe = tiny_sd()
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    with pytest.raises(ValueError, match="DeepCache"):
        agentsd.apply_patch(pipe, reuse=2)
    assert not agentsd.is_patched(pipe)
    helper.disable()
    agentsd.apply_patch(pipe, reuse=2)


def test_presets_and_keywords():
    """A preset's name, with keywords that override it."""
    pipe = tiny_sd()
    calls = deep(pipe)
    before = run_of(pipe, num_inference_steps=12)()
    for options, full in (
        ({"preset": "balanced"}, 6),
        ({"preset": "fast"}, 4),
        ({"preset": "balanced", "reuse": 4}, 3),
        ({"preset": "balanced", "reuse": None, "min_tokens": 0}, 12),
    ):
        calls.take()
        agentsd.apply_patch(pipe, **options)
        assert_differs(run_of(pipe, num_inference_steps=12)(), before)
        assert calls.take() == full
    # Layers of 256 and 64 tokens are left alone.
    agentsd.apply_patch(pipe, preset="balanced", reuse=None)
    assert torch.equal(run_of(pipe, num_inference_steps=12)(), before)
    rows = agentsd.report(pipe).rows
    assert {row.level for row in rows} == {0, 1}
    assert all("tokens, fewer than `min_tokens=2048`" in row.skipped for row in rows)
    with pytest.raises(ValueError, match="`config` or preset"):
        agentsd.apply_patch(pipe, preset="fast", config=agentsd.AgentSDConfig())
