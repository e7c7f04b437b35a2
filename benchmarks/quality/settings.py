"""The rows of the quality table: every method, and what was set besides its defaults.

Where a method can be given a size, it is given that of LoRA at rank 8, 2.44 million numbers on SmolLM2-135M. Learning rates
are usual ones of each family; where one left a method below LoRA, others were tried by the training loss (rates.py), and the
page says so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """One row: its name, what `lorakit train` is told, and what a reader has to know.

    Attributes:
        name: of the row.
        flags: options of the run beside those that all rows share.
        learning_rate: the highest learning rate.
        note: why it is not at LoRA's size, or what else is unlike the others.
    """

    name: str
    flags: tuple[str, ...]
    learning_rate: float
    note: str = ""


BASELINE = "LoRA"

SETTINGS: tuple[Setting, ...] = (
    Setting("LoRA", ("method=lora", "rank=8", "alpha=16"), 5e-4),
    Setting("LoRA+", ("method=lora", "rank=8", "alpha=16", "train.loraplus_ratio=8"), 2e-4, "B at 8 times the rate"),
    Setting(
        "BD-LoRA",
        ("method=bd-lora", "rank=8", "alpha=16", "a_modules=[o_proj, down_proj]", "strict=false", "side=B"),
        5e-4,
        "two blocks, as for two devices",
    ),
    Setting("LoRA-FA", ("method=lora-fa", "rank=16", "alpha=32"), 1e-3),
    Setting("DoRA", ("method=dora", "rank=8", "alpha=16"), 5e-4),
    Setting("LoRA, PiSSA", ("method=lora", "rank=8", "alpha=8", "init=pissa"), 2e-4, "alpha = rank, as in the paper"),
    Setting("LoRA, LoRA-GA", ("method=lora", "rank=8", "alpha=16", "init=lora-ga"), 2e-4),
    Setting(
        "AdaLoRA", ("method=adalora", "rank=12", "alpha=24", "target_rank=8", "interval=1"), 5e-3, "12 falling to 8"
    ),
    Setting("ElaLoRA", ("method=elalora", "rank=8", "alpha=16", "interval=2"), 5e-3),
    Setting("DyLoRA", ("method=dylora", "rank=8", "alpha=16"), 5e-4),
    Setting("ReLoRA", ("method=relora", "rank=8", "alpha=16", "every=0.5", "rewarm=2"), 5e-4, "one restart"),
    Setting("VeRA", ("method=vera", "rank=256"), 2e-2, "two vectors a matrix"),
    Setting("VB-LoRA", ("method=vb-lora", "rank=4", "vector_length=64", "num_vectors=512"), 1e-2),
    Setting("LoRA-XS", ("method=lora-xs", "rank=100", "alpha=100"), 1e-4),
    Setting("Tied-LoRA", ("method=tied-lora", "rank=128", "alpha=128"), 4e-4, "one pair for all layers of a shape"),
    Setting("1LoRA", ("method=1lora",), 2e-3, "one vector a matrix"),
    Setting("RandLoRA", ("method=randlora", "rank=16", "alpha=320"), 1e-4),
    Setting(
        "FourierFT",
        ("method=fourierft", "n_frequency=3000", "start_zero=true"),
        5e-3,
        "from zero: its N(0, 1) start undoes so small a model",
    ),
    Setting("SHiRA", ("method=shira", "rank=8"), 2e-3),
    Setting("C3A", ("method=c3a", "block_size=48"), 2e-2),
    Setting("MoRA", ("method=mora", "rank=8"), 5e-4),
    Setting("LoHa", ("method=loha", "rank=4", "alpha=8"), 2e-3),
    Setting("LoKr", ("method=lokr", "rank=64", "alpha=64", "factor=16"), 2e-3),
    Setting("OFT", ("method=oft", "block_size=32"), 1e-4),
    Setting("BOFT", ("method=boft", "block_size=16", "factors=2"), 1e-4),
    Setting("HiRA", ("method=hira", "rank=8"), 5e-3),
    Setting("IA3", ("method=ia3", "feedforward_modules=[down_proj]"), 3e-3, "one vector a matrix"),
    Setting("MiSS", ("method=miss", "rank=16"), 5e-4),
    Setting("DeLoRA", ("method=delora", "rank=8", "strength=8"), 2e-3),
    Setting("GraLoRA", ("method=gralora", "rank=8", "alpha=16"), 5e-4),
    Setting("HRA", ("method=hra", "rank=16"), 1e-3),
    Setting("RoAd", ("method=road",), 3e-3, "two numbers for a pair of outputs"),
    Setting("Super-Tuning", ("method=supertuning", "sparsity=0.977"), 2e-4),
    Setting("PVeRA", ("method=pvera", "rank=256"), 2e-2, "two vectors a matrix"),
    Setting("WaveFT", ("method=waveft", "n_frequency=11600"), 5e-3),
    Setting("OSF", ("method=osf", "kept=0.99"), 5e-5, "the weakest hundredth of each weight's directions"),
    Setting("PSOFT", ("method=psoft", "rank=128", "alpha=128"), 1e-3),
    Setting("PEANuT", ("method=peanut", "rank=8"), 1e-3),
    Setting("DEFT", ("method=deft", "rank=8"), 1e-3),
    Setting("TinyLoRA", ("method=tinylora", "rank=2", "count=64"), 1e-2, "64 numbers a matrix"),
    Setting("Uni-LoRA", ("method=unilora", "rank=4", "length=23040"), 5e-3, "one vector for the model"),
    Setting("GLoRA", ("method=glora", "rank=4"), 1e-3),
    Setting("Full fine-tuning", ("method=full",), 5e-5, "every number of every adapted matrix"),
    Setting(
        "Full, GaLore", ("method=full", "train.optimizer=galore"), 5e-4, "the same with optimiser state of low rank"
    ),
)
"""BitFit is not among them: SmolLM2 has no biases, and lorakit says so."""

EDITS: tuple[Setting, ...] = (
    Setting("Bottleneck (Houlsby)", ("method=bottleneck", "size=35"), 1e-3),
    Setting("Bottleneck (parallel)", ("method=bottleneck", "placement=parallel", "size=70", "scale=4"), 1e-3),
    Setting(
        "Prompt tuning",
        ("method=prompt-tuning", "start=text", "text=Is the review positive or negative?"),
        3e-2,
        "20 rows, from a text",
    ),
    Setting("P-tuning", ("method=p-tuning",), 3e-3, "20 rows out of a network"),
    Setting("Prefix tuning", ("method=prefix-tuning",), 3e-4, "20 keys and values out of a network"),
    Setting("LLaMA-Adapter", ("method=llama-adapter",), 9e-3, "10 tokens a layer"),
    Setting(
        "LoReFT", ("method=loreft", "rank=8", "first=5", "last=5"), 4e-3, "the prompt's first and last five tokens"
    ),
)
