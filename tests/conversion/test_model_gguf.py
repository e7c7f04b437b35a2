"""A merged model as a GGUF file with an Ollama Modelfile: formats, templates, the tools and what is said where they are not."""

from __future__ import annotations

import os
import re
import stat
import sys
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

import lorakit as lk
from cli.conftest import TEMPLATE, call, words_tokenizer
from lorakit.conversion.model_gguf import CONVERTER, QUANTISER, find_tools, go_template, modelfile, rounded
from lorakit.errors import LorakitError
from lorakit.files.prompt import Prompt, Prompter
from lorakit.models.loading import load_model
from training.test_models import tiny_llama, write_gguf

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ '<s>' }}{% for m in messages %}<h>{{ m.role }}</h>\n\n{{ m.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<h>assistant</h>\n\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% elif m.role == 'user' %}"
    "[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
FOLDED = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.index0 == 1 and messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% endif %}{% endfor %}"
)
COUNTED = "{% for m in messages %}{{ loop.index }}. {{ m.role }}: {{ m.content }}\n{% endfor %}"


def by_ollama(template: str, system: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template writes of these templates."""
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    start, _, rest = template.partition("{{ range .Messages }}")
    cases, _, end = rest.rpartition("{{ end }}{{ end }}")
    parts = re.split(r"\{\{ (?:else )?if eq \.Role \"(\w+)\" \}\}", cases)[1:]
    by_role = dict(zip(parts[::2], parts[1::2], strict=True))
    return start + "".join(by_role[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + end


@pytest.mark.parametrize(
    ("template", "system"),
    [(TEMPLATE, ""), (CHATML, "Be kind."), (LLAMA, ""), (NO_SYSTEM, ""), (FOLDED, None), (COUNTED, None)],
    ids=[
        "plain",
        "chatml with a system message",
        "llama with BOS",
        "no system",
        "system in the user's turn",
        "counted",
    ],
)
@pytest.mark.parametrize("bos", [False, True])
def test_ollama_writes_what_the_chat_template_writes(template: str, system: str | None, bos: bool) -> None:
    tokenizer = words_tokenizer(template)
    tokenizer.bos_token = "<s>" if bos else None
    prompter = Prompter(tokenizer, Prompt(template))
    found = go_template(prompter)
    if system is None:
        assert found is None
        assert "Ollama's templates\n# cannot follow" in modelfile("m.gguf", prompter)
        return
    if template is LLAMA and not bos:
        assert found is None, "it begins with a text that is no BOS of its tokenizer"
        return
    assert found is not None
    assert found[1] == system
    turns = [{"role": role, "content": f"the {role}"} for role in ("user", "assistant", "user")]
    for messages in (turns[:1], turns, [{"role": "system", "content": "Be brief."}, *turns]):
        if messages[0]["role"] == "system" and template is NO_SYSTEM:
            continue
        theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert by_ollama(*found, messages) == theirs
    text = modelfile("m.gguf", prompter)
    assert text.startswith(f'FROM ./m.gguf\nTEMPLATE """{found[0]}"""\n')
    assert 'PARAMETER stop "<end>"' in text
    assert ('SYSTEM """Be kind."""' in text) is (system == "Be kind.")


@pytest.mark.parametrize("kind", ["q8_0", "q4_1"])
def test_a_file_of_floats_is_rounded_as_llama_cpp_rounds_it(tmp_path: Path, kind: str) -> None:
    model = tiny_llama()
    write_gguf(tmp_path / "floats.gguf", model, gguf.GGMLQuantizationType.F32)
    rounded(tmp_path / "floats.gguf", tmp_path / "few.gguf", kind)
    expected = write_gguf(tmp_path / "theirs.gguf", model, gguf.GGMLQuantizationType[kind.upper()])
    loaded, words = load_model(tmp_path / "few.gguf", dtype="fp32")
    for name, value in expected.items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert words.chat_template
    assert (tmp_path / "few.gguf").stat().st_size < 0.6 * (tmp_path / "floats.gguf").stat().st_size


def test_a_missing_tool_is_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    done = call("merge", "no-base", "no-adapter", "-o", str(tmp_path / "out"), "--gguf", "q8_0")
    assert done.exit_code == 2
    said = " ".join(done.output.split())
    assert f"{CONVERTER} of llama.cpp was not found; install llama.cpp" in said, "before the base is looked for"
    (tmp_path / CONVERTER).write_text("")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert find_tools("Q8_0") == (tmp_path / CONVERTER, None)
    with pytest.raises(LorakitError, match=rf"{QUANTISER} of llama.cpp was not found.*Without it: f32, .*q4_0"):
        find_tools("q4_k_m")
    with pytest.raises(LorakitError, match='unknown GGUF format "q4_km"; did you mean "q4_k_m"'):
        find_tools("q4_km")


WRITER = """
import argparse
import sys
if any("broken" in word for word in sys.argv):
    sys.exit("the architecture is not known")
import gguf
from transformers import LlamaForCausalLM
from training.test_models import write_gguf
parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--outfile")
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "auto"])
given = parser.parse_args()
write_gguf(given.outfile, LlamaForCausalLM.from_pretrained(given.folder), gguf.GGMLQuantizationType[given.outtype.upper()])
"""


@pytest.mark.slow  # the writer imports torch in a process of its own
def test_merge_writes_the_file_and_the_modelfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a writer with the converter's flags, for a vocabulary that llama.cpp does not know, and a quantiser that copies."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = tiny_llama(tie_word_embeddings=False)
    model.save_pretrained(base)
    words_tokenizer().save_pretrained(base)
    own = lk.attach(model, lk.LoRA(rank=2), target_modules="attention")
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.normal_()
    own.save(adapter, base=str(base))
    (tmp_path / CONVERTER).write_text(WRITER)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
    done = call("merge", str(base), str(adapter), "-o", str(tmp_path / "merged"), "--gguf", "q8_0", "--dtype", "fp32")
    assert done.exit_code == 0, done.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("*.floats.gguf"))
    reader = gguf.GGUFReader(tmp_path / "merged" / "merged-q8_0.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}["blk.0.ffn_up.weight"]
    floats = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
    torch.testing.assert_close(floats, merged.model.layers[0].mlp.up_proj.weight.detach(), atol=2e-3, rtol=0.02)
    text = (tmp_path / "merged" / "Modelfile").read_text()
    assert text.startswith("FROM ./merged-q8_0.gguf\nTEMPLATE")
    program = tmp_path / QUANTISER
    program.write_text('#!/bin/sh\necho "$3" > "$2"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    done = call("merge", str(base), str(adapter), "-o", str(tmp_path / "merged"), "--gguf", "q4_k_m", "--overwrite")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "merged" / "merged-q4_k_m.gguf").read_text() == "Q4_K_M\n"
    assert not (tmp_path / "merged" / "merged-q8_0.gguf").exists()
    done = call("merge", str(base), str(adapter), "-o", str(tmp_path / "broken"), "--gguf", "f16")
    assert done.exit_code == 2
    assert f"{CONVERTER} failed (exit status 1): the architecture is not known" in " ".join(done.output.split())
    assert not (tmp_path / "broken").exists()
