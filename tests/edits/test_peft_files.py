"""Files of P-tuning, prefix tuning and LLaMA-Adapter go both ways with PEFT, with the same logits; and where they do not.

Differences that are PEFT's: its LLaMA-Adapter has one gate per layer without tanh (`gate="layer"` is that form; files with a
gate per head are lorakit's own), and for GPT-2 adds what the tokens give after the output projection, which is refused.
For T5 it gives decoder layer l the prefix of layer 2l mod L (half of the table is never used): its files are read so, and ours,
with a prefix for each layer, are not written as PEFT's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import lorakit as lk
import lorakit.peft as ours
from edits.laws import Case
from edits.models import inputs, make
from lorakit.edits import LLaMAAdapter, PrefixTuning, PromptTuning, PTuning
from lorakit.errors import LorakitError
from lorakit.files.store import read_config

CONFIGS: dict[str, Any] = {
    "p-tuning": lambda task: peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=3, encoder_hidden_size=5),
    "p-tuning-lstm": lambda task: peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=3, encoder_hidden_size=5, encoder_reparameterization_type="LSTM"
    ),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
    "prefix-projected": lambda task: peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5
    ),
}
OURS: dict[str, Any] = {
    "p-tuning": PTuning(tokens=3, width=5),
    "prefix": PrefixTuning(tokens=3, width=5),
}


def given_to_peft(kind: str) -> dict[str, torch.Tensor]:
    given = inputs(kind)
    given.pop("position_ids", None)  # PEFT ignores those of prompts
    return given


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("name", CONFIGS)
def test_theirs_load_here(kind: str, name: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    theirs = peft.get_peft_model(make(kind), CONFIGS[name]("SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM")).eval()
    theirs.save_pretrained(tmp_path / "a")
    theirs.double()
    model, given = make(kind), given_to_peft(kind)
    base = model(**given).logits
    lk.load(model, tmp_path / "a", name="a")
    own = slice(-base.shape[1], None)
    with lk.use(model, "a"):
        found = model(**given).logits
    assert (found - base).abs().max() > 1e-4
    assert torch.allclose(
        found, theirs(**given).logits[:, own], atol=1e-5
    )  # their table is rounded to float32 in the file


ONCE_TRAINED: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "CPT": (peft.CPTConfig, {"cpt_token_ids": [3, 5, 7]}, lk.PromptTuning(tokens=3, start="random")),
    "MULTITASK_PROMPT_TUNING": (
        peft.MultitaskPromptTuningConfig,
        {"num_virtual_tokens": 3, "num_ranks": 2},
        lk.PromptTuning(tokens=3, start="random"),
    ),
    "CARTRIDGE": (peft.CartridgeConfig, {"num_virtual_tokens": 3}, PrefixTuning(tokens=3, width=None)),
}
"""PEFT's types that are another method here once they are trained."""


@pytest.mark.parametrize("name", ONCE_TRAINED)
def test_what_they_are_once_trained_loads_here(name: str, tmp_path: Path) -> None:
    config, options, method = ONCE_TRAINED[name]
    model, given = make("llama").float(), given_to_peft("llama")
    theirs = peft.get_peft_model(make("llama").float(), config(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for parameter in theirs.prompt_encoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    theirs.save_pretrained(tmp_path)
    more = {"task_ids": torch.zeros(len(given["input_ids"]), dtype=torch.long)} if name.startswith("MULTI") else {}
    wanted = theirs(**given, **more, **({"labels": None} if name == "CPT" else {})).logits
    base = model(**given).logits
    assert lk.load(model, tmp_path, name="a").method == method
    found = model(**given).logits
    assert (found - base).abs().max() > 1e-3
    assert torch.allclose(found, wanted[:, -found.shape[1] :], atol=1e-5)


@pytest.mark.parametrize("name", ONCE_TRAINED)
def test_what_they_are_once_trained_under_pefts_names(name: str, tmp_path: Path) -> None:
    """Read as theirs is, and refused where a new one is asked for."""
    config, options, method = ONCE_TRAINED[name]
    given = given_to_peft("llama")
    peft.get_peft_model(make("llama").float(), config(task_type="CAUSAL_LM", **options)).save_pretrained(tmp_path)
    read = ours.PeftModel.from_pretrained(make("llama").float(), tmp_path)
    assert type(read.peft_config["default"]).__name__ == config.__name__
    assert lk.adapters(read.get_base_model())["default"].method == method
    assert read(**given).logits.isfinite().all()
    own = getattr(ours, config.__name__)(task_type="CAUSAL_LM", **options)
    with pytest.raises(LorakitError, match=f"does not train PEFT type {name}; its files are read as {method.name}"):
        ours.get_peft_model(make("llama").float(), own)


def test_prompts_of_several_tasks_are_refused(tmp_path: Path) -> None:
    config = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2)
    peft.get_peft_model(make("llama").float(), config).save_pretrained(tmp_path)
    with pytest.raises(
        LorakitError, match="MULTITASK_PROMPT_TUNING with num_tasks=2 is not supported because each call"
    ):
        lk.load(make("llama").float(), tmp_path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("llama", "p-tuning"), ("gpt2", "p-tuning"), ("t5", "p-tuning"), ("llama", "prefix"), ("gpt2", "prefix")],
)
def test_ours_load_there(kind: str, name: str, tmp_path: Path) -> None:
    model, given = make(kind).float(), given_to_peft(kind)
    adapter = Case(OURS[name], kind).attach(model)
    model.float()
    adapter.save(tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(make(kind).float(), tmp_path / "a").eval()
    expected = model(**given).logits
    found = loaded(**given).logits[:, -expected.shape[1] :]
    assert torch.allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("kind", [transformers.LlamaForSequenceClassification, transformers.BertForTokenClassification])
@pytest.mark.parametrize(
    "method", [PromptTuning(tokens=3), PTuning(tokens=3, width=5), PrefixTuning(tokens=3, width=5)]
)
def test_a_prompt_with_a_head_loads_there(kind: Any, method: Any, tmp_path: Path) -> None:
    """PEFT's names of what is saved whole have one step less for prompts than for layers."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_labels": 3}
    config = kind.config_class(**sizes, num_attention_heads=2, pad_token_id=0)

    def classifier() -> Any:
        torch.manual_seed(3)
        return kind(config).eval()

    model, ids = classifier(), torch.arange(2, 9)[None]
    head = "score" if hasattr(model, "score") else "classifier"
    adapter = lk.attach(model, method, name="a", modules_to_save=[head])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.eval()
    adapter.save(tmp_path / "a")
    again = classifier()
    lk.load(again, tmp_path / "a")
    expected = model(input_ids=ids).logits
    assert torch.allclose(again(input_ids=ids).logits, expected, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(classifier(), tmp_path / "a").eval()
    found = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.allclose(found[:, -expected.shape[1] :] if found.ndim == 3 else found, expected, atol=2e-5)


def take_steps(model: Any, given: dict[str, torch.Tensor], prompt: int) -> list[float]:
    """Losses of four steps; `prompt` is how many places of the output stand before the text's."""
    trained = [one for one in model.parameters() if one.requires_grad]
    optimiser, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(4):
        logits = model(**given).logits[:, prompt:]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), given["input_ids"][:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tuning_trains_as_theirs(encoder: str) -> None:
    """From the same network, the same losses step by step."""
    theirs = peft.get_peft_model(
        make("llama"), CONFIGS["p-tuning" if encoder == "mlp" else "p-tuning-lstm"]("CAUSAL_LM")
    )
    theirs.double().eval()
    model, given = make("llama"), given_to_peft("llama")
    adapter = lk.attach(model, PTuning(tokens=3, width=5, encoder=encoder))
    model.double()
    (ours,) = adapter.edits.values()
    source = theirs.prompt_encoder["default"].state_dict()
    names = {"embedding.weight": "E", "mlp_head.": "network." if encoder == "mlp" else "network.head."}
    renamed = {}
    for key, tensor in source.items():
        for start, own in names.items():
            if key.startswith(start):
                key = own + key[len(start) :]
        renamed[key.replace("lstm_head.", "network.lstm.")] = tensor
    ours.load_state_dict(renamed)
    expected = take_steps(theirs, given, 3)
    assert expected[-1] < expected[0]
    assert take_steps(model, given, 0) == pytest.approx(expected, rel=1e-9)


def test_prefix_tuning_trains_as_theirs() -> None:
    """From the same network, whose second half is laid out by layers here."""
    theirs = peft.get_peft_model(make("llama"), CONFIGS["prefix-projected"]("CAUSAL_LM")).double().eval()
    model, given = make("llama"), given_to_peft("llama")
    adapter = lk.attach(model, PrefixTuning(tokens=3, width=5))
    model.double()
    source = theirs.prompt_encoder["default"].state_dict()
    narrow = source["embedding.weight"].shape[1]  # as wide as a layer's keys; ours is as wide as the model
    edits: list[Any] = list(adapter.edits.values())
    with torch.no_grad():
        shared = edits[0].shared
        for mine, key in ((shared.E, "embedding.weight"), (shared.first.weight, "transform.0.weight")):
            mine.zero_()[:, :narrow].copy_(source[key])
        shared.first.bias.copy_(source["transform.0.bias"])
        for part in ("weight", "bias"):
            for edit, piece in zip(edits, source[f"transform.2.{part}"].chunk(len(edits)), strict=True):
                getattr(edit.second, part).copy_(piece)
    expected = take_steps(theirs, given, 0)
    assert expected[-1] < expected[0]
    assert take_steps(model, given, 0) == pytest.approx(expected, rel=1e-9)


def test_llama_adapter_with_one_gate_goes_both_ways(tmp_path: Path) -> None:
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(make("llama"), config)
    for name, parameter in theirs.named_parameters():
        if "adaption_gate" in name:
            parameter.data.fill_(0.7)
    theirs.save_pretrained(tmp_path / "theirs")
    given = inputs("llama")
    model = make("llama")
    adapter = lk.load(model, tmp_path / "theirs", name="a")
    assert adapter.method == LLaMAAdapter(tokens=3, top=1, gate="layer")
    with lk.use(model, "a"):
        found = model(**given).logits
    mask = given["attention_mask"].bool()
    assert torch.allclose(found[mask], theirs.double().eval()(**given).logits[mask], atol=1e-9)

    ours = make("llama")
    own = Case(LLaMAAdapter(tokens=3, top=2, gate="layer"), "llama").attach(ours)
    own.save(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "ours").double().eval()
    assert torch.allclose(loaded(**given).logits[mask], ours(**given).logits[mask], atol=1e-9)


def test_where_they_differ(tmp_path: Path) -> None:
    """A gate per head is no PEFT adapter, and is not written as if it were; PEFT's of GPT-2 is another function."""
    Case(LLaMAAdapter(tokens=3, top=1), "llama").attach(make("llama")).save(tmp_path / "heads")
    assert read_config(tmp_path / "heads")["peft_type"] == "LLAMA_ADAPTER"
    with pytest.raises(Exception, match="LLAMA_ADAPTER"):
        peft.PeftModel.from_pretrained(make("llama"), tmp_path / "heads")
    Case(PrefixTuning(tokens=3, width=None), "t5").attach(make("t5")).save(tmp_path / "t5")
    with pytest.raises(Exception, match="PREFIX_TUNING_OF_DECODER"):
        peft.PeftModel.from_pretrained(make("t5"), tmp_path / "t5")
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")
    peft.get_peft_model(make("gpt2"), config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(LorakitError, match="for GPT-2 it adds after the output projection"):
        lk.load(make("gpt2"), tmp_path / "gpt2", name="a")


def test_a_table_that_does_not_fit(tmp_path: Path) -> None:
    peft.get_peft_model(make("gpt2"), CONFIGS["prefix"]("CAUSAL_LM")).save_pretrained(tmp_path / "a")
    with pytest.raises(LorakitError, match="has shape"):
        lk.load(make("llama"), tmp_path / "a", name="a")
