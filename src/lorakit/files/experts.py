"""Experts in files: PEFT's stacks (`target_parameters`), one pair of factors for each expert, and stacks of three
axes.

PEFT writes the factors of all experts of a parameter as one pair, A (experts · rank, in) with the experts one upon
the other, and B (out, rank · experts) with the experts running fastest: `B[:, k · experts + e]` is column k of
expert e. Each targeted parameter of a module is a wrapper of its own around the one before, so the last stands at
the module's own name and each earlier one below one `base_layer` more. transformers 4 had a module for each expert,
and so have the files of that time; other tools keep three axes. Whatever a file holds is read as lorakit's own
form: PATH.PARAMETER.EXPERT.lora_A.weight and its B.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.adapter.targets import Targets, asked_sites
from lorakit.core.delta import LowRank, Method
from lorakit.core.layer import Adapted
from lorakit.core.layout import Expert, Site, Transposed
from lorakit.core.stacks import stacked_sites
from lorakit.core.walking import has_suffix, value_for, walk
from lorakit.errors import LorakitError
from lorakit.files.packing import is_pair

EXPERT_MATRICES = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
    "gate_up_proj": "gate_up",
}
"""What other files call an expert's matrices."""
_OLD_BLOCKS = {".block_sparse_moe.": ".mlp."}
"""Names of mixtures in transformers 4 -> in 5."""


GROUPS = 32
"""How many experts a file must have, over all its stacks, before the lengths of their columns say anything."""


@dataclass(frozen=True)
class Stack:
    """One parameter of a module that holds its experts: its name and one of its sites."""

    module: nn.Module
    name: str
    site: Site

    @property
    def layout(self) -> Expert:
        return cast(Expert, self.site.layout)

    @property
    def turned(self) -> bool:
        """Whether PEFT's factors lie the other way: the matrices are stored (in, out) and the class does not say so."""
        return isinstance(self.layout.inner, Transposed) and not hasattr(self.module, "is_transposed")


def stacks_of(module: nn.Module) -> dict[str, Stack]:
    """The stacks of experts of a module by parameter, in the order in which PEFT wraps them."""
    sites = [site for site in stacked_sites(module) if type(site.layout) is Expert]
    return {site.weight: Stack(module, site.weight, site) for site in sites}


# -- written ---------------------------------------------------------------------------------------------------------------


def in_stacks(layer: Adapted, adapter: str) -> dict[str, dict[int, LowRank]]:
    """Parameter -> expert -> delta, for a layer whose experts have a plain LoRA; empty for any other, which PEFT has
    no form for."""
    found: dict[str, dict[int, LowRank]] = {}
    for key, delta in layer.deltas_of(adapter).items():
        layout = layer.sites[key].layout
        if type(layout) is not Expert or not is_pair(delta):
            return {}
        found.setdefault(layer.sites[key].weight, {})[layout.index] = cast(LowRank, delta)
    return found


def stack_spec(deltas: Mapping[int, LowRank]) -> Method:
    """The spec of a stack in the file: the first expert's scale, and the largest rank."""
    first = next(iter(deltas.values()))
    return first.spec.resized(max(delta.factors()[1].shape[0] for delta in deltas.values()))


def stack_tensors(layer: Adapted, adapter: str, plain: str) -> dict[str, Tensor]:
    """The tensors of a layer's stacks under PEFT's names."""
    own = in_stacks(layer, adapter)
    result = {}
    for depth, (name, deltas) in enumerate(reversed(own.items())):
        stack = stacks_of(layer.base)[name]
        rank, scale = cast(Any, stack_spec(deltas)).rank, next(iter(deltas.values())).scale
        As, Bs = [], []
        for expert in range(stack.layout.count):
            A, B = torch.zeros(rank, stack.layout.shape.in_), torch.zeros(stack.layout.shape.out, rank)
            if expert in deltas:
                own_B, own_A = (factor.detach() for factor in deltas[expert].gated())
                A, B = A.to(own_A), B.to(own_B)
                A[: len(own_A)] = own_A
                B[:, : len(own_A)] = own_B * (deltas[expert].scale / scale)
            As.append(B.T if stack.turned else A)
            Bs.append(A.T if stack.turned else B)
        prefix = f"{plain}.{'base_layer.' * depth}"
        result[f"{prefix}lora_A.weight"] = torch.cat(As)
        result[f"{prefix}lora_B.weight"] = torch.stack(Bs, dim=2).flatten(1)
    return result


# -- read ------------------------------------------------------------------------------------------------------------------


Pair = tuple[Tensor, Tensor]
"""(B, A) of one expert: (out, rank), (rank, in)."""


@dataclass
class Reading:
    """What came of a file: tensors under lorakit's own names, the configuration with ranks and scales of stacks, and
    which parameters of which module (by plain name) it has."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    parameters: dict[str, list[str]]


def read_stacks(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    model: nn.Module,
    plain: Mapping[str, str],
    targets: Targets | None = None,
) -> Reading:
    """A file's tensors, with those of stacks of experts under lorakit's own names; `targets`: what lorakit.json says was asked
    for, so that the order of columns is known, and which experts are zeros because PEFT has whole stacks only.

    Raises:
        LorakitError: a stack's tensors do not fit the model's experts, or the file cannot tell how it lies.
    """
    reading = Reading(_renamed(tensors, plain), dict(config), {})
    found = {plain[path]: stacks for path, module in walk(model) if (stacks := stacks_of(module))}
    if targets is None:
        check_order(reading.config, _columns(reading.tensors, found))
    for path, stacks in found.items():
        _read_module(reading, path, stacks, targets)
    for path, module in walk(model):
        if plain[path] not in reading.parameters:
            reading.parameters.update(_own_form(reading, plain[path], stacked_sites(module)))
    asked = reading.config.get("target_modules")
    if reading.parameters and isinstance(
        asked, list
    ):  # names of layers that there are no more, now that experts are stacked
        known = plain.values()
        gone = {one for one in asked if one in EXPERT_MATRICES and not any(has_suffix(path, one) for path in known)}
        reading.config["target_modules"] = [one for one in asked if one not in gone]
    for told in ("lora_B_layout", "unsloth_fused_expert_lora"):
        reading.config.pop(told, None)
    return reading


def _renamed(tensors: Mapping[str, Tensor], plain: Mapping[str, str]) -> dict[str, Tensor]:
    """Mixtures under the names that they have here."""
    places = "\n".join(plain.values())
    result = {}
    for key, tensor in tensors.items():
        for old, new in _OLD_BLOCKS.items():
            if old in key and old not in places and new in places:
                key = key.replace(old, new)
        result[key] = tensor
    return result


def _read_module(reading: Reading, path: str, stacks: dict[str, Stack], targets: Targets | None) -> None:
    own = re.compile(rf"{re.escape(path)}\.(.*)lora_([AB])\.weight")
    found: dict[str, dict[str, Tensor]] = {}
    for key in reading.tensors:
        match = own.fullmatch(key)
        if match:
            found.setdefault(match[1], {})[match[2]] = reading.tensors[key]
    pairs: dict[str, dict[int, Pair]] = {}
    for places in (_wrapped(found, stacks, reading, path), _apart(found, stacks, path)):
        for name, experts in places.items():
            pairs.setdefault(name, {}).update(experts)
    if not pairs:
        return
    for place in found:
        for letter in found[place]:
            del reading.tensors[f"{path}.{place}lora_{letter}.weight"]
    if targets is not None:
        asked = {site.name for site in asked_sites(path, stacked_sites(next(iter(stacks.values())).module), targets)}
        pairs = {name: {e: pair for e, pair in own.items() if f"{name}.{e}" in asked} for name, own in pairs.items()}
    names: dict[str, list[str]] = {
        name: [name] if len(pairs[name]) == stack.layout.count else [f"{name}.{expert}" for expert in pairs[name]]
        for name, stack in stacks.items()
        if pairs.get(name)
    }
    reading.parameters[path] = [one for own in names.values() for one in own]
    for name, experts in pairs.items():
        for expert, (B, A) in experts.items():
            reading.tensors[f"{path}.{name}.{expert}.lora_A.weight"] = A
            reading.tensors[f"{path}.{name}.{expert}.lora_B.weight"] = B
        if experts:
            _say_rank(reading.config, f"{path}.{name}", next(iter(experts.values()))[1].shape[0])
    _say_targets(reading.config, path, names)


def _own_form(reading: Reading, path: str, sites: list[Site]) -> dict[str, list[str]]:
    """Which of the matrices that a module multiplies by itself a file has in lorakit's own form: the parameters of which it
    has every expert by name, else the experts."""
    held = [site.name for site in sites if any(key.startswith(f"{site.place(path)}.") for key in reading.tensors)]
    names: dict[str, None] = {}
    for site in sites:
        if site.name in held:
            whole = all(one.name in held for one in sites if one.weight == site.weight)
            names[site.weight if whole else site.name] = None
    return {path: list(names)} if names else {}


def _say_rank(config: dict[str, Any], place: str, rank: int) -> None:
    """The rank that a stack's tensors have, with the scale that the configuration gives it."""
    said = value_for(config.get("rank_pattern") or {}, place) or config.get("r", 8)
    if said == rank:
        return
    alpha = value_for(config.get("alpha_pattern") or {}, place)
    alpha = config.get("lora_alpha", 8) if alpha is None else alpha
    grown = (rank / said) ** (0.5 if config.get("use_rslora") else 1.0)
    config["rank_pattern"] = {re.escape(place): rank, **(config.get("rank_pattern") or {})}
    config["alpha_pattern"] = {re.escape(place): alpha * grown, **(config.get("alpha_pattern") or {})}


def _say_targets(config: dict[str, Any], path: str, names: Iterable[str]) -> None:
    """The parameters as the configuration of today names them, whatever the file's said."""
    asked = list(config.get("target_parameters") or ())
    asked += [f"{path}.{name}" for name in names if not any(has_suffix(f"{path}.{name}", one) for one in asked)]
    config["target_parameters"] = asked


def _wrapped(
    found: Mapping[str, dict[str, Tensor]], stacks: dict[str, Stack], reading: Reading, path: str
) -> dict[str, dict[int, Pair]]:
    """PEFT's wrappers, one around the other."""
    depths = sorted(place.count("base_layer.") for place in found if re.fullmatch(r"(base_layer\.)*", place))
    if not depths:
        return {}
    names = _parameters(found, stacks, reading.config, path, len(depths))
    result: dict[str, dict[int, Pair]] = {}
    lying = _lies_turned(found, names, stacks, reading.config)
    for depth, name in zip(depths, reversed(names), strict=True):
        pair, stack = found["base_layer." * depth], stacks[name]
        where = f"{path}.{'base_layer.' * depth}lora_A.weight"
        if set(pair) != {"A", "B"}:
            raise LorakitError(f"load: the file holds {where} or its B without the other.")
        A, B, count = pair["A"], pair["B"], stack.layout.count
        if A.ndim == 3:  # (experts, rank, in) and (out, rank, experts)
            experts = {e: (B[..., e], A[e]) for e in range(count)}
        else:
            rank = A.shape[0] // count
            if A.shape[0] % count or B.shape[1] != A.shape[0]:
                raise LorakitError(
                    f"load: {where} has shape {tuple(A.shape)} and its B {tuple(B.shape)}; for {count} experts both need a "
                    "rank that is a multiple of it."
                )
            packed = (
                B.unflatten(1, (count, rank)).mT if is_grouped(reading.config, name) else B.unflatten(1, (rank, count))
            )
            experts = {e: (packed[..., e], A[e * rank : (e + 1) * rank]) for e in range(count)}
        shape = stack.layout.shape
        for expert, (own_B, own_A) in experts.items():
            if lying:
                own_B, own_A = own_A.T, own_B.T
            if own_A.shape[1] != shape.in_ or own_B.shape[0] != shape.out:
                raise LorakitError(
                    f"load: {where} has shape {tuple(A.shape)} and its B {tuple(B.shape)}; the experts of {path}.{name} are "
                    f"{shape.out} × {shape.in_}."
                )
            result.setdefault(name, {})[expert] = (own_B, own_A)  # views: nothing is copied twice
    return result


def _parameters(
    found: Mapping[str, Any], stacks: dict[str, Stack], config: Mapping[str, Any], path: str, count: int
) -> list[str]:
    """Which parameters a file's wrappers are around, in the order of the model: those that are targeted, or told by
    their sizes."""
    asked = [
        name
        for name in stacks
        if any(has_suffix(f"{path}.{name}", one) for one in config.get("target_parameters") or ())
    ]
    if len(asked) == count:
        return asked
    if len(stacks) == count:
        return list(stacks)
    widths = [
        {pair["A"].shape[-1], pair["B"].shape[0]} for pair in (found["base_layer." * depth] for depth in range(count))
    ]
    fitting = [name for name, stack in stacks.items() if {stack.layout.shape.in_, stack.layout.shape.out} in widths]
    if len(fitting) == count:
        return fitting
    raise LorakitError(
        f"load: the file has {count} of the {len(stacks)} parameters of {path} ({', '.join(stacks)}) and does not say "
        "which; name them in target_parameters of adapter_config.json."
    )


def _lies_turned(
    found: Mapping[str, Any], names: list[str], stacks: dict[str, Stack], config: Mapping[str, Any]
) -> bool:
    """Whether A is the factor of the outputs. The sizes say so, where a matrix is not square; else the version of
    PEFT."""
    for depth, name in enumerate(reversed(names)):
        shape, pair = stacks[name].layout.shape, found.get("base_layer." * depth)
        if pair is not None and shape.in_ != shape.out:
            return bool(pair["A"].shape[-1] == shape.out)
    stack = stacks[names[0]]
    said = re.match(r"(\d+)\.(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    version = tuple(map(int, said.groups())) if said else (0, 17, 0)
    flagged = bool(getattr(stack.module, "is_transposed", False))
    if version == (0, 19, 0):
        return flagged
    return stack.turned if version > (0, 19, 0) else not isinstance(stack.layout.inner, Transposed)


def is_grouped(config: Mapping[str, Any], name: str) -> bool:
    """Whether a file says that the columns of B lie expert by expert, as Unsloth has written them; PEFT's run over the experts
    first."""
    told = config.get("unsloth_fused_expert_lora") or {}
    layout = (told.get("parameters") or {}).get(name, {}).get("lora_B_layout") or config.get("lora_B_layout")
    return bool(layout == "grouped_by_expert")


def _columns(tensors: Mapping[str, Tensor], found: Mapping[str, dict[str, Stack]]) -> list[tuple[Tensor, int]]:
    """Every B of a stack in a file, and the number of its experts."""
    result = []
    for path, stacks in found.items():
        own = re.compile(rf"{re.escape(path)}\.(base_layer\.)*lora_B\.weight")
        count = next(iter(stacks.values())).layout.count
        result += [(tensor, count) for key, tensor in tensors.items() if own.fullmatch(key)]
    return result


def check_order(config: Mapping[str, Any], stacked: Iterable[tuple[Tensor, int]]) -> None:
    """Refuse a file whose columns of B look as if they lay expert by expert and that does not say so: shapes do not tell, the
    lengths of columns do, which differ between experts more than within one. `stacked`: each B, and its number of experts."""
    between = {"by expert": 0.0, "by rank": 0.0}
    within, groups_seen = dict(between), 0
    if config.get("lora_B_layout") or config.get("unsloth_fused_expert_lora"):
        return
    for B, count in stacked:
        rank = B.shape[1] // count
        if B.ndim != 2 or rank < 2 or count < 2 or B.shape[1] % count:
            continue
        length = torch.linalg.vector_norm(B.float(), dim=0).clamp_min(1e-12).log()
        groups_seen += count
        for kind, groups in (("by expert", length.view(count, rank)), ("by rank", length.view(rank, count).T)):
            between[kind] += float(groups.mean(dim=1).var()) * rank
            within[kind] += float(groups.var(dim=1).mean())
    found = {kind: between[kind] / max(within[kind], 1e-12) for kind in between}
    if groups_seen >= GROUPS and found["by expert"] > 4 and found["by rank"] < 2:
        raise LorakitError(
            "load: in this file the columns of the experts' B look as if they lay expert by expert (as some versions of "
            'Unsloth write them) and not as PEFT does. Say which by "lora_B_layout": "grouped_by_expert" or "rank_major" in '
            "adapter_config.json."
        )


def _apart(found: Mapping[str, dict[str, Tensor]], stacks: dict[str, Stack], path: str) -> dict[str, dict[int, Pair]]:
    """A pair for each expert and matrix (`3.gate_proj.`), or one of three axes for all of them (`gate_up_proj.`,
    `w1.`)."""
    matrices: dict[str, dict[int, Pair]] = {}
    for place, pair in found.items():
        match = re.fullmatch(rf"(?:(\d+)\.)?({'|'.join(EXPERT_MATRICES)})\.", place)
        if match is None or set(pair) != {"A", "B"}:
            continue
        own = matrices.setdefault(EXPERT_MATRICES[match[2]], {})
        if match[1] is not None:
            own[int(match[1])] = (pair["B"], pair["A"])
        elif pair["A"].ndim == 3:
            count = next(iter(stacks.values())).layout.count
            one = {
                letter: tensor.expand(count, *tensor.shape[1:]) for letter, tensor in pair.items()
            }  # 1: shared by all experts
            own.update({expert: (one["B"][expert], one["A"][expert]) for expert in range(count)})
    result: dict[str, dict[int, Pair]] = {}
    for name, stack in stacks.items():
        kind = EXPERT_MATRICES.get(name, name)
        if kind == "gate_up" and "gate_up" not in matrices and {"gate", "up"} & set(matrices):
            gates, ups = matrices.get("gate", {}), matrices.get("up", {})
            result[name] = {e: joined(gates.get(e), ups.get(e), stack) for e in sorted({*gates, *ups})}
        elif kind in matrices:
            result[name] = matrices[kind]
    ranks = {name: {A.shape[0] for _, A in experts.values()} for name, experts in result.items()}
    for name, experts in result.items():
        lacking = [e for e in range(stacks[name].layout.count) if e not in experts]
        if lacking or len(ranks[name]) > 1:
            reason = f"expert {lacking[0]} is missing" if lacking else f"the ranks differ ({sorted(ranks[name])})"
            raise LorakitError(f"load: of the experts of {path}.{name} in the file {reason}.")
    return result


def joined(gate: Pair | None, up: Pair | None, stack: Stack) -> Pair:
    """Gate and up of one expert as one pair for both: A's one upon the other, B block by block."""
    out = stack.layout.shape.out // 2
    halves = [pair for pair in (gate, up) if pair is not None]
    same = len(halves) == 2 and halves[0][1].shape == halves[1][1].shape and torch.equal(halves[0][1], halves[1][1])
    A = halves[0][1] if same else torch.cat([pair[1] for pair in halves])
    B = A.new_zeros(2, out, len(A))
    start = 0
    for index, pair in enumerate((gate, up)):
        if pair is not None:
            B[index, :, start : start + len(pair[1])] = pair[0]
            start += 0 if same else len(pair[1])
    concatenated = getattr(stack.module, "is_concatenated", True)
    return (B.flatten(0, 1) if concatenated else B.transpose(0, 1).flatten(0, 1)), A


__all__ = [
    "EXPERT_MATRICES",
    "Reading",
    "check_order",
    "in_stacks",
    "is_grouped",
    "joined",
    "read_stacks",
    "stack_spec",
    "stack_tensors",
    "stacks_of",
]
