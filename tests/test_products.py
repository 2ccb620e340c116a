"""Which library computes 32-bit matrix products, and that they keep 32-bit precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lit_llm import products
from lit_llm.products import MAX_QUERIES

AMD, INTEL = "vendor_id : AuthenticAMD\nflags : avx512f", "vendor_id : GenuineIntel\nflags : avx512f"


def fakes(monkeypatch, tmp_path: Path, cpu: str, capability: str) -> None:
    (tmp_path / "cpuinfo").write_text(cpu)
    monkeypatch.setattr(products, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("cpu", "capability", "decided"),
    [
        (AMD, "AVX512", "bf16"),
        (AMD, "AVX2", "none"),  # MKL is as fast there
        (INTEL, "AVX512", "none"),
        (AMD + " amx_tile", "AVX512", "none"),  # AMX would round
        ("", "AVX512", "none"),
    ],
)
def test_onednn_multiplies_on_amds_cpus_that_have_avx512(monkeypatch, tmp_path, cpu, capability, decided) -> None:
    fakes(monkeypatch, tmp_path, cpu, capability)
    products.multiply_by_onednn()
    assert torch.backends.mkldnn.matmul.fp32_precision == decided
    assert (MAX_QUERIES[torch.float32] > (0, 0)) == (decided == "bf16")


@pytest.mark.parametrize(
    ("cpu", "pays"),
    [
        ("flags : avx2 avx512f avx512_bf16 avx512vl", True),
        ("flags : amx_bf16 amx_tile", True),
        ("Features : asimd bf16 i8mm", True),
        ("flags : avx2 avx512f", False),
        ("", False),
    ],
)
def test_bfloat16_pays_on_cpus_that_have_instructions_for_it(monkeypatch, tmp_path, cpu, pays) -> None:
    fakes(monkeypatch, tmp_path, cpu, "AVX512")
    products.multiplies_bfloat16.cache_clear()
    assert products.multiplies_bfloat16("cpu") == pays
    assert not products.multiplies_bfloat16("mps")
    products.multiplies_bfloat16.cache_clear()


@pytest.mark.parametrize("chosen", ["highest", "high"])
def test_a_precision_that_was_chosen_stays(monkeypatch, tmp_path, chosen) -> None:
    fakes(monkeypatch, tmp_path, AMD, "AVX512")
    torch.set_float32_matmul_precision(chosen)
    products.multiply_by_onednn()
    assert torch.get_float32_matmul_precision() == chosen


def test_nothing_is_decided_beside_a_gpu(monkeypatch, tmp_path) -> None:
    fakes(monkeypatch, tmp_path, AMD, "AVX512")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    products.multiply_by_onednn()
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("rows", "inside", "outside"), [(1, 384, 512), (300, 64, 1536), (1024, 768, 96)])
def test_products_keep_32_bits_on_this_machine(rows: int, inside: int, outside: int) -> None:
    products.multiply_by_onednn()
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inside, requires_grad=True), torch.randn(outside, inside, requires_grad=True)
    grad = torch.randn(rows, outside)
    found = (
        F.linear(x, weight),
        *torch.autograd.grad(F.linear(x, weight), (x, weight), grad),
        torch.bmm(x[None], weight.T[None])[0],
    )
    x, weight, grad = x.double(), weight.double(), grad.double()
    for y, exact in zip(found, (x @ weight.T, grad @ weight, grad.T @ x, x @ weight.T), strict=True):
        error = (y.double() - exact).abs().max() / exact.abs().max()
        assert error < 2e-6  # bfloat16 would be wrong by 1e-3
