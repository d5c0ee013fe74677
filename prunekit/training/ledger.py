"""Bytes of the tensors that a computation makes and keeps, found by going through it without its numbers.

Floating point tensors are torch's fake ones: shapes and types, no data. What is whole numbers (token ids, the grids of
images, masks) is computed for real, because models choose shapes by it. So a step of a model of 8 billion parameters is
gone through in seconds and megabytes, operation by operation as torch would run it on a CPU.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GROUPED = (torch.ops.aten._grouped_mm.default,)  # experts' product, whose shapes torch knows in bfloat16 alone
LARGEST_REAL = 2**26  # elements of a tensor of whole numbers that is made for real


class Ledger(TorchDispatchMode):
    """While it is entered, within `fake`, each new storage is on its account until the last tensor lets go of it.

    `vocabulary`: what is as wide as that is counted as logits, all else as activations, until `move` says otherwise.
    `live` has the bytes of each part now, `peak` those at the moment when all of them together were the most.
    """

    def __init__(self, fake: FakeTensorMode, vocabulary: int = 0):
        super().__init__()
        self.fake, self.vocabulary = fake, vocabulary
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._total = self._most = 0
        self._known: dict[int, tuple[weakref.ref, int, list[str]]] = {}

    def add(self, part: str, size: int) -> None:
        """Put bytes that are no tensor's on the account, or take them off it."""
        self.live[part] += size
        self._total += size
        if self._total > self._most:
            self._most, self.peak = self._total, self.live.copy()

    def move(self, tensor: Tensor, part: str) -> None:
        """Count a tensor as another part of the account."""
        self._watch(tensor)
        _, size, where = self._known[id(tensor.untyped_storage())]
        self.live[where[0]] -= size
        self.live[part] += size
        where[0] = part

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Never count these, nor views of them: they were there before."""
        for tensor in tensors:
            self._watch(tensor, 0)

    def _watch(self, tensor: Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        if (key := id(storage)) in self._known:
            return
        where = ["logits" if tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary else "activations"]
        size = storage.nbytes() if size is None else size

        def gone(_: Any) -> None:
            del self._known[key]
            self.add(where[0], -size)

        self._known[key] = weakref.ref(storage, gone), size, where
        self.add(where[0], size)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if given and not any(isinstance(tensor, FakeTensor) for tensor in given):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        else:
            if func is torch.ops.aten.index.Tensor:  # how many a mask chooses no fake tensor could say
                args = (args[0], list(_numbered(args[1])), *args[2:])
            faked = tree_map_only(Tensor, self._fake, (args, kwargs))
            out = _grouped(func, *faked[0], **faked[1]) if func in GROUPED else func(*faked[0], **faked[1])
            if not given and isinstance(out, Tensor) and not out.is_floating_point() and out.numel() <= LARGEST_REAL:
                with unset_fake_temporarily():
                    out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor)
        return out

    def _fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)


def _numbered(indices: Iterable[Tensor | None]) -> Iterable[Tensor | None]:
    """Indices with numbers in the place of real masks."""
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            with unset_fake_temporarily():
                yield from index.nonzero(as_tuple=True)
        else:
            yield index


def _grouped(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The product in the type of its operands."""
    halved = [arg.bfloat16() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
    return func(*halved, **kwargs).to(args[0].dtype)
