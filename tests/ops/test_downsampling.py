"""Down-sampling against its definition, cell by cell."""

import pytest
import torch

from agentsd.ops.downsampling import downsample_tokens


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 3), (2, 1)])
@pytest.mark.parametrize("factor", [2, 3])
def test_one_token_a_cell(size, factor):
    height, width = size
    x = torch.randn(2, height * width, 3, dtype=torch.float64)
    cells = [
        [row * width + column for row in range(top, min(top + factor, height)) for column in range(left, right)]
        for top in range(0, height, factor)
        for left in range(0, width, factor)
        for right in [min(left + factor, width)]
    ]
    mean = torch.stack([x[:, cell].mean(1) for cell in cells], dim=1)
    first = torch.stack([x[:, cell[0]] for cell in cells], dim=1)
    torch.testing.assert_close(downsample_tokens(x, size, factor, "mean"), mean)
    assert torch.equal(downsample_tokens(x, size, factor, "nearest"), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", ["mean", "nearest"])
def test_dtypes_and_gradients(dtype, mode):
    x = torch.randn(1, 16, 4, dtype=dtype, requires_grad=True)
    out = downsample_tokens(x, (4, 4), 2, mode)
    assert out.dtype == dtype
    out.sum().backward()
    assert float(x.grad.sum()) == pytest.approx(out.numel())
