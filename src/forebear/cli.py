"""The command line. It parses, calls and prints; whatever computes is imported by its command."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import Abort, TyperException

from forebear.commands import index, plan, search, serve, store
from forebear.commands.machine import examine, installed
from forebear.commands.options import examples, settings_by_method, settings_of
from forebear.commands.results import print_results, print_study, print_top
from forebear.commands.tables import cell, print_table
from forebear.errors import ForebearError

INTERRUPTED = 130


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


def _version(wanted: bool) -> None:
    if wanted:
        print(f"forebear {installed('forebear')}")
        raise typer.Exit()


@app.callback(
    invoke_without_command=True,
    epilog=examples(
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
    epilog=examples("forebear demo", "forebear demo --data fashion-mnist --out runs/fashion")
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
    print_results(out)


@app.command(
    epilog=examples(
        "forebear attribute task.py --method ekfac --out runs/mine",
        "forebear attribute task.py -m ekfac --out runs/mine --option damping=0.01",
        "forebear attribute images.py -m das -m nda --out runs/images",
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
    method: Annotated[
        list[str],
        typer.Option("--method", "-m", help="See 'forebear methods'; may be repeated."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Setting of the method; METHOD.KEY=VALUE with several. May be repeated.",
        ),
    ] = None,
) -> None:
    """Score the training examples of your own model for your own queries.

    Of a diffusion model, the queries are images that it made, and the page shows the training
    images behind each.
    """
    settings = settings_by_method(method, settings_of(option or []))
    from forebear.attribution import attribute_from_file
    from forebear.progress import progress

    with progress():
        run = attribute_from_file(file, settings, out)
    if run.kind == "images":
        print(f"page: {out / 'report.html'}")
    else:
        print(f"wrote {out}; look at it with: forebear top {out}, or forebear report {out} --open")


@app.command(
    epilog=examples("forebear top runs/demo", "forebear top runs/demo --query 3 --opponents")
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
    print_top(folder, chosen.label, lists, query, k, opponents)


@app.command(epilog=examples("forebear evaluate runs/mine --truth runs/demo/truth"))
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
    print_results(folder)


@app.command(epilog=examples("forebear report runs/demo --open"))
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
    epilog=examples(
        "forebear study final-model",
        "forebear study final-model --task digits --out runs/digits",
        "forebear study diffusion --task digits-edm --executor processes:2",
        "forebear study removal --quick",
    )
)
def study(
    name: Annotated[
        str, typer.Argument(metavar="STUDY", help="diffusion, final-model, hessians or removal.")
    ],
    task: Annotated[
        str | None,
        typer.Option(
            help="For final-model: breast_cancer, diabetes, digits, text or a FILE.py. For "
            "diffusion: digits-eps, digits-edm, concepts, customised or fashion."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; runs/study-... when left out.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller, to see what it does.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads to compute with; all when left out.")
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option(
            help="For diffusion and final-model, where models are retrained and scored: "
            "processes:N or ray:ADDRESS; here when left out."
        ),
    ] = None,
) -> None:
    """Run a study: compare methods with what really happens, as tables, figures and a page.

    Stopped halfway, the same command resumes.
    """
    from forebear import executors
    from forebear.progress import progress
    from forebear.studies import run

    options: dict[str, Any] = {"quick": quick, "seed": seed, "threads": threads}
    if task is not None:
        options["task"] = task
    if executor is not None:
        options["executor"] = executors.get(executor)
    stem = Path(task).stem if task is not None else None
    folder = out or Path("runs") / "-".join(part for part in ("study", name, stem) if part)
    with progress():
        result = run(name, folder, **options)
    print_study(result, folder)


app.command("index", epilog=index.EPILOG)(index.index)
app.command("search", epilog=search.EPILOG)(search.search)
app.command("serve", epilog=serve.EPILOG)(serve.serve)
app.command("plan", epilog=plan.EPILOG)(plan.plan)


@app.command(epilog=examples("forebear methods", "forebear methods --json"))
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
    print_table(columns, [[cell(row.get(column)) for column in columns] for row in rows])


@app.command(epilog=examples("forebear doctor"))
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is installed, how fast this machine computes, and what is missing."""
    facts = examine()
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    for heading in ("versions", "machine"):
        print_table([heading, ""], [[name, cell(value)] for name, value in facts[heading].items()])
    rows = [
        [part["name"], part["found"] or "missing", part["for"] if part["found"] else part["remedy"]]
        for part in facts["optional"]
    ]
    print_table(["optional", "", ""], rows)


def main() -> None:
    """Run the command line."""
    app()
