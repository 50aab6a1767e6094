"""What stands for what is skipped."""

import torch

from agentsd.runtime.stand_ins import TensorShape, shapes_of, stand_ins


def test_shapes_of_what_modules_return():
    tensor = torch.zeros(2, 3, dtype=torch.float16)
    shape = TensorShape(torch.Size([2, 3]), torch.float16, torch.device("cpu"))
    assert shapes_of(tensor) == shape
    assert shapes_of((tensor, (tensor, None))) == (shape, (shape, None))


def test_what_stands_for_them_is_alike_and_shares_its_memory():
    outputs = [torch.ones(2, 3), (torch.ones(4), (torch.ones(1, 3, dtype=torch.float16), None))]
    shapes, pool = dict(enumerate(map(shapes_of, outputs))), {}
    made = stand_ins(shapes, pool)
    assert dict(enumerate(shapes_of(made[number]) for number in made)) == shapes
    assert made[0].data_ptr() == made[1][0].data_ptr()
    assert sorted(memory.numel() for memory in pool.values()) == [3, 6]
