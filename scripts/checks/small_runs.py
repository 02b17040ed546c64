"""What same_bytes.py runs: small federations of every kind, made here, by the command line and Flower's two apps alone.

Every run leaves a folder of its own name below the current one. Runs of one process are forks of this one, which has
everything imported: the code is that of `python -m fedlora_hf`.
"""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import json
import os
import random
import runpy
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

METHODS = ("clair", "local", "fedavg", "product_mean", "stacking", "ffa", "fedsa", "dirmag_mean")
METHODS += ("median", "trimmed_mean", "multikrum", "geometric_median")
CLIENTS = ("ada", "bob", "cyd", "dan", "eve")  # dan answers at random
MOODS = ("bad", "good", "so so")

Options = dict[str, Any]
COMMON: Options = {
    "model_name_or_path": "base",
    "num_rounds": 2,
    "local_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lora_r": 2,
    "lora_alpha": 4,
    "max_length": 64,
    "generation_examples": 0,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 5,
}
RECORDS: Options = {"dataset": "records.jsonl", "partition_by": "client", "evaluate_rounds": True}
PIPELINE: Options = {"aggregation": "dirmag_mean", "pipeline": "fedlora_optimizer", "personal_steps": 2}
TEXTS: Options = {"task": "sequence_classification", "dataset": "texts.jsonl", "partition_by": "iid", "num_clients": 4}
TEXTS |= {"text_column": "text", "label_column": "mood", "evaluate_rounds": True}
EPOCHS: Options = {"fedprox_mu": 0.1, "lora_dropout": 0.1, "clients_per_round": 3, "local_steps": None}
EPOCHS |= {"aggregation": "fedavg", "personal_steps": 2}
PRIVATE: Options = {"aggregation": "fedavg", "dp_clip": 0.05, "dp_noise_multiplier": 0.5, "dp_seed": 3}
PARALLEL: Options = {"aggregation": "clair", "local_steps": None, "lora_dropout": 0.1, "personal_steps": 1}
NODES = {100 + place: {"partition-id": place, "num-partitions": len(CLIENTS)} for place in range(len(CLIENTS))}


def train(name: str, *options: Options) -> list[str]:
    """The arguments of `fedlora train` for the run `name`, in the folder of that name; None leaves an option out."""
    merged: Options = {}
    for part in ({"output_dir": name}, COMMON, *options):
        merged |= part
    return ["train", *(f"--{option}={value}" for option, value in merged.items() if value is not None)]


def runs() -> dict[str, Callable[[], None]]:
    """{name of a run: what makes it, in the folder of that name below the current one}."""
    plans = {"demo": [["demo", "--output_dir", "demo"]]}
    plans |= {f"methods/{name}": [train(f"methods/{name}", RECORDS, {"aggregation": name})] for name in METHODS}
    for name, options in {
        "options/functional": {**RECORDS, "aggregation": "clair", "functional_judges": 2},
        "options/privacy": {**RECORDS, **PRIVATE},
        "options/epochs": {**RECORDS, **EPOCHS},
        "pipeline/clients": {**RECORDS, **PIPELINE},
        "pipeline/server": {**RECORDS, **PIPELINE, "server_dataset": "server.jsonl"},
        "classification": {**TEXTS, "aggregation": "fedavg"},
        "resume/whole": {**RECORDS, "aggregation": "clair"},
        "processes/one": {**RECORDS, **PARALLEL},
    }.items():
        plans[name] = [train(name, options)]
    plans["resume/resumed"] = [
        train("resume/resumed", RECORDS, {"aggregation": "clair", **more})
        for more in ({"num_rounds": 1}, {"resume_from": "last"})
    ]
    jobs: dict[str, Callable[[], None]] = {name: lambda plan=plan: fork_all(plan) for name, plan in plans.items()}
    jobs["processes/two"] = lambda: launch_two(train("processes/two", RECORDS, PARALLEL))
    for name, options in {
        "flower/clair": {"aggregation": "clair"},
        "flower/fedsa": {"aggregation": "fedsa"},
        "flower/pipeline": {**PIPELINE, "num_rounds": 1},
        "flower/classification": {**TEXTS, "aggregation": "fedavg", "labels": ",".join(MOODS), "num_clients": 5},
    }.items():
        config = {**COMMON, **RECORDS, **options, "output_dir": name, "min_nodes": len(NODES)}
        jobs[name] = lambda config=config: forked(lambda: flower(config))
    return dict(sorted(jobs.items()))


TWINS = (("resume/whole", "resume/resumed"), ("processes/one", "processes/two"))


def make_inputs() -> None:
    """base/ (a Llama of two layers and a tokenizer of bytes), records.jsonl, server.jsonl and texts.jsonl, here."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<pad>").save_pretrained("base")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(letters), **shape, max_position_embeddings=128, pad_token_id=0, eos_token_id=1
        )
        LlamaForCausalLM(config).save_pretrained("base")

    draw = random.Random(0)
    rows: dict[str, list[Options]] = {"records": [], "server": [], "texts": []}
    for client in (*CLIENTS, "server"):
        for number in range(12 + 3 * CLIENTS.index(client) if client in CLIENTS else 12):
            word = "".join(draw.choices("abcdefgh", k=6))
            answer = "".join(draw.choices("abcdefgh", k=6)) if client == "dan" else word[::-1]
            row = {"instruction": f"Turn {word} {number}.", "context": "", "response": answer, "category": "turn"}
            rows["server" if client == "server" else "records"].append({**row, "client": client})
            mood = MOODS[sum(map(ord, word)) % len(MOODS)]
            rows["texts"].append({"text": f"{word} is {mood[::-1]} {client} {number}", "mood": mood})
    for name, lines in rows.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def fork_all(plan: Sequence[Sequence[str]]) -> None:
    """`python -m fedlora_hf` with each of the argument lists, one after the other."""
    for arguments in plan:
        forked(lambda arguments=arguments: command_line(arguments))


def command_line(arguments: Sequence[str]) -> None:
    """`python -m fedlora_hf` in this process."""
    sys.argv = ["fedlora", *arguments]
    runpy.run_module("fedlora_hf", run_name="__main__", alter_sys=True)


def forked(work: Callable[[], None]) -> None:
    """Call `work` in a fork of this process, which says what it has to say in log.txt; SystemExit when it fails."""
    child = os.fork()
    if child == 0:
        code = 1
        with open("log.txt", "w", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                work()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit(f"a run failed:\n{Path('log.txt').read_text(encoding='utf-8')[-3000:]}")


def launch_two(arguments: Sequence[str]) -> None:
    """`python -m fedlora_hf` in two processes of this machine, as torchrun starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    done = subprocess.run([*command, "fedlora_hf", *arguments], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SystemExit(f"a run of two processes failed:\n{done.stderr[-3000:]}")


def flower(config: Options) -> None:
    """A run of the package's two Flower apps over a grid whose nodes are called at once. Nothing else of it is used."""
    from flwr.app import Context, Error, Message, RecordDict
    from flwr.serverapp import Grid
    from flwr.supercore.task_identity import TaskIdentity

    from fedlora_hf.flower.client_app import app as client_app
    from fedlora_hf.flower.server_app import app as server_app

    for name in ("_run_id", "_task_id", "_node_id"):  # Flower wants to know for which run and node a message is made
        setattr(TaskIdentity, name, 1)
    config = {name: str(value).lower() if isinstance(value, bool) else value for name, value in config.items()}
    replies: dict[str, Message] = {}
    memory = {node: RecordDict() for node in NODES}

    def push(messages: Any) -> list[str]:
        names = []
        for message in messages:
            node, name = message.metadata.dst_node_id, str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = name
            try:
                replies[name] = client_app(message, Context(1, node, dict(NODES[node]), memory[node], dict(config)))
            except Exception as error:
                replies[name] = Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)
            names.append(name)
        return names

    methods: dict[str, Any] = dict.fromkeys(Grid.__abstractmethods__)
    methods |= {
        "get_node_ids": lambda self: list(NODES),
        "push_messages": lambda self, messages: push(messages),
        "pull_messages": lambda self, ids: [replies.pop(name) for name in ids if name in replies],
    }
    grid = type("LocalGrid", (Grid,), methods)()
    server_app(grid, Context(1, 1, {}, RecordDict(), config))
