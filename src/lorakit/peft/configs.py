"""PEFT's configurations: LoRA's written out, the others rows of one table.

Every field of PEFT's is there with PEFT's default. Whether its value is honoured is decided when an adapter is made.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

from lorakit.errors import LorakitError, unknown
from lorakit.files.bundle import CONFIG, read_config
from lorakit.files.formats import FORMATS, UNSUPPORTED
from lorakit.reading import read_json


class _Words(enum.StrEnum):
    """Strings by name, equal to PEFT's own members of the same value."""


def _words(name: str, values: Iterable[str]) -> Any:
    make: Any = _Words
    return make(name, {value: value for value in values}, module=__name__)


PeftType: Any = _words(
    "PeftType", (kind for row in FORMATS.values() if row.peft is not None for kind in (row.peft, *sorted(row.also)))
)
"""PEFT's names of the methods that exist here, and of those that are read as one of them."""
TaskType: Any = _words(
    "TaskType", ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
)
PromptTuningInit: Any = _words("PromptTuningInit", ("TEXT", "SAMPLE_VOCAB", "RANDOM"))
PromptEncoderReparameterizationType: Any = _words("PromptEncoderReparameterizationType", ("MLP", "LSTM"))


@cache
def _both(own: Any, theirs: Any) -> Any:
    """A class that is both; calling it makes an instance of lorakit's own."""

    def make(cls: type, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return type(own.__name__, (own, theirs), {"__new__": make, "__module__": own.__module__})


def _blank(cls: type) -> Any:
    return object.__new__(cls)


class AlsoPefts:
    """`isinstance(x, peft.NAME)` holds for an instance of the class NAME here, once PEFT itself has been imported, so that
    trainers take it. Nothing is inherited from PEFT: what this class lacks stays lacking."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the class that it is, since pickle compares that with what it says it is."""
        return _blank, (type(self),), self.__dict__

    @property
    def __class__(self) -> type:
        own = type(self)
        real = sys.modules.get("peft")
        theirs = None if real is None else real.__dict__.get(own.__name__)
        both: Any = _both
        return both(own, theirs) if isinstance(theirs, type) and theirs.__module__.startswith("peft.") else own

    @__class__.setter
    def __class__(self, new: type) -> None:  # as FSDP2 does
        object.__dict__["__class__"].__set__(self, new)


@dataclass
class PeftConfig(AlsoPefts):
    """What every configuration of PEFT's has."""

    task_type: Any = None
    peft_type: Any = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name, None)
            if value is not None and not isinstance(value, str):
                # a set has no order, and what is saved must not differ from run to run
                setattr(self, name, sorted(value) if isinstance(value, set | frozenset) else list(value))
        task = getattr(self.task_type, "value", self.task_type)
        if task is not None and task not in list(TaskType):
            raise LorakitError(
                f"Invalid task type: '{task}'. Must be one of the following task types: {', '.join(TaskType)}."
            )
        self.task_type = task
        kind = getattr(self.peft_type, "value", self.peft_type)
        self.peft_type = PeftType(kind) if kind in list(PeftType) else kind

    @property
    def is_prompt_learning(self) -> bool:
        """Whether rows are put before the input, or keys and values before those of the text."""
        return isinstance(self, PromptLearningConfig)

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether this is LLaMA-Adapter."""
        return bool(self.peft_type == "ADAPTION_PROMPT")

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict."""
        return dataclasses.asdict(self)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write adapter_config.json alone."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        entries = {key: sorted(value) if isinstance(value, set) else value for key, value in self.to_dict().items()}
        (Path(save_directory) / CONFIG).write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes: Any) -> Self:
        """The configuration in an adapter folder, of the class that its peft_type names; `changes` win."""
        made: Self = cls.from_peft_type(**{**read_config(folder), **changes}, where=str(folder))
        return made

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **_: Any) -> dict[str, Any]:
        """The entries of a configuration's file."""
        return read_json(Path(path_json_file), "PeftConfig")

    @classmethod
    def from_peft_type(cls, where: str = "the call", **values: Any) -> Any:
        """The configuration with these entries, of the class that its peft_type names."""
        kind = str(getattr(values.get("peft_type"), "value", values.get("peft_type") or "LORA"))
        own = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
        if kind in UNSUPPORTED:
            raise LorakitError(f"{where}: PEFT type {kind} is not supported because {UNSUPPORTED[kind]}.")
        if own is None:  # what lorakit writes where a method reaches further than PEFT's: LOKR_CONV2D
            kinds = {**PEFT_TYPE_TO_CONFIG_MAPPING, "LLAMA_ADAPTER": CONFIGS["AdaptionPromptConfig"]}
            own = next((one for name, one in kinds.items() if kind.startswith(name)), None) if "_" in kind else None
        if own is None or not issubclass(own, cls):
            wanted = PEFT_TYPE_TO_CONFIG_MAPPING if cls is PeftConfig else [cls.__name__]
            raise unknown("peft_type" if own is None else f"peft_type of a {cls.__name__}", kind, wanted, where=where)
        known = [one.name for one in fields(own)]
        ignored = [
            name
            for name, value in values.items()
            if name not in known and value not in (None, False, {}, [], "", "none")
        ]
        if ignored:  # of a newer PEFT; reading the adapter decides whether it matters
            warnings.warn(
                f"Unexpected keyword arguments {ignored} for class {own.__name__}, these are ignored. ({where} may have been "
                "written by a newer PEFT.)",
                stacklevel=3,
            )
        return own(**{name: value for name, value in values.items() if name in known})


_VARIANT = {"is_lora_variant": True}
"""What PEFT's layers ask of a field, where a trainer gives this configuration to PEFT itself."""


@dataclass
class LoraConfig(PeftConfig):
    """PEFT's configuration of LoRA, field by field with PEFT's defaults."""

    peft_type: Any = "LORA"
    r: int = 8
    target_modules: Iterable[str] | str | None = None
    exclude_modules: Iterable[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: Iterable[str] | None = None
    init_lora_weights: bool | str = field(default=True, metadata={"lora_variants": ["mica"]})
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: Any = None
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = field(default=False, metadata=_VARIANT)
    velora_config: Any = field(default=None, metadata=_VARIANT)
    alora_invocation_tokens: list[int] | None = field(default=None, metadata=_VARIANT)
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = field(default=None, metadata=_VARIANT)
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: Any = field(default_factory=lambda: CONFIGS["LoraRuntimeConfig"]())
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = field(default=None, metadata=_VARIANT)
    arrow_config: Any = field(default=None, metadata=_VARIANT)
    kasa_config: Any = field(default=None, metadata=_VARIANT)
    ensure_weight_tying: bool = False
    _custom_modules: ClassVar[None] = None  # read by PEFT, where a trainer gives this configuration to it


@dataclass
class PromptLearningConfig(PeftConfig):
    """What configurations of soft prompts have; what they say of the model is found in the model itself."""

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: Iterable[str] | None = None


def _made(name: str, base: type, values: Mapping[str, Any], what: str) -> Any:
    entries = [
        (key, Any, field(default_factory=type(value)) if isinstance(value, dict | list) else field(default=value))
        for key, value in values.items()
    ]
    made = make_dataclass(name, entries, bases=(base,), namespace={"__doc__": what, "__module__": __name__})
    setattr(sys.modules[__name__], name, made)
    return made


_LAYERS = {
    "target_modules": None,
    "exclude_modules": None,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "init_weights": True,
}
_MATRICES = {**_LAYERS, "fan_in_fan_out": False, "bias": "none"}
_LYCORIS: dict[str, Any] = {
    **_LAYERS,
    "r": 8,
    "alpha": 8,
    "rank_pattern": {},
    "alpha_pattern": {},
    "rank_dropout": 0.0,
    "module_dropout": 0.0,
    "use_effective_conv2d": False,
}
_SOME = {name: default for name, default in _LAYERS.items() if name != "exclude_modules"}
_NAMED = {"target_modules": None, "modules_to_save": None, "init_weights": True}
_PAIR = {"projection_prng_key": 0, "save_projection": True}
_TABLE: dict[str, tuple[str, type, dict[str, Any]]] = {
    "AdaLoraConfig": (
        "ADALORA",
        LoraConfig,
        {"target_r": 8, "init_r": 12, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85}
        | {"orth_reg_weight": 0.5, "total_step": None, "rank_pattern": None},
    ),
    "XLoraConfig": (
        "XLORA",
        PeftConfig,
        {"hidden_size": 4096, "adapters": {}, "enable_softmax": True, "enable_softmax_topk": False}
        | {"layerwise_scalings": False, "xlora_depth": 1, "xlora_size": 2048, "xlora_dropout_p": 0.2}
        | {"use_trainable_adapters": False, "softmax_temperature": 1.0, "top_k_lora": None, "scaling_pass_value": 0.0}
        | {"global_scaling_weight": 1.0},
    ),
    "AdaptionPromptConfig": (
        "ADAPTION_PROMPT",
        PeftConfig,
        {"target_modules": None, "adapter_len": None, "adapter_layers": None},
    ),
    "BOFTConfig": (
        "BOFT",
        PeftConfig,
        {**_MATRICES, "boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1, "boft_dropout": 0.0},
    ),
    "C3AConfig": (
        "C3A",
        PeftConfig,
        {**_LAYERS, "bias": "none", "block_size": 256, "block_size_pattern": {}, "init_weights": "xavier_uniform"},
    ),
    "FourierFTConfig": (
        "FOURIERFT",
        PeftConfig,
        {**_MATRICES, "n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777, "n_frequency_pattern": {}}
        | {"init_weights": False},
    ),
    "HiraConfig": ("HIRA", PeftConfig, {**_MATRICES, "r": 32, "hira_dropout": 0.0, "rank_pattern": {}}),
    "IA3Config": (
        "IA3",
        PeftConfig,
        {"target_modules": None, "exclude_modules": None, "feedforward_modules": None, "fan_in_fan_out": False}
        | {"modules_to_save": None, "init_ia3_weights": True},
    ),
    "LoHaConfig": ("LOHA", PeftConfig, _LYCORIS),
    "LoKrConfig": (
        "LOKR",
        PeftConfig,
        {**_LYCORIS, "decompose_both": False, "decompose_factor": -1, "rank_dropout_scale": False},
    ),
    "OFTConfig": (
        "OFT",
        PeftConfig,
        {**_MATRICES, "r": 0, "oft_block_size": 32, "module_dropout": 0.0, "coft": False, "eps": 6e-5}
        | {"block_share": False, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5},
    ),
    "PrefixTuningConfig": (
        "PREFIX_TUNING",
        PromptLearningConfig,
        {"init_weights": None, "encoder_hidden_size": None, "prefix_projection": False},
    ),
    "PromptEncoderConfig": (
        "P_TUNING",
        PromptLearningConfig,
        {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": None, "encoder_num_layers": 2}
        | {"encoder_dropout": 0.0},
    ),
    "PromptTuningConfig": (
        "PROMPT_TUNING",
        PromptLearningConfig,
        {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}
        | {"tokenizer_kwargs": None},
    ),
    "RandLoraConfig": (
        "RANDLORA",
        PeftConfig,
        {**_MATRICES, **_PAIR, "r": 32, "sparse": False, "very_sparse": False, "randlora_dropout": 0.0}
        | {"randlora_alpha": 640},
    ),
    "ShiraConfig": ("SHIRA", PeftConfig, {**_MATRICES, "r": 32, "mask_type": "random", "random_seed": None}),
    "TrainableTokensConfig": (
        "TRAINABLE_TOKENS",
        PeftConfig,
        {"token_indices": [], "target_modules": None, "init_weights": True},
    ),
    "VBLoRAConfig": (
        "VBLORA",
        PeftConfig,
        {**_MATRICES, "r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2, "save_only_topk_weights": False}
        | {"vblora_dropout": 0.0, "init_vector_bank_bound": 0.02, "init_logits_std": 0.1},
    ),
    "VeraConfig": ("VERA", PeftConfig, {**_MATRICES, **_PAIR, "r": 256, "vera_dropout": 0.0, "d_initial": 0.1}),
    "BeftConfig": ("BEFT", PeftConfig, _NAMED),
    "DeloraConfig": (
        "DELORA",
        PeftConfig,
        {**_LAYERS, "bias": "none", "r": 8, "delora_lambda": 15, "module_dropout": 0.0, "rank_pattern": {}}
        | {"lambda_pattern": {}},
    ),
    "GloraConfig": (
        "GLORA",
        PeftConfig,
        {**_NAMED, "bias": "none", "r": 8, "config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"},
    ),
    "GraloraConfig": (
        "GRALORA",
        PeftConfig,
        {**_SOME, "fan_in_fan_out": False, "bias": "none", "r": 32, "hybrid_r": 0, "alpha": 64, "gralora_k": 2}
        | {"gralora_dropout": 0.0},
    ),
    "HRAConfig": ("HRA", PeftConfig, {**_LAYERS, "bias": "none", "r": 8, "apply_GS": False}),
    "LNTuningConfig": (
        "LN_TUNING",
        PeftConfig,
        {"target_modules": None, "exclude_modules": None, "modules_to_save": None},
    ),
    "MissConfig": ("MISS", PeftConfig, {**_LAYERS, "bias": "none", "r": 64, "miss_dropout": 0.0, "mini_r": 1}),
    "CPTConfig": (
        "CPT",
        PromptLearningConfig,
        {"cpt_token_ids": None, "cpt_mask": None, "cpt_tokens_type_mask": None, "opt_weighted_loss_type": "none"}
        | {"opt_loss_decay_factor": 1.0, "opt_projection_epsilon": 0.1, "opt_projection_format_epsilon": 0.1}
        | {"tokenizer_name_or_path": None},
    ),
    "CartridgeConfig": ("CARTRIDGE", PromptLearningConfig, {"num_frozen_tokens": 1}),
    "DeftConfig": (
        "DEFT",
        PeftConfig,
        {**_MATRICES, "r": 8, "decomposition_method": "relu", "init_scale": 1.0, "alpha": None, "para": False}
        | {"deft_dropout": 0.0},
    ),
    "MultitaskPromptTuningConfig": (
        "MULTITASK_PROMPT_TUNING",
        PromptLearningConfig,
        {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}
        | {"tokenizer_kwargs": None, "prompt_tuning_init_state_dict_path": None, "prompt_tuning_init_task": 0}
        | {"num_ranks": 1, "num_tasks": 1},
    ),
    "OSFConfig": ("OSF", PeftConfig, {**_NAMED, "effective_rank": None, "rank_pattern": None, "target_svd_config": None}),
    "PeanutConfig": ("PEANUT", PeftConfig, {**_LAYERS, "r": 32, "depth": 0, "act_fn": "relu", "scaling": 1.0}),
    "PsoftConfig": (
        "PSOFT",
        PeftConfig,
        {**_LAYERS, "fan_in_fan_out": False, "r": 32, "psoft_alpha": 32, "psoft_dropout": 0.0}
        | {"ab_svd_init": "psoft_init", "psoft_svd": "full", "psoft_svd_lowrank_niter": 10, "random_seed": 0}
        | {"psoft_orth": True, "psoft_mag_b": True, "psoft_mag_a": True, "use_cayley_neumann": False}
        | {"num_cayley_neumann_terms": 5, "cayley_neumann_eps": None},
    ),
    "PveraConfig": (
        "PVERA",
        PeftConfig,
        {**_SOME, **_PAIR, "fan_in_fan_out": False, "bias": "none", "r": 256, "pvera_dropout": 0.0, "d_initial": 0.1}
        | {"sample_at_inference": False, "generator_seed": None},
    ),
    "RoadConfig": ("ROAD", PeftConfig, {**_NAMED, "variant": "road_1", "group_size": 64}),
    "SupertuningConfig": (
        "SUPERTUNING",
        PeftConfig,
        {**_NAMED, "sparsity": 0.99, "select_top": True, "r": None, "lora_alpha": None, "lora_dropout": 0.0}
        | {"save_precomputed_indices": True},
    ),
    "TinyLoraConfig": (
        "TINYLORA",
        PeftConfig,
        {**_SOME, "fan_in_fan_out": False, "bias": "none", "r": 2, "u": 64, "weight_tying": 0.0, "projection_seed": 42}
        | {"save_projection": True, "init_v_bound": 0.02, "tinylora_dropout": 0.0},
    ),
    "UniLoraConfig": (
        "UNILORA",
        PeftConfig,
        {**_SOME, "fan_in_fan_out": False, "bias": "none", "r": 4, "proj_seed": 42, "theta_d_length": 256}
        | {"unilora_dropout": 0.0, "init_theta_d_bound": 0.02, "save_indices": False},
    ),
    "WaveFTConfig": (
        "WAVEFT",
        PeftConfig,
        {**_MATRICES, "n_frequency": 2592, "scaling": 25.0, "wavelet_family": "db1", "use_idwt": True}
        | {"random_loc_seed": 777, "n_frequency_pattern": {}, "proportional_parameters": False},
    ),
}  # fmt: skip
"""Name of the class -> (PEFT type, what it is, further fields with PEFT's defaults)."""

CONFIGS: dict[str, Any] = {
    name: _made(name, base, {"peft_type": kind, **own}, f"PEFT's configuration of {kind}.")
    for name, (kind, base, own) in _TABLE.items()
}
PEFT_TYPE_TO_CONFIG_MAPPING: dict[str, Any] = {
    "LORA": LoraConfig,
    **{kind: CONFIGS[name] for name, (kind, *_) in _TABLE.items()},
}
"""PEFT type -> the class of its configuration."""

_PARTS: dict[str, dict[str, Any]] = {
    "LoftQConfig": {"loftq_bits": 4, "loftq_iter": 1},
    "EvaConfig": {"rho": 2.0, "tau": 0.99, "use_label_mask": True, "label_mask_value": -100, "whiten": False}
    | {"adjust_scaling_factors": True},
    "CordaConfig": {"cache_file": None, "covariance_file": None, "corda_method": "ipm", "verbose": False}
    | {"use_float16_for_covariance": False, "prune_temporary_fields": True},
    "LoraGAConfig": {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16},
    "BdLoraConfig": {"target_modules_bd_a": None, "target_modules_bd_b": None, "nblocks": 1, "match_strict": True},
    "LoraRuntimeConfig": {"ephemeral_gpu_offload": False},
}
"""Configurations within LoraConfig."""
CONFIGS |= {name: _made(name, AlsoPefts, own, f"PEFT's {name}.") for name, own in _PARTS.items()}


def default_of(config: PeftConfig, name: str) -> Any:
    """The default of a field."""
    own = type(config).__dataclass_fields__[name]
    return own.default_factory() if own.default_factory is not MISSING else own.default


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The configuration with these entries, of the class that its peft_type names."""
    made: PeftConfig = PeftConfig.from_peft_type(**config_dict)
    return made
