"""`PeftModel`: a model with adapters behind PEFT's interface, a module that trainers, Accelerate and torch.compile take."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter, adapters
from lorakit.adapter.attachment import detach
from lorakit.algebra.combining import combine
from lorakit.algebra.merging import merge, merged
from lorakit.core.state import found_state, state_of
from lorakit.core.using import activate, use
from lorakit.errors import LorakitError, unknown
from lorakit.files.bundle import locate, read_bundle, read_config
from lorakit.files.store import load, refill
from lorakit.peft.attaching import attach_config, full_precision
from lorakit.peft.configs import AlsoPefts, PeftConfig

log = logging.getLogger("lorakit")

_NOT_HERE = {
    "add_weighted_adapters": "add_weighted_adapter",
    "base_model_torch_dtype": "model.dtype",
    "create_or_update_model_card": "save_pretrained, which writes no card",
    "get_prompt": "the adapter's edits: lorakit.adapters(model)[name].edits",
    "get_prompt_embedding_to_save": "save_pretrained",
    "prompt_encoder": "the adapter's edits: lorakit.adapters(model)[name].edits",
    "prepare_model_for_gradient_checkpointing": "enable_input_require_grads",
    "set_additional_trainable_modules": "modules_to_save in the configuration",
    "set_requires_grad": "lorakit.adapters(model)[name].requires_grad_(flag)",
    "subtract_mutated_init": "save_pretrained, which always writes a file for the base as it was",
    "supports_lora_conversion": "lorakit.resize",
    "update_and_allocate": "lorakit.train, which moves AdaLoRA's ranks at each step",
    "update_layer": "add_adapter",
}
"""Names of PEFT's that the wrapper lacks -> what to use. They must not reach the base model, which may have such a name too."""


class Tuner(nn.Module):
    """What PEFT has between its wrapper and the model: `wrapper.base_model.model` is the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name in _NOT_HERE:
                raise
            return getattr(self.model, name)


def _penalty(tuner: Any, args: Any, output: Any) -> Any:
    """After a call: AdaLoRA's share of the loss, how far the factors of the adapters that act are from orthonormal ones."""
    loss, known = getattr(output, "loss", None), adapters(tuner.model)
    for name in state_of(tuner.model).routing.names if loss is not None else ():
        deltas: list[Any] = [delta for _, _, delta in known[name].deltas()]
        if known[name].method.name == "adalora":
            squares = [square for own in deltas for square in (own.Q @ own.Q.T, own.P.T @ own.P)]
            apart = [torch.linalg.matrix_norm(one - torch.eye(len(one)).to(one)) for one in squares]
            output.loss = loss = loss + known[name].method.orthogonality * torch.stack(apart).mean()
    return output


_SIGNED: dict[tuple[type, type], Any] = {}


def _signed(cls: type[PeftModel], model: type[nn.Module]) -> Any:
    """The wrapper with a forward that has the model's signature: trainers read from it which columns of the data count."""
    if (cls, model) not in _SIGNED:

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return cls.forward(self, *args, **kwargs)

        forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
        own = {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__}
        _SIGNED[cls, model] = type(cls.__name__, (cls,), own)
    return _SIGNED[cls, model]


class PeftModel(AlsoPefts, nn.Module):
    """A model with adapters behind PEFT's interface. Attributes that PEFT has not either are the model's."""

    def __new__(cls, model: nn.Module, *args: Any, **kwargs: Any) -> PeftModel:
        """An instance whose forward has the signature of this model's."""
        return cast(PeftModel, nn.Module.__new__(_signed(cls, type(model))))

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self.base_model = Tuner(model)
        self.peft_config: dict[str, PeftConfig] = {}
        self._merged = ExitStack()
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class under its own name, since that with the model's signature has none."""
        return _empty, (type(self).__mro__[1], type(self.base_model.model)), self.__dict__

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            if name in _NOT_HERE:
                raise AttributeError(
                    f"{type(self).__name__}.{name} is not offered; in lorakit it is {_NOT_HERE[name]}."
                ) from None
            return getattr(self.base_model.model, name)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        revision: str | None = None,
    ) -> PeftModel:
        """Put the adapter in a folder (or on the hub) on `model`, in evaluation mode unless it is to be trained."""
        if ephemeral_gpu_offload:
            raise LorakitError("from_pretrained: ephemeral_gpu_offload is not offered.")
        task = read_config(locate(model_id, revision)).get("task_type") if config is None else config.task_type
        wrapped = _class_for(cls, task)(model, None)
        wrapped.load_adapter(model_id, adapter_name, is_trainable, revision)
        wrapped.set_adapter(adapter_name)
        return wrapped

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        revision: str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **_: Any,
    ) -> Any:
        """Put one more adapter from a folder (or the hub) on the model; the active one stays. Into an adapter that is there
        already under this name the folder's numbers are put in place, so that an optimiser keeps its parameters."""
        model, known = self.base_model.model, adapters(self.base_model.model)
        bundle = read_bundle(model_id, revision)
        if adapter_name not in known:
            adapter = load(model, model_id, name=adapter_name, trainable=is_trainable, revision=revision, active=False)
            self.peft_config[adapter_name] = PeftConfig.from_peft_type(**bundle.config, where=str(model_id))
            if autocast_adapter_dtype:
                full_precision(adapter)
        elif known[adapter_name].edits:
            twin = load(model, model_id, name=f"{adapter_name}-read", revision=revision, active=False)
            try:
                known[adapter_name].load_state_dict(twin.state_dict())
            finally:
                detach(model, twin.name)
        else:
            refill(known[adapter_name], bundle)
        if not is_trainable:
            self.eval()
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Put one more new adapter on the model; the active one stays."""
        model, state = self.base_model.model, found_state(self.base_model.model)
        before = state.routing if state is not None and adapters(model) else None
        if peft_config.base_model_name_or_path is None:
            peft_config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
        adapter = attach_config(model, peft_config, adapter_name)
        if autocast_adapter_dtype:
            full_precision(adapter)
        if before is not None:
            activate(model, before)
        if peft_config.peft_type == "ADALORA" and not self.base_model._forward_hooks:
            self.base_model.register_forward_hook(_penalty)
        self.peft_config[adapter_name] = peft_config

    def delete_adapter(self, adapter_name: str) -> None:
        """Take one adapter off. Where it acted, the first of the others acts now, and the log says which."""
        model = self.base_model.model
        acted = adapter_name in state_of(model).routing.names
        if acted:
            rest = [name for name in self.active_adapters if name != adapter_name]
            rest = rest or [name for name in adapters(model) if name != adapter_name][:1]
            activate(model, dict.fromkeys(rest, 1.0) if rest else None)
            log.warning("delete_adapter: %s acted; %s acts now.", adapter_name, ", ".join(rest) or "no adapter")
        detach(model, adapter_name)
        self.peft_config.pop(adapter_name, None)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """One more adapter, the weighted sum of others: of what they add to the weights, not of their factors, so that
        scales, rsLoRA and ranks that differ come out right where PEFT's "linear" does not."""
        how = combination_type.removesuffix("_svd").replace("_", "-")
        if svd_clamp is not None or majority_sign_method != "total":
            raise LorakitError("add_weighted_adapter: svd_clamp and majority_sign_method are not offered.")
        known = self._adapters(adapters)
        largest = max(getattr(one.method, "rank", 0) for one in known)
        options: dict[str, Any] = {} if density is None else {"density": density}
        if how not in ("linear", "cat"):
            options["rank"] = svd_rank or largest
        combine(known, weights, how, name=adapter_name, **options)
        rank = getattr(self._adapters([adapter_name])[0].method, "rank", largest)
        self.peft_config[adapter_name] = dataclasses.replace(cast(Any, self.peft_config[adapters[0]]), r=rank)

    def _adapters(self, names: Iterable[str]) -> list[Adapter]:
        known = adapters(self.base_model.model)
        for name in names:
            if name not in known:
                raise unknown("adapter", name, known)
        return [known[name] for name in names]

    # -- which adapter acts -------------------------------------------------------------------------------------------
    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act now."""
        return list(state_of(self.base_model.model).routing.names)

    @property
    def active_adapter(self) -> str:
        """The name of the adapter that acts now."""
        names = self.active_adapters
        if len(names) != 1:
            raise LorakitError(f"active_adapter: {len(names)} adapters are active: {', '.join(names) or 'none'}.")
        return names[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        """The configuration of the adapter that acts now."""
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> Any:
        """PEFT's name of the active adapter's method."""
        return self.active_peft_config.peft_type

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names that all adapters train whole."""
        return {
            name for one in self.peft_config.values() for name in getattr(one, "modules_to_save", None) or ()
        } or None

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Let one adapter act, or several added up. No `requires_grad` changes: an adapter that does not act gets no
        gradient anyway."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        activate(self.base_model.model, dict.fromkeys(names, 1.0))
        if inference_mode:
            for adapter in self._adapters(names):
                adapter.requires_grad_(False)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is the base model, also where adapters are merged."""
        state = state_of(self.base_model.model)
        names = sorted(state.merged)
        self.unmerge_adapter()
        if state.merged:
            raise LorakitError(
                f"disable_adapter: {min(state.merged)!r} is merged into the weights by lorakit.merged; leave that block first."
            )
        try:
            with use(self.base_model.model, None):
                yield
        finally:
            if names:
                self.merge_adapter(names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters (the active ones by default) into the weights until `unmerge_adapter`; values are always checked."""
        if state_of(self.base_model.model).merged:
            raise LorakitError("merge_adapter: adapters are merged already; call unmerge_adapter first.")
        names = adapter_names or self.active_adapters
        self._merged.enter_context(merged(self.base_model.model, dict.fromkeys(names, 1.0)))

    def unmerge_adapter(self) -> None:
        """Put the very bits of the base back; the adapters act beside it again."""
        self._merged.close()

    # -- calls --------------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The model's forward; `adapter_names` gives each row of the batch its own, "__base__" for none."""
        if adapter_names is None:
            return self.base_model(*args, **kwargs)
        with use(self.base_model.model, _rows(adapter_names)):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The model's generate; `adapter_names` as in `forward`."""
        generate = cast(Any, self.base_model.model).generate
        if adapter_names is None:
            return generate(*args, **kwargs)
        copies = max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)
        with use(self.base_model.model, _rows(adapter_names), copies=copies):
            return generate(*args, **kwargs)

    # -- off and out --------------------------------------------------------------------------------------------------
    def get_base_model(self) -> nn.Module:
        """The model itself, with the adapters on it."""
        return self.base_model.model

    def unload(self) -> nn.Module:
        """The model without any adapter."""
        return detach(self.base_model.model)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Write the active adapters (or these) into the weights; returns the model without adapters. The values are
        always checked, whatever `safe_merge` says."""
        model = self.base_model.model
        names = adapter_names or sorted(state_of(model).merged) or self.active_adapters
        self.unmerge_adapter()
        merge(model, dict.fromkeys(names, 1.0))
        return detach(model) if adapters(model) else model

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **_: Any,
    ) -> None:
        """Write the adapters: "default" into the folder, others into a sub-folder of their name, as PEFT does.

        Files always belong to the base as it was before any start changed it. `state_dict` is not needed: each adapter knows
        its tensors.
        """
        if not safe_serialization:
            raise LorakitError(
                "save_pretrained: safe_serialization=False asks for a pickle; only safetensors is written."
            )
        if save_embedding_layers is True:
            raise LorakitError(
                "save_pretrained: save_embedding_layers=True: name the embedding in modules_to_save to have it in the file."
            )
        names = selected_adapters or list(adapters(self.base_model.model))
        for adapter in self._adapters(names):
            folder = Path(save_directory)
            config = self.peft_config.get(adapter.name)
            if is_main_process:
                adapter.save(
                    folder if adapter.name == "default" else folder / adapter.name,
                    base=None if config is None else config.base_model_name_or_path,
                )

    def push_to_hub(
        self, repo_id: str, *, commit_message: str = "Upload adapter", private: bool | None = None, **options: Any
    ) -> Any:
        """Upload the adapters, never the base, into a repository of the hub."""
        from huggingface_hub import HfApi

        hub = HfApi(token=options.pop("token", None))
        repository = hub.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.upload_folder(
                repo_id=repository.repo_id, folder_path=folder, commit_message=commit_message, **options
            )

    # -- counts -------------------------------------------------------------------------------------------------------
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable numbers, and all numbers of model and adapters."""
        own: dict[int, Tensor] = {id(one): one for one in self.base_model.parameters()}
        for adapter in adapters(self.base_model.model).values():
            own.update({id(one): one for one in adapter.parameters()})
        return sum(one.numel() for one in own.values() if one.requires_grad), sum(one.numel() for one in own.values())

    def print_trainable_parameters(self) -> None:
        """Print how many numbers train."""
        trainable, everything = self.get_nb_trainable_parameters()
        share = 100 * trainable / everything
        print(f"trainable params: {trainable:,d} || all params: {everything:,d} || trainable%: {share:.4f}")


def _empty(cls: type[PeftModel], model: type[nn.Module]) -> PeftModel:
    return cast(PeftModel, nn.Module.__new__(_signed(cls, model)))


def _rows(names: list[str]) -> list[str | None]:
    return [None if name == "__base__" else name for name in names]


class PeftMixedModel(PeftModel):
    """The same: adapters of different methods act together on any model here."""


class PeftModelForCausalLM(PeftModel):
    """PEFT's name where the task is CAUSAL_LM."""


class PeftModelForSeq2SeqLM(PeftModel):
    """PEFT's name where the task is SEQ_2_SEQ_LM."""


class PeftModelForSequenceClassification(PeftModel):
    """PEFT's name where the task is SEQ_CLS."""


class PeftModelForTokenClassification(PeftModel):
    """PEFT's name where the task is TOKEN_CLS."""


class PeftModelForQuestionAnswering(PeftModel):
    """PEFT's name where the task is QUESTION_ANS."""


class PeftModelForFeatureExtraction(PeftModel):
    """PEFT's name where the task is FEATURE_EXTRACTION."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def _class_for(cls: type[PeftModel], task: str | None) -> type[PeftModel]:
    """The class for a task, where none of them was asked for by name."""
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(task), cls) if cls is PeftModel else cls


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """A new, trainable adapter on `model`, under PEFT's interface. The model itself gets the adapter too.

    Args:
        model: any torch model.
        peft_config: what to train.
        adapter_name: of the adapter on the model.
        mixed: whether the result calls itself PeftMixedModel; adapters of several methods act together anyway.
        autocast_adapter_dtype: keep the adapter in float32 where the base is float16 or bfloat16.
        revision: of the base model, for the configuration.
        low_cpu_mem_usage: nothing to save here.
    """
    if revision is not None:
        peft_config.revision = revision
    made = PeftMixedModel if mixed else _class_for(PeftModel, peft_config.task_type)
    return made(model, peft_config, adapter_name, autocast_adapter_dtype)
