"""The commands by what a person wants, for `fedlora --help`; and the parsers of those that use a finished run."""
# SPDX-License-Identifier: Apache-2.0

import argparse
from typing import Any

COMMANDS: dict[str, dict[str, str]] = {
    "try": {"demo": "a small federation with contaminated clients, made on the spot"},
    "prepare": {
        "methods": "the aggregation methods, their options and papers",
        "preview": "the first examples of each client as the model sees them",
    },
    "train": {
        "train": "the main job: rounds of local training and aggregation",
        "aggregate": "combine LoRA adapters trained anywhere, in one shot",
    },
    "look": {
        "report": "figures and a self-contained page from a run's record",
        "evaluate": "metrics of a finished run's adapters on other data",
    },
    "use": {
        "ask": "an answer in the wording the adapters were trained with",
        "merge": "base and adapter as one stock model folder",
    },
    "share": {"push": "put an output folder on the Hub"},
}
ABOUT = {name: about for group in COMMANDS.values() for name, about in group.items()}


def by_purpose() -> str:
    """What `fedlora --help` says of the commands."""
    lines = []
    for group, commands in COMMANDS.items():
        lines.append(f"{group}:")
        lines += [f"  {name:10}  {about}" for name, about in commands.items()]
    return "\n".join(lines)


def add_using(commands: Any) -> None:
    """Add the parsers of ask, evaluate and merge, which take a finished run's folder."""
    ask = _on_a_run(commands, "ask", "clients' personal adapters instead of the global one; may be given again")
    ask.add_argument("question", metavar="QUESTION", help="in quotes; of a classifier: the text to classify")
    ask.add_argument("--all", dest="everything", action="store_true", help="base, global and personal, side by side")
    ask.add_argument("--context", default="", help="what the question speaks of, in its own place in the wording")
    ask.add_argument("--system", default="", help="a system message, where the wording has a place for it")
    ask.add_argument("--max_new_tokens", type=int, default=64, help="longest answer in tokens (default: %(default)s)")
    ask.add_argument("--model_dtype", choices=("auto", "float32", "bfloat16", "float16"), help="other than the run's")

    measure = _on_a_run(commands, "evaluate", "the client's personal adapter too; may be given again")
    measure.add_argument("--dataset", required=True, nargs="+", metavar="DATA", help="whatever fedlora train reads")
    measure.add_argument("--all", dest="everything", action="store_true", help="every client's personal adapter too")
    measure.add_argument("--dataset_split", dest="split", metavar="SPLIT", help="of a data set that has several")
    measure.add_argument("--labels", nargs="+", metavar="CLASS", help="classes by number, where the run has none")
    measure.add_argument("--max_eval_examples", type=int, metavar="N", help="only the first N examples")
    measure.add_argument(
        "--generation_examples", type=int, default=0, metavar="N", help="answer the first N for ROUGE-L (default: 0)"
    )
    measure.add_argument("--max_new_tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)")
    measure.add_argument("--per_device_eval_batch_size", dest="batch_size", type=int, default=8, metavar="N")
    measure.add_argument("--output", metavar="FILE", help="a JSON file for the numbers")

    merge = _on_a_run(commands, "merge", "a client's personal adapter instead of the global one", several=False)
    merge.add_argument("--output_dir", required=True, help="a new folder for model and tokenizer")
    merge.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of what is written (default: the base's in the run); the sum is always taken in float32",
    )


def _on_a_run(commands: Any, name: str, client: str, several: bool = True) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, description=ABOUT[name])
    parser.add_argument("folder", metavar="OUT", help="the output folder of train, demo or aggregate")
    more: dict[str, Any] = {"action": "append", "default": []} if several else {}
    parser.add_argument("--client", metavar="ID", help=client, **more)
    group = "a group's global adapter, where the run found several groups (--clusters auto)"
    parser.add_argument("--group", metavar="NAME", help=group, **more)
    parser.add_argument(
        "--model_name_or_path", dest="base", metavar="BASE", help="where the base model is, if not where it was"
    )
    if several:
        parser.add_argument("--use_cpu", action="store_true", help="although there is a GPU")
    parser.set_defaults(run=name)
    return parser
