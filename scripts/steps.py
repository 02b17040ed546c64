"""What `results.py` runs: a step a measured result, with its real command."""
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """command: as typed in the project's folder, with {data}, {cache}, {base} and {encoder} to be filled in.
    minutes: about how long. needs: of "data", "base", "encoder", "gpu". page: where the results stand in docs/."""

    name: str
    command: str
    minutes: float
    page: str
    needs: tuple[str, ...] = ()


_SYNTHETIC = "python -m scripts.experiments.{} --seed 0 --seeds 3"
_ATTACKS = "python -m scripts.experiments.attacks --cache {cache}/attacks"
_CLAIR = "python -m scripts.benchmarks.clair"
_DIRMAG = "python -m scripts.benchmarks.dirmag --repeats 21"
_REAL = (
    "--model {base} --dolly {data}/dolly/databricks-dolly-15k.jsonl --natural_instructions {data}/natural_instructions"
)
_BASE_7M = (
    "--base {base_7m} --base_name base-7m --data {data} --model_dtype bfloat16 --use_cpu --cache {cache}/real "
    "--output_dir docs/results/real"
)
# The published ratios were measured on these tasks of Dolly.
_QUESTIONS = (
    "--dolly {data}/dolly/databricks-dolly-15k.jsonl --categories closed_qa information_extraction open_qa --iid "
    "--groups 3 --max_examples_per_client 60 --validation_fraction 0.2 --test_fraction 0.2 "
    "--per_device_train_batch_size 2 --max_length 96 --lora_r 8 --lora_alpha 16 --model_dtype bfloat16 --use_cpu"
)
STEPS = (
    Step("recovery", _SYNTHETIC.format("recovery"), 1, "results/recovery/README.md"),
    Step("noise", _SYNTHETIC.format("noise"), 1, "results/noise/README.md"),
    Step("phase", _SYNTHETIC.format("phase"), 5, "results/phase/README.md"),
    Step("oracle_gain", _SYNTHETIC.format("oracle_gain"), 1, "results/oracle_gain/README.md"),
    Step(
        "flags",
        "python -m scripts.experiments.calibrate_flags --set held-out --honest 240",
        4,
        "results/flags/README.md",
    ),
    Step(
        "flags_tuning",
        "python -m scripts.experiments.calibrate_flags --set tuning --honest 100",
        3,
        "results/flags/README.md",
    ),
    Step(
        "flags_heavy_tails",
        'python -m scripts.experiments.calibrate_flags --set held-out --families "heavy-tailed norms" --honest 800 '
        "--seed 20000 --name heavy_tails",
        1,
        "results/flags/README.md",
    ),
    Step(
        "flags_dirichlet",
        'python -m scripts.experiments.calibrate_flags --set tuning --families "Dirichlet 0.1" --clients 8 12 20 '
        "--honest 800 --seed 20000 --name dirichlet",
        1,
        "results/flags/README.md",
    ),
    Step("attacks_tuning", f"{_ATTACKS} --tune", 2, "results/attacks/README.md"),
    Step("attacks", _ATTACKS, 15, "results/attacks/README.md"),
    Step(
        "attack_evidence",
        "python -m scripts.experiments.attack_evidence --cache {cache}/attacks",
        2,
        "results/attacks/README.md",
    ),
    Step("groups", "python -m scripts.experiments.groups --seed 0 --seeds 10", 3, "results/groups/README.md"),
    Step(
        "groups_trained",
        "python -m scripts.experiments.groups_trained --base {base} --data {data} --seeds 3 "
        '--settings natural_instructions dolly "natural_instructions, dirichlet"',
        8,
        "results/groups/README.md",
        ("data", "base"),
    ),
    Step("influence_cost", _SYNTHETIC.format("influence_cost"), 1, "results/influence/README.md"),
    Step(
        "influence",
        "python -m scripts.experiments.influence --cache {cache}/attacks",
        30,
        "results/influence/README.md",
    ),
    Step(
        "influence_report",
        "python -m scripts.experiments.influence --cache {cache}/attacks --report",
        1,
        "results/influence/README.md",
    ),
    Step("judges", "python -m scripts.experiments.judges --cache {cache}/attacks", 20, "results/judges/README.md"),
    Step(
        "judges_report",
        "python -m scripts.experiments.judges --cache {cache}/attacks --report",
        1,
        "results/judges/README.md",
    ),
    Step(
        "judges_rounds",
        "python -m scripts.experiments.rounds --seed 10 --seeds 3 --regimes scarce --methods clair 'clair, functional' "
        "--cache {cache}/attacks --output_dir docs/results/judges/rounds",
        15,
        "results/judges/README.md",
    ),
    Step(
        "rounds",
        "python -m scripts.experiments.rounds --seeds 4 --cache {cache}/attacks",
        60,
        "results/rounds/README.md",
    ),
    *(
        Step(
            f"demo_{seed}",
            f"python -m fedlora_hf demo --seed {seed} --output_dir {{cache}}/demo_{seed}",
            1,
            "results.md",
        )
        for seed in range(3)
    ),
    Step(
        "privacy_cost",
        "python -m scripts.experiments.privacy_cost --output_dir docs/results/privacy --seeds 0 1 2",
        15,
        "results/privacy/README.md",
    ),
    Step(
        "base",
        "python scripts/make_base_model.py --data {data}/dolly/databricks-dolly-15k.jsonl "
        "--data {data}/natural_instructions --hidden 128 --heads 4 --minutes 13 --holdout_fraction 0.5 "
        "--output_dir {base}",
        13,
        "results/validity_map/README.md",
        ("data",),
    ),
    Step(
        "validity_map",
        "python -m scripts.experiments.validity_map --base {base} --data {data} --cache {cache}/map "
        "--encoder {encoder} --seeds 5 --judges 5 15",
        120,
        "results/validity_map/README.md",
        ("data", "base", "encoder"),
    ),
    Step(
        "sensitivity",
        f"python -m scripts.experiments.sensitivity {_REAL} --held_out_half --cache {{cache}}/sensitivity "
        "--output_dir docs/results/sensitivity",
        60,
        "results/sensitivity/README.md",
        ("data", "base"),
    ),
    Step(
        "pipeline_comparison",
        f"python -m scripts.experiments.pipeline_comparison {_REAL} --held_out_half --cache {{cache}}/pipeline "
        "--output_dir docs/results/pipeline",
        180,
        "results/pipeline/README.md",
        ("data", "base"),
    ),
    Step(
        "methods_table",
        "python -m scripts.experiments.methods_table --base {base} --data {data}/natural_instructions/tasks --seeds 3",
        30,
        "results/methods/README.md",
        ("data", "base"),
    ),
    Step(
        "methods_rounds",
        "python -m scripts.experiments.methods_rounds --base {base} --data {data}/natural_instructions/tasks --seeds 3",
        30,
        "results/methods/README.md",
        ("data", "base"),
    ),
    Step(
        "round",
        "python -m scripts.benchmarks.round --hidden 256 --clients 5 --repeats 4 --rounds 1 "
        "--csv docs/benchmarks/round_1_thread.csv",
        3,
        "benchmarks.md",
    ),
    Step(
        "round_8x128",
        "python -m scripts.benchmarks.round --hidden 256 --batch 8 --tokens 128 --clients 4 --repeats 4 --rounds 1 "
        "--csv docs/benchmarks/round_8x128.csv",
        5,
        "benchmarks.md",
    ),
    Step(
        "memory",
        "python -m scripts.benchmarks.round --memory --hidden 256 --layers 8 --rank 16 --rounds 1 "
        "--csv docs/benchmarks/memory.csv",
        5,
        "benchmarks.md",
    ),
    Step("clair", f"{_CLAIR} --modules 4 --repeats 3 --csv docs/bench_clair.csv", 1, "bench_clair.md"),
    Step("clair_64", f"{_CLAIR} --modules 64 --csv docs/bench_clair_64.csv", 5, "bench_clair.md"),
    Step("clair_many", f"{_CLAIR} --out_of_core 1000 --modules 64 --size 1024 --rank 8", 5, "bench_clair.md"),
    Step(
        "clair_disk",
        f"{_CLAIR} --out_of_core 100 300 1000 3000 5000 10000 --modules 1 --size 1024 --rank 8 "
        "--csv docs/bench_clair_disk.csv",
        10,
        "bench_clair.md",
    ),
    Step(
        "clair_figure",
        f"{_CLAIR} --tables docs/bench_clair_disk.csv --figure docs/figures/bench_clair_disk.png",
        1,
        "bench_clair.md",
    ),
    Step("dirmag_512", f"{_DIRMAG} --hidden 512 --seq 128 --batch 4", 3, "direction_magnitude.md"),
    Step("dirmag_1024", f"{_DIRMAG} --hidden 1024 --seq 128 --batch 4 --layers 1", 4, "direction_magnitude.md"),
    Step("dirmag_one", f"{_DIRMAG} --hidden 512 --seq 128 --batch 1", 1, "direction_magnitude.md"),
    Step("dirmag_short", f"{_DIRMAG} --hidden 512 --seq 32 --batch 1 --steps 8", 2, "direction_magnitude.md"),
    Step(
        "gpu",
        "python -m scripts.benchmarks.gpu --cache {cache}/gpu --csv docs/benchmarks/gpu.csv",
        8,
        "benchmarks.md",
        ("gpu",),
    ),
    Step(
        "processes", "python -m scripts.benchmarks.processes --csv docs/benchmarks/processes.csv", 10, "benchmarks.md"
    ),
    Step("scaling", "python -m scripts.benchmarks.scaling --csv docs/benchmarks/scaling.csv", 15, "benchmarks.md"),
    Step("data_records", "python -m scripts.benchmarks.data records", 3, "benchmarks.md"),
    Step(
        "data_packing",
        "python -m scripts.benchmarks.data packing --model {base} --data {data}/dolly/databricks-dolly-15k.jsonl",
        3,
        "benchmarks.md",
        ("data", "base"),
    ),
    Step("start", "python -m scripts.benchmarks.start --csv docs/benchmarks/start.csv", 2, "benchmarks.md"),
    Step("scoring", "python -m scripts.benchmarks.scoring --csv docs/benchmarks/scoring.csv", 2, "benchmarks.md"),
    Step("lockstep", "python -m scripts.benchmarks.lockstep --csv docs/benchmarks/lockstep.csv", 2, "benchmarks.md"),
    Step("engines", "python -m scripts.benchmarks.engines --csv docs/benchmarks/engines.csv", 10, "benchmarks.md"),
    Step(
        "deployment",
        "python -m scripts.checks.deployment_check --model_name_or_path {base} --markdown docs/deployment_check.md",
        10,
        "deployment_check.md",
        ("base",),
    ),
    Step("chaos", "python -m scripts.checks.chaos --kills 30 --seed 0 --output_dir {cache}/chaos", 20, "results.md"),
    Step(
        "long_run",
        "python -m scripts.checks.long_run --rounds 200 --clients 8 --csv docs/long_run.csv "
        "--output_dir {cache}/long_run",
        20,
        "results.md",
    ),
    Step(
        "many_clients",
        "python -m scripts.checks.long_run --rounds 2 --clients 1000 --csv docs/many_clients.csv "
        "--output_dir {cache}/many_clients",
        20,
        "results.md",
    ),
    Step(
        "smollm2",
        "python scripts/make_smollm2.py --output_dir {smollm2}",
        2,
        "results/real/README.md",
        ("gguf",),
    ),
    Step(
        "real_methods",
        f"python -m scripts.experiments.real_methods {_BASE_7M}",
        90,
        "results/real/README.md",
        ("data", "base_7m"),
    ),
    Step(
        "real_attacks",
        f"python -m scripts.experiments.real_attacks {_BASE_7M}",
        15,
        "results/real/README.md",
        ("data", "base_7m"),
    ),
    Step(
        "real_protocol",
        f"python -m scripts.experiments.real_protocol {_BASE_7M} --seeds 0",
        15,
        "results/real/README.md",
        ("data", "base_7m"),
    ),
    Step(
        "real_sensitivity_base_7m",
        "python -m scripts.experiments.sensitivity --model {base_7m} --seeds 5 --starts fresh federated --num_rounds 3 "
        "--steps 4 10 20 --output_dir docs/results/sensitivity/base-7m --cache {cache}/sensitivity_base_7m "
        f"{_QUESTIONS}",
        10,
        "results/sensitivity/README.md",
        ("data", "base_7m"),
    ),
    Step(
        "real_sensitivity_smollm2",
        "python -m scripts.experiments.sensitivity --model {smollm2} --seeds 1 --starts fresh --num_rounds 0 "
        "--steps 4 10 16 --output_dir docs/results/sensitivity/smollm2 --cache {cache}/sensitivity_smollm2 "
        f"{_QUESTIONS}",
        5,
        "results/sensitivity/README.md",
        ("data", "smollm2"),
    ),
    Step("real_report", "python -m scripts.experiments.real_report", 1, "results/real/README.md"),
    Step(
        "real_gpu",
        "python -m scripts.experiments.gpu --data {data} --base_7m {base_7m} --smollm2 {smollm2} --cache {cache}/gpu",
        150,
        "results/real/README.md",
        ("data", "base_7m", "smollm2", "gpu"),
    ),
    Step("redraw", "python -m scripts.experiments.redraw", 1, "results.md"),
    Step(
        "wire_dtypes",
        "python -m scripts.experiments.wire_dtypes --seeds 0 1 2 --csv docs/results/wire/wire.csv",
        5,
        "flower.md",
    ),
    Step("recordings", "python scripts/record_terminal.py", 5, "recordings/README.md"),
)
