"""Compiled programs are kept per user, unless the user set JAX's own cache."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from detclipv2_jax.common import cache

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_are_kept_for_all_runs_of_a_user(no_cache):
    cache.keep_compiled_programs()
    directory = cache.user_directory() / "compiled"
    assert directory == no_cache / "home/detclipv2_jax/compiled"
    jax.jit(lambda x: jnp.sin(x) * 3.25 + 17)(jnp.ones(7)).block_until_ready()
    (machine,) = directory.iterdir()  # programs of another type of CPU would not run here
    assert [path.name for path in machine.iterdir() if path.name.endswith("-cache")]


def test_a_directory_that_is_given(no_cache):
    cache.keep_compiled_programs(no_cache / "shared")
    assert jax.config.jax_compilation_cache_dir == str(no_cache / "shared")
    cache.keep_compiled_programs()  # the first one stays
    assert jax.config.jax_compilation_cache_dir == str(no_cache / "shared")


def test_the_machines_name_is_stable_and_a_file_name():
    assert cache._machine() == cache._machine()
    assert cache._machine().replace("-", "").replace("_", "").isalnum()
