"""A GPU in under ten minutes: is every kernel right, how fast is training, how much of the base's throughput does serving keep.

    python benchmarks/gpu.py                     from a checkout; needs torch, transformers, triton and peft, and no network
    python benchmarks/gpu.py --only training     one part: kernels, training, serving
    python benchmarks/gpu.py --tiny              small shapes in a minute, on a processor too (without kernels)

Models are Llamas of 1B and 8B parameters with random weights in bfloat16. Training: LoRA of rank 16 on every linear layer, 16
rows of 64 to 768 tokens behind 96 shared ones, answers of 64 tokens, forward, backward, clip and AdamW; lorakit, PEFT (padded,
all logits) and a plain loop (lorakit's adapter on padded batches). Tokens are the rows' own, shared ones counted for each. The
share of the peak is 4 floating-point operations per weight and token over what a product of 8,192 x 8,192 reaches here.
Serving: 128 requests at once of 128 tokens, 64 new ones each; the base alone, then with 1, 8, 32 and 128 distinct adapters.

A line is printed as soon as it is known; a part that begins after the time is up (--minutes) is left out and says so. The exit
status is 1 where a kernel differs from its twin.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

PARTS = ("kernels", "training", "serving")


@dataclass(frozen=True)
class Size:
    """The shapes of a Llama."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int


SIZES = {
    "1B": Size(2048, 8192, 16, 32, 8, 128_256),
    "8B": Size(4096, 14_336, 32, 32, 8, 128_256),
    "tiny": Size(64, 96, 2, 4, 2, 200),
}


@dataclass(frozen=True)
class Row:
    """An example as the training step reads it."""

    input_ids: list[int]
    labels: list[int]


class Bench:
    """The device, the clock and what has been found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tiny = options.tiny
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.end = time.monotonic() + 60 * options.minutes
        self.wrong = 0
        self.found: list[dict[str, Any]] = []
        name = torch.cuda.get_device_name(self.device) if self.cuda else "a processor"
        self.say("machine", on=name, torch=torch.__version__, peak=f"{self.peak() / 1e12:.4g} TFLOP/s in bfloat16")

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    def say(self, what: str, **numbers: Any) -> None:
        """One line, and one row of the results."""
        self.found.append({"what": what, **numbers})
        print(f"{what:<52}  " + "  ".join(f"{name} {value}" for name, value in numbers.items()), flush=True)

    def over(self, what: str) -> bool:
        """Whether the time is up, which is said."""
        if time.monotonic() > self.end:
            self.say(what, left_out="the time is up")
            return True
        return False

    def wait(self) -> None:
        """Until the device has done its work."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object], rounds: int = 5) -> float:
        """The median of so many runs, after one that is not counted."""
        times = []
        for _ in range(rounds + 1):
            self.wait()
            begin = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])

    def peak(self) -> float:
        """Operations a second of a large product in bfloat16."""
        if not hasattr(self, "_peak"):
            side = 8192 if self.cuda else 512
            one = torch.randn(side, side, device=self.device, dtype=torch.bfloat16)
            self._peak = 2 * side**3 / self.seconds(lambda: one @ one, 10)
        return self._peak

    def memory(self) -> str:
        """The most memory of the device in use since the last `clear`."""
        return f"{torch.cuda.max_memory_allocated(self.device) / 2**30:.1f} GiB" if self.cuda else "-"

    def clear(self) -> None:
        """Let go of what is no longer used."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def draw(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Random numbers on the device."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(self.device, dtype)

    def model(self, size: Size) -> Any:
        """A Llama with random weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=size.hidden, intermediate_size=size.inner, num_hidden_layers=size.layers, vocab_size=size.vocabulary,
            num_attention_heads=size.heads, num_key_value_heads=size.key_heads, max_position_embeddings=8192,
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with self.device:
                return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)


# -- kernels ------------------------------------------------------------------------------------------------------------------


def kernels(bench: Bench) -> None:
    """Every Triton kernel beside the functions in PyTorch that it computes, on the shapes of the 8B model."""
    from lorakit.native import triton

    if (reason := triton.obstacle(bench.device, torch.bfloat16)) is not None:
        bench.say("kernels", left_out=reason)
        return
    size = SIZES["tiny" if bench.tiny else "8B"]
    for check in (elementwise_kernels, tree_kernels, paged_kernel, adapter_kernels):
        if bench.over(f"kernel: {check.__name__}"):
            return
        try:
            check(bench, size)
        except Exception as problem:  # the others are tried all the same
            bench.wrong += 1
            bench.say(f"kernel: {check.__name__}", failed=f"{type(problem).__name__}: {problem}")


def compare(bench: Bench, name: str, kernel: Callable[[], Any], twin: Callable[[], Any], within: float = 0.02) -> None:
    """Say how far a kernel is off its twin, of the largest number, and how long both take."""
    found, expected = kernel(), twin()
    pairs = list(zip(found, expected, strict=True)) if isinstance(expected, tuple) else [(found, expected)]
    gap = max(float((one.double() - two.double()).abs().max() / two.double().abs().max()) for one, two in pairs)
    right = gap <= within
    bench.wrong += not right
    times = {
        way: f"{1e6 * bench.seconds(run, 1 if bench.tiny else 5):.0f} µs"
        for way, run in (("triton", kernel), ("torch", twin))
    }
    bench.say(f"kernel: {name}", verdict="right" if right else "WRONG", off=f"{gap:.1e}", **times)


def elementwise_kernels(bench: Bench, size: Size) -> None:
    """Norms, gates and rotary positions."""
    from lorakit.native import elementwise as torchs
    from lorakit.native.triton import elementwise as own

    rows, width = 8 if bench.tiny else 4096, size.hidden
    x, grad, weight = bench.draw(rows, width), bench.draw(rows, width, seed=1), bench.draw(width, seed=2)
    form: dict[str, float] = {"eps": 1e-5, "shift": 0.0}
    compare(bench, "norm", lambda: own.norm(x, weight, **form), lambda: torchs.norm_rows(x, weight, **form))
    scale = torchs.norm_rows(x, weight, **form)[1]
    given = (grad, x, weight, scale)
    compare(
        bench, "norm, backward",
        lambda: own.norm_backward(*given, shift=0.0), lambda: torchs.norm_rows_backward(*given, shift=0.0),
    )  # fmt: skip
    gate, up, dy = (bench.draw(rows, size.inner, seed=seed) for seed in range(3))
    for kind, (forward, backward) in torchs.GATES.items():
        compare(bench, f"gate {kind}", lambda: own.gate(kind, gate, up), lambda: forward(gate, up))  # noqa: B023
        compare(
            bench, f"gate {kind}, backward",
            lambda: own.gate_backward(kind, dy, gate, up), lambda: backward(dy, gate, up),  # noqa: B023
        )  # fmt: skip
    d = size.hidden // size.heads
    q, cos, sin = bench.draw(rows, size.heads, d), bench.draw(rows, d, seed=1), bench.draw(rows, d, seed=2)
    compare(bench, "rotary positions", lambda: own.turn(q, cos, sin), lambda: torchs.rotate(q, cos, sin))
    compare(
        bench, "rotary positions, backward",
        lambda: own.turn(q, cos, sin, back=True), lambda: torchs.rotate_back(q, cos, sin),
    )  # fmt: skip


def tree_kernels(bench: Bench, size: Size) -> None:
    """Attention over shared prefixes, forward and backward, and over rows that share nothing."""
    from lorakit.native.triton import tree
    from lorakit.train.step.batched_attention import PackedAttention, plan_attention
    from lorakit.train.step.packing import pack
    from lorakit.train.step.tree import runs_of

    d = max(16, size.hidden // size.heads)
    for name, rows, window in (
        ("shared prefixes", examples(bench, 96), None),
        ("a window of 64", examples(bench, 0), 64),
    ):
        batch = pack(rows).to(bench.device)
        on, scale = tree.Tree(runs_of(batch), bench.device), d**-0.5
        counts = (size.heads, size.key_heads, size.key_heads)
        q, k, v = (bench.draw(batch.tokens, count, d, seed=seed) for seed, count in enumerate(counts))
        grad = bench.draw(batch.tokens, size.heads, d, seed=9)
        grad[batch.used :] = 0
        plan, used = plan_attention(batch, size.heads, size.key_heads, d, window), batch.used

        def by_kernel() -> tuple[Tensor, ...]:
            out, sums = tree.attend(q, k, v, on, scale, window)  # noqa: B023
            return out[:used], *tree.attend_backward(q, k, v, out, sums, grad, on, scale, window)  # noqa: B023

        def by_torch() -> tuple[Tensor, ...]:
            leaves = [one.clone().requires_grad_() for one in (q, k, v)]  # noqa: B023
            out: Any = PackedAttention.apply(*leaves, None, plan, scale, None, window)  # noqa: B023
            out.backward(grad)  # noqa: B023
            return (out.detach()[:used], *(leaf.grad for leaf in leaves))  # noqa: B023

        compare(bench, f"tree attention, {name}, and backward", by_kernel, by_torch)


def paged_kernel(bench: Bench, size: Size) -> None:
    """Attention of 32 requests over pages, of which some have a chunk of a prompt."""
    from lorakit.serve.model.attention import ForwardContext, attend
    from lorakit.serve.model.batch import Run, assemble
    from lorakit.serve.model.cache import Cache, LayerShape, page_count

    d = max(16, size.hidden // size.heads)
    requests = range(4 if bench.tiny else 32)
    starts, counts = [17 * n % 900 for n in requests], [1 if n % 8 else 40 for n in requests]
    need = [page_count(start + count) for start, count in zip(starts, counts, strict=True)]
    free = itertools.count()
    runs = [
        Run([0] * count, start, [next(free) for _ in range(pages)])
        for start, count, pages in zip(starts, counts, need, strict=True)
    ]
    caches = []
    for _ in range(2):
        cache = Cache([LayerShape(size.key_heads, d, d)], sum(need), torch.bfloat16, bench.device)
        cache.keys[0].copy_(bench.draw(*cache.keys[0].shape, seed=7))
        cache.values[0].copy_(bench.draw(*cache.values[0].shape, seed=8))
        caches.append(cache)
    layer: Any = torch.nn.Module()
    layer.layer_idx = 0
    q, k, v = (
        bench.draw(1, sum(counts), heads, d, seed=seed).transpose(1, 2)
        for seed, heads in enumerate((size.heads, size.key_heads, size.key_heads))
    )

    def by(kernels: bool) -> Callable[[], Tensor]:
        batch = assemble(runs, bench.device, None)
        batch.kernels = kernels
        return lambda: attend(ForwardContext(batch, caches[kernels], compiled=False), layer, q, k, v)

    compare(bench, "paged attention", by(True), by(False))


def adapter_kernels(bench: Bench, size: Size) -> None:
    """The product over 32 adapters of ranks 8 to 64, one for each of 32 tokens, and a prompt of 256."""
    from lorakit.serve.model.batch import Run, assemble, mix
    from lorakit.serve.model.packed import LayerTensors, PackedAdapter
    from lorakit.serve.model.product import adapt

    adapters = []
    for number in range(5 if bench.tiny else 32):
        rank = (8, 16, 32, 64)[number % 4]
        own = LayerTensors(
            bench.draw(rank, size.hidden, seed=number) / 32, bench.draw(rank, size.inner, seed=number) / 8, None, None
        )
        parts = torch.zeros(1, 5, dtype=torch.int64)
        for column, tensor in own.tensors():
            parts[0, column] = tensor.data_ptr()
        parts[0, 4] = rank
        adapters.append(PackedAdapter("", "", torch.zeros(0), parts, {0: own}, "", "form", 0.0, rank))
    blends = [[(adapter, 1.0)] for adapter in adapters]
    counts = [20 if bench.tiny else 256, *[1] * (len(adapters) - 1)]
    runs = [Run([0] * count, 0, [0] * (-(-count // 16)), blend) for count, blend in zip(counts, blends, strict=True)]
    batch = assemble(runs, bench.device, mix(blends))
    x, y = bench.draw(sum(counts), size.hidden), bench.draw(sum(counts), size.inner, seed=1)

    def by(kernels: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            batch.kernels, result = kernels, y.clone()
            adapt(batch, 0, x, result, compiled=False)
            return result

        return run

    compare(bench, f"product over {len(adapters)} adapters", by(True), by(False))


# -- training -----------------------------------------------------------------------------------------------------------------


def examples(bench: Bench, shared: int) -> list[Row]:
    """Rows of unequal length behind a shared beginning; the last tokens carry the loss."""
    vocabulary = SIZES["tiny"].vocabulary
    count, longest, answer = (4, 24, 4) if bench.tiny else (16, 704, 64)
    generator = torch.Generator().manual_seed(5)
    beginning = torch.randint(3, vocabulary, (shared,), generator=generator).tolist()
    rows = []
    for number in range(count):
        own = torch.randint(3, vocabulary, (answer + longest * (number + 1) // count,), generator=generator).tolist()
        ids = beginning + own
        rows.append(Row(ids, [-100] * (len(ids) - answer) + ids[-answer:]))
    return rows


def padded(rows: Sequence[Row], device: torch.device) -> dict[str, Tensor]:
    """The same rows as one padded batch."""
    longest = max(len(row.input_ids) for row in rows)

    def fill(values: list[int], with_: int) -> list[int]:
        return values + [with_] * (longest - len(values))

    return {
        "input_ids": torch.tensor([fill(row.input_ids, 0) for row in rows], device=device),
        "attention_mask": torch.tensor([fill([1] * len(row.input_ids), 0) for row in rows], device=device),
        "labels": torch.tensor([fill(row.labels, -100) for row in rows], device=device),
    }


def training(bench: Bench) -> None:
    """Steps of every side on every size that fits."""
    for name in ("tiny",) if bench.tiny else ("1B", "8B"):
        for side, make in (("lorakit", lorakit_side), ("peft", peft_side), ("plain loop", plain_side)):
            if bench.over(f"training {name}: {side}"):
                continue
            bench.clear()
            try:
                model = bench.model(SIZES[name])
                weights = sum(one.numel() for one in model.parameters()) - model.get_input_embeddings().weight.numel()
                rows = examples(bench, 8 if bench.tiny else 96)
                tokens = sum(len(row.input_ids) for row in rows)
                with make(bench, model, rows) as step:
                    seconds = bench.seconds(step, 3 if bench.tiny else 6)
                share = 4 * weights * tokens / seconds / bench.peak()
                bench.say(
                    f"training {name}: {side}", tokens_per_second=f"{tokens / seconds:,.0f}", step=f"{1e3 * seconds:.0f} ms",
                    memory=bench.memory(), share_of_the_peak=f"{share:.0%}",
                )  # fmt: skip
            except Exception as problem:  # a side that is missing or does not fit says so
                bench.say(f"training {name}: {side}", failed=f"{type(problem).__name__}: {str(problem)[:200]}")
            model = None


class Side:
    """A step of training, between the preparation of a model and its end."""

    def __init__(
        self, parameters: Sequence[Any], loss: Callable[[], Tensor], close: Callable[[], None] = lambda: None
    ) -> None:
        self.parameters, self.loss, self.close = [one for one in parameters if one.requires_grad], loss, close
        fused = self.parameters[0].device.type in ("cuda", "cpu")
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=fused)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __call__(self) -> None:
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def lorakit_side(bench: Bench, model: Any, rows: list[Row]) -> Side:
    """As `lorakit train` steps: packed, prefixes shared, logits at labelled tokens, elementwise operations fused."""
    import contextlib

    import lorakit as lk
    from lorakit.train.step.fusion import fused
    from lorakit.train.step.support import choose_path

    adapter = lk.attach(model, lk.LoRA(rank=4 if bench.tiny else 16))
    path = choose_path(model)
    stack = contextlib.ExitStack()
    if bench.cuda:
        stack.enter_context(fused(model))
    model.train()
    stack.enter_context(path.opened(model))
    return Side(list(adapter.parameters()), lambda: path.loss(model, rows)[0], stack.close)


def plain_side(bench: Bench, model: Any, rows: list[Row]) -> Side:
    """lorakit's adapter in a loop of one's own, on padded batches."""
    import lorakit as lk

    adapter = lk.attach(model, lk.LoRA(rank=4 if bench.tiny else 16))
    batch = padded(rows, bench.device)
    model.train()
    return Side(list(adapter.parameters()), lambda: model(**batch, use_cache=False).loss)


def peft_side(bench: Bench, model: Any, rows: list[Row]) -> Side:
    """PEFT's LoRA on padded batches."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4 if bench.tiny else 16, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped: Any = get_peft_model(model, config)
    batch = padded(rows, bench.device)
    wrapped.train()
    return Side(list(wrapped.parameters()), lambda: wrapped(**batch, use_cache=False).loss)


# -- serving ------------------------------------------------------------------------------------------------------------------


def serving(bench: Bench) -> None:
    """Throughput with so many distinct adapters, as a share of the base's."""
    for name in ("tiny",) if bench.tiny else ("1B", "8B"):
        if bench.over(f"serving {name}"):
            continue
        bench.clear()
        try:
            with tempfile.TemporaryDirectory() as folder:
                serve_one(bench, name, SIZES[name], Path(folder))
        except Exception as problem:
            bench.say(f"serving {name}", failed=f"{type(problem).__name__}: {str(problem)[:300]}")


def write_store(bench: Bench, model: Any, folder: Path, count: int) -> None:
    """So many adapters in folders: a few with numbers of their own, the others the same files again, which are read again."""
    import shutil

    import lorakit as lk

    for number in range(min(count, 2 if bench.tiny else 4)):
        adapter = lk.attach(model, lk.LoRA(rank=4 if bench.tiny else (8, 16)[number % 2]), name="written")
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.02)
        adapter.save(folder / f"a{number}")
        lk.detach(model)
    made = len(list(folder.iterdir()))
    for number in range(made, count):
        shutil.copytree(folder / f"a{number % made}", folder / f"a{number}", copy_function=os.link)


def serve_one(bench: Bench, name: str, size: Size, folder: Path) -> None:
    """One model with every number of adapters, the base before and after, since the machine changes."""
    from lorakit.serve.engine.engine import LocalEngine
    from lorakit.serve.engine.scheduler import Limits
    from lorakit.serve.request import Request, Sampling

    distinct = (0, 1, 4) if bench.tiny else (0, 1, 8, 32, 128)
    at_once, length, new = (4, 12, 4) if bench.tiny else (128, 128, 64)
    model = bench.model(size)
    write_store(bench, model, folder, max(distinct))
    cache = (1 << 22) if bench.tiny else (12 << 30)
    limits = Limits(
        batch=at_once, step_tokens=max(at_once, 16 if bench.tiny else 2048), cache_bytes=cache, adapter_bytes=16 << 30
    )
    engine = LocalEngine(model, folder, limits)
    way = "graphs" if engine.model.graphs is not None else "kernels" if engine.model.context.kernels else "no kernels"
    bench.say(f"serving {name}", by=way, why=engine.model.compiled or "-")
    engine.start()
    try:
        numbers = itertools.count()
        generator = torch.Generator().manual_seed(3)

        def burst(adapters: int, answers: int) -> float:
            begin = time.perf_counter()
            tickets = []
            for number in range(at_once):
                prompt = torch.randint(3, size.vocabulary, (length,), generator=generator).tolist()
                blend = {f"a{number % adapters}": 1.0} if adapters else {}
                asked = Sampling(max_tokens=answers, temperature=0, ignore_eos=True)
                tickets.append(engine.submit(Request(str(next(numbers)), tuple(prompt), blend, sampling=asked)))
            made = sum(len(ticket.tokens(timeout=300)) for ticket in tickets)
            return made / (time.perf_counter() - begin)

        base = 0.0
        for adapters in distinct:
            if bench.over(f"serving {name}: {adapters} adapters"):
                return
            burst(adapters, 2 if bench.tiny else 8)  # reads the adapters, records the graphs
            rate = burst(adapters, new)
            base = base or rate
            label = f"{adapters} adapters" if adapters else "the base alone"
            bench.say(
                f"serving {name}: {label}", tokens_per_second=f"{rate:,.0f}", share_of_the_base=f"{rate / base:.0%}",
                memory=bench.memory(),
            )  # fmt: skip
    finally:
        engine.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """The parts in their order; 1 where a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="this part alone; may be given several times")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see whether it runs")
    parser.add_argument("--device", help="cuda, cuda:1 or cpu; the first GPU where there is one")
    parser.add_argument("--minutes", type=float, default=9.0, help="no part begins after so many")
    parser.add_argument("--output", type=Path, help="a JSON file for what is printed")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available() and options.device in (None, "cuda"):
        parser.error("there is no GPU here; --tiny runs small shapes on the processor")
    bench = Bench(options)
    for name, part in (("kernels", kernels), ("training", training), ("serving", serving)):
        if not options.only or name in options.only:
            part(bench)
    bench.say("all", kernels_wrong=bench.wrong)
    if options.output is not None:
        options.output.write_text(json.dumps(bench.found, indent=1))
    return int(bench.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
