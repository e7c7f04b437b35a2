"""Evaluation against arithmetic written out by hand, one row at a time and without any batching."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lorakit.errors import LorakitError
from lorakit.train.config.options import EvaluateOptions
from lorakit.train.data.examples import Question
from lorakit.train.evaluate import (
    Evaluation,
    EvaluationSet,
    evaluate_loss,
    generate_answers,
    match_choice,
    measure,
    normalise,
    strip_shared,
    tabulate,
)
from lorakit.train.scoring import score_choices
from training import tiny

VOCABULARY = tiny.VOCABULARY


def llama() -> LlamaForCausalLM:
    return tiny.llama(torch.float64)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4, n_positions=128)
    return GPT2LMHeadModel(config).double()


MODELS = {"llama": llama, "gpt2": gpt2}


def example(length: int, prompt: int, seed: int) -> SimpleNamespace:
    ids = torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return SimpleNamespace(input_ids=ids, labels=[-100] * prompt + ids[prompt:])


@torch.no_grad()
def by_hand(model: torch.nn.Module, ids: list[int], first: int) -> tuple[float, int]:
    """Log-probability of ids[first:] after what precedes them, and how many of them were the likeliest
    token."""
    model.eval()
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(first, len(ids))
    return sum(float(logits[t - 1, ids[t]]) for t in places), sum(int(logits[t - 1].argmax()) == ids[t] for t in places)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_loss_is_the_mean_over_labelled_tokens_whatever_the_batches(name: str, batch_size: int) -> None:
    model = MODELS[name]()
    examples = [example(length, prompt, seed=length) for length, prompt in [(9, 3), (5, 4), (17, 0), (12, 11), (7, 2)]]
    logs, right, tokens = 0.0, 0, 0
    for one in examples:
        first = max(1, next(i for i, label in enumerate(one.labels) if label != -100))
        log, hits = by_hand(model, one.input_ids, first)
        logs, right, tokens = logs - log, right + hits, tokens + len(one.input_ids) - first
    model.train()
    measured = evaluate_loss(model, examples, batch_size=batch_size)
    assert measured.targets == tokens
    assert measured.mean == pytest.approx(logs / tokens, rel=1e-6)
    assert measured.perplexity == pytest.approx(math.exp(logs / tokens), rel=1e-6)
    assert measured.token_accuracy == pytest.approx(right / tokens)
    assert model.training, "evaluation gives the model back in the mode it was in"


def test_rows_without_any_label_are_refused() -> None:
    nothing = SimpleNamespace(input_ids=[1, 2, 3], labels=[-100] * 3)
    with pytest.raises(LorakitError, match="none of them has a labelled token"):
        evaluate_loss(llama(), [nothing])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("instruction", [0, 1, 6])
@pytest.mark.parametrize("share", [True, False])
def test_scores_are_those_of_each_pair_alone(
    name: str, instruction: int, share: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Prompts of unequal length with and without a common beginning; choices of one, three and two tokens,
    two of them beginning alike."""
    model = MODELS[name]()
    prompts = [list(range(instruction)) + example(length, 0, seed=50 + length).input_ids for length in (3, 11, 1, 6, 4)]
    choices = [[7], [7, 9, 11], [30, 2]]
    with caplog.at_level("INFO", logger="lorakit.train"):
        scores = score_choices(model, prompts, choices, batch_size=2, share=share)
    assert "row by row" not in caplog.text, "these models can be scored side by side"
    expected = [[by_hand(model, [*p, *c], len(p))[0] for c in choices] for p in prompts]
    torch.testing.assert_close(scores.double(), torch.tensor(expected, dtype=torch.double), rtol=1e-5, atol=1e-5)


def test_in_bf16_both_ways_of_scoring_choose_alike_where_it_is_not_a_toss() -> None:
    """The head is done in float32: what is left of bf16's rounding is that of the hidden states."""
    model = llama().bfloat16()
    prompts = [list(range(8)) + example(5, 0, seed=seed).input_ids for seed in range(20)]
    apart = score_choices(model, prompts, [[7], [9, 4]], share=False)
    together = score_choices(model, prompts, [[7], [9, 4]])
    assert float((apart - together).abs().max()) < 0.05
    exact = score_choices(model.double(), prompts, [[7], [9, 4]])
    assert float((exact - together).abs().max()) < 0.05


def test_identical_prompts_leave_a_token_to_predict_from() -> None:
    model, prompt = llama(), [4, 5, 6]
    scores = score_choices(model, [prompt] * 3, [[1], [2, 3]])
    expected = [by_hand(model, [*prompt, *c], 3)[0] for c in ([1], [2, 3])]
    torch.testing.assert_close(scores, torch.tensor([expected] * 3), rtol=1e-5, atol=1e-5)


def test_a_model_that_mixes_choices_up_is_noticed_and_scored_row_by_row(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A planted bug: a model that ignores the mask that keeps choices apart."""
    model = llama()
    forward = model.model.forward

    def blind(attention_mask: torch.Tensor | None = None, **inputs: Any) -> Any:
        mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        return forward(attention_mask=mask, **inputs)

    signature = inspect.signature(forward)
    blind.__signature__ = signature  # type: ignore[attr-defined]
    model.model.forward = blind
    prompts, choices = [[1, 2, 3], [1, 2, 9, 8, 7]], [[7], [7, 9, 11], [30, 2]]
    with caplog.at_level("INFO", logger="lorakit.train"):
        scores = score_choices(model, prompts, choices)
    assert "does not keep choices side by side apart" in caplog.text
    model.model.forward = forward
    expected = [[by_hand(model, [*p, *c], len(p))[0] for c in choices] for p in prompts]
    torch.testing.assert_close(scores.double(), torch.tensor(expected, dtype=torch.double), rtol=1e-5, atol=1e-5)


def test_scoring_refuses_what_has_no_probability() -> None:
    with pytest.raises(LorakitError, match="prompt 1 has no tokens"):
        score_choices(llama(), [[1], []], [[2]])
    with pytest.raises(LorakitError, match="choice 0 has no tokens"):
        score_choices(llama(), [[1]], [[]])


class Numbers:
    """A tokenizer whose words are the numbers themselves."""

    eos_token_id = 3

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(str(i) for i in ids)


def test_batched_answers_are_those_of_each_prompt_alone() -> None:
    model = llama()
    prompts = [example(length, 0, seed=90 + length).input_ids for length in (2, 9, 5, 5, 1)]
    together = generate_answers(model, Numbers(), prompts, max_new_tokens=8, batch_size=3)
    alone = [generate_answers(model, Numbers(), [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert together == alone
    # And they are what picking the likeliest token step by step gives.
    ids = list(prompts[1])
    for _ in range(8):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == Numbers.eos_token_id:
            break
        ids.append(token)
    assert together[1] == " ".join(str(i) for i in ids[len(prompts[1]) :])


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("positive", "positive"),
        ("The review is Positive.", "positive"),
        ("negative, not positive", "negative"),
        ("nonpositive", None),
        ("very good", "very good"),
        ("", None),
    ],
)
def test_the_choice_that_a_free_answer_names(text: str, choice: str | None) -> None:
    assert match_choice(text, ["positive", "negative", "very", "very good"]) == choice


def test_answers_are_compared_without_white_space_and_if_asked_without_case() -> None:
    assert normalise(" a  B\n") == normalise("A b")
    assert normalise("a B", ignore_case=False) != normalise("A b", ignore_case=False)


def test_a_prompt_is_shown_without_what_all_prompts_share() -> None:
    assert strip_shared(["Judge: good film.\nA:", "Judge: a bore.\nA:"]) == ["good film.", "a bore."]
    assert strip_shared(["same", "same"]) == ["same", "same"]
    assert strip_shared(["a X a", "a a"]) == ["X", ""]
    assert strip_shared(["Who wrote Hamlet? (29)", "Who wrote Emma? (19)"]) == ["Hamlet? (29)", "Emma? (19)"]


def question(ids: list[int], answer: str, place: str = "rows.jsonl, line 1") -> Question:
    return Question(ids, f"Q {ids[-1]} ?", answer, place)


def test_scored_answers_take_the_likeliest_choice() -> None:
    model = llama()
    asked = [question([4, 5, 6 + i], "yes") for i in range(12)]
    options = EvaluateOptions(answers="score", choices=("Yes", "no"))
    likeliest = score_choices(model, [one.prompt_ids for one in asked], [[7], [9]]).argmax(-1).tolist()
    assert 0 < sum(likeliest) < 12, "both answers must occur for this test to mean anything"
    measured = measure(model, Numbers(), EvaluationSet([example(6, 2, 1)], asked, [[7], [9]]), options)
    assert [one.given for one in measured.answers] == [options.choices[i] for i in likeliest]
    assert measured.accuracy == pytest.approx(1 - sum(likeliest) / 12)
    assert measured.exact_match is None
    assert [one.prompt for one in measured.answers] == [str(6 + i) for i in range(12)]


def test_a_row_that_expects_none_of_the_choices_is_refused_with_its_place() -> None:
    options = EvaluateOptions(answers="score", choices=("Yes", "no"))
    asked = [question([4], "maybe", "rows.jsonl, line 9")]
    with pytest.raises(LorakitError, match=r"line 9 expects 'maybe', which is none of"):
        measure(llama(), Numbers(), EvaluationSet([example(6, 2, 1)], asked, [[7], [9, 8]]), options)


def test_generated_answers_are_compared_whole_and_by_the_choice_they_name() -> None:
    model = llama()
    texts = generate_answers(model, Numbers(), [[4, 5, 6], [1, 2, 3]], max_new_tokens=3)
    first = texts[0].split()[0]
    options = EvaluateOptions(answers="generate", max_new_tokens=3, choices=(first, "no such word"))
    asked = [question([4, 5, 6], texts[0]), question([1, 2, 3], "else")]
    measured = measure(model, Numbers(), EvaluationSet([example(6, 2, 1)], asked), options)
    assert measured.exact_match == 0.5
    assert measured.accuracy == 0.0, "the first names a choice that is not its whole expected answer"
    assert [one.right for one in measured.answers] == [True, False]
    asked = [question([4, 5, 6], first)]
    assert measure(model, Numbers(), EvaluationSet([example(6, 2, 1)], asked), options).accuracy == 1.0


def test_before_and_after_stand_side_by_side() -> None:
    from rich.console import Console

    before = Evaluation(rows=500, loss=2.5, perplexity=12.182, accuracy=0.744)
    after = Evaluation(rows=500, loss=0.25, perplexity=1.284, accuracy=0.88)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(tabulate({"before": before, "after": after}))
    text = console.export_text()
    for shown in ("before", "after", "74.4%", "88.0%", "2.5000", "12.18", "500"):
        assert shown in text
    assert "exact match" not in text, "what was not measured is not shown"
