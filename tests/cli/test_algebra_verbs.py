"""`lorakit combine`, `scale`, `prune`, `diff`, `extract`, `verify`: what they write, what they say, what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorakit as lk
from lorakit.files.store import read_config, read_own, read_tensors

Run = Callable[..., Result]


def saved(base: Path, folder: Path, method: Any, seed: int = 0, **options: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = lk.attach(model, method, name="a", **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return adapter.save(folder, base=str(base))


def test_combine_folders_and_methods_that_need_the_base(base: Path, lorakit: Run, tmp_path: Path) -> None:
    a, b = saved(base, tmp_path / "a", lk.LoRA(rank=2)), saved(base, tmp_path / "b", lk.LoRA(rank=3), 1)
    dora = saved(base, tmp_path / "dora", lk.DoRA(inner=lk.LoRA(rank=2)), 2)
    result = lorakit("combine", str(a), str(b), "--weights", "0.7,-0.3", "-o", str(tmp_path / "sum"))
    assert result.exit_code == 0, result.output
    assert "2 adapters combined by linear; 14 layers at rank 5; ΔW is exact" in result.stdout
    result = lorakit(
        "combine", str(a), str(b), "--how", "ties", "--rank", "4", "--layer", "q_proj=1,0", "-o", str(tmp_path / "ties")
    )
    assert result.exit_code == 0, result.output
    assert "2 adapters combined by ties; 14 layers at rank 4; error of ΔW" in result.stdout
    assert read_config(tmp_path / "ties")["r"] == 4
    assert read_own(tmp_path / "ties")["record"]["combined"]["how"] == "ties"
    result = lorakit("combine", str(a), str(dora), "--how", "svd", "--energy", "0.9", "-o", str(tmp_path / "mixed"))
    assert result.exit_code == 0, result.output
    assert read_config(tmp_path / "mixed")["peft_type"] == "LORA"
    assert read_own(tmp_path / "mixed")["record"]["combined"]["how"] == "svd"
    listed = lorakit("combine", "--recipes")
    assert listed.exit_code == 0
    assert "dare-ties" in listed.stdout


def test_combine_by_what_each_ones_data_say(base: Path, rows: Path, lorakit: Run, tmp_path: Path) -> None:
    a, b = saved(base, tmp_path / "a", lk.LoRA(rank=2)), saved(base, tmp_path / "b", lk.LoRA(rank=3), 1)
    common = (str(a), str(b), "--rows", "8")
    each = ("--data", str(rows), "--data", str(rows))
    result = lorakit("combine", *common, *each, "--how", "regmean", "-o", str(tmp_path / "regmean"))
    assert result.exit_code == 0, result.output
    assert "2 adapters combined by regmean; 14 layers at rank 5; ΔW is exact" in result.stdout
    result = lorakit("combine", *common, *each, "--how", "fisher", "--rank", "4", "-o", str(tmp_path / "fisher"))
    assert result.exit_code == 0, result.output
    assert read_own(tmp_path / "fisher")["record"]["combined"]["how"] == "fisher"
    result = lorakit("combine", *common, "--data", str(rows), "--how", "regmean", "-o", str(tmp_path / "no"))
    assert result.exit_code == 2
    assert "--data was given 1 time, for 2 adapters" in result.stderr
    result = lorakit("combine", *common, "--how", "regmean", "-o", str(tmp_path / "no"))
    assert "on the command line give --data" in result.stderr
    assert not (tmp_path / "no").exists()


def test_combine_refuses(base: Path, lorakit: Run, tmp_path: Path) -> None:
    a, b = saved(base, tmp_path / "a", lk.LoRA(rank=2)), saved(base, tmp_path / "b", lk.LoRA(rank=2), 1)
    for options, words in (
        (("--weights", "1,x"), "--weights was given as '1,x'; expected numbers with commas"),
        (("--weights", "1"), "one finite number for each of 2"),
        (("--layer", "q_proj"), "--layer was given as 'q_proj'; expected NAME=NUMBERS"),
        (("--how", "tise"), 'did you mean "ties"'),
    ):
        result = lorakit("combine", str(a), str(b), "-o", str(tmp_path / "out"), *options)
        assert result.exit_code == 2
        assert words in result.stderr
    assert "is the adapter itself" in lorakit("combine", str(a), str(b), "-o", str(a)).stderr
    assert not (tmp_path / "out").exists()


def test_scale_prune_and_diff(base: Path, lorakit: Run, tmp_path: Path) -> None:
    a = saved(base, tmp_path / "a", lk.LoRA(rank=4))
    result = lorakit("scale", str(a), "0.5", "-o", str(tmp_path / "half"))
    assert result.exit_code == 0, result.output
    assert f"0.5 times {a}; 14 layers at rank 4; ΔW is exact" in result.stdout
    result = lorakit("prune", str(a), "--keep", "0.5", "-o", str(tmp_path / "pruned"))
    assert result.exit_code == 0, result.output
    assert "7 whole layers removed by norm; 7 layers at rank 4; error of ΔW" in result.stdout
    assert len([key for key in read_tensors(tmp_path / "pruned") if "lora_A" in key]) == 7
    result = lorakit("diff", str(a), str(tmp_path / "half"))
    assert result.exit_code == 0, result.output
    assert "cosine +1.000" in result.stdout
    found = json.loads(lorakit("diff", str(a), str(tmp_path / "half"), "--json").stdout)
    assert abs(found["norms"][0] - 2 * found["norms"][1]) < 1e-4
    result = lorakit("diff", str(a), str(tmp_path / "pruned"))
    assert f"only {a} changes" in result.stdout


def test_prune_by_the_loss_on_rows(base: Path, rows: Path, lorakit: Run, tmp_path: Path) -> None:
    a = saved(base, tmp_path / "a", lk.LoRA(rank=2))
    result = lorakit(
        "prune",
        str(a),
        "--keep",
        "9",
        "--what",
        "ranks",
        "--data",
        str(rows),
        "--rows",
        "12",
        "-o",
        str(tmp_path / "small"),
    )
    assert result.exit_code == 0, result.output
    assert "loss on 12 rows: " in result.stdout
    assert sum(t.shape[0] for key, t in read_tensors(tmp_path / "small").items() if "lora_A" in key) == 9
    assert read_own(tmp_path / "small")["record"]["pruned"]["by"] == "loss"


def test_extract_two_folders(base: Path, lorakit: Run, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or name.endswith("norm.weight"):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path / "tuned")
    result = lorakit("extract", str(base), str(tmp_path / "tuned"), "--rank", "3", "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "2 layers at rank 3; error of ΔW" in result.stdout
    assert "12 layers equal to the base" in result.stdout
    assert "saved whole: 5 other tensors" in result.stdout
    result = lorakit(
        "extract", str(base), str(tmp_path / "tuned"), "--rank", "3", "--rest", "report", "-o", str(tmp_path / "report")
    )
    assert "LEFT OUT: 5 other tensors" in result.stdout
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("inf")
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    result = lorakit("extract", str(base), str(tmp_path / "tuned"), "--rank", "3", "-o", str(tmp_path / "no"))
    assert result.exit_code == 2
    assert "q_proj.weight of the tuned model holds a NaN or an infinity" in result.stderr
    assert not (tmp_path / "no").exists()


def test_verify_says_what_it_found_and_keeps_it(base: Path, lorakit: Run, tmp_path: Path) -> None:
    a = saved(base, tmp_path / "a", lk.LoRA(rank=2))
    (a / "README.md").write_text("# a\n\n## Merging\n\nold\n\n## Limits\n\nmany\n")
    result = lorakit("verify", str(a), "--prompt", "the film was good", "--dtype", "bf16", "--card")
    assert result.exit_code == 0, result.output
    assert f"Merging changes nothing: with {a} merged in float32, logits differ by" in result.stdout
    assert "Merging in bfloat16 costs" in result.stdout
    card = (a / "README.md").read_text()
    assert "old" not in card
    assert card.index("## Merging") < card.index("Merging in bfloat16") < card.index("## Limits")
    result = lorakit("verify", str(a), "--file", str(tmp_path / "none"))
    assert result.exit_code == 2
    assert "there is no file" in result.stderr


def test_inspect_says_what_training_did_in_one_line(base: Path, lorakit: Run, tmp_path: Path) -> None:
    adapter = lk.attach(AutoModelForCausalLM.from_pretrained(base), lk.LoRA(rank=2), target_modules=["q_proj"])
    before = {"rows": 10, "loss": 10.861, "perplexity": 5.2e4, "token_accuracy": 0.012, "exact_match": None}
    record = {
        "train_rows": 56,
        "steps": 1,
        "before": before,
        "after": {**before, "loss": 9.993, "token_accuracy": 0.58},
    }
    adapter.save(tmp_path / "a", base=str(base), record=record)
    shown = lorakit("inspect", str(tmp_path / "a")).stdout
    assert "trained on 56 rows, 1 step: loss 10.86 -> 9.99, token accuracy 1% -> 58%\n" in shown
