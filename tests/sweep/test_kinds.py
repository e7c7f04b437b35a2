"""The sweep's laws on one model per kind of block; `make sweep` has all of them."""

from __future__ import annotations

import pytest

from sweep.builder import Case, cases
from sweep.checks import check

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


def test_a_class_without_a_configuration_is_said_and_not_raised() -> None:
    result = check(Case("TimmWrapperForImageClassification", "timm_wrapper", "image_classification"))
    assert result.outcome in ("cannot be built", "passed")
    assert result.reason or result.outcome == "passed"


def test_every_architecture_is_a_case() -> None:
    assert len(FOUND) > 1000
    assert len({case.head for case in FOUND.values()}) > 30
