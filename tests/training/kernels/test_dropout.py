"""Claims: masks belong to the document and its position in every layout, and they are as good as drawn at random.

All draws are fixed, so the bounds (in standard deviations, for the number of values looked at) hold or do not hold.
"""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

from forge.training.kernels.dropout import (
    ODD,
    document_key,
    keep_mask,
    module_key,
    padded_token_keys,
    step_keys,
    threshold,
    token_keys,
)

RARE = 100_000  # there are some thousand assertions below
UP, DOWN, Q = (module_key(f"model.layers.0.{name}") for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"))


def documents(num: int, length: int, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, 150_000, (num, length)).tolist()


def rows_of(texts: list[list[int]], step: int = 1, seed: int = 42) -> torch.Tensor:
    return step_keys(torch.from_numpy(token_keys(texts)), seed, step)


def standardised(mask: torch.Tensor, p: float) -> torch.Tensor:
    """Mean 0, variance 1 where elements are dropped at the rate p."""
    return (p - (~mask).double()) / math.sqrt(p * (1 - p))


def bound(num_values: int) -> float:
    """What the largest of so many standard normal values exceeds by chance once in RARE draws."""
    return float(norm.isf(0.5 / RARE / num_values))


def assert_rate(mask: torch.Tensor, p: float) -> None:
    """As a whole, in each row, in each column: the number dropped is one that a binomial draw may have."""
    for dropped, n in (
        ((~mask).sum(0), mask.shape[0]),
        ((~mask).sum(1), mask.shape[1]),
        ((~mask).sum()[None], mask.numel()),
    ):
        tails = np.minimum(binom.cdf(dropped, n, p), binom.sf(dropped - 1, n, p))
        assert tails.min() > 0.5 / RARE / len(tails)


def assert_unrelated(a: torch.Tensor, b: torch.Tensor, p: float) -> None:
    """Dropped in both: at the rate p * p."""
    assert_rate(a | b, p * p)


def assert_no_pair_correlates(x: torch.Tensor) -> None:
    """Any two of x's rows; and on average over all pairs, where a weakness of every pair would show."""
    correlations = (x @ x.T) / math.sqrt(x.shape[1])
    pairs = correlations[torch.triu(torch.ones_like(correlations), 1) == 1]
    assert pairs.abs().max() < bound(len(pairs))
    assert abs(pairs.square().mean() - 1) < 4 * math.sqrt(2 / len(pairs)) + 3 / math.sqrt(x.shape[1])
    assert abs(pairs.mean()) * math.sqrt(len(pairs)) < 4


# Keys


def test_a_document_s_key_is_of_its_ids_alone() -> None:
    ids = [5, 151_643, 7]
    little_endian = b"".join(number.to_bytes(8, "little") for number in ids)
    expected = int.from_bytes(hashlib.sha256(little_endian).digest()[:4], "little")
    assert document_key(np.array(ids)) == document_key(np.array(ids, np.int32)) == expected
    assert len({document_key(np.array(ids[:n])) for n in range(4)}) == 4


def test_keys_are_the_same_on_every_machine_and_in_every_release() -> None:
    rows = rows_of([[1, 2, 3], [4, 5]], step=3, seed=7)
    mask = keep_mask(rows, UP, 64, 0.1)
    found = hashlib.sha256(rows.numpy().astype("<i4").tobytes() + mask.numpy().tobytes()).hexdigest()[:16]
    assert (module_key("model.layers.0.mlp.up_proj"), found) == (1_411_521_740, "44813608044d62e7")


def test_every_layout_has_the_same_mask_for_a_document_and_a_position() -> None:
    texts = [text[:length] for text, length in zip(documents(8, 60), (60, 3, 17, 41, 1, 28, 59, 33), strict=True)]
    alone = {i: keep_mask(rows_of([text]), UP, 300, 0.1) for i, text in enumerate(texts)}
    packed = keep_mask(rows_of(texts), UP, 300, 0.1)
    assert torch.equal(packed, torch.cat(list(alone.values())))
    for num_rows in (1, 2, 4, 8):  # 8 x 1 to 1 x 8, each micro-batch padded to its own longest
        for start in range(0, 8, num_rows):
            group = texts[start : start + num_rows]
            width = max(map(len, group))
            keys = step_keys(torch.from_numpy(padded_token_keys(group, width)), 42, 1)
            masks = keep_mask(keys, UP, 300, 0.1).view(num_rows, width, 300)
            for i, text in enumerate(group):
                assert torch.equal(masks[i, : len(text)], alone[start + i])
    tiled = [keep_mask(rows, UP, 300, 0.1) for rows in rows_of(texts).split(37)]
    assert torch.equal(torch.cat(tiled), packed)


def test_padding_has_keys_of_its_own() -> None:
    keys = padded_token_keys([[1, 2, 3], [4]], 50)
    assert len(set(keys.tolist())) == 100
    with pytest.raises(ValueError, match="a document of 3 tokens does not fit into rows of 2"):
        padded_token_keys([[1, 2, 3]], 2)


def test_no_documents_have_no_keys() -> None:
    assert token_keys([]).shape == padded_token_keys([], 5).shape == (0,)


@pytest.mark.parametrize(("p", "expected"), [(0.0, 0), (0.5, 2**30), (0.1, 214_748_365)])
def test_a_threshold_is_the_share_of_31_bits(p: float, expected: int) -> None:
    assert threshold(p) == expected


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0, math.nan])
def test_a_rate_that_is_none_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="a dropout rate is at least 0 and below 1"):
        threshold(p)


def test_nothing_is_dropped_at_rate_0() -> None:
    assert keep_mask(rows_of(documents(2, 50)), UP, 100, 0.0).all()


# Statistics


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("module", [UP, DOWN, Q, 0, 1, 2**31 - 1])
def test_the_rate_holds_as_a_whole_and_in_each_row_and_column(p: float, module: int) -> None:
    assert_rate(keep_mask(rows_of(documents(4, 250)), module, 896, p), p)


def test_the_rate_holds_in_each_of_196_modules_and_200_steps() -> None:
    rows, p = rows_of(documents(2, 100)), 0.1
    modules = [module_key(f"model.layers.{layer}.{name}") for layer in range(28) for name in "qkvogud"]
    means = [standardised(keep_mask(rows, module, 256, p), p).sum() for module in modules]
    means += [standardised(keep_mask(rows_of(documents(2, 100), step), UP, 256, p), p).sum() for step in range(200)]
    z = torch.stack(means) / math.sqrt(200 * 256)
    assert z.abs().max() < bound(len(z))
    assert abs(z.square().mean() - 1) < 4 * math.sqrt(2 / len(z))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_no_two_rows_and_no_two_columns_correlate(p: float) -> None:
    x = standardised(keep_mask(rows_of(documents(4, 150)), UP, 640, p), p)
    assert_no_pair_correlates(x)
    assert_no_pair_correlates(x.T.contiguous())


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_no_two_modules_correlate_not_even_shifted(p: float) -> None:
    rows = rows_of(documents(4, 150))
    masks = [keep_mask(rows, module, 512, p) for module in (UP, DOWN, Q, UP + 1, UP ^ 2**30)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            for shift in range(0, 8):
                assert_unrelated(a[:, shift:], b[:, : b.shape[1] - shift], p)
                assert_unrelated(b[:, shift:], a[:, : b.shape[1] - shift], p)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_no_two_steps_or_seeds_correlate(p: float) -> None:
    texts = documents(4, 150)
    masks = [keep_mask(rows_of(texts, step), UP, 512, p) for step in (1, 2, 3, 4, 1000)]
    masks += [keep_mask(rows_of(texts, 1, seed), UP, 512, p) for seed in (43, 1, 2**40)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            for shift in range(0, 4):
                assert_unrelated(a[shift:], b[: len(b) - shift], p)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbouring_documents_have_masks_of_their_own(p: float) -> None:
    (first,) = documents(1, 400)
    changed, longer = [first[0] + 1, *first[1:]], [*first, 1]
    masks = [keep_mask(rows_of([text]), UP, 512, p)[:400] for text in (first, changed, longer)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        for shift in range(0, 4):
            assert_unrelated(masks[a][shift:], masks[b][: 400 - shift], p)


def test_rows_whose_keys_differ_in_one_bit_or_by_a_power_of_two_do_not_correlate() -> None:
    p, base = 0.1, rows_of(documents(1, 64)).long()
    a = keep_mask(base.int(), UP, 4096, p)
    for bit in range(32):
        for near in (base ^ (1 << bit), base + (1 << bit)):
            assert_unrelated(a, keep_mask(near.int(), UP, 4096, p), p)


def closest(keys: list[int]) -> tuple[int, int, int]:
    """Two keys, by index, of which the second is the first plus the smallest multiple of ODD; and that multiple."""
    multiples = [key * pow(ODD, -1, 2**32) % 2**32 for key in keys]
    order = sorted(range(len(keys)), key=multiples.__getitem__)
    distance, a, b = min((multiples[b] - multiples[a], a, b) for a, b in pairwise(order))
    return a, b, distance


def test_no_document_has_the_masks_of_another_some_positions_further() -> None:
    """As a sum of key and position would have them."""
    texts = [[i] * 2000 for i in range(3000)]
    a, b, distance = closest([document_key(np.array(text)) for text in texts])
    assert 0 < distance < 1000
    masks = [keep_mask(rows_of([texts[i]]), UP, 64, 0.1) for i in (a, b)]
    assert_unrelated(masks[0][distance:], masks[1][: 2000 - distance], 0.1)


def test_no_module_has_the_masks_of_another_some_channels_further() -> None:
    modules = [module_key(f"module {i}") for i in range(3000)]
    a, b, distance = closest(modules)
    assert 0 < distance < 1000
    masks = [keep_mask(rows_of(documents(1, 64)), modules[i], 2000, 0.1) for i in (a, b)]
    assert_unrelated(masks[0][:, distance:], masks[1][:, : 2000 - distance], 0.1)


def test_all_tokens_of_a_step_have_masks_of_their_own() -> None:
    """Where keys are not shifted copies of one another; two among 20,000 have the same by chance in one draw of 20."""
    rows = rows_of(documents(20, 1000))
    assert len(rows.unique()) == len(rows)
