"""The scripts around Flower: the cost model finds what made the numbers, certificates hold, memory is counted once."""
# SPDX-License-Identifier: Apache-2.0

import importlib
import os
import ssl
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def script(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"scripts.{request.param}")


@pytest.mark.parametrize("script", ["benchmarks.scaling"], indirect=True)
def test_the_cost_model_recovers_its_coefficients_and_foretells(script: ModuleType) -> None:
    truth = script.Model("clair", linear=2e-9, other=3e-6, copies=2.5, dense=1.5)
    cases = [script.Case(K, 2, 512, 8) for K in (100, 300, 1000)]
    results = {c: {"seconds": truth.seconds(c), "MiB": truth.mib(c)} for c in cases}
    model = script.fitted("clair", {case: results[case] for case in cases[:2]})
    assert model[1:] == pytest.approx(truth[1:], rel=1e-6)
    line = script.row("clair", cases[2], model, results[cases[2]])
    assert (line["s/model"], line["MiB/model"], line["basis"]) == (1.0, 1.0, "measured")
    assert script.row("clair", cases[2], model, None)["basis"] == "by formula"


@pytest.mark.parametrize("script", ["benchmarks.scaling"], indirect=True)
def test_the_formula_of_a_message_is_its_size(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    case = script.Case(1, 3, 32, 4)
    formula, _ = script.traffic(case)
    numbers = [int(word) for word in formula.replace(",", "").split() if word.isdigit()]
    assert numbers[0] == case.numbers == 3 * 4 * 64
    assert numbers[1] == numbers[2] == 4 * case.numbers < numbers[3] < 4 * case.numbers + 2000


@pytest.mark.parametrize("script", ["benchmarks.scaling"], indirect=True)
def test_one_cohort_is_measured(script: ModuleType) -> None:
    found = script.measure(script.Case(4, 1, 16, 2), "clair")
    assert found["seconds"] > 0
    assert found["MiB"] >= 0


@pytest.mark.parametrize("script", ["checks.flower_daemons"], indirect=True)
def test_certificates_are_for_this_host_and_keys_are_private(script: ModuleType, tmp_path: Path) -> None:
    key, certificate, ca = script.authority(tmp_path)
    _, _, other = script.authority(tmp_path, "other")
    server, server_key = script.server_files(tmp_path, key, certificate)
    node_key, node_public = script.node_keys(tmp_path, "ada")
    assert handshake(server, server_key, ca) == "127.0.0.1"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, server_key, other)
    assert [path.stat().st_mode & 0o077 for path in (server_key, node_key)] == [0, 0]
    assert node_public.read_text().startswith("ecdsa-sha2-nistp384 ")


def handshake(certificate: Path, key: Path, trusted: Path) -> str:
    """The name a client that trusts an authority is shown, over buffers in memory."""
    here, there = ssl.create_default_context(cafile=trusted), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there.load_cert_chain(certificate, key)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = here.wrap_bio(down, up, server_hostname="127.0.0.1")
    server = there.wrap_bio(up, down, server_side=True)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    shown = client.getpeercert() or {}
    return next(value for kind, value in shown["subjectAltName"] if kind == "IP Address")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="memory is counted on Linux alone")
@pytest.mark.parametrize("script", ["benchmarks.engines"], indirect=True)
def test_memory_of_marked_processes_is_counted_and_of_no_others(script: ModuleType) -> None:
    code = "import time; block = bytearray(64 << 20); time.sleep(30)"
    with script.Memory("mine") as memory:
        children = [
            subprocess.Popen([sys.executable, "-c", code], env={**os.environ, script.MARK: mark})
            for mark in ("mine", "another")
        ]
        end = time.monotonic() + 20
        while memory.peak < 64 and time.monotonic() < end:
            time.sleep(0.1)
        for child in children:
            child.kill()
            child.wait()
    assert 64 < memory.peak < 128


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="processes are looked up on Linux alone")
@pytest.mark.parametrize("script", ["checks.flower_daemons"], indirect=True)
def test_a_daemon_ends_with_its_children(script: ModuleType, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    child = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with script.Daemons(tmp_path) as daemons:
        daemon = daemons.start("parent", sys.executable, "-c", code)
        end = time.monotonic() + 20
        while not (pid.is_file() and pid.read_text()) and time.monotonic() < end:
            time.sleep(0.1)
    assert daemon.poll() is not None
    end = time.monotonic() + 10
    while runs(int(pid.read_text())) and time.monotonic() < end:
        time.sleep(0.1)
    assert not runs(int(pid.read_text()))


def runs(pid: int) -> bool:
    """Whether a process is there, and is more than the entry of one that ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
