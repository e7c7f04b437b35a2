"""Schedules: the curves, what is kept and moved, and runs in the Trainer that resume on the same trajectory."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.train import run_checkpoint as checkpoint
from lorakit.train.config.run import DataOptions, TrainConfig, TrainOptions
from lorakit.train.schedules.ranking import Budget, Exchange, Importance, orthogonal_to
from lorakit.train.schedules.table import Draw, Restart, schedule_for
from lorakit.train.step.support import choose_path
from lorakit.train.trainer import LoraTrainer
from training.tiny import InterruptAt, InterruptionError, llama, rows

WIDTHS = (8, 10, 7, 9)


def adapted(method: Any, seed: int = 0) -> tuple[nn.Module, Any, Any]:
    """Three layers with an adapter whose tensors are random, and its schedule over 100 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(WIDTHS))).double()
    adapter = lk.attach(model, method, target_modules=["0", "1", "2"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    schedule: Any = schedule_for(adapter, seed)
    schedule.begin(100)
    return model, adapter, schedule


def step(model: nn.Module, schedule: Any, optimiser: torch.optim.Optimizer, number: int) -> None:
    """One step of a plain loop."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(5, WIDTHS[0], generator=generator, dtype=torch.float64)
    optimiser.zero_grad()
    schedule.before_forward(number, optimiser)
    (model(x) - 1).square().mean().backward()
    schedule.penalise()
    schedule.before_update(number, optimiser)
    optimiser.step()
    schedule.after_update(number, optimiser)


def test_the_method_names_its_schedule() -> None:
    for method, kind in (
        (lk.AdaLoRA(rank=2), Budget),
        (lk.ElaLoRA(rank=2), Exchange),
        (lk.DyLoRA(rank=2), Draw),
        (lk.ReLoRA(rank=2), Restart),
        (lk.DoRA(inner=lk.AdaLoRA(rank=2)), Budget),
    ):
        schedule = adapted(method)[2]
        assert type(schedule) is kind
        assert len(schedule.deltas) == 3
    assert schedule_for(lk.attach(nn.Sequential(nn.Linear(4, 4)), lk.LoRA(rank=2), target_modules=["0"])) is None


# -- AdaLoRA ---------------------------------------------------------------------------------------------------------------


def test_importance_is_the_papers() -> None:
    torch.manual_seed(0)
    importance, w = Importance(0.8, 0.7), nn.Parameter(torch.randn(3, 4))
    mean = spread = torch.zeros(3, 4)
    for _ in range(4):
        w.grad = torch.randn(3, 4)
        importance.add(iter([("w", w)]))
        now = (w.detach() * w.grad).abs()
        mean = 0.8 * mean + 0.2 * now
        spread = 0.7 * spread + 0.3 * (now - mean).abs()
        w.data = torch.randn(3, 4)
    torch.testing.assert_close(importance.score("w", w), mean * spread)
    w.grad = None
    importance.add(iter([("w", w)]))
    torch.testing.assert_close(importance.score("w", w), mean * spread)


def test_the_budget_curve() -> None:
    _, _, schedule = adapted(lk.AdaLoRA(rank=6, target_rank=2, warmup=20, final=40))
    curve = [schedule.budget(t) for t in range(101)]
    assert curve[:21] == [18] * 21
    assert curve[40] == 6 + int(12 / 8), "in the middle an eighth of the way is left"
    assert curve[60:] == [6] * 41
    assert all(a >= b for a, b in pairwise(curve))


def test_exactly_the_budget_is_kept_also_with_equal_scores() -> None:
    _, _, schedule = adapted(lk.AdaLoRA(rank=6, target_rank=2))
    schedule.allocate(8)  # nothing was measured yet: all scores are zero
    assert [int(delta.kept.sum()) for delta in schedule.deltas.values()] == [3, 3, 2]
    torch.manual_seed(1)
    for name, parameter in schedule.named():
        schedule.importance.mean[name] = torch.rand_like(parameter)
        schedule.importance.spread[name] = torch.ones_like(parameter)
        parameter.data = torch.rand_like(parameter)
    schedule.allocate(7)
    scores, kept = schedule.scores(), {name: delta.kept for name, delta in schedule.deltas.items()}
    assert sum(int(row.sum()) for row in kept.values()) == 7
    lowest = min(float(scores[name][kept[name]].min()) for name in kept if kept[name].any())
    assert all(float(scores[name][~kept[name]].max()) < lowest for name in kept if not kept[name].all())
    for delta in schedule.deltas.values():
        assert torch.equal(delta.lam != 0, delta.kept)


def test_a_triplets_score_is_lambdas_and_the_means_of_its_vectors() -> None:
    _, _, schedule = adapted(lk.AdaLoRA(rank=3))
    for name, parameter in schedule.named():
        schedule.importance.mean[name] = torch.rand_like(parameter)
        schedule.importance.spread[name] = torch.rand_like(parameter)

    def entry(name: str) -> Tensor:
        return schedule.importance.mean[name] * schedule.importance.spread[name]

    for name, score in schedule.scores().items():
        for k in range(3):
            expected = entry(f"{name}.lam")[k] + entry(f"{name}.P")[:, k].mean() + entry(f"{name}.Q")[k].mean()
            torch.testing.assert_close(score[k], expected)


def test_the_penalty_is_zero_for_orthonormal_factors_and_reaches_gradients_alone() -> None:
    _, adapter, schedule = adapted(lk.AdaLoRA(rank=3, orthogonality=0.5))
    by_hand = [
        torch.linalg.matrix_norm(gram - torch.eye(3).double())
        for _, _, delta in adapter.deltas()
        for gram in (delta.P.T @ delta.P, delta.Q @ delta.Q.T)
    ]
    torch.testing.assert_close(schedule.penalty(), sum(by_hand) / 6)
    expected = torch.autograd.grad(0.5 * sum(by_hand) / 6, [delta.P for _, _, delta in adapter.deltas()])
    schedule.penalise()
    for g, (_, _, delta) in zip(expected, adapter.deltas(), strict=True):
        torch.testing.assert_close(delta.P.grad, g)
        assert delta.lam.grad is None
    for _, _, delta in adapter.deltas():
        delta.P.data = torch.linalg.qr(torch.randn_like(delta.P)).Q
        delta.Q.data = torch.linalg.qr(torch.randn_like(delta.Q).T).Q.T
        delta.P.grad = delta.Q.grad = None
    assert float(schedule.penalty().detach()) < 1e-12
    schedule.penalise()
    assert all(torch.isfinite(delta.P.grad).all() for _, _, delta in adapter.deltas())


@pytest.mark.parametrize("target", [2, 6])
def test_a_run_ends_at_its_budget_and_the_mask_holds(target: int) -> None:
    model, _, schedule = adapted(lk.AdaLoRA(rank=6, target_rank=target, warmup=3, final=6, interval=2))
    schedule.begin(20)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    masks = []
    for number in range(1, 21):
        step(model, schedule, optimiser, number)
        masks.append(torch.cat([delta.lam.detach() != 0 for delta in schedule.deltas.values()]))
    assert masks[2].all()
    assert all(int(mask.sum()) == target * 3 for mask in masks[13:])
    assert all(torch.equal(mask, masks[13]) for mask in masks[13:]), "in the final phase momentum revives nothing"


def test_no_step_to_change_ranks_in_is_refused() -> None:
    _, _, schedule = adapted(lk.AdaLoRA(rank=2, warmup=60, final=0.3))
    with pytest.raises(LorakitError, match="leave none of the run's 80 steps to change ranks in"):
        schedule.begin(80)


# -- ElaLoRA ---------------------------------------------------------------------------------------------------------------


def test_the_weakest_go_and_the_strongest_candidates_layers_gain() -> None:
    _, _, schedule = adapted(lk.ElaLoRA(rank=4, candidates=2))
    scores = {
        "0": torch.tensor([9.0, 0.1, 8.0, 0.2]),
        "1": torch.tensor([5.0, 6.0, 7.0, 8.0]),
        "2": torch.tensor([1.0, 2.0, 3.0, 4.0]),
    }
    assert schedule.plan(scores, 2) == ({"0": [1, 3]}, {"1": 2})
    assert schedule.plan(scores, 1) == ({"0": [1]}, {"1": 1})
    # Six candidates: no more than three can go. Those of layer 2 are the third weakest and the third strongest.
    assert schedule.plan(scores, 9) == ({"0": [1, 3]}, {"1": 2})


def test_no_layer_is_emptied_nor_grown_beyond_its_size() -> None:
    _, _, schedule = adapted(lk.ElaLoRA(rank=4, candidates=9))
    lost, gained = schedule.plan({"0": torch.zeros(4), "1": torch.ones(7), "2": torch.full((4,), 2.0)}, 9)
    assert len(lost["0"]) == 3
    assert gained == {"2": 3}, "layer 1 has its seven of 7 × 10, so only layer 2 has room"


def test_new_directions_are_orthogonal() -> None:
    torch.manual_seed(0)
    columns = torch.randn(9, 4).double()
    fresh = orthogonal_to(columns, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(fresh.T @ fresh, torch.eye(3).double())
    assert (columns.T @ fresh).abs().max() < 1e-14


def test_exchanges_keep_the_total_and_what_new_triplets_add_is_nothing() -> None:
    model, adapter, schedule = adapted(lk.ElaLoRA(rank=4, warmup=2, final=4, interval=3, moves=3))
    schedule.begin(30)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    seen = set()
    for number in range(1, 31):
        step(model, schedule, optimiser, number)
        ranks = tuple(len(delta.lam) for delta in schedule.deltas.values())
        seen.add(ranks)
        assert sum(ranks) == 12
        for name, parameter in schedule.named():
            assert optimiser.state[parameter]["exp_avg"].shape == parameter.shape
            assert schedule.importance.mean[name].shape == parameter.shape
    assert len(seen) > 2, "ranks must move for this to say anything"
    assert schedule.moves(2) == 3
    assert schedule.moves(26) == 0


def test_the_optimiser_goes_on_as_if_the_kept_triplets_had_been_alone() -> None:
    """After a removal, Adam's next step for what stayed is that of a run whose moments were sliced by hand."""
    model, _, schedule = adapted(lk.ElaLoRA(rank=4))
    optimiser = torch.optim.AdamW([p for _, p in schedule.named()], lr=0.02)
    for number in (1, 2, 3):
        step(model, schedule, optimiser, number)
    delta = schedule.deltas["1"]
    m, v = (optimiser.state[delta.P][key].clone() for key in ("exp_avg", "exp_avg_sq"))
    P, left = delta.P.detach().clone(), [0, 2, 3]
    with torch.no_grad():
        schedule._move(4, {"1": [1]}, {"0": 1}, optimiser)
    optimiser.zero_grad()
    delta.P.grad = torch.ones_like(delta.P)
    optimiser.step()
    m, v = 0.9 * m[:, left] + 0.1, 0.999 * v[:, left] + 0.001
    change = 0.02 * (m / (1 - 0.9**4)) / ((v / (1 - 0.999**4)).sqrt() + 1e-8)
    torch.testing.assert_close(delta.P.detach(), P[:, left] * (1 - 0.02 * 0.01) - change)


# -- DyLoRA and ReLoRA -----------------------------------------------------------------------------------------------------


def test_draws_are_uniform_and_the_same_again() -> None:
    _, _, schedule = adapted(lk.DyLoRA(rank=5, smallest=2))
    drawn = [schedule.drawn(t) for t in range(1, 301)]
    counts = torch.bincount(torch.tensor(drawn), minlength=6).tolist()
    assert counts[:2] == [0, 0]
    assert min(counts[2:]) > 45
    assert drawn == [adapted(lk.DyLoRA(rank=5, smallest=2))[2].drawn(t) for t in range(1, 301)]
    other = adapted(lk.DyLoRA(rank=5, smallest=2), seed=1)[2]
    assert drawn != [other.drawn(t) for t in range(1, 301)]


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_not_drawn_stays_in_spite_of_momentum_and_decay(frozen: bool) -> None:
    model, adapter, schedule = adapted(lk.DyLoRA(rank=4, frozen=frozen))
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.02, weight_decay=0.1)
    drawn = set()
    for number in range(1, 13):
        b = schedule.drawn(number)
        drawn.add(b)
        moving = [k == b - 1 if frozen else k < b for k in range(4)]
        before = {n: (d.A.detach().clone(), d.B.detach().clone()) for n, d in schedule.deltas.items()}
        moments = {
            n: [s["exp_avg"].clone() for s in (optimiser.state.get(d.A),) if s] for n, d in schedule.deltas.items()
        }
        step(model, schedule, optimiser, number)
        for name, delta in schedule.deltas.items():
            A, B = before[name]
            assert (delta.A.detach() != A).any(1).tolist() == moving
            assert (delta.B.detach() != B).any(0).tolist() == moving
            for old in moments[name]:
                assert (optimiser.state[delta.A]["exp_avg"] != old).any(1).tolist() == moving
    assert len(drawn) > 2
    model.eval()
    assert schedule.deltas["0"].b == 4, "in evaluation all act"
    model.train()
    schedule.end()
    assert schedule.deltas["0"].b == 4


def test_restarts_keep_the_function_forget_the_moments_and_warm_up() -> None:
    model, adapter, schedule = adapted(lk.ReLoRA(rank=2, alpha=2.0, every=5, rewarm=3))
    schedule.begin(20)
    assert [schedule.factor(t) for t in range(1, 12)] == [1, 1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1, 1, 1 / 3]
    assert [t for t in range(1, 21) if schedule.due(t)] == [5, 10, 15], "never where the rate has no time to rise"
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.05, momentum=0.9)
    x, rates = torch.randn(6, WIDTHS[0]).double(), []
    for number in range(1, 8):
        optimiser.zero_grad()
        schedule.before_forward(number, optimiser)
        (model(x) - 1).square().mean().backward()
        schedule.before_update(number, optimiser)
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        before = model(x).detach()
        schedule.after_update(number, optimiser)
        torch.testing.assert_close(model(x), before)
        assert optimiser.param_groups[0]["lr"] == 0.05
        if number == 5:
            assert not any(optimiser.state.get(p) for p in adapter.parameters())
    assert rates == pytest.approx([0.05] * 5 + [0.05 / 3, 0.1 / 3])
    assert all(delta.kept()[1].shape[0] == 2 for delta in schedule.deltas.values())


# -- in the Trainer --------------------------------------------------------------------------------------------------------

METHODS: dict[str, Any] = {
    "adalora": lk.AdaLoRA(rank=4, alpha=8.0, target_rank=2, warmup=2, final=4, interval=3, beta1=0.97, beta2=0.97),
    "elalora": lk.ElaLoRA(rank=3, alpha=6.0, warmup=1, final=2, interval=2, dropout=0.1),
    "dylora": lk.DyLoRA(rank=4, alpha=8.0, dropout=0.1),
    "relora": lk.ReLoRA(rank=2, alpha=4.0, every=4, rewarm=2),
}


def make(output: Path, method: Any, *callbacks: TrainerCallback, **options: Any) -> LoraTrainer:
    given = {"batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "precision": "fp32", "fast_path": "off"}
    config = TrainConfig(
        model="tiny",
        data=DataOptions(train="rows.jsonl", evaluation_size=8),
        method=method,
        target_modules="all-linear",
        train=TrainOptions(output=str(output), **{**given, "weight_decay": 0.01, "epochs": 3, **options}),
    )
    model = llama(layers=1)
    torch.manual_seed(config.train.seed)
    adapter = lk.attach(model, config.method, **config.attach_arguments())
    return LoraTrainer(model, adapter, config, rows(16), None, path=choose_path(model, "off"), callbacks=callbacks)


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_run_goes_on_on_the_same_trajectory(name: str, tmp_path: Path) -> None:
    """Twelve steps, a checkpoint at 5, killed at 7: ranks, importance, moments, draws and restarts come back."""
    whole = make(tmp_path / "whole", METHODS[name], save_steps=5)
    whole.train_from()
    with pytest.raises(InterruptionError):
        make(tmp_path / "cut", METHODS[name], InterruptAt(7), save_steps=5).train_from()
    torch.manual_seed(4321)
    resumed = make(tmp_path / "cut", METHODS[name], save_steps=5)
    resumed.train_from(resume=True)
    ours, theirs = whole.adapter.state_dict(), resumed.adapter.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(theirs[key], tensor), key
    logged = [[event["loss"] for event in run.state.log_history if "loss" in event] for run in (whole, resumed)]
    assert logged[0] == logged[1]
    assert len(logged[0]) == 12
    deltas = [delta for _, _, delta in whole.adapter.deltas()]
    if name == "adalora":
        assert sum(int((delta.lam != 0).sum()) for delta in deltas) == 2 * len(deltas)
        assert len({int(delta.kept.sum()) for delta in deltas}) > 1, "spent unevenly"
    elif name == "elalora":
        assert sum(len(delta.lam) for delta in deltas) == 3 * len(deltas)
        assert len({len(delta.lam) for delta in deltas}) > 1
    elif name == "relora":
        assert all(delta.kept()[1].shape[0] == 4 for delta in deltas), "restarted after steps 4 and 8"
    else:
        assert all(delta.b == 4 for delta in deltas)


def test_the_resume_test_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: a resume that forgets what the schedule measured must not pass."""
    method = METHODS["adalora"]
    whole = make(tmp_path / "whole", method, save_steps=5)
    whole.train_from()
    with pytest.raises(InterruptionError):
        make(tmp_path / "cut", method, InterruptAt(7), save_steps=5).train_from()
    monkeypatch.setattr(Budget, "load_state_dict", lambda *_: None)
    resumed = make(tmp_path / "cut", method, save_steps=5)
    resumed.train_from(resume=True)
    theirs = resumed.adapter.state_dict()
    assert any(not torch.equal(theirs[key], tensor) for key, tensor in whole.adapter.state_dict().items())


def test_the_penalty_is_in_the_training_and_not_in_the_losses(tmp_path: Path) -> None:
    """At the first step the factors are the same, so the losses agree; then the penalty has moved them."""
    runs = []
    for weight in (0.0, 5.0):
        method = lk.AdaLoRA(rank=4, orthogonality=weight)
        trainer = make(tmp_path / str(weight), method, max_steps=4, batch_size=2, gradient_accumulation=2)
        trainer.train_from()
        runs.append(trainer)
    logged = [[event["loss"] for event in run.state.log_history if "loss" in event] for run in runs]
    assert logged[0][0] == logged[1][0]
    penalties = [float(run.schedule.penalty().detach()) for run in runs]
    assert penalties[1] < penalties[0]


def test_a_schedule_is_part_of_the_checkpoint_and_of_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "a", lk.AdaLoRA(rank=2), max_steps=2, save_steps=2).train_from()
    (folder,) = checkpoint.checkpoints_in(tmp_path / "a")
    assert (folder / checkpoint.SCHEDULE).exists()
    make(tmp_path / "b", lk.LoRA(rank=2), max_steps=2, save_steps=2).train_from()
    (folder,) = checkpoint.checkpoints_in(tmp_path / "b")
    assert not (folder / checkpoint.SCHEDULE).exists()


@pytest.mark.parametrize(
    ("method", "name", "options"),
    [
        (lk.LoRAFA(rank=2, corrected=True), "adamw", {}),
        (lk.Full(), "galore", {"rank": 4, "interval": 2}),
    ],
)
def test_optimisers_resume_too(method: Any, name: str, options: dict[str, Any], tmp_path: Path) -> None:
    given = {"optimizer": name, "optimizer_options": options, "save_steps": 3, "max_steps": 6}
    whole = make(tmp_path / "whole", method, **given)
    whole.train_from()
    with pytest.raises(InterruptionError):
        make(tmp_path / "cut", method, InterruptAt(4), **given).train_from()
    resumed = make(tmp_path / "cut", method, **given)
    resumed.train_from(resume=True)
    theirs = resumed.adapter.state_dict()
    for key, tensor in whole.adapter.state_dict().items():
        assert torch.equal(theirs[key], tensor), key
