"""`data.special_tokens`: new tokens whose rows alone train, through every verb, with a head of its own and with a tied one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from tests.cli.conftest import SPECIAL, WORDS, words_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lorakit as lk
from lorakit.cli.conversation import Sampling, Speaker
from lorakit.errors import LorakitError
from lorakit.files.bundle import TENSORS
from lorakit.files.vocabulary import add_tokens, grow, token_rows
from lorakit.serve.model.packed import AdapterReader, Refused
from lorakit.train import run_checkpoint as checkpoint

Run = Callable[..., Result]

NEW = ("<good>", "<bad>")
COUNT = len(SPECIAL) + len(WORDS)


@pytest.fixture(scope="module", params=[False, True], ids=["a head of its own", "a tied head"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, a run that was interrupted by its length and resumed, and the same run in one go."""
    from tests.cli.conftest import call

    place = tmp_path_factory.mktemp("tokens")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    ends = {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": request.param}
    config = LlamaConfig(vocab_size=COUNT, num_key_value_heads=2, max_position_embeddings=128, **sizes, **ends)
    LlamaForCausalLM(config).save_pretrained(place / "base")
    words_tokenizer().save_pretrained(place / "base")
    kinds = [("<good>", "yes <good>"), ("<bad>", "no <bad>")]
    rows = [{"prompt": f"is it {kinds[i % 2][0]}", "completion": kinds[i % 2][1]} for i in range(32)]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["train", "--model", str(place / "base"), "--data.train", str(place / "rows.jsonl"), "--rank", "4"]
    words += ["--data.special-tokens", ",".join(NEW), "--train.learning-rate", "2e-2", "--train.batch-size", "8"]
    words += [
        "--train.precision",
        "fp32",
        "--train.compile",
        "off",
        "--train.scheduler",
        "constant",
        "--train.warmup",
        "0",
    ]
    words += ["--train.save-steps", "20", "--data.template", "{prompt} {completion}"]
    for name, steps in (("out", "20"), ("out", "40"), ("whole", "40")):
        resume = ["--train.resume", "true"] if steps == "40" and name == "out" else []
        done = call(*words, "--train.max-steps", steps, "--train.output", str(place / name), *resume)
        assert done.exit_code == 0, done.output
    return place / "base", place / "out", place / "whole"


def test_the_rows_of_the_new_tokens_train_alone_and_resume_to_the_bit(trained: tuple[Path, Path, Path]) -> None:
    base, out, whole = trained
    tensors, others = (load_file(folder / TENSORS) for folder in (out, whole))
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    rows = {name: tensor for name, tensor in tensors.items() if "lora_" not in name}
    tied = AutoModelForCausalLM.from_pretrained(base).config.tie_word_embeddings
    assert all(tensor.shape == (2, 24) for tensor in rows.values())
    assert len(rows) == (1 if tied else 2)
    assert checkpoint.read_state(checkpoint.checkpoints_in(out)[-1])


def test_generate_and_the_merged_model_answer_with_them(
    trained: tuple[Path, Path, Path], lorakit: Run, tmp_path: Path
) -> None:
    base, out, _ = trained
    speaker = Speaker(str(base), [out], dtype="fp32")
    merged = tmp_path / "merged"
    done = lorakit("merge", str(base), str(out), "-o", str(merged))
    assert done.exit_code == 0, done.output
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    assert model.get_input_embeddings().weight.shape[0] == COUNT + 2
    kept = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[:COUNT], kept)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (
        model.config.tie_word_embeddings
    )
    for word, answer in zip(NEW, ("yes", "no"), strict=True):
        messages = [{"role": "user", "content": f"is it {word}"}]
        ids = speaker.encode(messages, "out")
        assert max(ids) >= COUNT, "one token, and a new one"
        assert ids == list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
        with torch.no_grad(), lk.use(speaker.model, "out"):
            said = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0]
            torch.testing.assert_close(model(said[None]).logits, speaker.model(said[None]).logits, rtol=1e-4, atol=1e-4)
        text = speaker.speak(ids, "out", sampling=Sampling(max_new_tokens=4))
        assert text == tokenizer.decode(said[len(ids) :], skip_special_tokens=True)
        if not model.config.tie_word_embeddings:
            assert tokenizer.decode(said[len(ids) :]).split() == [answer, word, "<end>"]


def test_peft_reads_the_rows(trained: tuple[Path, Path, Path]) -> None:
    peft = pytest.importorskip("peft")
    base, out, _ = trained
    ours, theirs = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    for model in (ours, theirs):
        grow(model, COUNT + 2)
    lk.load(ours, out)
    theirs = peft.PeftModel.from_pretrained(theirs, str(out))
    ids = torch.tensor([[COUNT, 3, COUNT + 1, 7]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)


def test_going_on_keeps_them_and_takes_no_more(trained: tuple[Path, Path, Path], lorakit: Run, tmp_path: Path) -> None:
    base, out, _ = trained
    rows = str(base.parent / "rows.jsonl")
    words = ["train", "--model", str(base), "--data.train", rows, "--from", str(out), "--train.precision", "fp32"]
    words += ["--train.output", str(tmp_path / "out"), "--train.max-steps", "1", "--train.learning-rate", "1e-30"]
    done = lorakit(*words, "--data.special-tokens", "<more>")
    assert "has no rows for <more>" in done.stderr
    done = lorakit(*words)
    assert done.exit_code == 0, done.output
    before, after = load_file(out / TENSORS), load_file(tmp_path / "out" / TENSORS)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "<bad>" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


def test_serving_refuses_them_with_what_would_work(trained: tuple[Path, Path, Path]) -> None:
    base, out, _ = trained
    with pytest.raises(Refused, match="Merge it into a base of its own"):
        AdapterReader(AutoModelForCausalLM.from_pretrained(base)).read("out", out)


def test_a_base_has_room_in_the_same_way_each_time_and_what_is_saved_whole_has_no_rows() -> None:
    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    table = model.get_input_embeddings().weight.detach().clone()
    grow(model, 12)
    assert torch.equal(model.get_input_embeddings().weight[9:], table.mean(0).expand(3, 8))
    assert token_rows(model, [9], ["embed_tokens"]) == {"lm_head": [9]}
    assert token_rows(model, [], []) is None
    with pytest.raises(LorakitError, match="different texts"):
        add_tokens(words_tokenizer(), ["<a>", "<a>"])
