"""Which GPU of the table a driver's name means, and what memory it has here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forecast_case import model_plan

from accrete.launch.forecast.place import choose_place
from accrete.launch.forecast.speed import GPUS, gpu_by_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA B200", "b200"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
    ],
)
def test_a_name_is_compared_by_its_words(name: str, expected: str | None) -> None:
    found = gpu_by_name(name)
    assert (found and found.name) == expected


def test_a_slice_has_its_share_of_the_arithmetic() -> None:
    found, whole = gpu_by_name("NVIDIA A100-SXM4-80GB MIG 3g.40gb"), GPUS["a100-80"]
    assert found is not None
    assert found.name == "a100-80 MIG 3g"
    assert found.bf16 == pytest.approx(3 / 7 * whole.bf16)


@pytest.mark.parametrize(
    ("name", "gib"), [("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 9.5), ("NVIDIA L40", 44.5)]
)
def test_memory_is_that_of_the_device(
    name: str, gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch, name, gib)
    place = choose_place(model_plan("llama").config)
    assert place.gpu is not None
    assert place.gib == gib
    # What the maker says of another one is not asked for here.
    assert choose_place(place_config("cuda"), gpu="h100").gib == GPUS["h100"].gib


def test_a_gpu_outside_the_table_has_its_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, "Tesla T4", 14.6)
    place = choose_place(model_plan("llama").config)
    assert place.gpu is None
    assert place.gib == pytest.approx(14.6)


def test_a_cpu_has_no_memory_to_fit_into() -> None:
    assert choose_place(place_config("cpu")).gib is None


def place_config(device: str) -> Any:
    return model_plan("llama", engine={"device": device}).config


def here(monkeypatch: pytest.MonkeyPatch, name: str, gib: float) -> None:
    """Let PyTorch see one GPU."""
    properties = SimpleNamespace(total_memory=int(gib * 2**30))
    for key, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda: name,
        "get_device_properties": lambda device: properties,
    }.items():
        monkeypatch.setattr(torch.cuda, key, value)
