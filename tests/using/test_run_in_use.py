"""A finished run in use: answers in its own wording, metrics of other data, merged models that are exact."""
# SPDX-License-Identifier: Apache-2.0

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import sample_data
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedlora_hf import FederatedTrainer, cli
from fedlora_hf.data.tokenize import tokenize_prompts
from fedlora_hf.errors import ConfigError, RecordError
from fedlora_hf.training.metrics import generate_answers
from fedlora_hf.using.asking import Question, ask, prompt_of, told_wording, wording_of_run
from fedlora_hf.using.finished import BASE, Finished
from fedlora_hf.using.loaded import load

pytestmark = pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning")
FLAGS = {
    "aggregation": "fedavg",
    "num_rounds": 1,
    "local_steps": 2,
    "per_device_train_batch_size": 4,
    "lora_r": 2,
    "learning_rate": 0.05,
    "generation_examples": 0,
    "max_length": 64,
    "use_cpu": True,
    "disable_tqdm": True,
}


def train(base: Path, dataset: Path, folder: Path, **changes: Any) -> Path:
    flags = {"model_name_or_path": base, "dataset": dataset, "output_dir": folder, **FLAGS, **changes}
    assert cli.main(["train", *(f"--{name}={value}" for name, value in flags.items())]) == 0
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_figures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlora_hf.rounds.output.write_report", lambda record, folder: [])
        patch.setattr("os.fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("use")


@pytest.fixture(scope="module")
def base(place: Path) -> Path:
    return models.save_base(place / "base")


@pytest.fixture(scope="module")
def data(place: Path) -> Path:
    return sample_data.write_dolly(place / "dolly.jsonl", 40)


@pytest.fixture(scope="module", params=["lora", "dirmag"])
def out(request: Any, place: Path, base: Path, data: Path) -> Path:
    return train(base, data, place / request.param, adapter=request.param)


@pytest.fixture(scope="module")
def plain_out(place: Path, base: Path, data: Path) -> Path:
    return train(base, data, place / "plain")


def refused(capsys: Any, *arguments: object) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("fedlora: error: ")
    return str(lines[-1])


# ---- merge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["global", "client"])
def test_a_merged_model_gives_the_logits_of_base_and_adapter(out: Path, base: Path, tmp_path: Path, whose: str) -> None:
    client = Finished.read(out).clients[0]
    folder = out if whose == "global" else out / "clients" / client
    more = [] if whose == "global" else ["--client", client]
    assert cli.main(["merge", str(out), *more, "--output_dir", str(tmp_path / "m")]) == 0
    alone = AutoModelForCausalLM.from_pretrained(base)
    bare = models.logits(alone)
    with_adapter = models.logits(PeftModel.from_pretrained(alone, str(folder)))
    merged = models.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m"))
    assert (merged - with_adapter).abs().max() < 1e-5
    assert (bare - with_adapter).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "m").get_vocab() == models.tiny_tokenizer().get_vocab()
    assert not (tmp_path / "m" / "adapter_config.json").exists()
    assert str(base) not in (tmp_path / "m" / "README.md").read_text()


def test_a_merged_classifier_has_the_trained_head_and_its_classes(place: Path, tmp_path: Path) -> None:
    base = models.save_base(place / "headless")
    data = sample_data.write_dolly(tmp_path / "d.jsonl", 60)
    out = train(base, data, tmp_path / "out", task="sequence_classification", partition_by="iid", num_clients=2)
    assert cli.main(["merge", str(out), "--output_dir", str(tmp_path / "m")]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    labels = json.loads((out / "run.json").read_text())["model"]["labels"]
    assert merged.config.id2label == dict(enumerate(labels))
    again = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels))
    expected = models.logits(PeftModel.from_pretrained(again, str(out)))
    assert (models.logits(merged) - expected).abs().max() < 1e-5

    run = Finished.read(out)
    loaded = load(run, use_cpu=True)
    question = Question("What is the capital of France?")
    answers = dict(ask(run, loaded, run.adapters(everything=True), question))
    assert set(answers) == {"base", "global", *run.clients}
    assert answers["global"] != answers["base"]  # the head that was trained is gone again for the base
    assert dict(ask(run, load(run, use_cpu=True), [BASE], question)) == {"base": answers["base"]}
    assert all(label in labels for label in (part.rsplit(" ", 1)[0] for part in answers["global"].split(", ")))


def test_a_merged_model_is_written_in_the_dtype_that_is_asked_for(plain_out: Path, tmp_path: Path) -> None:
    assert cli.main(["merge", str(plain_out), "--output_dir", str(tmp_path / "m"), "--dtype", "bfloat16"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert merged.dtype == torch.bfloat16


def test_where_a_merged_model_may_not_go(plain_out: Path, base: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "not empty" in refused(capsys, "merge", plain_out, "--output_dir", tmp_path / "full")
    for folder in (plain_out, plain_out / "clients", plain_out.parent, base):
        assert "overlaps with" in refused(capsys, "merge", plain_out, "--output_dir", folder)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_no_run_no_client_or_no_base_is_said_in_one_line(plain_out: Path, tmp_path: Path, capsys: Any) -> None:
    client = Finished.read(plain_out).clients[0]
    assert "no such folder" in refused(capsys, "ask", tmp_path / "none", "hello")
    assert "run.json: no such file" in refused(capsys, "ask", tmp_path, "hello")
    assert f"did you mean {client!r}?" in refused(capsys, "ask", plain_out, "--client", client[:-1], "hello")
    assert "the base model is not there" in refused(
        capsys, "ask", plain_out, "hello", "--model_name_or_path", tmp_path / "gone"
    )
    other = models.tiny_llama(vocab_size=len(models.tiny_tokenizer()), hidden_size=32)
    other.save_pretrained(tmp_path / "other")
    models.tiny_tokenizer().save_pretrained(tmp_path / "other")
    assert "does not fit it" in refused(
        capsys, "merge", plain_out, "--model_name_or_path", tmp_path / "other", "--output_dir", tmp_path / "m"
    )
    assert "question=''" in refused(capsys, "ask", plain_out, " ")


def test_a_flagged_client_has_no_personal_adapter(plain_out: Path) -> None:
    run = Finished.read(plain_out)
    run.record.flagged.append("mallory")
    with pytest.raises(ConfigError, match="'mallory': has no personal adapter in this run: it was flagged"):
        run.adapters(["mallory"])
    run.record.flagged.remove("mallory")


def test_a_client_is_known_by_its_name_in_the_data_too(plain_out: Path) -> None:
    run = Finished.read(plain_out)
    run.record.data["names"] = {run.clients[0]: "Zürich"}
    assert run.adapters(["Zürich"])[0].name == run.clients[0]


# ---- ask -------------------------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_the_adapter_in_the_wording_of_training(plain_out: Path, base: Path, capsys: Any) -> None:
    question = "Name a colour."
    assert cli.main(["ask", str(plain_out), "--use_cpu", "--max_new_tokens", "6", question]) == 0
    shown = capsys.readouterr()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(plain_out))
    tokenizer = models.tiny_tokenizer()
    ids = tokenize_prompts([f"Instruction:\n{question}\n\nAnswer:\n"], tokenizer, max_length=64)
    expected = generate_answers(model, ids, tokenizer, max_new_tokens=6)[0].strip()
    assert shown.out.strip() == (expected or "(no answer: the model ended at once)")
    assert "asked in our wording of instructions" in shown.err


def test_nothing_of_others_is_said_when_an_adapter_is_put_in(plain_out: Path) -> None:
    """The suite ignores PEFT's use of a deprecated name; a user would read it with every answer."""
    run = Finished.read(plain_out)
    loaded = load(run, use_cpu=True)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("error")
        ask(run, loaded, run.adapters(everything=True), Question("Name a colour."), 1)


def test_side_by_side_each_adapter_answers_for_itself(plain_out: Path) -> None:
    """Whatever was asked before: an answer does not depend on the order of the adapters."""
    run = Finished.read(plain_out)
    loaded, question = load(run, use_cpu=True), Question("Name a colour.", context="Red, green.")
    every = run.adapters(everything=True)
    assert [adapter.name for adapter in every] == ["base", "global", *run.clients]
    first = dict(ask(run, loaded, every, question, 8))
    second = dict(ask(run, loaded, every[::-1], question, 8))
    assert first == second
    assert [name for name, _ in ask(run, loaded, run.adapters(run.clients[:1], True), question, 1)] == [
        "base",
        "global",
        run.clients[0],
    ]


def test_a_run_in_a_templates_words_is_asked_in_them(place: Path, base: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    data = sample_data.write_dolly(tmp_path / "d.jsonl", 30)
    out = train(base, data, tmp_path / "out", chat_template=template)
    template.unlink()  # the run keeps what it needs
    run = Finished.read(out)
    loaded = load(run, use_cpu=True)
    wording = wording_of_run(run, loaded)
    assert wording.instructions
    assert "chat.jinja" in told_wording(run, wording)
    chat = json.loads(str(prompt_of(Question("Hi", system="Be kind"), run, wording)["chat"]))
    assert [turn["role"] for turn in chat["messages"]] == ["system", "user", "assistant"]
    assert ask(run, loaded, run.adapters(), Question("Hi"), 2)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("User:\n...\n\nAssistant:\n", "System:\nS\n\nUser:\nQ\n\nC\n\nAssistant:\n"),
        ("...", "S\n\nC\n\nQ"),
        ("Instruction:\n...\n\nAnswer:\n", "Instruction:\nS\n\nQ\n\nContext:\nC\n\nAnswer:\n"),
    ],
)
def test_our_own_forms_of_a_prompt(plain_out: Path, form: str, expected: str) -> None:
    run = Finished.read(plain_out)
    run.record.data["wording"] = {"chat_template": "none", "example": form}
    loaded = load(run, use_cpu=True)
    assert prompt_of(Question("Q", "C", "S"), run, wording_of_run(run, loaded)) == {"prompt": expected}


# ---- evaluate --------------------------------------------------------------------------------------------------------


def test_metrics_on_other_data_are_those_of_training(plain_out: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    """The loss told in a file, against Trainer's own for the same examples."""
    client = Finished.read(plain_out).clients[0]
    numbers = tmp_path / "numbers.json"
    flags = ["--use_cpu", "--client", client, "--output", str(numbers), "--generation_examples", "1"]
    assert cli.main(["evaluate", str(plain_out), "--dataset", str(data), *flags]) == 0
    shown = capsys.readouterr().out
    found = json.loads(numbers.read_text())
    assert list(found["metrics"]) == ["base", client, "global"]
    measured = found["metrics"]["global"]
    assert {"loss", "perplexity", "token_accuracy", "exact_match", "rouge_l"} < set(measured)
    assert measured["rouge_l_low"] <= measured["rouge_l"] <= measured["rouge_l_high"]
    assert "rouge_l (95 %)" in shown
    assert "rouge_l_low" not in shown
    assert f"{found['metrics']['global']['loss']:.4f}" in shown
    assert found["metrics"]["global"]["loss"] < found["metrics"]["base"]["loss"]
    assert cli.main(["evaluate", str(plain_out), "--dataset", str(data), "--use_cpu", "--max_eval_examples", "0"]) == 2


# ---- a trainer of a finished run -------------------------------------------------------------------------------------


def test_a_trainer_stands_where_its_run_ended_and_goes_on(place: Path, base: Path, data: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    train(base, data, out)
    train(base, data, whole, num_rounds=2)
    before = json.loads((out / "run.json").read_text())
    trainer = FederatedTrainer.from_run(out)
    assert trainer.run.round == 1
    measured = trainer.evaluate()
    assert measured["eval_global_loss"] == pytest.approx(before["metrics"]["after"]["global"]["loss"], abs=1e-12)
    assert set(trainer.run.personalised) == set(Finished.read(out).clients)
    assert json.loads((out / "run.json").read_text()) == before  # looking changes nothing
    FederatedTrainer.from_run(out, changes={"num_rounds": 2}).train()
    adapter = "adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (whole / adapter).read_bytes()


def test_a_run_from_python_needs_its_model_and_data_again(tmp_path: Path) -> None:
    models.federation(tmp_path, num_rounds=1).train()
    with pytest.raises(ConfigError, match="model_name_or_path: the run's record names none; pass model="):
        FederatedTrainer.from_run(tmp_path)
    clients = models.token_clients({"ada": 4, "bob": 6, "eve": 5})
    trainer = FederatedTrainer.from_run(tmp_path, clients, model=models.tiny_llama())
    assert trainer.run.round == 1
    with pytest.raises(RecordError, match="no such file"):
        FederatedTrainer.from_run(tmp_path / "none")
    with pytest.raises(ConfigError, match="'num_round' is no option of a run; did you mean 'num_rounds'"):
        FederatedTrainer.from_run(tmp_path, changes={"num_round": 3})
