"""A file of one method, written by PEFT or by lorakit and read by the other: equal logits, equal names and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.core.delta import Method
from lorakit.files.bundle import OWN, TENSORS
from reference.models import MODELS, assert_same, logits, quiet, scramble, twin


def trained_by_peft(model: Any, config: Any, size: float = 0.2) -> Any:
    """PEFT's adapter on a model, with values as after training."""
    with quiet():
        wrapped: Any = peft.get_peft_model(model, config)
    # AdaLoRA's ranknum, the divisor of the scale, is left trainable by PEFT and is not in its files.
    trained = ((k, p) for k, p in wrapped.named_parameters() if p.requires_grad and ".ranknum." not in k)
    scramble(trained, size=size)
    return wrapped.eval()


def both_ways(name: str, config: Any, spec: Method, folder: Path, size: float = 0.2, **options: Any) -> float:
    """Both directions on the model of this name; returns the largest difference of logits found.

    Args:
        config: PEFT's configuration.
        spec: the same in lorakit's words; `options` are the further arguments of `attach`.
    """
    base = MODELS[name]()
    before = logits(base, name)
    wrapped = trained_by_peft(twin(base), config, size)
    with quiet():
        wrapped.save_pretrained(str(folder / "theirs"))
    wanted = logits(wrapped, name)
    assert (wanted - before).abs().max() > 1e-5, "the adapter must change something for this to say anything"
    read = twin(base)
    lk.load(read, folder / "theirs", name="a")
    with lk.use(read, None):
        assert_same(logits(read, name), before)
    with lk.use(read, "a"):
        found = logits(read, name)
    assert_same(found, wanted)

    made = twin(base)
    adapter = lk.attach(made, spec, target_modules=sorted(config.target_modules), **options)
    scramble(adapter.named_parameters(), size=size)
    made.eval()
    own = logits(made, name)
    assert (own - before).abs().max() > 1e-5
    adapter.save(folder / "ours")
    with quiet():
        again = peft.PeftModel.from_pretrained(twin(base), str(folder / "ours")).eval()
    assert_same(logits(again, name), own)
    shapes = [
        {key: tuple(value.shape) for key, value in load_file(folder / who / TENSORS).items()}
        for who in ("theirs", "ours")
    ]
    assert shapes[0] == shapes[1]
    # Without lorakit.json the folder says the same.
    (folder / "ours" / OWN).unlink()
    bare = twin(base)
    lk.load(bare, folder / "ours", name="b")
    with lk.use(bare, "b"):
        assert_same(logits(bare, name), own)
    return float(torch.maximum((found - wanted).abs().max(), (logits(again, name) - own).abs().max()))
