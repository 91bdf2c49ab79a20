"""Outputs of commands: nothing that is not ours is deleted, followed or replaced, and nothing of ours is left for ever."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from grinmoe.checkpoint_grinmoe import WORKSPACE, Workspace, replaced_when_whole
from grinmoe.files import DiskFullError, atomic_file, atomic_write_text, copy_files, telling_disk_full
from grinmoe.outputs import check_folder, check_output, check_replaceable, checkpoint_when_whole, folder_when_whole

pytestmark = pytest.mark.newest_only  # files and folders


def make_special(path: Path, kind: str) -> None:
    """Something that is neither a file nor a folder, or a link that leads nowhere."""
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/null")
    elif kind == "link":
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.write_text("mine")


SPECIAL = ["FIFO", "socket", "device", "file", "link", "loop"]


def killed_in(body: str, folder: Path) -> None:
    """Run `body` in a process that is killed when it says so; `folder` is the current one."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    process = os.fork()
    if process == 0:
        try:
            os.chdir(folder)
            names = {"folder_when_whole": folder_when_whole, "replaced_when_whole": replaced_when_whole}
            exec(body, {"os": os, "Path": Path, "die": die, **names})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a small file system ({mounted.stderr.decode().strip()})")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class TestCheckedOutputs:
    @pytest.mark.parametrize("kind", SPECIAL)
    @pytest.mark.parametrize("check", [check_folder, check_output])
    def test_output_that_is_not_a_folder_is_refused_by_kind(self, tmp_path, monkeypatch, kind, check):
        monkeypatch.chdir(tmp_path)
        make_special(Path("out"), kind)
        said = {"link": "a link that leads nowhere", "loop": "a link that leads nowhere"}.get(kind, f"is a {kind}")
        with pytest.raises(ValueError, match=f"--output out.*{said}"):
            check("out")
        with pytest.raises(ValueError, match=f"--output out/below.*{said}"):
            check("out/below")

    def test_output_with_something_in_it_is_refused_by_its_name(self, tmp_path):
        (tmp_path / f"{WORKSPACE}12345678").mkdir()
        with pytest.raises(ValueError, match=f"--to .* is not empty \\(it holds '{WORKSPACE}12345678'"):
            check_output(tmp_path, "--to")
        with pytest.raises(ValueError, match="--to is empty"):
            check_output("", "--to")

    def test_output_with_a_killed_save_counts_as_empty(self, tmp_path):
        killed_in("with replaced_when_whole('out') as folder:\n    die()", tmp_path)
        assert [path.name[: len(WORKSPACE)] for path in (tmp_path / "out").iterdir()] == [WORKSPACE]
        assert check_output(tmp_path / "out") == tmp_path / "out"

    def test_output_through_a_link_is_the_folder_it_leads_to(self, tmp_path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "link").symlink_to("folder")
        assert check_output(tmp_path / "link" / "new") == tmp_path / "folder" / "new"


class TestAtomicFile:
    def test_link_at_the_name_is_replaced_and_not_followed(self, tmp_path):
        other = tmp_path / "other"
        other.write_text("mine")
        (tmp_path / "run.json").symlink_to(other)
        atomic_write_text(tmp_path / "run.json", "new")
        assert other.read_text() == "mine" and (tmp_path / "run.json").read_text() == "new"
        assert not (tmp_path / "run.json").is_symlink()

    def test_link_at_a_predictable_temporary_name_is_not_followed(self, tmp_path):
        other = tmp_path / "other"
        other.write_text("mine")
        for name in ("run.partial.json", "run.json.partial", ".run.json"):
            (tmp_path / name).symlink_to(other)
        atomic_write_text(tmp_path / "run.json", "new")
        assert other.read_text() == "mine"

    @pytest.mark.parametrize("kind", ["FIFO", "socket", "folder"])
    def test_special_file_at_the_name_is_refused_and_stays(self, tmp_path, kind):
        path = tmp_path / "run.json"
        path.mkdir() if kind == "folder" else make_special(path, kind)
        before = path.stat().st_ino
        with pytest.raises(ValueError, match=f"run.json is a {kind} and cannot be replaced"):
            atomic_write_text(path, "new")
        assert path.stat().st_ino == before and len(list(tmp_path.iterdir())) == 1

    def test_body_that_raises_leaves_nothing(self, tmp_path):
        with contextlib.suppress(KeyboardInterrupt), atomic_file(tmp_path / "run.json") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt
        assert not list(tmp_path.iterdir())

    def test_file_has_the_permissions_of_a_new_one(self, tmp_path):
        (tmp_path / "plain").write_text("")
        atomic_write_text(tmp_path / "ours", "")
        assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


class TestDiskFull:
    def errors(self, folder: Path):
        """As the libraries raise them."""
        yield OSError(errno.ENOSPC, "No space left on device")
        yield OSError(errno.EDQUOT, "Disk quota exceeded")
        yield SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        yield RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 22")
        yield RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    def test_every_form_of_a_full_disk_is_named(self, tmp_path):
        for error in self.errors(tmp_path):
            with pytest.raises(DiskFullError, match="the disk is full.*MB are free there.*run the same command again"):
                with telling_disk_full(tmp_path / "not" / "there"):
                    raise error
            with pytest.raises(DiskFullError, match="the disk is full"), telling_disk_full(tmp_path):
                raise ValueError("saving failed") from error

    def test_other_errors_pass_as_they_are(self, tmp_path):
        for error in (OSError(errno.EACCES, "Permission denied"), RuntimeError("size mismatch"), ValueError("wrong")):
            with pytest.raises(type(error)) as caught, telling_disk_full(tmp_path):
                raise error
            assert caught.value is error

    def test_errors_of_the_installed_libraries_are_recognised(self, small_disk):
        """The texts that `telling_disk_full` looks for, from the libraries themselves."""
        tensors = {"weight": torch.ones(512, 512)}
        for write in (
            lambda path: path.write_bytes(bytes(2**20)),
            lambda path: save_file(tensors, path),
            lambda path: torch.save(tensors, path),
            lambda path: atomic_write_text(path, "long" * 2**18),
        ):
            with pytest.raises(DiskFullError, match=r"0\.\d MB are free"), telling_disk_full(small_disk):
                write(small_disk / "file")
            (small_disk / "file").unlink(missing_ok=True)


class TestFolderWhenWhole:
    def test_link_at_a_predictable_name_is_not_followed(self, tmp_path):
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / "thesis.txt").write_text("mine")
        for name in (".out.pulling", ".out", ".out-previous", ".out-12345678"):
            (tmp_path / name).symlink_to(mine)
        with folder_when_whole(tmp_path / "out") as folder:
            (folder / "new").write_text("")
        assert (mine / "thesis.txt").read_text() == "mine" and len(list(mine.iterdir())) == 1
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]

    @pytest.mark.parametrize("has_marker", [False, True], ids=["no marker", "a link as marker"])
    def test_foreign_folder_under_such_a_name_stays(self, tmp_path, has_marker):
        foreign = tmp_path / ".out-12345678"
        (foreign / "new").mkdir(parents=True)
        (foreign / "new" / "thesis.txt").write_text("mine")
        if has_marker:
            (tmp_path / "somewhere").write_text("")
            (foreign / "grinmoe-workspace").symlink_to(tmp_path / "somewhere")
        for kept_for in (None, ""):
            with folder_when_whole(tmp_path / "out", kept_for) as folder:
                assert not list(folder.iterdir())
        assert (foreign / "new" / "thesis.txt").read_text() == "mine"

    def test_workspace_of_a_killed_process_goes_with_the_next_call(self, tmp_path):
        killed_in("with folder_when_whole(Path('out').absolute()) as folder:\n    die()", tmp_path)
        assert len(list(tmp_path.glob(".out-*"))) == 1
        with folder_when_whole(tmp_path / "out"):
            assert len(list(tmp_path.glob(".out-*"))) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_workspace_of_another_folder_stays(self, tmp_path):
        killed_in("with folder_when_whole(Path('out-b').absolute(), 'b') as folder:\n    die()", tmp_path)
        with folder_when_whole(tmp_path / "out"):
            pass
        assert len(list(tmp_path.glob(".out-b-*"))) == 1

    def test_workspace_of_a_living_process_stays(self, tmp_path):
        with folder_when_whole(tmp_path / "out") as first:
            (first / "first").write_text("")
            assert list(Workspace.left_in(tmp_path, ".out-")) == []
            with folder_when_whole(tmp_path / "out2"):
                pass
            assert (first / "first").exists()
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["first"]

    def test_process_killed_between_the_renames_gets_its_old_folder_back(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("old")
        body = (
            "rename = Path.rename\n"
            "Path.rename = lambda *paths: (rename(*paths), die())\n"
            "with folder_when_whole(Path('out').absolute()) as folder:\n    (folder / 'new').write_text('new')"
        )
        killed_in(body, tmp_path)
        assert not (tmp_path / "out").exists()
        with pytest.raises(KeyboardInterrupt), folder_when_whole(tmp_path / "out"):
            raise KeyboardInterrupt
        assert (tmp_path / "out" / "old").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        killed_in(body, tmp_path)
        with folder_when_whole(tmp_path / "out") as folder:
            (folder / "newest").write_text("")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["newest"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_kept_workspace_is_gone_on_with_for_the_same_purpose_alone(self, tmp_path):
        for part, kept_for in (("1", "model a"), ("2", "model b"), ("3", "model b")):
            with contextlib.suppress(KeyboardInterrupt), folder_when_whole(tmp_path / "out", kept_for) as folder:
                (folder / part).write_text("")
                raise KeyboardInterrupt
        with folder_when_whole(tmp_path / "out", "model b"):
            pass
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["2", "3"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_folder_that_somebody_else_makes_meanwhile_stays(self, tmp_path):
        (tmp_path / "out").mkdir()

        def make():
            with folder_when_whole(tmp_path / "out") as folder:
                (folder / "new").write_text("new")
                (tmp_path / "out" / "thesis.txt").write_text("mine")

        with pytest.raises(FileExistsError, match=r"out has changed .* in .*out-\w{8} now") as caught:
            make()
        assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
        (aside,) = tmp_path.glob("out-*")
        assert str(aside) in str(caught.value) and (aside / "new").read_text() == "new"
        assert not list(tmp_path.glob(".*"))

    @pytest.mark.parametrize("kind", SPECIAL)
    def test_anything_that_appears_meanwhile_stays_and_the_result_too(self, tmp_path, kind, monkeypatch):
        monkeypatch.chdir(tmp_path)  # a socket's name is short

        def make():
            with folder_when_whole(tmp_path / "out") as folder:
                (folder / "new").write_text("new")
                make_special(Path("out"), kind)

        with pytest.raises(FileExistsError, match=r"out has changed .* in .*out-\w{8} now"):
            make()
        (aside,) = tmp_path.glob("out-*")
        assert (aside / "new").read_text() == "new" and os.path.lexists("out")
        assert not list(tmp_path.glob(".*"))

    def test_kept_workspace_that_cannot_be_put_in_place_is_gone_on_with(self, tmp_path, monkeypatch):
        def make():
            with folder_when_whole(tmp_path / "out", "model") as folder:
                (folder / "new").write_text("new")
                raise_once = iter([OSError(errno.EIO, "Input/output error")])
                monkeypatch.setattr("grinmoe.outputs.write_through", lambda *_: fail(next(raise_once)))

        def fail(error):
            raise error

        with pytest.raises(OSError, match="Input/output"):
            make()
        monkeypatch.undo()
        with folder_when_whole(tmp_path / "out", "model") as folder:
            assert (folder / "new").read_text() == "new"

    def test_folder_in_a_groups_folder_keeps_the_group(self, tmp_path):
        (tmp_path / "team").mkdir()
        (tmp_path / "team").chmod(0o2775)
        with folder_when_whole(tmp_path / "team" / "out") as folder:
            (folder / "new").write_text("")
        usual = tmp_path / "team" / "usual"
        usual.mkdir()
        assert (tmp_path / "team" / "out").stat().st_mode == usual.stat().st_mode

    def test_full_disk_leaves_what_was_there(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("")
        with pytest.raises(DiskFullError), folder_when_whole(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


class TestCheckpointWhenWhole:
    @pytest.mark.parametrize("is_there", [False, True])
    def test_process_killed_at_any_rename_leaves_nothing_that_the_next_call_refuses(self, tmp_path, is_there):
        body = (
            "import sys\nfrom grinmoe.outputs import check_output, checkpoint_when_whole\n"
            "rename, replace = os.rename, os.replace\n"
            "Path.rename = lambda *paths: (rename(*paths), die())\n"
            "os.replace = lambda *paths: (replace(*paths), die())\n"
            "with checkpoint_when_whole(check_output('out')) as folder:\n"
            "    (folder / 'weights').write_text('')\n    (folder / 'config.json').write_text('{}')"
        )
        if is_there:
            (tmp_path / "out").mkdir()
        killed_in(body, tmp_path)
        target = tmp_path / "out"
        if not target.exists() or not any(target.iterdir()):
            with checkpoint_when_whole(check_output(target)) as folder:
                (folder / "weights").write_text("")
                (folder / "config.json").write_text("{}")
        assert {path.name for path in target.iterdir()} == {"weights", "config.json"}

    def test_current_folder_is_filled_where_it_is(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with checkpoint_when_whole(check_output(".")) as folder:
            (folder / "config.json").write_text("{}")
        assert [path.name for path in Path.cwd().iterdir()] == ["config.json"]

    def test_volume_is_filled_where_it_is_mounted(self, small_disk):
        with checkpoint_when_whole(check_output(small_disk)) as folder:
            (folder / "config.json").write_text("{}")
        assert [path.name for path in small_disk.iterdir()] == ["config.json"]

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="makes files of another user")
    @pytest.mark.parametrize("kind", ["another user's in a folder with a sticky bit", "where you may not write"])
    def test_folder_that_cannot_be_moved_is_named_before_the_work(self, kind, tmp_path, monkeypatch):
        shared = Path(tempfile.mkdtemp(prefix="grinmoe-test-", dir="/tmp"))  # others may not enter pytest's folders
        try:
            (shared / "out").mkdir()
            shared.chmod(0o1777 if "sticky" in kind else 0o755)
            os.chown(shared, 65533, 65533)
            (shared / "out").chmod(0o777)
            os.seteuid(65534)
            monkeypatch.setattr(os, "access", partial(os.access, effective_ids=True))
            with pytest.raises(ValueError, match=f"--output {shared}/out is .*{kind}.* give a new folder inside of it"):
                check_replaceable(shared / "out")
            with checkpoint_when_whole(shared / "out") as folder:
                (folder / "config.json").write_text("{}")
            assert [path.name for path in (shared / "out").iterdir()] == ["config.json"]
        finally:
            os.seteuid(0)
            shutil.rmtree(shared)


class TestReplacedWhenWhole:
    def test_foreign_folder_with_the_prefix_of_a_workspace_stays(self, tmp_path):
        (tmp_path / f"{WORKSPACE}12345678").mkdir()
        (tmp_path / f"{WORKSPACE}12345678" / "thesis.txt").write_text("mine")
        (tmp_path / f"{WORKSPACE}notes").mkdir()
        with replaced_when_whole(tmp_path) as folder:
            (folder / "config.json").write_text("{}")
        assert (tmp_path / f"{WORKSPACE}12345678" / "thesis.txt").read_text() == "mine"
        assert (tmp_path / f"{WORKSPACE}notes").is_dir() and (tmp_path / "config.json").is_file()

    def test_killed_save_frees_the_disk_before_the_next_one_writes(self, tmp_path):
        killed_in(
            "with replaced_when_whole('out') as folder:\n    (folder / 'shard').write_text('')\n    die()", tmp_path
        )
        with replaced_when_whole(tmp_path / "out"):
            assert len(list((tmp_path / "out").iterdir())) == 1

    def test_save_beside_a_living_one_leaves_it_alone(self, tmp_path):
        with replaced_when_whole(tmp_path) as first:
            (first / "first").write_text("")
            with replaced_when_whole(tmp_path) as second:
                (second / "second").write_text("")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]

    def test_link_in_the_way_is_replaced_and_not_followed(self, tmp_path):
        (tmp_path / "other").write_text("mine")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").symlink_to(tmp_path / "other")
        with replaced_when_whole(tmp_path / "out") as folder:
            (folder / "config.json").write_text("{}")
        assert (tmp_path / "other").read_text() == "mine" and (tmp_path / "out" / "config.json").read_text() == "{}"

    def test_linked_folder_in_the_way_is_not_written_through(self, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "templates").symlink_to(tmp_path / "mine")

        def save():
            with replaced_when_whole(tmp_path / "out") as folder:
                (folder / "templates").mkdir()
                (folder / "templates" / "one.jinja").write_text("")

        with pytest.raises(ValueError, match="templates is not a folder and is in the way"):
            save()
        assert not list((tmp_path / "mine").iterdir()) and len(list((tmp_path / "out").iterdir())) == 1

    @pytest.mark.parametrize("kind", ["FIFO", "folder"])
    def test_special_file_in_the_way_is_refused_and_stays(self, tmp_path, kind):
        path = tmp_path / "config.json"
        path.mkdir() if kind == "folder" else make_special(path, kind)
        with pytest.raises(ValueError, match="config.json is not a file and is in the way"):
            with replaced_when_whole(tmp_path) as folder:
                (folder / "config.json").write_text("{}")
        assert [found.name for found in tmp_path.iterdir()] == ["config.json"] and not path.is_file()


class TestCopiedFiles:
    def test_link_out_of_the_folder_is_refused_by_name(self, tmp_path):
        (tmp_path / "id_rsa").write_text("secret")
        for place in ("model", "copy"):
            (tmp_path / place).mkdir()
        (tmp_path / "model" / "tokenizer.model").symlink_to("../id_rsa")
        with pytest.raises(ValueError, match="tokenizer.model is a link to .*id_rsa, which is not in its folder"):
            copy_files(["tokenizer.model"], tmp_path / "model", tmp_path / "copy")
        assert not list((tmp_path / "copy").iterdir())

    def test_link_to_blobs_that_are_not_the_hubs_cache_is_refused(self, tmp_path):
        model = tmp_path / "snapshots" / "model"
        for folder in (model, tmp_path / "blobs", tmp_path / "copy"):
            folder.mkdir(parents=True)
        (tmp_path / "blobs" / "private").write_text("secret")
        (model / "LICENSE").symlink_to("../../blobs/private")
        with pytest.raises(ValueError, match="LICENSE is a link to .*private, which is not in its folder"):
            copy_files(["LICENSE"], model, tmp_path / "copy")

    def test_links_inside_the_folder_and_of_the_hubs_cache_are_copied(self, tmp_path):
        snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (snapshot.parent.parent / "blobs").mkdir()
        (snapshot.parent.parent / "blobs" / "abc").write_text("{}")
        (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
        (snapshot / "vocab.json").symlink_to("tokenizer.json")
        (tmp_path / "copy").mkdir()
        copy_files(["tokenizer.json", "vocab.json", "absent.json"], snapshot, tmp_path / "copy")
        assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["tokenizer.json", "vocab.json"]
        assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())
