"""On the real model: a trained adapter verified, merged and extracted again; a router and a mixture trained over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakit as lk
from lorakit.algebra.sources import Live, Stored
from lorakit.core.using import routes

pytestmark = pytest.mark.model

ROWS = (
    ("What do you think of the film?", "It was a joy from the first scene to the last."),
    ("What do you think of the film?", "It was dull, and far too long."),
)


def batch_of(tokenizer: Any) -> dict[str, Tensor]:
    """The rows as one padded batch, the loss on the answers."""
    texts, lengths = [], []
    for question, answer in ROWS:
        asked = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        texts.append(tokenizer(prompt + answer)["input_ids"])
        lengths.append(len(tokenizer(prompt)["input_ids"]))
    width = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
        labels[row, length : len(text)] = torch.tensor(text[length:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def taught(model: Any, adapter: lk.Adapter, batch: dict[str, Tensor], steps: int, rate: float) -> list[float]:
    """The losses of a few steps; what routers and mixtures add to the loss is added."""
    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        with lk.use(model, adapter.name), lk.noted(model) as extra:
            loss = model(**batch).loss
        losses.append(float(loss.detach()))
        (loss + sum(own() for own in extra)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.fixture
def taught_model(chat_model: tuple[Any, Any]) -> tuple[Any, lk.Adapter, dict[str, Tensor]]:
    model, tokenizer = chat_model
    model.float().eval()
    torch.manual_seed(0)
    adapter = lk.attach(model, lk.LoRA(rank=4), name="a", target_modules=["q_proj", "v_proj"], layers=range(26, 30))
    batch = batch_of(tokenizer)
    losses = taught(model, adapter, batch, 6, 3e-3)
    assert losses[-1] < losses[0] - 0.1
    return model, adapter, batch


def test_a_trained_adapter_is_verified_and_comes_back_from_the_merged_model(taught_model: Any, tmp_path: Path) -> None:
    model, adapter, batch = taught_model
    prompts = [{key: batch[key] for key in ("input_ids", "attention_mask")}]
    found = lk.verify(adapter, prompts)
    assert found.agrees
    assert found.effect > 0.01
    assert found.exact.relative < 1e-4
    told = lk.verify(adapter, prompts, dtype=torch.bfloat16)
    assert len(told.kept) == len(told.layers) == 8
    assert all(
        0 < share < 1 for share in told.kept.values()
    )  # each layer loses some of so small a change, none all of it
    assert told.merged.largest > found.exact.largest
    assert "Merging in bfloat16 costs" in told.words()

    wanted = {place: Live(adapter, "test").change(place).dense() for place in Live(adapter, "test").places()}
    with lk.use(model, None):
        base = {key.replace(".base.", "."): value for key, value in model.state_dict().items() if "deltas" not in key}
    model.save_pretrained(tmp_path / "base", state_dict=base)
    lk.merge(model, "a")
    model.save_pretrained(tmp_path / "tuned")
    result = lk.extract(tmp_path / "base", tmp_path / "tuned", rank=4, output=tmp_path / "out")
    assert result.made.ranks.keys() == wanted.keys()
    assert result.made.error < 1e-2  # what rounding W + ΔW to float32 has added beyond rank 4
    stored = Stored(tmp_path / "out", "test")
    for place, change in wanted.items():
        lost = float((stored.change(place).dense() - change).norm() / change.norm())
        assert lost < 1e-2, place


def test_a_router_and_a_mixture_learn(taught_model: Any, tmp_path: Path) -> None:
    model, adapter, batch = taught_model
    torch.manual_seed(1)
    other = lk.attach(model, lk.LoRA(rank=2), name="b", target_modules=["q_proj"], layers=[29])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(0.05 * torch.randn_like(parameter))
    frozen = {name: value.clone() for name, value in adapter.state_dict().items()}
    for made in (
        lk.route(model, lk.XLoRA(), ["a", "b"], name="routed"),
        lk.attach(
            model,
            lk.MixLoRA(experts=2, top_k=1, inner=lk.LoRA(rank=2)),
            name="mixed",
            target_modules="mlp",
            layers=[28, 29],
        ),
    ):
        losses = taught(model, made, batch, 4, 3e-3)
        assert losses[-1] < losses[0], made.name
        with torch.no_grad(), lk.use(model, made.name), routes(model) as seen:
            before = model(**batch).logits
        assert all(torch.allclose(w.sum(-1), torch.ones(())) for _, w in seen)
        folder = made.save(tmp_path / made.name)
        lk.detach(model, made.name)
        lk.load(model, folder)
        with torch.no_grad(), lk.use(model, made.name):
            assert torch.equal(model(**batch).logits, before), made.name
    assert all(torch.equal(value, frozen[name]) for name, value in adapter.state_dict().items())
