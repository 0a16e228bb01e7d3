"""Checkpoints of torch.distributed: sealed with their metadata, and no pickle anywhere."""

import io
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from secure_cnn import archive
from secure_cnn.archive.adapters.distributed import (
    SealedLoadPlanner,
    SealedReader,
    SealedSavePlanner,
    SealedWriter,
)
from secure_cnn.archive.adapters.planning import Contents, Place, contents_of, tree_of
from secure_cnn.archive.format.state import encode_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Global metadata is not found"),
]

ME = archive.generate_identity(post_quantum=False)
SIGNER = archive.generate_signer()
TRUSTED = [SIGNER.verifier]


def state_of(seed):
    """Nested, tied, strided, 0-d and empty tensors, and plain data."""
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    return {
        "model": {
            "secret_layer.weight": weight,
            "tied": weight,
            "strided": torch.arange(12.0).reshape(3, 4).t(),
            "half": torch.ones(3, dtype=torch.bfloat16),
            "scalar": torch.tensor(seed),
            "empty": torch.zeros(0, 2),
        },
        "optimizer": {"lr": 0.1, "betas": (0.9, 0.99), "none": None, "name": "sgd"},
        "groups": [{"momentum": 0.9, "buffer": torch.full((2,), float(seed))}],
        "step": seed,
    }


def blank(value):
    """The same tree with nothing in it."""
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    if isinstance(value, list):
        return [blank(item) for item in value]
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else "blank"


def same(left, right):
    """Whether two trees are equal, bit by bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and left == right


def seal(folder, seed=7, **settings):
    """A signed checkpoint."""
    settings = {"recipients": [ME.recipient], "signer": SIGNER, **settings}
    dcp.save(
        state_of(seed), storage_writer=SealedWriter(folder, **settings), planner=SealedSavePlanner()
    )
    return folder


def opened(folder, seed=7, **settings):
    """What a checkpoint loads as."""
    target = blank(state_of(seed))
    reader = SealedReader(folder, **{"identity": ME, "trusted": TRUSTED, **settings})
    dcp.load(target, storage_reader=reader, planner=SealedLoadPlanner())
    return target


def failure(call):
    """Our error inside torch's."""
    with pytest.raises(CheckpointException) as caught:
        call()
    (error, _), *_ = caught.value.failures.values()
    return error


def test_a_checkpoint_comes_back_exactly(tmp_path):
    """Every tensor and every plain value of the tree, without a pickle on the way."""
    seal(tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "a")) == ["metadata.sealed", "rank-0.sealed"]
    assert same(opened(tmp_path / "a"), state_of(7))


def test_a_folder_given_to_torch_is_the_folder(tmp_path):
    """`checkpoint_id` takes the place of the folder of writer and reader."""
    writer = SealedWriter(tmp_path / "no", recipients=[ME.recipient])
    dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path / "yes", storage_writer=writer)
    dcp.save({"a": torch.zeros(2)}, checkpoint_id=tmp_path / "also", storage_writer=writer)
    reader, target = SealedReader(tmp_path / "also", identity=ME), {"a": torch.full((2,), 5.0)}
    dcp.load(target, checkpoint_id=tmp_path / "yes", storage_reader=reader)
    assert torch.equal(target["a"], torch.ones(2))
    assert not (tmp_path / "no").exists()


def test_an_asynchronous_save_seals_what_was_there_when_it_was_called(tmp_path):
    """Torch stages the tensors; the loop may go on."""
    state = {"a": torch.ones(1000)}
    writer = SealedWriter(tmp_path / "a", recipients=[ME.recipient])
    future = dcp.async_save(state, storage_writer=writer, no_dist=True)
    state["a"].zero_()
    future.result()
    target = {"a": torch.zeros(1000)}
    dcp.load(target, storage_reader=SealedReader(tmp_path / "a", identity=ME))
    assert torch.equal(target["a"], torch.ones(1000))


def test_part_of_a_checkpoint_can_be_loaded(tmp_path):
    """A target with fewer names reads these alone."""
    seal(tmp_path / "a")
    target = {"step": 0, "model": {"half": torch.zeros(3, dtype=torch.bfloat16)}}
    dcp.load(
        target,
        storage_reader=SealedReader(tmp_path / "a", identity=ME),
        planner=SealedLoadPlanner(allow_partial_load=True),
    )
    assert target["step"] == 7
    assert torch.equal(target["model"]["half"], torch.ones(3, dtype=torch.bfloat16))


class Canary:
    """Shows that a pickle ran."""

    ran = False

    def __reduce__(self):
        return Canary.sing, ()

    @staticmethod
    def sing():
        Canary.ran = True
        return Metadata({})


def test_the_metadata_is_neither_in_clear_nor_a_pickle(tmp_path):
    """First attack on torch's extension: names in clear, and code in `.metadata` that runs."""
    folder = seal(tmp_path / "a")
    raw = b"".join(path.read_bytes() for path in folder.iterdir())
    for secret in (b"secret_layer", b"bfloat16", b'"BF16"', b"torch", b"optimizer", b"betas"):
        assert secret not in raw
    (folder / ".metadata").write_bytes(pickle.dumps(Canary()))
    assert same(opened(folder), state_of(7))
    assert not Canary.ran
    # Control: the canary is alive, and torch's reader runs it.
    FileSystemReader(folder).read_metadata()
    assert Canary.ran
    Canary.ran = False
    dcp.save(state_of(7), storage_writer=FileSystemWriter(tmp_path / "b"))
    assert b"secret_layer" in (tmp_path / "b" / ".metadata").read_bytes()


def test_a_plain_checkpoint_is_refused_in_place_of_a_sealed_one(tmp_path):
    """Second attack: a plaintext checkpoint in its place, whole or a file of it."""
    dcp.save(state_of(8), storage_writer=FileSystemWriter(tmp_path / "plain"))
    with pytest.raises(archive.StorageError, match=r"metadata\.sealed"):
        opened(tmp_path / "plain")
    shutil.copy(tmp_path / "plain" / ".metadata", tmp_path / "plain" / "metadata.sealed")
    with pytest.raises(archive.NotSealed):
        opened(tmp_path / "plain")
    folder = seal(tmp_path / "a")
    shutil.copy(tmp_path / "plain" / "__0_0.distcp", folder / "rank-0.sealed")
    assert type(failure(lambda: opened(folder))) is archive.NotSealed
    archive.save_plain(folder / "rank-0.sealed", {"0": torch.ones(2)}, overwrite=True)
    assert type(failure(lambda: opened(folder))) is archive.NotSealed
    # Control: torch loads the plain one without a word.
    (tmp_path / "plain" / "metadata.sealed").unlink()
    target = blank(state_of(8))
    dcp.load(target, storage_reader=FileSystemReader(tmp_path / "plain"))
    assert same(target, state_of(8))


def test_a_file_of_another_checkpoint_is_refused(tmp_path):
    """Each file must be the very one, though the same signer made both."""
    old, new = seal(tmp_path / "old", 1), seal(tmp_path / "new", 2)
    shutil.copy(old / "rank-0.sealed", new / "rank-0.sealed")
    assert type(failure(lambda: opened(new))) is archive.RolledBack
    shutil.copy(old / "metadata.sealed", new / "metadata.sealed")
    assert same(opened(new), state_of(1))  # a whole older one; that is what `core_hash` is for
    wanted = archive.inspect(seal(tmp_path / "third") / "metadata.sealed").core_hash
    with pytest.raises(archive.RolledBack):
        opened(new, core_hash=wanted)
    assert same(opened(tmp_path / "third", core_hash=wanted), state_of(7))


def test_a_changed_byte_is_refused(tmp_path):
    """In metadata and in data; the target keeps what it had."""
    folder = seal(tmp_path / "a")
    for name in ("metadata.sealed", "rank-0.sealed"):
        raw = bytearray((folder / name).read_bytes())
        for at in (30, 1500, len(raw) // 2, len(raw) - 1):
            (folder / name).write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
            if name == "metadata.sealed":
                with pytest.raises(archive.ArchiveError):
                    opened(folder)
            else:
                assert isinstance(failure(lambda: opened(folder)), archive.ArchiveError)
        (folder / name).write_bytes(raw)
    assert same(opened(folder), state_of(7))


def test_trust_keys_and_claims_are_checked_before_torch_is_asked(tmp_path):
    """The errors of `load`, from making the reader."""
    folder = seal(tmp_path / "a", claims={"epsilon": 3.0})
    stranger, mallory = archive.generate_identity(post_quantum=False), archive.generate_signer()
    with pytest.raises(archive.WrongKey):
        SealedReader(folder, identity=stranger)
    with pytest.raises(archive.UntrustedSigner):
        SealedReader(folder, identity=ME, trusted=[mallory.verifier])
    with pytest.raises(archive.ClaimMismatch):
        SealedReader(folder, identity=ME, expect={"epsilon": 1.0})
    assert same(opened(folder, expect={"epsilon": 3.0}), state_of(7))


def test_every_file_must_be_signed_by_who_is_trusted(tmp_path):
    """A recipient who signs the metadata anew cannot use the files of others, nor the reverse."""
    mallory = archive.generate_signer()
    folder = seal(tmp_path / "a")
    contents = archive.load(folder / "metadata.sealed", identity=ME)
    archive.save(
        folder / "metadata.sealed",
        contents,
        recipients=[ME.recipient],
        signer=mallory,
        overwrite=True,
    )
    call = lambda: opened(folder, trusted=[mallory.verifier])  # noqa: E731
    assert type(failure(call)) is archive.UntrustedSigner
    with pytest.raises(archive.UntrustedSigner):
        opened(folder)


def test_a_checkpoint_is_not_written_over(tmp_path):
    """A folder that holds one is refused; what a save that died left is not in the way."""
    folder = seal(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert type(failure(lambda: seal(folder, 8))) is archive.StorageError
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "metadata.sealed").unlink()
    seal(folder, 9)
    assert same(opened(folder), state_of(9))


def test_a_planner_that_pickles_is_refused(tmp_path):
    """Torch's own planners are fine for tensors, and refused for all else."""
    writer = SealedWriter(tmp_path / "a", recipients=[ME.recipient])
    error = failure(lambda: dcp.save({"step": 3}, storage_writer=writer))
    assert type(error) is archive.StateError
    assert "SealedSavePlanner" in str(error)
    assert not (tmp_path / "a" / "metadata.sealed").exists()
    folder = seal(tmp_path / "b")
    reader = SealedReader(folder, identity=ME)
    error = failure(lambda: dcp.load(blank(state_of(7)), storage_reader=reader))
    assert "SealedLoadPlanner" in str(error)


def test_what_is_no_plain_data_is_refused_by_its_name(tmp_path):
    """Nothing of it is written."""
    writer = SealedWriter(tmp_path / "a", recipients=[ME.recipient])
    state = {"a": torch.ones(2), "b": {"bad": Canary()}}
    error = failure(lambda: dcp.save(state, storage_writer=writer, planner=SealedSavePlanner()))
    assert type(error) is archive.StateError
    assert "b.bad" in str(error)
    assert os.listdir(tmp_path / "a") == []


def test_ranks_save_together_or_not_at_all(tmp_path):
    """Without a coordinator no file would name the others."""
    writer = SealedWriter(tmp_path / "a", recipients=[ME.recipient])
    with pytest.raises(archive.StateError, match="use_collectives"):
        dcp.save({"a": torch.ones(1)}, storage_writer=writer, use_collectives=False)


def test_ranks_that_read_different_checkpoints_are_stopped(tmp_path):
    """Two whole checkpoints of one signer cannot be mixed among ranks."""
    readers = [SealedReader(seal(tmp_path / str(n), n), identity=ME) for n in (1, 2)]
    plans = [reader.prepare_local_plan(dcp.LoadPlan([])) for reader in readers]
    with pytest.raises(archive.RolledBack):
        readers[0].prepare_global_plan(plans)
    assert readers[0].prepare_global_plan(plans[:1]) == plans[:1]


GOOD = tree_of(
    Contents(
        metadata=Metadata({"step": BytesStorageMetadata()}, planner_data={"step": ("step",)}),
        places={MetadataIndex("step"): Place(file="rank-0.sealed", core_hash="0" * 64, tensor="0")},
    )
)


@pytest.mark.parametrize(
    "changes",
    [
        {"entries": 3},
        {"entries": {"a": {"dtype": "F99", "size": [], "requires_grad": False, "chunks": []}}},
        {"entries": {"a": {"dtype": "F32", "size": [-1], "requires_grad": False, "chunks": []}}},
        {"entries": {"a": {"dtype": "F32", "size": ["1"], "requires_grad": False, "chunks": []}}},
        {"entries": {"a": {"dtype": "F32", "size": [1], "requires_grad": False, "chunks": [1]}}},
        {"places": [["step", None, "../rank-0.sealed", "0" * 64, "0"]]},
        {"places": [["step", None, "rank-0.sealed\n", "0" * 64, "0"]]},
        {"places": [["step", None, "rank-0.sealed", 5, "0"]]},
        {"places": [["step", [1 << 60], "rank-0.sealed", "0" * 64, "0"]]},
        {"places": [["step"]]},
        {"places": None},
    ],
)
def test_metadata_of_a_malicious_recipient_is_refused(changes):
    """Whoever may seal may write it: no path out of the folder, no traceback."""
    contents_of(GOOD)
    with pytest.raises(archive.StateError):
        contents_of({**GOOD, **changes})
    for tree in (None, torch.ones(2), [], {"entries": {}}):
        with pytest.raises(archive.StateError):
            contents_of(tree)


def test_data_that_does_not_fit_its_metadata_is_refused(tmp_path):
    """A recipient's metadata that promises more than the file has ends in our error."""
    dcp.save(
        {"a": torch.ones(2)}, storage_writer=SealedWriter(tmp_path / "a", recipients=[ME.recipient])
    )
    path = tmp_path / "a" / "metadata.sealed"
    tree = archive.load(path, identity=ME)
    tree["entries"]["a"] |= {"size": [3], "chunks": [[[0], [3]]]}
    archive.save(path, tree, recipients=[ME.recipient], overwrite=True)
    reader = SealedReader(tmp_path / "a", identity=ME)
    error = failure(lambda: dcp.load({"a": torch.zeros(3)}, storage_reader=reader))
    assert type(error) is archive.StateError
    tree["entries"]["a"] = None
    archive.save(path, tree, recipients=[ME.recipient], overwrite=True)
    reader, planner = SealedReader(tmp_path / "a", identity=ME), SealedLoadPlanner()
    error = failure(lambda: dcp.load({"a": 0}, storage_reader=reader, planner=planner))
    assert type(error) is archive.StateError


def test_plain_bytes_are_our_safetensors():
    """What the planner makes of a value has no pickle in it."""
    item = dcp.planner.WriteItem(MetadataIndex("lr"), dcp.planner.WriteItemType.BYTE_IO)
    made = SealedSavePlanner().transform_object(item, (0.9, None))
    assert isinstance(made, io.BytesIO)
    assert made.getvalue() == b"".join(encode_state((0.9, None)))


WORKER = """
    import os, sys, torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from secure_cnn import archive
    from secure_cnn.archive.adapters.distributed import *

    rank, folder, me, signer = int(sys.argv[1]), *sys.argv[2:]
    me, signer = archive.Identity.from_text(me), archive.Signer.from_text(signer)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(35.0).reshape(7, 5)
    state = {"sharded": distribute_tensor(whole, mesh, [Shard(0)]), "same": torch.ones(3), "lr": .5}
    dcp.save(state, planner=SealedSavePlanner(), storage_writer=SealedWriter(
        f"{folder}/a", recipients=[me.recipient], signer=signer))
    # Along the other axis: each rank needs pieces of both files.
    target = {"sharded": distribute_tensor(torch.zeros(7, 5), mesh, [Shard(1)]),
              "same": torch.zeros(3), "lr": 0.0}
    dcp.load(target, planner=SealedLoadPlanner(), storage_reader=SealedReader(
        f"{folder}/a", identity=me, trusted=[signer.verifier]))
    assert torch.equal(target["sharded"].full_tensor(), whole)
    assert torch.equal(target["same"], torch.ones(3)) and target["lr"] == 0.5
    dist.barrier()
    os._exit(0)  # gloo's own threads abort a process now and then that takes itself apart
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_save_and_load_across_shards(tmp_path):
    """Each seals its shard; loading along another axis, and in one process, reads both."""
    keys = [ME.to_text(), SIGNER.to_text()]
    run = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WORKER)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    workers = [
        subprocess.Popen([*run, str(rank), str(tmp_path), *keys], env=environment)
        for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=600) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    names = {"metadata.sealed", "rank-0.sealed", "rank-1.sealed"}
    assert set(os.listdir(tmp_path / "a")) == names
    target = {"sharded": torch.zeros(7, 5), "same": torch.zeros(3), "lr": 0.0}
    reader = SealedReader(tmp_path / "a", identity=ME, trusted=TRUSTED)
    dcp.load(target, storage_reader=reader, planner=SealedLoadPlanner())
    assert torch.equal(target["sharded"], torch.arange(35.0).reshape(7, 5))
    assert target["lr"] == 0.5
    # The two files are not interchangeable.
    one, two = (tmp_path / "a" / f"rank-{rank}.sealed" for rank in range(2))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    call = lambda: dcp.load(target, storage_reader=reader, planner=SealedLoadPlanner())  # noqa: E731
    assert type(failure(call)) is archive.RolledBack


@pytest.mark.parametrize(
    "make",
    [
        lambda v: {"w": torch.ones(1) * v, "milestones": {2: v}},
        lambda v: {"w": torch.ones(1) * v, "state": {0: {"n_iter": v, "m": torch.ones(2) * v}}},
        lambda v: {"w": torch.ones(1) * v, "groups": [{7: (v, 1)}, {-1: [v, {3: "a"}]}]},
    ],
    ids=["one level", "two levels", "in lists"],
)
def test_whole_number_keys_come_back(tmp_path, make):
    """As optimizers and schedulers have them; torch's own paths keep only their text."""
    target = make(0)
    writer = SealedWriter(tmp_path / "c", recipients=[ME.recipient])
    dcp.save(make(7), storage_writer=writer, planner=SealedSavePlanner())
    reader = SealedReader(tmp_path / "c", identity=ME)
    dcp.load(target, storage_reader=reader, planner=SealedLoadPlanner())
    assert same(target, make(7))
