"""Checkpoints under attack: faults at every call of a save, damaged files, signals, two runs in one folder.

`interrupted` and `reference` (conftest.py) are runs of 8 steps, one of them cut off after step 6.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import yaml
from helpers import TINY, contents, fit, forkserver, full_disk, prepare_rows, resume

from hf_vaeplus.cli.main import main
from hf_vaeplus.files import sole_run
from hf_vaeplus.training import checkpoints
from hf_vaeplus.training.checkpoints import DamagedCheckpoint, check, list_checkpoints
from hf_vaeplus.training.loop import TrainingInterrupted

FILES = ["model.safetensors", "config.json", "optimizer.safetensors", "progress.json", "ema/model.safetensors"]


# -------------------------------------------------------------------------------------- a fault at every system call


class Faults:
    """Makes the n-th call of the file system under a folder fail while it is armed: a full disk.

    Python announces these calls to audit hooks, and an error there prevents the call. The writer of safetensors is
    not Python, so it announces itself here.
    """

    EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree"}

    def __init__(self):
        self.folder, self.at, self.calls, self.hit = None, -1, 0, None
        sys.addaudithook(self.heard)

    def heard(self, event, arguments):
        if self.folder is None or event not in self.EVENTS or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        if str(self.folder) in os.fspath(arguments[0]).__str__():
            self.call(event)

    def call(self, name: str):
        self.calls += 1
        if self.calls - 1 == self.at:
            self.hit = name
            raise OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def faults():
    faults = Faults()
    yield faults
    faults.folder = None  # a hook cannot be taken away


def save_with_fault(faults, folder: Path, at: int, monkeypatch) -> str | None:
    """A run of 8 steps whose second checkpoint meets a fault at its `at`-th call: the call, if there is one."""
    real_save, real_write, real_sync = checkpoints.TrainingState.save, checkpoints.save_file, os.fsync

    def save(state, output_dir, total_limit):
        armed = state.step == 6
        faults.folder, faults.at, faults.calls = folder if armed else None, at, 0
        real_save(state, output_dir, total_limit)
        faults.folder = None

    def announced(name, real):
        def call(*arguments):
            if faults.folder is not None:
                faults.call(name)
            return real(*arguments)

        return call

    faults.hit = None
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.TrainingState, "save", save)
        patch.setattr(checkpoints, "save_file", announced("save_file", real_write))
        patch.setattr(os, "fsync", announced("fsync", real_sync))
        try:
            fit(folder, checkpoints_total_limit=1)
        except OSError as error:
            assert "No space left" in str(error)
        finally:
            faults.folder = None
    return faults.hit


def test_a_fault_at_any_call_of_a_save_leaves_a_good_checkpoint(faults, tmp_path, reference, monkeypatch):
    tried = []
    for at in range(1000):
        folder = tmp_path / str(at)
        if save_with_fault(faults, folder, at, monkeypatch) is None:
            break
        tried.append(faults.hit)
        good = [path for path in list_checkpoints(folder) if not raised(check, path)]
        assert good, f"no good checkpoint after a fault at call {at} ({tried[-1]})"
        if at % 10 == 0:  # the resumed run is the run, whatever is left lying about
            resume(folder, checkpoints_total_limit=10)
            assert contents(folder / "checkpoint-8") == contents(reference / "checkpoint-8")
        shutil.rmtree(folder)
    assert len(tried) > 30 and {"open", "save_file", "fsync", "os.rename", "os.mkdir"} <= set(tried)


def raised(function, *arguments) -> bool:
    try:
        function(*arguments)
    except DamagedCheckpoint:
        return True
    return False


# --------------------------------------------------------------------------------------------------------- damage


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": truncate,
    "one bit flipped": flip_a_bit,
    "missing": Path.unlink,
    "empty": lambda p: p.write_bytes(b""),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_good_checkpoint_is_taken(interrupted, reference, caplog, name, damage):
    DAMAGE[damage](interrupted / "checkpoint-6" / name)
    with pytest.raises(DamagedCheckpoint, match="checkpoint-6"):
        resume(interrupted, strict_resume=True)
    with caplog.at_level(logging.WARNING):
        resume(interrupted, checkpoints_total_limit=10)
    assert "checkpoint-6" in caplog.text and name in caplog.text and "The checkpoint before it is taken" in caplog.text
    assert contents(interrupted) == contents(reference)


@pytest.mark.parametrize("text", ["", "{", "[]", "[5]", "{}", '{"model.safetensors": 3}', "null"])
def test_damaged_checksums(interrupted, text):
    path = interrupted / "checkpoint-6" / "checksums.json"
    path.write_text(text)
    assert raised(check, path.parent)


def test_a_checkpoint_by_name_is_refused_when_damaged(interrupted):
    flip_a_bit(interrupted / "checkpoint-6" / "model.safetensors")
    with pytest.raises(DamagedCheckpoint, match="model.safetensors is damaged, its checksum has changed: resume from"):
        fit(interrupted, resume_from_checkpoint=str(interrupted / "checkpoint-6"))


def test_a_full_disk_at_a_checkpoint_is_one_sentence_and_the_run_goes_on_later(tmp_path, reference, monkeypatch):
    real = checkpoints.TrainingState.save

    def save(state, *arguments):
        with full_disk() if state.step == 6 else contextlib.nullcontext():
            real(state, *arguments)

    monkeypatch.setattr(checkpoints.TrainingState, "save", save)
    with pytest.raises(OSError, match="checkpoint-6 cannot be written .* free some space, then resume"):
        fit(tmp_path, checkpoints_total_limit=10)
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-3"]
    monkeypatch.undo()
    resume(tmp_path, checkpoints_total_limit=10)
    assert contents(tmp_path) == contents(reference)


def test_without_any_good_checkpoint_nothing_is_started(interrupted):
    for path in list_checkpoints(interrupted):
        truncate(path / "model.safetensors")
    before = contents(interrupted)
    with pytest.raises(DamagedCheckpoint, match="start anew in another --output_dir"):
        resume(interrupted)
    assert contents(interrupted) == before


@pytest.mark.parametrize("half", [True, False])
def test_a_kill_while_the_oldest_is_dropped_leaves_no_part_of_it(tmp_path, monkeypatch, half):
    class Killed(BaseException):
        pass

    def rmtree(path, **options):
        if "checkpoint-6" not in path.name or not path.exists():
            return remove(path, **options)
        if half:
            (path / "model.safetensors").unlink()
        raise Killed

    fit(tmp_path / "whole", checkpoints_total_limit=1)
    remove = shutil.rmtree
    with monkeypatch.context() as patch, pytest.raises(Killed):  # after the last save: nothing comes to save again
        patch.setattr(checkpoints.shutil, "rmtree", rmtree)
        fit(tmp_path / "cut", checkpoints_total_limit=1)
    resume(tmp_path / "cut", checkpoints_total_limit=1)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


# -------------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def without_nohup():
    """As if these tests were not run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_the_resumed_run_is_the_run(tmp_path, reference, number, without_nohup):
    def prepare(batch, noise, step):
        if step == 4:
            os.kill(os.getpid(), number)
        return prepare_rows(batch, noise, step)

    before = signal.getsignal(number)
    with pytest.raises(
        TrainingInterrupted, match=f"stopped by {number.name} after step 5, .* as checkpoint-5"
    ) as stop:
        fit(tmp_path, prepare=prepare, checkpoints_total_limit=10)
    assert stop.value.signal == number and signal.getsignal(number) == before
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-5"]
    resume(tmp_path, checkpoints_total_limit=10)
    shutil.rmtree(tmp_path / "checkpoint-5")
    assert contents(tmp_path) == contents(reference)


def fit_with_two_signals(folder):
    def prepare(batch, noise, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return prepare_rows(batch, noise, step)

    fit(folder, prepare=prepare)


def test_a_second_signal_ends_at_once(tmp_path):
    process = forkserver().Process(target=fit_with_two_signals, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGTERM
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_is_no_second_signal(tmp_path, first, without_nohup):
    def prepare(batch, noise, step):
        if step == 4:
            os.kill(os.getpid(), first)
            os.kill(os.getpid(), signal.SIGHUP)
        return prepare_rows(batch, noise, step)

    with pytest.raises(TrainingInterrupted, match=f"stopped by {first.name} .* as checkpoint-5"):
        fit(tmp_path, prepare=prepare)


def test_nohup_is_respected(tmp_path):
    def prepare(batch, noise, step):
        os.kill(os.getpid(), signal.SIGHUP)
        return prepare_rows(batch, noise, step)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fit(tmp_path, prepare=prepare)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_training_in_a_thread_leaves_the_signals_alone(tmp_path):
    before, found = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: found.append(fit(tmp_path)))
    thread.start()
    thread.join()
    assert found and signal.getsignal(signal.SIGTERM) == before


# ------------------------------------------------------------------------------------------------ one run a folder


def hold(folder, held, let_go):
    with sole_run(Path(folder)):
        held.set()
        let_go.wait(60)


def test_two_commands_in_one_folder(tmp_path, capsys, monkeypatch):
    """Between the stages and while it reports, `vaeplus train` holds its folder as well."""
    monkeypatch.setenv("VAEPLUS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    command = ["train", "--config", str(tmp_path / "tiny.yaml"), "--output_dir", str(tmp_path / "run")]
    context = forkserver()
    held, let_go = context.Event(), context.Event()
    other = context.Process(target=hold, args=(str(tmp_path / "run"), held, let_go))
    other.start()
    assert held.wait(60)
    assert main(command) == 2
    assert re.search("another process is training in .*run: wait for it, or choose another", capsys.readouterr().err)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    other.kill()
    other.join()
    assert main(command) == 0


def test_two_runs_in_one_folder(tmp_path):
    context = forkserver()
    held, let_go = context.Event(), context.Event()
    other = context.Process(target=hold, args=(str(tmp_path), held, let_go))
    other.start()
    assert held.wait(60)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="another process is training in .*: wait for it, or choose another"):
        fit(tmp_path)
    assert contents(tmp_path) == before
    other.kill()  # what a dead process held is free
    other.join()
    fit(tmp_path)
    assert json.loads((tmp_path / "checkpoint-8" / "progress.json").read_text())["step"] == 8
