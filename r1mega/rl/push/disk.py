"""A version as a Hugging Face folder, and /update_weights_from_disk: no path between trainer and servers but a file system.

Files are written under a hidden name, a bucket each, and the folder gets its name when it is whole; servers never see half a
version. Older versions go once the servers have taken the new one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from r1mega.config.errors import UserError
from r1mega.rl.push.choices import DiskPush
from r1mega.rl.push.contract import PushRuntime
from r1mega.rl.push.hashing import content_hash
from r1mega.rl.push.wire import Bucket, Format
from r1mega.train.convert.disk import sync
from r1mega.train.convert.shards import NAMES, PublishedFolder, ShardWriter, write_index

if TYPE_CHECKING:
    from r1mega.rl.engine.sglang.client import Server
    from r1mega.rl.push.update import Fleet

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


class ByDisk:
    """See :class:`r1mega.rl.push.update.Way`."""

    tight, needs_session = False, False

    def __init__(self, choice: DiskPush, runtime: PushRuntime):
        if not choice.folder and runtime.folder is None:
            raise UserError("push.folder: where versions are written; got none; give a folder that the servers see")
        self.choice, self.runtime = choice, runtime
        self.folder = Path(choice.folder) if choice.folder else Path(runtime.folder)
        self.fleet: Fleet | None = None

    def device(self, servers: list[Server]) -> torch.device:
        """Files are written from host memory."""
        return torch.device("cpu")

    def open(self, fleet: Fleet, form: Format, version: int) -> None:
        """An empty folder under a hidden name."""
        self.fleet, self._form = fleet, form
        self._target = self.folder.absolute() / f"version-{version}"
        self._partial = self._target.with_name(f".{self._target.name}.partial")
        self._where: dict[str, str] = {}
        self._size = 0
        try:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"push.folder: can be written; got {self.folder} ({error.strerror}); give another") from error

    def deliver(self, bucket: Bucket) -> None:
        """Write one file."""
        file = f"model-{len(set(self._where.values())) + 1:05d}.safetensors"
        entries = [(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in bucket.pairs]
        with ShardWriter(self._partial / file, entries) as writer:
            for name, tensor in bucket.pairs:
                writer.write(name, tensor)
            writer.close()
        self._where |= dict.fromkeys(bucket.names, file)
        self._size += bucket.memory.numel()

    def finish(self) -> None:
        """Name the folder, and have every server read it."""
        write_index(self._partial, self._where, self._size)
        (self._partial / "config.json").write_text(json.dumps(self._config(), indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(self._target, ignore_errors=True)
        self._partial.rename(self._target)
        sync(self._target.parent)
        self.fleet.post("/update_weights_from_disk", {"model_path": str(self._target), "load_format": "auto", "flush_cache": False})
        for old in self.versions()[: -self.choice.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def versions(self) -> list[Path]:
        """Folders that are whole, oldest first by number; the one just written counts as newest."""
        found = [path for path in self.folder.absolute().glob("version-*") if path.name.removeprefix("version-").isdigit()]
        return sorted(found, key=lambda path: (path == self._target, int(path.name.removeprefix("version-"))))

    def reread(self, names: list[str]) -> dict[str, str]:
        """The content's hash of tensors in the files."""
        files = PublishedFolder(self._target)
        return {name: content_hash(files.read(name)) for name in names if name in files.entries}

    def abandon(self) -> None:
        """What is half written goes."""
        if self.fleet is not None:
            shutil.rmtree(self._partial, ignore_errors=True)

    def close(self) -> None:
        """Versions stay: a server that is started again may read them."""

    def _config(self) -> dict:
        config = {key: value for key, value in self.runtime.hf_config.items() if key != "quantization_config"}
        name = str(self._form.dtype).removeprefix("torch.")
        config |= {"dtype": name, "torch_dtype": name}
        if self._form.fp8:
            config["quantization_config"] = FP8 | ({"scale_fmt": "ue8m0"} if self._form.fp8 == "ue8m0" else {})
        return config
