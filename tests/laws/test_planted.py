"""Each law catches the bug it is there for: with the bug planted the law raises AssertionError, without it it holds.

A bug is a wrong Delta, Layout, Adapted, kernel or file, put in by monkeypatch where a careless change would put it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laws import laws
from laws.cases import KINDS, SPECS, Affine, AffineDelta, Case, Dense, DenseDelta
from lorakit.core import call, kernel, layer, layout, lazy_sum, mixed, sites, uniform
from lorakit.core.contents import LayerContents
from lorakit.core.delta import Form, LowRank, Pool
from lorakit.core.routing import Routing
from lorakit.core.state import ModelState
from lorakit.core.storage import Float, Snapshot, owner, value_of
from lorakit.files import store
from lorakit.init import Kaiming
from lorakit.init.initialiser import Factors, Start
from lorakit.methods.lora import LoRA, LoRADelta

BY_NAME = {kind.name: kind for kind in KINDS}
LORA = SPECS["lora"][0]


pytestmark = pytest.mark.usefixtures("one_thread")


def case(kind: str, spec: Any = LORA) -> Case:
    return Case(spec, BY_NAME[kind])


Plant = Callable[[pytest.MonkeyPatch], None]


# -- the bugs --------------------------------------------------------------------------------------------------------------


def start_not_zero(patch: pytest.MonkeyPatch) -> None:
    """B is drawn like A."""
    build = LoRA.build

    def planted(self: LoRA, shape: Any, pool: Pool) -> LoRADelta:
        delta = build(self, shape, pool)
        nn.init.normal_(delta.A)
        nn.init.normal_(delta.B)
        return delta

    patch.setattr(LoRA, "build", planted)


def embedding_starts_as_linear(patch: pytest.MonkeyPatch) -> None:
    """An initialiser that draws A for a lookup too, where B is not zero."""

    def planted(self: Kaiming, start: Start) -> Factors:
        shape = start.shape
        return Factors(start.zeros(shape.out, start.rank).normal_(), start.zeros(start.rank, shape.in_).normal_())

    patch.setattr(Kaiming, "factors", planted)


def wrong_scale_in_act(patch: pytest.MonkeyPatch) -> None:
    """act with alpha in place of alpha / rank."""
    planted = lambda self, call: call.product(*self.factors(), self.gate(), self.spec.alpha)  # noqa: E731
    patch.setattr(LoRADelta, "act", planted)


def scale_missing_in_kernel(patch: pytest.MonkeyPatch) -> None:
    product = kernel.product
    patch.setattr(
        uniform,
        "product",
        lambda x, B, A, gate=None, scale=1.0, dropout=0.0, W=None, b=None: product(x, B, A, gate, 1.0, dropout, W, b),
    )


def transposed_layout(patch: pytest.MonkeyPatch) -> None:
    """Conv1D's weight taken as (out, in) where it is square enough to pass, here by reshaping."""
    patch.setattr(layout.Transposed, "weight", lambda self, M, like: M.reshape(like.shape))


def transposed_factor(patch: pytest.MonkeyPatch) -> None:
    """B's memory read in the other order."""
    planted = lambda self: (self.B.T.reshape(self.B.shape), self.A)  # noqa: E731
    dense = lambda self, W: self.scale * (self.B @ self.A)  # noqa: E731
    patch.setattr(LoRADelta, "factors", planted)
    patch.setattr(LoRADelta, "dense", dense)


def groups_in_the_other_order(patch: pytest.MonkeyPatch) -> None:
    """A grouped convolution whose B is split across groups instead of into them."""

    def planted(self: layout.Convolution, base: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        per_group = B.unflatten(0, (-1, self.groups)).transpose(0, 1)
        y = torch.einsum("...gr,gor->...go", h, per_group).flatten(-2)
        return y.movedim(-1, y.ndim - len(self.window))

    patch.setattr(layout.Convolution, "up", planted)


def padding_mode_forgotten(patch: pytest.MonkeyPatch) -> None:
    """The convolution of A pads with zeros whatever the layer's mode is."""

    def planted(self: layout.Convolution, base: Any, x: Tensor, M: Tensor) -> Tensor:
        plain = type(base)(
            base.in_channels, base.out_channels, base.kernel_size, base.stride, base.padding, base.dilation, base.groups
        )
        return plain._conv_forward(x, M.reshape(-1, *self.window), None)

    patch.setattr(layout.Convolution, "_run", planted)


def rows_in_a_block(patch: pytest.MonkeyPatch) -> None:
    """A part with two ranges placed as if it were one."""

    def planted(self: layout.Rows, part: Tensor) -> Tensor:
        whole = part.new_zeros(*part.shape[:-1], self.inner.shape.out)
        start = self.ranges[0][0]
        whole[..., start : start + part.shape[-1]] = part
        return whole

    patch.setattr(layout.Rows, "_place", planted)


def bias_seen_by_deltas(patch: pytest.MonkeyPatch) -> None:
    """`call.y` with the bias still in it."""
    patch.setattr(call.LayerCall, "y", property(lambda self: self.output if self.output is not None else 0))


def merge_forgets_the_bias(patch: pytest.MonkeyPatch) -> None:
    substitutes = layer.Adapted.substitutes

    def planted(self: layer.Adapted, blend: Any) -> dict[str, Tensor]:
        return {name: value for name, value in substitutes(self, blend).items() if "bias" not in name}

    patch.setattr(layer.Adapted, "substitutes", planted)


def shift_not_asked(patch: pytest.MonkeyPatch) -> None:
    """The layer never adds a delta's own bias."""
    patch.setattr(uniform, "change", lambda self, d, site, x, y: d.act(call.LayerCall(self.base, site, x, y)))


def merges_what_it_cannot(patch: pytest.MonkeyPatch) -> None:
    """A bias that has no place is dropped in silence."""
    substitutes = layer.Adapted.substitutes

    def planted(self: layer.Adapted, blend: Any) -> dict[str, Tensor]:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(AffineDelta, "shift", lambda self, b, W: None)
            return substitutes(self, blend)

    patch.setattr(layer.Adapted, "substitutes", planted)


def _restores(patch: pytest.MonkeyPatch, wrong: Callable[[nn.Module, str, Tensor], None]) -> None:
    """What `merged` kept is put back in a wrong way: by `wrong(layer, tensor name, what was there)`."""
    hold = Float.snapshot

    def planted(self: Float, of: nn.Module, tensor: str) -> Snapshot:
        before = of.get_parameter(tensor)
        return Snapshot(hold(self, of, tensor).read, lambda: wrong(of, tensor, before))

    patch.setattr(Float, "snapshot", planted)


def restores_by_subtraction(patch: pytest.MonkeyPatch) -> None:
    """W + ΔW - ΔW is not W."""

    def wrong(of: nn.Module, tensor: str, before: Tensor) -> None:
        now = of.get_parameter(tensor)
        now.data.sub_(now.detach() - before.detach())

    _restores(patch, wrong)


def restores_copies(patch: pytest.MonkeyPatch) -> None:
    """The bits are right, but optimisers and ties know another object."""

    def wrong(of: nn.Module, tensor: str, before: Tensor) -> None:
        module, attribute = owner(of, tensor)
        setattr(module, attribute, nn.Parameter(before.detach().clone(), before.requires_grad))

    _restores(patch, wrong)


def base_not_frozen(patch: pytest.MonkeyPatch) -> None:
    attach = Case.attach

    def planted(self: Case, model: Any, name: str, **options: Any) -> Any:
        made = attach(self, model, name, **options)
        model.layer.base.bias.requires_grad_(True)
        return made

    patch.setattr(Case, "attach", planted)


def factor_without_gradient(patch: pytest.MonkeyPatch) -> None:
    """A detached in the product: it never moves."""
    patch.setattr(LoRADelta, "factors", lambda self: (self.B, self.A.detach()))


def forward_trains_a_buffer(patch: pytest.MonkeyPatch) -> None:
    """A forward in training mode that nudges the frozen weight."""
    forward = layer.Adapted.forward

    def planted(self: layer.Adapted, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            self.base.weight.mul_(1.0001)
        return forward(self, *args, **kwargs)

    patch.setattr(layer.Adapted, "forward", planted)


def saves_a_stray_tensor(patch: pytest.MonkeyPatch) -> None:
    tensors_of = store.tensors_of
    patch.setattr(store, "tensors_of", lambda a: {**tensors_of(a), "base_model.model.layer.stray": torch.ones(2)})
    patch.setattr(store, "fill", _lenient(store.fill))


def _lenient(fill: Any) -> Any:
    def planted(made: Any, tensors: dict[str, Tensor], *rest: Any) -> None:
        fill(made, {key: value for key, value in tensors.items() if "stray" not in key}, *rest)

    return planted


def saves_half_precision(patch: pytest.MonkeyPatch) -> None:
    tensors_of = store.tensors_of
    patch.setattr(store, "tensors_of", lambda a: {key: value.bfloat16() for key, value in tensors_of(a).items()})


def rows_shifted_by_one(patch: pytest.MonkeyPatch) -> None:
    """Every row gets its neighbour's adapter."""
    _routed_by(patch, lambda table: table.roll(1, 0))


def _routed_by(patch: pytest.MonkeyPatch, wrong: Callable[[Tensor], Tensor]) -> None:
    """Mixed batches go by another table of weights than was asked for."""
    run = mixed.run_mixed

    def planted(of: layer.Adapted, routing: Routing, *rest: Any) -> Any:
        assert routing.table is not None
        return run(of, dataclasses.replace(routing, table=wrong(routing.table), _moved={}), *rest)

    patch.setattr(layer, "run_mixed", planted)


def first_rows_for_all(patch: pytest.MonkeyPatch) -> None:
    """The adapter of the first row serves the whole batch."""
    _routed_by(patch, lambda table: table[:1].expand_as(table))


def mask_rows_not_taken(patch: pytest.MonkeyPatch) -> None:
    """A padding mask keeps the whole batch's order while the rows are taken apart."""
    take = mixed.take_attention

    def planted(base: Any, args: Any, kwargs: Any, rows: Tensor) -> Any:
        given = take(base, args, kwargs, rows)
        if given.get("key_padding_mask") is not None:
            given["key_padding_mask"] = kwargs["key_padding_mask"][: len(rows)]
        return given

    patch.setattr(mixed, "take_attention", planted)


def form_without_scale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LowRank, "form", lambda self, W, b: Form(B=self.factors()[0], A=self.factors()[1]))


def form_scales_the_bias(patch: pytest.MonkeyPatch) -> None:
    """A gain lowered without taking the base's bias out of it."""
    patch.setattr(AffineDelta, "form", lambda self, W, b: Form(gain=1 + self.g, bias=self.c))


def count_off_by_one(patch: pytest.MonkeyPatch) -> None:
    card = dataclasses.replace(LoRA.card, parameters=lambda shape, spec: spec.rank * (shape.out + shape.in_) + 1)
    patch.setattr(LoRA, "card", card)


def pool_not_on_the_card(patch: pytest.MonkeyPatch) -> None:
    """A method that trains a shared tensor its card does not mention."""
    build = LoRA.build

    def planted(self: LoRA, shape: Any, pool: Pool) -> LoRADelta:
        pool.entry("shared", lambda: torch.zeros(3), frozen=False)
        return build(self, shape, pool)

    patch.setattr(LoRA, "build", planted)


def forward_counts_calls(patch: pytest.MonkeyPatch) -> None:
    """A counter on the layer."""
    forward = layer.Adapted.forward

    def planted(self: layer.Adapted, *args: Any, **kwargs: Any) -> Any:
        self.calls = self.__dict__.get("calls", 0) + 1
        return forward(self, *args, **kwargs)

    patch.setattr(layer.Adapted, "forward", planted)


def forward_fills_a_cache(patch: pytest.MonkeyPatch) -> None:
    """A dictionary on the delta that the first pass fills: no attribute is set, one is changed."""
    init, dense = DenseDelta.__init__, DenseDelta.dense

    def planted_init(self: DenseDelta, *args: Any) -> None:
        init(self, *args)
        self.cache = {}  # type: ignore[assignment]

    def planted(self: DenseDelta, W: Tensor) -> Tensor:
        self.cache["last"] = W  # type: ignore[operator]
        return dense(self, W)

    patch.setattr(DenseDelta, "__init__", planted_init)
    patch.setattr(DenseDelta, "dense", planted)


def forward_writes_a_tensor(patch: pytest.MonkeyPatch) -> None:
    """A tensor renormalised in place, to the value that it had."""
    factors = LoRADelta.factors

    def planted(self: LoRADelta) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            self.A.mul_(1.0)
        return factors(self)

    patch.setattr(LoRADelta, "factors", planted)


def forward_leaves_dropout_on(patch: pytest.MonkeyPatch) -> None:
    """Noise in every pass: the second gives another result."""
    act = AffineDelta.act
    patch.setattr(AffineDelta, "act", lambda self, call: act(self, call) * (1 + 1e-3 * torch.rand(())))


def blend_forgets_weights(patch: pytest.MonkeyPatch) -> None:
    run = uniform.run_uniform
    planted = lambda of, blend, *rest: run(of, [(name, 1.0 if w else 0.0) for name, w in blend], *rest)  # noqa: E731
    patch.setattr(layer, "run_uniform", planted)


def blend_of_biases_averages(patch: pytest.MonkeyPatch) -> None:
    """Replaced tensors of a blend as Σ weight · own, without the base's share."""

    def planted(self: layer.Adapted, blend: Any) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for name, weight in blend:
            if name in self.replacements:
                for key, own in self.replacements[name].tensors().items():
                    result[key] = result.get(key, 0.0) + weight * own
        return result

    patch.setattr(uniform, "replaced_tensors", planted)


def _planted_backward(change: Callable[[list[Tensor | None]], None]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        backward = kernel._Product.backward

        def planted(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            gradients = list(backward(ctx, dy))
            change(gradients)
            return tuple(gradients)

        patch.setattr(kernel._Product, "backward", staticmethod(planted))

    return plant


def _scaled(index: int) -> Plant:
    def change(gradients: list[Tensor | None]) -> None:
        gradient = gradients[index]
        gradients[index] = None if gradient is None else gradient * 1.01

    plant = _planted_backward(change)
    plant.__name__ = f"gradient_{('x', 'W', 'b', 'B', 'A', 'gate')[index]}_off"
    return plant


def fuses_an_unfrozen_weight(patch: pytest.MonkeyPatch) -> None:
    """The fused product, which gives the base's weight no gradient, runs where the user has unfrozen that weight."""
    is_fusable = uniform.is_fusable

    def planted(base: nn.Module, tensors: dict[str, Tensor]) -> bool:
        flags = {parameter: parameter.requires_grad for parameter in base.parameters()}
        try:
            return is_fusable(base.requires_grad_(False), tensors)
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)

    patch.setattr(uniform, "is_fusable", planted)


def substitutes_a_constant(patch: pytest.MonkeyPatch) -> None:
    """A substituted weight is taken off the stored numbers, whether or not the base's own trains."""
    substitutes = uniform.substitutes

    def planted(of: layer.Adapted, blend: Any) -> dict[str, Tensor]:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(uniform, "value_of", lambda base, name: value_of(base, name).detach())
            return substitutes(of, blend)

    patch.setattr(uniform, "substitutes", planted)


def modules_names_in_the_state(patch: pytest.MonkeyPatch) -> None:
    """The state dict has the names of lorakit's modules ("layer.base.weight")."""
    patch.delattr(LayerContents, "state_dict")


def adapters_missing_in_the_state(patch: pytest.MonkeyPatch) -> None:
    """The state dict has the base alone."""
    patch.setattr(ModelState, "base_alone", property(lambda self: True, lambda self, value: None), raising=False)


# -- of layers that are known by what they do, and of experts --------------------------------------------------------------


def believes_the_class(patch: pytest.MonkeyPatch) -> None:
    """A subclass of nn.Linear is taken for one, whatever its forward does."""
    patch.setattr(sites, "is_known", lambda module: True)


def _lazy_sums_by(patch: pytest.MonkeyPatch, wrong: Callable[[Any, Any], tuple[Any, Any]]) -> None:
    """Stacks of experts under low-rank deltas made of other parts than were asked for."""
    make = uniform._lazy_sum
    patch.setattr(uniform, "_lazy_sum", lambda W, parts: make(*wrong(W, parts)))


def experts_shifted_by_one(patch: pytest.MonkeyPatch) -> None:
    """Every expert gets its neighbour's delta."""

    def wrong(W: Tensor, parts: Any) -> tuple[Any, Any]:
        moved = [(w, dataclasses.replace(own, index=(own.index + 1) % own.count), delta) for w, own, delta in parts]
        return W, moved

    _lazy_sums_by(patch, wrong)


def stack_weights_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A blend over experts adds whole deltas."""
    _lazy_sums_by(patch, lambda W, parts: (W, [(1.0, own, delta) for _, own, delta in parts]))


def stack_detached(patch: pytest.MonkeyPatch) -> None:
    """The sum's own weight is taken off the graph."""
    _lazy_sums_by(patch, lambda W, parts: (W.detach(), parts))


def lazy_product_without_the_change(patch: pytest.MonkeyPatch) -> None:
    """A product by which an architecture multiplies its experts, answered with W alone."""
    patch.setitem(lazy_sum._ANSWERS, torch.bmm, lambda x, weight: torch.bmm(x, weight.W))


def lazy_index_forgets_a_factor(patch: pytest.MonkeyPatch) -> None:
    """Experts are gathered from W and U, and V's first stand for all."""
    planted = lambda w, index: w._as(w.W[index], (w.U[index], w.V[torch.zeros_like(index)]))  # noqa: E731
    patch.setitem(lazy_sum._ANSWERS, Tensor.__getitem__, planted)


def bias_of_the_first_expert(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layout.Expert, "own_bias", lambda self, bias: bias[0])


def tokens_taken_in_turns(patch: pytest.MonkeyPatch) -> None:
    """Tokens of all rows lie one row after the other; here they are taken to alternate."""
    patch.setattr(mixed, "_by_token", lambda table, x, *rest: table.repeat(x.shape[0] // table.shape[0], 1))


PLANTED: tuple[tuple[laws.Law, Plant, Case], ...] = (
    (laws.identity_at_start, start_not_zero, case("linear")),
    (laws.executions_agree, wrong_scale_in_act, case("conv1d")),
    (laws.state_is_the_bases, modules_names_in_the_state, case("linear")),
    (laws.state_is_the_bases, adapters_missing_in_the_state, case("linear")),
    (laws.executions_agree, scale_missing_in_kernel, case("linear")),
    (laws.executions_agree, transposed_layout, case("transposed")),
    (laws.executions_agree, transposed_factor, case("linear-plain")),
    (laws.executions_agree, groups_in_the_other_order, case("conv2d-groups-circular")),
    (laws.executions_agree, padding_mode_forgotten, case("conv2d-reflect")),
    (laws.executions_agree, rows_in_a_block, case("rows")),
    (laws.executions_agree, bias_seen_by_deltas, case("linear", Affine())),
    (laws.executions_agree, merge_forgets_the_bias, case("linear-own-bias")),
    (laws.executions_agree, merge_forgets_the_bias, case("linear", Affine())),
    (laws.executions_agree, shift_not_asked, case("conv3d", Affine())),
    (laws.refuses_what_it_cannot, merges_what_it_cannot, case("linear-plain", Affine())),
    (laws.restores_the_bits, restores_by_subtraction, case("linear")),
    (laws.restores_the_bits, restores_copies, case("attention")),
    (laws.all_that_trains_moves, base_not_frozen, case("linear")),
    (laws.all_that_trains_moves, factor_without_gradient, case("linear")),
    (laws.all_that_trains_moves, forward_trains_a_buffer, case("linear")),
    (laws.rows_are_independent, rows_shifted_by_one, case("linear")),
    (laws.rows_are_independent, rows_shifted_by_one, case("attention")),
    (laws.rows_are_independent, first_rows_for_all, case("embedding", Dense())),
    (laws.rows_are_independent, mask_rows_not_taken, case("attention-square")),
    (laws.form_is_the_delta, form_without_scale, case("linear")),
    (laws.form_is_the_delta, form_scales_the_bias, case("linear", Affine())),
    (laws.count_is_the_cards, count_off_by_one, case("linear")),
    (laws.count_is_the_cards, pool_not_on_the_card, case("linear")),
    (laws.forward_writes_nothing, forward_counts_calls, case("linear")),
    (laws.forward_writes_nothing, forward_fills_a_cache, case("linear", Dense())),
    (laws.forward_writes_nothing, forward_writes_a_tensor, case("linear")),
    (laws.forward_writes_nothing, forward_leaves_dropout_on, case("linear", Affine())),
    (laws.any_start_preserves, embedding_starts_as_linear, case("embedding")),
    (laws.blend_is_the_sum, blend_forgets_weights, case("conv1d")),
    (laws.blend_is_the_sum, blend_of_biases_averages, case("linear-own-bias")),
    (laws.gradients_agree, _scaled(0), case("linear")),
    (laws.gradients_agree, _scaled(2), case("linear-own-bias")),
    (laws.gradients_agree, _scaled(3), case("linear")),
    (laws.gradients_agree, _scaled(4), case("linear")),
    (laws.unfrozen_base_gets_its_gradient, fuses_an_unfrozen_weight, case("linear")),
    (laws.unfrozen_base_gets_its_gradient, fuses_an_unfrozen_weight, case("transposed")),
    (laws.unfrozen_base_gets_its_gradient, fuses_an_unfrozen_weight, case("linear", Dense())),
    (laws.unfrozen_base_gets_its_gradient, substitutes_a_constant, case("attention")),
    (laws.executions_agree, believes_the_class, case("own-forward")),
    (laws.executions_agree, experts_shifted_by_one, case("experts")),
    (laws.executions_agree, lazy_product_without_the_change, case("experts-turned-biased")),
    (laws.executions_agree, lazy_index_forgets_a_factor, case("experts")),
    (laws.executions_agree, bias_of_the_first_expert, case("experts-turned-biased", SPECS["ia3"][0])),
    (laws.rows_are_independent, tokens_taken_in_turns, case("experts")),
    (laws.blend_is_the_sum, stack_weights_forgotten, case("experts")),
    (laws.gradients_agree, experts_shifted_by_one, case("experts-turned-biased")),
    (laws.unfrozen_base_gets_its_gradient, stack_detached, case("experts")),
)


@pytest.mark.parametrize(
    ("law", "plant", "on"),
    PLANTED,
    ids=[f"{law.__name__}-{plant.__name__}-{on.kind.name}" for law, plant, on in PLANTED],
)
def test_law_catches(law: laws.Law, plant: Plant, on: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    law(on)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        law(on)


@pytest.mark.parametrize("plant", [saves_a_stray_tensor, saves_half_precision])
def test_saving_law_catches(plant: Plant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "right").mkdir()
    (tmp_path / "wrong").mkdir()
    laws.saves_exactly(case("linear"), tmp_path / "right")
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        laws.saves_exactly(case("linear"), tmp_path / "wrong")


def test_every_law_has_a_planted_bug() -> None:
    assert {law for law, _, _ in PLANTED} == set(laws.LAWS)
