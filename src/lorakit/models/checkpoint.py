"""The weights of a model folder, read one tensor at a time, so that two large models can be compared in little memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.models.renaming import converted
from lorakit.reading import read_json, whole_tensors

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint:
    """A folder of safetensors, in one file or in shards.

    Attributes:
        folder: where it is.
        files: tensor name -> the file that holds it.
    """

    def __init__(self, folder: str | Path, verb: str) -> None:
        self.folder, self.verb = Path(folder).expanduser(), verb
        if not self.folder.is_dir():
            raise LorakitError(
                f"{verb}: {self.folder} is no folder; a model folder with config.json and safetensors is wanted."
            )
        index = self.folder / INDEX
        if index.is_file():
            try:
                names: Mapping[str, str] = dict(read_json(index, verb)["weight_map"])
            except (TypeError, ValueError, KeyError) as problem:
                if isinstance(problem, LorakitError):
                    raise
                raise LorakitError(
                    f"{verb}: {index} is no index of shards: a JSON object with weight_map is wanted."
                ) from problem
            missing = sorted({file for file in names.values() if not (self.folder / file).is_file()})
            if missing:
                raise LorakitError(f"{verb}: {index} names {missing[0]} ({len(missing)} such), which is not there.")
            self.files = {name: self.folder / file for name, file in names.items()}
        else:
            files = sorted(self.folder.glob("*.safetensors"))
            if not files:
                pickles = ", ".join(sorted(path.name for path in self.folder.glob("*.bin"))[:3])
                found = f"; it holds {pickles}, pickles, which are never read" if pickles else ""
                raise LorakitError(f"{verb}: {self.folder} holds no safetensors{found}.")
            self.files = {}
            for file in files:
                self.files.update(dict.fromkeys(self._names(file), file))

    def _names(self, file: Path) -> list[str]:
        with whole_tensors(file, self.verb), safe_open(file, framework="pt") as opened:
            return list(opened.keys())

    def read(self, name: str) -> Tensor:
        """One tensor, from the disk at each call; nothing is kept."""
        with safe_open(self.files[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor


class Named:
    """The tensors of a checkpoint, or of a model in memory, under the names of a model's parameters and buffers."""

    def __init__(self, source: Checkpoint | nn.Module, like: nn.Module) -> None:
        """`like`: the model whose names are meant; on the meta device where the weights are in a folder."""
        self.source = source
        held = source.files if isinstance(source, Checkpoint) else source.state_dict(keep_vars=False)
        self.held: Mapping[str, Any] = held
        prefix = str(getattr(like, "base_model_prefix", "") or "")
        twins: dict[int, list[str]] = {}
        for name, tensor in like.state_dict(keep_vars=True).items():
            twins.setdefault(id(tensor), []).append(name)
        self.names: dict[str, str] = {}
        """The model's name -> the source's, for what the source holds; a tied weight may be held under the other name."""
        for name, tensor in like.state_dict(keep_vars=True).items():
            for candidate in [name, *twins[id(tensor)]]:
                bare = candidate.removeprefix(f"{prefix}.")
                found = next((one for one in (candidate, bare, f"{prefix}.{candidate}") if one in held), None)
                if found is not None:
                    self.names[name] = found
                    break
        self.made, self.converted = converted(like, held) if isinstance(source, Checkpoint) else ({}, set())
        """The model's name -> what makes the tensor of those of the source, where `from_pretrained` renames or converts."""

    def __contains__(self, name: str) -> bool:
        return name in self.names or name in self.made

    def __getitem__(self, name: str) -> Tensor:
        if name in self.made and isinstance(self.source, Checkpoint):
            return self.made[name](self.source.read)
        key = self.names[name]
        return self.source.read(key) if isinstance(self.source, Checkpoint) else self.held[key].detach()

    def unnamed(self) -> list[str]:
        """What the source holds and the model has no name for."""
        used = {*self.names.values(), *self.converted}
        return [key for key in self.held if key not in used]
