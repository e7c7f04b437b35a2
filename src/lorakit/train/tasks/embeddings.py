"""Sentence embeddings: a vector of each text, near to those of texts that mean the same.

Rows are an anchor and a positive text, and maybe hard negatives (`negative`, or `negative_1`, ...), or two sentences and a
score. The former are learned by multiple negatives ranking: every text of the batch but an anchor's own positive is a
negative, so the micro-batch decides how many there are, and accumulation adds none. The latter are learned by the cosine.

Pooling is that of sentence-transformers' folder (modules.json), or the mean over tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.models.loading import random_modules
from lorakit.native.elementwise import wide
from lorakit.train import metrics
from lorakit.train.data.encoded import Encoded
from lorakit.train.data.templates import UnusableRow
from lorakit.train.tasks.contract import Columns, PaddedTask, encoded_text

SCALE = 20.0
"""By which cosines are multiplied before the cross entropy, the default of sentence-transformers."""
POOLINGS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "lasttoken": "pooling_mode_lasttoken",
}


class Embeddings(PaddedTask):
    """Vectors of unit length; a row only asked needs a text, or an anchor."""

    name = "embeddings"
    columns: ClassVar[Columns] = {
        "anchor": ("anchor", "query", "question", "sentence1", "premise", "text"),
        "positive": ("positive", "passage", "document", "answer", "sentence2", "hypothesis"),
    }
    answer = ("positive",)
    learned = "which texts belong together"

    def read(self, values: Mapping[str, Any], classes: Sequence[str] | None, asked: bool) -> Any:
        texts = [self.text(values, "anchor")]
        if asked:
            return texts, None
        texts.append(self.text(values, "positive"))
        score = values.get("score", values.get("label") if "sentence1" in values else None)
        if score is not None:
            if isinstance(score, bool) or not isinstance(score, int | float) or not -1 <= score <= 1:
                raise UnusableRow(f'"score" is {score!r:.40}, expected a cosine between -1 and 1 (divide 0 to 5 by 5)')
            return texts, float(score)
        texts += [
            text for name, text in sorted(values.items()) if name.startswith("negative") and isinstance(text, str)
        ]
        return texts, "pairs"

    def encode(self, tokenizer: Any, given: Any, limit: int) -> list[Encoded]:
        texts, label = given
        made = [encoded_text(tokenizer, limit, text) for text in texts]
        lost = sum(cut for _, cut in made)
        [first, *others] = [inputs for inputs, _ in made]
        if label is None:
            return [Encoded(first, shown=texts[0], cut=lost)]
        # the other texts of the row are part of its label, so that they are hashed with it
        label = [label, others]
        return [Encoded(first, label, 1, expected=(label[0], texts[1]), shown=texts[0], cut=lost)]

    def call(self, model: Any, examples: Sequence[Encoded]) -> Any:
        """The vectors of each column's texts, `[texts, size]`: anchors, then the others of all rows in turn."""
        others = [Encoded(one) for row in examples if row.label is not None for one in row.label[1]]
        # columns are padded apart, as each is about as long as itself
        return [self._vectors(model, some) for some in (list(examples), others) if some]

    def _vectors(self, model: Any, examples: Sequence[Encoded]) -> Tensor:
        batch = self.batch(model, examples)
        hidden = wide(model(**batch).last_hidden_state)
        mask = batch["attention_mask"].to(hidden.dtype)
        way = pooling_of(model)
        if way == "cls":
            pooled = hidden[:, 0]
        elif way == "lasttoken":
            pooled = hidden[torch.arange(len(hidden)), mask.sum(1).long() - 1]
        else:
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1e-9)
        return nn.functional.normalize(pooled, dim=-1)

    def score(self, outputs: Any, examples: Sequence[Encoded], smoothing: float) -> tuple[Tensor, Tensor]:
        anchors, others = outputs
        counts = [len(one.label[1]) for one in examples]
        firsts = [sum(counts[:at]) for at in range(len(counts))]
        scored = [isinstance(one.label[0], float) for one in examples]
        if all(scored):
            wanted = torch.tensor([one.label[0] for one in examples], device=anchors.device, dtype=anchors.dtype)
            cosines = (anchors * others[firsts]).sum(-1)
            return ((cosines - wanted) ** 2).sum(), torch.zeros((), device=anchors.device)
        if any(scored):
            raise LorakitError("embeddings: some rows have a score and some do not; give it to all, or to none")
        scores = SCALE * anchors @ others.T
        texts = [tuple(one["input_ids"]) for row in examples for one in row.label[1]]
        # a text that occurs twice is no negative to its own anchor
        same = torch.tensor(
            [[other == texts[at] and place != at for place, other in enumerate(texts)] for at in firsts],
            device=scores.device,
        )
        scores = scores.masked_fill(same, -torch.inf)
        own = torch.tensor(firsts, device=scores.device)
        total = nn.functional.cross_entropy(scores, own, reduction="sum")
        return total, (scores.detach().argmax(-1) == own).sum()

    def decode(self, outputs: Any, examples: Sequence[Encoded], model: Any, tokenizer: Any) -> list[Any]:
        if len(outputs) == 1:
            return [one.tolist() for one in outputs[0].float()]
        counts = [len(one.label[1]) for one in examples]
        firsts = [sum(counts[:at]) for at in range(len(counts))]
        return list(zip(outputs[0].float().tolist(), outputs[1][firsts].float().tolist(), strict=True))

    def metrics(self, given: Sequence[Any], expected: Sequence[Any]) -> dict[str, float]:
        """Spearman of the cosine, where rows have scores; else how well each anchor finds its positive among all."""
        anchors = torch.tensor([one for one, _ in given])
        positives = torch.tensor([one for _, one in given])
        labels = [label for label, _ in expected]
        if isinstance(labels[0], float):
            return {"spearman": metrics.spearman((anchors * positives).sum(-1).tolist(), labels)}
        unique = list(dict.fromkeys(text for _, text in expected))
        texts = [text for _, text in expected]
        places = torch.tensor([texts.index(text) for text in unique])
        order = (anchors @ positives[places].T).argsort(-1, descending=True).tolist()
        ranked = [[float(unique[at] == text) for at in row] for row, (_, text) in zip(order, expected, strict=True)]
        return metrics.ranking(ranked)

    def is_right(self, given: Any, expected: Any) -> bool:
        return True

    def settle(self, model: Any) -> None:
        if any(name.startswith("pooler.") for name in random_modules(model)):
            model.pooler = None  # the checkpoint has none, and vectors are pooled here

    def facts(self, model: Any) -> dict[str, Any]:
        return {"pooling": pooling_of(model)}

    def export(self, model: Any, folder: Any) -> None:
        """The folder as sentence-transformers reads it."""
        write_modules(Path(folder), pooling_of(model), int(model.config.get_text_config().hidden_size))


def pooling_of(model: Any) -> str:
    """How a model's token vectors become one: what the folder that it is from says, else the mean.

    Raises:
        LorakitError: a way that is not known.
    """
    folder = Path(str(getattr(model.config, "_name_or_path", "")))
    for place in sorted(folder.glob("*_Pooling/config.json")) if folder.is_dir() else ():
        told = json.loads(place.read_text(encoding="utf-8"))
        modes = [told["pooling_mode"]] if isinstance(told.get("pooling_mode"), str) else []
        found = modes or [mode for mode, name in POOLINGS.items() if told.get(name)]
        if len(found) != 1 or found[0] not in POOLINGS:
            raise LorakitError(f"embeddings: {place} asks for another pooling than {', '.join(POOLINGS)}")
        return str(found[0])
    return "mean"


def write_modules(folder: Path, pooling: str, size: int) -> None:
    """The files by which sentence-transformers reads a folder of transformers."""
    kinds: Iterable[tuple[str, str]] = (
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        ("2_Normalize", "Normalize"),
    )
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(kinds)
    ]
    told = {"word_embedding_dimension": size, **{name: mode == pooling for mode, name in POOLINGS.items()}}
    files: dict[str, Any] = {"modules.json": modules, "1_Pooling/config.json": told, "2_Normalize/config.json": {}}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
