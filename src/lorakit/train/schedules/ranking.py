"""Schedules of the triplet form P diag(λ) Q: AdaLoRA's falling budget and ElaLoRA's exchange between layers.

Both measure how much every entry matters before each optimiser step, score each triplet by that, and keep P and Q near
orthonormal. AdaLoRA sets λ to zero and may take it back; ElaLoRA makes matrices smaller and larger, and the optimiser's
state follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.methods.adalora import AdaLoRA, TripletOptions, Triplets
from lorakit.methods.elalora import ElaLoRA
from lorakit.methods.options import share_of
from lorakit.optim.state import check_movable, move_ranks
from lorakit.train.schedules.contract import Optimizer, Schedule


class Importance:
    """How much each entry of some parameters matters: I = |w · ∂L/∂w|, smoothed, times its uncertainty."""

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.mean: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, named: Iterator[tuple[str, nn.Parameter]]) -> None:
        """Take in one step's weights and gradients; a parameter without a gradient (a skipped step) is passed over."""
        for name, parameter in named:
            if parameter.grad is None:
                continue
            now = (parameter * parameter.grad).abs()
            mean = self.mean.setdefault(name, torch.zeros_like(now))
            spread = self.spread.setdefault(name, torch.zeros_like(now))
            mean.mul_(self.beta1).add_(now, alpha=1 - self.beta1)
            spread.mul_(self.beta2).add_((now - mean).abs(), alpha=1 - self.beta2)

    def score(self, name: str, like: Tensor) -> Tensor:
        """Smoothed importance times uncertainty, in the shape of the parameter."""
        return self.mean[name] * self.spread[name] if name in self.mean else torch.zeros_like(like)

    def follow(self, name: str, left: Tensor, added: int, axis: int) -> None:
        """Keep these indices of an axis and add new ones that have shown nothing yet."""
        for held in (self.mean, self.spread):
            if name in held:
                kept = held[name].index_select(axis, left.to(held[name].device))
                size = list(kept.shape)
                size[axis] = added
                held[name] = torch.cat([kept, kept.new_zeros(size)], dim=axis)

    def state_dict(self) -> dict[str, Tensor]:
        """All buffers."""
        return {f"{kind}.{name}": value for kind in ("mean", "spread") for name, value in getattr(self, kind).items()}

    def load_state_dict(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
        """Restore, on the devices of the parameters `like`."""
        for kind in ("mean", "spread"):
            own = {key.removeprefix(f"{kind}."): value for key, value in state.items() if key.startswith(f"{kind}.")}
            setattr(self, kind, {name: value.clone().to(like[name].device) for name, value in own.items()})


T = TypeVar("T", bound=TripletOptions)
_AXES = {"P": 1, "lam": 0, "Q": 0}


class Ranking(Schedule[T, Triplets]):
    """What both methods of the triplet form do: measure importance, keep P and Q near orthonormal, know the phases."""

    def __init__(self, spec: T, deltas: Mapping[str, Triplets], seed: int) -> None:
        super().__init__(spec, deltas, seed)
        self.importance = Importance(spec.beta1, spec.beta2)

    def begin(self, total: int) -> None:
        super().begin(total)
        self.first = share_of(self.spec.warmup, total)
        self.last = total - share_of(self.spec.final, total)
        if self.first >= self.last:
            raise LorakitError(
                f"{self.spec.name}: warmup is {self.spec.warmup} and final {self.spec.final}, which leave none of the run's "
                f"{total} steps to change ranks in. Make them smaller, or the run longer."
            )

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of the deltas by name."""
        for name, delta in self.deltas.items():
            for letter in _AXES:
                yield f"{name}.{letter}", getattr(delta, letter)

    def penalty(self) -> Tensor:
        """Mean over all P and Q of ‖PᵀP - I‖ and ‖QQᵀ - I‖."""
        norms = []
        for delta in self.deltas.values():
            for gram in (delta.P.T @ delta.P, delta.Q @ delta.Q.T):
                norms.append(
                    torch.linalg.vector_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
                )
        return torch.stack(norms).mean()

    def penalise(self) -> None:
        if self.spec.orthogonality:
            with torch.enable_grad():
                cast(Any, self.spec.orthogonality * self.penalty()).backward()

    def before_update(self, step: int, optimizer: Optimizer) -> None:
        if step <= self.last:
            self.importance.add(self.named())

    def scores(self) -> dict[str, Tensor]:
        """Delta name -> the importance of each of its triplets: of λ, and the means over P's rows and Q's columns."""
        score = self.importance.score
        return {
            name: score(f"{name}.lam", delta.lam)
            + score(f"{name}.P", delta.P).mean(0)
            + score(f"{name}.Q", delta.Q).mean(1)
            for name, delta in self.deltas.items()
        }

    def progress(self, step: int) -> float:
        """How far the changing phase is: 0 up to the end of the warm-up, 1 from the start of the final phase."""
        return min(max((step - self.first) / (self.last - self.first), 0.0), 1.0)

    def due(self, step: int) -> bool:
        """Whether ranks may change after this step."""
        return self.first < step < self.last and (step - self.first) % self.spec.interval == 0

    def state_dict(self) -> dict[str, Tensor]:
        return self.importance.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor], adapter_state: Mapping[str, Tensor]) -> None:
        self.importance.load_state_dict(state, dict(self.named()))


class Budget(Ranking[AdaLoRA]):
    """AdaLoRA: the most important triplets of all layers are kept, their number falling along a cubic curve."""

    @property
    def start(self) -> int:
        """Triplets at the start."""
        return sum(len(delta.lam) for delta in self.deltas.values())

    @property
    def target(self) -> int:
        """Triplets at the end."""
        return min(self.spec.target_rank * len(self.deltas), self.start)

    def budget(self, step: int) -> int:
        """How many triplets may stay after a step."""
        return int(self.target + (self.start - self.target) * (1 - self.progress(step)) ** 3)

    @torch.no_grad()
    def after_update(self, step: int, optimizer: Optimizer) -> None:
        if self.due(step) or step == self.last:
            self.allocate(self.budget(step))
        elif step > self.last:
            self.mask()  # momentum moves what is masked; in the final phase it stays out

    def allocate(self, budget: int) -> None:
        """Keep the `budget` triplets of the highest score, exactly; the λ of the others is set to zero.

        Equal scores (all zero at first) are broken by the place within the layer, so evenly over layers.
        """
        scores = self.scores()
        flat = torch.cat([score.double().cpu() for score in scores.values()])
        place = torch.cat([torch.arange(len(score)) for score in scores.values()])
        order = place.argsort(stable=True)
        order = order[flat[order].argsort(descending=True, stable=True)]
        kept = torch.zeros(len(flat), dtype=torch.bool)
        kept[order[:budget]] = True
        for delta, own in zip(self.deltas.values(), kept.split([len(s) for s in scores.values()]), strict=True):
            delta.kept.copy_(own)
        self.mask()

    def mask(self) -> None:
        """Set the λ of what is not kept to zero."""
        with torch.no_grad():
            for delta in self.deltas.values():
                delta.lam.masked_fill_(~delta.kept, 0.0)


class Exchange(Ranking[ElaLoRA]):
    """ElaLoRA: the weakest triplets are taken away and as many given to the layers whose weakest are strongest."""

    def moves(self, step: int) -> int:
        """How many triplets change their layer after a step, at most."""
        return round(self.spec.moves * (1 - self.progress(step) ** 3))

    @torch.no_grad()
    def after_update(self, step: int, optimizer: Optimizer) -> None:
        if self.due(step):
            lost, gained = self.plan(self.scores(), self.moves(step))
            self._move(step, lost, gained, optimizer)

    def plan(self, scores: Mapping[str, Tensor], moves: int) -> tuple[dict[str, list[int]], dict[str, int]]:
        """Which triplets go (indices by delta) and how many each delta gains: as many in all, at most `moves`.

        Every delta offers its weakest, never all; the pool's weakest go and its strongest bring their delta one more, where
        it has room. A delta that would do both keeps that many.
        """
        pool: list[tuple[float, str, int]] = []
        for name, score in scores.items():
            weakest = score.double().argsort(stable=True)[: min(self.spec.candidates, len(score) - 1)]
            pool += [(float(score[index]), name, int(index)) for index in weakest]
        pool.sort(key=lambda one: one[0])
        moves = min(moves, len(pool) // 2)
        gained: dict[str, int] = {}
        for _, name, _ in reversed(pool[moves:]):
            shape = self.deltas[name].shape
            room = min(shape.out, shape.in_) - len(scores[name]) - gained.get(name, 0)
            if sum(gained.values()) < moves and room > 0:
                gained[name] = gained.get(name, 0) + 1
        lost: dict[str, list[int]] = {}
        for _, name, index in pool[: sum(gained.values())]:
            lost.setdefault(name, []).append(index)
        for name in set(lost) & set(gained):
            both = min(len(lost[name]), gained[name])
            lost[name] = lost[name][: len(lost[name]) - both]
            gained[name] -= both
        return {n: gone for n, gone in lost.items() if gone}, {n: count for n, count in gained.items() if count}

    def _move(self, step: int, lost: dict[str, list[int]], gained: dict[str, int], optimizer: Optimizer) -> None:
        generator = self.generator(step)
        for name, delta in self.deltas.items():
            gone, added = lost.get(name, []), gained.get(name, 0)
            if not gone and not added:
                continue
            left = torch.tensor(
                [index for index in range(len(delta.lam)) if index not in gone], device=delta.lam.device
            )
            shapes = {letter: getattr(delta, letter).shape for letter in _AXES}
            for letter in _AXES:
                check_movable(optimizer, getattr(delta, letter))
            P = orthogonal_to(delta.P[:, left], added, generator)
            Q = orthogonal_to(delta.Q[left].T, added, generator).T
            delta.move(left, P, Q)
            for letter, axis in _AXES.items():
                move_ranks(optimizer, getattr(delta, letter), shapes[letter], left, added, axis)
                self.importance.follow(f"{name}.{letter}", left, added, axis)

    def load_state_dict(self, state: Mapping[str, Tensor], adapter_state: Mapping[str, Tensor]) -> None:
        for name, delta in self.deltas.items():
            rank = len(adapter_state[f"{name}.lam"])
            left = torch.arange(min(rank, len(delta.lam)), device=delta.lam.device)
            added = rank - len(left)
            delta.move(left, delta.P.new_zeros(delta.shape.out, added), delta.Q.new_zeros(added, delta.shape.in_))
        super().load_state_dict(state, adapter_state)


def orthogonal_to(columns: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random orthonormal columns (n, count), orthogonal to the span of `columns` (n, k)."""
    n = columns.shape[0]
    drawn = torch.randn(n, count, generator=generator, dtype=torch.float64)
    if not count:
        return drawn.to(columns)
    basis = torch.linalg.qr(columns.detach().double().cpu()).Q
    for _ in range(2):  # the second time takes off what rounding left of the first
        drawn = drawn - basis @ (basis.T @ drawn)
    fresh: Tensor = torch.linalg.qr(drawn).Q
    return fresh.to(columns)
