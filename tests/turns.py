"""Threads that take turns at chosen places, so that their calls interleave in the same way every time."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel


class Turns:
    """
    Runs functions in threads of which one at a time goes on: at each `switch`, the next one.

    Other threads may call `switch`, too: nothing happens.
    """

    def __init__(self) -> None:
        self.switches = 0
        self._changed = threading.Condition()
        self._order: deque[int] = deque()

    def run(self, *works: Callable[[], Any]) -> list[Any]:
        """What the functions return, or the exceptions that they raise, in their order."""
        results: list[Any] = [None] * len(works)

        def work(number: int) -> None:
            with self._changed:
                self._wait()
            try:
                results[number] = works[number]()
            except Exception as error:
                results[number] = error
            finally:
                with self._changed:
                    self._order.remove(threading.get_ident())
                    self._changed.notify_all()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(works))]
        # None finds its turn before all are in the order.
        with self._changed:
            for thread in threads:
                thread.start()
            self._order.extend(thread.ident for thread in threads if thread.ident is not None)
        for thread in threads:
            thread.join()
        return results

    @torch.compiler.disable
    def switch(self, *_: Any) -> None:
        """Let the next thread go on, until it is this one's turn again."""
        with self._changed:
            if threading.get_ident() not in self._order:
                return
            self.switches += len(self._order) > 1
            self._order.rotate(-1)
            self._changed.notify_all()
            self._wait()

    def _wait(self) -> None:
        ident = threading.get_ident()
        assert self._changed.wait_for(lambda: self._order and self._order[0] == ident, timeout=60), "no turn"

    def at_layers_of(self, *models: torch.nn.Module) -> None:
        """Switch before and after each transformer, block, attention and feed-forward layer."""
        kinds = (Transformer2DModel, BasicTransformerBlock, Attention, FeedForward)
        for module in (module for model in models for module in model.modules() if isinstance(module, kinds)):
            module.register_forward_pre_hook(self.switch)
            module.register_forward_hook(self.switch)
