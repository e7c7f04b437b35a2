"""What a saved folder holds, and what is refused when one is read: every option, every kind of damage."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.experts import MEMBERS
from lorakit.files.prompt import PROMPT
from lorakit.files.store import CONFIG, OWN, TENSORS, load, read_config, read_own, read_tensors

FILES = (CONFIG, TENSORS, OWN)


class Small(nn.Module):
    """Layers of several kinds, each of its own sizes."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.words = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(width), "up": nn.Linear(width, 9), "down": nn.Linear(9, width)})
            for _ in range(3)
        )
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mix = nn.Conv1d(width, 5, 3, padding=1)
        self.head = nn.Linear(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](block["norm"](x))))  # type: ignore[index]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.mix(x.transpose(1, 2)).transpose(1, 2))


IDS = torch.arange(15).reshape(3, 5) % 11


def small(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Small:
    torch.manual_seed(seed)
    return Small(**options).to(dtype).eval()


def adapted(
    model: nn.Module | None = None, method: Any = None, seed: int = 1, **options: Any
) -> tuple[nn.Module, lk.Adapter]:
    model = small() if model is None else model
    adapter = lk.attach(model, method or lk.LoRA(rank=2), **{"target_modules": ["up", "down"], **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in adapter.parameters():
            one.add_(torch.randn(one.shape, generator=generator))
    model.eval()
    return model, adapter


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).clone()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank alpha dropout rslora": {"method": lk.LoRA(rank=3, alpha=7.5, dropout=0.25, rslora=True)},
    "dora": {"method": lk.DoRA(inner=lk.LoRA(rank=3, alpha=2))},
    "lora-fa": {"method": lk.LoRAFA(rank=3)},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "saved": {"modules_to_save": ["norm", "head"]},
    "saved only": {"target_modules": [], "modules_to_save": ["head"]},
    "every kind": {"target_modules": ["words", "up", "down", "attention", "mix", "head"], "bias": "all"},
    "layers": {"layers": range(1, 3)},
    "layers pattern": {"layers": 0, "layers_pattern": "blocks"},
    "regex": {"target_modules": r"blocks\.[02]\.(up|down)"},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["blocks.1.up"]},
    "overlapping patterns": {"rank_pattern": {r"1\.up": 4, "up": 3}, "alpha_pattern": {"down": 5, r"2\.down": 1}},
    "parts": {
        "target_modules": ["up"],
        "parts": {"up": {"q": (0, 4), "v": [(4, 6), (7, 9)]}},
        "bias": "lora_only",
    },
    "parts of other ranks": {
        "target_modules": ["up"],
        "parts": {"up": {"q": (0, 4), "v": (5, 9)}},
        "rank_pattern": {"up.v": 4},
    },
    "gaussian": {"init": "gaussian"},
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16)] + [("every kind", torch.float64)],
)
def test_round_trip_is_bit_equal(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every tensor, the spec and the request come back; a second save gives the very bytes of the first."""
    model, adapter = adapted(small(dtype=dtype), **CASES[case])
    adapter.requires_grad_(False)  # torch orders some sums otherwise where a gradient may be wanted
    wanted = run(model)
    adapter.save(tmp_path / "first", base="some/base", record={"steps": 3})
    again = small(dtype=dtype)
    back = load(again, tmp_path / "first", name="default")
    assert back.method == adapter.method
    assert back.targets == adapter.targets
    state = adapter.state_dict()
    assert back.state_dict().keys() == state.keys()
    for key, tensor in back.state_dict().items():
        assert torch.equal(tensor, state[key]), key
        assert tensor.dtype == torch.promote_types(dtype, torch.float32), key
    with lk.use(again, "default"):
        assert torch.equal(run(again), wanted)
    back.save(tmp_path / "second", base="some/base", record={"steps": 3})
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


@pytest.mark.parametrize("case", list(CASES))
def test_without_lorakits_own_file_it_acts_the_same(case: str, tmp_path: Path) -> None:
    """What PEFT's two files say is enough for the same function."""
    model, adapter = adapted(**CASES[case])
    wanted = run(model)
    adapter.save(tmp_path)
    (tmp_path / OWN).unlink()
    again = small()
    load(again, tmp_path, name="a")
    with lk.use(again, "a"):
        assert (run(again) - wanted).abs().max() <= 64 * torch.finfo(torch.float32).eps * wanted.abs().max()


def test_the_file_holds_exactly_the_declared_tensors(tmp_path: Path) -> None:
    _, adapter = adapted(target_modules=["up", "words", "mix"], bias="lora_only", modules_to_save=["head"])
    adapter.save(tmp_path)
    block = {
        f"base_model.model.blocks.{i}.up.{name}": shape
        for i in range(3)
        for name, shape in (("lora_A.weight", (2, 6)), ("lora_B.weight", (9, 2)), ("base_layer.bias", (9,)))
    }
    assert {key: tuple(one.shape) for key, one in load_file(tmp_path / TENSORS).items()} == {
        **block,
        "base_model.model.words.lora_embedding_A": (2, 11),
        "base_model.model.words.lora_embedding_B": (6, 2),
        "base_model.model.mix.lora_A.weight": (2, 6, 3),
        "base_model.model.mix.lora_B.weight": (5, 2, 1),
        "base_model.model.mix.base_layer.bias": (5,),
        "base_model.model.head.weight": (4, 5),
        "base_model.model.head.bias": (4,),
    }
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(FILES)
    with safe_open(tmp_path / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_json_files(tmp_path: Path) -> None:
    """Sorted, plain, and complete enough to tell what the adapter is without the model."""
    _, adapter = adapted(
        method=lk.LoRA(rank=2, alpha=8, rslora=True), rank_pattern={"down": 3}, modules_to_save=["head"]
    )
    adapter.save(tmp_path, base="some/base", record={"loss": 0.5, "data": ["reviews"]})
    config, own = read_config(tmp_path), read_own(tmp_path)
    for name in (CONFIG, OWN):
        text = (tmp_path / name).read_text()
        assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 8, True)
    assert config["target_modules"] == ["down", "up"]
    assert config["rank_pattern"] == {f"blocks.{i}.down": 3 for i in range(3)}
    assert config["modules_to_save"] == ["head"]
    assert config["base_model_name_or_path"] == "some/base"
    assert config["task_type"] is None
    assert config["auto_mapping"]["base_model_class"] == "Small"
    assert config["inference_mode"] is True
    assert own["format"] == 1
    assert own["lorakit_version"] == lk.__version__
    assert own["method"] == {"name": "lora", "rank": 2, "alpha": 8, "dropout": 0.0, "rslora": True, "lora_bias": False}
    assert own["targets"]["target_modules"] == ["up", "down"]
    assert own["record"] == {"loss": 0.5, "data": ["reviews"]}
    assert own["base"]["name"] == "some/base"
    assert own["base"]["fingerprint"]["architecture"] == "Small"
    assert set(own["files"]) == {CONFIG, TENSORS}


def test_the_state_of_the_model_is_not_in_the_file(tmp_path: Path) -> None:
    """Active or not, beside others, in training mode or not, trainable or not: the same bytes."""
    model, adapter = adapted(modules_to_save=["head"])
    adapter.save(tmp_path / "0")

    def same(number: int) -> None:
        adapter.save(tmp_path / str(number))
        assert_equal(number)

    def assert_equal(number: int) -> None:
        for name in FILES:
            assert (tmp_path / "0" / name).read_bytes() == (tmp_path / str(number) / name).read_bytes(), name

    lk.activate(model, None)
    same(1)
    lk.attach(model, lk.LoRA(rank=3), name="other", target_modules=["up", "mix"], modules_to_save=["head"])
    same(2)
    with lk.use(model, ["default", None, "other"]):
        same(3)
    model.train()
    adapter.requires_grad_(False)
    same(4)
    for merged in ("default", "other", {"default": 0.5, "other": -1.0}):
        with lk.merged(model, merged):
            same(5)
    again = load(model, tmp_path / "5", name="again")
    lk.detach(model, "default")
    again.save(tmp_path / "6")
    assert_equal(6)


def test_an_adapter_that_is_gone_overwrites_nothing(tmp_path: Path) -> None:
    model, adapter = adapted()
    adapter.save(tmp_path)
    lk.detach(model)
    for _ in range(2):
        with pytest.raises(LorakitError, match="save: adapter 'default' has been taken off its model"):
            adapter.save(tmp_path)
        if not lk.adapters(model):
            adapted(model)  # another of the same name does not bring the first back
    assert len(read_tensors(tmp_path)) == 12


def test_trained_modules_alone_while_merged(tmp_path: Path) -> None:
    """An adapter without deltas is told by the modules that it replaces, as they were before a merge."""
    model, adapter = adapted(target_modules=[], modules_to_save=["head"])
    adapter.save(tmp_path / "a")
    with lk.merged(model, "default"):
        adapter.save(tmp_path / "b")
    assert (tmp_path / "a" / OWN).read_bytes() == (tmp_path / "b" / OWN).read_bytes()


def test_names_of_adapters_are_not_in_the_file(tmp_path: Path) -> None:
    model, adapter = adapted()
    _, other = adapted(name="sql")
    adapter.save(tmp_path / "a")
    other.save(tmp_path / "b")
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert model is not other.model


def test_loading_in_any_order_gives_the_same(tmp_path: Path) -> None:
    """Two adapters over partly the same layers, of other methods and ranks, with parts of layers replaced."""
    _, adapter = adapted(bias="all", modules_to_save=["norm"])
    adapter.save(tmp_path / "a")
    _, adapter = adapted(
        method=lk.DoRA(inner=lk.LoRA(rank=3)),
        target_modules=["up", "mix", "attention"],
        modules_to_save=["head"],
        seed=2,
    )
    adapter.save(tmp_path / "b")
    outputs = []
    for order in ("ab", "ba"):
        model = small()
        for name in order:
            load(model, tmp_path / name)
        for route in ("a", "b", {"a": 0.5, "b": 0.25}, ["a", "b", None]):
            with lk.use(model, route):
                outputs.append(run(model))
        for name in "ab":
            lk.adapters(model)[name].save(tmp_path / f"{name}{order}")
    for first, second in zip(outputs[:4], outputs[4:], strict=True):
        assert torch.equal(first, second)
    for name in "ab":
        for file in FILES:
            assert (tmp_path / f"{name}ab" / file).read_bytes() == (tmp_path / f"{name}ba" / file).read_bytes()
            assert (tmp_path / f"{name}ab" / file).read_bytes() == (tmp_path / name / file).read_bytes()


# -- what is refused ---------------------------------------------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def retensor(folder: Path, change: Any) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


KEY = "base_model.model.blocks.1.up.lora_A.weight"
DAMAGE: dict[str, tuple[Any, str]] = {
    "truncated": (
        lambda folder: os.truncate(folder / TENSORS, (folder / TENSORS).stat().st_size - 7),
        r"adapter_model\.safetensors is no whole safetensors file",
    ),
    "empty": (lambda folder: (folder / TENSORS).write_bytes(b""), r"is no whole safetensors file"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), r"has no adapter_model\.safetensors"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), r"has no adapter_config\.json"),
    "broken json": (lambda folder: (folder / CONFIG).write_text('{"r": '), r"is not JSON"),
    "json list": (lambda folder: (folder / CONFIG).write_text("[]"), r"holds a list; an object is expected"),
    "not text": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x00"), r"looks like UTF-16"),
    "no type": (lambda folder: (folder / CONFIG).write_text("{}"), r"names no peft_type"),
    "other type": (lambda folder: edit(folder / CONFIG, peft_type="LORRA"), r'unknown PEFT type "LORRA"; did you mean'),
    "missing": (lambda folder: retensor(folder, lambda t: t.pop(KEY)), r"lacks 'blocks\.1\.up\.lora_A\.weight'"),
    "missing layer": (
        lambda folder: retensor(folder, lambda t: (t.pop(KEY), t.pop(KEY.replace("_A", "_B")))),
        r"targets blocks\.1\.up \(1 such layers\), for which the file holds no tensors",
    ),
    "extra": (
        lambda folder: retensor(folder, lambda t: t.update({KEY.replace("lora_A.weight", "lora_A.bias"): t[KEY] * 1})),
        r"holds 'blocks\.1\.up\.lora_A\.bias' and 0 more tensors",
    ),
    "extra layer": (
        lambda folder: edit(folder / CONFIG, exclude_modules=["blocks.1.up"]),
        r"holds tensors for blocks\.1\.up \(1 such layers\), which its configuration does not target",
    ),
    "shape": (
        lambda folder: retensor(folder, lambda t: t.update({KEY: t[KEY][:, :-1].contiguous()})),
        r"has shape \(2, 5\); this model's layer needs \(2, 6\)",
    ),
    "rank": (lambda folder: edit(folder / CONFIG, r=3), r"has shape \(2, 6\); this model's layer needs \(3, 6\)"),
    "nan": (
        lambda folder: retensor(folder, lambda t: t[KEY].view(-1)[3].fill_(float("nan"))),
        r"blocks\.1\.up\.lora_A\.weight in .* holds a NaN or an infinity",
    ),
    "infinity": (lambda folder: retensor(folder, lambda t: t[KEY].fill_(float("inf"))), r"holds a NaN or an infinity"),
    "twice": (
        lambda folder: retensor(folder, lambda t: t.update({KEY.removeprefix("base_model.model."): t[KEY] * 1})),
        r"holds 'blocks\.1\.up\.lora_A\.weight' twice",
    ),
    "target": (
        lambda folder: edit(folder / CONFIG, target_modules=["up", "down", "gate"]),
        r'the configuration does not fit this model: attach: no layer matches "gate"',
    ),
    "saved": (
        lambda folder: edit(folder / CONFIG, modules_to_save=["clasifier"]),
        r'modules_to_save names "clasifier", but no module of that name has parameters',
    ),
    "newer option": (
        lambda folder: edit(folder / CONFIG, use_magic=True),
        r"sets use_magic=True, which lorakit does not know for lora",
    ),
    "refused option": (lambda folder: edit(folder / CONFIG, kasa_config={"beta": 1}), r"sets kasa_config="),
    "shifted base": (
        lambda folder: edit(folder / CONFIG, init_lora_weights="pissa_niter_4"),
        r"init_lora_weights='pissa_niter_4', so the tensors belong to a base whose weights",
    ),
}


@pytest.mark.parametrize("case", list(DAMAGE))
def test_damage_is_named_and_the_model_untouched(case: str, tmp_path: Path) -> None:
    """On PEFT's two files alone; whatever is wrong, the model is afterwards the bit-same one, with the adapters it had."""
    damage, message = DAMAGE[case]
    _, adapter = adapted()
    adapter.save(tmp_path)
    (tmp_path / OWN).unlink()
    damage(tmp_path)
    model = small()
    parameters = {key: (one, one.clone(), one.requires_grad) for key, one in model.named_parameters()}
    modules = list(model.modules())
    with pytest.raises(LorakitError, match=message):
        load(model, tmp_path, name="a")
    assert not lk.adapters(model)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    for key, one in model.named_parameters():
        same, value, flag = parameters[key]
        assert one is same, key
        assert torch.equal(one, value), key
        assert one.requires_grad == flag, key
    model, other = adapted(model, seed=4, name="other")
    wanted, names = run(model), [key for key, _ in model.named_modules()]
    with pytest.raises(LorakitError, match=message):
        load(model, tmp_path, name="a")
    assert list(lk.adapters(model)) == ["other"]
    assert [key for key, _ in model.named_modules()] == names
    assert torch.equal(run(model), wanted)
    assert all(one.requires_grad for one in other.parameters())


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_lorakits_own_file_belongs_to_the_others(file: str, tmp_path: Path) -> None:
    """A configuration or tensors that came later than lorakit.json are not what it describes."""
    _, adapter = adapted()
    adapter.save(tmp_path)
    if file == CONFIG:
        edit(tmp_path / CONFIG, lora_alpha=99)
    else:
        retensor(tmp_path, lambda tensors: tensors[KEY].mul_(2))
    with pytest.raises(
        LorakitError, match=rf"{file} was changed after lorakit wrote lorakit\.json.*Without lorakit\.json"
    ):
        load(small(), tmp_path, name="a")
    adapter = load(small(), tmp_path, name="a", strict=False)
    assert adapter.method.alpha == (99 if file == CONFIG else 16)  # type: ignore[attr-defined]


def test_strict_false_logs_each_complaint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, adapter = adapted()
    adapter.save(tmp_path)
    (tmp_path / OWN).unlink()
    edit(tmp_path / CONFIG, use_magic=True, new_default=None, other_default=False, new_table={})
    retensor(tmp_path, lambda tensors: tensors.update({"base_model.model.blocks.1.up.strange": torch.ones(1)}))
    with caplog.at_level(logging.WARNING, logger="lorakit"):
        load(small(), tmp_path, name="a", strict=False)
    text = caplog.text
    assert "use_magic=True" in text
    assert "'blocks.1.up.strange' and 0 more tensors" in text
    assert "new_default" not in text
    assert "other_default" not in text
    assert "new_table" not in text


def test_falsy_unknown_options_are_a_newer_pefts_defaults(tmp_path: Path) -> None:
    _, adapter = adapted()
    adapter.save(tmp_path)
    (tmp_path / OWN).unlink()
    edit(tmp_path / CONFIG, use_magic=False, magic_config=None, magic_pattern={}, magic_list=[], magic_name="")
    load(small(), tmp_path, name="a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2, "lorakit_version": "9.1"}, r"has format 2, written by lorakit 9\.1; this version reads up to 1"),
        ({"format": "two"}, r"has format 'two'; a format is a number from 1"),
        ({"method": None}, r"has no 'method'; it is not whole"),
        ({"method": {"name": "lorra"}}, r'unknown method "lorra"; did you mean "lora"'),
        (
            {"method": {"name": "lora", "rnk": 3}},
            r'unknown option of lora "rnk" in .*lorakit\.json; did you mean "rank"',
        ),
        ({"targets": {"target_modules": ["up"], "magic": 1}}, r"describes targets by \['magic', 'target_modules'\]"),
    ],
)
def test_lorakits_own_file_of_another_version(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, adapter = adapted()
    adapter.save(tmp_path)
    edit(tmp_path / OWN, **changes)
    with pytest.raises(LorakitError, match=message):
        load(small(), tmp_path, name="a")


# -- the base model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("read", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_precision_is_the_same(saved: torch.dtype, read: torch.dtype, tmp_path: Path) -> None:
    _, adapter = adapted(small(dtype=saved), target_modules=["up", "down", "words", "mix"])
    adapter.save(tmp_path)
    load(small(dtype=read), tmp_path, name="a")


def test_another_base_is_refused(tmp_path: Path) -> None:
    _, adapter = adapted()
    adapter.save(tmp_path)
    with pytest.raises(LorakitError, match=r"made for another base model: \d+% of \d+ sampled weights differ"):
        load(small(seed=1), tmp_path, name="a")
    tuned = small()
    with torch.no_grad():  # a further fine-tuned copy: every weight moved by some percent
        for one in tuned.parameters():
            one.mul_(1 + 0.05 * torch.randn_like(one))
    with pytest.raises(LorakitError, match="made for another base model"):
        load(tuned, tmp_path, name="a")
    with pytest.raises(LorakitError, match=r"was made for a Small with 6 adapted matrices of other names or shapes"):
        load(small(width=8), tmp_path, name="a")
    load(small(seed=1), tmp_path, name="a", strict=False)


def test_a_base_known_only_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT's files name the base and say no more: another name is worth a warning."""
    _, adapter = adapted()
    adapter.save(tmp_path, base="some/model-7b")
    (tmp_path / OWN).unlink()
    model: Any = small()
    model.name_or_path = "/models/model-7b"
    with caplog.at_level(logging.WARNING, logger="lorakit"):
        load(model, tmp_path, name="a")
        assert not [one for one in caplog.records if one.levelno >= logging.WARNING]
        model.name_or_path = "other/model-8b"
        load(model, tmp_path, name="b")
    assert "made for some/model-7b, and this model is other/model-8b" in caplog.text


# -- names and places --------------------------------------------------------------------------------------------------------


def test_missing_folders(tmp_path: Path) -> None:
    _, adapter = adapted()
    adapter.save(tmp_path / "sql")
    with pytest.raises(LorakitError, match=r"sqk is no folder\. Did you mean .*sql\"\? An adapter is a folder with"):
        load(small(), tmp_path / "sqk")
    with pytest.raises(LorakitError, match=r"has no adapter_config\.json\. It has adapters below it: sql; name one"):
        load(small(), tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(LorakitError, match="file is no folder"):
        load(small(), tmp_path / "file")
    with pytest.raises(LorakitError, match="file exists and is a file"):
        adapter.save(tmp_path / "file")


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that can be nothing else is looked up on the hub; a folder that exists never asks the network."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[tuple[Any, ...]] = []

    def offline(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], sorted(options["allow_patterns"])))
        raise LocalEntryNotFoundError("offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(LorakitError, match=r"'user/reviews' is no folder here.*not in the cache and the hub cannot be"):
        load(small(), "user/reviews", revision="v2")
    assert asked == [("user/reviews", "v2", sorted({*FILES, *PROMPT, f"{MEMBERS}/*"}))]
    _, adapter = adapted()
    adapter.save("user/reviews")
    assert load(small(), "user/reviews").name == "reviews"
    with pytest.raises(LorakitError, match=r'user/review is no folder\. Did you mean "user/reviews"'):
        load(small(), "user/review")
    for name in ("./user/other", "a/b/c", "reviews", "/nowhere/reviews"):
        with pytest.raises(LorakitError, match="is no folder"):
            load(small(), name)
    with pytest.raises(LorakitError, match="is no folder"):
        load(small(), Path("someone/reviews"))
    assert len(asked) == 1
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / "user/reviews"))
    assert load(small(), "someone/law").name == "law"


def test_save_says_where_plain_data_is_needed(tmp_path: Path) -> None:
    _, adapter = adapted()
    with pytest.raises(LorakitError, match=r"lorakit\.json takes plain data only"):
        adapter.save(tmp_path / "a", record={"when": object()})
    with torch.no_grad():
        next(iter(adapter.parameters())).view(-1)[0] = float("nan")
    with pytest.raises(LorakitError, match=r"lora_A\.weight holds a NaN or an infinity; .* is left as it was"):
        adapter.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_link_is_followed(tmp_path: Path) -> None:
    _, adapter = adapted()
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    adapter.save(tmp_path / "run")
    adapter.save(tmp_path / "run")
    assert (tmp_path / "run").is_symlink()
    assert sorted(entry.name for entry in (tmp_path / "disk").iterdir()) == ["run"]
    assert len(read_tensors(tmp_path / "run")) == 12


def test_places_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter = adapted()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LorakitError, match=r"holds the current directory.*A folder below it can be: .*adapter"):
        adapter.save(".")
    with pytest.raises(LorakitError, match="is a mount point"):
        adapter.save("/")
    adapter.save("[odd] *name?")
    assert load(small(), "[odd] *name?", name="a").method == adapter.method


def test_the_tensors_are_as_readable_as_the_rest(tmp_path: Path) -> None:
    """safetensors makes its file 0600, so that a server run by another user could not read the adapter."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    adapter = lk.attach(model, lk.LoRA(rank=2))
    folder = adapter.save(tmp_path / "adapter")
    modes = {entry.name: entry.stat().st_mode & 0o777 for entry in folder.iterdir()}
    assert len(set(modes.values())) == 1, modes
