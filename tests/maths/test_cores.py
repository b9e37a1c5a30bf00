"""What holds of every core that chooses pairs: exact where all are kept, causal, blind to padding, constant choices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.cores import SparseCore, real, share_of
from scrimp.techniques.attention.a3 import A3, Searched
from scrimp.techniques.attention.dota import Detector, Dota
from scrimp.techniques.attention.elsa import Angles, Elsa, calibrated
from scrimp.techniques.attention.sanger import Predicted, Sanger
from scrimp.techniques.attention.vitcod import Averages, Fixed

HEADS, TOKENS, WIDTH = 4, 9, 8


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def elsa(every: bool) -> nn.Module:
    made = Angles(Elsa(calibrate=1), torch.empty(HEADS, WIDTH), 0)
    made.count.fill_(1)
    made.threshold.fill_(-9.0 if every else 0.4)
    return made


def dota(every: bool) -> nn.Module:
    made = Detector(Dota(keep=1.0 if every else 0.3), torch.empty(HEADS, WIDTH), 0)
    made.refill()
    for name, p in made.named_parameters():
        made.initialize(name, p.data, torch.Generator())
    return made


def vitcod(every: bool) -> nn.Module:
    made = Fixed(HEADS, 16, True, torch.empty(0))
    made.mask.copy_((drawn(HEADS, 16, 16) > 0.3) | torch.eye(16, dtype=torch.bool) | every)
    return made


SELECTS: dict[str, Callable[[bool], nn.Module]] = {
    "a3": lambda every: Searched(A3(search="all", weight=1e-30) if every else A3()),
    "elsa": elsa,
    "sanger": lambda every: Predicted(Sanger(threshold=1e-30 if every else 0.12)),
    "dota": dota,
    "vitcod": vitcod,
}


def kept(name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The pairs of an evaluation, and its result."""
    core = SparseCore(name, SELECTS[name](False)).eval()
    core.tracing = True
    with torch.no_grad():
        y = core(q, k, v, causal, mask)
    assert core.trace is not None
    return core.trace.mask, y


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SELECTS)
def test_everything_kept_is_exact_attention(name: str, causal: bool, mask: bool) -> None:
    q, k, v = drawn(2, HEADS, TOKENS, WIDTH), *drawn(2, 2, 2, TOKENS, WIDTH, seed=1)
    seen = torch.arange(TOKENS) < torch.tensor([TOKENS, 5])[:, None, None, None] if mask else None
    square = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    given = seen & square if seen is not None and causal else seen
    core = SparseCore(name, SELECTS[name](True))
    wanted = F.scaled_dot_product_attention(q, k, v, given, is_causal=causal and not mask, enable_gqa=True)
    torch.testing.assert_close(core(q, k, v, causal and not mask, given), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", SELECTS)
def test_the_choice_is_a_constant_to_the_gradient(name: str) -> None:
    q, k, v = (t.double().requires_grad_() for t in drawn(3, 1, HEADS, 6, WIDTH))
    core = SparseCore(name, SELECTS[name](False).double())
    assert 0 < float(kept(name, q, k, v, True)[0].float().mean()) < 21 / 36
    assert torch.autograd.gradcheck(lambda *t: core(*t, True), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("name", SELECTS)
def test_a_token_does_not_depend_on_later_ones_or_on_other_samples(name: str) -> None:
    q, k, v = drawn(3, 2, HEADS, TOKENS, WIDTH)
    before, y = kept(name, q, k, v, True)
    assert not (before & ~torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()).any()
    for t in (q, k, v):
        t[1] = 7.0
        t[0, :, 6:] = 5 * drawn(HEADS, TOKENS - 6, WIDTH, seed=2)
    after, z = kept(name, q, k, v, True)
    assert torch.equal(before[0, :, :6], after[0, :, :6])
    torch.testing.assert_close(y[0, :, :6], z[0, :, :6])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SELECTS)
def test_padding_changes_no_choice(name: str, causal: bool) -> None:
    q, k, v = drawn(3, 2, HEADS, TOKENS, WIDTH)
    alone, y = kept(name, q, k, v, causal)
    long = [torch.cat([t, 9 * drawn(2, HEADS, 7, WIDTH, seed=3)], 2) for t in (q, k, v)]
    seen = (torch.arange(TOKENS + 7) < TOKENS).expand(2, 1, 1, -1)
    if causal:
        seen = seen & torch.ones(TOKENS + 7, TOKENS + 7, dtype=torch.bool).tril()
    padded, z = kept(name, *long, False, seen)
    assert torch.equal(alone, padded[:, :, :TOKENS, :TOKENS])
    assert not padded[..., TOKENS:].any()
    torch.testing.assert_close(y, z[:, :, :TOKENS])


def test_a_share_is_of_the_keys_that_a_sample_has() -> None:
    seen = torch.arange(10) < torch.tensor([10, 3, 1])[:, None, None, None]
    most, each = share_of(seen, 0.3)
    assert most == 3
    assert each.tolist() == [[[3]], [[1]], [[1]]]
    assert share_of(torch.ones(1, 1, 10, 10, dtype=torch.bool).tril(), 0.3)[1].tolist() == [[[3]]]


def test_what_looks_at_training_does_not_see_rows_of_padding() -> None:
    """Thresholds, a detector's error and averages are the same with and without padding."""
    q, k = drawn(2, 2, HEADS, TOKENS, WIDTH)
    long_q, long_k = (torch.cat([t, 9 * drawn(2, HEADS, 7, WIDTH, seed=3)], 2) for t in (q, k))
    seen, padded = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool), torch.arange(16).expand(2, 1, 16, -1) < TOKENS
    assert real(padded).sum() == 2 * TOKENS**2
    found = []
    detector = dota(False)
    for given in ((q, k, seen), (long_q, long_k, real(padded))):
        averages = Averages(HEADS, 16, torch.empty(0))
        averages.refill()
        averages(*given)
        found.append((calibrated(*given, p=1.0), detector.error(*given), averages.average, averages.rows))  # type: ignore[operator]
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
    said: list[Tensor] = []
    core = SparseCore("elsa", watch=lambda q, k, seen: said.append(seen))
    core(long_q, long_k, long_q, False, padded[:, :, :1])
    assert torch.equal(said[0], real(padded))
    core.itself = False
    core(long_q, long_k, long_q, False, padded[:, :, :1])
    assert torch.equal(said[1], padded)
