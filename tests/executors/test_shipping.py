"""What is sent to other processes comes out as it went in, large arrays as views of one file."""

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from forebear.data import Data
from forebear.errors import ForebearError
from forebear.executors import shipping
from forebear.task_file import importable, imported


def sent(value: Any) -> Any:
    with shipping.write(value, torch.get_num_threads()) as file:
        return shipping.mapped(file.fileno())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(40, 50),
        torch.randn(40, 50).T,
        torch.randn(100, 50)[7:90:3, 5:],
        torch.randn(2000).bfloat16(),
        torch.arange(3000) % 7 == 0,
        torch.randn(()),
        torch.empty(0, 4),
        torch.randn(3000, dtype=torch.complex64).conj(),
    ],
)
def test_tensors(tensor: torch.Tensor) -> None:
    found = sent({"t": tensor})["t"]
    assert (found.dtype, found.shape, found.stride()) == (
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
    )
    assert torch.equal(found, tensor)


def test_arrays_and_models() -> None:
    model = nn.Sequential(nn.Linear(60, 50), nn.BatchNorm1d(50))
    model[0].weight.requires_grad_(False)
    rows = np.random.default_rng(0).normal(size=(300, 20))
    found, array, turned, names = sent((model, rows, np.asfortranarray(rows), np.array(["a", "b"])))
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    flags = [p.requires_grad for p in found.parameters()]
    assert flags == [False, True, True, True]
    assert all(isinstance(p, nn.Parameter) for p in found.parameters())
    np.testing.assert_array_equal(array, rows)
    np.testing.assert_array_equal(turned, rows)
    assert names.tolist() == ["a", "b"]


def test_what_shares_memory_goes_on_sharing_it() -> None:
    whole = torch.randn(5000)
    tied = nn.ModuleList([nn.Linear(60, 60, bias=False), nn.Linear(60, 60, bias=False)])
    tied[1].weight = tied[0].weight
    found, part, again = sent((whole, whole[10:4000], tied))
    found[10] = 7.0
    assert part[0] == 7.0
    assert whole[10] != 7.0  # pages that are written to are the reader's own
    assert again[0].weight is again[1].weight
    with torch.no_grad():
        again[0].weight.zero_()
    assert not again[1].weight.any()


def test_large_arrays_are_stored_once_and_not_in_the_pickle() -> None:
    columns = torch.randn(1000, 64), torch.zeros(1000, dtype=torch.long)
    data = Data(columns)
    shipment = shipping.Shipment.of({"a": data, "b": data, "c": columns[0][5:]})
    assert sorted(view.nbytes for view in shipment.buffers) == [8000, 8000, 256_000]  # and ids
    assert len(shipment.content) < 4000


def test_parameters_are_marked_as_written_to() -> None:
    model, data = nn.Linear(100, 100), torch.randn(100, 30)
    shipment = shipping.Shipment.of((model, data))
    shipment_parts = shipment.buffers, shipment.written
    marked = {view.nbytes: written for view, written in zip(*shipment_parts, strict=True)}
    assert marked == {40_000: True, 12_000: False}


def test_the_surroundings_are_taken_along(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        found = shipping.Surroundings.here(threads=1)
    finally:
        torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(sys, "path", ["/usr/lib"])
    found.take()
    try:
        assert torch.get_default_dtype() == torch.float64
        assert sys.path[0] == "/usr/lib"
        assert set(found.path) <= set(sys.path)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_a_file_of_a_user_defines_goes_by_value(tmp_path: Path) -> None:
    (tmp_path / "beside_the_file.py").write_text("FACTOR = 3\n")
    text = (
        "import beside_the_file\n"
        "class Model:\n    factor = beside_the_file.FACTOR\n"
        "def times(x):\n    return x * Model.factor\n"
        "def task(): ...\ndef train(): ...\ndef queries(): ...\n"
    )
    (tmp_path / "mine.py").write_text(text)
    with importable(tmp_path):
        module = imported(tmp_path / "mine.py")
    content = shipping.Shipment.of(module.times).content
    del sys.modules[module.__name__]
    assert shipping.Shipment(content, (), ()).unpacked()(5) == 15
    sys.modules[module.__name__] = module
    assert str(tmp_path) in shipping.Surroundings.here(1).path  # for modules beside the file
    del sys.modules[module.__name__]


def test_what_cannot_be_sent_is_said() -> None:
    with pytest.raises(ForebearError, match="cannot be sent to other processes"):
        shipping.write({"lock": threading.Lock()}, 1)
