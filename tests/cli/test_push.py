"""`lorakit push`, and names on the hub where a verb takes an adapter or a base, against a stand-in of the hub's API."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lorakit as lk
from cli.hub import Hub
from lorakit.errors import LorakitError
from lorakit.files.upload import plan_upload
from lorakit.models.hub import HubName, read_name

SECRET = "hf_" + "a1B2" * 10


def as_user(hub: Hub, folder: Path, commands: list[list[str]], token: str = "right") -> list[tuple[int, str, str]]:
    """What the command line answers in a process of its own, whose hub is the stand-in."""
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "LORAKIT_CACHE": str(folder / "cache"),
        "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "ANSWERS": str(folder / "answers.json"), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(lk.__file__).parents[1]),
    }  # fmt: skip
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("hub.py"))],
        input="\n".join(map(json.dumps, commands)), env=environment, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(one) for one in json.loads((folder / "answers.json").read_text())]


@pytest.fixture
def mine(adapter: Path, tmp_path: Path) -> Path:
    """An adapter's folder with things beside it that nobody else should have."""
    folder = tmp_path / "mine" / "yesno"
    shutil.copytree(adapter, folder)
    (folder / "model.safetensors").write_bytes(b"a base")
    (folder / ".env").write_text(f"TOKEN={SECRET}")
    (folder / "checkpoints" / "rows.jsonl").write_text("private\n")
    return folder


def test_an_adapter_goes_to_the_hub_and_every_verb_takes_it_from_there(mine: Path, base: Path, tmp_path: Path) -> None:
    hub = Hub()
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    hub.repos["org/base"] = {"main": {"README.md": b"weights are elsewhere"}, "v2": files}
    ask = ["--prompt", "a film was good", "--max-new-tokens", "4"]
    answers = as_user(hub, tmp_path, [
        ["push", str(mine), "--private"],
        ["push", str(mine), "org/other", "--revision", "v1"],
        ["inspect", "me/yesno"],
        ["inspect", "org/other@v1"],
        ["generate", "org/base@v2", "-a", "org/other@v1", *ask],
        ["generate", str(base), "-a", str(mine), *ask],
        ["merge", "org/base@v2", "me/yesno", "-o", str(tmp_path / "merged")],
        ["inspect", "org/other@v9"],
        ["inspect", "org/nobody"],
        ["generate", "org/base@v9", *ask],
        ["combine", "me/yesno", "org/other@v1", "-o", str(tmp_path / "both"), "--how", "cat"],
    ])  # fmt: skip
    for code, output, problem in [*answers[:7], answers[10]]:
        assert code == 0, (output, problem)
    pushed = answers[0][1]
    assert "adapter_model.safetensors" in pushed
    assert "stays here: .env, checkpoints/" in pushed
    assert (
        pushed.index("stays here") < pushed.index("uploading") < pushed.index(f"uploaded: {hub.url}/me/yesno/commit/")
    )
    assert "which nobody else has" in pushed, "the base is a folder here"
    sent = hub.repos["me/yesno"]["main"]
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorakit.json",
        "README.md",
        "train.yaml",
    } <= sent.keys()
    assert not [name for name in sent if name.startswith((".env", "checkpoints")) or name == "model.safetensors"]
    assert all(data == (mine / name).read_bytes() for name, data in sent.items())
    assert hub.private == {"me/yesno"}
    assert hub.repos["org/other"]["main"] == {}, "the branch alone"
    assert hub.repos["org/other"]["v1"].keys() == sent.keys()
    assert "lora" in answers[2][1].lower()
    spoken = [answers[at][1].split()[-1] for at in (4, 5)]
    assert spoken == ["yes", "yes"], "the base and the adapter of the hub answer as those here"
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert answers[7][0] == answers[8][0] == answers[9][0] == 2
    assert "'org/other' has no revision 'v9' on the hub" in answers[7][1]
    assert "'org/nobody' is neither a folder here nor an adapter on the hub" in answers[8][1]
    assert '"org/base" has no revision "v9" on the hub' in answers[9][1]
    assert as_user(hub, tmp_path, [["push", str(mine)]], token="wrong")[0][1].endswith(
        "the token is not accepted: `hf auth login`"
    )
    hub.shutdown()


def test_private_files_are_refused_before_anything_is_sent(mine: Path, tmp_path: Path) -> None:
    card = mine / "README.md"
    card.write_text(card.read_text() + f"\nmy token is {SECRET}\n")
    with pytest.raises(LorakitError, match=r"README\.md holds what looks like a key or a token \(hf_a1B\.\.\.\)"):
        plan_upload(mine)
    card.unlink()
    (tmp_path / "elsewhere.md").write_text("private")
    card.symlink_to(tmp_path / "elsewhere.md")
    with pytest.raises(LorakitError, match=r"README\.md is a link out of the folder"):
        plan_upload(mine)
    card.unlink()
    planned = plan_upload(mine)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(planned.files)
    (mine / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(LorakitError, match="is no whole safetensors file"):
        plan_upload(mine)


def test_names_on_the_hub_are_read() -> None:
    assert read_name("org/name") == HubName("org/name")
    assert read_name("org/name@v1") == HubName("org/name", "v1")
    assert read_name("org/name/a/b@refs/pr/1") == HubName("org/name", "refs/pr/1", "a/b")
    for text in ("name", "./org/name", "org/name/a", "/org/name", "org/name@", "C:\\a\\b"):
        found = read_name(text)
        assert found is None or text == "./org/name"
    assert [HubName("o/n", "v", "a").name, HubName("o/n").name] == ["a", "n"]
