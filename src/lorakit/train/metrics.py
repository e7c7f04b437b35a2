"""Metrics of tasks over the answers to all rows. Small ones are here; ROUGE is rouge-score's, entities are seqeval's.

Shares and correlations are between 0 and 1 (or -1 and 1), never in percent.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

log = logging.getLogger("lorakit.train")


def has_library(package: str, module: str, what: str) -> bool:
    """Whether an optional metric's library is installed; said in the log where it is not."""
    if importlib.util.find_spec(module) is not None:
        return True
    log.warning("%s is not measured, since %s is not installed: pip install %s", what, package, package)
    return False


def accuracy(given: Sequence[Any], expected: Sequence[Any]) -> float:
    """Share of answers that are equal to what was expected."""
    return sum(bool(one == other) for one, other in zip(given, expected, strict=True)) / max(1, len(given))


def _f1(right: int, given: int, expected: int) -> float:
    return 2 * right / (given + expected) if given + expected else 0.0


def macro_f1(given: Sequence[Any], expected: Sequence[Any]) -> float:
    """The mean over the classes that occur of each one's F1."""
    names = sorted({*given, *expected})
    right = Counter(one for one, other in zip(given, expected, strict=True) if one == other)
    scores = [_f1(right[name], list(given).count(name), list(expected).count(name)) for name in names]
    return sum(scores) / max(1, len(scores))


def micro_f1(given: Sequence[Sequence[Any]], expected: Sequence[Sequence[Any]]) -> float:
    """F1 over all labels of all rows."""
    right = sum(len(set(one) & set(other)) for one, other in zip(given, expected, strict=True))
    return _f1(right, sum(len(set(one)) for one in given), sum(len(set(one)) for one in expected))


def pearson(given: Sequence[float], expected: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one side does not vary."""
    one, other = np.asarray(given, dtype=float), np.asarray(expected, dtype=float)
    one, other = one - one.mean(), other - other.mean()
    size = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum()) / size if size > 0 else 0.0


def ranks(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The rank of each value, equal ones sharing the mean of theirs."""
    array = np.asarray(values, dtype=float)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    found: np.ndarray[Any, np.dtype[np.float64]] = (ends - (counts - 1) / 2)[inverse]
    return found


def spearman(given: Sequence[float], expected: Sequence[float]) -> float:
    """Spearman's rank correlation."""
    return pearson(ranks(given).tolist(), ranks(expected).tolist())


def ranking(ranked: Sequence[Sequence[float]]) -> dict[str, float]:
    """Recall@1, MRR@10 and nDCG@10 of queries, each the relevance of its documents from the best to the worst."""
    if not ranked:
        return {}
    first = [float(one[0] > 0.5) for one in ranked]
    reciprocal = [next((1 / (at + 1) for at, one in enumerate(row[:10]) if one > 0.5), 0.0) for row in ranked]
    gains = []
    for row in ranked:
        best = sum(one / math.log2(at + 2) for at, one in enumerate(sorted(row, reverse=True)[:10]))
        gains.append(sum(one / math.log2(at + 2) for at, one in enumerate(row[:10])) / best if best else 0.0)
    many = len(ranked)
    return {"recall_at_1": sum(first) / many, "mrr_at_10": sum(reciprocal) / many, "ndcg_at_10": sum(gains) / many}


# -- texts -----------------------------------------------------------------------------------------


def squad_words(text: str) -> list[str]:
    """The words of an answer as SQuAD compares them: lower case, without articles and punctuation."""
    text = "".join(one for one in text.lower() if one not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def squad(given: Sequence[str], expected: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's exact match and F1 over words, the best over the answers of each row; "" where there is none."""
    exact, overlap = 0.0, 0.0
    for text, answers in zip(given, expected, strict=True):
        words = squad_words(text)
        every = [squad_words(one) for one in answers] or [[]]
        exact += float(any(words == one for one in every))
        overlap += max(
            _f1((Counter(words) & Counter(one)).total(), len(words), len(one)) if words or one else 1.0 for one in every
        )
    many = max(1, len(given))
    return {"exact_match": exact / many, "f1": overlap / many}


def rouge(given: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L by rouge-score, F1, without a stemmer; nothing where it is not installed."""
    if not has_library("rouge-score", "rouge_score", "ROUGE"):
        return {}
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(names))
    scores = [scorer.score(other, one) for one, other in zip(given, expected, strict=True)]
    return {name: sum(one[name].fmeasure for one in scores) / max(1, len(scores)) for name in names}


def entities(given: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole entities by seqeval, strict, labels read as IOB2; nothing where it is not installed."""
    if not has_library("seqeval", "seqeval", "the F1 of entities"):
        return {}
    from seqeval.metrics import f1_score, precision_score, recall_score
    from seqeval.scheme import IOB2

    lists = [list(one) for one in expected], [list(one) for one in given]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that nothing was given of
        scores = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
        return {name: float(one(*lists, mode="strict", scheme=IOB2)) for name, one in scores.items()}
