"""The loss where labels are against the plain one: values, gradients, counts; every option of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorakit.train.step import loss as loss_module
from lorakit.train.step.loss import Head, target_loss

VOCABULARY, HIDDEN, TARGETS = 37, 11, 23


def make(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=dtype)
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    hidden = torch.randn(TARGETS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (TARGETS,), generator=generator)
    weights = torch.randint(1, 4, (TARGETS,), generator=generator).double()
    return head, hidden, targets, weights


def plain(head: Head, hidden: Tensor, targets: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    logits = head.module(hidden).double() * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    losses = nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    return (losses * weights).sum()


def gradients(total: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total * 0.7, tensors))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("scale", "softcap", "smoothing"), [(1.0, None, 0.0), (0.25, None, 0.1), (1.0, 2.0, 0.05)])
@pytest.mark.parametrize("chunk", [VOCABULARY * 16, 1 << 24])
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, bias: bool, scale: float, softcap: float | None, smoothing: float, chunk: int
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk)
    linear, hidden, targets, weights = make(bias)
    head = Head(linear, scale, softcap)
    wanted = [hidden, *linear.parameters()]
    total, right = target_loss(head, hidden, targets, weights, label_smoothing=smoothing)
    expected = plain(head, hidden, targets, weights, smoothing)
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=0)
    for found, truth in zip(gradients(total, wanted), gradients(expected, wanted), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12)
    best = linear(hidden).argmax(-1) == targets
    assert float(right) == float((best * weights).sum())


def test_only_the_gradients_that_are_wanted() -> None:
    linear, hidden, targets, weights = make()
    linear.requires_grad_(False)
    total, _ = target_loss(Head(linear, 1.0, None), hidden, targets, weights)
    total.backward()
    assert hidden.grad is not None
    assert linear.weight.grad is None
    assert linear.bias.grad is None


def test_a_head_that_is_more_than_linear_is_called_as_it_is() -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.A = nn.Parameter(torch.randn(2, HIDDEN, dtype=torch.float64))
            self.B = nn.Parameter(torch.randn(VOCABULARY, 2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x @ self.A.T @ self.B.T  # type: ignore[no-any-return]

    linear, hidden, targets, weights = make()
    head = Head(Adapted(linear), 0.5, 3.0)
    assert not head.is_linear
    wanted = [hidden, *head.module.parameters()]
    total, _ = target_loss(head, hidden, targets, weights, label_smoothing=0.1)
    expected = plain(head, hidden, targets, weights, 0.1)
    torch.testing.assert_close(total, expected)
    for found, truth in zip(gradients(total, wanted), gradients(expected, wanted), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12)


def test_a_hooked_head_is_not_linear() -> None:
    linear, *_ = make()
    head = Head(linear, 1.0, None)
    assert head.is_linear
    handle = linear.register_forward_hook(lambda module, args, output: output * 2)
    assert not head.is_linear
    handle.remove()


def test_bfloat16_stays_within_its_roundings() -> None:
    """Logits are rounded to 8 bits once: each is off by at most half an eps of its own size, and so is the loss of a
    target by at most twice that of its largest logit."""
    linear, hidden, targets, weights = make(dtype=torch.bfloat16)
    total, _ = target_loss(Head(linear, 1.0, None), hidden, targets, weights)
    wide = nn.Linear(HIDDEN, VOCABULARY, dtype=torch.float64)
    wide.load_state_dict({name: value.double() for name, value in linear.state_dict().items()})
    expected = plain(Head(wide, 1.0, None), hidden.double(), targets, weights, 0.0)
    largest = wide(hidden.double()).abs().max().item()
    bound = 2 * largest * torch.finfo(torch.bfloat16).eps * float(weights.sum())
    assert abs(total.item() - expected.item()) <= bound
    assert total.dtype == torch.float32


def test_no_target_is_a_loss_of_zero() -> None:
    linear, hidden, targets, weights = make()
    total, right = target_loss(Head(linear, 1.0, None), hidden[:0], targets[:0], weights[:0])
    assert float(total) == 0.0
    assert float(right) == 0.0
    total.backward()
