"""Flower's daemons as child processes on this machine: a SuperLink, SuperNodes, runs, and the certificates they need.

What benchmarks/engines.py, deployment_check.py and the tests share. All is kept in one folder: Flower's own state, one
log a daemon, certificates. Every daemon is a process group of its own, which ends with the `Daemons` that started it.
"""
# SPDX-License-Identifier: Apache-2.0

import datetime
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from scripts import python_path

CONNECTION = "here"
START_SECONDS = 60.0


class Daemons:
    """Starts daemons on free ports of 127.0.0.1 and ends them all. `folder`: where everything of theirs is kept."""

    def __init__(self, folder: Path, more_env: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "home").mkdir(parents=True, exist_ok=True)
        # Flower starts its children by bare name: they must be found beside this Python.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self.env = {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": python_path(),
            "PYTHONWARNINGS": "",
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_DISABLE_IMPORT_WARNING": "1",
            "HF_HUB_OFFLINE": "1",
            **(more_env or {}),
        }
        self.port = free_port()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for name in reversed(list(self.running)):
            self.stop(name)

    def start(self, name: str, *command: str | Path) -> subprocess.Popen[bytes]:
        """Start a daemon; what it says goes to `folder`/<name>.log."""
        with open(self.folder / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(
                [str(part) for part in command],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.env,
                start_new_session=True,
            )
        return self.running[name]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM, seconds: float = 10.0) -> None:
        """End a daemon and its children: asked first, then killed."""
        daemon = self.running.pop(name)
        for step in dict.fromkeys((how, signal.SIGKILL)):
            try:
                os.killpg(daemon.pid, step)
            except ProcessLookupError:
                break
            try:
                daemon.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
        daemon.wait(seconds)

    def superlink(self, *options: str | Path, certificate: Path | None = None) -> None:
        """Start the SuperLink and name it to `flwr` as CONNECTION; it is there when this returns."""
        security = ["insecure = true"] if certificate is None else [f'root-certificates = "{certificate}"']
        lines = ["[superlink]", f'default = "{CONNECTION}"', f"[superlink.{CONNECTION}]"]
        lines += [f'address = "127.0.0.1:{self.port}"', *security]
        (self.folder / "home" / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.start("superlink", "flower-superlink", "--host", "127.0.0.1", "--port", str(self.port), *options)
        self._listening(self.port, "superlink")

    def supernode(self, name: str, config: Mapping[str, Any], *options: str | Path) -> None:
        """Start a SuperNode with its own configuration."""
        address = ["--superlink", f"127.0.0.1:{self.port}", "--host", "127.0.0.1", "--port", str(free_port())]
        self.start(name, "flower-supernode", *address, "--node-config", pairs(config), *options)

    def flwr(self, *arguments: str | Path) -> dict[str, Any]:
        """One `flwr` command's answer as JSON; RuntimeError with what it said when it failed."""
        # An exit code of 0 says little: a failed run gives it too.
        command = ["flwr", *map(str, arguments), "--format", "json"]
        done = subprocess.run(command, capture_output=True, text=True, env=self.env, timeout=120)
        start = done.stdout.find("{")
        try:
            answer: dict[str, Any] = json.loads(done.stdout[start:])
        except ValueError:
            answer = {}
        if done.returncode or not answer.get("success", False):
            raise RuntimeError(f"{' '.join(command)}: {done.stdout[-1500:]}{done.stderr[-1500:]}")
        return answer

    def submit(self, app: Path, config: Mapping[str, Any], federation: Mapping[str, Any] | None = None) -> str:
        """Submit a run; its id."""
        more = ["--federation-config", pairs(federation)] if federation else []
        return str(self.flwr("run", app, CONNECTION, "--run-config", pairs(config), *more)["run-id"])

    def status(self, run: str) -> str:
        """Where a run stands: "running", "finished:completed", "finished:failed" ..."""
        return str(self.flwr("list", CONNECTION, "--run-id", run)["runs"][0]["status"])

    def wait(self, run: str, seconds: float) -> str:
        """Its last status, when the run has finished; RuntimeError when it has not in time."""
        end = time.monotonic() + seconds
        while not (status := self.status(run)).startswith("finished"):
            if time.monotonic() > end:
                raise RuntimeError(f"run {run}: {status} after {seconds:g} s; {self.log('superlink')[-3000:]}")
            time.sleep(1.0)
        return status

    def _listening(self, port: int, name: str) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.running[name].poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"{name} does not listen: {self.log(name)[-2000:]}")


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def pairs(values: Mapping[str, Any]) -> str:
    """key=value pairs as `flwr` reads them: TOML values, a blank between."""
    return " ".join(f"{name}={json.dumps(value)}" for name, value in values.items())


def authority(folder: Path, name: str = "ca") -> tuple[Any, Any, Path]:
    """A certificate authority of its own: (key, certificate, the PEM file that clients trust)."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedlora test {name}")])
    certificate = _signed(key.public_key(), subject, key, subject, x509.BasicConstraints(ca=True, path_length=0))
    return key, certificate, _write(folder / f"{name}.pem", [certificate])


def server_files(folder: Path, key: Any, certificate: Any) -> tuple[Path, Path]:
    """(certificate, private key) files of a server on 127.0.0.1, signed by the authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    own = ec.generate_private_key(ec.SECP256R1())
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    signed = _signed(own.public_key(), subject, key, certificate.subject, x509.SubjectAlternativeName(names))
    return _write(folder / "server.pem", [signed, certificate]), _write_key(folder / "server.key", own)


def node_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """(private, public) key files with which a SuperNode proves who it is: NIST P-384, as OpenSSH writes them."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    (folder / f"{name}.pub").write_bytes(public + b"\n")
    return _private(folder / f"{name}.key", private), folder / f"{name}.pub"


def _signed(public: Any, subject: Any, key: Any, issuer: Any, extension: Any) -> Any:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
    builder = builder.serial_number(x509.random_serial_number()).add_extension(extension, critical=False)
    builder = builder.not_valid_before(now - datetime.timedelta(days=1))
    return builder.not_valid_after(now + datetime.timedelta(days=2)).sign(key, hashes.SHA256())


def _write(path: Path, certificates: Sequence[Any]) -> Path:
    from cryptography.hazmat.primitives.serialization import Encoding

    path.write_bytes(b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates))
    return path


def _write_key(path: Path, key: Any) -> Path:
    from cryptography.hazmat.primitives import serialization

    kind, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return _private(path, key.private_bytes(serialization.Encoding.PEM, kind, plain))


def _private(path: Path, content: bytes) -> Path:
    path.touch(mode=0o600)
    path.write_bytes(content)
    return path
