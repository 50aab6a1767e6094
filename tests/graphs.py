"""What `torch.compile` captures: how many graphs, and whether anything keeps what they return for too long."""

import torch
from torch._inductor.cudagraph_trees import CUDAGraphTreeManager


class Graphs:
    """A backend that runs what was captured as it is, and counts the graphs."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


class OverwritingGraphs(Graphs):
    """
    Its graphs do to their outputs what CUDA graphs (`mode="reduce-overhead"`) do: the next call of any of them may
    write into what they returned. A call is one of the compiled function, or all of them up to
    `torch.compiler.cudagraph_mark_step_begin()` for whoever calls that.
    """

    def __init__(self):
        super().__init__()
        self.call = None
        self.outputs = []

    def __call__(self, graph, inputs):
        forward = super().__call__(graph, inputs)

        def run(*args):
            call = CUDAGraphTreeManager.get_curr_generation()
            if call != self.call:
                for output in self.outputs:
                    output.fill_(torch.nan if output.is_floating_point() else torch.iinfo(output.dtype).min)
                self.call, self.outputs = call, []
            # Not an input, which some graphs give back.
            outputs = [output.clone() for output in forward(*args)]
            self.outputs += outputs
            return outputs

        return run
