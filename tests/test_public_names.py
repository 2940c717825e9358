"""The public names are exactly those meant, are documented, and cost nothing until used."""

import inspect
import json
import subprocess
import sys

import forebear

NAMES = [
    "AbU",
    "Absolute",
    "Arnoldi",
    "CG",
    "Cascade",
    "Checkpoint",
    "ConceptTRAK",
    "Counterfactual",
    "DAS",
    "DTRAK",
    "Data",
    "DataInf",
    "Diagonal",
    "EKFAC",
    "EKFACCG",
    "EffectiveDimension",
    "Exact",
    "ForebearError",
    "FurtherTraining",
    "GradCos",
    "GradDot",
    "GroundTruth",
    "Horizon",
    "InProcess",
    "Influence",
    "JourneyTRAK",
    "KFAC",
    "LeaveOneOut",
    "LiSSA",
    "MUCS",
    "NDA",
    "NewtonStep",
    "NonzeroRelative",
    "Nystrom",
    "Objective",
    "Pixels",
    "Processes",
    "Random",
    "Ray",
    "Recipe",
    "RelatIF",
    "Relative",
    "RemovalEstimate",
    "Response",
    "ScoreBlocks",
    "Scores",
    "Similarity",
    "Store",
    "TRAK",
    "Task",
    "TopK",
    "Torchrun",
    "TracIn",
    "Unrolled",
    "attribute",
    "attribute_images",
    "build_store",
    "combine",
    "damping_sweep",
    "diffusers",
    "errors",
    "evaluate",
    "explain",
    "fit_store",
    "get",
    "index",
    "load",
    "load_fitted",
    "losses",
    "methods",
    "metrics",
    "progress",
    "query_features",
]


def test_public_names_are_exactly_these() -> None:
    assert forebear.__all__ == NAMES
    assert dir(forebear) == NAMES
    assert all(hasattr(forebear, name) for name in NAMES)
    assert not hasattr(forebear, "Ekfac")


def test_importing_forebear_imports_nothing_else() -> None:
    program = "import json, sys, forebear; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "forebear" in loaded
    heavy = {"torch", "numpy", "scipy", "safetensors", "pyarrow", "jinja2", "PIL", "typer", "rich"}
    optional = {"sklearn", "transformers", "matplotlib", "pandas"}
    assert not loaded & (heavy | optional)


def test_using_forebear_imports_no_optional_package() -> None:
    program = (
        "import json, sys, forebear; [getattr(forebear, name) for name in forebear.__all__];"
        "import forebear.pipeline, forebear.training, forebear.zoo.digits, forebear.report;"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & {"sklearn", "transformers", "diffusers", "sentence_transformers", "faiss"}


def test_no_function_is_hidden_by_a_module_of_its_name() -> None:
    """Python binds a submodule in its package as soon as anything imports it."""
    program = (
        "import forebear.pipeline, forebear.cli, forebear.demo\n"
        "for name in ('attribute', 'evaluate', 'get', 'load', 'methods', 'progress'):\n"
        "    assert callable(getattr(forebear, name)), name\n"
        "with forebear.progress():\n    forebear.methods()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def members(value: object) -> list[tuple[str, object]]:
    """Public functions and classes, and the public methods that a class defines itself."""
    found: list[tuple[str, object]] = []
    if inspect.isclass(value):
        for name, part in vars(value).items():
            if isinstance(part, classmethod | staticmethod):
                part = part.__func__
            documented = inspect.isfunction(part) or isinstance(part, property)
            if documented and not name.startswith("_"):
                found.append((f"{value.__name__}.{name}", part))
    elif inspect.ismodule(value):
        for name in getattr(value, "__all__", [n for n in vars(value) if not n.startswith("_")]):
            part = getattr(value, name)
            ours = getattr(part, "__module__", "").startswith("forebear")
            if ours and (inspect.isclass(part) or inspect.isfunction(part)):
                found.append((f"{value.__name__}.{name}", part))
                found.extend(members(part))
    return found


def test_everything_public_is_documented() -> None:
    everything = [(name, getattr(forebear, name)) for name in NAMES]
    for _, value in list(everything):
        everything.extend(members(value))
    missing = [name for name, value in everything if not (value.__doc__ or "").strip()]
    assert missing == []
    # A dataclass without a docstring gets its signature for one.
    generated = [
        name
        for name, value in everything
        if inspect.isclass(value) and (value.__doc__ or "").startswith(f"{value.__name__}(")
    ]
    assert generated == []
