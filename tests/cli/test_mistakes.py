"""What people get wrong, over every verb: what was done, the exit code, and what the message must say.

Each row is a command line, and words that its message must contain: what was asked, what was found, what would work. Whatever
the row, there is no traceback and no file is changed, lost or left behind. Rows of `train` and `eval` name a base whose weights
cannot be read: what they are told was found before those were opened.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli import mistakes
from typer.testing import Result

Run = Callable[..., Result]

DATA = {  # rows that are trained on
    "empty.jsonl": "holds no rows",
    "blank.jsonl": "holds no rows",
    "broken.jsonl": "1 of 3 rows cannot be used | broken.jsonl, line 2: not JSON | on_bad_row: skip",
    "utf16.jsonl": "looks like UTF-16; save it as UTF-8",
    "utf16le.jsonl": "zero bytes | UTF-16",
    "utf32.jsonl": "UTF-16",
    "zeros.jsonl": "is no text file",
    "latin.jsonl": "line 1: not UTF-8",
    "list.jsonl": "line 1: expected an object with columns, found a list",
    "pretty.jsonl": "line 1: not JSON | one object on each line | .json file",
    "cut.json": "cut.json, line 1: not JSON",
    "numbers.json": "expected an object with columns, found a number (1)",
    "string.json": "found text",
    "object.json": "the columns are a; expected prompt and completion",
    "numeric.jsonl": '"prompt" is 1, expected text | line 1: | line 2: | line 3: | and 7 more',
    "null.jsonl": '12 of 12 rows | "completion" is empty',
    "space.jsonl": '1 of 1 row | "completion" is empty',
    "nan.jsonl": '"completion" is nan, expected text',
    "capitals.jsonl": "Did you mean data.columns: {prompt: PROMPT, completion: COMPLETION}?",
    "title.jsonl": "Did you mean data.columns: {prompt: Prompt, completion: Completion}?",
    "question.jsonl": "Did you mean data.columns: {prompt: question, completion: answer}?",
    "typo.jsonl": "Did you mean data.columns: {prompt: promt}?",
    "foreign.jsonl": "the columns are colour, size | data.columns | data.template",
    "both.jsonl": "fit messages and prompt-completion; choose by data.format",
    "humna.jsonl": 'the role "humna" | known are system, developer, user, assistant, tool',
    "uesr.jsonl": 'the role "uesr" | did you mean "user"',
    "only-user.jsonl": "no assistant turn to learn; its roles are user",
    "roleless.jsonl": 'message 1 of "messages" has no role',
    "message.jsonl": '"messages" is text, expected a list of messages',
    "silent.jsonl": '"messages" is empty',
    "image.jsonl": "has no text as content",
    "preference.jsonl": "prompt, chosen, rejected",
    "kto.jsonl": '"label" makes no difference | data.ignore: [label]',
    "class.jsonl": "fit text and classification; choose by data.format",
    "headless.csv": "the columns are the film was good, yes | Is the line with the names of the columns missing?",
    "ragged.csv": "line 3: 1 cell under 2 columns (prompt, completion)",
    "header.csv": "holds no rows",
    "quote.csv": "line 2: not CSV",
    "twice.csv": 'the column "prompt" is named twice',
    "fake.parquet": "is not a whole Parquet file",
    "fake.arrow": "is not a whole Arrow file",
    "fake.jsonl.gz": "is not a whole .gz file",
    "half.jsonl.gz": "is not a whole .gz file",
    "rows.jsonl.zip": "is not of a known kind; known are .jsonl",
    "rows.xlsx": "is not of a known kind",
    "rows.pdf": "is not of a known kind",
    "rows": "is not of a known kind",
    "void": "holds no data files",
    "gone.jsonl": "there is no file or folder d/gone.jsonl",
    "rowz.jsonl": 'Did you mean "d/rows.jsonl"?',
    "*.nope": "no file matches d/*.nope",
    "long.jsonl --data.max-length 16": "no example is left | Raise data.max_length (now 16) | cut-start",
    "class.jsonl --task seq-cls": "at least two different labels; found a",
    "rows.jsonl --task seq-cls": 'rows of "text" and "label"',
    "rows.jsonl --data.columns '{prompt: question}'": 'mapped to "question", but the columns are prompt, completion',
    "rows.jsonl --data.format mesages": 'did you mean "messages"?',
    "rows.jsonl --data.format messages": 'there is no column "messages"; the row has prompt, completion',
    "rows.jsonl --data.template 'Q: {prompt}'": "expected placeholders | {completion}",
    "rows.jsonl --data.template 'Q: {promt} {completion}'": 'no column "promt"',
    "rows.jsonl --data.template '{% for m in messages %}'": "the chat template refuses it",
    "rows.jsonl --data.template no/such.jinja": "the file no/such.jinja cannot be read",
    "rows.jsonl --data.template ../base": "data.template",
    "rows.jsonl --data.system x --data.template '{prompt} {completion}'": "no place for a system message",
    "rows.jsonl --data.evaluation d/rows.jsonl": "names the rows that are trained on",
    "rows.jsonl --data.evaluation ./d/../d/rows.jsonl": "holds the rows that are trained on",
    "rows.jsonl --data.evaluation d/copy.jsonl": "holds the rows that are trained on",
    "rows.jsonl --data.evaluation d/linked.jsonl": "holds the rows that are trained on",
    "rows.jsonl --data.evaluation d/nowhere.jsonl": "there is no file or folder",
    "rows.jsonl --data.evaluation-size 100": "holds out 100 rows, but there are only 16",
    "rows.jsonl --data.evaluation-size 1.5": "data.evaluation_size is 1.5 | a count, which is an integer",
    "rows.jsonl --data.evaluation-size 20%": "expected an integer or a number of at least 0, found '20%'",
    "rows.jsonl --data.evaluation-size -1": "at least 0, found -1",
}
OPTIONS = {  # of a run
    "--rank 0": "expected an integer of at least 1, found 0 (--rank)",
    "--rank -1": "found -1",
    "--rank 8.5": "found 8.5",
    "--rank": "expected a value after it, found nothing",
    "-rank 8": "expected --NAME VALUE",
    "--Rank 3": 'did you mean "rank"?',
    "--rank 8 --rank 4": "--rank is given twice; keep one",
    "--rank 8 --method.rank 4": "given twice, first as --rank",
    "--rank=8 --set rank=8": "given twice",
    "--data.train a.jsonl --data.train b.jsonl": "--data.train is given twice; keep one",
    "--overwrite --no-overwrite": "given twice",
    "--alpha auto": "expected a number",
    "--train.learning-rate -1": "expected a number above 0 | found -1",
    "--train.learning-rate nan": "expected a number above 0",
    "--train.learning-rate 2,5e-4": "expected a number above 0",
    "--train.batch-size 0": "at least 1, found 0",
    "--train.batch-size two": "found 'two'",
    "--train.epochs 0": "above 0, found 0",
    "--train.max-steps 0": "at least 1",
    "--train.max-steps 5 --train.max-steps 6": "--train.max-steps is given twice; keep one",
    "--train.max-steps 1e3": "expected an integer | found 1000.0",
    "--train.warmup 2.5": "train.warmup is 2.5; give a share below 1, or a count, which is an integer",
    "--train.gradient-accumulation 2.5": "expected an integer",
    "--data.max-length 1": "at least 2, found 1",
    "--data.limit -1": "at least 1",
    "--target-modules q_proy": "q_proy",
    "--target-modules q_proj,nope": "nope",
    "--target-modules ''": "target_modules is empty",
    "--target-modules '(['": "([",
    "--exclude-modules '.*'": "exclude",
    "--layers 7": "7",
    "--layers one": "expected an integer or a list of integers",
    "--rank-pattern '{q_proy: 2}'": "q_proy",
    "--rank-pattern q_proj=2": "expected a mapping",
    "--rank-pattern.q_proj=-2": "patterns.rank.q_proj: expected an integer of at least 1",
    "--modules-to-save haed": "haed",
    "--method lorra": 'unknown method "lorra" in --method; did you mean "lora"?',
    "--method ''": "unknown method",
    "--init pisa": 'did you mean "pissa"?',
    "--method ia3 --rank 3": "ia3 has no rank; rank belongs to lora",
    "--quantize 4bit": 'did you mean "nf4"?',
    "--quantize 8bit": 'did you mean "int8"?',
    "--quantize nf5": 'did you mean "nf4"?',
    "--train.scheduler cosin": 'did you mean "cosine"?',
    "--train.optimizer adamm": "unknown optimizer",
    "--train.optimizer LBFGS": "LBFGS | use adamw",
    "--train.optimizer-options '{bets: 1}'": "bets",
    "--train.report-to tensorbord": 'did you mean "tensorboard"?',
    "--train.report-to neptune": "pip install neptune",
    "--train.precision fp15": "did you mean",
    "--train.keep-best maybe": "maybe",
    "--train.keep-best true": "needs rows to evaluate on | data.evaluation_size",
    "--train.early-stopping-patience 2": "needs rows to evaluate on",
    "--train.eval-steps 2": "needs rows to evaluate on",
    "--evaluate.answers score": "evaluate.choices of at least two answers",
    "--name ''": "name is empty",
    "--name a/b": "a/b",
    "--name a.b": "a.b",
    "--task seqcls": 'did you mean "seq-cls"?',
    "--adapters good": "method is lora, which routes none",
    "--method xlora": "name their folders in adapters",
    "--method xlora --adapters nowhere": "nowhere is no folder",
    "--method xlora --adapters a-text": "adapter_config.json is not JSON",
    "--bias some": "expected one of none, all, lora_only",
    "--train.seed -1": "at least 0",
    "--neftun 5": "unknown option",
    "--train.lr 1e-4": 'lorakit calls it "train.learning_rate"',
    "--output out": 'lorakit calls it "train.output"',
    "--train 3": "train is a section; set one of its options",
    "--set rank": "expected NAME=VALUE",
    "stray": "expected --NAME VALUE",
    "--train.output .": "holds the current directory",
    "--train.output 'a file'": "is a file",
    "--train.output 'a file/below'": "cannot be written",
    "--train.output /proc/nope/x": "cannot be written",
    "--train.output full": "full is there already (README.md, train.yaml) | --overwrite",
    "--train.output full --overwrite": "files of your own",
    "--train.output base --overwrite": "files of your own",
    "--train.output good": "good is there already | --overwrite",
    "--train.output ''": "train.output is empty",
    "--train.resume true": "found no complete checkpoint",
    "--train.resume nowhere": "there is no checkpoint nowhere",
    "--train.resume good": "good has no checkpoint.json",
    "--from nowhere": "nowhere is no folder",
    "--from base": "It is a base model",
    "--from a-cut": "is no whole safetensors file",
    "--from a-text": "adapter_config.json is not JSON",
    "--data.special-tokens '[\"\"]'": "data.special_tokens: expected different texts",
    "--train.device cuda9": "cuda9",
    "--device gpu": 'lorakit calls it "train.device"',
    "--packing true": "lorakit calls it",
    "--load-in-4bit true": "quantize",
    "--train.neftune -1": "expected a number above 0",
    "--model m-unknown": "model type `nothing-known`",
    "--model m-typeless": "model_type",
    "--model m-text": "config.json is not JSON",
    "--model m-void": "it is empty",
    "--model m-list": "m-list",
    "--model m-wide": "hidden_size",
    "--model m-headless": 'config.json of "m-headless"',
    "--model m-mute": "no tokenizer files are there",
    "--model m-words": "tokenizer.json is not JSON",
    "--model m-empty": "holds neither config.json nor a .gguf file",
    "--model m-cut": "cannot be loaded | incomplete",
    "--model m-nan": f'{mistakes.Q_PROJ} of "m-nan" holds a NaN',
    "--model m-lacks": f"lacks 1 weight, which would be random: {mistakes.Q_PROJ}",
    "--model m-shape": "cannot be loaded",
    "--model good": "holds an adapter (adapter_config.json), not a base model",
    "--model alone.safetensors": "is a file that is not GGUF",
    "--model ./bsae": 'no such file or folder: "./bsae" | Did you mean "base"?',
    "--model bsae": 'does not hold "bsae" | Did you mean "base"?',
    "--model ''": "model is empty",
}
CONFIGS = {  # the file of a run
    "y-tab.yaml": "y-tab.yaml, line 2: this is not YAML",
    "y-empty.yaml": "model is missing",
    "y-typo.yaml": 'unknown option "modle" in y-typo.yaml, line 1; did you mean "model"?',
    "y-list.yaml": "line 1: expected options such as `model: NAME`, found a list",
    "y-text.yaml": "expected options such as `model: NAME`",
    "y-flat.yaml": 'lorakit calls it "train.learning_rate"',
    "y-twice.yaml": '"model" is given twice (first in line 1)',
    "y-dataless.yaml": "data.train is missing",
    "y-null.yaml": "model: expected text, found nothing",
    "y-string.yaml": "data: expected a section with options",
    "y-alias.yaml": "undefined alias",
    "y-two.yaml": "another document",
    "y-python.yaml": "this is not YAML",
    "y-utf16.yaml": "looks like UTF-16",
    "y-bytes.yaml": "no text file",
    "axolotl.yml": "is a file of Axolotl | lorakit init --from axolotl.yml",
    "y-strange.yaml": "2 unknown options: colour, lr (here train.learning_rate)",
    "nowhere.yaml": "there is no file nowhere.yaml",
    "whoel.yaml": 'Did you mean "whole.yaml"?',
    "good": "is a folder; name the YAML file of a run",
    "d/rows.jsonl": "this is not YAML",
    "alone.safetensors": "no text file",
    "--rank 8 run.yaml": "run.yaml",
    "run.yaml run.yaml": "expected --NAME VALUE",
}
ADAPTERS = {  # given to whatever reads an adapter
    "nowhere": "nowhere is no folder",
    "goood": 'Did you mean "good"?',
    "base": "has no adapter_config.json. It is a base model",
    "unfinished": "has no adapter_config.json. It holds checkpoints",
    "'a file'": "a file is no folder",
    "alone.safetensors": "is no folder",
    "a-bare": "has no adapter_config.json",
    "a-kindless": "names no peft_type",
    "a-text": "adapter_config.json is not JSON",
    "a-utf16": "looks like UTF-16",
    "a-latin": "line 1: not UTF-8",
    "a-list": "holds a list; an object is expected",
    "a-own": "lorakit.json is not JSON",
    "a-own-list": "lorakit.json holds a list",
    "a-own-format": "has format 'x'",
    "a-cut": "is no whole safetensors file",
    "a-head": "is no whole safetensors file",
    "a-bytes": "is no whole safetensors file",
    "a-empty": "is no whole safetensors file",
    "a-tensorless": "has no adapter_model.safetensors",
    "a-folder": "has no adapter_model.safetensors",
    "a-link": "has no adapter_model.safetensors",
    "a-pickle": "a pickle, which can run code",
    "a-nan": "holds a NaN or an infinity",
}
UNFIT = {  # readable, and not for this base
    "a-lacks": "lacks 'model.layers.0.mlp.down_proj.lora_A.weight', which this adapter needs",
    "a-more": "layers.9",
    "a-none": "no tensors",
    "a-rank": "rank",
    "a-kind": "NOTHING",
    "a-words": "r",
    "a-alpha": "alpha",
    "a-edited": "was changed after lorakit wrote lorakit.json",
}
VERBS = {
    "generate": {
        "generate base": "there is no prompt",
        "generate base -p ' '": "a --prompt is empty",
        "generate bsae -p good": 'Did you mean "base"?',
        "generate good -p good": "Name the base model here",
        "generate other -p good -a good": "other names or shapes",
        "generate base -p good -a good -a good": 'two adapters are called "good"',
        "generate base -p good -a a-template": "refuses this: Unexpected end of template",
        "generate base -p good --temperature -1": "--temperature",
        "generate base -p good --top-p 2": "--top-p",
        "generate base -p good --max-new-tokens 0": "--max-new-tokens",
        "generate base -p good --max-new-tokens 1e3": "valid integer",
        "generate base -p good --max-new-tokens 1 --max-new-tokens 2": "--max-new-tokens is given 2 times; keep one",
        "generate base -p good --dtype fp8": 'did you mean "bf16"?',
        "generate base -p good --quantize 4bit": 'did you mean "nf4"?',
        "generate base -p good --sed 1": "--seed",
        "generate -p good": "BASE",
        "generate m-cut -p good": "cannot be loaded",
        "generate m-lacks -p good": "lacks 1 weight",
        "generate m-mute -p good": "no tokenizer files are there",
        "chat base -a nowhere": "nowhere is no folder",
        "route base good -p a": "has no router; mixlora",
        "route base good": "--prompt",
    },
    "merge": {
        "merge base good": "--output",
        "merge base good -o base": "base is there already | --overwrite",
        "merge base good -o good": "good is there already",
        "merge base good -o 'a file'": "a file is a file; a folder was to be written",
        "merge base good -o 'a file/x'": "a file is no folder",
        "merge base good -o .": "is there already",
        "merge base good -o full": "is there already (README.md, train.yaml)",
        "merge base good -o full --overwrite": "files of your own",
        "merge base base -o x": "It is a base model",
        "merge good base -o x": "holds an adapter",
        "merge other good -o x": "other names or shapes",
        "merge base good -o x --dtype int8": 'unknown dtype "int8"',
        "merge m-nan good -o x": "NaN",
        "merge weightless nowhere -o x": "nowhere is no folder",
        "merge weightless a-cut -o x": "no whole safetensors file",
        "merge base good good -o x": "good",
    },
    "inspect": {
        "inspect": "ADAPTER",
        "inspect good --top -1": "--top",
        "inspect good --picture 'a file/x.png'": "cannot be written",
        "inspct good": "inspect",
        "methods lorra": 'did you mean "lora"?',
        "methods --model bsae": 'Did you mean "base"?',
        "diff good": "ADAPTER",
        "diff good good --rank 0": "--rank",
        "plan bsae": 'Did you mean "base"?',
        "plan m-unknown": "model type `nothing-known`",
        "plan m-headless": 'config.json of "m-headless"',
        "plan m-wide": "hidden_size",
        "plan base --method lorra": 'did you mean "lora"?',
        "plan base --quantize 4bit": 'did you mean "nf4"?',
        "plan base --rank 99999": "exceeds the maximum useful rank",
        "plan base --double --no-double": "given 2 times",
        "plan good": "holds an adapter",
        "verify good --base other": "other names or shapes",
        "verify good --file nowhere.txt": "there is no file nowhere.txt",
        "verify good --file empty.txt": "empty.txt is empty",
        "verify good --file latin.txt": "line 1: not UTF-8",
        "verify good --file full": "full is a folder",
        "verify good --prompt ''": "a --prompt is empty",
        "verify a-gone": 'no such file or folder: "/nowhere/base"',
        "verify a-baseless": "does not name its base model; give --base",
    },
    "algebra": {
        "scale good nan -o x": "the factor is nan",
        "scale good -inf -o x": "the factor is -inf",
        "scale good 0 -o x": "the factor is 0",
        "scale good half -o x": "FACTOR",
        "scale good -o x": "FACTOR",
        "scale good 2 -o good": "is the adapter itself",
        "scale good 2 -o base": "is there already",
        "scale good 2 -o 'a file/x'": "a file is no folder",
        "scale good 2 -o x -o z": "--output is given 2 times",
        "scale good 2 --rank 0 -o x": "--rank",
        "scale good 2 --rnak 3 -o x": "--rank",
        "resize good -o x": "either a rank or an energy share",
        "resize good --rank 2 --energy 0.5 -o x": "either a rank or an energy share",
        "resize good --energy 90 -o x": "a share above 0 and at most 1",
        "resize good --energy nan -o x": "a share above 0",
        "resize good --rank 2 --own -o x": "method is lora",
        "prune good -o x": "--keep",
        "prune good --keep 0 -o x": "a share above 0 and at most 1.0, or a count",
        "prune good --keep 2.5 -o x": "keep was given as 2.5",
        "prune good --keep nan -o x": "keep was given as nan",
        "prune good --keep 999 -o x": "the adapter has 14 layers",
        "prune good --keep 0.5 --what rows -o x": "'layers', 'ranks'",
        "prune good --keep 0.5 --data nowhere.jsonl -o x": "there is no file or folder nowhere.jsonl",
        "prune good --keep 0.5 --data d/broken.jsonl -o x": "line 2: not JSON",
        "combine -o x": "ADAPTERS",
        "combine good good -o x --how linaer": 'did you mean "linear"?',
        "combine good good -o x --how linear --weights 1": "one finite number for each of 2",
        "combine good good -o x --how linear --weights 1,x": "numbers with commas between",
        "combine good good -o x --how ties --density 2": "--density",
        "combine good good -o x --how linear --density 0.5": "Those that use it: ties",
        "combine good good -o x --how regmean": "give --data",
        "combine good good -o x --how regmean --data d/rows.jsonl": "for 2 adapters; give it once for each",
        "combine good good -o x --how linear --data d/rows.jsonl --data d/rows.jsonl": "linear measures nothing",
        "combine good good -o x --layer nope=1,1": "'nope'",
        "combine good good -o x --layer q_proj": "NAME=NUMBERS",
        "combine good good -o good": "is the adapter itself",
        "extract base other --rank 2 -o x": "resized vocabulary",
        "extract base base --rank 2 -o x": "do not differ",
        "extract base weightless -o x": "either a rank or an energy share",
        "extract base good --rank 2 -o x": "good",
        "extract base nowhere --rank 2 -o x": "nowhere is no folder",
        "extract base m-cut --rank 2 -o x": "is no whole safetensors file",
        "extract base m-nan --rank 2 -o x": "holds a NaN",
        "extract base m-lacks --rank 2 -o x": mistakes.Q_PROJ,
        "extract base d --rank 2 -o x": "d",
        "extract base base --rank 2 -o good": "is there already",
    },
    "convert": {
        "convert good --to kohia": 'did you mean "kohya"?',
        "convert good": "--to",
        "convert good --to mlx -o good": "is there already",
        "convert good --to mlx -o 'a file'": "a file is a file",
        "convert nowhere --to mlx": "no such file or folder",
        "convert base --to mlx": "no known format",
        "convert alone.safetensors --to peft": "adapter_config.json says their scale; name the folder that holds both",
        "convert d/rows.jsonl --to mlx": "is no whole safetensors file",
        "convert good --to gguf -o x.gguf --base nowhere": "nowhere",
        "convert good --to kohya -o x.txt": "give it that ending",
        "convert good --to kohya --component unt": 'did you mean "unet"?',
        "convert good --to mlx --alpha 3": "says its scale itself",
    },
    "eval": {
        "eval good": "has no train.yaml",
        "eval nowhere.yaml": "there is no file nowhere.yaml",
        "eval run.yaml": "names no rows to evaluate on; give --data.evaluation",
        "eval run.yaml -a nowhere --data.evaluation d/held.jsonl": "nowhere is no folder",
        "eval run.yaml -a good --data.evaluation d/held.jsonl --sampels 3": 'did you mean "--samples"?',
        "eval run.yaml -a good --data.evaluation d/broken.jsonl": "line 2: not JSON",
        "eval run.yaml -a good --data.evaluation d/held.jsonl --samples -1": "--samples",
        "eval run.yaml --data.limit 2 --data.limit 3": "given twice",
    },
    "init": {
        "init base": "DATA",
        "init base d/rows.jsonl -o run.yaml": "run.yaml is there already",
        "init base d/rows.jsonl -o d": "d is a folder; a file was to be written",
        "init base d/rows.jsonl -o 'a file/x.yaml'": "a file is no folder",
        "init base d/rowz.jsonl -o x.yaml": 'Did you mean "d/rows.jsonl"?',
        "init base d/utf16.jsonl -o x.yaml": "looks like UTF-16",
        "init base d/question.jsonl -o x.yaml": "{prompt: question, completion: answer}",
        "init good d/rows.jsonl -o x.yaml": "holds an adapter",
        "init d/rows.jsonl base -o x.yaml": "is a file that is not GGUF",
    },
    "serve": {
        "keys": "file",
        "keys x.yaml": "name a tenant or give --admin",
        "keys d/rows.jsonl t": "is not YAML",
        "keys 'a file' t": "holds text; it is an object with admin and tenants",
        "keys d t": "d is a folder",
        "keys x.yaml t --weight 0": "--weight",
        "serve base --adapters nowhere": "--adapters nowhere is not a folder",
        "serve base --adapters 'a file'": "is not a folder",
        "serve base --keys nowhere.yaml": "there is no file nowhere.yaml",
        "serve base --engine vlm": 'did you mean "vllm"?',
        "serve base --memory lots": 'given as "lots"; give a number with K, M or G',
        "serve base --port 99999": "--port",
        "serve base --port 1 --port 2": "--port is given 2 times",
        "serve base --dtype fp8": 'unknown dtype "fp8"',
        "serve base --formless maybe": "maybe",
        "serve good": "holds an adapter",
        "serve m-cut": "cannot be loaded",
        "bench-serve http://127.0.0.1:1 --requests 1 --popularity base": "does not answer",
        "bench-serve http://127.0.0.1:1 --popularity nope": 'unknown popularity "nope"',
        "halp": "No such command",
        "--halp": "No such option",
    },
}  # fmt: skip
ROWS: dict[str, dict[str, str]] = {
    "data": {f"train run.yaml --data.train d/{line}": said for line, said in DATA.items()},
    "options": {f"train run.yaml {line}": said for line, said in OPTIONS.items()},
    "configs": {f"train {line}": said for line, said in CONFIGS.items()},
    "adapters": {f"inspect {line}": said for line, said in ADAPTERS.items()}
    | {f"generate weightless -p a -a {line}": said for line, said in ADAPTERS.items() if line != "a-nan"}
    | {f"scale {line} 2 -o x": said for line, said in ADAPTERS.items()}
    | {f"generate base -p a -a {line}": said for line, said in {**UNFIT, "a-nan": ADAPTERS["a-nan"]}.items()},
    **VERBS,
}
FINE = {  # what looks like a mistake and is none, or deserves a word only
    "train run.yaml --check --data.train d/bom.jsonl": "16 examples",
    "train run.yaml --check --data.train d/crlf.jsonl": "16 examples",
    "train run.yaml --check --data.train d/data.json": "16 examples",
    "train run.yaml --check --data.train d/semicolon.csv": "2 examples",
    "train run.yaml --check --data.train d/tab.csv": "2 examples",
    "train run.yaml --check --data.train d/pipe.csv": "2 examples",
    'train run.yaml --check --data.train "d/my rows ü/it\'s.jsonl"': "16 examples",
    "train run.yaml --check --data.train 'd/*ows.jsonl'": "16 examples",
    "train run.yaml --check --data.train d/one.jsonl": "a single example",
    "train run.yaml --check --data.train d/same.jsonl": "7 examples the same as an earlier one",
    "train run.yaml --check --data.train d/special.jsonl": "special tokens as text",
    "train run.yaml --check --data.evaluation d/part.jsonl": "3 of 3 rows are trained on too",
    "train run.yaml --check --data.template 'so {prompt}\\nwhat {completion}'": "was good what⟦yes",
    "train run.yaml --check --alpha -1": "adapter:",
    "train run.yaml --check --rank 4096": "gets rank 12 instead of 4096",
    "inspect linked": "rank 4",
    "inspect 'go od'": "go od",
    "inspect 'gö\"od'": 'gö"od',
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of mistakes."""
    root = tmp_path_factory.mktemp("mistakes")
    mistakes.build(root)
    return root


def stamps(root: Path) -> dict[str, str]:
    """A digest of every file, and every folder and link."""
    found = {}
    for path in sorted(root.rglob("*")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(root))] = os.readlink(path) if path.is_symlink() else digest
    return found


@pytest.mark.parametrize("kind", ROWS)
def test_a_mistake_is_told_and_nothing_is_lost(
    kind: str, world: Path, lorakit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before, wrong = stamps(world), []
    for line, words in ROWS[kind].items():
        result = lorakit(*shlex.split(line), stdin="")
        said = " ".join(result.stderr.split())
        missing = [word for word in words.split(" | ") if word not in said]
        if result.exit_code != 2 or missing or "traceback is in" in said or "Traceback" in said:
            wrong.append(f"{line}: exit {result.exit_code}, lacks {missing}: {said[-400:]}")
        if "weightless" in said:
            wrong.append(f"{line}: the weights were read first")
    assert not wrong, "\n".join(wrong)
    assert stamps(world) == before, "a file was changed, lost or left behind"


def test_what_is_no_mistake_works(world: Path, lorakit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    before, wrong = stamps(world), []
    for line, words in FINE.items():
        result = lorakit(*shlex.split(line))
        if result.exit_code or words not in " ".join(result.output.split()):
            wrong.append(f"{line}: exit {result.exit_code}: {result.output[-500:]}")
    assert not wrong, "\n".join(wrong)
    assert stamps(world) == before


def test_negative_numbers_are_arguments(world: Path, lorakit: Run, tmp_path: Path) -> None:
    for factor in ("-1", "-.5", "-1e-3"):
        result = lorakit("scale", str(world / "good"), factor, "-o", str(tmp_path / factor))
        assert result.exit_code == 0, result.output


def test_the_python_api_speaks_of_arguments(world: Path) -> None:
    """The same mistakes in Python: no flags, and no command's words."""
    import lorakit as lk
    from lorakit.errors import LorakitError
    from lorakit.models.loading import load_model

    model, _ = load_model(world / "base")
    for folder, said in (
        ("a-edited", "strict=False"),
        ("a-cut", "no whole safetensors file"),
    ):
        with pytest.raises(LorakitError, match=said):
            lk.load(model, world / folder)
    with pytest.raises(LorakitError, match=r"lorakit\.load\(model, folder\)"):
        load_model(world / "good")
    with pytest.raises(LorakitError, match="tokenizer="):
        load_model(world / "m-mute")
    assert not lk.adapters(model)
