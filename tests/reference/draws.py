"""Random configurations of every type, both ways between PEFT and lorakit: the same function, or refused by name.

    python tests/reference/draws.py [COUNT] [SEED]

Draw number N depends on SEED + N alone, so that one draw can be repeated: `draws.py 1 1234`.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

import peft  # noqa: E402
import torch  # noqa: E402

import lorakit.peft as ours  # noqa: E402
from lorakit.errors import LorakitError  # noqa: E402
from reference.models import MODELS, logits, quiet, scramble, tolerance, twin  # noqa: E402

Pick = Callable[[random.Random], Any]
_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _some(*values: Any) -> Pick:
    return lambda one: one.choice(values)


RANKED: dict[str, Pick] = {"r": _some(1, 2, 3, 4, 8)}
LYCORIS: dict[str, Pick] = {**RANKED, "alpha": _some(1, 4, 16)}
COMMON: dict[str, Pick] = {
    "layers_to_transform": _some(None, None, [0], [1, 2]),
    "modules_to_save": _some(None, None, ["lm_head"]),
}
VIRTUAL: dict[str, Pick] = {"num_virtual_tokens": _some(1, 2, 5)}
TYPES: dict[str, dict[str, Pick]] = {
    "LoraConfig": {
        **RANKED, **COMMON, "lora_alpha": _some(1, 8, 32), "use_rslora": _some(False, True),
        "use_dora": _some(False, False, True),
        "bias": _some("none", "none", "lora_only", "all"), "rank_pattern": _some({}, {}, {"q_proj": 5, "v_proj": 2}),
        "alpha_pattern": _some({}, {}, {"q_proj": 3}),
        "init_lora_weights": _some(True, False, "gaussian", "orthogonal", "pissa", "olora"),
        "exclude_modules": _some(None, None, ["layers.1.self_attn.q_proj"]),
    },
    "AdaLoraConfig": {"init_r": _some(2, 4), "target_r": _some(1, 2), "total_step": _some(10), "lora_alpha": _some(4, 32)},
    "AdaptionPromptConfig": {"adapter_len": _some(1, 4), "adapter_layers": _some(1, 2, 3)},
    "BOFTConfig": {"boft_block_size": _some(2, 4), "boft_n_butterfly_factor": _some(1)},
    "C3AConfig": {"block_size": _some(2, 4)},
    "FourierFTConfig": {"n_frequency": _some(5, 40), "scaling": _some(10.0, 150.0), "random_loc_seed": _some(1, 777)},
    "HiraConfig": {**RANKED, "rank_pattern": _some({}, {"q_proj": 3})},
    "IA3Config": {"feedforward_modules": _some([], ["down_proj"])},
    "LoHaConfig": LYCORIS,
    "LoKrConfig": {**LYCORIS, "decompose_both": _some(False, True), "decompose_factor": _some(-1, 2, 4)},
    "OFTConfig": {
        "oft_block_size": _some(2, 4, 8), "use_cayley_neumann": _some(True, False), "block_share": _some(False, True)
    },
    "PrefixTuningConfig": VIRTUAL,
    "PromptEncoderConfig": {**VIRTUAL, "encoder_hidden_size": _some(4, 8)},
    "PromptTuningConfig": VIRTUAL,
    "RandLoraConfig": {"r": _some(2, 4), "randlora_alpha": _some(20, 640), "projection_prng_key": _some(0, 7)},
    "ShiraConfig": {"r": _some(1, 2)},
    "VBLoRAConfig": {"num_vectors": _some(8, 16), "vector_length": _some(4), "topk": _some(2, 3), "r": _some(2, 4)},
    "VeraConfig": {"r": _some(2, 8), "d_initial": _some(0.1, 1.0), "projection_prng_key": _some(0, 7)},
}  # fmt: skip
_WIDE = dict.fromkeys(("AdaptionPromptConfig", "C3AConfig", "FourierFTConfig", "BOFTConfig", "OFTConfig"), 0.0001)
_WIDE["LoHaConfig"] = 1e-6
"""What PEFT computes in float32 although all else is in float64 -> how far apart it may be; of LoHa it is the scale alone."""


def drawn(seed: int) -> tuple[str, dict[str, Any]]:
    """A type and its options."""
    one = random.Random(seed)
    name = one.choice(list(TYPES))
    options = {key: pick(one) for key, pick in TYPES[name].items()}
    if "num_virtual_tokens" not in options and name != "AdaptionPromptConfig":
        options["target_modules"] = one.sample(_NAMES, one.randint(1, 4))
        if name == "IA3Config" and options["feedforward_modules"]:
            options["target_modules"] = sorted({*options["target_modules"], "down_proj"})
    return name, {**options, "task_type": "CAUSAL_LM"}


def _apart(name: str, a: torch.Tensor, b: torch.Tensor) -> float:
    """How far two outputs are apart, in units of what rounding allows."""
    length = min(a.shape[1], b.shape[1])  # PEFT gives the places of a soft prompt too
    a, b = a[:, -length:], b[:, -length:]
    allowed = _WIDE[name] * max(1.0, b.abs().max().item()) if name in _WIDE else tolerance(a)
    return ((a - b).abs().max() / allowed).item()


def draw(seed: int, base: Any) -> str:
    """ "same", "refused: …" or "WRONG: …" of one draw, both ways."""
    name, options = drawn(seed)
    with tempfile.TemporaryDirectory() as folder, quiet():
        try:
            torch.manual_seed(seed)
            theirs = peft.get_peft_model(twin(base), getattr(peft, name)(**options)).eval()
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            return f"refused by PEFT: {str(error)[:60]}"
        if name not in ("ShiraConfig", "RandLoraConfig", "LoraConfig"):
            trained = [
                (key, one) for key, one in theirs.named_parameters() if one.requires_grad and "ranknum" not in key
            ]
            scramble(iter(trained), seed)
        wanted = logits(theirs, "llama")
        theirs.save_pretrained(str(Path(folder) / "theirs"))
        try:
            read = ours.PeftModel.from_pretrained(twin(base), Path(folder) / "theirs").eval()
            own = ours.get_peft_model(twin(base), getattr(ours, name)(**options)).eval()
        except LorakitError as error:
            return f"refused: {str(error)[:60]}"
        if (far := _apart(name, logits(read, "llama"), wanted)) > 1:
            return f"WRONG: {name} {options} read by lorakit is {far:.1e} of rounding apart"
        scramble(iter([(key, one) for key, one in own.named_parameters() if one.requires_grad]), seed)
        wanted = logits(own, "llama")
        own.save_pretrained(Path(folder) / "own")
        try:
            back = peft.PeftModel.from_pretrained(twin(base), str(Path(folder) / "own")).eval()
        except RuntimeError as error:  # an error is no wrong number, and is counted by itself
            if name == "HiraConfig" and options["rank_pattern"]:  # see test_wrong_behaviours.py
                return "same but for PEFT, which builds HiRA's layers without its rank_pattern"
            return f"refused by PEFT reading lorakit's file: {name}, {str(error).splitlines()[-1].strip()[:40]}"
        if (far := _apart(name, logits(back, "llama"), wanted)) > 1:
            return f"WRONG: {name} {options} read by PEFT is {far:.1e} of rounding apart"
    return "same"


def main(count: int, first: int) -> int:
    """Draw, and print what came of it; 1 where a number was wrong."""
    torch.set_num_threads(1)
    base, found, types = MODELS["llama"](), Counter[str](), Counter[str]()
    print(f"{count} draws, seeds {first} to {first + count - 1}")
    for seed in range(first, first + count):
        try:
            result = draw(seed, base)
        except Exception as error:
            result = f"WRONG: {drawn(seed)} raised {type(error).__name__}: {str(error)[:200]}"
        found[result.partition(": ")[0] if not result.startswith("refused") else result] += 1
        types[drawn(seed)[0]] += 1
        if (done := seed - first + 1) % 50 == 0:
            print(f"{done} draws: {dict(found)}", flush=True)
        if result.startswith("WRONG"):
            print(f"seed {seed}: {result}", flush=True)
    for result, times in found.most_common():
        print(f"{times:6,}  {result}")
    if count >= 500:
        kept = {"draws": count, "first_seed": first, "results": dict(found), "types": dict(sorted(types.items()))}
        (ROOT / "benchmarks" / "results" / "peft_draws.json").write_text(json.dumps(kept, indent=1) + "\n")
    return int(found["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main(*(int(one) for one in (*sys.argv[1:], *("2000", "0")[len(sys.argv) - 1 :]))))
