"""The command line as a user meets it: every verb on a tiny model, and every mistake as one clear line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

Run = Callable[..., Result]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[2, 7, 9, 12, 3], [2, 8, 11, 6, 3]])).logits


def test_help_names_every_verb(lorakit: Run) -> None:
    result = lorakit("--help")
    assert result.exit_code == 0
    for verb in ("train", "eval", "generate", "chat", "merge", "inspect"):
        assert verb in result.output


@pytest.mark.parametrize("verb", ["eval", "generate", "chat", "merge", "inspect"])
def test_every_verb_has_help(lorakit: Run, verb: str) -> None:
    result = lorakit(verb, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "heavy"),
    [
        (["--help"], 0, {"torch", "transformers", "datasets", "matplotlib"}),
        (["train", "--help"], 0, {"torch", "transformers", "datasets", "matplotlib"}),
        (["train", "--schema"], 0, {"transformers", "datasets", "matplotlib"}),
        (["train", "--rank", "many"], 2, {"transformers", "datasets", "matplotlib"}),
    ],
)
def test_help_and_mistakes_do_not_wait_for_heavy_imports(arguments: list[str], code: int, heavy: set[str]) -> None:
    """What names a method has to import the methods, and they torch."""
    program = (
        "import sys\n"
        "from lorakit.cli import main\n"
        f"sys.argv = ['lorakit', *{arguments}]\n"
        "try: main()\n"
        f"except SystemExit as end: assert end.code == {code}, end.code\n"
        f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("columns", [80, 120])
def test_train_help_shows_every_option_within_the_terminal(
    lorakit: Run, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    from lorakit.train.config.fields import choice_fields, config_fields, run_fields

    monkeypatch.setenv("COLUMNS", str(columns))
    result = lorakit("train", "--help")
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= columns
    own = {option.flag for option in run_fields()}
    assert own <= set(result.output.split())
    assert "default 0.03" in result.output
    for words in (
        "gradient checkpointing",
        "packing",
        "device",
        "gpu",
        "quantise",
        "resume",
        "neftune",
        "learning rate",
    ):
        assert words in result.output, words
    others = {option.flag for option in config_fields()} - own
    assert not others & set(result.output.split()), "the options of a method come with that method"
    for named in (["--method", "dora"], ["method=dora"], ["--method.inner", "lora-fa", "--method=dora"]):
        shown = lorakit("train", *named, "--help").output
        assert max(map(len, shown.splitlines())) <= columns
        assert {option.flag for option in choice_fields("method", "dora")} <= set(shown.split())
        assert "--tokens" not in shown.split()


def test_train_help_shows_the_options_of_the_files_method(lorakit: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("method: prompt-tuning\n")
    shown = lorakit("train", str(tmp_path / "run.yaml"), "--help").output.split()
    assert "--tokens" in shown
    assert "--rank" not in shown
    wrong = lorakit("train", "--method", "loraa", "--help")
    assert wrong.exit_code == 2
    assert 'did you mean "lora"' in wrong.stderr


def test_methods_shows_one_method_whole(lorakit: Run) -> None:
    from lorakit.core.options import options_of
    from lorakit.files.table import TABLE

    for name, spec in TABLE.items():
        data = json.loads(lorakit("methods", name, "--json").stdout)
        assert data["formula"] == spec.card.formula
        assert {option["name"] for option in data["options"]} >= set(options_of(spec))
        assert all(option["doc"] for option in data["options"]), name
    shown = " ".join(lorakit("methods", "fourierft").stdout.split())  # as one line, whatever the width
    for words in ("2405.03003", "--n-frequency", "an integer of at least 1", "default 1000", "parameters", "limits"):
        assert words in shown, words
    wrong = lorakit("methods", "fouriertf")
    assert wrong.exit_code == 2
    assert 'did you mean "fourierft"' in wrong.stderr


def test_train_leaves_an_adapter_that_peft_loads_and_a_report(base: Path, adapter: Path) -> None:
    names = {path.name for path in adapter.iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorakit.json",
        "README.md",
        "train.yaml",
        "metrics.jsonl",
        "curves.png",
        "checkpoints",
    }
    import lorakit as lk

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    ours = AutoModelForCausalLM.from_pretrained(base)
    plain = logits(ours)
    lk.load(ours, adapter)
    with lk.use(ours, "yesno"):
        torch.testing.assert_close(logits(ours), logits(theirs))
    assert not torch.allclose(plain, logits(theirs)), "the adapter must do something for this to mean anything"
    card = (adapter / "README.md").read_text()
    assert "accuracy" in card
    assert "30 rows, 10 held out" in card
    record = json.loads((adapter / "lorakit.json").read_text())["record"]
    assert record["steps"] == 120
    assert record["after"]["loss"] < record["before"]["loss"]
    metrics = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "learning_rate", "token_accuracy", "tokens_per_second"} <= set(metrics[0])


def test_the_cards_snippets_run_as_printed(adapter: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (adapter / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    found = []
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
        found.append(logits(names["model"]))
    assert len(found) == 2
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_the_stored_configuration_makes_the_run_again(adapter: Path, lorakit: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    again = tmp_path / "again"
    assert lorakit("train", str(adapter / "train.yaml"), f"--train.output={again}").exit_code == 0
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_flags_override_the_file(config: Path, lorakit: Run, tmp_path: Path) -> None:
    result = lorakit(
        "train", str(config), "--rank", "2", "--train.max-steps", "2", "--set", f"train.output={tmp_path / 'a'}"
    )
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert saved["r"] == 2
    assert json.loads((tmp_path / "a" / "lorakit.json").read_text())["record"]["steps"] == 2


def test_training_prints_before_and_after(config: Path, lorakit: Run, tmp_path: Path) -> None:
    result = lorakit("train", str(config), f"--train.output={tmp_path / 'a'}")
    for shown in ("before", "after", "accuracy", "perplexity", "curves.png"):
        assert shown in result.stdout, shown
    for told in ("data: ", "adapter: LoRA", "fast path: no padding", "step 20/120", "weights as float32"):
        assert told in result.stderr, told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.max-stepz", "3"], 'unknown option "train.max_stepz"'),
        (["--rank", "many"], "expected an integer"),
        (["--rank"], "expected a value"),
        (["stray"], "expected --NAME VALUE"),
        (["--target-modules", "q_porj"], "q_porj"),
        (["--data.train", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--train.precision", "fp61"], "fp61"),
        (["--train.resume", "true"], "found no complete checkpoint"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    config: Path, lorakit: Run, tmp_path: Path, arguments: list[str], words: str
) -> None:
    result = lorakit("train", str(config), f"--train.output={tmp_path / 'a'}", *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()


def test_debug_shows_where_an_error_came_from(lorakit: Run) -> None:
    from lorakit.errors import LorakitError

    result = lorakit("train", "nowhere.yaml", "--debug")
    assert isinstance(result.exception, LorakitError)
    assert lorakit("train", "nowhere.yaml").exit_code == 2


def test_train_without_arguments_says_how(lorakit: Run) -> None:
    result = lorakit("train")
    assert result.exit_code == 2
    assert "Usage" in result.output


def test_a_second_run_into_a_finished_folder_replaces_it_when_asked(config: Path, lorakit: Run, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    for steps, more in (("2", []), ("3", ["--overwrite"])):
        result = lorakit("train", str(config), "--train.max-steps", steps, f"--train.output={tmp_path / 'a'}", *more)
        assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "a" / "lorakit.json").read_text())["record"]["steps"] == 3
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_eval_measures_the_folder_on_its_own_rows(adapter: Path, lorakit: Run) -> None:
    result = lorakit("eval", str(adapter), "--json")
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout)
    record = json.loads((adapter / "lorakit.json").read_text())["record"]
    for name, when in (("base", "before"), ("yesno", "after")):
        for key, value in record[when].items():
            assert numbers[name][key] == pytest.approx(value, rel=1e-5), (name, key)
    table = lorakit("eval", str(adapter)).stdout
    assert "base" in table
    assert "yesno" in table


def test_eval_takes_options_of_the_run(adapter: Path, lorakit: Run) -> None:
    result = lorakit("eval", str(adapter), "--json", "--no-base", "--evaluate.answers", "none")
    numbers = json.loads(result.stdout)
    assert list(numbers) == ["yesno"]
    assert "accuracy" not in numbers["yesno"]


def test_eval_without_rows_says_so(base: Path, rows: Path, lorakit: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {base}\ndata: {{train: {rows}}}\n")
    result = lorakit("eval", str(file))
    assert result.exit_code == 2
    assert "names no rows to evaluate on" in result.stderr


def test_inspect_tells_what_an_adapter_is(adapter: Path, base: Path, lorakit: Run) -> None:
    result = lorakit("inspect", str(adapter))
    assert result.exit_code == 0, result.output
    for shown in ("lora", str(base), "model.layers.0.self_attn.q_proj", "14 layers", "trained on 30 rows"):
        assert shown in result.stdout, shown
    report = json.loads(lorakit("inspect", str(adapter), "--json", "--top", "4").stdout)
    import lorakit as lk

    model = AutoModelForCausalLM.from_pretrained(base)
    before = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    lk.load(model, adapter)
    lk.merge(model, "yesno")
    delta = model.model.layers[1].mlp.up_proj.weight.detach() - before
    layer = next(layer for layer in report["layers"] if layer["name"] == "model.layers.1.mlp.up_proj")
    assert layer["singular_values"] == pytest.approx(torch.linalg.svdvals(delta)[:4].tolist(), rel=1e-3)
    assert layer["norm"] == pytest.approx(float(delta.norm()), rel=1e-3)
    assert (layer["rank"], layer["scale"]) == (8, 4.0)
    assert report["parameters"] == sum(layer["parameters"] for layer in report["layers"])


def test_inspect_of_no_adapter_says_so(base: Path, lorakit: Run) -> None:
    result = lorakit("inspect", str(base))
    assert result.exit_code == 2
    assert "adapter_config.json" in result.stderr


def test_merge_writes_a_model_that_transformers_loads(base: Path, adapter: Path, lorakit: Run, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    result = lorakit("merge", str(base), str(adapter), "--output", str(output))
    assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(output)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    torch.testing.assert_close(logits(merged), logits(theirs), rtol=1e-4, atol=1e-5)
    assert merged.dtype == torch.float32, "auto keeps the base's own number format"
    assert AutoTokenizer.from_pretrained(output).chat_template
    again = lorakit("merge", str(base), str(adapter), "--output", str(output))
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    half = lorakit("merge", str(base), str(adapter), "--output", str(tmp_path / "half"), "--dtype", "bf16")
    assert half.exit_code == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16


def test_generate_answers_every_prompt_with_every_adapter(base: Path, adapter: Path, lorakit: Run) -> None:
    result = lorakit(
        "generate", str(base), "-a", str(adapter), "-p", "the film was good", "-p", "a play was bad", "--dtype", "fp32"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["yes", "no"], "the tiny run has learned its forty rows"
    plain = lorakit("generate", str(base), "-p", "the film was good", "--max-new-tokens", "3", "--dtype", "fp32")
    assert plain.stdout.strip() != "yes"


def test_generate_takes_prompts_from_stdin(base: Path, adapter: Path, lorakit: Run) -> None:
    piped = "the film was good\n\na play was bad\n"
    result = lorakit("generate", str(base), "-a", str(adapter), "--dtype", "fp32", stdin=piped)
    assert result.stdout.splitlines() == ["yes", "no"]
    assert lorakit("generate", str(base), stdin="").exit_code == 2


def test_chat_switches_in_the_middle_and_remembers(
    base: Path, adapter: Path, lorakit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.cli.conversation import Speaker

    seen: list[tuple[str | None, str]] = []
    speak = Speaker.speak

    def listen(self: Speaker, prompt: list[int], route: str | None = None, **options: object) -> str:
        seen.append((route, self.tokenizer.decode(prompt)))
        return speak(self, prompt, route, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Speaker, "speak", listen)
    lines = [
        "the film was good",
        "/base",
        "a play was bad",
        "/adapter yesno",
        "it is fine",
        "/adapter yesnoo",
        "/adapter",
        "/nonsense",
        "/clear",
        "so what",
        "/quit",
        "never said",
    ]
    options = ("--temperature", "0", "--max-new-tokens", "2", "--dtype", "fp32")
    result = lorakit("chat", str(base), "-a", str(adapter), *options, stdin="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.output
    assert [route for route, _ in seen] == ["yesno", None, "yesno", "yesno"]
    assert "the film was good" in seen[2][1], "the history goes on over a switch"
    assert "the film was good" not in seen[3][1], "/clear forgets"
    assert 'did you mean "yesno"' in result.stderr
    assert "adapters: yesno" in result.stdout
    assert "/adapter NAME" in result.stdout
    assert "never said" not in "".join(text for _, text in seen)
    assert result.stdout.splitlines()[0] == "yes"


def test_a_prompt_too_long_for_the_model_does_not_end_the_chat(base: Path, lorakit: Run) -> None:
    lines = "good " * 200 + "\nthe film was good\n"
    result = lorakit("chat", str(base), "--max-new-tokens", "2", "--temperature", "0", "--dtype", "fp32", stdin=lines)
    assert result.exit_code == 0
    assert "this model reads 128" in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_an_adapter_is_asked_as_it_was_trained(config: Path, base: Path, lorakit: Run, tmp_path: Path) -> None:
    """From train to generate, eval and merge: the text template of the run goes with the adapter."""
    out = tmp_path / "asked"
    template = [
        "--data.template",
        "what is {prompt} so {completion}",
        "--train.max-steps",
        "1",
        "--train.output",
        str(out),
    ]
    assert lorakit("train", str(config), *template).exit_code == 0
    assert "chat_template.jinja" in {path.name for path in out.iterdir()}
    from lorakit.cli.conversation import Speaker

    speaker = Speaker(str(base), [out])
    turns = [{"role": "user", "content": "a good film"}]
    assert speaker.tokenizer.decode(speaker.encode(turns, "asked")) == "what is a good film so"
    assert speaker.tokenizer.decode(speaker.encode(turns)) == "<user> a good film <assistant>"
    found = lorakit("generate", str(base), "-a", str(out), "-p", "a good film", "--max-new-tokens", "2")
    assert found.exit_code == 0
    assert "is asked by the chat template of" in found.stderr
    found = lorakit("eval", str(config), "-a", str(out), "--json")
    assert found.exit_code == 0
    assert "asked by the chat template of" in found.stderr
    found = lorakit("merge", str(base), str(out), "-o", str(tmp_path / "merged"))
    assert "asked by the chat template of" in found.stdout
    assert "what is " in (tmp_path / "merged" / "chat_template.jinja").read_text()
