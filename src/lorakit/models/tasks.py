"""Whether a model can do what it is loaded for. transformers loads some models for a task that they cannot do, with a word in
its log at most: the decoder of an encoder-decoder alone, the language part of a vision-language model, an encoder that sees
the tokens it shall predict.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.auto import modeling_auto

from lorakit.core.storage import settle
from lorakit.core.storage.contract import finite
from lorakit.errors import LorakitError

_SEEING = ("vision_config", "audio_config", "image_config", "thinker_config")


def check_task(config: Any, task: str, where: str) -> None:
    """LorakitError where this task would load a part of the model, by its configuration.

    Args:
        config: the model's configuration, as its place has it.
        task: a name of `loading.TASKS`.
        where: the model's place, for the message.
    """
    if task != "causal-lm":
        return
    name = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise LorakitError(
            f'load model: "{where}" is an encoder-decoder ({name}), and as a causal language model its decoder would be '
            "loaded alone. What works: load it whole with transformers (AutoModelForSeq2SeqLM; AutoModelForSpeechSeq2Seq for "
            "speech), lk.attach, and train it with Trainer or a loop of your own."
        )
    if any(getattr(config, part, None) is not None for part in _SEEING):
        causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name)
        whole = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(name)
        if causal is None or causal != whole:
            raise LorakitError(
                f'load model: "{where}" reads more than text ({name}), and as a causal language model its language part would '
                f"be loaded alone, if at all. What works: load it whole with transformers (AutoModelForImageTextToText), "
                "lk.attach, and train it with Trainer or a loop of your own."
            )


@torch.no_grad()
def check_finite(model: Any, where: str) -> None:
    """LorakitError where a weight of a base holds a NaN or an infinity: nothing can be learned on it."""
    for name, weight in model.named_parameters():
        if type(weight.data) is not torch.Tensor:
            continue  # numbers that a library has packed: its formats hold no NaN, and most cannot be summed
        if weight.is_floating_point() and not finite(weight):
            raise LorakitError(
                f'train: {name} of "{where}" holds a NaN or an infinity, so that nothing can be learned on it. Copy or '
                "download the model again, or load it in another number format (train.precision)."
            )


@torch.no_grad()
def check_causal(model: Any, where: str) -> None:
    """LorakitError where a model that shall learn to predict the next token sees it: tried out, on two texts that begin alike.

    A model that cannot be called with token ids alone is not tried.
    """
    count = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 0)
    if count < 16:
        return
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(count // 2, count // 2 + 8, device=device).repeat(2, 1) % count
    ids[1, 4:] = torch.arange(4, 8, device=device)
    settle(model)  # a quantised layer called in evaluation would be packed anew for a kernel that rounds otherwise
    was = model.training
    model.eval()
    try:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :4].float()
    except Exception:  # whatever it is that the model wants otherwise
        return
    finally:
        model.train(was)
    apart = float((logits[0] - logits[1]).abs().max() / logits.abs().max().clamp(min=1e-30))
    if apart > (1e-3 if model.dtype == torch.float32 else 5e-2):
        raise LorakitError(
            f'train: "{where}" ({type(model).__name__}) is bidirectional: its output at a token depends on '
            "later tokens, so it would learn to copy the next token instead of predicting "
            "it. What works: a decoder (GPT, Llama and "
            "the like); --task seq-cls for this model, or lk.attach on AutoModelForMaskedLM in a loop of your "
            "own."
        )
