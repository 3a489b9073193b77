"""References to tensors that wait for the writer thread, protected by copy on write.

A hook must not copy what it captures: that would double the memory traffic of a forward pass. It hands over a
reference, and a dispatch mode watches for operators that are about to write into memory that is still referenced
(`x += y`, `relu_`, `copy_`, ...). Just before such an operator runs, the waiting tensor is copied. What is stored is
therefore what the hook saw.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..store.dtypes import NUMPY_DTYPES, dtype_named
from ..store.errors import CaptureError, UnsupportedDtypeError

#: How many references are remembered to recognise a tensor that is captured again at once.
_RECENT = 8
#: Collectives overwrite their buffers although their schemas do not say so.
_COLLECTIVES = "c10d"
#: Arguments that batch normalisation overwrites in training although its schema does not say so.
_UNMARKED_WRITES = {"running_mean", "running_var"}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NATIVE = {torch.float32, torch.float64, torch.float16, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool}
_NATIVE |= {torch.uint8, torch.complex64, torch.complex128}


def check_storable(tensor: torch.Tensor) -> None:
    """Refuse, by name, a tensor that cannot be stored bit for bit.

    Raises:
        UnsupportedDtypeError: its dtype or layout has no place in a shard.
    """
    dtype_named(str(tensor.dtype).removeprefix("torch."))
    if tensor.layout is not torch.strided:
        raise UnsupportedDtypeError(f"layout {tensor.layout} cannot be stored; capture the dense tensor")


def is_storable(tensor: torch.Tensor) -> bool:
    """Whether `check_storable` accepts a tensor."""
    return str(tensor.dtype).removeprefix("torch.") in NUMPY_DTYPES and tensor.layout is torch.strided


def to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """C-contiguous numpy array with the bits of a CPU or device tensor; shares memory where it can.

    Raises:
        UnsupportedDtypeError: see `check_storable`.
    """
    check_storable(tensor)
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if plain.dtype in _NATIVE:
        array: npt.NDArray[Any] = plain.numpy()
        return array
    kind = NUMPY_DTYPES[str(plain.dtype).removeprefix("torch.")]
    if plain.numel() == 0:
        return np.empty(tuple(plain.shape), kind)
    bits: npt.NDArray[Any] = plain.view(_BITS[plain.element_size()]).numpy()
    return bits.view(kind)


class PendingTensor:
    """A tensor on its way to the shard. Used by one or more `put` calls; read once per use by the writer thread."""

    def __init__(self, tensor: torch.Tensor, guard: WriteGuard) -> None:
        """Describe a tensor; from the first `use` on, `guard` copies it if something is about to overwrite it."""
        self.nbytes = tensor.numel() * tensor.element_size()
        self.memo: Any = None
        self._tensor: torch.Tensor | None = None
        self._version = version_of(tensor)
        self._counted = tensor if self._version is None or tensor._base is None else tensor._base
        self._storage = storage_of(tensor)
        self._uses = 0
        self._lock = threading.Lock()
        self._guard = guard

    def use(self, tensor: torch.Tensor) -> PendingTensor:
        """Announce one more `put` of the same, unchanged tensor; given is an alias that nobody else holds."""
        with self._lock:
            if self._tensor is None:
                self._tensor = tensor
            self._uses += 1
            if self._uses == 1:
                self._guard.watch(self._storage, self)
        return self

    @contextmanager
    def values(self) -> Iterator[npt.NDArray[Any]]:
        """The values as they were when the tensor was referenced; writers are held off meanwhile.

        Raises:
            CaptureError: something outside torch's dispatcher has overwritten them.
        """
        with self._lock:
            tensor = self._tensor
            if tensor is None:
                raise CaptureError("a captured tensor was read after it had been released")
            try:
                self._check_unchanged(tensor)
                yield to_numpy(tensor)
                self._check_unchanged(tensor)
            finally:
                self._uses -= 1
                if self._uses == 0:
                    self._tensor = None
                    self._guard.unwatch(self._storage, self)

    def _check_unchanged(self, tensor: torch.Tensor) -> None:
        # A tensor that was given other memory (`cache.data = updated`) goes on counting for its former views.
        if version_of(tensor) != self._version and storage_of(self._counted) == self._storage:
            raise CaptureError(
                "a captured tensor was overwritten behind torch's dispatcher before it was stored; "
                "exclude the module that does so, or clone what it returns"
            )

    def snapshot(self) -> None:
        """Copy the values now: their memory is about to be overwritten."""
        with self._lock:
            if self._tensor is not None and self._uses > 0:
                self._tensor = self._tensor.detach().clone(memory_format=torch.contiguous_format)
                self._version = version_of(self._tensor)


class WriteGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that snapshots waiting tensors before an operator writes into their memory."""

    def __init__(self) -> None:
        """Nothing is watched at first."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched: dict[int, set[PendingTensor]] = {}
        self._lock = threading.Lock()
        self._written: dict[Any, tuple[tuple[int, str], ...]] = {}
        self._recent: OrderedDict[tuple[Any, ...], tuple[torch.Tensor, PendingTensor]] = OrderedDict()
        self.n_snapshots = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Do without torch's wrapper around the handler: it costs more than the handler, for every operator."""
        return False

    def reference(self, tensor: torch.Tensor) -> PendingTensor:
        """Reference a tensor for one `put`; the same unchanged view seen again shortly afterwards is one reference.

        A module often returns what its last child returned: recognising that by address costs nothing. Aliases of the
        last few tensors are kept, so that an address means the same memory; aliases, because `tensor.data = other`
        gives a tensor other memory.
        """
        version = version_of(tensor)
        if version is None or tensor.layout is not torch.strided:
            return PendingTensor(tensor, self).use(tensor.detach())
        lazy = (tensor.is_conj(), tensor.is_neg())
        identity = (tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, lazy)
        found = self._recent.get(identity)
        if found is None:
            found = self._recent[identity] = tensor.detach(), PendingTensor(tensor, self)
            if len(self._recent) > _RECENT:
                self._recent.popitem(last=False)
        return found[1].use(found[0])

    def forget(self) -> None:
        """Let go of the tensors kept alive to recognise repeated views."""
        self._recent.clear()

    def watch(self, storage: int, pending: PendingTensor) -> None:
        """Protect a waiting tensor."""
        with self._lock:
            self._watched.setdefault(storage, set()).add(pending)

    def unwatch(self, storage: int, pending: PendingTensor) -> None:
        """Stop protecting it."""
        with self._lock:
            waiting = self._watched.get(storage)
            if waiting is not None:
                waiting.discard(pending)
                if not waiting:
                    del self._watched[storage]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator, first copying what it would overwrite."""
        written = self._written.get(func)
        if written is None:
            written = self._written[func] = _written_arguments(func)
        if written:
            self._before_write(written, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _before_write(
        self, written: tuple[tuple[int, str], ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        for index, name in written:
            value = args[index] if index < len(args) else kwargs.get(name)
            for tensor in _tensors_in(value):
                self._snapshot_views_of(storage_of(tensor))

    def _snapshot_views_of(self, storage: int) -> None:
        for identity in [key for key, (tensor, _) in self._recent.items() if storage_of(tensor) == storage]:
            del self._recent[identity]
        with self._lock:
            waiting = self._watched.pop(storage, ())
        for pending in waiting:
            pending.snapshot()
            self.n_snapshots += 1


def version_of(tensor: torch.Tensor) -> int | None:
    """Version counter of a tensor's memory, None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version


def storage_of(tensor: torch.Tensor) -> int:
    """Address of the memory a tensor is a view of; 0 for layouts without one."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)


def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    arguments = func._schema.arguments
    if func.namespace == _COLLECTIVES:
        return tuple((index, argument.name) for index, argument in enumerate(arguments))
    return tuple(
        (index, argument.name)
        for index, argument in enumerate(arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write) or argument.name in _UNMARKED_WRITES
    )
