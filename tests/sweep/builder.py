"""Small models of every architecture that transformers has, made by rules on the names of a configuration's attributes.

A configuration starts from its class's defaults. Sizes are shrunk by what their names say, special tokens are kept inside
the vocabulary, and lists with one entry per layer keep one layer of every kind. There is a list of ways, from the
smallest to the mildest; the first under which the model builds and runs counts. No architecture is named, so that those of
a new version come in by themselves.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from lorakit.core.layer import Adapted

LIMIT = 30_000_000
"""Parameters of a model at most."""
VOCABULARY = 128
MAPPINGS = (
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MASKED_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "OBJECT_DETECTION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "DEPTH_ESTIMATION",
    "VIDEO_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION",
)
"""The heads that come first in a sweep; all others follow."""


@dataclass(frozen=True)
class Case:
    """One model class: its name, the model_type of its configuration, and the mapping that names it."""

    name: str
    model_type: str
    head: str


class CannotBuildError(Exception):
    """No way of shrinking gave a model that runs; the message says what each met."""


def cases() -> list[Case]:
    """Every model class that an auto mapping of transformers names, once."""
    every = [name for name in dir(modeling_auto) if re.fullmatch(r"MODEL_FOR_\w+_MAPPING_NAMES", name)]
    first = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in MAPPINGS]
    order = [name for name in first if name in every] + [name for name in every if name not in first]
    found: dict[str, Case] = {}
    for mapping in [*order, "MODEL_MAPPING_NAMES"]:
        head = mapping.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES").removesuffix("_MAPPING").lower()
        for model_type, named in getattr(modeling_auto, mapping).items():
            for name in (named,) if isinstance(named, str) else named:
                found.setdefault(name, Case(name, model_type, head if head != "model" else "base"))
    return list(found.values())


# -- configurations --------------------------------------------------------------------------------------------------------

_LAYERS = re.compile(
    r"(num|n)(_\w+)?_(layers?|blocks?|hidden_layers)$|^\w*_layers$|^depth$|^layers$|^num_stages_layers$"
)
_NOT_LAYERS = re.compile(
    r"dense|indices|index|feature|extract|conv|pos|select|adapter_layers|sparse|out_|shared|interval|stem"
)
_RULES: tuple[tuple[str, int], ...] = (
    (r"lora_rank|lora_r$|low_rank|_rank$", 8),
    (r"qk_head_dim", 16),
    (r"mamba_(d_head|headdim|head_dim)|ssm_head_dim", 16),
    (r"^rotary_dim|^rope_dim|pos_emb_dim", 8),
    (r"head_dim|head_size|d_kv$|kv_channels|v_head|head_width", 8),
    (r"(num|n)_?(local_|routed_|moe_)?experts$|n_routed_experts|num_local_experts|moe_num_experts|num_experts$", 4),
    (r"experts_per_tok|top_?k$|moe_topk|moe_top_k|num_selected_experts", 2),
    (r"moe\w*_(intermediate|ffn)\w*|expert\w*_(intermediate|ffn|hidden)\w*", 32),
    (r"intermediate|ffn|d_ff|feed_forward|n_inner|mlp_dim|mlp_hidden|d_inner|inner_dim|ff_dim|mlp_size", 64),
    (r"kv_heads|key_value_heads|num_query_groups|multi_query_group_num", 2),
    (r"heads$|n_head$|heads", 4),
    (
        r"hidden|d_model|n_embd|embed_dim|embedding_size|emb_size|^dim$|model_dim|_width$|^width$|_dim$",
        32,
    ),
    (r"channels$|out_channels|conv_dim|_size$|num_filters|base_size", 32),
)
_KEPT = re.compile(
    r"kernel|stride|window|conv_size|num_channels|in_chan|type_vocab|token_id|patch|image|group_size|pooling|pool_size|pool_stride|n_group|chunk|"
    r"max_|min_|_ratio|factor|merge_size|num_labels|frame|sampling|batch|grid|dilat|temporal|hop|crop|codebook_dim|"
    r"time_step|_rate|num_mel|state_size|d_state|d_conv|local_size|buffer|scale|block_size|mel_bins|downsampl"
)


def _shrunk(name: str, value: int, way: str, divide: int) -> int:
    """One number of a configuration under a way of shrinking."""
    low = name.lower()
    if re.search(r"vocab(ulary)?_size$|num_embeddings$|n_words|n_vocab", low) and "type" not in low:
        return min(value, VOCABULARY)
    if _LAYERS.search(low) and not _NOT_LAYERS.search(low):
        return min(value, 2)
    if re.search(r"max_position_embeddings|n_positions|max_(source|target)_positions|n_ctx|max_seq(uence)?_len", low):
        return min(value, 256)
    if way == "layers":
        return value
    if re.search(r"(num|n)_?(local_|routed_|moe_)?experts$|n_routed_experts|moe_num_experts", low):
        return min(value, 4)
    if re.search(r"experts_per_tok|moe_top_?k|moe_k$|num_selected_experts", low):
        return min(value, 2)
    if re.search(r"^n_groups?$|^num_expert_groups?$", low):
        return min(value, 2)
    if re.search(r"topk_group|limited_groups", low):
        return 1
    if re.search(r"num_queries|num_query|num_points|num_latents|query_num", low):
        return min(value, 8)
    if re.search(r"^image_size$|^img_size$|^input_size$|^image_resolution$", low):
        return min(value, 64 if way == "names" else 224)
    if _KEPT.search(low):
        return value
    if way == "names":
        for pattern, small in _RULES:
            if re.search(pattern, low):
                return min(value, small) if value > 0 else value
        return value
    if re.search(r"heads|n_head|groups", low):
        return value
    wide = re.search(
        r"size$|dim|width|hidden|channels|d_model|n_embd|d_ff|d_kv|d_inner|n_inner|ffn|rank|intermediate|filters", low
    )
    return max(value // divide, 1) if wide and value >= 16 else value


def per_layer(config: Any, most: int = 6) -> dict[str, int]:
    """Cut lists with one entry per layer to one layer of every kind, two layers at least; attributes that count
    layers -> how many are kept, where there are such lists."""
    values = vars(config)
    counted: dict[str, int] = {}
    counts = [k for k, v in values.items() if isinstance(v, int) and _LAYERS.search(k) and not _NOT_LAYERS.search(k)]
    for key in counts:
        length = values[key]
        lists = {
            k: v
            for k, v in values.items()
            if isinstance(v, list | tuple) and len(v) == length > 2 and all(isinstance(x, str | int | bool) for x in v)
        }
        if not lists:
            continue
        kept: list[int] = []
        for entries in lists.values():
            met: set[Any] = {entries[index] for index in kept}
            for index, entry in enumerate(entries):
                if entry not in met and len(kept) < most and len(set(entries)) <= most:
                    met.add(entry)
                    kept.append(index)
        kept = sorted({*kept})
        kept = kept if len(kept) > 1 else sorted({*kept, *range(2)})[:3]
        for name, entries in lists.items():
            setattr(config, name, [entries[index] for index in kept])
        counted[key] = len(kept)
    return counted


def small_depth(config: Any) -> None:
    """Few layers, one of every kind, at otherwise full size, in place."""
    for name, count in per_layer(config).items():
        setattr(config, name, count)
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            small_depth(value)
        elif type(value) is int and _LAYERS.search(name) and not _NOT_LAYERS.search(name):
            setattr(config, name, min(value, 6))


def full_size(case: Case) -> nn.Module:
    """A model with the sizes of its default configuration on the meta device: few layers, or all where a few do not build."""
    problem: Exception | None = None
    for few, filled in itertools.product((True, False), (False, True)):
        try:
            config = default_config(case)
            if filled:
                _filled(config)
            if few:
                small_depth(config)
            return on_meta(getattr(transformers, case.name), config)
        except Exception as one:  # another way may do
            problem = problem or one
    assert problem is not None
    raise problem


def shrink(config: Any, way: str) -> Any:
    """A copy of a configuration with small sizes; `way` is "names", "divided" by a power of two, or "layers" alone."""
    config = copy.deepcopy(config)
    kind = "names" if way == "filled" else way.partition(",")[0]
    _shrink_in_place(config, kind, _divisor(config))
    if "filled" in way:
        _filled(config)
    _sections(config)
    _stages(config)
    return config


def _divisor(config: Any) -> int:
    wide = re.compile(r"hidden_size$|d_model|n_embd|embed_dim")
    widest = max((value for name, value in _numbers(config) if wide.search(name)), default=512)
    return 16 if widest >= 2048 else 8 if widest >= 512 else 4


def _shrink_in_place(config: Any, way: str, divide: int) -> None:
    kept = per_layer(config)
    before = dict(vars(config))
    heads = next(
        (before[k] for k in ("num_attention_heads", "n_head", "num_heads") if isinstance(before.get(k), int)), 0
    )
    for name, value in before.items():
        if name.startswith("_") or isinstance(value, bool):
            continue
        new: Any = value
        if isinstance(value, PreTrainedConfig):
            _shrink_in_place(value, way, divide)
            continue
        if isinstance(value, dict) and name not in ("id2label", "label2id") and "rope" not in name:
            new = {
                k: _shrunk(k, v, way, divide) if type(v) is int and isinstance(k, str) else v for k, v in value.items()
            }
        elif name in kept:
            new = kept[name]
        elif type(value) is int:
            new = _shrunk(name, value, way, divide)
            if way == "names" and re.search(r"kv_heads|key_value_heads", name) and value >= heads > 0:
                new = min(value, 4)
        elif isinstance(value, list | tuple) and value and all(type(x) is int for x in value):
            new = [_entry(name, x, way, divide) for x in value]
        if new != value:
            try:
                setattr(config, name, new)
            except Exception:  # a value that the class checks, and refuses
                setattr(config, name, value)
    _tokens_inside(config)


def _entry(name: str, value: int, way: str, divide: int) -> int:
    """One number of a list: sizes of stages are divided so that their relations stay, depths are one or two."""
    low = name.lower()
    if re.search(r"depth|num_blocks|layers", low) and not _NOT_LAYERS.search(low):
        return min(value, 2)
    if re.search(r"image_size|img_size|input_size", low):
        return min(value, 64 if way == "names" else 224)
    if (
        way != "layers"
        and re.search(r"hidden_sizes|dims?$|embed_dims|channels|sizes$|conv_dim|width", low)
        and value >= 32
    ):
        return value if _KEPT.search(low) and "channels" not in low else max(value // 4, 16)
    return value


def _tokens_inside(config: Any) -> None:
    """Special tokens that lie outside the vocabulary get the last numbers of it, each its own."""
    sizes = [
        v for k, v in _numbers(config) if re.search(r"vocab(ulary)?_size$|n_vocab", k) and "type" not in k and v > 8
    ]
    size = min(sizes, default=0)
    if not size:
        return
    free = itertools.count(1)
    given: dict[int, int] = {}

    def visit(one: Any) -> None:
        for name, value in list(vars(one).items()):
            if isinstance(value, PreTrainedConfig):
                visit(value)
            elif re.search(r"token_id$|token_index$|_token$|_id$|token_ids$", name):
                outside = [value] if type(value) is int else value if isinstance(value, list) else []
                if any(type(x) is int and x >= size for x in outside):
                    for x in outside:
                        if type(x) is int and x >= size and x not in given:
                            given[x] = size - next(free)
                    setattr(
                        one, name, given.get(value, value) if type(value) is int else [given.get(x, x) for x in value]
                    )

    visit(config)


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _numbers(value)
        elif type(value) is int:
            yield name, value


def _filled(config: Any) -> None:
    """Sizes that the defaults leave open, where a real checkpoint would give them."""
    values = vars(config)
    heads = next((values[k] for k in ("num_attention_heads", "n_head", "num_heads") if type(values.get(k)) is int), 4)
    layers = next((values[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if type(values.get(k)) is int), 2)
    given = {
        "vocab_size": VOCABULARY,
        "head_dim": 8,
        "num_key_value_heads": heads,
        "n_routed_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "layer_types": ["full_attention"] * layers,
        "default_language": (values.get("languages") or [None])[0],
        "out_indices": [1, 2, 3, 4],
        "mask_token_id": 5,
        "pad_token_id": 0,
        "n_shared_experts": 1,
        "indexer_compress_ratio": 4,
        "clip_qkv": 8.0,
        "indexer_budget": 16,
    }
    for name, value in list(values.items()):
        if isinstance(value, PreTrainedConfig):
            _filled(value)
        elif value is None and given.get(name) is not None:
            setattr(config, name, given[name])


_LACKING = {"rope_theta": 10000.0, "num_key_value_heads": 4, "shared_expert_intermediate_size": 32}
"""What some classes forget to set, and real checkpoints give."""


def _mended(config: Any, problem: Exception) -> bool:
    """Whether what a configuration lacks, by the error that a model raised, could be given to it, in place."""
    found = re.fullmatch(r"'(\w+)' object has no attribute '(\w+)'", str(problem))
    kind, name = found.groups() if found else ("", "")
    values = vars(config)
    if type(config).__name__ == kind and name in _LACKING:
        setattr(config, name, _LACKING[name])
        return True
    rope = values.get("rope_parameters")
    types = sorted(set(values.get("layer_types") or ()))
    if (
        isinstance(problem, KeyError) and problem.args[0] in types and isinstance(rope, dict)
    ):  # one entry per layer type
        config.rope_parameters = {
            one: rope.get(one) or {"rope_type": "default", "rope_theta": 10000.0} for one in types
        }
        return any(one not in rope for one in types)
    return any(_mended(value, problem) for value in values.values() if isinstance(value, PreTrainedConfig))


def _sections(config: Any) -> None:
    """Sections of rotary positions add up to half of a head, as they did at full size."""
    values = vars(config)
    for value in values.values():
        if isinstance(value, PreTrainedConfig):
            _sections(value)
    heads = values.get("num_attention_heads")
    half = (
        values.get("head_dim") or (values.get("hidden_size", 0) // heads if type(heads) is int and heads else 0)
    ) // 2
    for name in ("rope_parameters", "rope_scaling"):
        own = values.get(name)
        sections = own.get("mrope_section") if isinstance(own, dict) else None
        if sections and half:
            small = [max(half * one // sum(sections), 1) for one in sections]
            small[-1] += half - sum(small)
            setattr(config, name, {**own, "mrope_section": small})


def _stages(config: Any) -> None:
    """Layers whose outputs are asked for are there; a backbone of a library that is not installed becomes a ResNet."""
    for name, value in list(vars(config).items()):
        if type(value).__name__ == "TimmBackboneConfig":
            stages = ["stage2", "stage3", "stage4"][-max(len(value.out_indices or [1]), 1) :]
            sizes: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}
            setattr(config, name, transformers.ResNetConfig(**sizes, out_features=stages))
        elif isinstance(value, PreTrainedConfig):
            _stages(value)
    values = vars(config)
    asked = [
        k for k in ("out_indices", "_out_indices", "backbone_out_indices") if isinstance(values.get(k), list | tuple)
    ]
    layers = values.get("num_hidden_layers")
    for name in asked:
        indices = list(values[name])
        if type(layers) is int and indices and max(indices) > layers:
            config.num_hidden_layers = len(indices)
            first = 1 if max(indices) > len(indices) - 1 else 0
            setattr(config, name, list(range(first, first + len(indices))))
            if "stage_names" in values:
                config.stage_names = ["stem", *(f"stage{i + 1}" for i in range(len(indices)))]
            if "_out_features" in values:
                config._out_features = [f"stage{i}" for i in range(1, len(indices) + 1)]


WAYS = ("names", "filled", "divided", "divided, filled", "layers")


def default_config(case: Case) -> Any:
    """The default configuration of a case's model type, with the sub-configurations that it needs."""
    name = CONFIG_MAPPING_NAMES.get(case.model_type)
    model = getattr(transformers, case.name)
    kind = getattr(model, "config_class", None) or getattr(transformers, name or "")
    own = getattr(transformers, name, None) if name else None
    config = (own if own is not None and issubclass(own, kind) else kind)()
    if hasattr(config, "is_decoder") and case.head == "causal_lm" and not getattr(config, "is_encoder_decoder", False):
        config.is_decoder = True
    for one in ("use_cache", "use_pretrained_backbone", "use_mamba_kernels", "use_timm_backbone"):
        if getattr(config, one, False):
            setattr(config, one, False)
    return config


# -- models ----------------------------------------------------------------------------------------------------------------


def on_meta(kind: Any, config: Any) -> nn.Module:
    """A model without numbers; what its configuration lacks is mended in place."""
    for _ in range(3):
        try:
            with torch.device("meta"):
                return kind(copy.deepcopy(config))
        except Exception as problem:
            if not _mended(config, problem):
                raise
    raise CannotBuildError("its configuration lacks more than can be mended")


def construct(case: Case, config: Any) -> nn.Module:
    """The model, with all its numbers drawn anew so that every part matters; LIMIT is checked on the meta device first."""
    kind = getattr(transformers, case.name)
    count = sum(p.numel() for p in on_meta(kind, config).parameters())
    if count > LIMIT:
        raise CannotBuildError(f"{count:,} parameters")
    torch.manual_seed(0)
    return draw_anew(kind(copy.deepcopy(config)).float().eval())


def draw_anew(model: nn.Module) -> nn.Module:
    """The model, with numbers under which every part of it matters."""
    with torch.no_grad():
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is None or not parameter.is_floating_point():
                    continue
                if parameter.ndim < 2:
                    parameter.nan_to_num_().add_(0.02 * torch.randn_like(parameter))
                elif isinstance(module, nn.Embedding):
                    parameter.normal_(0, 0.5)
                else:
                    stacked = parameter.ndim == 3 and not hasattr(module, "kernel_size")  # experts
                    fan = parameter.shape[-1] if stacked else parameter[0].numel()
                    parameter.normal_(0, min(fan**-0.5, 0.5))
    return model


class Draw:
    """Random tensors from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


class Inputs:
    """What to call a model with, by the names that its forward takes; several tries, the plainest first."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = model.config
        self.generator = torch.Generator().manual_seed(1)
        self.takes = inspect.signature(model.forward).parameters
        main = getattr(model, "main_input_name", "input_ids")
        self.main = main if isinstance(main, str) else main[0]

    def find(self, *names: str, default: Any = None) -> Any:
        """The first of these attributes that the configuration or one of its parts has."""
        queue = [self.config]
        while queue:
            config = queue.pop(0)
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
            queue += [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
        return default

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def ids(self, rows: int = 2, length: int = 12) -> Tensor:
        size = self.find("vocab_size", "n_words", default=VOCABULARY)
        size = size if isinstance(size, int) else min(size.values()) if isinstance(size, dict) else VOCABULARY
        high = max(min(size, VOCABULARY) - 24, 4)
        ids = torch.randint(min(8, high - 2), high, (rows, length), generator=self.generator)
        end = self.find("eos_token_id")
        end = end[0] if isinstance(end, list) and end else end
        if type(end) is int and 0 <= end < size:
            ids[:, -1] = end
        return ids

    def image_size(self) -> tuple[int, int]:
        size = self.find("image_size", "img_size", "input_size", "image_resolution", default=64)
        if isinstance(size, dict):
            size = (size.get("height", 64), size.get("width", 64))
        if isinstance(size, list | tuple):
            return (int(size[0]), int(size[-1]))
        return (int(size), int(size)) if isinstance(size, int) else (64, 64)

    def channels(self) -> int:
        value = self.find("num_channels", "in_channels", "in_chans", default=3)
        return value if isinstance(value, int) and value > 0 else 3

    def values(self, name: str) -> list[Any]:
        """Tries for one argument; empty where nothing is known about its name."""
        height, width = self.image_size()
        channels = self.channels()
        frames = self.find("num_frames", "num_image_with_embedding", "frames_per_clip", default=2)
        frames = frames if isinstance(frames, int) else 2
        mel = self.find(
            "num_mel_bins",
            "feature_projection_input_dim",
            "feature_size",
            "input_feat_per_channel",
            "input_dim",
            "num_mels",
            default=80,
        )
        mel = mel if isinstance(mel, int) else 80
        length = self.find("max_source_positions", "max_length", "max_audio_length", default=64)
        length = length if isinstance(length, int) else 64
        video = self.random(2, frames, channels, height, width)
        image = self.random(2, channels, height, width)
        spectrum = [self.random(2, mel, min(2 * length, 3000)), self.random(2, 64, mel), self.random(2, mel, 64)]
        spectrum += [self.random(2, min(length, 1024), mel), self.random(2, 1, mel, 64), self.random(2, 1, 1024, mel)]
        if name in ("input_ids", "decoder_input_ids", "text_input_ids", "target_ids", "qformer_input_ids"):
            books = self.find("num_codebooks", default=0)
            books = books if isinstance(books, int) else 0
            if type(self.model).__name__.endswith("MultipleChoice"):  # (rows, choices, tokens)
                return [self.ids(4).view(2, 2, 12)]
            several = [self.ids(2 * books), self.ids(2, 12 * books).view(2, 12, books)] if books else []
            return [self.ids(), self.ids(1, 24), *several]
        patch = self.find("patch_size", default=8)
        patch = patch if isinstance(patch, int) else patch[-1]
        if name == "flattened_patches":
            return [self.random(2, 16, 2 + channels * patch * patch).abs().add(1)]
        if name == "pixel_values" and {"image_grid_thw", "image_grid_hws", "grid_thw"} & set(self.takes):
            merged = 2 * (self.find("temporal_patch_size", default=1) or 1)
            flat = channels * patch * patch
            return [self.random(32, flat * merged // 2), self.random(32, flat), self.random(32, channels, patch, patch)]
        if name == "hidden_states" and "grid_thw" in self.takes:
            flat = channels * patch * patch
            return [self.random(32, flat * (self.find("temporal_patch_size", default=1) or 1)), self.random(32, flat)]
        if name in ("image_grid_thw", "grid_thw"):
            return [torch.tensor([[1, 4, 4], [1, 4, 4]])]
        if name == "image_grid_hws":
            return [torch.tensor([[4, 4], [4, 4]])]
        if name in ("spatial_shapes",):
            return [torch.tensor([[4, 4], [4, 4]])]
        if name in ("pixel_attention_mask",) and "spatial_shapes" in self.takes:
            return [torch.ones(2, 16, dtype=torch.long)]
        if name == "pixel_values" and "spatial_shapes" in self.takes:
            return [self.random(2, 16, channels * patch * patch)]
        if name == "pixel_values":
            tries = [image, self.random(2, channels, 224, 224), video, self.random(1, channels, 128, 128)]
            return [video, image] if self.main == "pixel_values_videos" or self.find("num_frames") else tries
        if name == "pixel_values_videos":
            return [video]
        if name == "input_values":
            return [
                self.random(2, 4000),
                self.random(2, 12000),
                self.random(2, min(length, 1024), mel),
                self.random(2, 1, 4000),
                *spectrum,
            ]
        if name == "input_features":
            return spectrum
        if name in ("input_points",):
            return [torch.rand(1, 1, 1, 2, generator=self.generator) * height]
        if name in ("bbox",):
            return [torch.randint(0, 16, (2, 12, 4), generator=self.generator).sort(-1).values]
        if name in ("attention_mask", "decoder_attention_mask", "text_attention_mask"):
            return [torch.ones(2, 12, dtype=torch.long)]
        if name in ("past_values", "future_values", "past_observed_mask", "past_time_features", "future_time_features"):
            return self._series(name)
        if name in ("pixel_mask",):
            return [torch.ones(2, height, width, dtype=torch.long)]
        if name in ("codes", "audio_codes"):
            return [
                torch.randint(0, 8, (2, self.find("num_quantizers", "n_q", default=2), 12), generator=self.generator)
            ]
        if name in ("visual_feats",):
            return [self.random(2, 4, self.find("visual_feat_dim", default=2048))]
        if name in ("visual_pos",):
            return [torch.rand(2, 4, 4, generator=self.generator)]
        return []

    def _series(self, name: str) -> list[Any]:
        lags = self.find("lags_sequence", default=[0])
        history = self.find("context_length", default=16) + (max(lags) if lags and name.startswith("past") else 0)
        steps = history if name.startswith("past") else self.find("prediction_length", default=4) or 4
        width = self.find("input_size", "num_input_channels", default=1)
        if "time_features" in name:
            count = self.find("num_time_features", default=0) or 0
            return [self.random(2, steps, count + 1)]
        shape = (2, steps) if width == 1 and name != "past_values" else (2, steps, width)
        full = torch.ones(shape) if "mask" in name else self.random(*shape)
        return [full, self.random(2, steps), self.random(2, steps, width)]

    def tries(self) -> Iterator[dict[str, Any]]:
        """Whole calls, the plainest first."""
        required = [
            name
            for name, one in self.takes.items()
            if one.default is inspect.Parameter.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
        ]
        main = [self.main] if self.main in self.takes else []
        base = list(dict.fromkeys([*main, *required]))
        both = [name for name in ("input_ids", "pixel_values", "input_features", "input_values") if name in self.takes]
        names: list[list[str]] = []
        if "input_ids" in self.takes and "pixel_values" in self.takes:
            grids = ("image_grid_thw", "image_grid_hws", "grid_thw", "spatial_shapes", "pixel_attention_mask")
            own = [
                name for name in grids if name in self.takes and ("mask" not in name or "spatial_shapes" in self.takes)
            ]
            names.append(list(dict.fromkeys([*base, "input_ids", "pixel_values", *own])))
        if "decoder_input_ids" in self.takes:
            names.append([*base, "decoder_input_ids"])
        names += [base, ["input_ids"]] if "input_ids" in self.takes else [base]
        if "attention_mask" in self.takes:
            names.append([*base, "attention_mask"])
        if "bbox" in self.takes:
            names.insert(0, [*base, "bbox"])
        series = ("past_observed_mask", "past_time_features", "future_values", "future_time_features")
        extra = [name for name in series if name in self.takes]
        if extra:
            names.append(list(dict.fromkeys([*base, *extra])))
        if "decoder_input_ids" in self.takes:
            names.append(list(dict.fromkeys([*both, "decoder_input_ids"])))
        names.append(both)
        seen: set[tuple[str, ...]] = set()
        for wanted in names:
            known = [(name, self.values(name)) for name in dict.fromkeys(wanted)]
            known = [(name, found) for name, found in known if found]
            key = tuple(name for name, _ in known)
            if not known or key in seen:
                continue
            seen.add(key)
            for values in itertools.islice(itertools.product(*(found for _, found in known)), 12):
                yield dict(zip(key, values, strict=True))

    def with_images(self, call: dict[str, Any], problem: str) -> dict[str, Any] | None:
        """The call with as many image tokens in its text as the error says that there are image features."""
        token = self.find("image_token_id", "image_token_index", "image_token")
        found = re.search(r"features?:? (\d+)", problem) or re.search(r"features\D*(\d+)", problem)
        if not isinstance(token, int) or found is None or "input_ids" not in call:
            return None
        count, rows = int(found[1]), call["input_ids"].shape[0]
        if not 0 < count <= 2000 or count % rows:
            return None
        own = torch.full((rows, count // rows), token)
        ids = torch.cat([call["input_ids"][:, :2], own, call["input_ids"][:, 2:]], 1)
        kinds = {"mm_token_type_ids": (ids == token).long()} if "mm_token_type_ids" in self.takes else {}
        return {**call, "input_ids": ids, **kinds}


def tensors_of(value: Any) -> list[Tensor]:
    """The floating tensors of an output, however it is nested, caches left out."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        items = [v for k, v in value.items() if "past_key" not in str(k) and "cache" not in str(k)]
        return [tensor for one in items for tensor in tensors_of(one)]
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in tensors_of(one)]
    return []


@dataclass
class Built:
    """A small model and a call that it answers."""

    model: nn.Module
    call: dict[str, Any]
    way: str
    inside: bool = False
    """What the model's parts give is its output here, since the whole gives choices."""

    def run(self, model: nn.Module | None = None) -> list[Tensor]:
        """The floating tensors of the model's output, from one seed."""
        model = self.model if model is None else model
        torch.manual_seed(3)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        call = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in self.call.items()}
        if not self.inside:
            return tensors_of(model(**call))
        found: list[Tensor] = []
        parts = list(model.children())
        parts += [inner for part in parts if not _is_adapted(part) for inner in part.children()]
        hooks = [part.register_forward_hook(lambda *given: found.extend(tensors_of(given[2]))) for part in parts]
        try:
            model(**call)
        finally:
            for hook in hooks:
                hook.remove()
        return found


def _is_adapted(part: nn.Module) -> bool:
    """Whether lorakit or PEFT stands here in the place of a layer."""
    return isinstance(part, Adapted) or hasattr(part, "base_layer")


def build(case: Case) -> Built:
    """The first way of shrinking under which the model builds and runs.

    Raises:
        CannotBuildError: none; the message says why, and begins with "forward" where a model was built that nothing runs.
    """
    problems: list[str] = []
    ran = False
    try:
        config = default_config(case)
    except Exception as problem:
        raise CannotBuildError(f"configuration: {short(problem)}") from problem
    for way in WAYS:
        try:
            small = shrink(config, way)
            model = construct(case, small)
        except Exception as problem:
            problems.append(f"{way}: {short(problem)}")
            continue
        ran = True
        call = _answered(model, problems, way)
        if call is not None:
            return Built(model, call, way)
    raise CannotBuildError(("forward: " if ran else "") + "; ".join(problems))


def _answered(model: nn.Module, problems: list[str], way: str) -> dict[str, Any] | None:
    inputs = Inputs(model)
    first = ""
    for call in inputs.tries():
        for _ in range(2):
            again: dict[str, Any] | None = None
            try:
                torch.manual_seed(3)
                with torch.no_grad():
                    found = tensors_of(model(**call))
                if found and all(tensor.isfinite().any() for tensor in found[:1]):
                    return call
                first = first or "the output has no numbers"
            except Exception as problem:
                first = first or f"{short(problem)} ({', '.join(call)})"
                again = inputs.with_images(call, str(problem))
            if again is None:
                break
            call = again
    problems.append(f"{way}: {first}")
    return None


def short(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:160]
