"""The walk of somebody new: an Alpaca file of one's own, check, train, Ctrl-C, resume, chat, merge, GGUF; and the answers are
those of transformers on the merged model."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.test_model_gguf import WRITER
from lorakit.conversion.model_gguf import CONVERTER
from lorakit.models.loading import load_model
from lorakit.train import run_checkpoint as checkpoint
from lorakit.train.trainer import LoraTrainer

Run = Callable[..., Result]
QUESTIONS = ["the film was good", "a song was bad", "the book was good", "a play was bad"]


def greedy(model: Any, tokenizer: Any, question: str, system: str | None) -> str:
    """What transformers answers with the model's own chat template."""
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": question})
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        found = model.generate(**ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


@pytest.mark.slow  # the writer of GGUF imports torch in a process of its own
def test_the_walk_of_somebody_new(base: Path, lorakit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"instruction": f"{article} {thing} was", "input": word, "output": answer}
        for article in ("the", "a")
        for thing in ("film", "play", "book", "song")
        for word, answer in (("good", "yes"), ("bad", "no"))
    ]
    rows += [{"instruction": f"{one['instruction']} {one['input']}", "output": one["output"]} for one in rows]
    Path("mine.json").write_text(json.dumps(rows))

    done = lorakit("init", str(base), "mine.json", "-o", "run.yaml")
    assert done.exit_code == 0, done.output
    flags = ["--train.precision", "fp32", "--train.learning-rate", "1e-2", "--train.batch-size", "4", "--rank", "8"]
    flags += [
        "--train.max-steps",
        "80",
        "--train.compile",
        "off",
        "--evaluate.answers",
        "none",
        "--train.output",
        "mine",
    ]
    done = lorakit("train", "run.yaml", "--check", *flags)
    assert done.exit_code == 0, done.output
    assert "⟦yes <end>⟧" in " ".join(done.stdout.split()), done.stdout
    assert not Path("mine").exists()

    step = LoraTrainer.training_step

    def interrupted(self: LoraTrainer, *given: Any, **named: Any) -> torch.Tensor:
        if self.state.global_step == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(LoraTrainer, "training_step", interrupted)
        done = lorakit("train", "run.yaml", *flags)
    assert done.exit_code == 130, done.output
    assert "--train.resume true" in done.stderr
    assert checkpoint.checkpoints_in(Path("mine"))[-1].name == "checkpoint-11"
    done = lorakit("train", "run.yaml", *flags, "--train.resume", "true")
    assert done.exit_code == 0, done.output

    options = ["--dtype", "fp32", "--max-new-tokens", "3", "--temperature", "0"]
    done = lorakit("chat", str(base), "-a", "mine", *options, stdin="\n/clear\n".join(QUESTIONS) + "\n")
    assert done.exit_code == 0, done.output
    chatted = [word for word in done.stdout.split() if word in ("yes", "no")]
    assert chatted == ["yes", "no", "yes", "no"], done.stdout

    (tmp_path / CONVERTER).write_text(WRITER)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
    done = lorakit("merge", str(base), "mine", "-o", "merged", "--dtype", "fp32", "--gguf", "q8_0")
    assert done.exit_code == 0, done.output
    merged, tokenizer = AutoModelForCausalLM.from_pretrained("merged").eval(), AutoTokenizer.from_pretrained("merged")
    theirs = [greedy(merged, tokenizer, question, None) for question in QUESTIONS]
    assert theirs == chatted
    few, words = load_model("merged/merged-q8_0.gguf", dtype="fp32")
    assert [greedy(few.eval(), tokenizer, question, None) for question in QUESTIONS] == chatted
    assert words.chat_template
    assert "FROM ./merged-q8_0.gguf" in Path("merged/Modelfile").read_text()
