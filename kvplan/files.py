"""Reading and writing files so that nothing is ever half-written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from kvplan.errors import KVPlanError


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write to a temporary file beside `path`, then rename it. A device or pipe is written to as it is.

    Raises:
        KVPlanError: the folder is missing or read-only, or the disk is full; `path` is as it was.
    """
    if _is_stream(path):
        _write_stream(path, data)
        return
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise KVPlanError(f"{path}: cannot write ({error.strerror}); nothing was changed") from error


def _is_stream(path: Path) -> bool:
    """A device, a pipe, or a name of an open file such as /dev/stdout: renaming over it would take it away."""
    whole = path.absolute()
    named = whole.parts[1:2] == ("proc",) or whole.parent in (Path("/dev"), Path("/dev/fd"))
    return path.exists() and not path.is_dir() and (named or not path.is_file())


def _write_stream(path: Path, data: bytes) -> None:
    try:
        with path.open("ab", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
    except OSError as error:
        raise KVPlanError(f"{path}: cannot write ({error.strerror})") from error


def check_writable(path: Path, inputs: Iterable[str | Path | None] = ()) -> None:
    """Fail before long work, not after it.

    Args:
        path: What will be written.
        inputs: What the command reads, as far as these are files; writing over them would lose them.

    Raises:
        KVPlanError: `path` is a folder or an input, or a file could not be created beside it.
    """
    if path.is_dir():
        raise KVPlanError(f"{path}: a folder; name a file")
    if any(other is not None and Path(other).resolve() == path.resolve() for other in inputs):
        raise KVPlanError(f"{path}: this command reads that file; name another one to write")
    if _is_stream(path):
        if not os.access(path, os.W_OK):
            raise KVPlanError(f"{path}: cannot write there ({os.strerror(errno.EACCES)})")
        return
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise KVPlanError(f"{path}: cannot write there ({error.strerror})") from error


@contextlib.contextmanager
def sole_writer(path: Path, owner: str) -> Iterator[None]:
    """Hold `path` against processes that would overwrite it with something else. The kernel frees it when we die.

    Args:
        owner: What writes it; processes of the same owner share it.

    Raises:
        KVPlanError: a process of another owner holds it, or it is no file.
    """
    if _is_stream(path):
        raise KVPlanError(f"{path}: not a file, and the best policy so far is kept there; name a file")
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            if (other := file.read()) != owner:
                raise KVPlanError(f"{path}: another search ({other}) is writing it; give another -o") from None
            yield
            return
        file.truncate(0)
        file.write(owner)
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()


def read_text(path: Path, what: str) -> str:
    """Raises: KVPlanError: the file is missing or not UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors begin a file with a byte-order mark
    except UnicodeDecodeError as error:
        raise KVPlanError(f"{path}: not a {what} (not UTF-8 text)") from error
    except OSError as error:
        raise KVPlanError(f"{path}: cannot read the {what} ({error.strerror})") from error
