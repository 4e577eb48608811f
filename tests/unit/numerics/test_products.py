"""Products by convolutions: the same numbers, and torch's own products where they are not meant."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flashvaed_cli.decoders.modules import blocks
from flashvaed_cli.decoders.predict import attention
from flashvaed_cli.numerics import products


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor where torch's products are slow, and however small they are."""
    monkeypatch.setattr(products, "products_are_slow", lambda: True)
    monkeypatch.setattr(products, "FEWEST_MULTIPLIES", 0)
    with torch.no_grad():
        yield


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every product that is a convolution."""
    calls: list[int] = []
    original = products.by_convolution

    def counted(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return original(*arguments)

    for room in (products, blocks):
        monkeypatch.setattr(room, "by_convolution", counted)
    return calls


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (1, 1, 5), (2, 3, 4, 6, 5)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_linear_layer(shape: tuple[int, ...], biased: bool, transposed: bool, convolutions: list[int]) -> None:
    x, weight = torch.randn(shape), torch.randn(9, 5)
    if transposed:
        x, weight = x.flip(0).transpose(0, -2), torch.randn(5, 9).T
    bias = torch.randn(9) if biased else None
    torch.testing.assert_close(products.linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-5, rtol=0)
    assert len(convolutions) == 1


@pytest.mark.parametrize("num_keys", [1, 12, 40])
@pytest.mark.parametrize("at_once", [1 << 22, 100])
def test_attention(num_keys: int, at_once: int, monkeypatch: pytest.MonkeyPatch, convolutions: list[int]) -> None:
    """In one part, or in several of which the last is smaller; rows of a joint tensor of queries, keys and values."""
    monkeypatch.setattr(attention, "LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(attention, "FEWEST_QUERIES", 5)
    q, k, v = torch.randn(2, 40, 24).chunk(3, dim=2)
    q, k, v = q[:, :12], k[:, :num_keys], v[:, :num_keys]
    expected = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    torch.testing.assert_close(blocks._attend(q, k, v), expected, atol=1e-5, rtol=0)
    num_parts = -(-12 // max(at_once // num_keys, 5))
    assert len(convolutions) == 2 * 2 * num_parts


def test_large_logits_do_not_overflow() -> None:
    q, k, v = (100 * torch.randn(1, 6, 4) for _ in range(3))
    expected = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    torch.testing.assert_close(blocks._attend(q, k, v), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_number_formats_are_torchs(dtype: torch.dtype, convolutions: list[int]) -> None:
    x, weight = torch.randn(7, 5, dtype=dtype), torch.randn(9, 5, dtype=dtype)
    assert torch.equal(products.linear(x, weight), F.linear(x, weight))
    assert blocks._attend(x[None], x[None], x[None]).dtype == dtype
    assert not convolutions


def test_gradients_and_small_products_are_torchs(monkeypatch: pytest.MonkeyPatch, convolutions: list[int]) -> None:
    layer = products.RowLinear(5, 9)
    with torch.enable_grad():
        layer(torch.randn(7, 5)).sum().backward()
    assert layer.weight.grad is not None and not convolutions
    monkeypatch.setattr(products, "FEWEST_MULTIPLIES", 7 * 5 * 9 + 1)
    layer(torch.randn(7, 5))
    assert not convolutions
    layer(torch.randn(8, 5))
    assert len(convolutions) == 1


def test_a_linear_layer_is_torchs() -> None:
    """Of the same class, name and state: what counts and changes layers finds it."""
    layer, plain = products.RowLinear(5, 9), nn.Linear(5, 9)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 7, 5)
    assert isinstance(layer, nn.Linear)
    torch.testing.assert_close(layer(x), plain(x))


def test_which_processors_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for vendor, capability, expected in (
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "AVX512", False),
    ):
        products.products_are_slow.cache_clear()
        monkeypatch.setattr(products, "_vendor", lambda vendor=vendor: vendor)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        assert products.products_are_slow() is expected
    products.products_are_slow.cache_clear()
