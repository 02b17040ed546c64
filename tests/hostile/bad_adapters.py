"""Bad adapter folders, generated from a seed: each a name and a function that damages a sound folder in place."""
# SPDX-License-Identifier: Apache-2.0

import json
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
PREFIX = "base_model.model."
Damage = Callable[[Path], Any]
Case = tuple[str, Damage]
DEEP = "[" * 200_000 + "]" * 200_000


def write_sound(folder: Path, seed: int, rank: int = 2, width: int = 16) -> Path:
    """A sound LoRA folder of two modules."""
    folder.mkdir(parents=True)
    save_file(tensors(seed, rank, width), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config(rank)))
    return folder


def config(rank: int = 2) -> dict[str, Any]:
    names = ["q_proj", "v_proj"]
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 4, "target_modules": names}


def tensors(seed: int, rank: int = 2, width: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"A": (rank, width), "B": (width, rank)}
    return {
        f"{PREFIX}{module}.lora_{factor}.weight": torch.randn(shape, generator=generator)
        for module in MODULES
        for factor, shape in shapes.items()
    }


class Payload:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def cases(seed: int = 0) -> list[Case]:
    """Every case; those that are drawn at random, from `seed`."""
    rng = random.Random(seed)
    return [
        *_bytes(rng),
        *_headers(),
        *_pickles(),
        *_links(),
        *_configs(),
        *_patterns(),
        *_texts(),
        *_names(),
        *_values(),
    ]


def _bytes(rng: random.Random) -> Iterator[Case]:
    """Truncated, bit-flipped and overwritten weights."""
    for number in range(25):
        share = rng.random()
        yield f"truncated{number}", lambda f, s=share: _rewrite(f / WEIGHTS, lambda b: b[: int(s * len(b))])
    for number in range(45):
        state = rng.random()
        yield f"flipped{number}", lambda f, s=state: _rewrite(f / WEIGHTS, lambda b: _flipped(b, random.Random(s)))
    for number in range(10):
        place = rng.random()
        yield f"blanked{number}", lambda f, p=place: _rewrite(f / WEIGHTS, lambda b: _blanked(b, int(p * len(b))))
    yield "empty weights", lambda f: (f / WEIGHTS).write_bytes(b"")
    yield "longer", lambda f: _rewrite(f / WEIGHTS, lambda b: b + b"more")
    yield "empty config", lambda f: (f / CONFIG).write_bytes(b"")
    for number in range(8):
        share = rng.random()
        yield f"config cut{number}", lambda f, s=share: _rewrite(f / CONFIG, lambda b: b[: int(s * len(b))])


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def _flipped(content: bytes, rng: random.Random) -> bytes:
    """One to four bits flipped; half of the time in the header, where they say more."""
    found = bytearray(content)
    length = struct.unpack("<Q", content[:8])[0]
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(8 + length) if rng.random() < 0.5 else rng.randrange(len(found))
        found[place] ^= 1 << rng.randrange(8)
    return bytes(found)


def _blanked(content: bytes, start: int) -> bytes:
    return content[:start] + b"\0" * min(64, len(content) - start) + content[start + 64 :]


def _header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Weights whose JSON header is changed, or replaced by what `change` gives back."""

    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        new = change(header)
        text = new if isinstance(new, bytes) else json.dumps(header if new is None else new).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return damage


FIRST = f"{PREFIX}{MODULES[0]}.lora_A.weight"


def _headers() -> Iterator[Case]:
    """Headers that lie."""
    for length in (0, 1, 7, 10**6, 2**31, 2**40, 2**63, 2**64 - 1):
        yield (
            f"header length {length}",
            lambda f, n=length: _rewrite(f / WEIGHTS, lambda b: struct.pack("<Q", n) + b[8:]),
        )
    for shape in ([2**40, 2**40], [2**62, 4], [2**64], [-2, 16], [2.5, 16], ["2", 16], [], [0, 16], [32], [1] * 1000):
        yield f"shape {str(shape)[:20]}", _header(lambda h, s=shape: h[FIRST].update(shape=s))
    for offsets in ([0, 2**63], [2**63, 2**64 - 1], [-8, 0], [128, 0], [0, 0], [1, 129], ["a", "b"], [0], None):
        yield f"offsets {offsets}", _header(lambda h, o=offsets: h[FIRST].update(data_offsets=o))
    for kind in ("F31", "BOOL", "I64", "U8", 7, None, "F64", "F8_E4M3"):
        yield f"dtype {kind}", _header(lambda h, k=kind: h[FIRST].update(dtype=k))
    yield "overlap", _header(lambda h: [e.update(data_offsets=[0, 128]) for e in h.values() if "shape" in e] and None)
    yield "no offsets", _header(lambda h: h[FIRST].pop("data_offsets") and None)
    yield "entry a list", _header(lambda h: h.update({FIRST: []}))
    yield "metadata numbers", _header(lambda h: h.update(__metadata__={"a": 1}))
    yield "header a list", _header(lambda h: [1, 2])
    yield "header null", _header(lambda h: b"null")
    yield "header deep", _header(lambda h: DEEP.encode())
    yield "header twice", _header(lambda h: (json.dumps(h)[:-1] + "," + json.dumps(h)[1:]).encode())
    yield "header that unfolds", _header(lambda h: b'{"a":[' + b"[]," * 3_000_000 + b"[]]}")
    yield "sparse and wide", _sparse
    yield "header of 20 MiB", _header(lambda h: json.dumps(h).encode() + b" " * (20 << 20))
    yield (
        "header of many",
        _header(lambda h: {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(9999)}),
    )
    yield "sparse 9 GB", _sparse


def _sparse(folder: Path) -> None:
    """A file of nine gigabytes that takes no room, whose header is sound."""
    size = 9 * 10**9 // 4
    header = json.dumps({FIRST: {"dtype": "F32", "shape": [1, size], "data_offsets": [0, 4 * size]}}).encode()
    with open(folder / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4 * size)


def _pickles() -> Iterator[Case]:
    for name in (WEIGHTS, "adapter_model.bin", "adapter_model.pt"):
        yield f"pickle as {name}", lambda f, n=name: _pickled(f, n)


def _pickled(folder: Path, name: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(folder.parent / "executed")))


def _links() -> Iterator[Case]:
    """Links, pipes and folders where files should be."""
    for name in (CONFIG, WEIGHTS):
        for target in ("/etc/passwd", "/dev/zero", "/dev/null", "/nowhere/at/all", ".", name):
            yield f"{name} -> {target}", lambda f, n=name, t=target: _replaced(f / n, lambda p: p.symlink_to(t))
        yield f"{name} a pipe", lambda f, n=name: _replaced(f / n, os.mkfifo)
        yield f"{name} a folder", lambda f, n=name: _replaced(f / n, os.mkdir)
        yield f"no {name}", lambda f, n=name: (f / n).unlink()


def _replaced(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


def _configs() -> Iterator[Case]:
    """A config with one value of a wrong type, or absurd."""
    wrong = {
        "r": ["2", -1, 0, 1e308, True, None, [2], {"a": 2}, 3, 10**4000],
        "lora_alpha": ["4", None, True, [4], {}, -(10**4000), 0, 1e308, float("nan"), float("inf")],
        "rank_pattern": [[1], "x", {"q_proj": "2"}, {"q_proj": None}, {"q_proj": [2]}, {"": 3}],
        "alpha_pattern": [[1], "x", {"q_proj": "2"}, {"q_proj": None}, {"v_proj": 1e400}],
        "peft_type": ["IA3", None, ["LORA"], "LORA\u202e", {}, 7],
        "use_rslora": ["yes", [1], {}],
        "use_dora": [True, "no"],
        "target_modules": [None, "q_proj", {"a": 1}, [1, 2], ["../../x"], [[]], 5, ["q_proj"] * 1000],
        "task_type": [["CAUSAL_LM"], {}, 5, "SEQ_CLS\n"],
        "base_model_name_or_path": [5, ["x"], {"a": 1}, "../../../etc/passwd", "/etc/passwd", "x\0y", "\u202egnp.exe"],
        "auto_mapping": [{"base_model_class": "system", "parent_library": "os"}, 5],
        "modules_to_save": ["../x", [5], {"a": []}],
        "__class__": ["x"],
    }
    for name, values in wrong.items():
        for value in values:
            yield f"{name}={str(value)[:24]!r}", _changed(**{name: value})


def _changed(**changes: Any) -> Damage:
    return lambda folder: (folder / CONFIG).write_text(json.dumps({**config(), **changes}))


def _patterns() -> Iterator[Case]:
    """Regular expressions that would take for ever."""
    for name in ("rank_pattern", "alpha_pattern"):
        for key in (
            "(a+)+",
            "(.*)*x",
            ".*" * 40 + "x",
            "(",
            "(?P<a>",
            "x" * 10**5,
            "(((((.*)))))+",
            "\\",
            "a{1,99999}" * 9,
        ):
            yield f"{name} {key[:12]}", _changed(**{name: {key: 2}})
        yield f"{name} of many", _changed(**{name: {f"m{n}.*q": 2 for n in range(50_000)}})


def _texts() -> Iterator[Case]:
    """Config files that are not the JSON they seem."""
    good = json.dumps(config())
    texts: dict[str, bytes] = {
        "deep": DEEP.encode(),
        "deep object": ('{"a":' * 100_000 + "1" + "}" * 100_000).encode(),
        "bomb": ("[" + "[]," * 1_300_000 + "[]]").encode(),
        "many keys": json.dumps({str(n): n for n in range(200_000)}).encode(),
        "huge string": json.dumps({**config(), "revision": "x" * (3 << 20)}).encode(),
        "too long": b" " * (5 << 20) + good.encode(),
        "huge number": good.replace('"r": 2', '"r": ' + "9" * 10**5).encode(),
        "utf-16": good.encode("utf-16"),
        "bom": b"\xef\xbb\xbf" + good.encode(),
        "surrogate": good.replace("CAUSAL_LM", "\\ud800").encode(),
        "nul": good.replace("CAUSAL_LM", "\\u0000").encode(),
        "not utf-8": good.replace("CAUSAL", "\u00e9").encode("latin-1"),
        "infinite": good.replace('"r": 2', '"r": 1e999').encode(),
        "twice": (good[:-1] + ', "r": 3}').encode(),
        "list": b"[1]",
        "text": b'"LORA"',
        "two": (good + good).encode(),
    }
    for name, content in texts.items():
        yield f"config {name}", lambda f, c=content: (f / CONFIG).write_bytes(c)


def _named(change: Callable[[str], str]) -> Damage:
    """Weights under changed names."""
    return lambda folder: save_file({change(n): t for n, t in tensors(9).items()}, folder / WEIGHTS)


def _names() -> Iterator[Case]:
    """Names of modules that are paths, or not what they look like."""
    odd = {
        "..": "../../../etc/",
        "absolute": "/etc/cron.d/",
        "backslash": "..\\..\\",
        "nul": "a\0b.",
        "bidi": "\u202egnp.",
        "escape": "\x1b[2J\x1b[31m.",
        "newline": "a\nb.",
        "long": "m" * 10_000 + ".",
        "nfc": "caf\u00e9.",
        "nfd": "cafe\u0301.",
        "zero width": "model\u200b.",
        "fullwidth": "\uff4dodel.",
        "empty": "",
        "markup": "<script>alert(1)</script>.",
        "dots": "....",
    }
    for name, start in odd.items():
        yield f"module {name}", _named(lambda n, s=start: n.replace("model.layers", f"{s}layers"))
    both = {f"{PREFIX}{form}.lora_{x}.weight": torch.ones(2, 2) for form in ("caf\u00e9", "cafe\u0301") for x in "AB"}
    yield "module both forms", lambda f: save_file({**tensors(9), **both}, f / WEIGHTS)
    yield "only A", lambda f: save_file({n: t for n, t in tensors(9).items() if "lora_A" in n}, f / WEIGHTS)
    yield "no lora", _named(lambda n: n.replace("lora_", "dense_"))
    yield "one module", lambda f: save_file({n: t for n, t in tensors(9).items() if "q_proj" in n}, f / WEIGHTS)
    yield "more modules", lambda f: save_file({**tensors(9), **_extra()}, f / WEIGHTS)
    yield "whole tensors", lambda f: save_file({**tensors(9), f"{PREFIX}../head": torch.ones(3)}, f / WEIGHTS)


def _extra() -> dict[str, torch.Tensor]:
    return {name.replace("layers.0", "layers.7"): tensor for name, tensor in tensors(9).items()}


def _values() -> Iterator[Case]:
    """Tensors that cannot be an update."""
    for value in (float("nan"), float("inf"), -float("inf"), 1e30, -1e38, 2e6):
        yield f"value {value}", _with(lambda t, v=value: t.index_fill(0, torch.tensor(0), v))
    for kind in (torch.int8, torch.int64, torch.bool, torch.uint8, torch.float8_e5m2):
        yield f"kind {kind}", _with(lambda t, k=kind: t.to(k))
    yield "scalar", _with(lambda t: torch.tensor(1.0))
    yield "three dimensions", _with(lambda t: t[None])
    yield "no rows", _with(lambda t: t[:0])
    yield "wider", _with(lambda t: torch.cat([t, t], 1))
    yield "other rank", lambda f: (_changed(r=3)(f), save_file(tensors(9, 3, 17), f / WEIGHTS))
    yield "rank of hundreds", lambda f: (_changed(r=400)(f), save_file(tensors(9, 400), f / WEIGHTS))


def _with(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(folder: Path) -> None:
        found = tensors(9)
        found[FIRST] = change(found[FIRST]).contiguous()
        (folder / WEIGHTS).write_bytes(save(found))

    return damage


def _sparse(folder: Path) -> None:
    """A module of 240 million columns, 1.9 GB that take no room on the disk."""
    width, module = 240_000_000, "base_model.model.m.q_proj.lora_"
    header = {
        f"{module}A.weight": {"dtype": "F32", "shape": [2, width], "data_offsets": [0, 8 * width]},
        f"{module}B.weight": {"dtype": "F32", "shape": [16, 2], "data_offsets": [8 * width, 8 * width + 128]},
    }
    text = json.dumps(header).encode()
    with open(folder / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 8 * width + 128)
