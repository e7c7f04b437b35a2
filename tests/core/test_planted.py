"""What is promised of real models is shown to fail too: each test named here holds, and raises with a bug planted.

The bugs are those that were there, or that a careless change would bring: in what is known of layers, in coverage, in who
acts, in tasks, and in files of experts. Laws over layer kinds have theirs in laws/test_planted.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lorakit as lk
from core import test_coverage, test_known, test_states, test_usable
from lorakit.adapter import attachment, coverage, pretrained, targets
from lorakit.core import injection, rows, sites
from lorakit.core.state import ModelState
from lorakit.files import experts, interchange, store
from lorakit.models import tasks
from reference import test_experts as files
from training import test_tasks

pytestmark = pytest.mark.usefixtures("one_thread")

Plant = Callable[[pytest.MonkeyPatch], None]
Law = Callable[[Path], None]


# -- layers ----------------------------------------------------------------------------------------------------------------


def computed_weights_are_plain(patch: pytest.MonkeyPatch) -> None:
    """weight_norm's weight taken for a parameter: a change is overwritten at the next call."""
    patch.setattr(sites, "computed_weight", lambda module: "")


def nothing_is_read(patch: pytest.MonkeyPatch) -> None:
    """A model that multiplies by a layer's weight itself gets the base's (Mamba's dt_proj)."""
    patch.setattr(injection, "read_by", lambda kind: frozenset())


# -- coverage --------------------------------------------------------------------------------------------------------------


def counts_whole_layers(patch: pytest.MonkeyPatch) -> None:
    """A layer of which the bias trains, or one part of several, counts as reached."""
    patch.setattr(test_coverage, "coverage_of", lambda adapter: coverage.coverage(adapter.model, adapter.layers))


def presets_pass_over_stacks(patch: pytest.MonkeyPatch) -> None:
    """all-linear is nn.Linear alone, as everywhere in 2025."""
    patch.setattr(targets, "_in_presets", lambda module: isinstance(module, nn.Linear))


def lowers_ranks_in_silence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(coverage, "_lowered", lambda *_: ())


# -- who acts, and what transformers does ----------------------------------------------------------------------------------


def loading_does_not_activate(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(store, "_activate", lambda model, name: None)


def attaching_does_not_activate(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attachment, "activate", lambda model, name: None)


def idle_in_silence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ModelState, "say_idle", lambda self: None)


def saves_as_transformers_would(patch: pytest.MonkeyPatch) -> None:
    """No `save_pretrained` of ours: adapters' tensors in the base's file and no folder beside it."""
    patch.setattr(pretrained, "_METHODS", (pretrained.ResizeTokenEmbeddings,))


def resizes_under_the_adapter(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pretrained, "_METHODS", (pretrained.SavePretrained,))


def states_by_their_first_axis(patch: pytest.MonkeyPatch) -> None:
    """A GRU's state is (layers, batch, hidden): with as many layers as rows, its layers are taken for rows."""

    def planted(axis: int, args: Any, kwargs: Any, chosen: Any) -> Any:
        given = {**dict(zip(("input", "hx"), args, strict=False)), **kwargs}
        given["input"] = given["input"].index_select(axis, chosen)
        given["hx"] = given["hx"][:, torch.arange(len(chosen))]
        return given

    patch.setattr("lorakit.core.mixed.take_recurrent", planted)
    assert rows.take_recurrent is not planted


# -- tasks -----------------------------------------------------------------------------------------------------------------


def believes_the_heads_name(patch: pytest.MonkeyPatch) -> None:
    """BertLMHeadModel is a causal model by its name."""
    check = tasks.check_causal
    patch.setattr(
        test_tasks,
        "check_causal",
        lambda model, where: None if "LMHead" in type(model).__name__ else check(model, where),
    )


def sees_nothing(patch: pytest.MonkeyPatch) -> None:
    """Vision-language models are loaded without their eyes."""
    patch.setattr(tasks, "_SEEING", ())


# -- files of experts ------------------------------------------------------------------------------------------------------


def written_expert_by_expert(patch: pytest.MonkeyPatch) -> None:
    """Columns of B lie expert by expert; PEFT reads them rank by rank."""
    write = interchange.stack_tensors

    def planted(*args: Any) -> Any:
        return {
            key: tensor.unflatten(1, (-1, 4)).mT.flatten(1) if "lora_B" in key else tensor
            for key, tensor in write(*args).items()
        }

    patch.setattr(interchange, "stack_tensors", planted)


def up_for_gate(patch: pytest.MonkeyPatch) -> None:
    join = experts.joined
    patch.setattr(experts, "joined", lambda gate, up, stack: join(up, gate, stack))


def layout_not_asked(patch: pytest.MonkeyPatch) -> None:
    """What a file says of its columns is not read."""
    patch.setattr(experts, "is_grouped", lambda config, name: False)


PLANTED: tuple[tuple[Law, Plant], ...] = (
    (lambda _: test_known.test_a_computed_weight_is_refused_with_the_reason(WEIGHT_NORM), computed_weights_are_plain),
    (lambda _: test_known.test_a_read_weight_has_the_adapter_in_it(), nothing_is_read),
    (lambda _: test_coverage.test_only_what_is_changed_counts(*STACK), counts_whole_layers),
    (lambda _: test_coverage.test_parts_of_a_fused_layer_count_by_their_rows(), counts_whole_layers),
    (lambda _: test_coverage.test_experts_reached_are_counted_and_the_router_is_named(), presets_pass_over_stacks),
    (lambda _: test_coverage.test_what_is_planned_says_ranks(), lowers_ranks_in_silence),
    (lambda folder: test_usable.test_what_is_loaded_acts(written(folder)), loading_does_not_activate),
    (lambda _: attached_acts(), attaching_does_not_activate),
    (lambda _: idle_is_said(), idle_in_silence),
    (lambda folder: saved_whole(folder), saves_as_transformers_would),
    (lambda _: test_usable.test_resizing_an_adapted_vocabulary_is_refused_in_words(HEAD), resizes_under_the_adapter),
    (
        lambda _: test_states.test_states_have_the_batch_on_their_second_axis(nn.GRU, 5, True, True),
        states_by_their_first_axis,
    ),
    (lambda _: test_tasks.test_a_model_that_sees_the_next_token_is_refused(torch.float32), believes_the_heads_name),
    (lambda _: test_tasks.test_a_part_of_a_model_is_not_loaded_for_the_whole(*LLAVA), sees_nothing),
    (lambda folder: files.test_ours_is_read_by_peft_and_by_us("qwen3-moe", folder), written_expert_by_expert),
    (lambda folder: files.test_one_pair_for_each_expert(folder), up_for_gate),
    (lambda folder: files.test_columns_expert_by_expert_where_the_file_says_so(folder), layout_not_asked),
)

WEIGHT_NORM = test_known.COMPUTED["weight_norm"]
STACK = ({"target_modules": ["experts.down_proj"]}, test_coverage.STACKS // 3)
HEAD = {"target_modules": ["lm_head"]}
LLAVA = (transformers.LlavaConfig(), "reads more than text")


def written(folder: Path) -> Path:
    """An adapter in a folder, as the fixture of test_usable makes it."""
    test_usable.noisy(lk.attach(test_usable.llama(), lk.LoRA(rank=2))).save(folder / "one")
    return folder / "one"


def attached_acts() -> None:
    """A new adapter acts: once its numbers are not zero, the output is another."""
    model = test_usable.llama()
    base = test_usable.logits(model)
    test_usable.noisy(lk.attach(model, lk.LoRA(rank=2)))
    assert not torch.equal(test_usable.logits(model), base)


def idle_is_said() -> None:
    """A model on which none acts says so at its call."""
    said: list[str] = []
    model = test_usable.llama()
    for name in "ab":
        lk.attach(model, lk.LoRA(rank=2), name=name)
    lk.detach(model, "b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorakit.core.state.log.warning", lambda text, *_: said.append(text))
        test_usable.logits(model)
    assert any("none acts" in text for text in said)


def saved_whole(folder: Path) -> None:
    """What test_usable demands of `save_pretrained`, for a LoRA that is not trained."""
    test_usable.test_save_pretrained_is_the_base_and_the_adapter_beside_it("lora", False, False, False, folder)


@pytest.mark.parametrize(("law", "plant"), PLANTED, ids=[plant.__name__ for _, plant in PLANTED])
def test_it_is_caught(law: Law, plant: Plant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("right", "wrong"):
        (tmp_path / name).mkdir()
    law(tmp_path / "right")
    plant(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, TypeError)):
        law(tmp_path / "wrong")
