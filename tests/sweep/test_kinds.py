"""The sweep's laws on one model per kind of block; `make sweep` has all of them."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn

from sweep.builder import Built, Case, cases
from sweep.checks import Result, WrongError, check, held

KINDS = {
    "LlamaForCausalLM": "grouped-query attention, SwiGLU",
    "GPT2LMHeadModel": "Conv1D with fused q, k, v",
    "FalconForCausalLM": "a linear class of its own",
    "BloomForCausalLM": "ALiBi, fused q, k, v per head",
    "Gemma2ForCausalLM": "soft caps, norms on both sides",
    "MixtralForCausalLM": "stacked experts",
    "GptOssForCausalLM": "experts (in, out) with biases, interleaved",
    "DeepseekV3ForCausalLM": "latent attention, shared experts",
    "Llama4ForCausalLM": "a router that returns a tuple",
    "LongcatFlashForCausalLM": "experts that do nothing",
    "MambaForCausalLM": "a state space, whose dt_proj is read and not called",
    "JambaForCausalLM": "state space and attention and experts",
    "RwkvForCausalLM": "a recurrence",
    "XLNetLMHeadModel": "bare matrices",
    "BertForMaskedLM": "an encoder",
    "IBertForMaskedLM": "layers that return tuples: refused",
    "T5ForConditionalGeneration": "an encoder-decoder",
    "LayoutLMv3ForTokenClassification": "rel_pos_bias, read and not called",
    "ViTForImageClassification": "patches",
    "SwinForImageClassification": "shifted windows",
    "ConvNextForImageClassification": "convolutions and linear layers",
    "DeformableDetrForObjectDetection": "queries, an expanded input",
    "CLIPModel": "two towers",
    "WhisperForConditionalGeneration": "spectrograms",
    "WavLMForCTC": "attention by torch's function over weights that are read",
    "LlavaForConditionalGeneration": "vision and language",
}
REFUSED = {"IBertForMaskedLM"}
FOUND = {case.name: case for case in cases()}


@pytest.mark.parametrize("name", KINDS)
def test_all_holds(name: str, one_thread: None) -> None:
    result = check(FOUND[name])
    allowed = ("refused",) if name in REFUSED else ("passed",)
    assert result.outcome in allowed, f"{name} ({KINDS[name]}): {result.outcome}: {result.reason}"
    if result.outcome == "passed":
        assert 0 < result.share <= 1
        assert result.layers > 0
        assert not any("not said" in reason for reason in result.why)


def test_a_class_without_a_configuration_is_said_and_not_raised() -> None:
    result = check(Case("TimmWrapperForImageClassification", "timm_wrapper", "image_classification"))
    assert result.outcome in ("cannot be built", "passed")
    assert result.reason or result.outcome == "passed"


class Chooser(nn.Module):
    """Gives numbers of choices, which a change of some percent does not move."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8, bias=False)
        self.proj.weight.data.copy_(100 * torch.eye(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).argmax(-1).float()


def chooser() -> tuple[Built, Result]:
    torch.manual_seed(0)
    return Built(Chooser(), {"x": torch.eye(8)}, "by hand"), Result("Chooser", "", "")


def test_choices_are_compared_by_what_the_parts_give(one_thread: None) -> None:
    built, result = chooser()
    held(built, result)
    assert result.inside
    assert result.peft == "equal"


def test_a_peft_that_computes_otherwise_is_found(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    own = peft.tuners.lora.Linear.forward
    monkeypatch.setattr(peft.tuners.lora.Linear, "forward", lambda self, x, *more, **given: 1.01 * own(self, x))
    with pytest.raises(WrongError, match="PEFT gives another output"):
        held(*chooser())


def test_every_architecture_is_a_case() -> None:
    assert len(FOUND) > 1000
    assert len({case.head for case in FOUND.values()}) > 30
