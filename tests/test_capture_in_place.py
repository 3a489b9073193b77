"""What is stored is what the hook saw, whatever happens to the memory before it reaches the disk.

`gate` keeps the writer thread from storing anything until the memory has been overwritten.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorsleuth.capture.recorder import record
from tensorsleuth.capture.selection import Selection
from tensorsleuth.store import CaptureError, Trace

Overwrite = Callable[[torch.Tensor], object]

OVERWRITES: dict[str, Overwrite] = {
    "x += 1": lambda x: x.__iadd__(1),
    "mul_": lambda x: x.mul_(3),
    "relu_": lambda x: x.relu_(),
    "functional relu": lambda x: torch.nn.functional.relu(x, inplace=True),
    "functional dropout": lambda x: torch.nn.functional.dropout(x, 0.5, training=True, inplace=True),
    "copy_": lambda x: x.copy_(torch.zeros_like(x)),
    "zero_": lambda x: x.zero_(),
    "fill_ on detach()": lambda x: x.detach().fill_(7),
    ".data": lambda x: x.data.mul_(2),
    "out=": lambda x: torch.add(x, 1, out=x),
    "out= of a reduction": lambda x: torch.sum(x, 0, out=x[0]),
    "index_put_": lambda x: x.index_put_((torch.tensor([0]),), torch.tensor(9.0)),
    "x[0] = 5": lambda x: x.__setitem__(0, 5.0),
    "x[mask] = 0": lambda x: x.__setitem__(x > -100, 0.0),
    "masked_fill_": lambda x: x.masked_fill_(x > -100, 1.0),
    "scatter_": lambda x: x.scatter_(0, torch.zeros(1, 4, dtype=torch.int64), 4.0),
    "a flat view": lambda x: x.view(-1)[1:3].zero_(),
    "a transposed view": lambda x: x.t().copy_(torch.ones(4, 3)),
    "a view of another dtype": lambda x: x.view(torch.int32).zero_(),
    "a chain of views": lambda x: x[1:].unbind(0)[0].unsqueeze(0).expand(1, 4).add_(1),
    "foreach": lambda x: torch._foreach_add_([x], 1),
    "random": lambda x: x.uniform_(),
    "two writes": lambda x: x.add_(1).add_(1),
    "swap through a view": lambda x: x.narrow(0, 0, 1).copy_(x.narrow(0, 2, 1)),
    "other memory": lambda x: setattr(x, "data", torch.zeros_like(x)),
    "other memory, then a write": lambda x: [setattr(x, "data", torch.zeros_like(x)), x.add_(1)],
    "baddbmm_": lambda x: x.unsqueeze(0).baddbmm_(torch.ones(1, 3, 2), torch.ones(1, 2, 4)),
}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


class Shift(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.5


class Overwriting(torch.nn.Module):
    """Overwrites what its child returned, after the child's hook has seen it."""

    def __init__(self, overwrite: Overwrite) -> None:
        super().__init__()
        self.child = Shift()
        self.overwrite = overwrite

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.child(x)
        self.overwrite(y)
        return y * 1


class Cache(torch.nn.Module):
    """Passes on a view of a cache that afterwards gets other memory, as NxD Inference's caches do on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.read = torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.read(self.cache[1:])
        self.cache.data = self.cache.detach() + x
        self.cache.add_(1)
        return self.cache * 1


def test_a_view_of_a_cache_that_gets_other_memory_is_stored_as_it_was(
    trace: Trace, read: Any, gate: threading.Event
) -> None:
    model = Cache()
    with torch.no_grad(), record(trace, model, run="run", role="target", selection=Selection(include=("read",))):
        model(torch.ones(3))
        model(torch.ones(3))
        gate.set()
    stored = [item.values for item in read(trace, "module = 'read'")]
    np.testing.assert_array_equal(stored, [[[3, 4, 5]], [[5, 6, 7]]])


@pytest.mark.parametrize("mode", MODES)
def test_outputs_overwritten_later_are_stored_as_they_were(
    trace: Trace, read: Any, gate: threading.Event, mode: str
) -> None:
    model = torch.nn.ModuleDict({f"{n}": Overwriting(overwrite) for n, overwrite in enumerate(OVERWRITES.values())})
    x = torch.linspace(-2, 2, 12).reshape(3, 4)
    with MODES[mode](), record(trace, model, run="run", role="reference"):
        for module in model.values():
            module(x)
        gate.set()
    for number, name in enumerate(OVERWRITES):
        (stored,) = read(trace, f"module = '{number}.child'")
        np.testing.assert_array_equal(stored.values, (x + 0.5).numpy(), err_msg=name)
    copied = [name for name in OVERWRITES if not name.startswith("other memory")]  # which leaves the former as it is
    assert trace.manifest("run").provenance["snapshots"] == len(copied)


def test_an_input_overwritten_by_the_module_is_stored_as_it_was(trace: Trace, read: Any, gate: threading.Event) -> None:
    model = torch.nn.Sequential(torch.nn.ReLU(inplace=True), torch.nn.Hardtanh(-0.5, 0.5, inplace=True))
    x = torch.linspace(-2, 2, 9)
    before = x.clone()
    with torch.no_grad(), record(trace, model, run="run", role="reference", selection=Selection(inputs=True)):
        model(x)
        gate.set()
    first, second, root = (read(trace, f"port = 'input' AND module = '{path}'")[0].values for path in ("0", "1", ""))
    np.testing.assert_array_equal(first, before)
    np.testing.assert_array_equal(root, before)
    np.testing.assert_array_equal(second, before.relu())
    np.testing.assert_array_equal(read(trace, "port = 'output' AND module = '0'")[0].values, before.relu())


def test_a_tensor_passed_on_twice_with_a_write_in_between_is_stored_in_both_states(
    trace: Trace, read: Any, gate: threading.Event
) -> None:
    class Residual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x * 2
            h = self.first(h)
            h += 1
            h = self.second(h)
            h += 1
            return self.third(h)

    model = Residual()
    with torch.no_grad(), record(trace, model, run="run", role="reference"):
        model(torch.ones(3))
        gate.set()
    assert [float(tensor.values[0]) for tensor in read(trace, "module != ''")] == [2, 3, 4]


def test_parameters_are_stored_as_they_were_before_training(trace: Trace, read: Any, gate: threading.Event) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with record(trace, model, run="run", role="reference"):
        for _ in range(2):
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
        gate.set()
    for name, tensor in before.items():
        module, _, slot = name.rpartition(".")
        (stored,) = read(trace, f"phase = 'static' AND module = '{module}' AND slot = '{slot}'")
        np.testing.assert_array_equal(stored.values, tensor.numpy(), err_msg=name)


def test_tensors_freed_and_reallocated_at_the_same_address_keep_their_values(trace: Trace, read: Any) -> None:
    class Burst(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaf = torch.nn.Identity()

        def forward(self, n: int) -> None:
            for index in range(n):
                self.leaf(torch.full((1000,), float(index)))

    model = Burst()
    with torch.no_grad(), record(trace, model, run="run", role="reference", queue_bytes=8000):
        model(500)
    for index, tensor in enumerate(read(trace, "module = 'leaf'")):
        np.testing.assert_array_equal(tensor.values, np.full(1000, index, np.float32))
    assert index == 499


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["emit", "view", "write", "write view", "free"]), st.integers(0, 2)), max_size=30
    )
)
def test_any_sequence_of_writes_views_and_captures(
    tmp_path_factory: pytest.TempPathFactory, read: Any, steps: list[tuple[str, int]]
) -> None:
    expected: list[np.ndarray[Any, Any]] = []

    class Program(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaf = torch.nn.Identity()

        def forward(self) -> None:
            slots = [torch.full((2, 3), float(i)) for i in range(3)]
            for number, (what, i) in enumerate(steps):
                if what == "write":
                    slots[i].add_(number + 1)
                elif what == "write view":
                    slots[i][1].mul_(-2)
                elif what == "free":
                    slots[i] = torch.full((2, 3), float(number))
                else:
                    shown = slots[i] if what == "emit" else slots[i].t()
                    expected.append(shown.numpy().copy())
                    self.leaf(shown)

    trace = Trace.create(tmp_path_factory.mktemp("trace"))
    model = Program()
    with torch.no_grad(), record(trace, model, run="run", role="reference"):
        model()
    stored = read(trace, "module = 'leaf'")
    assert len(stored) == len(expected)
    for found, wanted in zip(stored, expected, strict=True):
        np.testing.assert_array_equal(found.values, wanted)


def test_a_write_behind_the_dispatcher_that_bumps_the_version_is_an_error(
    trace: Trace, read: Any, gate: threading.Event
) -> None:
    model = Shift()
    with (  # noqa: PT012
        pytest.raises(CaptureError, match=r"^\(root\): .* overwritten behind torch's dispatcher"),
        torch.no_grad(),
        record(trace, model, run="run", role="reference"),
    ):
        y = model(torch.ones(3))
        torch._C._autograd._unsafe_set_version_counter((y,), (y._version + 1,))
        gate.set()


def test_snapshots_are_taken_only_of_what_waits(trace: Trace) -> None:
    model = Overwriting(lambda y: y.add_(1))
    with torch.no_grad(), record(trace, model, run="run", role="reference") as recorder:
        y = model(torch.ones(3))
        recorder.flush()
        y.add_(1)
    assert trace.manifest("run").provenance["snapshots"] <= 1
