"""A learning rate for a run that was given none, from published rules and from what lorakit measured (docs/quality.md).

The best rate depends on the method more than on anything else: prompts and single vectors want rates a hundred times those
of whole weights. For LoRA and its nearest kin it falls with the width of the model: "LoRA Without Regret" (Schulman et al.,
Thinking Machines 2025) found ten times the rate of full fine-tuning at any rank, and the rule that its authors publish in
tinker-cookbook is 5e-4 (2000 / hidden size)^p, p fitted for each family of models, where ΔW = 32 / rank · B A.
"""

from __future__ import annotations

import logging
from typing import Any

from lorakit.train.config.choices import METHOD
from lorakit.train.config.options import TrainConfig

log = logging.getLogger("lorakit.train")

REGRET = '"LoRA Without Regret"'
FITTED = {"llama": 0.781}
"""The exponent p by model type; other families are as flat as Qwen."""
FLAT = 0.0775
SIZES = (2048, 8192)
"""Hidden sizes between which the rule was fitted; it is not carried further."""
ALPHA = 32.0
"""The alpha that it was fitted at; a larger one asks for a smaller rate."""

SHRUNK = {"pissa": 0.4, "milora": 0.4, "olora": 0.4, "lora-ga": 0.4}
"""Starts whose factors are as large as those of the weight: lorakit measured 2e-4 where plain LoRA has 5e-4."""

MEASURED = {
    "lora-fa": 1e-3, "elalora": 5e-3, "vera": 2e-2, "vb-lora": 1e-2, "lora-xs": 1e-4, "tied-lora": 4e-4, "1lora": 2e-3,
    "randlora": 1e-4, "fourierft": 5e-3, "shira": 2e-3, "c3a": 2e-2, "loha": 2e-3, "lokr": 2e-3, "oft": 1e-4, "boft": 1e-4,
    "hira": 5e-3, "ia3": 3e-3, "bottleneck": 1e-3, "prompt-tuning": 3e-2, "p-tuning": 3e-3, "prefix-tuning": 3e-4,
    "llama-adapter": 9e-3, "loreft": 4e-3,
}  # fmt: skip
"""Methods to which no rule applies, with the rates at which lorakit measured them."""

KIN = {"pvera": "vera", "waveft": "fourierft", "hra": "oft", "psoft": "oft"}
"""Methods that were not measured, and the measured one that they are a form of."""

BY_SIZE = {"lora", "dora", "bd-lora", "dylora", "relora", "mora", "gralora", "alora", "mixlora", "full", "osf"}
"""Methods that the rule by size is for: low-rank products, and whole weights, which have a tenth."""

PAPERS = {"adalora": (1e-3, "arXiv 2303.10512"), "bitfit": (1e-3, "arXiv 2106.10199")}
"""Methods whose papers say it better than the few steps of lorakit's measurements."""


def suggested(config: TrainConfig, model_config: Any) -> tuple[float, str]:
    """A learning rate, two digits long, and where it comes from.

    Args:
        config: the run.
        model_config: transformers' configuration of the base; None where there is none.
    """
    method, optimizer = METHOD.name_of(config.method), config.train.optimizer.lower()
    if "prodigy" in optimizer:
        return 1.0, "Prodigy finds the rate itself, and multiplies it by this (arXiv 2306.06101)"
    if "galore" in optimizer:
        rate, source = 5e-4, "measured with GaLore, docs/quality.md"
    elif method in PAPERS:
        rate, source = PAPERS[method][0], f"the paper of {method}, {PAPERS[method][1]}"
    elif (kin := KIN.get(method, method)) in MEASURED:
        rate, source = MEASURED[kin], f"measured with {kin}, docs/quality.md"
    elif method not in BY_SIZE:
        rate, source = (
            1e-3,
            f"no rule is known for {method}: the middle of all that were measured; try a third and three times it",
        )
    else:
        rate, source = _by_size(config.method, model_config)
        if method in ("full", "osf"):
            rate, source = rate / 10, f"a tenth of LoRA's, {source}"
        elif config.init.name in SHRUNK:
            rate, source = rate * SHRUNK[config.init.name], f"{source}; less for init {config.init.name}"
    if "lion" in optimizer:
        rate, source = rate / 5, f"{source}; a fifth for Lion, arXiv 2302.06675"
    return float(f"{rate:.2g}"), source


def _by_size(method: Any, model_config: Any) -> tuple[float, str]:
    text = model_config.get_text_config() if model_config is not None else None
    hidden = getattr(text, "hidden_size", None) or SIZES[0]
    exponent = FITTED.get(getattr(text, "model_type", ""), FLAT)
    rate = 5e-4 * (2000 / min(max(hidden, SIZES[0]), SIZES[1])) ** exponent
    inner = getattr(method, "inner", method)
    rank, scale = getattr(inner, "rank", None), getattr(inner, "scale", None)
    if rank is not None and scale is not None and scale * rank > ALPHA:
        rate *= ALPHA / (scale * rank)
    return rate, f"{REGRET}, hidden size {hidden}"


def with_rate(config: TrainConfig, model_config: Any) -> TrainConfig:
    """The run with a learning rate: its own, or the suggested one, which is logged with its source."""
    if config.train.learning_rate is not None:
        return config
    rate, source = suggested(config, model_config)
    log.info("learning rate %g, as none was given (%s)", rate, source)
    return config.replace(train__learning_rate=rate)
