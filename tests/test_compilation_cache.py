"""The folder for compiled programs: used, bounded, and left alone where the user has chosen one."""

import os
import subprocess
import sys
from pathlib import Path

from ti_jax import cache, machine

PROGRAM = """
import sys
import jax, numpy as np
from ti_jax import machine
machine.CACHE_BYTES = int(sys.argv[2]) or machine.CACHE_BYTES
for _ in range(2):  # a second call changes nothing
    machine.enable_compilation_cache()
for count in range(int(sys.argv[1])):
    jax.jit(lambda x: x * count + 1).lower(np.ones(3, np.float32)).compile()
print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
"""


def compile_programs(home, count, limit=0, **environment):
    """Folder and least seconds of a new process that compiles so many programs, without a warning."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_", "TI_JAX_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(count), str(limit)],
        capture_output=True, text=True, timeout=120, env=kept | {"HOME": str(home)} | environment,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split()


def programs(folder):
    return {path.name: path.stat().st_size for path in Path(folder).glob("*-cache")}


def test_programs_are_kept_up_to_a_limit(tmp_path):
    folder = tmp_path / ".cache" / "ti_jax" / "xla"
    assert compile_programs(tmp_path, 3) == [str(folder), "0.0"]
    first = programs(folder)
    assert len(first) == 3
    compile_programs(tmp_path, 3)
    assert programs(folder) == first
    oldest, *_ = first
    os.utime(folder / oldest, (1, 1))
    compile_programs(tmp_path, 0, limit=sum(first.values()) - 1)
    assert programs(folder) == {name: size for name, size in first.items() if name != oldest}


def test_what_was_used_last_stays(tmp_path):
    for name, used, written in (("a", 5, 1), ("b", 1, 4), ("c", 3, 1), ("d", 1, 2)):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (used, written))
    (tmp_path / "folder").mkdir()
    for limit, left in ((40, "abcd"), (39, "abc"), (30, "abc"), (29, "ab"), (10, "a"), (0, "")):
        cache.remove_oldest(tmp_path, limit)
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [*left]


def test_a_folder_that_the_user_has_chosen_is_left_alone(tmp_path):
    chosen = str(tmp_path / "chosen")
    assert compile_programs(tmp_path, 1, limit=1, JAX_COMPILATION_CACHE_DIR=chosen) == [chosen, "1.0"]
    assert not (tmp_path / ".cache").exists()
    assert compile_programs(tmp_path, 1, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="60")[1] == "60.0"
    assert not programs(tmp_path / ".cache" / "ti_jax" / "xla")


def test_a_home_that_cannot_be_written_does_without(tmp_path):
    (tmp_path / ".cache").write_text("a file")
    assert compile_programs(tmp_path, 1) == ["None", "1.0"]


def test_who_may_use_a_folder_of_its_own_host():
    """Several processes on GPUs may not: only the first would find its programs there, and the others wait for it."""
    assert machine.may_cache(1, None) and machine.may_cache(1, "gpu") and machine.may_cache(4, "tpu")
    assert machine.may_cache(2, "cpu")
    assert not machine.may_cache(2, "gpu")
