"""`forebear plan`: what each method would cost, before anything is run."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forebear.commands.options import examples, settings_of
from forebear.errors import ForebearError

if TYPE_CHECKING:
    from forebear.planning import Offer, Plan

COLUMNS = ["method", "settings", "time", "between", "memory", "disk", "fits"]

EPILOG = examples(
    "forebear plan task.py --budget 2h --memory 8GB",
    "forebear plan task.py --method trak --budget 30m --memory 4GB --disk 100GB --json",
)


def plan(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.py",
            exists=True,
            dir_okay=False,
            help="Python file that defines task(), train() and queries().",
        ),
    ],
    budget: Annotated[str, typer.Option(help="Time that it may take, such as 2h or 1h30m.")],
    memory: Annotated[
        str | None, typer.Option(help="Memory that it may take, such as 8GB; what is free.")
    ] = None,
    disk: Annotated[
        str | None, typer.Option(help="Disk that it may take, such as 100GB; what is free.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="One method; every one when left out.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Setting of the method; may be repeated."),
    ] = None,
    queries: Annotated[
        int, typer.Option(min=0, help="Queries to plan for; those of the file when 0.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict time, memory and disk of each method from timed samples, and choose settings.

    Nothing is run to its end and nothing is written. Exit code 0 also where nothing fits.
    """
    import sys

    from forebear.planning import Limits, parse_duration, parse_size, plan_file

    if option and method is None:
        raise ForebearError("--option is a setting of one method: name it with --method")
    limits = Limits(
        seconds=parse_duration(budget),
        memory=parse_size(memory) if memory else _free_memory(),
        disk=parse_size(disk) if disk else float(shutil.disk_usage(".").free),
    )

    def tell(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[Ksampling: {text}", end="", file=sys.stderr, flush=True)

    settings = settings_of(option or [])
    try:
        found = plan_file(file, limits, method=method, options=settings, queries=queries, tell=tell)
    finally:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
    if as_json:
        print(json.dumps(_plain(found), indent=1))
    else:
        _print(found)


def _print(found: "Plan") -> None:
    from forebear.commands.tables import print_table
    from forebear.planning import duration, size

    facts, limits = found.facts, found.limits
    print(
        f"{found.file}: {facts.examples:,} examples, {facts.queries:,} queries, "
        f"{facts.parameters:,} parameters; limits {duration(limits.seconds)}, "
        f"{size(limits.memory)} of memory, {size(limits.disk)} of disk"
    )
    usable = [offer for offer in found.offers if offer.prediction is not None]
    if usable:
        print_table(COLUMNS, [_row(offer) for offer in usable], right=COLUMNS[2:6])
    for offer in found.offers:
        if offer.prediction is None:
            reason = offer.refused or offer.stopped or "its sample said nothing"
            print(f"{_name(offer)} cannot be used: {reason}")
    print(f"\n{found.recommendation}")
    for offer in found.fitting:
        print(f"  {offer.command}")
    print(f"Batches of {found.batch_size} are as fast as any.")
    print(f"Sampling took {duration(found.sampling_seconds)}.")


def _row(offer: "Offer") -> list[str]:
    from forebear.planning import duration, size

    found = offer.prediction
    assert found is not None
    settings = ", ".join(f"{key}={value}" for key, value in offer.options.items()) or "default"
    if found.at_least:
        time, between = f"> {duration(found.seconds.value)}", "–"
    else:
        time = duration(found.seconds.value)
        between = f"{duration(found.seconds.low)} – {duration(found.seconds.high)}"
    fits = "yes"
    if not offer.fits:
        broken = ", ".join(offer.breaks) or offer.stopped or "not known"
        fits = f"no: {broken}" + (f"; needs {offer.remedy}" if offer.remedy else "")
    return [
        _name(offer),
        settings,
        time,
        between,
        size(found.memory.value),
        size(found.disk.value),
        fits,
    ]


def _name(offer: "Offer") -> str:
    return f"store of {offer.method}" if offer.kind == "index" else offer.method


def _plain(found: "Plan") -> dict[str, Any]:
    plain = asdict(found)
    plain["fits"] = bool(found.fitting)
    plain["recommendation"] = found.recommendation
    for entry, offer in zip(plain["offers"], found.offers, strict=True):
        entry["fits"] = offer.fits
    return _finite(plain)


def _finite(value: Any) -> Any:
    """The same with null in place of infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if value == float("inf") else value


def _free_memory() -> float:
    """Bytes that can be had without swapping; 8 GB where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 8e9
    return 1024.0 * int(next(x for x in lines if x.startswith("MemAvailable")).split()[1])
