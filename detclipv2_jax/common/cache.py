"""What is kept between runs of a user: embeddings of names, and compiled programs."""

import hashlib
import os
import pathlib
import platform

_PROGRAM_BYTES = 4 << 30  # of all compiled programs; the least recently used are removed first


def user_directory() -> pathlib.Path:
    """Return `$XDG_CACHE_HOME/detclipv2_jax`, or `~/.cache/detclipv2_jax` if that is not set."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "detclipv2_jax"


def keep_compiled_programs(directory: pathlib.Path | None = None) -> None:
    """Cache compiled programs, unless JAX has a cache already (`JAX_COMPILATION_CACHE_DIR`).

    A program is compiled once per user, and not once per run. Call it before anything is compiled.

    Args:
        directory: of the cache; default: the user's, at most 4 GiB. Runs of several processes name
            a directory that all of them can reach: only the first one writes.
    """
    import jax  # slow to import

    # JAX adds its options to the class at run time.
    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    if directory is None:
        directory = user_directory() / "compiled" / _machine()
        jax.config.update("jax_compilation_cache_max_size", _PROGRAM_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _machine() -> str:
    """Return a name for this type of CPU: a home directory may serve machines of several types.

    Programs for CPUs use the instructions of the machine that compiled them.
    """
    description = platform.processor()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        description += next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        pass  # not Linux
    digest = hashlib.sha256(description.encode(errors="replace")).hexdigest()[:12]
    return f"{platform.machine()}-{digest}"
