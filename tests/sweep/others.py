"""Small models of other libraries: the denoisers of diffusers, and what torchvision and timm install.

diffusers: every model class whose forward takes a time step, built from the defaults of its constructor with sizes that are
shrunk by what their names say. What to call it with is found by calling: the error of a product says which size an input
should have had. torchvision and timm: for timm one model, the smallest, of each module that registers any. None is named.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import traceback
from typing import Any

import torch
from torch import Tensor, nn

from sweep.builder import LIMIT, Built, CannotBuildError, Case, Draw, draw_anew, short, tensors_of

LIBRARIES = ("diffusers", "torchvision", "timm")


def other_cases() -> list[Case]:
    """The models of other libraries, as far as they are installed; `model_type` names the library."""
    return [case for library in LIBRARIES if importlib.util.find_spec(library) for case in _CASES[library]()]


def missing() -> list[str]:
    """The libraries that are not installed."""
    return [library for library in LIBRARIES if not importlib.util.find_spec(library)]


def _vision() -> Any:
    """torchvision. PyPI's wheel is linked against CUDA: on a CPU build of torch its operators do not load, and its import asks
    for two of them. Their names are enough for the models, of which none but the detectors call them."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:  # the operators have loaded
            break
    import torchvision

    _KEPT.append(library)
    return torchvision


_KEPT: list[Any] = []


# -- torchvision and timm --------------------------------------------------------------------------------------------------


def _torchvision_cases() -> list[Case]:
    return [Case(f"torchvision/{one}", "torchvision", "torchvision") for one in _torchvision_files()]


def _torchvision_files() -> dict[str, list[str]]:
    models, found = _vision().models, {}
    for name in models.list_models():
        where = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
        found.setdefault(where, []).append(name)
    return found


def _timm_cases() -> list[Case]:
    _vision()
    import timm

    return [Case(f"timm/{module}", "timm", "timm") for module in timm.list_modules()]


_LITTLE = re.compile(r"pico|femto|atto|nano|tiny|xxs|_xs|_s\d|small|mini|_t\b|_0|18|test|_s$|b0")


def _smallest(names: list[str], make: Any) -> tuple[str, int]:
    """The smallest of the likely small ones, or of all, and how many parameters it has."""
    counts: dict[str, int] = {}
    for name in sorted(names, key=lambda name: (not _LITTLE.search(name), name))[:4]:
        try:
            with torch.device("meta"):
                counts[name] = sum(p.numel() for p in make(name).parameters())
        except Exception:  # a model that computes in its constructor
            counts[name] = LIMIT
    name = min(counts, key=counts.__getitem__)
    return name, counts[name]


def _build_vision(case: Case) -> Built:
    vision, module = _vision(), case.name.partition("/")[2]
    if case.model_type == "timm":
        import timm

        names = timm.list_models(module=module)

        def make(name: str) -> nn.Module:
            return timm.create_model(name, num_classes=10)
    else:
        names = _torchvision_files()[module]

        def make(name: str) -> nn.Module:
            takes = inspect.signature(vision.models.get_model_builder(name)).parameters
            more = {"weights_backbone": None} if "weights_backbone" in takes else {}
            return vision.models.get_model(name, weights=None, **more)

    if not names:
        raise CannotBuildError("registers no model")
    name, count = _smallest(names, make)
    if count > LIMIT:
        raise CannotBuildError(f"{name}: {count:,} parameters")
    try:
        torch.manual_seed(0)
        model = draw_anew(make(name).float().eval())
    except Exception as problem:
        raise CannotBuildError(short(problem)) from problem
    generator, problems = torch.Generator().manual_seed(1), []
    configured = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    for shape in ((3, 64, 64), tuple(configured), (3, 128, 128), (3, 8, 112, 112)):
        image = torch.randn(2 if shape[-1] == 64 else 1, *shape, generator=generator)
        names = list(inspect.signature(model.forward).parameters)
        calls = [{names[0]: image}, dict.fromkeys(names[:2], image), {names[0]: list(image)}]
        for call in calls:
            try:
                with torch.no_grad():
                    if tensors_of(model(**call)):
                        return Built(model, call, f"{name} {'x'.join(map(str, shape))}")
            except Exception as problem:
                problems.append(short(problem))
    raise CannotBuildError(f"forward: {problems[0] if problems else 'no numbers in its output'}")


# -- diffusers -------------------------------------------------------------------------------------------------------------

_TIMES = ("timestep", "timesteps", "t", "time_step", "r")


def _diffusers_cases() -> list[Case]:
    import diffusers

    found = []
    for name in sorted(set(dir(diffusers))):
        kind = getattr(diffusers, name, None)
        if inspect.isclass(kind) and issubclass(kind, diffusers.ModelMixin):
            takes = inspect.signature(kind.forward).parameters
            if set(takes) & set(_TIMES):
                found.append(Case(name, "diffusers", "denoiser"))
    return found


_SMALL: tuple[tuple[str, int], ...] = (
    (r"layers_per_block|^num_\w*layers$|^n_layers?$|^num_blocks$|depth$|^num_\w*blocks$|layers$", 2),
    (r"norm_num_groups|num_groups", 8),
    (r"attention_head_dim|head_dim|dim_head", 16),
    (r"num_attention_heads|num_kv_heads|num_heads|_heads$|num_key_value_heads", 2),
    (r"sample_size|sample_height|sample_width|pos_embed_max_size|max_seq|sample_frames", 16),
    (r"^num_embeds\w*|num_class_embeds|vocab_size", 16),
    (r"experts_per|top_k|num_activated", 2),
    (r"num_experts|num_routed_experts|num_local_experts", 4),
    (r"^in_channels$|^out_channels$|latent_channels|^\w*_in_channels$", 16),
    (r"freq|frequency_embedding", 32),
    (r"ffn|mlp_dim|intermediate|inner_dim|feed_forward", 64),
    (r"hidden|_dim$|_dims$|width|channels|_size$|embed|model_dim|^dim$|features", 32),
)
_AS_THEY_ARE = re.compile(
    r"patch|kernel|stride|ratio|factor|freq_shift|theta|period|in_channels|out_channels|axes|rope|scale"
)


def _shrunk(name: str, value: Any, heads_width: int) -> Any:
    if type(value) is int and value > 2:
        for pattern, small in _SMALL:
            if re.search(pattern, name):
                return min(value, small) if not _AS_THEY_ARE.search(name) or small == 2 else value
        return value
    if isinstance(value, tuple | list) and value and all(type(one) is int for one in value):
        if "axes" in name or "rope" in name:  # their sum is a head
            parts = len(value)
            rest = (heads_width // 2 - (parts - 1)) * 2 if heads_width // 2 >= parts else 2
            return type(value)([rest, *[2] * (parts - 1)])
        if re.search(r"channels|dims?$|widths?$|hidden", name) and max(value) >= 32:
            return type(value)(32 if one == value[0] else 64 for one in value)
        if re.search(r"layers|depth|blocks", name):
            return type(value)(min(one, 1) for one in value)
    return value


_OPEN = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "sample_size": 16, "patch_size": 2, "caption_channels": 32,
    "cross_attention_dim": 32, "text_embed_dim": 32,
    "num_embeds_ada_norm": 16, "clip_feat_dim": 32, "axes_dims_rope": (8, 4, 4),
    "attention_head_dim": 16, "cap_feat_dim": 32, "caption_channels_2": 32,
}  # fmt: skip
"""What constructors leave open, and every checkpoint gives."""


def _build_denoiser(case: Case) -> Built:
    import diffusers

    kind = getattr(diffusers, case.name)
    takes = inspect.signature(kind.__init__).parameters
    defaults = {k: p.default for k, p in takes.items() if k != "self" and p.default is not inspect.Parameter.empty}
    problems: list[str] = []
    for way in ("names", "filled", "heads kept", "defaults, few layers"):
        given = {
            name: _OPEN[name] for name, value in defaults.items() if value is None and name in _OPEN and way == "filled"
        }
        for name, value in defaults.items():
            width = (
                16
                if way == "names"
                else next((v for k, v in defaults.items() if k.endswith("head_dim") and type(v) is int), 16)
            )
            kept = way == "heads kept" and re.search(r"head|axes|rope", name)
            few = re.search(r"layers|depth|blocks", name) and "types" not in name
            small = value if kept or (way.startswith("defaults") and not few) else _shrunk(name, value, width)
            if small != value and name not in given:
                given[name] = small
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in kind(**given).parameters())
            if count > LIMIT:
                raise CannotBuildError(f"{count:,} parameters")
            torch.manual_seed(0)
            model = draw_anew(kind(**given).float().eval())
        except Exception as problem:
            problems.append(f"{way}: {short(problem)}")
            continue
        call = _Call(model, case).answered(problems, way)
        if call is not None:
            return Built(model, call, way)
    ran = any("(called with" in one for one in problems)
    raise CannotBuildError(("forward: " if ran else "") + "; ".join(problems))


class _Call:
    """Inputs of a denoiser, whose sizes are learnt from its errors. Every input starts with a last axis of its own, so that an
    error about a size names the input."""

    def __init__(self, model: nn.Module, case: Case) -> None:
        self.model, self.config = model, dict(getattr(model, "config", {}))
        self.takes = inspect.signature(model.forward).parameters

    def size(self, *names: str, default: int = 16) -> int:
        for name in names:
            value = self.config.get(name)
            value = value[0] if isinstance(value, tuple | list) and value else value
            if type(value) is int and value > 0:
                return value
        return default

    def base(self, layout: str, one_time: bool, more: bool) -> dict[str, Any]:
        draw = Draw(1)
        channels = self.size("in_channels", "latent_channels", "in_channel", "img_in_channels", default=4)
        width = self.size(
            "joint_attention_dim", "cross_attention_dim", "text_dim", "caption_channels", "text_embed_dim", "context_in_dim",
            "encoder_hidden_size", "caption_projection_dim", "cap_feat_dim", "text_embed_dim", "text_states_dim",
        )  # fmt: skip
        image = {
            "image": (2, channels, 16, 16), "video": (2, channels, 2, 16, 16), "tokens": (2, 16, channels),
            "frames": (2, 2, channels, 16, 16), "signal": (2, channels, 32), "rows": (2, channels),
        }[layout]  # fmt: skip
        tokens = {"tokens": 16}.get(layout, 16)
        made: dict[str, Any] = {}
        for name, one in self.takes.items():
            required = one.default is inspect.Parameter.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
            if name in _TIMES:
                made[name] = torch.tensor([5.0]) if one_time else torch.tensor([5.0, 5.0])
            elif name in ("hidden_states", "sample", "x", "latents", "noisy_latents"):
                made[name] = draw.normal(*image)
            elif re.search(r"mask", name):
                if required or "encoder" in name or "text" in name:
                    made[name] = torch.ones(2, 7, dtype=torch.long if required else torch.bool)
            elif name in ("txt_ids", "img_ids"):
                made[name] = torch.zeros(
                    7 if name == "txt_ids" else tokens, len(self.config.get("axes_dims_rope") or (1, 1, 1))
                )
            elif re.search(r"pooled", name):
                made[name] = draw.normal(
                    2, self.size("pooled_projection_dim", "pooled_text_dim", "text_embed_2_dim", default=17)
                )
            elif re.search(r"encoder_hidden_states$|^text_embeds?$|prompt_embed|^context$|caption|cap_feats", name):
                made[name] = draw.normal(2, 7, width)
            elif name == "guidance" and self.config.get("guidance_embeds", required):
                made[name] = torch.tensor([3.0, 3.0])
            elif re.search(r"class_labels|labels", name) and (required or more):
                made[name] = torch.tensor([1, 2])
            elif name in ("height", "width", "num_frames") and (required or more):
                made[name] = 1 if "frame" in name else 4
            elif name == "img_shapes":
                made[name] = [[(1, 4, 4)]] * 2
            elif name == "padding_mask" and more:
                made[name] = torch.ones(1, 1, 16, 16)
            elif required and re.search(r"cond$|latents$", name):
                made[name] = draw.normal(*image)
            elif required and re.search(r"size$|crop_coords", name):
                made[name] = torch.full((2, 2), 16.0)
            elif required and re.search(r"ids$|indices$", name):
                made[name] = torch.zeros(23 if name == "position_ids" else 7, 3)
            elif required and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL):
                made[name] = draw.normal(2, 7, 19)
        return made

    def answered(self, problems: list[str], way: str) -> dict[str, Any] | None:
        furthest, words = -1, ""
        for layout in ("image", "video", "tokens", "frames", "signal", "rows"):
            for one_time, more in ((False, False), (False, True), (True, True)):
                call = self.base(layout, one_time, more)
                for _ in range(8):
                    try:
                        torch.manual_seed(3)
                        with torch.no_grad():
                            found = tensors_of(self.model(**call))
                        if found and found[0].isfinite().any():
                            return call
                        break
                    except Exception as problem:
                        frames = traceback.extract_tb(problem.__traceback__)
                        here = next((f.lineno or 0 for f in frames if f.name == "forward"), 0)
                        if here > furthest:
                            furthest, words = here, f"{short(problem)} (called with {layout}: {', '.join(call)})"
                        again = self.resized(call, str(problem))
                        if again is None:
                            break
                        call = again
        problems.append(f"{way}: {words}")
        return None

    def resized(self, call: dict[str, Any], problem: str) -> dict[str, Any] | None:
        """The call with one input in the size that an error asks for; None where it does not tell."""
        product = re.search(r"cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)", problem)
        normed = re.search(r"normalized_shape=\[(\d+)\].*size\[.*?(\d+)\]", problem)
        convolved = re.search(r"weight of size \[\d+, (\d+).*to have (\d+) channels, but got (\d+) channels", problem)
        if convolved:
            found, wanted, axis = int(convolved[3]), int(convolved[2]), 1
        elif product:
            found, wanted, axis = int(product[1]), int(product[2]), -1
        elif normed:
            found, wanted, axis = int(normed[2]), int(normed[1]), -1
        else:
            return None
        for name, value in call.items():
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[axis] == found != wanted:
                shape = list(value.shape)
                shape[axis] = wanted
                return {**call, name: Draw(2).normal(*shape)}
        return None


if importlib.util.find_spec("torchvision"):
    _vision()  # before transformers imports it

_CASES = {"diffusers": _diffusers_cases, "torchvision": _torchvision_cases, "timm": _timm_cases}


def build_other(case: Case) -> Built:
    """The model of a case of another library, with a call that it answers; raises CannotBuildError as `build` does."""
    return _build_denoiser(case) if case.model_type == "diffusers" else _build_vision(case)
