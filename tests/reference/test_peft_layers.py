"""What PEFT's users reach for below the wrapper: classes of layers, tensors by PEFT's names, status, AdaLoRA's allocation."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lorakit as lk
import lorakit.peft as shim
from lorakit.errors import LorakitError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.Linear(8, 4))


def both(config: Any) -> tuple[Any, Any]:
    """The same adapter under PEFT and here, with the same numbers."""
    theirs = peft.get_peft_model(net(), config)
    ours = shim.get_peft_model(net(), getattr(shim, type(config).__name__)(**_plain(config)))
    state = {key: 0.3 * torch.randn_like(one) for key, one in peft.get_peft_model_state_dict(theirs).items()}
    peft.set_peft_model_state_dict(theirs, state)
    shim.set_peft_model_state_dict(ours, state)
    return theirs, ours


def _plain(config: Any) -> dict[str, Any]:
    known = type(config).__dataclass_fields__
    return {
        name: getattr(config, name)
        for name in known
        if name in getattr(shim, type(config).__name__).__dataclass_fields__
    }


def test_classes_of_layers_are_by_method() -> None:
    model = shim.get_peft_model(net(), shim.LoraConfig(target_modules=["0"], modules_to_save=["3"]))
    model.add_adapter("other", shim.LoHaConfig(target_modules=["0", "2"]))
    first, _, second, saved = model.base_model.model
    assert isinstance(first, shim.LoraLayer)
    assert isinstance(first, shim.LoHaLayer)
    assert isinstance(second, shim.LoHaLayer)
    assert not isinstance(second, shim.LoraLayer)
    assert isinstance(saved, shim.ModulesToSaveWrapper)
    assert not isinstance(saved, shim.BaseTunerLayer)
    assert type(model.base_model).__name__ == "LoraModel"
    assert isinstance(
        shim.get_peft_model(net(), shim.AdaLoraConfig(target_modules=["0"], total_step=9)).base_model, shim.LoraModel
    )
    assert type(pickle.loads(pickle.dumps(first))) is type(first) is type(copy.deepcopy(first))
    model.delete_adapter(["default"])
    assert not isinstance(first, shim.LoraLayer)


def test_tensors_by_pefts_names(tmp_path: Path) -> None:
    theirs, ours = both(peft.LoraConfig(target_modules=["0"], use_dora=True, modules_to_save=["3"]))
    layer = ours.base_model.model[0]
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        assert torch.equal(
            getattr(layer, name)["default"].weight, getattr(theirs.base_model.model[0], name)["default"].weight
        )
    assert isinstance(layer.lora_A["default"], nn.Linear)
    x = torch.randn(2, 8)
    assert torch.allclose(layer.lora_A.default(x), theirs.base_model.model[0].lora_A.default(x))
    layer.lora_B["default"].weight.data.zero_()  # the very numbers, and one that is set too
    layer.lora_A["default"].weight = nn.Parameter(torch.ones(8, 8))
    found = shim.get_peft_model_state_dict(ours)
    assert not found["base_model.model.0.lora_B.weight"].any()
    assert bool((found["base_model.model.0.lora_A.weight"] == 1).all())
    assert dict(layer.scaling) == dict(theirs.base_model.model[0].scaling)
    assert not hasattr(layer, "lora_C")
    saved = ours.base_model.model[3]
    assert saved.weight is saved.modules_to_save["default"].weight is not saved.original_module.weight
    assert [name for name, _ in ours.named_parameters() if "modules_to_save" in name and name.endswith("bias")]
    with ours.disable_adapter():
        assert saved.weight is saved.original_module.weight
    scaling = layer.scaling
    ours.delete_adapter("default")
    assert "default" not in scaling


def test_the_wrappers_model_is_the_model() -> None:
    theirs, ours = both(peft.LoraConfig(target_modules=["0"]))
    assert type(theirs.model) is type(ours.model) is nn.Sequential
    assert ours.model is ours.base_model.model


def test_status_is_pefts() -> None:
    config = peft.LoraConfig(target_modules=["0", "2"], modules_to_save=["3"])
    theirs, ours = both(config)
    for model, own in ((theirs, peft.LoraConfig), (ours, shim.LoraConfig)):
        model.add_adapter("other", own(target_modules=["0"]))
        model.merge_adapter(["other"])
    assert vars(ours.get_model_status()) == vars(theirs.get_model_status())
    assert [vars(one) for one in ours.get_layer_status()] == [vars(one) for one in theirs.get_layer_status()]
    prompt = shim.get_peft_model(net(), shim.LoraConfig(target_modules=["0"]))
    with pytest.raises(LorakitError, match="no adapt"):
        shim.get_layer_status(prompt.unload())


def test_a_model_that_has_adapters_is_given_again() -> None:
    model = net()
    shim.get_peft_model(model, shim.LoraConfig(target_modules=["0"]))
    with pytest.warns(UserWarning, match="second time"):
        again = shim.get_peft_model(model, shim.LoraConfig(target_modules=["2"]))
    assert again.targeted_module_names == ["2"]
    again.unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shim.get_peft_model(model, shim.LoraConfig(target_modules=["0"]))


def test_adapters_are_deleted_together_or_not_at_all() -> None:
    model = shim.get_peft_model(net(), shim.LoraConfig(target_modules=["0"]))
    model.add_adapter("other", shim.LoraConfig(target_modules=["2"], init_lora_weights=False))
    model.base_model.merge_adapter(["other"])
    with pytest.raises(LorakitError, match="while they are merged"):
        model.delete_adapter(["default", "other"])
    assert set(model.peft_config) == {"default", "other"}
    model.delete_adapter(["default"])
    model.unmerge_adapter()
    with pytest.raises(LorakitError, match=r"Adapter\(s\) \['default'\] not found"):
        model.set_adapter("default")
    model.delete_adapter(["other"])
    assert model.active_adapters == []


def test_disabling_gives_the_base_also_where_adapters_are_merged() -> None:
    x = torch.randn(2, 8)
    base = net()(x)
    model = shim.get_peft_model(net(), shim.LoraConfig(target_modules=["0"], init_lora_weights=False))
    acting = model(x)
    model.merge_adapter()
    model.disable_adapter_layers()
    assert torch.equal(model(x), base)
    model.enable_adapter_layers()
    assert torch.allclose(model(x), acting)
    inner = model.base_model.model
    with lk.merged(inner, "default"):
        for route in (None, ["default", None], [None, None]):
            with pytest.raises(LorakitError, match="merged into the weights"), lk.use(inner, route):
                pass
        assert torch.allclose(inner(x), acting, atol=1e-5)


def test_merging_drops_nothing() -> None:
    model = shim.get_peft_model(
        net(), shim.BOFTConfig(target_modules=["0"], boft_block_size=4, boft_dropout=0.5, init_weights=False)
    )
    model.train()
    merged = []
    for _ in range(4):
        with lk.merged(model.base_model.model, "default"):
            merged.append(model.base_model.model[0].weight.clone())
    assert all(torch.equal(one, merged[0]) for one in merged)
    assert model.base_model.model[0].deltas.training


def test_allocation_is_pefts() -> None:
    """The same triplets are kept at every step, as the loop of PEFT's documentation moves them."""
    options = {
        "target_modules": ["0", "2"],
        "init_r": 4,
        "target_r": 2,
        "tinit": 2,
        "tfinal": 3,
        "deltaT": 2,
        "total_step": 10,
    }
    theirs, ours = both(peft.AdaLoraConfig(**options))
    x = torch.randn(16, 8)
    sgd = [
        torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.02) for model in (theirs, ours)
    ]
    for step in range(1, 10):
        for model, optimizer in zip((theirs, ours), sgd, strict=True):
            model(x).square().mean().backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        for place in (0, 2):
            want = theirs.base_model.model[place].lora_E["default"].flatten()
            have = ours.base_model.model[place].lora_E["default"].flatten()
            assert torch.equal(want != 0, have != 0), step
            assert torch.allclose(want, have, atol=1e-5)
    with pytest.raises(LorakitError, match="total_step"):
        shim.get_peft_model(net(), shim.AdaLoraConfig(target_modules=["0"])).update_and_allocate(1)


def test_other_methods_as_lora(tmp_path: Path) -> None:
    x = torch.randn(2, 8)
    model = shim.get_peft_model(net(), shim.LoHaConfig(target_modules=["0"], r=2, init_weights=False))
    config, state = shim.convert_to_lora(model, 8)
    shim.save_as_lora(tmp_path, model, 1.0)
    assert list(model.peft_config) == ["default"]
    plain = shim.get_peft_model(net(), config)
    shim.set_peft_model_state_dict(plain, state)
    assert torch.allclose(plain(x), model(x), atol=1e-4)
    assert torch.allclose(peft.PeftModel.from_pretrained(net(), tmp_path)(x), model(x), atol=1e-4)
    with pytest.raises(LorakitError, match="between 0 and 1"):
        shim.convert_to_lora(model, 1.5)


def test_scales_for_a_while() -> None:
    x = torch.randn(2, 8)
    model = shim.get_peft_model(net(), shim.LoraConfig(target_modules=["3"], init_lora_weights=False))
    base, acting = net()(x), model(x)
    with shim.rescale_adapter_scale(model, 0.5):
        assert torch.allclose(model(x) - base, (acting - base) / 2, atol=1e-5)
    assert torch.equal(model(x), acting)


def test_layers_of_a_state_dict() -> None:
    state = shim.get_peft_model_state_dict(
        shim.inject_adapter_in_model(shim.LoraConfig(target_modules=["0", "2"]), net())
    )
    rest = {key: one for key, one in state.items() if not key.startswith("2.")}
    with pytest.warns(RuntimeWarning, match=r"The PEFT config contained these additional target modules: \['2'\]"):
        model = shim.inject_adapter_in_model(shim.LoraConfig(target_modules=["0", "2"]), net(), state_dict=rest)
    assert set(shim.get_peft_model_state_dict(model)) == set(rest)
    empty = shim.inject_adapter_in_model(shim.LoraConfig(target_modules=["0"]), net(), low_cpu_mem_usage=True)
    assert all(one.is_meta for one in shim.get_peft_model_state_dict(empty).values())
    shim.set_peft_model_state_dict(empty, rest)
    assert all(torch.equal(one, rest[key]) for key, one in shim.get_peft_model_state_dict(empty).items())


def test_biases_that_nothing_trains_go_to_the_base() -> None:
    theirs, ours = both(peft.LoraConfig(target_modules=["0"]))
    state = {**peft.get_peft_model_state_dict(theirs), "base_model.model.0.base_layer.bias": torch.full((12,), 2.0)}
    shim.set_peft_model_state_dict(ours, state)
    peft.set_peft_model_state_dict(theirs, state)
    x = torch.randn(2, 8)
    assert torch.allclose(theirs(x), ours(x), atol=1e-6)


def test_gradients_of_a_loop_of_ones_own() -> None:
    """LoRA-GA starts from what the step computes, also where the model has no loss of its own."""
    model, x = net(), torch.randn(4, 8)

    def step() -> None:
        model(x).pow(2).sum().backward()

    config = shim.LoraConfig(target_modules=["0"], r=2, init_lora_weights="lora_ga", lora_ga_config=shim.LoraGAConfig())
    shim.preprocess_loraga(model, config, step)
    assert all(one.grad is None and one.requires_grad for one in model.parameters())
    adapted = shim.get_peft_model(model, config)
    assert torch.allclose(adapted(x), net()(x), atol=1e-5)
    step2 = net()
    step2(x).pow(2).sum().backward()
    _, _, V = torch.linalg.svd(step2[0].weight.grad)
    A = adapted.base_model.model[0].lora_A["default"].weight
    assert torch.allclose(A @ V[:4].T @ V[:4], A, atol=1e-3)


def test_mixed_models_refuse_soft_prompts() -> None:
    model = shim.get_peft_model(net(), shim.LoraConfig(target_modules=["0"]), mixed=True)
    assert type(model.base_model).__name__ == "MixedModel"
    with pytest.raises(LorakitError, match="not compatible with the `PeftMixedModel`"):
        model.add_adapter("prompt", shim.PrefixTuningConfig(num_virtual_tokens=2))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (lambda: shim.AdaLoraConfig(target_modules=["0"], use_dora=True, total_step=9), "does not support DoRA"),
        (lambda: shim.LoraConfig(target_modules=["0"], layers_pattern="h"), "layers_to_transform"),
        (lambda: shim.PsoftConfig(target_modules=["0"], r=11), "lower the rank"),
    ],
)
def test_no_field_is_dropped(config: Any, text: str) -> None:
    with pytest.raises(LorakitError, match=text):
        shim.get_peft_model(net(), config())


def test_least_asymmetric_wavelets_of_low_order() -> None:
    for name in ("sym2", "sym3"):
        theirs, ours = both(peft.WaveFTConfig(target_modules=["0"], n_frequency=20, wavelet_family=name))
        x = torch.randn(2, 8)
        assert torch.allclose(theirs(x), ours(x), atol=1e-5)
