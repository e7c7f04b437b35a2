"""PEFT's names over lorakit, so that a script that uses PEFT runs with one import changed.

    from lorakit.peft import LoraConfig, PeftModel, get_peft_model

Libraries that import PEFT by themselves get this module where a script says first

    import sys, lorakit.peft
    sys.modules["peft"] = lorakit.peft

Every field of PEFT's configurations is accepted. Each is either honoured or refused by name; none is dropped. What differs
from PEFT is deliberate: names that match nothing raise, per-row `adapter_names` works for every layer, switching and
disabling adapters touches no `requires_grad`, `add_weighted_adapter` adds up what adapters do and not their factors, and an
exception in a forward leaves nothing behind.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lorakit.adapter.adapter import adapters as adapters
from lorakit.errors import LorakitError as PeftError
from lorakit.files.formats import UNSUPPORTED
from lorakit.peft import within
from lorakit.peft.attaching import preprocess_corda, preprocess_loraga
from lorakit.peft.configs import (
    CONFIGS,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    LoraConfig,
    PeftConfig,
    PeftType,
    PromptEncoderReparameterizationType,
    PromptLearningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_config,
)
from lorakit.peft.functions import (
    AUTO,
    AutoPeftModel,
    cast_mixed_precision_params,
    check_if_peft_model,
    convert_to_lora,
    create_loraplus_optimizer,
    delete_adapter,
    get_base_model_state_dict,
    get_layer_status,
    get_model_status,
    get_peft_model_state_dict,
    hotswap_adapter,
    initialize_lora_eva_weights,
    inject_adapter_in_model,
    load_peft_weights,
    prepare_model_for_kbit_training,
    rescale_adapter_scale,
    save_as_lora,
    set_base_model_state_dict,
    set_peft_model_state_dict,
    update_signature,
)
from lorakit.peft.layers import (
    LAYERS,
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
)
from lorakit.peft.model import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    TUNERS,
    PeftMixedModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    Tuner,
    get_peft_model,
)
from lorakit.peft.targets import DEFAULT_TARGETS

NoMatchingPeftModuleError = PeftError


class PeftWarning(UserWarning):
    """PEFT's class of warnings; those here are UserWarning, or lines of the logger lorakit."""


__version__ = "0.21.2"
"""The version of PEFT whose names these are."""
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = DEFAULT_TARGETS
BaseTuner = Tuner
PEFT_TYPE_TO_TUNER_MAPPING = TUNERS
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = dict.fromkeys(TUNERS, Tuner)
"""All of them: one class of layer has all methods."""

_MODELS = {one.__name__: one for one in TUNERS.values()}

_ELSEWHERE = {
    "ArrowConfig": "lorakit.route with a router over adapters",
    "XLoraModel": "lorakit.route(model, lorakit.XLoRA(), names)",
    "create_arrow_model": "lorakit.route with a router over adapters",
    "create_lorafa_optimizer": "lorakit.LoRAFA",
    "build_peft_weight_mapping": "lorakit.load(model, folder)",
    "find_kappa_target_modules": "",
    "get_eva_state_dict": "initialize_lora_eva_weights",
    "prepare_model_for_compiled_hotswap": "lorakit.swap, which needs no preparation: give the adapter the largest rank",
    "replace_lora_weights_loftq": 'init_lora_weights="loftq"',
    "shift_tokens_right": "the model's own function in transformers",
    "bloom_model_postprocess_past_key_value": "prefix tuning, which needs no table of architectures",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": "prefix tuning, which needs no table of architectures",
    "PrefixEncoder": "lorakit.PrefixTuning",
    "PromptEmbedding": "lorakit.PromptTuning",
    "PromptEncoder": "lorakit.PTuning",
    "CPTEmbedding": "",
    "KasaConfig": "",
    "MontecloraConfig": "",
    "MultitaskPromptTuningInit": "",
    "VeloraConfig": "",
    "CartridgeEncoder": "",
    "compose_cartridge_adapters": "",
    "initialize_kv_prefix_from_past_key_values": "",
    "initialize_kv_prefix_from_text": "",
    "prompt_embeddings_from_past_key_values": "",
    "create_riemannian_optimizer": "",
}
"""PEFT's names that are not here -> what does it in lorakit; empty where nothing does."""


class MissingNameError(PeftError, ImportError):
    """A name of PEFT's that is not offered."""


def __getattr__(name: str) -> Any:
    for table in (CONFIGS, AUTO, LAYERS, _MODELS, vars(within)):
        if name in table:
            return table[name]
    kind = name.removesuffix("Config").removesuffix("Model").upper()
    if kind in UNSUPPORTED:
        raise MissingNameError(
            f"lorakit.peft has no {name}: PEFT type {kind} is not supported because {UNSUPPORTED[kind]}."
        )
    if name in _ELSEWHERE:
        instead = (
            f"; in lorakit it is {_ELSEWHERE[name]}." if _ELSEWHERE[name] else ", and lorakit has nothing like it yet."
        )
        raise MissingNameError(f"lorakit.peft has no {name}{instead}")
    raise AttributeError(f"module 'lorakit.peft' has no attribute {name!r}")


_WORDS = """_buffer_dict adalora adamss adaption_prompt aqlm arrow asa_callback auto awq beft bnb boft c3a cartridge classifier
config constants conversion corda cpt deft delora diffusion_models dora eetq error eva fbd fourierft frod functional glora
gptq gralora helpers hira hotswap hqq hra ia3 import_utils inc incremental_pca integrations intruders layer layers lily
ln_tuning loftq_utils loha lokr lora lorafa loraga loraplus lycoris_utils mapping mapping_func mask_functions merge_utils
miss mixed mixed_model model monteclora multitask_prompt_tuning oft optimizers osf other p_tuning peanut peft_model
peft_types poly prefix_tuning prompt_tuning psoft pvera quantization_utils randlora riemannian road router save_and_load
shadow shira supertuning te tinylora torchao tp_layer trainable_tokens transformers_weight_conversion tuners tuners_utils
unilora utils variants vblora velora vera warning wavelet waverec2d waveft xlora"""
_MODULES = frozenset(_WORDS.split())
_OWN = frozenset({"attaching", "configs", "functions", "layers", "model", "targets", "within"})
"""What modules within PEFT are called."""


class _Modules(MetaPathFinder, Loader):
    """Modules within PEFT, such as peft.utils, where `sys.modules["peft"]` is this module: each has all names of this one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A module for names below peft."""
        first, *words = fullname.split(".")
        if (
            fullname.startswith(f"{__name__}.") and words[1] not in _OWN
        ):  # `from peft import tuners` asks by this module's name
            words = words[1:]
        elif first != "peft" or sys.modules.get("peft") is not sys.modules[__name__]:
            return None
        if not _MODULES.issuperset(words):
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        """Let it ask this module for every name."""
        this = sys.modules[__name__]
        module.__dict__["__getattr__"] = lambda name: getattr(this, name)


sys.meta_path.insert(0, _Modules())

__all__ = [
    "DEFAULT_TARGETS",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "AutoPeftModel",
    "AuxiliaryTrainingWrapper",
    "BaseTunerLayer",
    "LoraConfig",
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningInit",
    "TaskType",
    "TrainableTokensWrapper",
    "cast_mixed_precision_params",
    "check_if_peft_model",
    "convert_to_lora",
    "create_loraplus_optimizer",
    "delete_adapter",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "rescale_adapter_scale",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "update_signature",
    *CONFIGS,
    *AUTO,
    *LAYERS,
    *_MODELS,
]
