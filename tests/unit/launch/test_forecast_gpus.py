"""Which GPU of the table a driver's name means, and what memory it has here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from accrete.launch.forecast.speed import GPUS, gpu_by_name, gpu_here


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    properties = SimpleNamespace(total_memory=int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = gpu_here()
    assert found is not None
    assert found.gib == gib
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert gpu_here() is None
