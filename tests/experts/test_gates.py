"""Balance losses against few-line statements, and what they are least for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorakit.experts.gates import balance, share_loss, top_mask, z_loss


def case(seed: int, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 5, 4, dtype=torch.float64, generator=generator)
    counts = torch.randint(0, 3, (3, 5), generator=generator)
    return logits, top_mask(logits, k), counts


@pytest.mark.parametrize("k", [1, 2, 3])
def test_balance_against_a_loop(k: int) -> None:
    logits, kept, counts = case(1, k)
    p = logits.softmax(-1)
    f, P, total = [0.0] * 4, [0.0] * 4, 0
    for row in range(3):
        for token in range(5):
            for _ in range(int(counts[row, token])):
                total += 1
                for e in range(4):
                    f[e] += float(kept[row, token, e])
                    P[e] += float(p[row, token, e])
    expected = 4 * sum(f[e] / (total * k) * P[e] / total for e in range(4))
    assert float(balance(p, kept, counts)) == pytest.approx(expected, rel=1e-12)


def test_balance_is_one_for_uniform_routing_and_more_otherwise() -> None:
    turns = torch.eye(4, dtype=torch.bool).repeat(2, 1)
    assert float(balance(torch.full((8, 4), 0.25), turns)) == pytest.approx(1.0)
    everything = torch.zeros(8, 4, dtype=torch.bool)
    everything[:, 2] = True
    assert float(balance(everything.float(), everything)) == pytest.approx(4.0)
    pulled = torch.tensor([0.4, 0.2, 0.2, 0.2]).repeat(8, 1)
    assert float(balance(pulled, top_mask(pulled, 1))) > 1.3
    # its gradient draws probability away from what is chosen more often
    logits = torch.zeros(8, 4, requires_grad=True)
    kept = torch.zeros(8, 4, dtype=torch.bool)
    kept[:6, 0] = kept[6:, 1] = True
    balance(logits.softmax(-1), kept).backward()
    assert logits.grad is not None
    slope = logits.grad.sum(0)
    assert float(slope[0]) > 0 > float(slope[2])


def test_padding_does_not_count() -> None:
    logits, kept, counts = case(2)
    p, real = logits.softmax(-1), counts > 0
    for loss in (lambda c: balance(p, kept, c), lambda c: z_loss(logits, c), lambda c: share_loss(p, c)):
        mask = real.long()
        assert float(loss(mask)) != pytest.approx(float(loss(None)))
    assert float(balance(p, kept, real)) == pytest.approx(float(balance(p[real], kept[real])), rel=1e-12)
    assert float(z_loss(logits, real)) == pytest.approx(float(z_loss(logits[real])), rel=1e-12)
    assert float(share_loss(p, real)) == pytest.approx(float(share_loss(p[real])), rel=1e-12)
    assert float(balance(p, kept, torch.zeros(3, 5))) == 0.0


def test_z_loss_and_share_loss_against_a_loop() -> None:
    logits, _, _ = case(3)
    flat = logits.reshape(-1, 4)
    expected = sum(math.log(sum(math.exp(float(z)) for z in row)) ** 2 for row in flat) / len(flat)
    assert float(z_loss(logits)) == pytest.approx(expected, rel=1e-12)
    q = flat.softmax(-1).mean(0)
    assert float(share_loss(logits.softmax(-1))) == pytest.approx(-sum(math.log(float(x)) for x in q), rel=1e-12)
    uniform = torch.full((5, 4), 0.25)
    assert float(share_loss(uniform)) == pytest.approx(4 * math.log(4))
    assert float(share_loss(torch.tensor([[0.3, 0.2, 0.25, 0.25]]))) > 4 * math.log(4)
