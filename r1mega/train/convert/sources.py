"""A checkpoint that is read: Hugging Face's or ours, with everything in it accounted for before the first tensor is loaded.

Both kinds give the model, its parts (:class:`r1mega.model.names.Part`) and each part's numbers as a :class:`Piece`. Raises
UserError, naming the tensor, for what is missing, too much, of another shape or dtype than the config says, or other than a ledger
beside it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from r1mega.config.errors import UserError
from r1mega.config.model import ModelConfig
from r1mega.model.names import DERIVED, SCALE, Part, native_shapes, parts
from r1mega.model.published import model_of
from r1mega.train import manifest
from r1mega.train.convert.native import NativeFolder
from r1mega.train.convert.shards import NAMES, PublishedFolder

LEDGER = "ledger.json"
OWN = "source"
"""Folder of a converted native checkpoint: what the published one had besides weights."""
SCALES, KEPT_DERIVED = "scales.safetensors", "derived.safetensors"
"""There: an FP8 checkpoint's scales, and tensors that the config determines."""
SMALL_BYTES = 64 << 20
"""A published checkpoint's files up to this size, but for weights, go with it."""
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
HEAD = "lm_head.weight"
"""Of a tied model, where its file repeats the embedding."""
LARGEST_TOLD = 3


@dataclass(frozen=True)
class Piece:
    """One part's numbers. ``value``: as stored, of the published shape; ``scale``: of an FP8 payload, fp32 ``[O/128, I/128]``.

    ``records``: by name, what was read: dtype, shape, sha256, and the file.
    """

    value: torch.Tensor
    scale: torch.Tensor | None
    records: dict[str, dict[str, Any]]


def sha256(tensor: torch.Tensor) -> str:
    """Of a contiguous tensor's bytes."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()


def region_name(part: Part, whole: tuple[int, ...]) -> str:
    """A region of a native tensor in the ledger: its key, with the offset where it is not all of it."""
    return part.key if part.extent == whole else f"{part.key}@{','.join(map(str, part.start))}"


def told(names: list[str]) -> str:
    """The first few of ``names`` and how many there are."""
    return ", ".join(names[:LARGEST_TOLD]) + (f" and {len(names) - LARGEST_TOLD} more" if len(names) > LARGEST_TOLD else "")


class PublishedSource:
    """A Hugging Face folder. ``allow_mixed``: take tensors of another dtype than its config says."""

    format = "hf"

    def __init__(self, path: Path, *, allow_mixed: bool = False):
        self.path, self.config = path, read_json(path / "config.json")
        self.model: ModelConfig = model_of(self.config, str(path / "config.json"))
        self.folder = PublishedFolder(path)
        entries = self.folder.entries
        self.quantization = self.config.get("quantization_config")
        known = parts(self.model, tied_head=HEAD in entries)
        self.parts = [part for part in known if not part.copy or part.name in entries]
        self.derived = sorted(name for name in entries if DERIVED.search(name))
        self._check(entries, allow_mixed)
        self.ledger = Ledgered.beside(path / LEDGER, "target")

    @property
    def largest_bytes(self) -> int:
        """Of one file."""
        return self.folder.largest_file_bytes

    @property
    def tensor_names(self) -> set[str]:
        """All that a conversion has to read."""
        return set(self.folder.entries)

    @property
    def layout(self) -> dict[str, str]:
        """Tensor to file, in the order of the files."""
        ordered = sorted(self.folder.entries.values(), key=lambda entry: (str(entry.file), entry.offset))
        return {entry.name: Path(entry.file).name for entry in ordered}

    def _check(self, entries: dict[str, Any], allow_mixed: bool) -> None:
        scaled = {part.name for part in self.parts if self.quantization and part.role == "linear"}
        wanted = {part.name for part in self.parts} | {name + SCALE for name in scaled}
        missing, extra = sorted(wanted - entries.keys()), sorted(entries.keys() - wanted - set(self.derived))
        for word, names in (("without", missing), ("with", extra)):
            if names:
                raise UserError(
                    f"source {self.path}: holds exactly the tensors of its config.json; got one {word} {told(names)}; "
                    "fetch it again, or mend config.json"
                )
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if named is not None and named not in [*STATED]:
            raise UserError(
                f"{self.path / 'config.json'}: dtype: one of {', '.join(STATED)}; got {named}; give the checkpoint's own file"
            )
        stated = STATED.get(named) if named else None
        for part in self.parts:
            entry = entries[part.name]
            if tuple(entry.shape) != part.shape:
                raise UserError(
                    f"source {self.path}: {part.name} has the shape {list(part.shape)} of config.json; got {list(entry.shape)}; "
                    "take the config.json that belongs to these files"
                )
            right = self._dtypes(part, stated, scaled)
            if entry.dtype not in right and not (allow_mixed and entry.dtype in STATED.values()):
                ways = "convert.allow_mixed=true takes it as it is" if entry.dtype in STATED.values() else "fetch it again"
                raise UserError(f"source {self.path}: {part.name} is {' or '.join(right)}; got {entry.dtype}; {ways}")
            if part.name in scaled:
                scale = entries[part.name + SCALE]
                blocks = [-(-size // 128) for size in part.shape]
                if scale.dtype != "F32" or list(scale.shape) != blocks:
                    raise UserError(
                        f"source {self.path}: {part.name}{SCALE} is F32 {blocks}, a scale a block of 128x128; got {scale.dtype} "
                        f"{list(scale.shape)}; fetch it again"
                    )

    @staticmethod
    def _dtypes(part: Part, stated: str | None, scaled: set[str]) -> tuple[str, ...]:
        if part.name in scaled:
            return ("F8_E4M3",)
        usual = (stated,) if stated else tuple(dict.fromkeys(STATED.values()))
        return tuple(dict.fromkeys((*usual, "F32"))) if part.role == "bias" else usual

    def dtype(self, part: Part) -> str:
        """As stored."""
        return self.folder.entries[part.name].dtype

    def stored_name(self, part: Part) -> str:
        """As the ledger names what is read."""
        return part.name

    def bias_dtype(self, part: Part) -> str:
        """What a published copy of this source stores a bias in."""
        return self.dtype(part)

    def record(self, name: str, tensor: torch.Tensor) -> dict[str, Any]:
        """What the ledger says of one stored tensor; checks it against a ledger that lies beside it."""
        entry = self.folder.entries[name]
        found = {"dtype": entry.dtype, "shape": list(entry.shape), "sha256": sha256(tensor), "file": Path(entry.file).name}
        self.ledger.check(name, found["sha256"], str(self.path))
        return found

    def read(self, part: Part) -> Piece:
        """A part's numbers. Thread-safe."""
        value = self.folder.read(part.name)
        records = {part.name: self.record(part.name, value)}
        scale = None
        if value.dtype == torch.float8_e4m3fn:
            scale = self.folder.read(part.name + SCALE)
            records[part.name + SCALE] = self.record(part.name + SCALE, scale)
        return Piece(value, scale, records)

    def kept_scale(self, part: Part) -> torch.Tensor | None:
        """None: whatever scales there are come with :meth:`read`."""
        return None

    def read_derived(self, name: str) -> tuple[torch.Tensor, dict[str, dict[str, Any]]]:
        """A tensor that the config determines, as stored."""
        value = self.folder.read(name)
        return value, {name: self.record(name, value)}

    def identity(self) -> dict[str, Any]:
        """What must be the same for a conversion to go on."""
        files = sorted({str(entry.file) for entry in self.folder.entries.values()})
        stats = {Path(file).name: [Path(file).stat().st_size, Path(file).stat().st_mtime_ns] for file in files}
        return {"format": "hf", "path": str(self.path.resolve()), "files": stats, "config": self.config}

    def digest(self) -> str:
        """sha256 over the index, that is names, shapes, dtypes and places, and the config: cheap, and not over the weights."""
        rows = [[entry.name, entry.dtype, list(entry.shape), Path(entry.file).name] for entry in self.folder.entries.values()]
        return hashlib.sha256(json.dumps([sorted(rows), self.config], sort_keys=True).encode()).hexdigest()

    @property
    def other_bytes(self) -> int:
        """Of what goes along beside the weights."""
        scales = sum(entry.nbytes for name, entry in self.folder.entries.items() if name.endswith(SCALE))
        return scales + sum(path.stat().st_size for path in self.small_files())

    def small_files(self) -> Iterator[Path]:
        """All that is no weight: config, tokenizer, the model's own code and card. Below the folder, at most SMALL_BYTES each."""
        for path in sorted(self.path.rglob("*")):
            inside = path.relative_to(self.path)
            hidden = any(name.startswith(".") for name in inside.parts)
            ours = inside.as_posix() in (LEDGER, "r1mega.json")
            if (
                path.is_file()
                and not hidden
                and not ours
                and not path.name.endswith(WEIGHTS)
                and path.stat().st_size <= SMALL_BYTES
            ):
                yield path


STATED = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}
"""A config's dtype to safetensors'."""


class NativeSource:
    """A checkpoint of ours, whatever layout wrote it; of a training's the weights alone are read."""

    format = "native"

    def __init__(self, path: Path):
        self.path = manifest.resolve(path)
        self.state = manifest.read_state(self.path)
        self.model: ModelConfig = manifest.read_model(self.path)
        self.shapes = native_shapes(self.model)
        self.folder = NativeFolder(self.path / "weights")
        self.own = self.path / OWN
        self._opened: dict[str, Any] = {}
        self._lock = threading.Lock()
        self.ledger = Ledgered.beside(self.own / LEDGER, "target")
        self.origin = Ledgered.beside(self.own / LEDGER, "source")
        entries = {key: entry for key, entry in self.folder.entries.items() if not key.startswith("optimizer.")}
        missing, extra = sorted(self.shapes.keys() - entries.keys()), sorted(entries.keys() - self.shapes.keys())
        for word, names in (("without", missing), ("with", extra)):
            if names:
                raise UserError(
                    f"source {self.path}: holds exactly this model's tensors; got one {word} {told(names)}; "
                    "take one that this version of r1mega wrote"
                )
        for key, (shape, _) in entries.items():
            if tuple(shape) != self.shapes[key]:
                raise UserError(
                    f"source {self.path}: {key} has the shape {list(self.shapes[key])} of state.json; got {list(shape)}; "
                    "take one that this version of r1mega wrote"
                )
        manifest.verify(self.path, weights=not self.ledger)  # a ledger has each tensor's hash, which reading checks
        self.parts = parts(self.model, tied_head=HEAD in self.origin.tensors)
        self.quantization = (read_json(self.own / "config.json") if self.origin else {}).get("quantization_config")
        self.derived = sorted(name for name in self.origin.tensors if DERIVED.search(name))

    @property
    def largest_bytes(self) -> int:
        """Of one file."""
        return max((file.stat().st_size for file in (self.path / "weights").glob("*.distcp")), default=0)

    @property
    def tensor_names(self) -> set[str]:
        """All that a conversion has to read."""
        return {self.stored_name(part) for part in self.parts if not part.copy}

    @property
    def layout(self) -> dict[str, str]:
        """Published tensor to file, as the published source had it; empty for a checkpoint of a training."""
        return {name: entry["file"] for name, entry in self.origin.tensors.items()}

    def dtype(self, part: Part) -> str:
        """As stored."""
        return NAMES[self.folder.entries[part.key][1]]

    def stored_name(self, part: Part) -> str:
        """As the ledger names what is read."""
        return region_name(part, self.shapes[part.key])

    def bias_dtype(self, part: Part) -> str:
        """What a published copy of this source stores a bias in: what it once was, else fp32 as V3's own code has it."""
        return self.origin.tensors.get(part.name, {}).get("dtype", "F32")

    def read(self, part: Part) -> Piece:
        """A part's numbers. Thread-safe."""
        value = self.folder.read(part.key, part.start, part.extent).reshape(part.shape)
        name = self.stored_name(part)
        record = {"dtype": NAMES[value.dtype], "shape": list(part.shape), "sha256": sha256(value), "file": "weights"}
        self.ledger.check(name, record["sha256"], str(self.path))
        return Piece(value, None, {name: record})

    def _kept(self, name: str) -> Callable[[str], torch.Tensor]:
        """Reads a tensor of a file in ``source/``, which is opened once: its header may have tens of thousands of lines."""
        from safetensors import SafetensorError, safe_open

        file = self.own / name
        with self._lock:
            try:
                opened = self._opened.get(name) or self._opened.setdefault(name, safe_open(file, "pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file}: a safetensors file; got {error}; convert again") from error

        def get(tensor: str) -> torch.Tensor:
            try:
                with self._lock:
                    return opened.get_tensor(tensor)
            except SafetensorError as error:
                raise UserError(f"{file}: holds {tensor}; got {error}; convert again") from error

        return get

    def kept_scale(self, part: Part) -> torch.Tensor | None:
        """The scales that the published source had for this part."""
        name = part.name + SCALE
        if name not in self.origin.tensors or not (self.own / SCALES).is_file():
            return None
        scale = self._kept(SCALES)(name)
        self.origin.check(name, sha256(scale), str(self.own / SCALES))
        return scale

    def read_derived(self, name: str) -> tuple[torch.Tensor, dict[str, dict[str, Any]]]:
        """A tensor that the config determines, as the published source had it."""
        value = self._kept(KEPT_DERIVED)(name)
        self.origin.check(name, sha256(value), str(self.own / KEPT_DERIVED))
        return value, {
            f"{OWN}/{KEPT_DERIVED}:{name}": {"dtype": NAMES[value.dtype], "shape": list(value.shape), "sha256": sha256(value)}
        }

    def identity(self) -> dict[str, Any]:
        """What must be the same for a conversion to go on."""
        return {"format": "native", "path": str(self.path.resolve()), "digest": self.digest()}

    def digest(self) -> str:
        """The checkpoint's identity."""
        return manifest.digest(self.path)

    @property
    def other_bytes(self) -> int:
        """Of what goes along beside the weights."""
        return sum(path.stat().st_size for path in self.small_files())

    def small_files(self) -> Iterator[Path]:
        """What the published source had besides weights."""
        ours = (LEDGER, SCALES, KEPT_DERIVED)
        if self.own.is_dir():
            yield from (path for path in sorted(self.own.rglob("*")) if path.is_file() and path.name not in ours)


class Ledgered:
    """One side of a ledger that lies beside a source: tensor to what it must be. Empty without one."""

    def __init__(self, tensors: dict[str, dict[str, Any]]):
        self.tensors = tensors
        self._by_hash: dict[str, str] = {}

    @classmethod
    def beside(cls, path: Path, side: str) -> Ledgered:
        """From a file; ``side``: source or target."""
        if not path.is_file():
            return cls({})
        try:
            tensors = read_json(path)[side]["tensors"]
            if not all(isinstance(entry["sha256"], str) for entry in tensors.values()):
                raise TypeError
            return cls(tensors)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: a ledger of r1mega convert; got another file of that name; convert again, or remove it"
            ) from error

    def __bool__(self) -> bool:
        return bool(self.tensors)

    def check(self, name: str, found: str, where: str) -> None:
        """Raise UserError where the tensor ``name`` is another than the ledger says; it says whose numbers these are, if any's."""
        if not self.tensors:
            return
        wanted = self.tensors.get(name, {}).get("sha256")
        if wanted == found:
            return
        self._by_hash = self._by_hash or {entry["sha256"]: other for other, entry in self.tensors.items()}
        other = self._by_hash.get(found)
        got = f"the content of {other}" if other else "other content"
        raise UserError(f"source {where}: {name} is what its {LEDGER} says; got {got}; fetch or convert it again")


def open_source(path: Path, *, allow_mixed: bool = False) -> PublishedSource | NativeSource:
    """Recognise a checkpoint's format. Raises UserError where it has none."""
    if (path / "config.json").is_file():
        return PublishedSource(path, allow_mixed=allow_mixed)
    if not (path / manifest.MANIFEST).is_file() and not manifest.latest(path) and not manifest.latest(path / "checkpoints"):
        raise UserError(
            "source: a Hugging Face folder (config.json, *.safetensors) or a checkpoint of r1mega (manifest.json); "
            f"got {path} with neither; check the path"
        )
    return NativeSource(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: a readable JSON file; got {type(error).__name__} {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object; got {type(value).__name__}; fetch it again")
    return value
