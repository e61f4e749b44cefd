"""The encoder against loops over places and heads, and against torch's own layer."""

from math import erf, exp, sqrt

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from perfedrec.core.keys import Key
from perfedrec.nn.attention import STEPS, Dropout, Encoder
from perfedrec.nn.flat import Flat

Array = NDArray[np.float64]
COUNTS = (4, 2, 1)


def inputs(encoder: Encoder) -> tuple[list[Tensor], Tensor, Tensor]:
    """Random weights, biases and normalisations included; sequences [3, 4, d]; and which of their places exist."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(shape, generator=generator) * 0.5 for shape in encoder.shapes]
    x = torch.randn(len(COUNTS), max(COUNTS), encoder.dim, generator=generator)
    return weights, x, torch.arange(max(COUNTS)) < torch.tensor(COUNTS)[:, None]


def normalised(x: Array, factor: Array, bias: Array) -> Array:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * (1 + factor) + bias


def attended(weights: list[Array], x: Array, heads: int, causal: bool) -> Array:
    """Self-attention of one sequence [L, d], place by place and head by head."""
    into, bias, out, out_bias = weights
    n, d = x.shape
    query, key, value = np.split(x @ into.T + bias, 3, axis=1)
    found = np.zeros((n, d))
    for head in range(heads):
        own = slice(head * d // heads, (head + 1) * d // heads)
        for t in range(n):
            seen = range(t + 1) if causal else range(n)
            shares = [exp(query[t, own] @ key[s, own] / sqrt(d // heads)) for s in seen]
            found[t, own] = sum(share * value[s, own] for share, s in zip(shares, seen, strict=True)) / sum(shares)
    return found @ out.T + out_bias


def passed(weights: list[Array], x: Array, causal: bool) -> Array:
    into, bias, out, out_bias = weights
    inner = x @ into.T + bias
    gelu = inner * (1 + np.vectorize(erf)(inner / sqrt(2))) / 2
    return (np.maximum(inner, 0) if causal else gelu) @ out.T + out_bias


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
def test_encoder_against_loops(causal: bool, heads: int) -> None:
    encoder = Encoder(4, 2, heads, 6, causal)
    weights, x, there = inputs(encoder)
    given = encoder(weights, x, there, Dropout())
    parts = [each.numpy().astype(np.float64) for each in weights]
    for row, count in enumerate(COUNTS):
        y = x[row, :count].numpy().astype(np.float64)
        for block in (parts[:12], parts[12:24]):
            for norm, part in (
                (block[4:6], lambda z, own=block[:4]: attended(own, z, heads, causal)),
                (block[10:], lambda z, own=block[6:10]: passed(own, z, causal)),
            ):
                if causal:
                    y = y + part(np.stack([normalised(each, *norm) for each in y]))
                else:
                    y = np.stack([normalised(each, *norm) for each in y + part(y)])
        y = np.stack([normalised(each, *parts[-2:]) for each in y]) if causal else y
        np.testing.assert_allclose(given[row, :count].numpy(), y, atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_block_is_the_layer_of_torch(causal: bool) -> None:
    encoder = Encoder(4, 1, 2, 6, causal)
    weights, x, there = inputs(encoder)
    layer = torch.nn.TransformerEncoderLayer(
        4, 2, 6, dropout=0.0, activation="relu" if causal else "gelu", batch_first=True, norm_first=causal
    )
    own = [*weights[:4], *weights[6:10], 1 + weights[4], weights[5], 1 + weights[10], weights[11]]
    for parameter, value in zip(layer.parameters(), own, strict=True):
        parameter.data.copy_(value)
    hidden = torch.ones(4, 4, dtype=torch.bool).triu(1) if causal else None
    expected = layer(x, src_mask=hidden, src_key_padding_mask=~there)
    if causal:
        expected = torch.nn.functional.layer_norm(expected, (4,), 1 + weights[-2], weights[-1])
    torch.testing.assert_close(encoder(weights, x, there, Dropout())[there], expected[there], atol=1e-5, rtol=1e-5)


def changed(causal: bool, place: int) -> Tensor:
    """bool [4] whether what comes out at each place of the first sequence depends on what goes in at one place."""
    encoder = Encoder(4, 2, 1, 4, causal)
    weights, x, there = inputs(encoder)
    other = x.clone()
    other[0, place, 0] += 1
    first, second = (encoder(weights, each, there, Dropout())[0] for each in (x, other))
    return (first != second).any(1)


def test_a_place_never_sees_later_ones() -> None:
    assert changed(True, 2).tolist() == [False, False, True, True]
    assert changed(False, 2).tolist() == [True] * 4


@pytest.mark.parametrize("causal", [True, False])
def test_places_that_do_not_exist_change_nothing(causal: bool) -> None:
    encoder = Encoder(4, 2, 2, 4, causal)
    weights, x, there = inputs(encoder)
    alone = encoder(weights, x[1:2, :2], there[1:2, :2], Dropout())
    torch.testing.assert_close(encoder(weights, x, there, Dropout())[1:2, :2], alone)


def test_first_weights() -> None:
    encoder = Encoder(64, 1, 1, 64, True)
    weights = Flat(tuple(encoder.shapes)).unpack(Flat(tuple(encoder.shapes)).init(Key(0), encoder.scales))
    assert float(weights[0].std()) == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert not any(bool(each.any()) for each in weights if each.dim() == 1)


def test_dropout() -> None:
    """The share that is dropped, within four standard errors; the mean is kept; and what draws depend on."""
    ids, values = torch.arange(40), torch.ones(40, 50, 20)
    dropout = Dropout(0.3, Key(1), ids)
    first, second = dropout(values), dropout(values)
    rate = round(0.3 * STEPS) / STEPS
    assert float((first == 0).double().mean()) == pytest.approx(rate, abs=4 * sqrt(rate * (1 - rate) / 40000))
    assert sorted(set(first.flatten().tolist())) == pytest.approx([0.0, 1 / (1 - rate)])
    assert not torch.equal(first, second)
    torch.testing.assert_close(Dropout(0.3, Key(1), ids[7:9])(values[7:9, :11]), first[7:9, :11])
    assert torch.equal(Dropout(0.0, Key(1), ids)(values), values)
