"""What a base model can be loaded for, and whether it can do it. transformers loads some models for a task that they cannot
do, with a word in its log at most: the decoder of an encoder-decoder alone, the language part of a vision-language model, an
encoder that sees the tokens it shall predict. What a task is beside its class is said in `lorakit.train.tasks`.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from lorakit.core.storage import settle
from lorakit.core.storage.contract import finite
from lorakit.errors import LorakitError

TASKS: dict[str, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq-cls": "AutoModelForSequenceClassification",
    "pair-cls": "AutoModelForSequenceClassification",
    "multi-label": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "reranker": "AutoModelForSequenceClassification",
    "token-cls": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "embeddings": "AutoModel",
    "features": "AutoModel",
}
"""What the model is asked to do, and the transformers class for it (another head on the same body)."""

_ENDS = {
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "seq-cls",
    "ForTokenClassification": "token-cls",
    "ForQuestionAnswering": "question-answering",
}
_PROBLEMS = {"regression": "regression", "multi_label_classification": "multi-label"}

_SEEING = ("vision_config", "audio_config", "image_config", "thinker_config")


def task_of_base(config: Any) -> str:
    """The task that a model was saved for, by the class that its configuration names; causal-lm where it does not say."""
    if getattr(config, "is_encoder_decoder", False) and _knows(TASKS["seq2seq"], config):
        return "seq2seq"
    name = str((getattr(config, "architectures", None) or [""])[0])
    task = next((task for end, task in _ENDS.items() if name.endswith(end)), "causal-lm")
    return _PROBLEMS.get(str(getattr(config, "problem_type", None)), task) if task == "seq-cls" else task


def _knows(loader: str, config: Any) -> bool:
    """Whether a class of transformers' makes a model of a configuration."""
    return hasattr(config, "auto_map") or type(config) in getattr(transformers, loader)._model_mapping


def check_task(config: Any, task: str, where: str) -> None:
    """LorakitError where the model cannot do this task, or a part of it would be loaded, by its configuration.

    Args:
        config: the model's configuration, as its place has it.
        task: a name of `TASKS`.
        where: the model's place, for the message.
    """
    name = getattr(config, "model_type", type(config).__name__)
    if task != "causal-lm":
        if not _knows(TASKS[task], config):
            known = [one for one, loader in TASKS.items() if one != "features" and _knows(loader, config)]
            if "masked-lm" in known:  # an encoder sees what it shall predict
                known = [one for one in known if one != "causal-lm"]
            able = ", ".join(known)
            raise LorakitError(
                f'load model: "{where}" is a {name}, of which transformers makes no model for {task} ({TASKS[task]}). What '
                f"works: {f'task {able}' if able else 'another base'}."
            )
        return
    if getattr(config, "is_encoder_decoder", False):
        raise LorakitError(
            f'load model: "{where}" is an encoder-decoder ({name}), and as a causal language model its decoder would be '
            "loaded alone. What works: task seq2seq, which loads it whole (AutoModelForSeq2SeqLM); for speech, "
            "AutoModelForSpeechSeq2Seq, lk.attach, and Trainer or a loop of your own."
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
            "the like); --task masked-lm, seq-cls, token-cls, question-answering or embeddings for this model."
        )
