"""File systems without locks, data that may not be written to, users without a name, any umask, a full /dev/shm."""

import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

from common.cli import outcome
from tests.support import samples
from tests.support.file_systems import without_locks
from tests.support.preparation import files_below, write_vocabulary
from tests.support.small_run import write_workspace

ROOT = Path(__file__).resolve().parent.parent.parent
PACK = [str(ROOT / "pack_pretraining_data_pytorch.py"), "--input_dir=data", "--output_dir=packed",
        "--max_sequence_length=24", "--max_predictions_per_sequence=4", "--n_processes=1", "--disable_progress_bar"]
TRAIN = [str(ROOT / "run_pretraining.py"), "--do_train", "--config_file=config.json", "--input_dir=data",
         "--output_dir=out", "--max_seq_length=24", "--max_predictions_per_seq=4", "--train_batch_size=8",
         "--gradient_accumulation_steps=2", "--max_steps=1", "--json_summary=out/log.json", "--no_cuda",
         "--use_cpu_kernels=False"]
READ_ALL = "+dac_read_search"  # only so that an interpreter below /root can be read


@pytest.fixture
def open_folder(request) -> Path:
    """A folder that every user may write to, with data in it that nobody may: tmp_path is its owner's alone."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    request.addfinalizer(partial(shutil.rmtree, folder))
    write_workspace(folder)
    write_vocabulary(folder / "vocab.txt")
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o777)
    return folder


def by_nobody(command: list[str], folder: Path, umask: int = 0o022) -> subprocess.CompletedProcess:
    """Run a command as a user without a name, whose home is the root folder."""
    if os.getuid() or shutil.which("setpriv") is None:
        pytest.skip("only root can become a user without a name, by setpriv")
    become = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", f"--inh-caps={READ_ALL}",
              f"--ambient-caps={READ_ALL}", sys.executable]
    return subprocess.run([*become, *command], cwd=folder, umask=umask, capture_output=True, text=True,
                          env={"PATH": os.environ["PATH"], "HOME": "/", "OMP_NUM_THREADS": "1"})


def test_no_locks_are_needed(tmp_path):
    """As on NFS without a lock daemon, where flock and fcntl fail with ENOLCK, HDF5's too."""
    samples.write_dataset(tmp_path / "data")
    done = subprocess.run([*without_locks(tmp_path), *PACK], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_a_user_without_a_name_reads_what_it_may_not_write_and_its_files_follow_the_umask(open_folder, umask):
    before = files_below(open_folder)
    for program in (PACK, TRAIN) if umask else (PACK,):
        done = by_nobody(program, open_folder, umask)
        assert done.returncode == 0, done.stderr
    written = {name: path for name in files_below(open_folder).keys() - before if (path := open_folder / name)}
    assert any(name.startswith("packed/") for name in written) and len(written) == (5 if umask else 3)
    for path in written.values():
        assert path.stat().st_uid == 54321 and path.stat().st_mode & 0o777 == 0o666 & ~umask, path
        assert path.parent == open_folder or path.parent.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {name: data for name, data in files_below(open_folder).items() if name in before} == before


@pytest.mark.parametrize("command, said", [
    ([*PACK, "--output_dir=data/packed"], "lies inside --input_dir"),
    ([*PACK, "--output_dir=held_out/x"], "--output_dir {folder}/held_out/x: cannot be written: Permission denied"),
    ([str(ROOT / "create_pretraining_data.py"), "--input_file=vocab.txt", "--vocab_file=vocab.txt",
      "--output_file=data/x.hdf5"], "--output_file data/x.hdf5: cannot be written: Permission denied"),
])
def test_a_folder_that_may_not_be_written_to_is_one_line(open_folder, command, said):
    done = by_nobody(command, open_folder)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert said.format(folder=open_folder) in done.stderr


def test_worker_processes_that_find_no_room_in_dev_shm_are_one_line(tmp_path):
    samples.write_dataset(tmp_path / "data")
    inside = ("mount -t tmpfs -o size=4k,nr_inodes=2 tmpfs /dev/shm || exit 77\n"
              'cat /dev/zero >/dev/shm/full 2>/dev/null; exec "$@"')
    words = [sys.executable, *PACK, "--n_processes=2"]
    done = subprocess.run(["unshare", "-m", "bash", "-c", inside, "bash", *words], cwd=tmp_path, capture_output=True,
                          text=True)
    if done.returncode in (1, 77, 127):
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    assert done.returncode == 2
    assert done.stderr.endswith("/dev/shm, which cannot be used here: No space left on device; make room in it (docker "
                                "run --shm-size), or give --n_processes 1\n")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("error, said", [
    (OSError(122, "Disk quota exceeded", "/data/x"), "error: /data/x: Disk quota exceeded"),
    (OSError(28, "No space left on device", "/tmp/op_lists_x"), "TMPDIR names another folder for temporary files)"),
    (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "(the environment variable TMPDIR names"),
    (OSError(28, "No space left on device"), "error: No space left on device")])
def test_what_the_system_says_of_a_file_is_one_line(capsys, monkeypatch, error, said):
    monkeypatch.delenv("TMPDIR", raising=False)

    def command():
        raise error

    assert outcome(command) == 2
    assert said in (line := capsys.readouterr().err) and line.count("\n") == 1
