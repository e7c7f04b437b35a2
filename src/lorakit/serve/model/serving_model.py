"""The serving model: transformers' own modules, with the engine's attention and each token's adapters at its linear layers.

Nothing of a model's own code is written again. Its attention goes through the registry (`attention.py`). Its linear layers
get a forward that adds each token's adapters and, in bfloat16 on a processor, reads weights that were packed once
(`linear_layers.py`). Its norms, rotary positions and gated activations run as compiled loops where these give what the
modules give (`fused.py`), blocks of the usual form as one function (`blocks.py`). Whether all that is right for a model is
found out by trying, before the first request.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.models.attention import no_search_for_texts
from lorakit.native import triton
from lorakit.native.choice import Way, fastest
from lorakit.serve.model import blocks, fused, native
from lorakit.serve.model.attention import ForwardContext, serve_attention
from lorakit.serve.model.batch import Batch, Run, assemble
from lorakit.serve.model.cache import Cache, LayerShape, page_count
from lorakit.serve.model.experts import ExpertForward
from lorakit.serve.model.graphs import CudaRecorder, Graphs
from lorakit.serve.model.linear_layers import LinearForward, join
from lorakit.serve.model.packed import expert_stacks, linear_layers
from lorakit.serve.request import Refused

log = logging.getLogger("lorakit")


class ServingModel:
    """A base model that serves. `close` gives it back as it was.

    Attributes:
        shapes: what each attention layer keeps of a token.
        unfit: paths of linear layers and experts that do not see every token, in which no adapter can be served.
        compiled: None, or why the compiled loops are off.
    """

    def __init__(self, model: nn.Module, compiled: bool = True, pack: bool = True) -> None:
        self.model = model
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype
        obstacle = native.obstacle(model) if compiled else "switched off"
        self.compiled = obstacle
        self.context = ForwardContext(compiled=obstacle is None)
        self.graphs: Graphs | None = None
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._training = model.training
        self._undo: list[Callable[[], None]] = []
        model.eval()
        self._undo.append(serve_attention(model, self.context))
        self.layers: dict[str, LinearForward] = {}
        self.experts: dict[str, ExpertForward] = {}
        self.unfit: set[str] = set()
        try:
            with torch.inference_mode():
                expected = self._trial_of_the_model()
                for number, (path, module) in enumerate(linear_layers(model).items()):
                    self._replace_forward(path, module, number, pack and obstacle is None)
                self._replace_experts()
                for prompt in self._prompts()[:1]:  # who reads the same as whom
                    model(input_ids=torch.tensor([prompt], device=self.device), use_cache=False)
                join(self.layers.values())
                if obstacle is None:
                    self._undo.append(fused.fuse(model, self.context))
                logits = self._trial(expected)
                if any(layer.blocks is not None for layer in self.layers.values()):
                    logits = self._trial(expected, rounded=True)
                for faster in (blocks.fuse, blocks.stack) if obstacle is None else ():
                    if (restore := faster(model, self.context)) is not None:
                        self._undo.append(restore)
                        if not self._gives(logits, expected):
                            self._undo.pop()()
                if compiled and triton.obstacle(self.device, self.dtype) is None:
                    obstacle = self._take_kernels(expected)
        except BaseException:
            self.close()
            raise
        if obstacle is not None:
            log.info("serve: without compiled loops: %s", obstacle)

    def _take_kernels(self, expected: Sequence[Tensor]) -> str | None:
        """Compute by Triton's kernels if these give the same and are the faster here; else why not."""
        restore = fused.fuse(self.model, self.context)
        self._undo.append(restore)
        self.context.kernels = True
        try:
            self._trial(expected)
        except Exception as problem:  # whatever a compiler for GPUs may raise: without it all is right, and slower
            reason = f"Triton's kernels do not give what the model gives: {problem}"
        else:
            runs = [
                [Run([0] * count, 0, [at], wanted=1) for at in range(rows)]
                for rows, count in ((1, 1), (32, 1), (8, 16))
            ]
            cache = Cache(self.shapes, 32, self.dtype, self.device, reuse=False)

            def cases(kernels: bool) -> list[Callable[[], object]]:
                def run(own: list[Run]) -> Tensor:
                    self.context.kernels = kernels
                    return self.forward(assemble(own, self.device, None), cache)

                return [functools.partial(run, own) for own in runs]

            ways: dict[str, Way] = {"triton": lambda: cases(True), "torch": lambda: cases(False)}
            shape = (len(self.shapes), self.shapes[0].heads, self.shapes[0].key, str(self.dtype).removeprefix("torch."))
            self.context.kernels = fastest("serving", shape, ways, self.device) == "triton"
            if self.context.kernels:
                return None
            reason = "torch's operations are the faster here"
        self.context.kernels = False
        self._undo.pop()()
        return reason

    def _replace_forward(self, path: str, module: nn.Module, number: int, pack: bool) -> None:
        forward = self.layers[path] = LinearForward(module, number, self.context, pack)
        module.forward = forward
        self._undo.append(lambda: module.__dict__.pop("forward", None))

    def _replace_experts(self) -> None:
        paths = {module: path for path, module in self.model.named_modules()}
        numbers: dict[nn.Module, dict[str, int]] = {}
        for number, (place, module) in enumerate(expert_stacks(self.model).items(), len(self.layers)):
            numbers.setdefault(module, {})[place.rpartition(".")[2]] = number
        for module, own in numbers.items():
            forward = self.experts[paths[module]] = ExpertForward(module, own, self.context)
            module.forward = forward
            self._undo.append(lambda module=module: module.__dict__.pop("forward", None))  # type: ignore[misc]

    def close(self) -> None:
        """Give the model back as it was."""
        while self._undo:
            self._undo.pop()()
        self.model.train(self._training)
        self.context.batch = self.context.cache = None

    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        """The logits (wanted tokens, vocabulary) of a step; keys and values go into their pages."""
        batch.kernels = self.context.kernels
        graphs = self.graphs if batch.edits is None else None  # which have hooks, that no graph runs
        if graphs is not None and cache is graphs.cache and (logits := graphs.run(batch)) is not None:
            return logits
        return self._forward(batch, cache)

    def record(self, cache: Cache) -> None:
        """Replay steps of decoding over this cache as CUDA graphs from now on, where that can be (`graphs.py`)."""
        if self.context.kernels and self.device.type == "cuda" and not self.experts:
            self.graphs = Graphs(self._forward, cache, CudaRecorder())

    def _forward(self, batch: Batch, cache: Cache) -> Tensor:
        self.context.batch, self.context.cache, fused.THREAD.serving = batch, cache, True
        arguments: dict[str, Any] = {"logits_to_keep": batch.last} if self._keeps else {}
        try:
            edits = batch.edits.on(self.model) if batch.edits else nullcontext()
            with torch.inference_mode(), no_search_for_texts(), edits:
                found: Tensor = self.model(
                    input_ids=batch.ids, position_ids=batch.positions, use_cache=False, return_dict=True, **arguments
                ).logits[0]
        finally:
            self.context.batch, fused.THREAD.serving = None, False
        return found if self._keeps else found[batch.last]

    # -- is it right? --------------------------------------------------------------------------------------------------
    def _prompts(self) -> list[list[int]]:
        """Two short prompts of different length, longer than a page."""
        vocabulary = int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        ids = torch.arange(3, 3 + 45) * 7919 % vocabulary
        return [ids[:19].tolist(), ids[19:].tolist()]

    def _trial_of_the_model(self) -> list[Tensor]:
        """The model's own logits for the trial prompts, one at a time, through its own attention."""
        results = []
        for prompt in self._prompts():
            ids = torch.tensor([prompt], device=self.device)
            results.append(self.model(input_ids=ids, use_cache=False, return_dict=True).logits[0].float())
        seen = self.context.seen
        if not seen or sorted(seen) != list(range(len(seen))):
            raise Refused(
                f"{type(self.model).__name__} has no attention layers with a number (layer_idx), so its keys and "
                "values cannot be kept in the engine's pages."
            )
        self.shapes: Sequence[LayerShape] = [seen[layer] for layer in range(len(seen))]
        return results

    def _noise(self, expected: Sequence[Tensor]) -> float:
        """How much the model's own logits differ, as a share of the largest, when the embeddings are a little larger: its
        norms take that out again, so that all of it comes from rounding. Much for weights of few bits or strange prompts."""
        found = 0.0
        for factor in (1 - 2.0**-6, 1 + 2.0**-6, 1 + 2.0**-5):
            hook = self.model.get_input_embeddings().register_forward_hook(lambda _, __, y, f=factor: y * f)  # type: ignore[operator]
            try:
                pairs = zip(expected, self._trial_of_the_model(), strict=True)
                found = max(found, *(float((own - other).abs().max() / own.abs().max()) for own, other in pairs))
            finally:
                hook.remove()
        return found

    def _gives(self, logits: Tensor, expected: Sequence[Tensor]) -> bool:
        """Whether the trial gives these very logits; what the layers see of it says nothing, since blocks pass them by."""
        unfit = set(self.unfit)
        try:
            return torch.equal(logits, self._trial(expected, rounded=True))
        except (Refused, AttributeError):  # blocks that return more than their rows
            return False
        finally:
            self.unfit = unfit

    def _trial(self, expected: Sequence[Tensor], rounded: bool = False) -> Tensor:
        """Both prompts in one row, cut into chunks in the middle of pages, must give what the model gives for each alone;
        returns what they give. With `rounded`, inputs of weights in blocks are rounded to bytes as when serving, which makes
        more of a difference than is looked for: nothing is compared."""
        prompts = self._prompts()
        pages: list[list[int]] = []
        for prompt in prompts:
            start = sum(map(len, pages))
            pages.append(list(range(start, start + page_count(len(prompt)))))
        cache = Cache(self.shapes, sum(map(len, pages)), self.dtype, self.device, reuse=False)
        found: list[list[Tensor]] = [[], []]
        self.context.trial = not rounded
        cuts = [(0, 7, 0, 11), (7, 18, 11, 25), (18, 19, 25, 26)]
        try:
            for a, b, c, d in cuts:
                runs = [
                    Run(prompts[0][a:b], a, pages[0], wanted=b - a),
                    Run(prompts[1][c:d], c, pages[1], wanted=d - c),
                ]
                logits = self.forward(assemble(runs, self.device, None), cache).float()
                found[0].append(logits[: b - a])
                found[1].append(logits[b - a :])
                total = b - a + d - c
                forwards: dict[str, Any] = {**self.layers, **self.experts}
                self.unfit |= {path for path, forward in forwards.items() if forward.tokens != total}
        except (Refused, TypeError, ValueError, RuntimeError) as problem:
            raise Refused(f"{type(self.model).__name__} cannot be served in batches: {problem}") from problem
        finally:
            self.context.trial = False
        allowed = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.1
        for own, parts in zip(expected, found, strict=True):
            if rounded:
                break
            difference = float((own - torch.cat(parts)).abs().max() / own.abs().max())
            if not difference <= allowed and not difference <= 3 * self._noise(expected):
                raise Refused(
                    f"{type(self.model).__name__} cannot be served in batches: packed into one row its logits differ by "
                    f"{difference:.2g} of the largest (allowed: {allowed}), so its layers mix tokens "
                    "in an unsupported way."
                )
        return torch.cat([*found[0], *found[1]])
