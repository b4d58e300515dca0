import os
import random
import shutil
import subprocess

import pytest
from etils import epath

from detclipv2_jax.common import digest_list


@pytest.fixture
def listed(tmp_path):
    """A directory of three files with their list."""
    root = tmp_path / "listed"
    (root / "a/b").mkdir(parents=True)
    for name, size in [("one", 0), ("a/two", 10), ("a/b/three", 5_000_000)]:
        (root / name).write_bytes(random.Random(size).randbytes(size))
    digest_list.write(root)
    return root


def test_the_list_is_that_of_sha256sum(listed):
    assert digest_list.problem(listed) == ""
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum")
    line = ["sha256sum", "--check", "--strict", digest_list.NAME]
    done = subprocess.run(line, cwd=listed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["a/b/three: OK", "a/two: OK", "one: OK"]


@pytest.mark.parametrize("name", ["a/two", "a/b/three", digest_list.NAME])
def test_each_flipped_bit_is_found(listed, name):
    content = (listed / name).read_bytes()
    moments = random.Random(0)
    for bit in moments.sample(range(8 * min(len(content), 1000)), 40):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (listed / name).write_bytes(changed)
        assert digest_list.problem(listed).startswith(name)
    (listed / name).write_bytes(content)
    assert digest_list.problem(listed) == ""


def test_cut_missing_and_unreadable_files_are_found(listed):
    os.truncate(listed / "a/two", 9)
    assert digest_list.problem(listed) == "a/two has changed since it was written"
    (listed / "a/two").unlink()
    assert digest_list.problem(listed) == "a/two is missing"
    (listed / "a/two").mkdir()
    assert digest_list.problem(listed) == "a/two cannot be read (Is a directory)"
    (listed / digest_list.NAME).unlink()
    assert digest_list.problem(listed).startswith(f"{digest_list.NAME} cannot be read (No such")


def test_files_that_come_later_are_added_and_the_others_not_read_again(listed):
    (listed / "late").write_text("x")
    assert digest_list.problem(listed) == ""
    (listed / "one").write_text("changed")
    digest_list.complete(listed)
    assert digest_list.problem(listed) == "one has changed since it was written"
    (listed / "one").write_text("")
    assert digest_list.problem(listed) == ""
    (listed / "late").write_text("y")
    assert digest_list.problem(listed) == "late has changed since it was written"


def test_a_file_may_be_left_out(listed):
    digest_list.write(listed, leave_out=["one"])
    (listed / "one").write_text("changed")
    assert digest_list.problem(listed) == ""


def test_a_bucket_is_a_path_like_any_other(bucket):
    for name, text in [("one", "1"), ("a/two", "2")]:
        epath.Path(f"{bucket}/listed/{name}").parent.mkdir(parents=True, exist_ok=True)
        epath.Path(f"{bucket}/listed/{name}").write_text(text)
    digest_list.write(f"{bucket}/listed")
    assert digest_list.problem(f"{bucket}/listed") == ""
    epath.Path(f"{bucket}/listed/a/two").write_text("3")
    assert digest_list.problem(f"{bucket}/listed") == "a/two has changed since it was written"
    epath.Path(f"{bucket}/listed/a/two").unlink()
    assert digest_list.problem(f"{bucket}/listed") == "a/two is missing"
