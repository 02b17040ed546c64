"""`fedlora aggregate` on folders that stock PEFT wrote, good ones and bad ones."""
# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path
from typing import Any

import models
import pytest
import sample_updates
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from fedlora_hf import cli
from fedlora_hf.adapter.files import WEIGHTS, read_adapter
from fedlora_hf.record.record import RunRecord

# A handful of random adapters agree on nothing, which clair says.
pytestmark = [
    pytest.mark.usefixtures("bare_output"),
    pytest.mark.filterwarnings("ignore::fedlora_hf.errors.ConvergenceWarning"),
]


def stock(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """An adapter of random factors of which half is common to all seeds, saved by PEFT."""
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(models.tiny_llama(), LoraConfig(**config))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                common = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 + number))
                own = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * seed + number))
                parameter.copy_(common + 0.3 * own)
    model.to(dtype).save_pretrained(folder)
    return folder


def combined(folder: Path, *adapters: str | Path, code: int = 0, **flags: Any) -> dict[str, Any]:
    """Aggregate into `folder`, and give run.json."""
    options = [f"--{name}={value}" for name, value in flags.items()]
    assert cli.main(["aggregate", *map(str, adapters), "--output_dir", str(folder), *options]) == code
    return dict(json.loads((folder / "run.json").read_text()))


def dense(folder: Path) -> torch.Tensor:
    return sample_updates.dense(read_adapter(folder)[0])


def pickled(folder: Path) -> Path:
    stock(folder)
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


def with_nan(folder: Path) -> Path:
    stock(folder)
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def test_ranks_alphas_rslora_and_dtypes_may_differ(tmp_path: Path) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"r": 4, "lora_alpha": 16},
        {"r": 3, "lora_alpha": 5, "use_rslora": True},
        {"dtype": torch.bfloat16},
        {"r": 4, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"q_proj": 1}},
    ]
    folders = [stock(tmp_path / f"site{seed}", seed, **kind) for seed, kind in enumerate(kinds)]
    record = combined(tmp_path / "out", *folders, method="product_mean", target_rank=16)
    mean = sum(dense(folder) for folder in folders) / len(folders)
    assert sample_updates.relative(dense(tmp_path / "out"), mean) < 1e-5
    assert record["quarantined"] == {}
    assert record["kind"] == "aggregate"
    assert all(facts["weight"] == pytest.approx(0.2) for facts in record["clients"].values())
    for folder in (tmp_path / "out", *(tmp_path / "out" / "clients" / f"site{seed}" for seed in range(5))):
        model = PeftModel.from_pretrained(models.tiny_llama(), str(folder))
        assert torch.isfinite(models.logits(model)).all()
    for seed, folder in enumerate(folders):
        found = dense(tmp_path / "out" / "clients" / f"site{seed}")
        assert sample_updates.relative(found, dense(folder)) < 1e-5


def test_the_output_is_the_mean_in_stock_peft(tmp_path: Path) -> None:
    folders = [stock(tmp_path / f"site{seed}", seed) for seed in range(3)]
    combined(tmp_path / "out", *folders, method="stacking")
    model = models.tiny_llama()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for folder in folders:
            for module, factors in read_adapter(folder)[0].items():
                weights[f"{module}.weight"] += factors.dense() / 3
    stock_model = PeftModel.from_pretrained(models.tiny_llama(), str(tmp_path / "out"))
    torch.testing.assert_close(models.logits(stock_model), models.logits(model), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_used_is_quarantined_with_its_reason(tmp_path: Path) -> None:
    good = [stock(tmp_path / f"site{seed}", seed) for seed in range(4)]
    (tmp_path / "empty").mkdir()
    bad = {
        "dora": stock(tmp_path / "dora", use_dora=True),
        "pickle": pickled(tmp_path / "pickle"),
        "nan": with_nan(tmp_path / "nan"),
        "other": stock(tmp_path / "other", target_modules=["k_proj"]),
        "empty": tmp_path / "empty",
        "truncated": stock(tmp_path / "truncated"),
    }
    weights = tmp_path / "truncated" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-30])
    record = combined(tmp_path / "out", *good, *bad.values(), method="product_mean")
    reasons = {
        "dora": "use_dora is set",
        "pickle": "pickled weights can run code",
        "nan": "is not finite (NaN or Inf)",
        "other": "wrong modules",
        "empty": "adapter_config.json: no such file",
        "truncated": "the file is damaged",
    }
    assert sorted(record["quarantined"]) == sorted(reasons)
    assert all(reasons[client] in record["quarantined"][client] for client in reasons)
    assert sorted(path.name for path in (tmp_path / "out" / "clients").iterdir()) == [f"site{n}" for n in range(4)]
    assert sorted(client for client, facts in record["clients"].items() if facts["collaborative"]) == [
        f"site{n}" for n in range(4)
    ]
    combined(tmp_path / "alone", *good, method="product_mean")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()


def test_the_order_of_adapters_changes_no_bit(tmp_path: Path) -> None:
    folders = [stock(tmp_path / f"site{seed}", seed) for seed in range(5)]
    combined(tmp_path / "one", *folders)
    combined(tmp_path / "two", *folders[::-1])
    assert models.weight_files(tmp_path / "one") == models.weight_files(tmp_path / "two")


def test_clair_leaves_refined_adapters_evidence_and_a_verdict(tmp_path: Path, capsys: Any) -> None:
    folders = [stock(tmp_path / f"site{seed}", seed) for seed in range(6)]
    record = combined(tmp_path / "out", *folders, rank=2, side="input")
    assert record["method"] == "clair"
    assert (record["options"]["rank"], record["options"]["side"]) == (2, "input")
    assert all(set(facts["evidence"]) == {"subspace", "direction", "scale"} for facts in record["clients"].values())
    assert record["flagged"] == []
    assert "site0" in capsys.readouterr().out
    for client in record["clients"]:
        PeftModel.from_pretrained(models.tiny_llama(), str(tmp_path / "out" / "clients" / client))


def test_options_of_a_method(tmp_path: Path) -> None:
    folders = [stock(tmp_path / f"site{seed}", seed) for seed in range(5)]
    record = combined(tmp_path / "out", *folders, aggregation="trimmed_mean", aggregation_options="trim=0.2")
    assert record["options"]["trim"] == 0.2
    record = combined(tmp_path / "same", *folders, method="trimmed_mean", aggregation_options='{"trim": 0.2}')
    assert record["options"]["trim"] == 0.2


def test_common_modules_alone(tmp_path: Path) -> None:
    folders = [stock(tmp_path / f"site{seed}", seed) for seed in range(3)]
    folders.append(stock(tmp_path / "more", 9, target_modules=["q_proj", "v_proj", "k_proj"]))
    record = combined(tmp_path / "out", *folders, method="product_mean", partial_modules="common")
    assert record["quarantined"] == {}
    assert len(record["modules"]) == 4
    for client in ("", "clients/site0", "clients/more"):
        model = PeftModel.from_pretrained(models.tiny_llama(), str(tmp_path / "out" / client))
        assert (models.logits(model) - models.logits(models.tiny_llama())).abs().max() > 1e-4
    own = read_adapter(tmp_path / "out" / "clients" / "more")[0]
    assert sample_updates.relative(sample_updates.dense(own), dense(folders[-1])) < 1e-5


def refused(capsys: Any, *arguments: str | Path) -> str:
    assert cli.main(["aggregate", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return str(line)


def test_adapters_of_one_name_are_told_apart_by_their_path(tmp_path: Path, capsys: Any) -> None:
    folders = [stock(tmp_path / f"hospital_{name}" / "checkpoint-100") for name in "abc"]
    out = tmp_path / "out"
    assert cli.main(["aggregate", *map(str, folders), "--output_dir", str(out), "--method", "product_mean"]) == 0
    assert sorted(RunRecord.load(out).clients) == ["hospital_a", "hospital_b", "hospital_c"]
    line = refused(capsys, folders[0], folders[0], "--output_dir", tmp_path / "twice")
    assert "is given twice; name every adapter once" in line
    assert not (tmp_path / "twice").exists()


def test_a_table_has_no_column_without_a_value(tmp_path: Path, capsys: Any) -> None:
    combined(tmp_path / "out", *(stock(tmp_path / name, ord(name)) for name in "ab"), method="product_mean")
    shown = capsys.readouterr().out
    assert "one shot, 2 clients" in shown
    assert "before" not in shown
    assert "on each one's test data" not in shown


def on_base(folder: Path, base: str, revision: str | None = None) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base, "revision": revision}))
    return folder


def test_differing_bases_are_told_everywhere(tmp_path: Path, capsys: Any) -> None:
    bases = {"a": "meta-llama/Llama-2-7b-hf", "b": "lmsys/vicuna", "c": "meta-llama/Llama-2-7b-hf"}
    folders = [on_base(stock(tmp_path / n, ord(n)), base) for n, base in bases.items()]
    record = combined(tmp_path / "out", *folders, method="product_mean")
    out = capsys.readouterr().err
    assert "name 2 base models" in out
    assert "lmsys/vicuna: b" in out
    assert record["model"]["bases"] == {"meta-llama/Llama-2-7b-hf": ["a", "c"], "lmsys/vicuna": ["b"]}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 different base models" in card
    assert "lmsys/vicuna" in card
    assert record["model"]["name_or_path"] == "meta-llama/Llama-2-7b-hf"
    own = json.loads((tmp_path / "out" / "clients" / "b" / "adapter_config.json").read_text())
    assert own["base_model_name_or_path"] == "lmsys/vicuna"
    line = refused(capsys, *folders, "--output_dir", tmp_path / "no", "--require_same_base")
    assert "require_same_base: the adapters name 2 base models" in line
    assert not (tmp_path / "no").exists()


def test_two_revisions_are_two_bases_and_one_base_says_nothing(tmp_path: Path, capsys: Any) -> None:
    folders = [
        on_base(stock(tmp_path / n, ord(n)), "user/base", revision) for n, revision in (("a", "v1"), ("b", "v2"))
    ]
    line = refused(capsys, *folders, "--output_dir", tmp_path / "no", "--require_same_base")
    assert "user/base@v1" in line
    same = [on_base(folder, "user/base") for folder in folders]
    record = combined(tmp_path / "out", *same, "--require_same_base", method="product_mean")
    assert "bases" not in record["model"]
    assert "base models" not in capsys.readouterr().err


def test_weights_count_as_they_are_given(tmp_path: Path, capsys: Any) -> None:
    folders = [stock(tmp_path / n, ord(n)) for n in "abc"]
    flags = ["--weights", "a=2", "b=1", "c=0.5"]
    record = combined(tmp_path / "out", *folders, *flags, method="product_mean", target_rank=8)
    mean = (2 * dense(folders[0]) + dense(folders[1]) + 0.5 * dense(folders[2])) / 3.5
    assert sample_updates.relative(dense(tmp_path / "out"), mean) < 1e-5
    assert record["clients"]["a"]["weight"] == pytest.approx(2 / 3.5)
    assert record["options"]["weights"] == {"a": 4, "b": 2, "c": 1}
    file = tmp_path / "weights.yaml"
    file.write_text("a: 2\nb: 1\nc: 0.5\n")
    combined(tmp_path / "same", *folders, "--weights", str(file), method="product_mean", target_rank=8)
    assert (tmp_path / "same" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    line = refused(capsys, *folders, "--output_dir", tmp_path / "no", *flags, "--method", "median")
    assert "weights: have no effect with median" in line


@pytest.mark.parametrize("choice", ["quarantine", "common", "zero"])
def test_what_each_choice_for_partial_modules_costs_is_shown(tmp_path: Path, capsys: Any, choice: str) -> None:
    folders = [stock(tmp_path / f"site{seed}", seed) for seed in range(3)]
    folders.append(stock(tmp_path / "less", 9, target_modules=["q_proj"]))
    record = combined(tmp_path / "out", *folders, method="product_mean", partial_modules=choice, target_rank=8)
    out = " ".join(capsys.readouterr().err.split())
    assert "leaves out 1 clients (less)" in out
    assert "counts 2 missing modules as no change: 25% of what is averaged in 2 modules is zeros" in out
    costs = record["diagnosis"]["partial_modules"]
    assert costs["chosen"] == choice
    assert sorted(record["quarantined"]) == (["less"] if choice == "quarantine" else [])
    assert len(read_adapter(tmp_path / "out")[0]) == (2 if choice == "common" else 4)
    model = PeftModel.from_pretrained(models.tiny_llama(), str(tmp_path / "out"))
    assert torch.isfinite(models.logits(model)).all()
    line = refused(capsys, *folders, "--output_dir", tmp_path / "no", "--partial_modules", "refuse")
    assert "2 modules are not in all updates" in line


@pytest.mark.parametrize(
    ("task_type", "task", "kind"),
    [
        ("SEQ_2_SEQ_LM", "seq_2_seq_lm", "AutoModelForSeq2SeqLM"),
        ("TOKEN_CLS", "token_classification", "AutoModelForTokenClassification"),
        ("QUESTION_ANS", "question_answering", "AutoModelForQuestionAnswering"),
        ("FEATURE_EXTRACTION", "feature_extraction", "AutoModel"),
    ],
)
def test_the_card_names_the_class_of_every_task(tmp_path: Path, task_type: str, task: str, kind: str) -> None:
    folders = [stock(tmp_path / f"site{seed}", seed) for seed in range(2)]
    for folder in folders:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": task_type}))
    record = combined(tmp_path / "out", *folders, method="product_mean")
    assert record["model"]["task"] == task
    assert f"{kind}.from_pretrained(" in (tmp_path / "out" / "README.md").read_text()


def test_no_usable_adapter_is_an_error(tmp_path: Path, capsys: Any) -> None:
    line = refused(capsys, pickled(tmp_path / "p"), "--output_dir", tmp_path / "out")
    assert "none of 1 adapters can be read; 'p' for one:" in line
    line = refused(capsys, with_nan(tmp_path / "n"), "--output_dir", tmp_path / "out", "--method", "fedavg")
    assert "0 usable updates" in line
    assert not (tmp_path / "out").exists()


def test_where_too_few_can_be_used_the_others_are_told_with_their_reasons(tmp_path: Path, capsys: Any) -> None:
    """clair needs three: what is missing is named, not only how many are left."""
    good = [stock(tmp_path / f"site{seed}", seed) for seed in range(2)]
    line = refused(capsys, *good, pickled(tmp_path / "p"), "--output_dir", tmp_path / "out")
    assert "2 of 3 adapters can be read, and the method needs 3; the others: 'p':" in line
    line = refused(capsys, *good, with_nan(tmp_path / "n"), "--output_dir", tmp_path / "out")
    assert "clients that can be used: 2, and clair needs at least 3; use product_mean for fewer (left out: n: " in line
    assert not (tmp_path / "out").exists()


def test_a_run_again_replaces_the_clients_of_before(tmp_path: Path) -> None:
    folders = [stock(tmp_path / f"site{seed}", seed) for seed in range(4)]
    combined(tmp_path / "out", *folders, method="fedavg")
    combined(tmp_path / "out", *folders[:3], method="fedavg")
    assert sorted(path.name for path in (tmp_path / "out" / "clients").iterdir()) == ["site0", "site1", "site2"]
