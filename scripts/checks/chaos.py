"""Kill a federated run again and again, fill its disk, cut its files short; resumed, it must end in the same bits.

    python -m scripts.checks.chaos --kills 30 --seed 0 --output_dir chaos_out  # a new `fedlora train` each time
    python -m scripts.checks.chaos --kills 30 --output_dir chaos_out --fork    # forks of one process: imports only once

One run is left undisturbed. Then others of the same options are disturbed: SIGKILL at random moments from the start of
training to the end; no file can grow any more from a random moment on (RLIMIT_FSIZE, so that write(2) gives EFBIG); the
disk is full (a small tmpfs, where one may be mounted); a file of the last committed round is cut short. Each is resumed
with --resume_from last until it ends. After every disturbance every file in sight is read: none may be half-written. At
the end the adapters must be the undisturbed run's, bit for bit. Moments are drawn from the seed; what they meet also
depends on the machine's clock.
"""
# SPDX-License-Identifier: Apache-2.0

import argparse
import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts import PROJECT

WORDS = ("harbour", "kitchen", "attic", "orchard", "library", "stable", "tower", "market", "cellar", "bakery")
TINY = ("--local_steps", "3", "--num_rounds", "4", "--per_device_train_batch_size", "2", "--lora_r", "2")
TINY += ("--lora_alpha", "4", "--learning_rate", "0.01", "--max_length", "48", "--generation_examples", "0")
TINY += ("--use_cpu", "--disable_tqdm", "True", "--aggregation", "clair", "--partition_by", "category")


ENDS = {".html": b"</html>", ".png": b"IEND\xaeB`\x82"}


@dataclass
class Result:
    """One disturbed run: what was done to it, how often it was resumed, whether it ended in the same bits."""

    kind: str
    disturbances: int = 0
    resumed: int = 0
    moments: list[str] = field(default_factory=list)
    same_bits: bool = False
    half_written: list[str] = field(default_factory=list)


class Runner:
    """Starts `fedlora train`: as a process of its own, or as a fork of this one, which has everything imported."""

    def __init__(self, base: Path, data: Path, log: Path, *, fork: bool, bare: bool) -> None:
        self.flags = ["--model_name_or_path", str(base), "--dataset", str(data), *TINY]
        self.fork, self.bare, self.log = fork, bare, log
        if fork:
            import fedlora_hf.commands.train
            import fedlora_hf.report.figures  # noqa: F401  # nothing is run before the fork

    def start(self, out: Path, resume: bool, fill_after: float | None = None) -> int:
        """The id of a process that trains into `out`. fill_after: seconds after which its files can grow no more."""
        flags = ["train", *self.flags, "--output_dir", str(out), *(("--resume_from", "last") if resume else ())]
        started(out).unlink(missing_ok=True)
        # Through a pipe: the log is not what a full disk is to meet.
        with subprocess.Popen(["tee", "-a", str(self.log)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as tee:
            assert tee.stdin is not None
            if self.fork:
                process = os.fork()
                if process == 0:
                    os.dup2(tee.stdin.fileno(), 1)
                    os.dup2(tee.stdin.fileno(), 2)
                    tee.stdin.close()
                    child(flags, str(started(out)), fill_after, self.bare)
            else:
                call = f"chaos.child({flags!r}, {str(started(out))!r}, {fill_after!r}, {self.bare!r})"
                code = f"import sys; sys.path.insert(0, {str(PROJECT)!r}); from scripts.checks import chaos; {call}"
                process = subprocess.Popen([sys.executable, "-c", code], stdout=tee.stdin, stderr=tee.stdin).pid
            tee.returncode = 0  # it ends with the process that writes into it; nobody waits for it here
        return process

    def wait(self, process: int, seconds: float) -> int | None:
        """The exit code (negative: a signal) once a process has ended, None when it has not after `seconds`."""
        end = time.monotonic() + seconds
        while True:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                return None
            time.sleep(0.002)

    def until_started(self, process: int, out: Path) -> None:
        """Wait until training begins."""
        while not started(out).exists():
            code = self.wait(process, 0.005)
            assert code is None, f"ended with {code} before it began; see {self.log}"

    def ended(self, process: int) -> int:
        code = self.wait(process, 600)
        assert code is not None, f"does not end; see {self.log}"
        return code

    def finish(self, out: Path) -> None:
        """Resume until the end."""
        code = self.ended(self.start(out, resume=True))
        assert code == 0, f"resumed, it ended with {code}; see {self.log}"


def started(out: Path) -> Path:
    """The file that a run leaves beside its output folder when training begins."""
    return out.with_name(f"{out.name}.started")


def child(flags: list[str], marker: str, fill_after: float | None, bare: bool) -> None:
    """Run `fedlora` with these arguments; then leave at once, as nothing of a parent's is to be cleaned up here."""
    from fedlora_hf import FederatedTrainer
    from fedlora_hf.cli import main
    from fedlora_hf.rounds import output

    if bare:
        output.write_report = lambda record, folder: []  # type: ignore[assignment]
    train = FederatedTrainer.train

    def marked(*args: Any, **kwargs: Any) -> Any:
        Path(marker).touch()
        if fill_after is not None:
            threading.Timer(fill_after, _fill).start()
        return train(*args, **kwargs)

    FederatedTrainer.train = marked  # type: ignore[method-assign]
    code = 1
    try:
        code = main(flags)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fill() -> None:
    """From now on no file can grow beyond a few hundred bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def weights(out: Path) -> dict[str, bytes]:
    """{path: content} of every adapter in sight in `out`: global, personal, and of every committed round."""
    found = (path for path in sorted(out.rglob("*.safetensors")) if not hidden(path.relative_to(out)))
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def hidden(path: Path) -> bool:
    """Whether a path is a draft or in an open round: not yet in sight."""
    return any(part.startswith(".") for part in path.parts)


def half_written(out: Path) -> list[str]:
    """Files in sight that cannot be read whole, and committed rounds or personal adapters that lack a file."""
    from safetensors import SafetensorError, safe_open

    bad = []
    for path in (path for path in out.rglob("*") if path.is_file() and not hidden(path.relative_to(out))):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="np") as file:
                    [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
            elif not path.read_bytes().rstrip().endswith(ENDS.get(path.suffix, b"")):
                bad.append(str(path))
        except (ValueError, SafetensorError, OSError):
            bad.append(str(path))
    need = ("adapter_config.json", "adapter_model.safetensors")
    places = list((out / "rounds").glob("[0-9]*"))
    for place in [*places, *(out / "clients").glob("[!.]*"), *(c for p in places for c in p.glob("clients/[!.]*"))]:
        bad += [str(place / name) for name in need if not (place / name).is_file()]
    return bad


def state_of(out: Path) -> str:
    """Where a run stands, in words: committed rounds, and how many updates the open one has."""
    rounds = sorted(path.name for path in (out / "rounds").glob("[0-9]*"))
    updates = len(list((out / "rounds").glob(".open-*/clients/[!.]*")))
    ending = ", at the end" if (out / "run.json").is_file() else ""
    return f"round {rounds[-1] if rounds else 0} + {updates} updates{ending}"


def killed(runner: Runner, out: Path, rng: random.Random, kills: int, span: float) -> Result:
    """One run, killed `kills` times, each up to `span` seconds after training began. One that ends between two kills
    is begun anew, so that every kill meets a living one; the span follows the pace of the machine."""
    result, resume = Result("SIGKILL"), False
    while result.disturbances < kills:
        process = runner.start(out, resume=resume)
        runner.until_started(process, out)
        delay = span * rng.random() ** 2  # more of them early: a resumed run has less left to do
        code = runner.wait(process, delay)
        if code is None:
            os.kill(process, signal.SIGKILL)
            code = runner.ended(process)
        if code != -signal.SIGKILL:  # it was done by itself, perhaps in the moment before the signal
            assert code == 0, f"the run ended with {code} by itself; see {runner.log}"
            shutil.rmtree(out)
            resume, span = False, delay
            continue
        resume, span = True, span * 1.1
        result.disturbances += 1
        result.resumed += 1
        result.moments.append(f"{delay:.2f} s: {state_of(out)}")
        result.half_written += half_written(out)
    runner.finish(out)
    return result


def filled(runner: Runner, out: Path, rng: random.Random, span: float) -> Result:
    """One run whose files can grow no more from a random moment on: it must say so, and be resumable. One that was done
    before that moment is begun anew, with an earlier one."""
    result, delay, code = Result("EFBIG"), span, 0
    while code == 0:
        shutil.rmtree(out, ignore_errors=True)
        delay *= rng.random()
        code = runner.ended(runner.start(out, resume=False, fill_after=delay))
    _after_full(result, runner, out, code, f"{delay:.2f} s")
    runner.finish(out)
    return result


def _after_full(result: Result, runner: Runner, out: Path, code: int, how: str) -> None:
    result.moments.append(f"{how}: exit {code}, {state_of(out)}")
    result.disturbances, result.resumed = int(code == 2), 1
    assert code in (0, 2), f"a full disk must end in exit code 2, not {code}; see {runner.log}"
    result.half_written += half_written(out)


def on_full_disk(runner: Runner, out: Path, rng: random.Random, needed: int) -> Result | None:
    """One run on a tmpfs that is too small for it; made larger, it goes on. None where none can be mounted."""
    result, disk, size = Result("disk full"), out.with_name(f"{out.name}.disk"), rng.randint(needed // 10, needed)
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        return None
    try:
        run = disk / "run"
        code = runner.ended(runner.start(run, resume=False))
        _after_full(result, runner, run, code, f"{size // 1024} KiB")
        subprocess.run(["mount", "-o", f"remount,size={needed * 50}", str(disk)], check=True)
        runner.finish(run)
        shutil.copytree(run, out)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return result


def cut_short(runner: Runner, out: Path, rng: random.Random, whole: Path, most: int) -> list[Result]:
    """`most` files of the last committed round cut at random places, one at a time, and the run resumed."""
    results = []
    last = max((path for path in (whole / "rounds").glob("[0-9]*")), key=lambda path: int(path.name))
    files = sorted(path for path in last.rglob("*") if path.is_file())
    for file in rng.sample(files, min(most, len(files))):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        content = file.read_bytes()
        (out / file.relative_to(whole)).write_bytes(content[: rng.randrange(len(content))])
        runner.finish(out)
        name = str(file.relative_to(whole))
        results.append(Result("cut short", 1, 1, [name], weights(out) == weights(whole), half_written(out)))
    return results


def make_base(folder: Path) -> Path:
    """A tiny causal LM and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, **{letter: 2 + n for n, letter in enumerate(map(chr, range(32, 127)))}}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "\n": len(vocabulary)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary) + 1, **shape)).save_pretrained(folder)
    return folder


def make_data(path: Path, clients: int = 5, examples: int = 12) -> Path:
    """Instruction data in as many categories as clients."""
    rng = random.Random(0)
    rows = [
        {
            "instruction": " ".join(rng.sample(WORDS, 2)),
            "context": "",
            "response": rng.choice(WORDS),
            "category": f"c{n}",
        }
        for n in range(clients)
        for _ in range(examples)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chaos(runner: Runner, folder: Path, *, kills: int, fills: int, disks: int, cuts: int, seed: int) -> list[Result]:
    """Everything, in `folder`; one Result each. AssertionError when a run does not end as it should."""
    rng, whole = random.Random(seed), folder / "whole"
    process = runner.start(whole, resume=False)
    runner.until_started(process, whole)
    began = time.monotonic()
    assert runner.ended(process) == 0, f"see {runner.log}"
    span, reference = time.monotonic() - began, weights(whole)
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    outs = {folder / "killed": lambda out: killed(runner, out, rng, kills, span)}
    outs |= {folder / f"filled{n}": lambda out: filled(runner, out, rng, span) for n in range(fills)}
    outs |= {folder / f"disk{n}": lambda out: on_full_disk(runner, out, rng, size) for n in range(disks)}
    results = []
    for out, disturb in outs.items():
        result = disturb(out)
        if result is not None:
            result.same_bits = weights(out) == reference
            result.half_written += half_written(out)
            results.append(result)
    return [*results, *cut_short(runner, folder / "cut", rng, whole, cuts)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--fills", type=int, default=5, help="runs whose files may not grow from a random moment on")
    parser.add_argument(
        "--disks", type=int, default=5, help="runs on a tmpfs that is too small, where one can be mounted"
    )
    parser.add_argument("--cuts", type=int, default=30, help="files of the last round that are cut short")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fork", action="store_true", help="forks instead of new processes: quicker, the same code")
    parser.add_argument("--bare", action="store_true", help="no figures: they take most of a tiny run's time")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    shutil.rmtree(args.output_dir, ignore_errors=True)
    args.output_dir.mkdir(parents=True)
    base, data = make_base(args.output_dir / "base"), make_data(args.output_dir / "data.jsonl")
    counts = {name: getattr(args, name) for name in ("kills", "fills", "disks", "cuts", "seed")}
    results = chaos(
        Runner(base, data, args.output_dir / "log.txt", fork=args.fork, bare=args.bare), args.output_dir, **counts
    )
    with open(args.output_dir / "chaos.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["kind", "disturbances", "resumed", "same_bits", "half_written", "moments"])
        for r in results:
            table.writerow([r.kind, r.disturbances, r.resumed, r.same_bits, len(r.half_written), "; ".join(r.moments)])
    print((args.output_dir / "chaos.csv").read_text(encoding="utf-8"))
    return 0 if all(result.same_bits and not result.half_written for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
