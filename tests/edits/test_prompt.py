"""Prompt tuning: its formula, its starts, its errors, and PEFT's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lorakit as lk
from edits.models import inputs, make
from lorakit.errors import LorakitError
from lorakit.train.step.loss import PACKED, PADDED
from lorakit.train.step.packing import pack
from lorakit.train.step.support import choose_path
from training.tiny import llama as tiny_llama
from training.tiny import rows


def test_the_rows_stand_in_front_of_the_embeddings() -> None:
    model, ids = make("llama"), inputs("llama")["input_ids"]
    embedded = model.model.embed_tokens(ids)
    adapter = lk.attach(model, lk.PromptTuning(tokens=4, start="random"))
    P = next(adapter.parameters())
    found = model(ids).logits
    with lk.use(model, None):
        whole = torch.cat([P.double()[None].expand(3, -1, -1), embedded], dim=1)
        expected = model(inputs_embeds=whole).logits[:, 4:]
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_labels_and_hidden_states_are_the_users_own() -> None:
    model, ids = make("llama"), inputs("llama")["input_ids"]
    lk.attach(model, lk.PromptTuning(tokens=4))
    out = model(ids, labels=ids, output_hidden_states=True)
    assert out.logits.shape[:2] == ids.shape
    assert {tuple(state.shape) for state in out.hidden_states} == {(3, 7, 16)}
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(out.loss.double(), expected, rtol=1e-5)


def test_an_encoder_shows_its_prompt_to_the_decoder() -> None:
    model, given = make("t5"), inputs("t5")
    adapter = lk.attach(model, lk.PromptTuning(tokens=2, start="random"))
    P = next(adapter.parameters()).double()
    found = model(**given).logits
    with lk.use(model, None):
        embeds = torch.cat([P[None].expand(3, -1, -1), model.shared(given["input_ids"])], dim=1)
        mask = torch.cat([torch.ones(3, 2, dtype=torch.long), given["attention_mask"]], dim=1)
        expected = model(inputs_embeds=embeds, attention_mask=mask, decoder_input_ids=given["decoder_input_ids"]).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_starts() -> None:
    model = make("llama")
    weight = model.model.embed_tokens.weight
    text = lk.attach(model, lk.PromptTuning(tokens=5, start="text", ids=(7, 3)), name="text")
    assert torch.equal(next(text.parameters()).double(), weight[[7, 3, 7, 3, 7]].float().double())
    drawn = next(lk.attach(model, lk.PromptTuning(tokens=6), name="drawn").parameters())
    assert all((weight.float() == row).all(dim=1).any() for row in drawn)
    uniform = next(lk.attach(model, lk.PromptTuning(tokens=50, start="random"), name="u").parameters())
    assert 0.4 < uniform.abs().max() <= 0.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tokens": 0}, "tokens was given as 0; it is an integer of at least 1"),
        ({"start": "texts"}, "one of vocabulary, text, random"),
        ({"start": "text"}, 'start="text" needs a text'),
        ({"text": "a"}, 'start="text" needs a text'),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(LorakitError, match=says):
        lk.PromptTuning(**options)


def test_refusals() -> None:
    model, given = make("llama"), inputs("llama")
    with pytest.raises(LorakitError, match="target_modules was given, which is about weight matrices"):
        lk.attach(model, lk.PromptTuning(), target_modules=["q_proj"])
    with pytest.raises(LorakitError, match="gives none"):
        lk.attach(model, lk.PromptTuning(start="text", text="Is it good?"))
    with pytest.raises(LorakitError, match="edits need a transformers model, and Linear is none"):
        lk.attach(torch.nn.Linear(2, 2), lk.PromptTuning())
    assert not lk.adapters(model)
    lk.attach(model, lk.PromptTuning(tokens=3), name="a")
    lk.attach(model, lk.PromptTuning(tokens=2), name="b")
    with pytest.raises(LorakitError, match=r"weight 0\.7.*cannot be blended"), lk.use(model, {"a": 0.7}):
        pass
    with (
        pytest.raises(LorakitError, match="two of a kind, 'a' and 'b', both a prompt"),
        lk.use(model, {"a": 1, "b": 1}),
    ):
        pass
    with pytest.raises(LorakitError, match="'a' cannot be merged: it is prompt-tuning, and a prompt is rows"):
        lk.merge(model, "a")
    with lk.use(model, None):
        cache = model(given["input_ids"], use_cache=True).past_key_values
    mask = torch.ones(3, 8, dtype=torch.long)
    with lk.use(model, "a"), pytest.raises(LorakitError, match="continued with the adapter that it was begun with"):
        model(given["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)
    with lk.use(model, "a"), pytest.raises(LorakitError, match="a cache of fixed length has no room"):
        model.generate(given["input_ids"], max_new_tokens=2, cache_implementation="static")


def test_a_text_is_read_by_the_tokenizer_that_trains() -> None:
    class Tokenizer:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [len(word) for word in text.split()]}

    assert lk.PromptTuning(start="text", text="Is it good?").with_tokenizer(Tokenizer()).ids == (2, 2, 5)


def test_a_flat_row_of_training_is_the_padded_batch() -> None:
    """One prompt above everything, computed once: the same loss and the same gradient."""
    model = tiny_llama(torch.float64)
    adapter = lk.attach(model, lk.PromptTuning(tokens=4))
    assert choose_path(model) is PACKED
    examples = rows(5, prefix=18)
    found = []
    for path in (PACKED, PADDED):
        with path.opened(model):
            loss, _ = path.loss(model, examples, num_items=7.0)
            loss.backward()
        P = next(adapter.parameters())
        found.append((loss.detach(), P.grad))
        P.grad = None
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-8)
    assert found[0][1].abs().max() > 1e-3


def test_under_puts_a_root_above_all_segments() -> None:
    batch = pack(rows(4, prefix=18))
    grown = batch.under(3)
    assert (grown.segments[0].parent, grown.segments[0].length) == (-1, 3)
    assert [one.parent for one in grown.segments[1:]] == [one.parent + 1 for one in batch.segments]
    assert [one.start for one in grown.segments[1:]] == [one.start + 3 for one in batch.segments]
    assert grown.tokens == batch.tokens + 3
    assert torch.equal(grown.hidden_index, batch.hidden_index)


# -- PEFT's files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "task"), [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_files_go_both_ways(kind: str, task: str, tmp_path: Path) -> None:
    """PEFT loads ours and we load PEFT's, with the same logits. PEFT keeps a second prompt for T5's decoder, unused."""
    given = inputs(kind)
    given.pop("position_ids", None)  # PEFT ignores them with prompts
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3)
    theirs = peft.get_peft_model(make(kind), config).double().eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = make(kind)
    lk.load(model, tmp_path / "theirs", name="a")
    own = slice(3, None) if task == "CAUSAL_LM" else slice(None)
    with lk.use(model, "a"):
        assert torch.allclose(model(**given).logits, theirs(**given).logits[:, own], atol=1e-9)

    ours = make(kind)
    adapter = lk.attach(ours, lk.PromptTuning(tokens=3, start="random"))
    adapter.save(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(make(kind), tmp_path / "ours").double().eval()
    assert torch.allclose(loaded(**given).logits[:, own], ours(**given).logits, atol=1e-9)


def test_the_file_holds_what_peft_expects(tmp_path: Path) -> None:
    model = make("llama")
    lk.attach(model, lk.PromptTuning(tokens=3), name="a").save(tmp_path / "a")
    from lorakit.files.store import read_config, read_tensors

    assert {name: tuple(one.shape) for name, one in read_tensors(tmp_path / "a").items()} == {
        "prompt_embeddings": (3, 16)
    }
    config = read_config(tmp_path / "a")
    found = [config[key] for key in ("peft_type", "num_virtual_tokens", "token_dim", "num_layers")]
    assert found == ["PROMPT_TUNING", 3, 16, 2]
