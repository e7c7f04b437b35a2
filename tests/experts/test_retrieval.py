"""Retrieval: requests go to the adapter whose examples they resemble, row by row, and stay there while being answered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from core import models
from core.models import randomise
from lorakit.errors import LorakitError
from lorakit.experts.retrieval import Retriever, mean_state

WORDS = {"low": (3, 9), "high": (16, 22)}
"""Each adapter's requests are made of its own words."""


pytestmark = pytest.mark.usefixtures("one_thread")


def requests(name: str, rows: int, seed: int) -> Tensor:
    return torch.randint(*WORDS[name], (rows, 6), generator=torch.Generator().manual_seed(seed))


def routed(**options: Any) -> tuple[Any, Retriever]:
    model = models.llama().double()
    for sign, (first, last) in zip((3, -3), WORDS.values(), strict=True):
        model.model.embed_tokens.weight.data[first:last, :4] += sign
    for name in WORDS:
        randomise(lk.attach(model, lk.LoRA(rank=2), name=name))
    examples = {name: [{"input_ids": requests(name, 8, 1)}, {"input_ids": requests(name, 5, 2)}] for name in WORDS}
    router = lk.route(model, lk.Retrieval(**options), list(WORDS), batches=examples).router
    assert isinstance(router, Retriever)
    return model, router


def logits(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def test_each_row_goes_where_its_kind_is() -> None:
    model, _ = routed()
    ids = torch.cat([requests("high", 1, 7), requests("low", 2, 8)])
    together = logits(model, ids)
    for row, name in enumerate(["high", "low", "low"]):
        with lk.use(model, name):
            assert torch.allclose(together[row : row + 1], logits(model, ids[row : row + 1]), atol=1e-6), row


def test_soft_weights_against_the_formula() -> None:
    model, router = routed(top_k=None, temperature=0.5)
    ids = requests("low", 2, 9)
    with torch.no_grad(), lk.use(model, None):
        rows = [model.model(ids[row : row + 1]).last_hidden_state[0].mean(0).float() for row in range(2)]
    for row in range(2):
        cosines = [torch.cosine_similarity(rows[row] - router.origin, c, dim=0) for c in router.centroids]
        w = torch.stack(cosines).div(0.5).softmax(0).double()
        routed_row = logits(model, ids[row : row + 1])
        with lk.use(model, dict(zip(WORDS, w.tolist(), strict=True))):
            assert torch.allclose(routed_row, logits(model, ids[row : row + 1]), atol=1e-5)


def test_padding_does_not_count() -> None:
    model, _ = routed(top_k=None)
    ids = requests("high", 2, 3)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    padded = logits(model, ids, attention_mask=mask)
    assert torch.allclose(padded[0, :3], logits(model, ids[:1, :3])[0], atol=1e-6)
    hidden = torch.tensor([[[1.0], [5.0]], [[2.0], [4.0]]])
    assert mean_state(hidden, torch.tensor([[1, 0], [1, 1]])).tolist() == [[1.0], [3.0]]


def test_answers_from_a_cache_keep_the_prompts_weights() -> None:
    model, _ = routed()
    ids = torch.cat([requests("high", 1, 5), requests("low", 1, 6)])
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    options["eos_token_id"] = None
    together = model.generate(ids, **options)
    beams = model.generate(ids, num_beams=2, **options)
    for row, name in enumerate(["high", "low"]):
        own = {**options, "attention_mask": options["attention_mask"][:1]}
        with lk.use(model, name):
            assert torch.equal(together[row], model.generate(ids[row : row + 1], **own)[0])
            assert torch.equal(beams[row], model.generate(ids[row : row + 1], num_beams=2, **own)[0])


def test_a_cache_that_began_elsewhere_is_refused() -> None:
    model, _ = routed()
    ids = requests("high", 1, 5)
    with torch.no_grad(), lk.use(model, "low"):
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(LorakitError, match="holds 6 tokens that ran without router 'retrieval'"):
        model(ids[:, :1], past_key_values=cache)
    assert lk.adapters(model)["retrieval"].router is not None
    logits(model, ids)  # and the next call is as if nothing had been


def test_what_is_refused() -> None:
    model, _ = routed()
    for batches in (None, {"low": [{"input_ids": requests("low", 1, 0)}]}, {"low": [], "high": []}):
        with pytest.raises(LorakitError, match="example requests of every adapter"):
            lk.route(model, lk.Retrieval(), list(WORDS), name="again", batches=batches)
    plain = nn.Sequential(nn.Linear(4, 4))
    lk.attach(plain, lk.LoRA(rank=1), name="a", target_modules=["0"])
    with pytest.raises(LorakitError, match="last hidden state of a transformers decoder"):
        lk.route(plain, lk.Retrieval(), ["a"], batches={"a": [{}]})
    head = models.llama()
    lk.attach(head, lk.LoRA(rank=1), name="a", target_modules=["lm_head"])
    with pytest.raises(LorakitError, match="lm_head stands outside the decoder"):
        lk.route(head, lk.Retrieval(), ["a"], batches={"a": [{}]})
