"""The part of a run that steps: a `transformers.Trainer`, so that Accelerate, schedulers, checkpoints, early stopping and
trackers come with it, with what a low-rank run does differently:

- the loss: packed batches without padding where the model supports them, else padded ones; either way the sum over labelled
  tokens, divided by their number in the whole accumulated batch, so that splitting a batch changes nothing;
- evaluation by the same path, over all labelled tokens rather than a mean of batch means;
- checkpoints of the adapter alone, which resume bit for bit;
- several processes share a small sum of the adapter's gradients; the model itself is never wrapped.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.core.using import noted
from lorakit.errors import LorakitError, first_line
from lorakit.models.device import resolve_device
from lorakit.optim import build_optimizer, build_scheduler, correct_gradients, corrections_of, parameter_groups
from lorakit.optim.average import Average, settle, used
from lorakit.optim.optimisers import averages
from lorakit.optim.scheduler import FOLLOWS_EVALUATION
from lorakit.train import run_checkpoint as checkpoint
from lorakit.train.config.run import TrainConfig, TrainOptions, to_tree, to_yaml
from lorakit.train.data.blocks import documents
from lorakit.train.data.store import lengths_of
from lorakit.train.data.tokenise import IGNORED
from lorakit.train.evaluate import evaluate_loss
from lorakit.train.health import HealthCallback, HealthWatch
from lorakit.train.interruption import Interruption
from lorakit.train.order import ByLength
from lorakit.train.progress import MetricsFile, ProgressCallback
from lorakit.train.rate import with_rate
from lorakit.train.report import CONFIG
from lorakit.train.schedules.table import ScheduleCallback, schedule_for
from lorakit.train.step.loss import PADDED, LossPath, LossStats
from lorakit.train.step.noise import embedding_noise

if TYPE_CHECKING:
    from lorakit.adapter.adapter import Adapter
    from lorakit.train.data.store import Example

log = logging.getLogger("lorakit.train")


class LoraTrainer(transformers.Trainer):
    """The Trainer of one adapter.

    `train_examples` and `eval_examples` are tokenised examples; `path` how the loss is computed. `console` is
    where progress is shown; None shows none.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        config: TrainConfig,
        train_examples: Sequence[Example],
        eval_examples: Sequence[Example] | None = None,
        *,
        path: LossPath = PADDED,
        console: Console | None = None,
        callbacks: Sequence[transformers.TrainerCallback] = (),
    ) -> None:
        if not train_examples:
            raise LorakitError("train: there are no rows to train on")
        self.adapter = adapter
        # The model itself, never a wrapper around it for several processes.
        self.bare: Any = model
        config = self.lora_config = with_rate(config, getattr(model, "config", None))
        self.path = path
        self.output = Path(config.train.output)
        self.health = HealthCallback(HealthWatch(), adapter.named_parameters())
        self.schedule = schedule_for(adapter, config.train.seed)
        self.progress = ProgressCallback(console) if console is not None else None
        self._right = torch.zeros(())
        self._labels = 0
        self._since = time.perf_counter()
        self._tokens_at_log = 0
        self._earlier_findings: list[str] = []
        self._changed: set[str] = set()
        self._data = checkpoint.digest_examples(train_examples)
        self.interruption = Interruption()
        self.record: dict[str, Any] = {}
        """What the adapter's record says in checkpoints, besides the steps."""
        self._sampled: Mapping[str, Any] | None = None
        self.average = Average(adapter.named_parameters(), config.train.ema) if config.train.ema else None
        self._settled = False
        own: list[transformers.TrainerCallback] = [
            self.health, MetricsFile(self.output / "metrics.jsonl"), self.interruption
        ]  # fmt: skip
        if self.schedule is not None:  # after the health watch, which takes the gradients of a skipped step away
            own.insert(1, ScheduleCallback(self.schedule))
        if self.progress is not None:
            own.append(self.progress)
        if config.train.early_stopping_patience is not None:
            own.append(transformers.EarlyStoppingCallback(config.train.early_stopping_patience))
        with _adapted(model):
            super().__init__(
                model=model,
                args=training_arguments(config, evaluates=bool(eval_examples)),
                data_collator=cast(Any, documents),  # a batch is its examples; the loss path makes them into tensors
                train_dataset=cast(Any, train_examples),
                eval_dataset=cast(Any, eval_examples or None),
                callbacks=[*own, *callbacks],
            )
        self.scaler = torch.amp.GradScaler(self.args.device.type) if config.train.precision == "fp16" else None
        self.health.at_once = self.schedule is not None or self.scaler is not None
        # What transformers prints at every log event is said by the progress callback.
        self.remove_callback(transformers.PrinterCallback)
        self.model_accepts_loss_kwargs = True
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise LorakitError(
                "train: FSDP and DeepSpeed are not supported, since they shard the model. "
                "Use data parallelism, one copy of the model per process (accelerate launch --multi_gpu)"
            )

    # -- one step ----------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch. `inputs` is a list of examples."""
        # The bare model: a wrapper for several processes would have to see every forward, and the packed path has its own.
        with self.path.opened(self.bare), embedding_noise(self.bare, self.lora_config.train.neftune):
            loss: Tensor = super().training_step(self.bare, inputs, num_items_in_batch)
        if self.scaler is not None:
            loss = loss / cast(Tensor, self.scaler._get_scale_async())
        if self.args.world_size > 1:
            if self.accelerator.sync_gradients:
                for parameter in self.adapter.parameters():
                    if parameter.requires_grad:
                        if parameter.grad is None:
                            parameter.grad = torch.zeros_like(parameter)
                        torch.distributed.all_reduce(parameter.grad)
            torch.distributed.all_reduce(loss)
        if self.scaler is not None and self.accelerator.sync_gradients:
            self._unscale(self.scaler)
        if self.schedule is not None and self.accelerator.sync_gradients:
            self.schedule.penalise()
        self.health.add_loss(loss)
        # A loss that is not finite counts as the mean so far in what is logged; the health watch names it.
        so_far = getattr(self, "_tr_loss", torch.zeros(())) / (
            1 + self.state.global_step - self._globalstep_last_logged
        )
        return torch.where(loss.isfinite(), loss, so_far.to(loss))

    def _unscale(self, scaler: torch.amp.GradScaler) -> None:
        """Take the loss scale out of the gradients. Where it made them overflow they are dropped, so that the optimiser skips
        the step, and the scale falls; at a scale of 1 they are left to the health watch, which ends such a run."""
        scaler.unscale_(cast(Any, self.optimizer).optimizer)
        norms = torch._foreach_norm([p.grad for p in self.adapter.parameters() if p.grad is not None], float("inf"))
        known = cast(Tensor, scaler._get_scale_async())
        scale, *found = torch.stack([known, *(norm.to(known) for norm in norms)]).tolist()  # one copy from the device
        self.health.overflowed = scale > 1 and not all(map(math.isfinite, found))
        if self.health.overflowed:
            log.debug("fp16: the gradients overflow at a loss scale of %g; the step is skipped", scale)
            for parameter in self.adapter.parameters():
                parameter.grad = None
        scaler.update()

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of one micro-batch as its share of the whole accumulated batch's mean over labelled tokens."""
        if return_outputs:
            raise LorakitError(
                "compute_loss: return_outputs is not supported; the logits are never computed as a whole"
            )
        items = float(num_items_in_batch) if num_items_in_batch is not None else float(_count_labels(inputs))
        with noted(self.bare) as extra:
            smoothing = self.args.label_smoothing_factor
            loss, stats = self.path.loss(model, inputs, num_items=max(items, 1.0), label_smoothing=smoothing)
        for own in extra:  # by this micro-batch's share of the batch, as the loss itself
            loss = loss + own() * (stats.targets / max(items, 1.0))
        # Kept on its device: reading it would wait for the step.
        self._right = self._right.to(stats.right.device) + stats.right.detach()
        self._labels += stats.targets
        self.state.num_input_tokens_seen += sum(len(example.input_ids) for example in inputs) * self.args.world_size
        return loss if self.scaler is None else self.scaler.scale(loss)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        """Labelled tokens in all micro-batches of an optimiser step, over all processes."""
        count = sum(_count_labels(batch) for batch in batch_samples)
        if self.args.world_size > 1:
            total = torch.tensor(count, device=device)
            torch.distributed.all_reduce(total)
            count = int(total)
        return count

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The schedule of the learning rate."""
        if self.lr_scheduler is None:
            over, warmup = optimizer or cast(Any, self.optimizer), self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = make_scheduler(self.lora_config.train, over, warmup, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        examples = self.train_dataset if train_dataset is None else train_dataset
        if not self.lora_config.train.group_by_length:
            return super()._get_train_sampler(examples)
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return ByLength(lengths_of(cast(Any, examples)), together, self.args.seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser over the adapter's trainable parameters alone."""
        if self.optimizer is None:
            options = self.lora_config.train
            assert options.learning_rate is not None
            groups = parameter_groups(
                self.adapter.named_parameters(),
                self.adapter.roles(),
                options.learning_rate,
                weight_decay=options.weight_decay,
                ratio=options.loraplus_ratio or 1.0,
                rates=options.rates,
            )
            self.optimizer = make_optimizer(options.optimizer, groups, options.learning_rate, options.optimizer_options)
            correct_gradients(self.optimizer, corrections_of(self.adapter))
            if self.average is not None:
                update = self.average.update
                self.optimizer.register_step_post_hook(lambda *_: update())
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds token accuracy and tokens per second to what is logged about training."""
        if "loss" in logs:
            now, tokens = time.perf_counter(), self.state.num_input_tokens_seen
            logs["token_accuracy"] = float(self._right) / max(self._labels, 1)
            logs["tokens_per_second"] = round((tokens - self._tokens_at_log) / max(now - self._since, 1e-9), 1)
            self._right, self._labels = torch.zeros(()), 0
            self._since, self._tokens_at_log = now, tokens
        super().log(logs, start_time)

    # -- evaluation --------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, perplexity and token accuracy over all labelled tokens of the evaluation examples."""
        examples: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        numbers = self.loss_sums(examples).numbers()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in numbers.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def loss_sums(self, examples: Sequence[Example]) -> LossStats:
        """The sums of `evaluate` over examples, each process doing its share."""
        world, rank = self.args.world_size, self.args.process_index
        mine = examples[rank::world]
        with self._used(), self.path.opened(self.bare):
            batch_size = self.args.per_device_eval_batch_size
            sums = evaluate_loss(self.bare, mine, batch_size=batch_size, loss_of=self.path.loss)
        if world > 1:
            every = (
                torch.stack([sums.total, sums.right, torch.tensor(float(sums.targets))]).double().to(self.args.device)
            )
            torch.distributed.all_reduce(every)
            sums = LossStats(int(every[2]), every[1], every[0])
        return sums

    def _used(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the adapter has the weights that are to be used: the average, where there is one."""
        if self._settled:
            return contextlib.nullcontext()
        return used(self.adapter.parameters(), self.average, getattr(self.optimizer, "optimizer", self.optimizer))

    # -- checkpoints --------------------------------------------------------------------------------

    def train_from(self, resume: bool | str = False) -> Any:
        """Train, from the start or from a checkpoint (`True`: the newest), and show no bar afterwards either way.

        Raises LorakitError for a checkpoint that is damaged, incomplete, or of another run.
        """
        folder = None
        if resume:
            folder = checkpoint.find_checkpoint(self.output, resume)
            manifest = checkpoint.check_checkpoint(folder, config=to_tree(self.lora_config), data=self._data)
            self._earlier_findings = manifest["findings"]
            self._changed = manifest["changed"] & checkpoint.MAY_CHANGE
            log.info("resuming from %s", folder)
        elif self.is_world_process_zero():
            checkpoint.begin(self.output, self.lora_config.overwrite)
        self._since = time.perf_counter()
        cache = getattr(getattr(self.bare, "config", None), "use_cache", None)
        try:
            with self.interruption.watching():
                result = self.train(resume_from_checkpoint=str(folder) if folder else None)
            self.interruption.check(self.output, self.state.global_step, self.state.max_steps)
            if not self._settled:
                settle(self.average, getattr(self.optimizer, "optimizer", self.optimizer))
                self._settled = True
            return result
        finally:
            if self.progress is not None:
                self.progress.close()
            self.bare.eval()
            if cache is not None:
                self.bare.config.use_cache = cache

    @property
    def findings(self) -> list[str]:
        """What the health watch said, before a resume too."""
        return [*self._earlier_findings, *map(str, self.health.watch.findings)]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        record = {**self.record, "steps": self.state.global_step}
        model = self.lora_config.model
        with self._used():
            self._sampled = checkpoint.write_adapter(folder, self.adapter, model, record, self._sampled)
        (folder / CONFIG).write_text(to_yaml(self.lora_config.replace(overwrite=False)), encoding="utf-8")
        if self.average is not None or averages(cast(Any, self.optimizer).optimizer):
            state = self.adapter.state_dict().items()
            save_file({name: tensor.contiguous().clone() for name, tensor in state}, folder / checkpoint.TRAINED)
        if self.average is not None:
            save_file(self.average.state_dict(), folder / checkpoint.AVERAGE)
        if self.scaler is not None:
            torch.save(self.scaler.state_dict(), folder / checkpoint.SCALER)
        if self.schedule is not None:
            save_file(self.schedule.state_dict(), folder / checkpoint.SCHEDULE)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        (folder / checkpoint.MANIFEST).unlink(missing_ok=True)
        best = self.state.best_model_checkpoint
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as problem:
            # torch's own writer says RuntimeError for a full disk, in words of its own
            if isinstance(problem, RuntimeError) and "writ" not in str(problem):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            self.state.best_model_checkpoint = best
            log.error(
                "%s could not be written (%s) and was skipped; the run continues", folder.name, first_line(problem)
            )
        if self.args.world_size > 1:
            torch.distributed.barrier()
        if self.args.should_save and folder.is_dir():
            checkpoint.write_manifest(
                folder,
                config=to_tree(self.lora_config),
                data=self._data,
                step=self.state.global_step,
                findings=self.findings,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        trained = folder / checkpoint.TRAINED
        state = load_file(trained) if trained.exists() else checkpoint.read_state(folder)
        if self.schedule is not None:  # ranks may have changed, so this comes first
            self.schedule.load_state_dict(load_file(folder / checkpoint.SCHEDULE), state)
        self.adapter.load_state_dict(state)
        if self.average is not None:
            self.average.load_state_dict(load_file(folder / checkpoint.AVERAGE))
        if self.scaler is not None:
            self.scaler.load_state_dict(torch.load(folder / checkpoint.SCALER, weights_only=True))

    def _init_training_state(self, max_steps: int, *given: Any, **named: Any) -> Any:
        """Resumed or not, the intervals of logs, evaluations and checkpoints are those of this run's options."""
        found = super()._init_training_state(max_steps, *given, **named)
        cast(Any, self.state).compute_steps(self.args, max_steps)
        if self.state.global_step > max_steps:
            raise LorakitError(
                f"resume: the checkpoint is of step {self.state.global_step:,}, and the run would now have {max_steps:,}; give "
                "more train.max_steps or train.epochs, or an earlier checkpoint as train.resume"
            )
        return found

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """What the checkpoint has; where the learning rate or the length of the run is another, the new rate at this step."""
        groups = cast(Any, self.optimizer).param_groups
        rates = [group.get("initial_lr", group["lr"]) for group in groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._changed:
            return
        scheduler = cast(Any, self.lr_scheduler)
        scheduler = getattr(scheduler, "scheduler", scheduler)
        factors = [one(scheduler.last_epoch) for one in getattr(scheduler, "lr_lambdas", ())]
        for index, (group, rate) in enumerate(zip(cast(Any, self.optimizer).param_groups, rates, strict=True)):
            group["lr"] = (
                rate * factors[index] if factors else group["lr"] * rate / group.get("initial_lr", group["lr"])
            )
            group["initial_lr"] = rate
        scheduler.base_lrs, scheduler._last_lr = (
            rates,
            [group["lr"] for group in cast(Any, self.optimizer).param_groups],
        )

    def _load_best_model(self) -> None:
        log.info("best checkpoint: %s", Path(str(self.state.best_model_checkpoint)).name)
        folder = Path(str(self.state.best_model_checkpoint))
        self._load_from_checkpoint(str(folder))
        if (folder / checkpoint.TRAINED).exists():  # as it was measured there: the average
            self.adapter.load_state_dict(checkpoint.read_state(folder))
            self._settled = True


# -- made from options -----------------------------------------------------------------------------


def training_arguments(config: TrainConfig, *, evaluates: bool) -> transformers.TrainingArguments:
    """The Hugging Face arguments that a configuration means."""
    options = config.train
    evaluation = "no" if not evaluates else "epoch" if options.eval_steps is None else "steps"
    save_steps = options.save_steps
    if options.keep_best:
        # The best evaluation must have a checkpoint, so both happen at the same steps.
        save_steps = save_steps or options.eval_steps
        if (save_steps is None) != (options.eval_steps is None) or (
            save_steps and options.eval_steps and save_steps % options.eval_steps
        ):
            raise LorakitError(
                f"train.keep_best needs a checkpoint where it evaluates; found train.eval_steps {options.eval_steps} and "
                f"train.save_steps {save_steps}. Make save_steps a multiple of eval_steps, or give neither"
            )
    watched = options.early_stopping_patience is not None or options.scheduler in FOLLOWS_EVALUATION
    wants_best = options.keep_best or watched
    device = resolve_device(options.device)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # "cuda" without a number, which transformers asks for, is then this one
    return transformers.TrainingArguments(
        output_dir=str(Path(options.output) / checkpoint.FOLDER),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.evaluation_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate or 0.0,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        label_smoothing_factor=options.label_smoothing,
        logging_strategy="steps",
        logging_steps=options.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it reads the loss of every step; `training_step` does the same on the device
        eval_strategy=evaluation,
        eval_steps=options.eval_steps,
        save_strategy="epoch" if save_steps is None else "steps",
        save_steps=save_steps or 500,
        save_total_limit=options.save_total_limit,
        load_best_model_at_end=options.keep_best,
        metric_for_best_model="loss" if wants_best else None,
        greater_is_better=False if wants_best else None,
        restore_callback_states_from_checkpoint=options.early_stopping_patience is not None,
        seed=options.seed,
        use_cpu=device.type == "cpu",
        report_to=list(options.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        label_names=["labels"],
        accelerator_config={"dispatch_batches": False},  # a streamed batch is a list of examples, too
        # The base is held in its own dtype and the adapter casts once per layer: no autocast.
        bf16=False,
        fp16=False,
    )


@contextlib.contextmanager
def _adapted(model: Any) -> Iterator[None]:
    """A quantised model is taken by the Trainer only if something on it trains, which it looks for in PEFT's way."""
    if not getattr(model, "is_quantized", False) or "_hf_peft_config_loaded" in vars(model):
        yield
        return
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del model._hf_peft_config_loaded


def make_optimizer(
    name: str, groups: list[dict[str, Any]], learning_rate: float | None, options: dict[str, Any]
) -> torch.optim.Optimizer:
    """The optimiser that a configuration names, over parameter groups."""
    try:
        return build_optimizer(name, groups, lr=learning_rate or 1e-4, **options)
    except LorakitError as problem:
        raise LorakitError(f"train.optimizer: {problem}") from None


def make_scheduler(options: TrainOptions, optimizer: Any, warmup: int, total: int) -> Any:
    """The schedule of the learning rate that a configuration names."""
    name: str = options.scheduler
    if name == "auto":
        name = "constant_with_warmup" if averages(getattr(optimizer, "optimizer", optimizer)) else "linear"
    try:
        return build_scheduler(name, optimizer, warmup, total, options.scheduler_options)
    except LorakitError as problem:
        raise LorakitError(f"train.scheduler_options: {problem}") from None


def _count_labels(examples: Sequence[Example]) -> int:
    """Labelled tokens that are predicted: the first token of a row never is."""
    return sum(label != IGNORED for example in examples for label in example.labels[1:])
