"""What each process of a run over several does, started by test_trainer.py: trains, and the first one writes down how.

torchrun --nproc-per-node 2 processes.py OUTPUT BATCH_SIZE FAST_PATH
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import lorakit as lk
from lorakit.train.run import end_processes
from training.test_trainer import configure, losses, make, tensors
from training.tiny import rows

if __name__ == "__main__":
    output, batch_size, fast_path = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    method = lk.LoRA(rank=3, alpha=6.0)
    trainer = make(
        configure(output, method, batch_size=batch_size, max_steps=4, save_steps=4, fast_path=fast_path),
        evaluation=rows(7, seed=3),
    )
    trainer.train_from()
    evaluation = trainer.evaluate()
    if trainer.is_world_process_zero():
        save_file(tensors(trainer), output / "tensors.safetensors")
        facts = {"losses": losses(trainer), "eval_loss": evaluation["eval_loss"], "processes": trainer.args.world_size}
        (output / "facts.json").write_text(json.dumps(facts))
    end_processes()
