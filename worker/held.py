"""How many bytes of tensors are held at once, at the most: counted where PyTorch does not count them itself."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """Bytes of all tensors that were seen and still are; tensors that share their memory count once."""

    held: int = 0
    most: int = 0
    _sizes: dict[int, int] = field(default_factory=dict)

    def see(self, tensor: Any) -> None:
        """Count a tensor's memory until it is freed."""
        storage = tensor.untyped_storage()
        name, size = storage._cdata, storage.nbytes()
        if name in self._sizes:
            return
        self._sizes[name] = size
        self.held += size
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._gone, name).atexit = False

    def _gone(self, name: int) -> None:
        self.held -= self._sizes.pop(name, 0)


@contextlib.contextmanager
def counting() -> Iterator[Tally]:
    """Inside the block every tensor that an operation reads or makes is counted, on any device; slows it down."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    tally = Tally()

    class Counting(TorchDispatchMode):  # type: ignore[misc]  # torch has no types for it
        def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = operation(*args, **(kwargs or {}))
            for found in tree_iter((args, kwargs or {}, made)):
                if isinstance(found, torch.Tensor):
                    tally.see(found)
            return made

    with Counting():
        yield tally
