"""vLLM behind the same front: tenants, quotas, names and limits are lorakit's, the tokens are vLLM's.

vLLM takes plain LoRA of a rank up to a limit that is set when it starts: the largest of the store. One of a larger rank that
comes later is refused, or written again at that rank to a stated error where the operator asked for it; other methods are
refused with what would work. A blend needs one adapter that is the blend: vLLM
has no weights per request.

The tests run against a stub of the interface that is used here: `generate`, `abort`,
`pin_lora`, `remove_lora`, `shutdown` of AsyncLLM; SamplingParams; LoRARequest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lorakit.algebra.resizing import resize
from lorakit.errors import LorakitError
from lorakit.files import store as adapter_store
from lorakit.serve.limits import check_files
from lorakit.serve.remote.folders import Folder, Folders
from lorakit.serve.remote.remote_engine import RemoteEngine
from lorakit.serve.request import AdapterInfo, Finish, Refused, Request, Sampling, Ticket, Token

log = logging.getLogger("lorakit.serve")

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Limits on the rank that vLLM 0.32 can be started with."""

_REASONS: dict[str, Finish] = {"stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Interface:
    """The classes of vLLM that requests are made of."""

    sampling: Callable[..., Any]
    lora: Callable[..., Any]
    delta: Any


class VllmEngine(RemoteEngine):
    """`Engine` of the contract over an AsyncLLM.

    Args:
        open_llm: makes the AsyncLLM, in the engine's loop.
        interface: vLLM's classes.
        store: the adapters.
        tokenizer: of the base.
        context: tokens of prompt and answer together.
        rank: the largest rank that vLLM was started for.
        cut: write adapters of a larger rank again at that rank, instead of refusing them.
        limit: requests at once.
    """

    def __init__(
        self,
        open_llm: Callable[[], Any],
        interface: Interface,
        store: Path | None,
        tokenizer: Any,
        context: int,
        rank: int = 64,
        limit: int = 1024,
        cut: bool = False,
    ) -> None:
        self.rank, self.tokenizer, self.cut = rank, tokenizer, cut
        self._made = tempfile.TemporaryDirectory(prefix="lorakit-vllm-")
        self._open_llm, self._interface = open_llm, interface
        self._llm: Any = None
        self._numbers: dict[tuple[str, int], int] = {}
        super().__init__(Folders(store, self._prepare, self._pin), context, limit)

    @classmethod
    def over(cls, base: str, store: Path | None, limits: Mapping[str, Any], cut: bool = False) -> VllmEngine:
        """vLLM on a base model, started for the largest rank that the store holds now.

        Raises:
            LorakitError: vLLM is not installed.
        """
        try:
            from vllm import AsyncEngineArgs, SamplingParams  # type: ignore[import-not-found]
            from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]
            from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]
            from vllm.v1.engine.async_llm import AsyncLLM  # type: ignore[import-not-found]
        except ModuleNotFoundError as missing:
            raise LorakitError(
                f"serve: --engine vllm needs vLLM ({missing.name} is not installed): pip install vllm, or leave --engine out "
                "for lorakit's own."
            ) from missing
        from lorakit.models.loading import load_tokenizer

        rank = rank_for(store)
        arguments = AsyncEngineArgs(
            model=base,
            enable_lora=store is not None,
            max_loras=min(8, limits["batch"]),
            max_lora_rank=rank,
            max_num_seqs=limits["batch"],
            max_model_len=limits["context"],
        )
        context = int(arguments.create_engine_config().model_config.max_model_len)

        def open_llm() -> Any:
            return AsyncLLM.from_engine_args(arguments)

        interface = Interface(SamplingParams, LoRARequest, RequestOutputKind.DELTA)
        limit = limits["batch"] + limits["queue"]
        return cls(open_llm, interface, store, load_tokenizer(base, {}), context, rank, limit, cut)

    # -- adapters --------------------------------------------------------------------------------------------------------
    def _prepare(self, name: str, folder: Path) -> tuple[AdapterInfo, Path]:
        """What is known of an adapter, and the folder for vLLM: written again where its rank is above vLLM's limit."""
        config = adapter_store.read_config(folder)
        if reason := obstacle(config):
            raise LorakitError(
                f"adapter {name!r}: vLLM takes plain LoRA, and {reason}. What works: `lorakit extract` writes a LoRA of what "
                "it adds; --engine lorakit serves it as it is."
            )
        rank, how, error = largest_rank(config), "form", 0.0
        tensors = folder / adapter_store.TENSORS
        if not tensors.is_file() or not tensors.stat().st_size:
            raise LorakitError(f"adapter {name!r} has no {adapter_store.TENSORS}.")
        if rank > self.rank and not self.cut:
            raise LorakitError(
                f"adapter {name!r} has rank {rank}, and vLLM was started for ranks up to {self.rank}. It is started for the "
                f"largest rank of the store (at most {RANKS[-1]}): start it again; or `lorakit resize` makes one of a smaller "
                "rank, as does --formless svd with every such adapter."
            )
        if rank > self.rank:
            source, folder = folder, Path(self._made.name) / name
            error, how = resize(source, output=folder, rank=self.rank).error, "svd"
            log.warning(
                "adapter %s has rank %d, above vLLM's limit of %d; it is served at that rank with a relative error of %.2g",
                name,
                rank,
                self.rank,
                error,
            )
            rank = self.rank
        size = (folder / adapter_store.TENSORS).stat().st_size
        return AdapterInfo(name, "resident", method="lora", how=how, error=error, rank=rank, bytes=size), folder

    def _lora(self, name: str) -> Any:
        """vLLM's request for an adapter. Every version has a number of its own: its caches go by that."""
        folder = self.folders.ready(name)
        key = (name, folder.version)
        number = self._numbers.setdefault(key, len(self._numbers) + 1)
        return self._interface.lora(f"{name}@{folder.version}", number, str(folder.path))

    def _pin(self, folder: Folder, pinned: bool) -> None:
        if not pinned:
            raise Refused("vLLM cannot unpin an adapter; unload it.")
        name = folder.name
        number = self._lora(name).lora_int_id

        async def pin() -> None:
            await self._llm.add_lora(self._lora(name))
            await self._llm.pin_lora(number)

        self._run(pin())

    # -- requests --------------------------------------------------------------------------------------------------------
    async def _open(self) -> None:
        self._llm = self._open_llm()

    async def _close(self) -> None:
        if self._llm is not None:
            self._llm.shutdown()
        self._made.cleanup()

    async def _answer(self, ticket: Ticket) -> None:
        request = ticket.request
        if request.sampling.prompt_logprobs is not None:
            raise Refused("log probabilities of a prompt are computed by lorakit's own engine alone.", "logprobs")
        lora = None
        if request.blend:
            if len(request.blend) > 1 or set(request.blend.values()) != {1.0}:
                raise Refused(
                    "a blend cannot be served by vLLM, which has no weights per request. What works: `lorakit combine` makes "
                    "one adapter of it; --engine lorakit blends as it serves."
                )
            lora = await asyncio.to_thread(self._lora, next(iter(request.blend)))
        stream = self._llm.generate(
            prompt={"prompt_token_ids": list(request.prompt)},
            sampling_params=self._sampling(request),
            request_id=request.id,
            lora_request=lora,
        )
        try:
            async for output in stream:
                if ticket.usage.started is None:
                    ticket.usage.started = 0.0
                    ticket.usage.cached = getattr(output, "num_cached_tokens", None) or 0
                self._put(ticket, output.outputs[0])
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):  # it may have ended just now
                await self._llm.abort(request.id)
            raise

    def _put(self, ticket: Ticket, piece: Any) -> None:
        reason = None if piece.finish_reason is None else _REASONS.get(piece.finish_reason, "cancelled")
        ids = list(piece.token_ids)
        if not ids and reason is not None:
            ticket.put(Token(None, finish=reason))
        for place, token in enumerate(ids):
            logprob, top = None, ()
            if ticket.request.sampling.logprobs is not None:
                found = {one: entry.logprob for one, entry in piece.logprobs[place].items()}
                logprob = found[token]
                best = sorted(found.items(), key=lambda pair: -pair[1])
                top = tuple(best[: ticket.request.sampling.logprobs])  # type: ignore[assignment]
            ticket.put(Token(token, logprob, top, reason if place == len(ids) - 1 else None))

    def _sampling(self, request: Request) -> Any:
        how = {one.name: getattr(request.sampling, one.name) for one in fields(Sampling)}
        how |= {"stop_token_ids": list(request.sampling.stop_token_ids), "logit_bias": dict(how["logit_bias"]) or None}
        return self._interface.sampling(**how, detokenize=False, output_kind=self._interface.delta)


def largest_rank(config: Mapping[str, Any]) -> int:
    """The largest rank of a LoRA's configuration."""
    pattern = config.get("rank_pattern")
    return max(int(config.get("r") or 0), *(int(one) for one in pattern.values()) if pattern else (0,))


def rank_for(store: Path | None) -> int:
    """What vLLM has to be started with to serve every plain LoRA that a store holds: one of `RANKS`. An adapter that cannot be
    looked at is none of them, and is refused when it is asked for."""
    most = 0
    for folder in sorted(store.iterdir()) if store is not None else ():
        try:
            check_files(folder)
            config = adapter_store.read_config(folder)
            if not obstacle(config):
                most = max(most, largest_rank(config))
        except (LorakitError, TypeError, ValueError):
            continue
    return next((rank for rank in RANKS[1:] if rank >= most), RANKS[-1])


def obstacle(config: Mapping[str, Any]) -> str:
    """Why vLLM would not take a folder with this configuration, in words; "" where it takes it."""
    if config.get("peft_type") != "LORA":
        return f"its method is {config.get('peft_type')}"
    names = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
    for name in (*names, "trainable_token_indices"):
        if config.get(name):
            return f"it sets {name}"
    if config.get("bias") not in (None, "none"):
        return f"it trains biases (bias={config['bias']!r})"
    if config.get("modules_to_save"):
        return f"it replaces whole modules ({', '.join(config['modules_to_save'])})"
    return ""
