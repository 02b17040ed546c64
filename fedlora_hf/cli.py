"""The command line, `fedlora COMMAND`. Heavy imports wait until a command runs."""
# SPDX-License-Identifier: Apache-2.0

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from fedlora_hf import __version__
from fedlora_hf.commands.launch import exit_code
from fedlora_hf.commands.listing import ABOUT, MEASURING, add_measuring, add_using, by_purpose
from fedlora_hf.errors import ConfigError
from fedlora_hf.launch.collecting import not_collecting


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 2 with one line on standard error for anything a user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    if arguments[:1] == ["train"]:
        _train(arguments[1:])
    elif arguments[:1] == ["preview"]:
        _preview(arguments[1:])
    else:
        options = vars(build_parser().parse_args(arguments))
        chosen = options.pop("run")
        if isinstance(chosen, str):  # a command that is a file of its own, and a function there
            chosen = loaded(chosen, f"{chosen}_run")
        run: Callable[..., None] = chosen
        run(**options)


def loaded(command: str, name: str) -> Callable[..., Any]:
    """A function of a command's file, imported now."""
    with not_collecting(own_process=True):
        found: Callable[..., Any] = getattr(import_module(f"fedlora_hf.commands.{command}"), name)
    return found


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command but train and preview, whose flags are those of FederatedConfig (flags.py)."""
    parser = OneLineParser(
        prog="fedlora",
        description="Fine-tune language models together without sharing data.",
        usage="fedlora COMMAND ...",
        epilog=f"{by_purpose()}\n\nfedlora COMMAND --help explains one of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fedlora_hf {__version__}")
    commands = parser.add_subparsers(prog="fedlora", required=True, metavar="COMMAND", help=argparse.SUPPRESS)

    demo = commands.add_parser("demo", description=ABOUT["demo"])
    demo.add_argument("--output_dir", default="fedlora_demo", help="where everything goes (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the whole run (default: %(default)s)")
    demo.set_defaults(run=_demo)

    commands.add_parser("train", add_help=False)

    commands.add_parser("preview", add_help=False)

    _add_aggregate(commands)

    listing = commands.add_parser("methods", description=ABOUT["methods"])
    listing.add_argument("name", nargs="?", metavar="NAME", help="one of them, with what its options mean")
    listing.set_defaults(run=_methods)

    report = commands.add_parser("report", description=ABOUT["report"])
    report.add_argument("folder", metavar="OUT", help="the output folder of train, demo or aggregate")
    report.set_defaults(run=_report)

    _add_push(commands)
    add_using(commands)
    return parser


def _add_aggregate(commands: Any) -> None:
    combine = commands.add_parser("aggregate", description=ABOUT["aggregate"])
    combine.add_argument("adapters", nargs="+", metavar="ADAPTER", help="a folder, or user/repo[@revision][:subfolder]")
    combine.add_argument("--output_dir", required=True, help="where the global and personal adapters go")
    combine.add_argument(
        "--aggregation",
        "--method",
        dest="method",
        metavar="METHOD",
        default="clair",
        help="aggregation method (default: %(default)s); fedlora methods lists them",
    )
    combine.add_argument(
        "--aggregation_options",
        nargs="+",
        metavar="NAME=VALUE",
        help="the method's own options, or one JSON object; fedlora methods METHOD lists them",
    )
    combine.add_argument("--side", help="short for --aggregation_options side=..., as clair has it")
    combine.add_argument("--rank", help="short for --aggregation_options rank=..., as clair has it")
    combine.add_argument("--target_rank", type=int, help="rank of the global adapter (default: the clients' largest)")
    combine.add_argument(
        "--partial_modules",
        choices=("quarantine", "common", "zero", "refuse"),
        default="quarantine",
        help="clients that adapt other modules than most: leave them out, use only the modules all have, count what is "
        "missing as no change, or stop; what each costs is told (default: %(default)s)",
    )
    combine.add_argument(
        "--aggregation_device",
        default="auto",
        metavar="DEVICE",
        help="cpu, cuda or cuda:n; auto: a CUDA device with room, if there is one (default: %(default)s)",
    )
    combine.add_argument("--weights", nargs="+", metavar="ID=NUMBER", help="how much each counts; or a file of them")
    combine.add_argument("--require_same_base", action="store_true", help="stop if the adapters name different bases")
    add_measuring(combine)
    combine.set_defaults(run=_aggregate)


def _add_push(commands: Any) -> None:
    push = commands.add_parser("push", description=ABOUT["push"])
    push.add_argument("folder", metavar="OUT", help="the output folder of train, demo or aggregate")
    push.add_argument("--repo_id", required=True, help="user/name")
    push.add_argument(
        "--private", action=argparse.BooleanOptionalAction, default=True, help="visibility of a new repository"
    )
    push.add_argument(
        "--with_clients", action="store_true", help="also the personal adapters (private-data derivatives)"
    )
    push.add_argument(
        "--with_client_facts",
        action="store_true",
        help="also what the record says of each client (names, counts, losses, norms, evidence), and the report",
    )
    push.add_argument("--revision", help="branch to push to (default: main)")
    push.add_argument("--tag", help="name to give the commit, such as round-3")
    push.set_defaults(run=_push)


def _train(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        from fedlora_hf.commands.manual import manual

        print(manual(), end="")  # noqa: T201
    else:
        from fedlora_hf.options.early import checked

        arguments = checked(arguments)  # before torch is imported, which takes seconds

        loaded("train", "train")(arguments)


def _preview(arguments: list[str]) -> None:
    from fedlora_hf.commands.preview import USAGE, preview

    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")  # noqa: T201
    else:
        preview(arguments)


def _demo(output_dir: str, seed: int) -> None:
    loaded("demo", "demo")(output_dir, seed)


def _aggregate(
    method: str,
    aggregation_options: list[str] | None,
    side: str | None,
    rank: str | None,
    aggregation_device: str,
    **more: Any,
) -> None:
    from fedlora_hf.methods import method_named
    from fedlora_hf.methods.settings import read_options

    chosen = method_named(method)
    named = read_options(chosen, aggregation_options)
    short = read_options(chosen, [f"{name}={value}" for name, value in (("side", side), ("rank", rank)) if value])
    if twice := sorted(set(named) & set(short)):
        raise ConfigError(f"--{twice[0]} {short[twice[0]]}: is in --aggregation_options too; leave one out")

    aggregate_adapters = loaded("aggregate", "aggregate_adapters")
    from fedlora_hf.using.measuring import Measure

    measure = Measure(**{name: more.pop(name) for name in MEASURING})
    aggregate_adapters(**more, method=method, options={**named, **short}, measure=measure, device=aggregation_device)


def _methods(name: str | None) -> None:
    from fedlora_hf.commands.methods import describe

    print(describe(name), end="")  # noqa: T201


def _report(folder: str) -> None:
    from fedlora_hf.record.record import RunRecord
    from fedlora_hf.report import write_report

    written = write_report(RunRecord.load(folder), folder)
    print(f"{len(written) - 1} figures and {written[-1]}")  # noqa: T201


def _push(folder: str, **options: Any) -> None:
    from fedlora_hf.hub import push_folder
    from fedlora_hf.util.progress import Progress

    print(push_folder(folder, **options, progress=Progress()))  # noqa: T201


if __name__ == "__main__":
    raise SystemExit(main())
