"""Megatron's format without Megatron: what it wrote is read, by any region; what is written it reads, under other layouts too."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from r1mega.config.errors import UserError
from r1mega.train import checkpoint, manifest
from r1mega.train.checkpoint import plain_tensors
from r1mega.train.convert import native, records
from r1mega.train.convert.native import Chunk, NativeFile, NativeFolder, extra_states, write_metadata
from r1mega.train.trainee import Trainee
from tests.train.cases import MODEL, OPTIM, one_rank

EXPERTS, ROWS, WIDTH = 4, 6, 5
WHOLE = {
    "layers.0.linear_fc1.weight": (8, 6),
    "layers.0.norm.weight": (7,),
    "layers.0.mlp.experts.weight1": (EXPERTS, 2 * ROWS, WIDTH),
    "scalar": (),
}


def tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return {key: torch.randn(shape).to(dtype) for key, shape in WHOLE.items()}


def cut(key: str, value: torch.Tensor) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """The chunks of a tensor: quarters of the matrix, gate and up of each expert, else all of it."""
    if key == "layers.0.linear_fc1.weight":
        return [((row, column), value[row : row + 4, column : column + 3]) for row in (4, 0) for column in (0, 3)]
    if key == "layers.0.mlp.experts.weight1":
        pairs = itertools.product(range(EXPERTS), (0, ROWS))
        return [((expert, row, 0), value[expert : expert + 1, row : row + ROWS]) for expert, row in pairs]
    return [((0,) * value.dim(), value)]


def write(folder: Path, content: dict[str, torch.Tensor], files: int = 2, **more) -> list[tuple[str, Chunk]]:
    """A weights folder of ``content``, its chunks over ``files`` files in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks, outs = [], [NativeFile(folder / f"__{rank}_0.distcp") for rank in range(files)]
    parts = [(key, start, part) for key, value in content.items() for start, part in cut(key, value)]
    for number, (key, start, part) in enumerate(parts):
        chunks.append((f"__{number % files}_0.distcp", outs[number % files].add(key, start, part)))
    for rank, out in enumerate(outs):
        raw_bytes, digest = out.close()
        raw = (folder / f"__{rank}_0.distcp").read_bytes()
        assert (raw_bytes, digest) == (len(raw), hashlib.sha256(raw).hexdigest())
    chunks = [(file, Chunk(**json.loads(json.dumps(asdict(chunk))))) for file, chunk in chunks]  # as a journal keeps them
    write_metadata(folder, {key: tuple(value.shape) for key, value in content.items()}, chunks, **more)
    return chunks


def regions(shape: tuple[int, ...], count: int = 40):
    """Random ones, the whole, and empty ones."""
    torch.manual_seed(0)
    for _ in range(count):
        start = tuple(int(torch.randint(0, size, ())) for size in shape)
        yield start, tuple(int(torch.randint(0, size - at + 1, ())) for at, size in zip(start, shape, strict=True))
    yield (0,) * len(shape), shape


def slices(start, extent) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(start, extent, strict=True))


def check_regions(folder: NativeFolder, content: dict[str, torch.Tensor]) -> None:
    for key, value in content.items():
        assert folder.entries[key] == (tuple(value.shape), value.dtype)
        assert torch.equal(folder.read(key), value), key
        for start, extent in regions(tuple(value.shape)):
            found = folder.read(key, start, extent)
            assert found.is_contiguous() and found.dtype == value.dtype
            assert torch.equal(found, value[slices(start, extent)]), (key, start, extent)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn, torch.bool])
def test_any_region_of_any_chunks(tmp_path: Path, dtype: torch.dtype) -> None:
    content = tensors(dtype)
    write(tmp_path, content)
    folder = NativeFolder(tmp_path)
    if dtype == torch.float8_e4m3fn:  # torch compares no FP8
        assert all(torch.equal(folder.read(key).float(), value.float()) for key, value in content.items())
    else:
        check_regions(folder, content)
    plain = [numbers is not None for numbers in folder._numbers.values()]
    assert all(plain) if dtype != torch.float8_e4m3fn else not any(plain), "FP8 is left to torch.load, all else is found"


def test_torch_reads_it(tmp_path: Path) -> None:
    from torch.distributed import checkpoint as dcp

    content = tensors()
    write(tmp_path / "weights", content)
    found = {key: torch.zeros_like(value) for key, value in content.items()}
    dcp.load(found, storage_reader=dcp.FileSystemReader(str(tmp_path / "weights")), no_dist=True)
    ours = plain_tensors(tmp_path)
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[key], value) and torch.equal(ours[key], value) for key, value in content.items())


def test_each_chunk_is_what_torch_saves(tmp_path: Path) -> None:
    content = tensors()
    chunks = write(tmp_path, content)
    options = torch.serialization.get_crc32_options()
    for file, chunk in chunks:
        raw = (tmp_path / file).read_bytes()[chunk.offset : chunk.offset + chunk.length]
        expected = content[chunk.key][slices(chunk.start, chunk.extent)].clone()
        buffer = io.BytesIO()
        torch.save(expected, buffer)
        assert len(raw) == len(buffer.getvalue()), "no storage of a view, nothing between"
        for mapped in (None, "cpu"):
            assert torch.equal(torch.load(io.BytesIO(raw), map_location=mapped, weights_only=True), expected)
    assert options is True and torch.serialization.get_crc32_options() is True


def test_the_checksum_switch_goes_back_when_the_last_thread_leaves() -> None:
    with native.without_crc():
        with native.without_crc():
            assert torch.serialization.get_crc32_options() is False
        assert torch.serialization.get_crc32_options() is False
    assert torch.serialization.get_crc32_options() is True
    torch.serialization.set_crc32_options(False)
    try:
        with native.without_crc():
            pass
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)


def test_megatron_reads_it_whole_and_split(tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    one_rank()
    content = tensors()
    write(tmp_path, content)
    fc1, experts = content["layers.0.linear_fc1.weight"], content["layers.0.mlp.experts.weight1"]

    def empty(key: str, shape: tuple[int, ...], *offsets) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(key, torch.zeros(shape, dtype=torch.bfloat16), *offsets, replica_id=0)

    asked = {
        "whole": empty("layers.0.linear_fc1.weight", (8, 6)),
        "lower": empty("layers.0.linear_fc1.weight", (4, 6), (0, 1, 2)),  # a column parallel layer's second rank of two
        "right": empty("layers.0.linear_fc1.weight", (8, 2), (1, 2, 3)),  # a row parallel layer's last rank of three
        "two": empty("layers.0.mlp.experts.weight1", (2, 2 * ROWS, WIDTH), (0, 1, 2)),  # two expert ranks
        "norm": empty("layers.0.norm.weight", (7,)),
        "state": ShardedObject("layers.0.linear_fc1._extra_state", None, (1,), (0,), replica_id=0),
    }
    found = dist_checkpointing.load(asked, str(tmp_path), validate_access_integrity=False)
    assert torch.equal(found["whole"], fc1) and torch.equal(found["lower"], fc1[4:]) and torch.equal(found["right"], fc1[:, 4:])
    assert torch.equal(found["two"], experts[2:]) and torch.equal(found["norm"], content["layers.0.norm.weight"])
    assert found["state"] is None
    assert dist_checkpointing.load_content_metadata(str(tmp_path)) == native.CONTENT
    loaded = dist_checkpointing.load_plain_tensors(str(tmp_path))
    assert all(torch.equal(loaded[key], value) for key, value in content.items())


def test_what_megatron_wrote_in_pieces_is_read(tmp_path: Path) -> None:
    """Megatron's shards, planner and torch's writer; its own writer would start a process."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
    from torch.distributed import checkpoint as dcp

    one_rank()
    fc1, experts = torch.randn(8, 6), torch.randn(EXPERTS, 2 * ROWS, WIDTH)
    cuts = {
        "rows": [(fc1[:4], (0, 0, 2)), (fc1[4:], (0, 1, 2))],
        "cols": [(fc1[:, 2 * at : 2 * at + 2], (1, at, 3)) for at in range(3)],
        "ex": [(experts[at : at + 1], (0, at, EXPERTS)) for at in range(EXPERTS)],
    }
    shards = {key: [ShardedTensor.from_rank_offsets(key, part.clone(), at) for part, at in parts] for key, parts in cuts.items()}
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    dcp.save(mcore_to_pyt_state_dict(shards), checkpoint_id=tmp_path, planner=planner, no_dist=True)
    metadata(tmp_path, lambda m: m.__dict__.update(storage_meta=None))  # names pathlib, which is not let through
    check_regions(NativeFolder(tmp_path), {"rows": fc1, "cols": fc1, "ex": experts})


def test_the_small_files_are_megatrons(seed_run: Path, tmp_path: Path) -> None:
    theirs = checkpoint.resolve(seed_run) / "weights"
    write(tmp_path, tensors())
    assert json.loads((tmp_path / "metadata.json").read_text()) == json.loads((theirs / "metadata.json").read_text())
    common = [torch.load(folder / "common.pt", weights_only=False) for folder in (theirs, tmp_path)]
    assert common[0].keys() == {"content_metadata", "optimizer"} and common[1] == {
        "content_metadata": common[0]["content_metadata"]
    }
    left, right = (pickle.loads((folder / ".metadata").read_bytes()) for folder in (theirs, tmp_path))
    assert vars(left).keys() - vars(right).keys() <= {"all_local_plans"}, "what Megatron keeps for its own next save"
    assert (left.version, left.planner_data) == (right.version, right.planner_data)
    assert not hasattr(left, "mcore_data") and type(left.storage_meta) is type(right.storage_meta)
    norm = "decoder.final_layernorm.weight", "layers.0.norm.weight"
    ours, other = left.state_dict_metadata[norm[0]], right.state_dict_metadata[norm[1]]
    assert (type(ours), type(ours.chunks[0])) == (type(other), type(other.chunks[0]))
    assert vars(ours.properties) | {"dtype": torch.bfloat16} == vars(other.properties)
    places = [
        next(place for index, place in part.storage_data.items() if index.fqn == key)
        for part, key in zip((left, right), norm, strict=True)
    ]
    assert vars(places[0]).keys() == vars(places[1]).keys()


def test_the_objects_are_those_of_a_real_checkpoint(seed_run: Path) -> None:
    folder = NativeFolder(checkpoint.resolve(seed_run) / "weights")
    weights = {key: shape for key, (shape, _) in folder.entries.items() if not key.startswith("optimizer.")}
    assert sorted(extra_states(weights)) == folder.objects and len(folder.objects) == 22
    assert all(torch.load(io.BytesIO(folder.read_object(key)), weights_only=False) == [None] for key in folder.objects)
    with pytest.raises(UserError, match="has the object unknown; got 22 others"):
        folder.read_object("unknown")


def test_a_real_checkpoint(seed_run: Path) -> None:
    path = checkpoint.resolve(seed_run)
    folder, wanted = NativeFolder(path / "weights"), plain_tensors(path)
    assert folder.entries.keys() == wanted.keys() and any(key.startswith("optimizer.") for key in wanted)
    assert all(torch.equal(folder.read(key), value) for key, value in wanted.items())
    assert all(numbers is not None for numbers in folder._numbers.values()), "torch.load was never needed"


def test_a_copy_is_a_checkpoint_again(seed_run: Path, tmp_path: Path) -> None:
    """Every tensor through both classes, in chunks by the first axis; r1mega loads it with its optimizer and goes on from there."""
    source, target = checkpoint.resolve(seed_run), tmp_path / "step-00000001"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("weights", "manifest.json"))
    (target / "weights").mkdir()
    folder, chunks = NativeFolder(source / "weights"), []
    with NativeFile(target / "weights" / "__0_0.distcp") as out:
        for key, (shape, _) in folder.entries.items():
            middle = shape[0] // 2
            for low, high in ((0, middle), (middle, shape[0])):
                start, extent = (low, *[0] * (len(shape) - 1)), (high - low, *shape[1:])
                chunks.append(("__0_0.distcp", out.add(key, start, folder.read(key, start, extent))))
        out.close()
    common = torch.load(source / "weights" / "common.pt", weights_only=False)
    shapes = {key: shape for key, (shape, _) in folder.entries.items()}
    write_metadata(target / "weights", shapes, chunks, {"optimizer": common["optimizer"]}, folder.objects)
    manifest.write(target, manifest.hashes(target))
    loaded = []
    for path in (source, target):
        trainee = Trainee(MODEL, OPTIM, one_rank(), "fp32")
        assert checkpoint.load(trainee, path).step == 1
        moments = [value["exp_avg"] for part in trainee.optimizer.chained_optimizers for value in part.optimizer.state.values()]
        loaded.append((dict(trainee.named_tensors()), moments))
    (left, left_moments), (right, right_moments) = loaded
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert left_moments and all(torch.equal(ours, other) for ours, other in zip(left_moments, right_moments, strict=True))


def test_weights_alone_are_enough_to_start_from(seed_run: Path, tmp_path: Path) -> None:
    """As a converter writes: no moments, and the objects by themselves."""
    source, target = checkpoint.resolve(seed_run), tmp_path / "step-00000001"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("weights", "manifest.json"))
    folder = NativeFolder(source / "weights")
    content = {key: folder.read(key) for key in folder.entries if not key.startswith("optimizer.")}
    write(target / "weights", content, files=1)
    manifest.write(target, manifest.hashes(target))
    left, right = (Trainee(MODEL, OPTIM, one_rank(), "fp32") for _ in range(2))
    checkpoint.load(left, source, weights_only=True)
    checkpoint.load(right, target, weights_only=True)
    wanted = dict(left.named_tensors())
    assert all(torch.equal(value, wanted[name]) for name, value in right.named_tensors())


def test_what_is_not_plain_is_left_to_torch(tmp_path: Path) -> None:
    """A chunk that lies turned on its storage."""
    from torch.distributed import checkpoint as dcp

    whole = torch.arange(24.0).view(4, 6)
    dcp.save({"turned": whole.t(), "straight": whole}, checkpoint_id=tmp_path, no_dist=True)
    metadata(tmp_path, lambda m: m.__dict__.update(storage_meta=None))  # names pathlib, which is not let through
    folder = NativeFolder(tmp_path)
    assert torch.equal(folder.read("turned", (1, 1), (3, 2)), whole.t()[1:4, 1:3])
    assert torch.equal(folder.read("straight"), whole)
    assert sorted(numbers is not None for numbers in folder._numbers.values()) == [False, True]


@pytest.mark.parametrize(
    "value, dtype",
    [
        (torch.arange(24.0).view(4, 6)[1:], torch.float32),  # a view: the whole storage is in the file
        (torch.arange(24.0).view(6, 4).t(), torch.float32),
        (torch.arange(24.0).view(4, 6), torch.int32),
        ([torch.arange(24.0).view(4, 6)], torch.float32),
        ({"a": 1}, torch.float32),
    ],
)
def test_numbers_are_found_in_plain_archives_alone(tmp_path: Path, value, dtype) -> None:
    def found(saved, shape, dtype):
        torch.save(saved, tmp_path / "x")
        with (tmp_path / "x").open("rb") as file:
            return records.numbers_of(records.View(file.fileno(), 0, (tmp_path / "x").stat().st_size), shape, dtype)

    plain = torch.arange(24.0).view(4, 6)
    at = found(plain, (4, 6), torch.float32)
    assert (tmp_path / "x").read_bytes()[at : at + 96] == plain.numpy().tobytes()
    assert found(value, tuple(value.shape) if isinstance(value, torch.Tensor) else (4, 6), dtype) is None
    assert found(plain, (6, 4), torch.float32) is None


def test_many_threads_read_and_write(tmp_path: Path) -> None:
    content = {f"layers.{number}.norm.weight": torch.randn(1 << 14) for number in range(24)}
    tmp_path.joinpath("w").mkdir()

    def one(rank: int) -> list[tuple[str, Chunk]]:
        name = f"__{rank}_0.distcp"
        with NativeFile(tmp_path / "w" / name) as out:
            chunks = [(name, out.add(key, (0,), value)) for key, value in list(content.items())[rank::4]]
            out.close()
        return chunks

    with ThreadPoolExecutor(4) as pool:
        chunks = [chunk for part in pool.map(one, range(4)) for chunk in part]
        write_metadata(tmp_path / "w", {key: (1 << 14,) for key in content}, chunks)
        folder = NativeFolder(tmp_path / "w")
        found = list(
            pool.map(lambda number: (key := f"layers.{number % 24}.norm.weight", folder.read(key, (number,), (99,))), range(300))
        )
    assert all(torch.equal(value, content[key][number : number + 99]) for number, (key, value) in enumerate(found))
    assert torch.serialization.get_crc32_options() is True


def test_the_same_chunks_make_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, tensors())
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == [".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp", "common.pt", "metadata.json"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def change(chunk: Chunk, **fields) -> Chunk:
    return Chunk(**{**asdict(chunk), **fields})


def test_chunks_that_do_not_fit_are_refused_by_key(tmp_path: Path) -> None:
    chunks = write(tmp_path, tensors())
    shapes, (file, first) = dict(WHOLE), chunks[0]
    assert first.key == "layers.0.linear_fc1.weight" and first.start == (4, 0)
    for wrong, says in [
        (chunks[1:], r"whole of layers.0.linear_fc1.weight in one dtype; got 36 of 48 numbers"),
        (
            [(file, change(first, start=(3, 0))), *chunks[1:]],
            r"linear_fc1.weight .*; got two that overlap, at \[3, 0\] and at \[0, 0\]",
        ),
        ([*chunks, chunks[0]], r"linear_fc1.weight .*; got two that overlap, at \[4, 0\] and at \[4, 0\]"),
        (
            [(file, change(first, start=(5, 0))), *chunks[1:]],
            r"linear_fc1.weight .*; got one of \[4, 3\] from \[5, 0\] on in \[8, 6\]",
        ),
        ([(file, change(first, start=(5,))), *chunks[1:]], r"linear_fc1.weight .*; got one of 2 axes in \[8, 6\]"),
        ([(file, change(first, dtype="float32")), *chunks[1:]], r"linear_fc1.weight in one dtype; got dtypes bfloat16, float32"),
        ([chunk for chunk in chunks if chunk[1].key != "scalar"], "whole of scalar in one dtype; got none"),
        ([*chunks, (file, change(first, key="other"))], "every chunk is of one of the model's tensors; got other in __0_0.distcp"),
    ]:
        with pytest.raises(UserError, match=says):
            write_metadata(tmp_path, shapes, wrong)


def metadata(folder: Path, change) -> None:
    path = folder / ".metadata"
    value = pickle.loads(path.read_bytes())
    change(value)
    path.write_bytes(pickle.dumps(value))


def test_damage_is_named_by_key_and_file(tmp_path: Path) -> None:
    key = "layers.0.linear_fc1.weight"
    chunks = write(tmp_path / "w", tensors())
    for number, (damage, says) in enumerate(
        [
            (lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp: the file can be read; got No such file"),
            (
                lambda f: (f / "__0_0.distcp").write_bytes(b"x" * 50),
                rf"__0_0.distcp: has \d+ bytes of {key} from byte 0 on; got a file that is cut",
            ),
            (
                lambda f: (f / "__0_0.distcp").write_bytes(bytes((f / "__0_0.distcp").stat().st_size)),
                rf"__0_0.distcp: has a tensor of {key} at byte 0; got ",
            ),
            (
                lambda f: metadata(f, lambda m: m.state_dict_metadata[key].chunks.pop()),
                f"chunks make the whole of {key}; got 36 of 48 numbers",
            ),
            (lambda f: metadata(f, lambda m: m.storage_data.clear()), f"says where each chunk is; got {key} without a place"),
            (
                lambda f: metadata(f, lambda m: m.__dict__.update(storage_data=None)),
                "metadata: describes tensors; got AttributeError",
            ),
            (lambda f: (f / ".metadata").write_bytes(b"nothing"), "metadata is a pickle; got"),
            (
                lambda f: (f / ".metadata").write_bytes(pickle.dumps(print)),
                r"metadata names classes of torch alone; got builtins.print",
            ),
            (lambda f: (f / ".metadata").unlink(), "with .metadata; got none; check the path"),
        ]
    ):
        folder = Path(shutil.copytree(tmp_path / "w", tmp_path / str(number)))
        damage(folder)
        with pytest.raises(UserError, match=says):
            NativeFolder(folder).read(key)
    escape = Path(shutil.copytree(tmp_path / "w", tmp_path / "escape"))
    metadata(escape, lambda m: [setattr(place, "relative_path", "../w/__0_0.distcp") for place in m.storage_data.values()])
    with pytest.raises(UserError, match=f"its files lie in it; got ../w/__0_0.distcp for {key}"):
        NativeFolder(escape)
    folder = NativeFolder(tmp_path / "w")
    folder.read(key)
    file, chunk = chunks[-1]
    (tmp_path / "w" / file).write_bytes((tmp_path / "w" / file).read_bytes()[: chunk.offset + 5])
    with pytest.raises(
        UserError, match=rf"{file}: has \d+ bytes of {chunk.key} from byte {chunk.offset} on; got a file that is cut"
    ):
        folder.read(chunk.key)
    with pytest.raises(UserError, match="has unknown; got 4 other tensors"):
        folder.read("unknown")
    for start, extent in [((0, 0), (9, 6)), ((-1, 0), (2, 2)), ((0,), (8,))]:
        with pytest.raises(ValueError, match=f"{key}: a region lies in"):
            folder.read(key, start, extent)


def test_an_unfinished_file_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError), NativeFile(tmp_path / "__0_0.distcp") as out:
        out.add("a", (0,), torch.ones(3))
        raise KeyError
    assert not list(tmp_path.iterdir())
