"""The configuration of a run: what a file and flags may say, and how each wrong one is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import lorakit as lk
import lorakit.train.config.choices as choices
from lorakit.core.options import option
from lorakit.errors import LorakitError
from lorakit.experts import ROUTERS
from lorakit.init import Default, Normal
from lorakit.methods import DoRA, LoRA, LoRAFA
from lorakit.models.quantisation import FP4, Int8
from lorakit.train.config.fields import choice_fields
from lorakit.train.config.run import (
    DataOptions,
    EvaluateOptions,
    TrainConfig,
    TrainOptions,
    config_fields,
    load_config,
    to_yaml,
)

SMALL = "model: m\ndata: {train: rows.jsonl}\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def loaded(folder: Path, text: str, *overrides: str) -> TrainConfig:
    return load_config(written(folder, text), list(overrides))


def test_defaults_are_those_of_the_dataclasses(tmp_path: Path) -> None:
    config = loaded(tmp_path, SMALL)
    assert config == TrainConfig(model="m", data=DataOptions(train="rows.jsonl"))
    assert config.method == LoRA()
    assert config.init == Default()
    assert loaded(tmp_path, SMALL + "init: {name: normal, std: 1e-2}\n").init == Normal(std=0.01)
    assert config.data.train == "rows.jsonl"
    assert config.train == TrainOptions()


def test_the_file_may_be_absent() -> None:
    config = load_config(None, ["--model", "m", "--data.train", "rows.jsonl"])
    assert config == TrainConfig(model="m", data=DataOptions(train="rows.jsonl"))


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".0001"])
def test_numbers_are_numbers(tmp_path: Path, text: str) -> None:
    config = loaded(tmp_path, SMALL + f"train: {{learning_rate: {text}}}\n")
    assert config.train.learning_rate == 1e-4
    assert loaded(tmp_path, SMALL, "--train.learning-rate", text).train.learning_rate == 1e-4


def test_words_that_yaml_1_1_reads_as_booleans_are_words(tmp_path: Path) -> None:
    config = loaded(tmp_path, SMALL + "name: no\ntrain: {fast_path: off, output: on}\n")
    assert (config.name, config.train.fast_path, config.train.output) == ("no", "off", "on")


@pytest.mark.parametrize(
    "flags",
    [
        ["--rank", "8", "--train.max-steps", "20"],
        ["--rank=8", "--train.max_steps=20"],
        ["--set", "rank=8", "--set", "train.max_steps=20"],
        ["--set=rank=8", "--set=train.max-steps=20"],
        ["rank=8", "train.max_steps=20"],
        ["--method.rank", "8", "train.max_steps=20"],
        ["--method", "{name: lora}", "--rank", "8", "train.max_steps=20"],
        ["--method={rank: 8}", "train.max_steps=20"],
    ],
)
def test_every_spelling_of_a_flag_wins_over_the_file(tmp_path: Path, flags: list[str]) -> None:
    for text in ("rank: 16\n", "method: {name: lora, rank: 16}\n", "method: {rank: 16}\n"):
        config = loaded(tmp_path, SMALL + text + "train: {max_steps: 9, epochs: 2}\n", *flags)
        assert config.method == LoRA(rank=8)
        assert (config.train.max_steps, config.train.epochs) == (20, 2.0)


def test_switches_lists_and_mappings_as_flags(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        SMALL + "rank_pattern: {k_proj: 2}\n",
        "--no-data.completion-only-loss",
        "--rslora",
        "--train.keep-best",
        "false",
        "--target-modules",
        "q_proj,v_proj",
        "--layers",
        "0,2",
        "--set",
        "rank_pattern.model.layers.0.q_proj=4",
        "--train.report-to",
        "tensorboard",
        "--train.optimizer-options",
        "{betas: [0.9, 0.95]}",
        "--data.limit",
        "none",
        "--bias",
        "none",
    )
    assert config.data.completion_only_loss is False
    assert config.method == LoRA(rslora=True)
    assert config.train.keep_best is False
    assert config.target_modules == ("q_proj", "v_proj")
    assert config.layers == (0, 2)
    assert config.patterns == {"rank": {"k_proj": 2, "model.layers.0.q_proj": 4}}
    assert config.train.report_to == ("tensorboard",)
    assert config.train.optimizer_options == {"betas": [0.9, 0.95]}
    assert config.data.limit is None
    assert config.bias == "none"


def test_a_regular_expression_is_not_taken_for_a_list(tmp_path: Path) -> None:
    pattern = r".*\.(q|k){1,2}_proj"
    assert loaded(tmp_path, SMALL, "--target-modules", pattern).target_modules == pattern
    assert loaded(tmp_path, SMALL, "--target-modules", "all-linear").target_modules == "all-linear"


def test_text_stays_text(tmp_path: Path) -> None:
    config = loaded(tmp_path, SMALL, "--model", "123", "--data.system", "a=b, c: d", "--name", "true")
    assert (config.model, config.data.system, config.name) == ("123", "a=b, c: d", "true")


REFUSED = [
    ("rnk: 8\n", [], r'unknown option "rnk" in .*run\.yaml, line 3; did you mean "rank"'),
    (
        "train:\n  epochs: 1\n  max_stps: 3\n",
        [],
        r'"train\.max_stps" in .*, line 5; did you mean "train\.max_steps"',
    ),
    (
        "",
        ["--train.lerning-rate", "1"],
        r'"train\.lerning_rate" in the flags .*did you mean "train\.learning_rate"',
    ),
    ("lora_alpha: 8\n", [], r'"lora_alpha".*lorakit calls it "alpha"'),
    ("max_steps: 8\n", [], r'"max_steps".*lorakit calls it "train\.max_steps"'),
    (
        "train: {max_steps: ten}\n",
        [],
        r"train\.max_steps: expected an integer of at least 1, or null, found 'ten' .*line 3",
    ),
    ("train: {max_steps: 1.5}\n", [], r"train\.max_steps: expected an integer of at least 1, or null, found 1\.5"),
    ("train: {batch_size: true}\n", [], r"train\.batch_size: expected an integer of at least 1, found true"),
    ("train: {batch_size: 010}\n", [], r"train\.batch_size: expected an integer of at least 1, found '010'"),
    ("train: {learning_rate: .nan}\n", [], r"train\.learning_rate: expected a number above 0, or null, found nan"),
    ("data: {template: 3}\n", [], "is given twice"),
    ("name: 3\n", [], r"name: expected text, found 3"),
    ("train: 3\n", [], r"train: expected a section with options, found 3"),
    ("train: {keep_best: yes}\n", [], r"train\.keep_best: expected true or false, found 'yes'"),
    (
        "",
        ["--train.max-steps", "ten"],
        r"train\.max_steps: expected an integer of at least 1, or null, found 'ten' \(--train\.max-steps\)",
    ),
    ("", ["--train.max-steps"], r"--train\.max-steps: expected a value"),
    ("", ["--train.epochs", "--rank"], r"--train\.epochs: expected a value after it, found --rank"),
    ("", ["rank"], r'"rank": expected --NAME VALUE'),
    ("", ["--set", "rank"], r"expected NAME=VALUE"),
    ("", ["--train", "3"], r"train is a section; set one of its options: train\.output"),
    ("train: {learning_rate: 0}\n", [], r"train\.learning_rate: expected a number above 0, or null, found 0 .*line 3"),
    (
        "train: {label_smoothing: 1}\n",
        [],
        r"label_smoothing: expected a number of at least 0 and below 1, found 1",
    ),
    ("", ["--train.batch-size", "0"], r"train\.batch_size: expected an integer of at least 1, found 0"),
    ("rank: 0\n", [], r"method\.rank: expected an integer of at least 1, found 0 .*line 3"),
    (
        "",
        ["--dropout", "1.0"],
        r"method\.dropout: expected a number of at least 0 and below 1, found 1\.0 \(--dropout\)",
    ),
    (
        "train: {precision: bf-16}\n",
        [],
        r"expected one of auto, bf16, fp16, fp32, found 'bf-16'.*did you mean \"bf16\"",
    ),
    ("method: lra\n", [], r'unknown method "lra" in .*line 3; did you mean "lora"'),
    ("method: {name: lora, rnk: 2}\n", [], r'unknown option of lora "rnk" in .*line 3; did you mean "rank"'),
    ("method: [lora]\n", [], r"method: expected the name of a known method, or a mapping"),
    ("rank: 3\nmethod: {rank: 4}\n", [], r"rank is given twice: .*line 3 and .*line 4"),
    ("init: kaimin\n", [], r'unknown init "kaimin" in .*line 3; did you mean "kaiming"'),
    ("init: {name: gaussian, scale: 2}\n", [], r'unknown option of gaussian "scale" in .*line 3'),
    ("name: a\nname: b\n", [], r'line 4: "name" is given twice \(first in line 3\)'),
    ("train:\n  seed: 1\n  seed: 2\n", [], r'line 5: "train\.seed" is given twice \(first in line 4\)'),
    ("1: 2\n", [], r'line 3: the name "1" must be text'),
    ("train: {epochs: 1\n", [], r"run\.yaml, line \d+: this is not YAML"),
    (
        "train: {early_stopping_patience: 2}\n",
        [],
        r"early_stopping_patience is 2, which needs rows to evaluate on.*run\.yaml",
    ),
    ("method: dora\nrank: 0\n", [], r"method\.rank: expected an integer of at least 1, found 0 .*line 4"),
    ("", ["--method", "dora", "--rank", "0"], r"method\.rank: expected an integer of at least 1, found 0 \(--rank\)"),
    (
        "method: {name: dora, inner: {name: lokr, factr: 3}}\n",
        [],
        r'option of lokr "factr" in .*line 3; did you mean "factor"',
    ),
    ("method: null\n", [], r"method: expected the name of a known method, .* found nothing"),
    (
        "train.epochs: 3\n",
        [],
        r'"train\.epochs" in .*line 3: in a file it stands in its section, train: \{epochs: \.\.\.\}',
    ),
    ("quantize: {name: hqq, bits: 5}\n", [], r"quantize\.bits: expected 8, 4, 3, 2 or 1, found 5 .*line 3"),
    ("", ["--data.columns", "3"], r"data\.columns: expected a mapping from names to text, found .*--data\.columns"),
    ("", ["--packing", "off"], r'unknown option "packing" .*lorakit calls it "train\.fast_path"'),
    ("", ["--evaluate.answers", "score"], r"needs evaluate\.choices of at least two"),
    ("", ["--data.evaluation", "a", "--data.evaluation-size", "3"], r"keep one"),
]


@pytest.mark.parametrize(("text", "flags", "message"), REFUSED)
def test_what_is_wrong_is_refused_by_name_and_place(tmp_path: Path, text: str, flags: list[str], message: str) -> None:
    with pytest.raises(LorakitError, match=message):
        loaded(tmp_path, SMALL + text, *flags)


def test_a_missing_option_says_how_to_give_it(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match=r"model is missing.*the base model.*--model"):
        loaded(tmp_path, "data: {train: a}\n")
    with pytest.raises(LorakitError, match=r"data\.train is missing.*--data\.train"):
        loaded(tmp_path, "model: m\n")
    with pytest.raises(LorakitError, match=r"model is missing"):
        loaded(tmp_path, "")
    with pytest.raises(LorakitError, match=r"there is no file .*other\.yaml\. Did you mean .*run\.yaml"):
        load_config(tmp_path / "other.yaml")
    with pytest.raises(LorakitError, match=r"expected options such as"):
        loaded(tmp_path, "- a\n")


def test_python_is_checked_as_files_are() -> None:
    with pytest.raises(LorakitError, match=r"train\.batch_size: expected an integer of at least 1, found 0"):
        TrainOptions(batch_size=0)
    with pytest.raises(LorakitError, match=r"train\.batch_size: expected an integer of at least 1, found '8'"):
        TrainOptions(batch_size="8")  # type: ignore[arg-type]
    with pytest.raises(LorakitError, match="at least two"):
        EvaluateOptions(answers="score", choices=("one",))
    with pytest.raises(LorakitError, match="rank is given twice, once inside inner"):
        TrainConfig(model="m", data=DataOptions(train="a"), method={"name": "dora", "inner": LoRA(), "rank": 4})
    config = TrainConfig(model="m", data=DataOptions(train="a"), target_modules=["q", "v"])  # type: ignore[arg-type]
    assert config.target_modules == ("q", "v")
    with pytest.raises(ValidationError, match="frozen"):
        config.model = "n"  # type: ignore[misc]
    assert config.replace(train__max_steps=3, name="b").train.max_steps == 3
    with pytest.raises(LorakitError, match=r"train\.max_steps"):
        config.replace(train__max_steps=0)


def test_a_config_reads_back_exactly(tmp_path: Path) -> None:
    config = load_config(
        written(tmp_path, SMALL),
        [
            *(
                "--rank",
                "8",
                "--rslora",
                "--layers",
                "1,2",
                "--rank-pattern",
                "{'^a.b$': 4}",
                "--alpha-pattern.x=0.1",
            ),
            *(
                "--data.columns",
                "{prompt: question}",
                "--train.learning-rate",
                "3e-05",
                "--train.warmup",
                "10",
            ),
            *(
                "--data.template",
                "### IN\n{prompt}\n\n### OUT\n  {completion}\r\n",
                "--data.system",
                "off: # 'x' ☃\x85",
            ),
            *("--train.resume", "true", "--evaluate.choices", "yes,no", "--evaluate.answers", "score"),
        ],
    )
    for comments in (True, False):
        text = to_yaml(config, comments)
        again = loaded(tmp_path, text)
        assert again == config
        assert to_yaml(again, comments) == text
    assert config.train.warmup == 10
    assert isinstance(config.train.warmup, int)
    assert "# the highest learning rate" in to_yaml(config)


@settings(max_examples=50, deadline=None)
@given(text=st.text(), number=st.floats(min_value=1e-300, allow_infinity=False, exclude_min=True))
def test_any_text_and_number_reads_back(tmp_path_factory: pytest.TempPathFactory, text: str, number: float) -> None:
    text = text.encode("utf-8", "ignore").decode() or "m"
    config = TrainConfig(
        model=text or "a",
        data=DataOptions(train=(text, "b"), columns={text: text}, template=f"a\n{text}\n"),
        train=TrainOptions(learning_rate=number),
    )
    folder = tmp_path_factory.mktemp("yaml", numbered=True)
    assert loaded(folder, to_yaml(config)) == config


def test_fields_describe_every_option_and_each_makes_a_flag(tmp_path: Path) -> None:
    fields = {field.name: field for field in config_fields()}
    assert all(field.doc and "\n" not in field.doc for field in fields.values())
    assert fields["train.max_steps"].flag == "--train.max-steps"
    assert fields["model"].is_required
    assert fields["model"].default_text == ""
    assert fields["rank"].section == "method"
    assert fields["rank"].default == 16
    assert fields["rslora"].is_switch
    assert fields["train.precision"].choices == ("auto", "bf16", "fp16", "fp32")
    assert fields["train.learning_rate"].default_text == "null"
    assert fields["train.warmup"].default_text == "0.03"
    config = TrainConfig(model="m", data=DataOptions(train="rows.jsonl"))
    for field in fields.values():  # the default, given as a flag, changes nothing
        if not field.is_required and (
            field.section != "method" or field.name in ("rank", "alpha", "dropout", "rslora")
        ):
            assert loaded(tmp_path, SMALL, f"{field.flag}={field.default_text}") == config, field.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    """A method of the test."""

    rank: int = option(4, "how wide it is")
    kind: str = option("a", "which")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Around:
    """A method of the test that holds another."""

    inner: Plain = Plain()
    share: float = 0.5


class Marker:
    """What methods of the test may be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Narrow(Marker):
    """A method of the test without a rank."""

    gain: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thick(Marker):
    """A method of the test."""

    depth: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    """A method of the test that may hold several others."""

    inner: Marker = Thick()


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    rows = {"lora": LoRA, "plain": Plain, "around": Around, "narrow": Narrow, "thick": Thick, "holder": Holder}
    inits = {"default": Default, "pissa": Narrow}
    monkeypatch.setattr("lorakit.files.table.TABLE", rows)
    monkeypatch.setattr("lorakit.init.INITIALISERS", inits)
    return rows


def test_a_new_row_of_the_table_is_known_to_files_and_flags(table: dict[str, Any], tmp_path: Path) -> None:
    assert loaded(tmp_path, SMALL + "method: plain\nrank: 2\n").method == Plain(rank=2)
    assert loaded(tmp_path, SMALL + "rank: 2\n", "--method", "plain", "--kind", "b").method == Plain(rank=2, kind="b")
    wanted = Around(inner=Plain(rank=2), share=0.25)
    assert loaded(tmp_path, SMALL + "method: around\n", "--rank", "2", "--share", "0.25").method == wanted
    nested = "method: {name: around, share: 0.25, inner: {name: plain, rank: 2}}\n"
    assert loaded(tmp_path, SMALL + nested).method == wanted
    config = loaded(tmp_path, SMALL + nested + "init: {name: pissa, gain: 4}\n")
    assert config.init == Narrow(gain=4.0)
    assert loaded(tmp_path, to_yaml(config)) == config
    assert loaded(tmp_path, SMALL, "--init", "pissa").init == Narrow()
    assert loaded(tmp_path, SMALL, "--init", "pissa", "--init.gain", "3").init == Narrow(gain=3.0)
    narrow = loaded(tmp_path, SMALL + "method: {name: holder, inner: narrow}\n", "--gain", "2").method
    assert narrow == Holder(inner=Narrow(gain=2.0))
    assert {field.name: field.doc for field in choice_fields("method", "plain")} == {
        "rank": "how wide it is",
        "kind": "which",
    }


def test_every_method_and_its_options_make_flags(tmp_path: Path) -> None:
    table = choices.methods()
    for name, spec in table.items():
        chosen = ["--method", name, *(["--adapters", "[a, b]"] if name in ROUTERS else [])]
        config = loaded(tmp_path, SMALL, *chosen)
        assert type(config.method) is spec
        assert loaded(tmp_path, to_yaml(config)) == config
        owners = choices.METHOD.reachable(spec)
        flags = []
        for field in config_fields():
            if field.section != "method" or field.name not in owners:
                continue
            own = next(one for one in choice_fields("method", name) if one.name == field.name)
            if own.default == field.default:  # methods may have options of one name with defaults of their own
                flags.append(f"{field.flag}={field.default_text}")
        assert loaded(tmp_path, SMALL, *chosen, *flags) == config
    assert loaded(tmp_path, SMALL, "--method", "dora", "--rank", "2").method == DoRA(inner=LoRA(rank=2))
    assert loaded(tmp_path, SMALL + "rank: 2\nmethod: {name: dora, inner: lora-fa}\n").method == DoRA(
        inner=LoRAFA(rank=2)
    )


def test_an_option_of_another_method_is_refused(table: dict[str, Any], tmp_path: Path) -> None:
    message = r"narrow has no rank; rank belongs to lora, plain, around\. Options of narrow: gain\. \(%s\)"
    with pytest.raises(LorakitError, match=message % ".*line 3"):
        loaded(tmp_path, SMALL + "rank: 8\nmethod: narrow\n")
    with pytest.raises(LorakitError, match=message % "--rank"):
        loaded(tmp_path, SMALL, "--method", "narrow", "--rank", "8")
    with pytest.raises(LorakitError, match=message % "--rank"):
        loaded(tmp_path, SMALL + "rank: 8\n", "--rank", "8", "--method", "narrow")
    with pytest.raises(LorakitError, match=r"method\.gain: expected a number, found 'wide'"):
        loaded(tmp_path, SMALL + "method: {name: narrow, gain: wide}\n")


def test_another_method_by_a_flag_leaves_the_files_own_options_out(
    table: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = SMALL + "method: around\nrank: 2\nshare: 0.25\n"
    assert loaded(tmp_path, text, "--method", "plain").method == Plain(rank=2)
    assert "method: share (" in caplog.text
    assert "line 5): of around, and no option of plain, which the flags ask for; left out." in caplog.text
    assert "rank" not in caplog.text, "both have it"
    caplog.clear()
    assert loaded(tmp_path, text, "--method", "narrow", "--gain", "2").method == Narrow(gain=2.0)
    assert "rank (" in caplog.text
    assert "share (" in caplog.text
    caplog.clear()
    assert loaded(tmp_path, text, "--method", "around").method == Around(inner=Plain(rank=2), share=0.25)
    assert loaded(tmp_path, SMALL + "rank: 2\n", "--method", "lora", "--rank", "3").method == LoRA(rank=3)
    assert not caplog.text
    with pytest.raises(LorakitError, match=r'unknown option of plain "shaer" in .*line 3'):  # no option of either
        loaded(tmp_path, SMALL + "method: {name: around, shaer: 1}\n", "--method", "plain")
    with pytest.raises(LorakitError, match=r'unknown method "plan" in --method; did you mean "plain"'):
        loaded(tmp_path, text, "--method", "plan")


def test_another_start_or_format_by_a_flag_leaves_the_files_own_options_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = SMALL + "init: {name: normal, std: 0.1}\nquantize: {name: nf4, double: false, skip: [a]}\n"
    assert loaded(tmp_path, text, "--init", "default").init == Default()
    assert "init: std (" in caplog.text
    assert loaded(tmp_path, text, "--quantize", "int8").quantize == Int8(skip=("a",))
    assert "quantize: double (" in caplog.text
    assert loaded(tmp_path, text, "--quantize", "none").quantize is None
    assert loaded(tmp_path, text, "--quantize", "fp4").quantize == FP4(double=False, skip=("a",))


def test_the_arguments_of_attach_are_plain(tmp_path: Path) -> None:
    config = loaded(tmp_path, SMALL, "--target-modules", "[q_proj]", "--rank-pattern.q_proj=4", "--name", "a")
    assert config.attach_arguments() == {
        "name": "a",
        "target_modules": ["q_proj"],
        "exclude_modules": None,
        "layers": None,
        "patterns": {"rank": {"q_proj": 4}},
        "modules_to_save": None,
        "bias": "none",
        "init": Default(),
    }


def test_every_option_declared_as_a_pattern_differs_per_layer_in_files_and_flags(tmp_path: Path) -> None:
    text = SMALL + "method: fourierft\nn_frequency: 8\nn_frequency_pattern: {'0': 4}\n"
    config = loaded(tmp_path, text)
    assert config.patterns == {"n_frequency": {"0": 4}}
    assert loaded(tmp_path, to_yaml(config)) == config
    assert loaded(tmp_path, text, "--n-frequency-pattern.1", "6").patterns == {"n_frequency": {"0": 4, "1": 6}}
    assert loaded(tmp_path, text, "--n_frequency_pattern", "{'1': 6}").patterns == {"n_frequency": {"1": 6}}
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    adapter = lk.attach(model, config.method, **config.attach_arguments() | {"target_modules": ["0", "1"]})
    assert adapter.num_parameters() == 4 + 8
    assert loaded(tmp_path, SMALL + "method: ia3\nrank_pattern: {}\n").patterns == {}, "an empty one asks for nothing"
    for name, spec in choices.methods().items():
        chosen = ["--method", name, *(["--adapters", "[a, b]"] if name in ROUTERS else [])]
        default = spec()
        for differing, declared in choices.METHOD.patterns(default).items():
            value = declared.default
            flag = f"--{differing.replace('_', '-')}-pattern.some.layer={value}"
            assert loaded(tmp_path, SMALL, *chosen, flag).patterns == {differing: {"some.layer": value}}
    for wrong, message in (
        (
            "method: fourierft\nrank_pattern: {q: 4}\n",
            r"rank_pattern was given, but fourierft has no rank per layer; .*line 4",
        ),
        ("rank_pattern: {q: four}\n", r"patterns\.rank\.q: expected an integer of at least 1, found 'four' .*line 3"),
        ("rank_pattern: 3\n", r"patterns\.rank: expected a mapping from names of layers to values, found 3 .*line 3"),
        ("rnk_pattern: {q: 3}\n", r'unknown option "rnk_pattern" .*line 3; did you mean "rank_pattern"'),
        ("rank_pattern: {q: 3}\npatterns: {rank: {q: 4}}\n", r"rank_pattern is given twice: .*line 3 and .*line 4"),
    ):
        with pytest.raises(LorakitError, match=message):
            loaded(tmp_path, SMALL + wrong)
