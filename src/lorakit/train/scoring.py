"""How likely is each of a few given answers: a classification that is asked in words.

A naive loop computes every prompt once per choice, and the instruction that all prompts share once per prompt.
`score_choices` computes the shared prefix once, lays the choices side by side behind their prompt with an attention mask that
keeps them from seeing each other, and asks for logits only at the answers' tokens. A model that cannot be run so (no position
ids, a window shorter than the text) is scored row by row, which is slower and the same; the first prompts are scored both
ways to be sure.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.using import whole_rows
from lorakit.errors import LorakitError
from lorakit.models.evaluating import evaluating
from lorakit.native.elementwise import wide
from lorakit.train.data.templates import shared_prefix_length
from lorakit.train.step.loss import Head, decoder_of, prompts_known, read_head
from lorakit.train.step.packing import mask_of, pad_rows

log = logging.getLogger("lorakit.train")


@torch.no_grad()
def score_choices(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
    share: bool = True,
) -> Tensor:
    """Log-probability of every choice after every prompt: float32, [prompts, choices], on the CPU.

    `prompts` and `choices` are token ids; a choice of several tokens has the sum of their log-probabilities.
    Prompts are computed in order of length and what they all begin with once; `share=False` computes each
    pair on its own. Raises LorakitError for an empty prompt or choice, which has no probability.
    """
    for what, given in (("prompt", prompts), ("choice", choices)):
        for index, ids in enumerate(given):
            if len(ids) == 0:
                raise LorakitError(f"score: {what} {index} has no tokens, so nothing can be scored")
    if not prompts or not choices:
        return torch.zeros(len(prompts), len(choices))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    scores = torch.empty(len(prompts), len(choices))
    with evaluating(model):
        reader = Reader(model)
        together = share and _shares_exactly(reader, [prompts[i] for i in order], choices)
        shared = _common_prefix(prompts) if together else 0
        past = reader.read_prefix(prompts[0][:shared]) if shared else None
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            asked = [prompts[i] for i in rows]
            if together:
                scores[rows] = _score_side_by_side(reader, asked, choices, shared, past)
            else:
                scores[rows] = _score_pairs(reader, asked, choices)
    return scores


class Reader:
    """A causal model asked for logits in a few places only, and those in float32.

    In bf16 a logit of 20 is known to 0.06, which turns close calls between answers into coin tosses; the head is a
    small part of the work when only the answers' places are asked for, so it is done in float32 there. A model
    without a plain linear head gives its own logits.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.body: Any = None
        try:
            head: Head | None = read_head(model)
            self.body = decoder_of(model) if head is not None and head.is_linear else None
        except LorakitError:
            head = None
        self.head = head
        if self.body is not None and head is not None:
            linear: Any = head.module
            self.weight: Tensor = wide(linear.weight.detach())
            self.bias: Tensor | None = wide(linear.bias.detach()) if linear.bias is not None else None
        self.arguments = frozenset(inspect.signature((self.body or model).forward).parameters)

    def logits(self, rows: Tensor, places: Tensor, **inputs: Any) -> Tensor:
        """Logits [rows, places, vocabulary] at `places` [rows, places] of the model's output on `inputs`."""
        if self.body is None or self.head is None:
            return wide(self.model(**inputs).logits[rows, places])
        hidden = self.body(**inputs).last_hidden_state[rows, places]
        return self.head.shape(nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias))

    def read_prefix(self, ids: Sequence[int]) -> Any:
        """The keys and values of a prefix, computed once, to be repeated for every row that begins with it."""
        ids_of_one = torch.tensor([list(ids)], device=self.device)
        return (self.body or self.model)(input_ids=ids_of_one, use_cache=True).past_key_values


def _score_pairs(reader: Reader, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]]) -> Tensor:
    """Every prompt with every choice as a row of its own, padded on the right: the plain way, and the reference."""
    device = reader.device
    columns = []
    for choice in choices:
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        pairs = [[*prompt, *choice] for prompt in prompts]
        places = (lengths[:, None] - 1 + torch.arange(len(choice))).to(device)
        rows = torch.arange(len(prompts), device=device)[:, None]
        inputs = {
            "input_ids": pad_rows(pairs).to(device),
            "attention_mask": mask_of(pairs).to(device),
            "use_cache": False,
        }
        answer = torch.tensor(choice, device=device).expand(len(prompts), -1)
        with prompts_known(reader.model, lengths.tolist()):
            logits = reader.logits(rows, places, **inputs)
        columns.append(_log_probabilities(logits, answer).sum(-1).cpu())
    return torch.stack(columns, dim=1).float()


def _score_side_by_side(
    reader: Reader, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]], shared: int, past: Any
) -> Tensor:
    """All choices behind their prompt in one row, blind to each other; the prompts' first `shared` tokens are `past`.

    The prompts end in one column, so the places wanted (the prompt's last token and the choices) are the last columns
    of every row.
    """
    device, dtype = reader.device, reader.dtype
    tails = [list(prompt[shared:]) for prompt in prompts]
    tail = max(len(ids) for ids in tails)
    width = tail + sum(len(choice) for choice in choices)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    positions = torch.zeros(len(prompts), width, dtype=torch.long)
    sees = torch.zeros(len(prompts), width, shared + width, dtype=torch.bool)
    sees[:, :, :shared] = True
    for row, own in enumerate(tails):
        first = tail - len(own)
        ids[row, first:tail] = torch.tensor(own)
        positions[row, first:tail] = shared + torch.arange(len(own))
        sees[row, first:, shared + first : shared + tail] = True
        start = tail
        for choice in choices:
            end = start + len(choice)
            ids[row, start:end] = torch.tensor(choice)
            positions[row, start:end] = shared + len(own) + torch.arange(len(choice))
            sees[row, start:end, shared + start : shared + end] = True
            start = end
    # Left to right within what may be seen; a padding token sees itself, so that no row of the softmax is empty.
    sees &= torch.ones(width, shared + width, dtype=torch.bool).tril(diagonal=shared)
    sees[:, torch.arange(width), shared + torch.arange(width)] = True
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
    if past is not None:
        past = copy.deepcopy(past)
        past.batch_repeat_interleave(len(prompts))
    rows = torch.arange(len(prompts), device=device)[:, None]
    places = torch.arange(tail - 1, width, device=device)[None]
    logits = reader.logits(
        rows,
        places,
        input_ids=ids.to(device),
        attention_mask=mask[:, None].to(device),
        position_ids=positions.to(device),
        past_key_values=past,
        use_cache=past is not None,
    )
    scores, start = [], 1
    for choice in choices:
        # The prompt's last token predicts the first of every choice, then each token of the choice the next.
        before = [0, *range(start, start + len(choice) - 1)]
        answer = torch.tensor(choice, device=device).expand(len(prompts), -1)
        scores.append(_log_probabilities(logits[:, before], answer).sum(-1).cpu())
        start += len(choice)
    return torch.stack(scores, dim=1).float()


def _log_probabilities(logits: Tensor, answer: Tensor) -> Tensor:
    """Log-probability of `answer` [rows, tokens] under `logits` [rows, tokens, vocabulary]."""
    return logits.gather(-1, answer[..., None])[..., 0] - logits.logsumexp(-1)


def _shares_exactly(reader: Reader, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]]) -> bool:
    """Whether scoring side by side is right for this model: by what it accepts, by its window, and by trying it."""
    model = reader.model
    if not {"position_ids", "past_key_values", "attention_mask"} <= reader.arguments:
        log.info("scoring row by row: %s takes no position ids or no cache", type(model).__name__)
        return False
    whole = whole_rows(model)
    if whole is not None:
        log.info("scoring row by row: router %r weighs whole rows", whole)
        return False
    window = getattr(getattr(model, "config", None), "sliding_window", None)
    longest = max(map(len, prompts)) + max(map(len, choices))
    if isinstance(window, int) and window < longest:
        log.info("scoring row by row: the model's attention window (%d) is shorter than the rows (%d)", window, longest)
        return False
    trial = [prompts[0], prompts[-1]]
    shared = _common_prefix(trial)
    past = reader.read_prefix(trial[0][:shared]) if shared else None
    plain = _score_pairs(reader, trial, choices)
    together = _score_side_by_side(reader, trial, choices, shared, past)
    # The two ways add the same numbers in another order. Rounding moves a score by a few units of the dtype's
    # precision for each layer; a model that mixes choices up is off by whole nats.
    bound = 1e-3 if torch.finfo(reader.dtype).eps < 1e-6 else 0.25
    agree = bool(((plain - together).abs() <= bound * (1 + plain.abs())).all())
    if not agree:
        log.info("scoring row by row: %s does not keep choices side by side apart", type(model).__name__)
    return agree


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own: its last predicts the answer."""
    return shared_prefix_length([list(prompt[:-1]) for prompt in prompts]) if len(prompts) > 1 else 0
