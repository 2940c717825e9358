"""The command line. It parses, calls and prints; whatever computes is imported by its command."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import Abort, TyperException

from forebear.commands import store
from forebear.errors import ForebearError

if TYPE_CHECKING:
    from rich.console import Console

    from forebear.studies import StudyResult

INTERRUPTED = 130
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
CORE = ["torch", "numpy", "scipy", "safetensors", "pyarrow", "jinja2", "pillow", "typer", "rich"]
OPTIONAL = {
    "scikit-learn": ("sklearn", "the digits of the demo, scikit-learn models"),
    "transformers": ("transformers", "language models"),
    "matplotlib": ("matplotlib", "figures of studies"),
    "diffusers": ("diffusers", "diffusion models"),
    "sentence-transformers": ("sentence_transformers", "text embeddings"),
    "faiss-cpu": ("faiss", "search in large stores"),
    "qdrant-client": ("qdrant_client", "search beyond one machine"),
    "ray": ("ray", "work on several machines"),
    "fastapi": ("fastapi", "the web service"),
}


class Commands(TyperGroup):
    """Commands that answer wrong use with one sentence and exit code 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; anything forebear or the parser refuses is one line on standard error."""
        try:
            code = super().main(
                args, prog_name or "forebear", complete_var, False, windows_expand_args, **extra
            )
        except (ForebearError, TyperException, OSError) as error:
            if os.environ.get("FOREBEAR_DEBUG") == "1":
                raise
            code = 2
            print(f"error: {_sentence(error)}", file=sys.stderr)
        except (Abort, KeyboardInterrupt):
            code = INTERRUPTED
        if code == INTERRUPTED:
            print("\nstopped: the same command resumes where this one stopped", file=sys.stderr)
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


def _sentence(error: BaseException) -> str:
    text = error.format_message() if isinstance(error, TyperException) else str(error)
    return " ".join(text.split())


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.add_typer(store.app, name="store")

RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a run, for example runs/demo.")
]
MethodName = Annotated[str | None, typer.Option("--method", "-m", help="Name of a method.")]


def _examples(*lines: str) -> str:
    return "[bold]Examples[/bold]\n" + "\n".join(f"  {line}" for line in lines)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"forebear {_installed('forebear')}")
        raise typer.Exit()


@app.callback(
    invoke_without_command=True,
    epilog=_examples(
        "forebear demo",
        "forebear attribute task.py --method ekfac --out runs/mine",
        "forebear top runs/mine --query 3",
    ),
)
def forebear(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Trace what a model did back to the training data that made it do so."""
    if context.invoked_subcommand is None:
        text = context.get_help()
        if text:
            print(text)


@app.command(
    epilog=_examples("forebear demo", "forebear demo --data fashion-mnist --out runs/fashion")
)
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/demo"),
    data: Annotated[
        str, typer.Option(help="digits, or fashion-mnist where Debian's package is installed.")
    ] = "digits",
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads to compute with; all when left out.")
    ] = None,
) -> None:
    """Train a small model on real images, attribute it by several methods, check them all.

    A few labels are flipped on purpose and found again; the scores are compared with models that
    were really retrained. Stopped halfway, the same command resumes.
    """
    from forebear.demo import run
    from forebear.progress import progress

    with progress():
        run(out=out, data=data, seed=seed, threads=threads)
    _print_results(out)


@app.command(
    epilog=_examples(
        "forebear attribute task.py --method ekfac --out runs/mine",
        "forebear attribute task.py -m ekfac --out runs/mine --option damping=0.01",
    )
)
def attribute(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.py",
            exists=True,
            dir_okay=False,
            help="Python file that defines task(), train() and queries().",
        ),
    ],
    method: Annotated[str, typer.Option("--method", "-m", help="See 'forebear methods'.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Setting of the method; may be repeated."),
    ] = None,
) -> None:
    """Score the training examples of your own model for your own queries."""
    settings = _settings(option or [])
    from forebear.pipeline import attribute_file
    from forebear.progress import progress

    with progress():
        attribute_file(file, method, settings, out)
    print(f"wrote {out}; look at it with: forebear top {out}, or forebear report {out} --open")


@app.command(
    epilog=_examples("forebear top runs/demo", "forebear top runs/demo --query 3 --opponents")
)
def top(
    folder: RunFolder,
    method: MethodName = None,
    query: Annotated[str | None, typer.Option("--query", "-q", help="Id of one query.")] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Examples a query.")] = 10,
    opponents: Annotated[
        bool, typer.Option("--opponents", help="The lowest scores instead of the highest.")
    ] = False,
) -> None:
    """Print the strongest training examples of a run's queries."""
    from forebear.run import Run, read_top

    run = Run.load(folder)
    chosen = run.method(method) if method is not None else run.best_method
    if chosen is None:
        raise ForebearError(f"{folder} holds no method: run 'forebear attribute' first")
    lists = read_top(folder, chosen.name, opponents=opponents).by_query()
    if query is not None and query not in lists:
        raise ForebearError(
            f"unknown query {query!r}: {folder} has {len(lists)}, from {next(iter(lists))!r} "
            f"to {list(lists)[-1]!r}"
        )
    kept = max((len(rows) for rows in lists.values()), default=0)
    if k > kept:
        raise ForebearError(
            f"--k is {k} and the run kept {kept} examples a query: choose 1 to {kept}"
        )
    _print_top(folder, chosen.label, lists, query, k, opponents)


@app.command(epilog=_examples("forebear evaluate runs/mine --truth runs/demo/truth"))
def evaluate(
    folder: RunFolder,
    truth: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of a ground truth; the run's own."),
    ] = None,
) -> None:
    """Compare the scores of a run with models that were really retrained."""
    from forebear.pipeline import evaluate_run
    from forebear.progress import progress
    from forebear.run import Run

    Run.load(folder)
    with progress():
        evaluate_run(folder, truth)
    _print_results(folder)


@app.command(epilog=_examples("forebear report runs/demo --open"))
def report(
    folder: RunFolder,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write the page of a run: one HTML file that needs no network."""
    from forebear.report import write

    path = write(folder)
    print(path)
    if open_page:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())


@app.command(
    epilog=_examples(
        "forebear study final-model",
        "forebear study final-model --task digits --out runs/digits",
        "forebear study removal --quick",
    )
)
def study(
    name: Annotated[str, typer.Argument(metavar="STUDY", help="final-model, hessians or removal.")],
    task: Annotated[
        str | None,
        typer.Option(help="For final-model: breast_cancer, diabetes, digits, text or a FILE.py."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; runs/study-... when left out.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller, to see what it does.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads to compute with; all when left out.")
    ] = None,
) -> None:
    """Run a study: compare methods with what really happens, as tables, figures and a page.

    Stopped halfway, the same command resumes.
    """
    from forebear.progress import progress
    from forebear.studies import run

    options: dict[str, Any] = {"quick": quick, "seed": seed, "threads": threads}
    if task is not None:
        options["task"] = task
    stem = Path(task).stem if task is not None else None
    folder = out or Path("runs") / "-".join(part for part in ("study", name, stem) if part)
    with progress():
        result = run(name, folder, **options)
    _print_study(result, folder)


@app.command(epilog=_examples("forebear methods", "forebear methods --json"))
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods: what each needs, costs and is for, and its paper."""
    from forebear.methods import table

    rows = table()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    columns = ["name", "family", "needs", "cost", "modalities", "paper"]
    _print_table(columns, [[_cell(row.get(column)) for column in columns] for row in rows])


@app.command(epilog=_examples("forebear doctor"))
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is installed, how fast this machine computes, and what is missing."""
    facts = _examine()
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    for heading in ("versions", "machine"):
        _print_table(
            [heading, ""], [[name, _cell(value)] for name, value in facts[heading].items()]
        )
    rows = [
        [part["name"], part["found"] or "missing", part["for"] if part["found"] else part["remedy"]]
        for part in facts["optional"]
    ]
    _print_table(["optional", "", ""], rows)


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` pairs; values are JSON where they can be, otherwise text."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ForebearError(f"--option {pair!r} is not KEY=VALUE: write it like damping=0.1")
        if key in settings:
            raise ForebearError(f"--option {key} was given twice: keep one of them")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def _console() -> "Console":
    from rich.console import Console

    # A pipe has no width; 80 columns would break ids that a script wants to read.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _print_table(columns: list[str], rows: list[list[str]], right: Sequence[str] = ()) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    _console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return "–" if value is None else str(value)


SHOWN_QUERIES = 3


def _print_top(
    folder: Path,
    label: str,
    lists: dict[str, list[tuple[Any, float]]],
    query: str | None,
    k: int,
    opponents: bool,
) -> None:
    from forebear.report.material import Examples
    from forebear.run import Run

    examples = Examples(folder, Run.load(folder))
    names = [query] if query is not None else list(lists)[:SHOWN_QUERIES]
    side = "opponents" if opponents else "proponents"
    for name in names:
        about = examples.describe("queries", name)
        print(f"{label}: strongest {side} of query {name}" + (f" ({about})" if about else ""))
        rows = [
            [str(rank), str(example), f"{score:+.4g}", examples.describe("train", example)]
            for rank, (example, score) in enumerate(lists[name][:k], 1)
        ]
        columns = ["rank", "example", "score", "what it is"]
        if not any(row[-1] for row in rows):
            columns, rows = columns[:-1], [row[:-1] for row in rows]
        _print_table(columns, rows, right=["rank", "example", "score"])
    if len(lists) > len(names) and query is None:
        print(f"{len(lists) - len(names)} more queries: choose one with --query ID")


def _print_results(folder: Path) -> None:
    from forebear.report import words
    from forebear.run import Run

    run = Run.load(folder)
    columns = ["method", "coverage", "time", "× plain pass", "LDS", "95 % interval", "AUC"]
    rows = [
        [
            m.label,
            words.percent(m.coverage) if m.coverage is not None else "–",
            words.duration(m.seconds) if m.seconds is not None else "–",
            words.multiple(m.passes) if m.passes is not None else "–",
            words.number(m.lds.mean) if m.lds else "–",
            words.span(m.lds) if m.lds else "–",
            f"{m.label_error_auc:.3f}" if m.label_error_auc is not None else "–",
        ]
        for m in run.methods
    ]
    _print_table(columns, rows, right=columns[1:])
    if run.truth is not None and run.truth.ceiling is not None:
        ceiling = run.truth.ceiling
        print(f"noise ceiling of LDS: {words.number(ceiling.mean)} ({words.span(ceiling)})")
    print("AUC: how well self-influence finds the flipped labels; 0.5 is guessing")
    if (folder / "report.html").is_file():
        print(f"page: {folder / 'report.html'}")


def _print_study(result: "StudyResult", folder: Path) -> None:
    print(result.title)
    for table in result.tables:
        if table.shown:
            print(f"\n{table.title}")
            _print_table(list(table.columns), table.texts(), right=table.numeric)
            if table.note:
                print(table.note)
    if result.findings:
        print("\nFindings")
    for finding in result.findings:
        print(f"- {finding.sentence()}")
    print(f"\npage: {folder / 'report.html'}")


def _installed(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _examine() -> dict[str, Any]:
    """What `doctor` reports."""
    import platform
    from importlib.util import find_spec

    versions = {"forebear": _installed("forebear"), "python": platform.python_version()}
    versions |= {package: _installed(package) for package in CORE}
    optional = []
    for package, (module, purpose) in OPTIONAL.items():
        found = (_installed(package) or "present") if find_spec(module) is not None else None
        remedy = f"pip install {package} ({purpose})"
        optional.append({"name": package, "found": found, "for": purpose, "remedy": remedy})
    images = str(FASHION_MNIST) if FASHION_MNIST.is_dir() else None
    optional.append(
        {
            "name": "Fashion-MNIST",
            "found": images,
            "for": "larger images for the demo: --data fashion-mnist",
            "remedy": "apt install dataset-fashion-mnist (larger images for the demo)",
        }
    )
    return {"versions": versions, "machine": _machine(), "optional": optional}


def _machine() -> dict[str, Any]:
    import torch

    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    bf16 = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "BLAS": "MKL" if torch.backends.mkl.is_available() else "OpenBLAS or other",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16 products": ", ".join(bf16) or "emulated: slower than float32",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def main() -> None:
    """Run the command line."""
    app()
