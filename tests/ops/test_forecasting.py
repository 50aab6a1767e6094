"""The forecast against its formula in double precision."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from agentsd.ops.forecasting import forecast


values = st.floats(-100, 100)


@given(values, values, st.floats(0, 8))
def test_it_goes_on_in_a_straight_line(older, newer, distance):
    got = forecast(torch.tensor([older], dtype=torch.float64), torch.tensor([newer], dtype=torch.float64), distance)
    expected = newer + (newer - older) * distance
    torch.testing.assert_close(got, torch.tensor([expected], dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_at_no_distance_it_is_the_later_value_in_a_tensor_of_its_own():
    older, newer = torch.randn(2, 3, 4)
    got = forecast(older, newer, 0.0)
    assert torch.equal(got, newer)
    assert got.data_ptr() != newer.data_ptr()


def test_it_keeps_half_precision():
    older, newer = torch.randn(2, 64, dtype=torch.bfloat16)
    got = forecast(older, newer, 1.0)
    assert got.dtype == torch.bfloat16
    expected = 2 * newer.double() - older.double()
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)
