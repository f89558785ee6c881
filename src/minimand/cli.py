"""The command line. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from . import __version__
from .catalogue import PROOFS, Method, find, methods

if TYPE_CHECKING:
    from .bench import Study

app = typer.Typer(
    name="minimand",
    help="Change what your model minimises, not your training loop.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
compare = typer.Typer(help="Which contender is best on my data?", no_args_is_help=True)
app.add_typer(compare, name="compare")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]
Out = Annotated[pathlib.Path, typer.Option("--out", help="Folder for the report.", metavar="DIR")]
Engine = Annotated[str, typer.Option("--engine", help="Where cells run: local or ray.")]
Jobs = Annotated[int | None, typer.Option("--jobs", "-j", help="Processes; default: one a core.")]
Seed = Annotated[int, typer.Option("--seed", help="Decides folds, noise and training.")]
StorePath = Annotated[
    pathlib.Path | None, typer.Option("--store", help="Where cells are kept; default: the user's cache folder.")
]
DEFAULT_OUT = pathlib.Path("minimand-report")


def main() -> None:
    """Run the command line."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        print(f"minimand {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_methods(
    as_json: Json = False,
    room: Annotated[str | None, typer.Option("--room", help="Only this room.")] = None,
    built: Annotated[bool, typer.Option("--built", help="Only methods that have parts.")] = False,
    studied: Annotated[bool, typer.Option("--studied", help="Only methods that have a study.")] = False,
    names: Annotated[bool, typer.Option("--names", help="Print names only.")] = False,
) -> None:
    """Show the methods, which of their five proofs stand, and the verdict on each claim."""
    chosen = [
        method
        for method in methods()
        if room in (None, method.room) and (method.built or not built) and (method.studied or not studied)
    ]
    if not chosen:
        rooms = ", ".join(sorted({method.room for method in methods()}))
        if any(method.room == room for method in methods()):
            _refuse(f"no method in {room!r} is {'studied' if studied else 'built'} yet")
        _refuse(f"--room: there is no method in {room!r}; rooms are {rooms}")
    if as_json:
        print(json.dumps([_listed(method) for method in chosen], indent=1))
        return
    if names:
        print("\n".join(method.name for method in chosen))
        return
    from rich.console import Console
    from rich.table import Table

    rows = [
        (
            method.name,
            method.room,
            "".join("●" if proof in method.proofs else "·" for proof in PROOFS),
            method.verdict() or ("" if method.built else "not built yet"),
            f"{method.venue}: {method.title}",
        )
        for method in chosen
    ]
    titles = ("method", "room", "".join(proof[0] for proof in PROOFS), "verdict", "paper")
    console = Console()
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    # Rich breaks or cuts every column alike; here only the paper's title gives way, or goes.
    room_for_paper = console.width - sum(widths[:-1]) - 2 * len(titles[:-1])
    shown = len(titles) if room_for_paper >= 20 else len(titles) - 1
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title, width in zip(titles[:shown], [*widths[:-1], room_for_paper], strict=False):
        table.add_column(title, no_wrap=True, overflow="ellipsis", width=width)
    for row in rows:
        table.add_row(*row[:shown])
    console.print(table)
    stand = sum(set(method.proofs) == set(PROOFS) for method in methods())
    console.print(
        f"\n{stand} of {len(methods())} methods stand on all five proofs: {', '.join(PROOFS)} (●)", style="dim"
    )


@app.command()
def show(name: Annotated[str, typer.Argument(metavar="METHOD")], as_json: Json = False) -> None:
    """Show one method: what it is for, its parts, its paper, its evidence."""
    method = _find(name)
    if as_json:
        print(json.dumps(_listed(method), indent=1))
        return
    record = method.evidence()
    print(f"{method.name}: {method.purpose}\n")
    print(f"  paper    {method.title}")
    print(f"           {method.authors}; {method.venue}" + (f"; arXiv {method.arxiv}" if method.arxiv else ""))
    print(f"  claim    {method.claim}")
    print(f"  parts    {', '.join(method.part_paths()) or 'none yet: this method is not built'}")
    print(f"  proofs   {', '.join(f'{proof} {state}' for proof, state in method.state().items())}")
    if record is not None:
        print(f"  evidence {record['date'][:10]}")
        for claim in record["claims"]:
            print(f"           {claim['verdict']}: {claim['says']}")
        print(f"\n  minimand reproduce {method.name}")


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(metavar="METHOD")],
    as_json: Json = False,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Cells a contender; default: the study's own.")] = None,
    out: Out = DEFAULT_OUT,
    engine: Engine = "local",
    jobs: Jobs = None,
    store: StorePath = None,
    evidence: Annotated[
        pathlib.Path | None,
        typer.Option("--evidence", help="Also write the evidence file into this folder.", metavar="DIR"),
    ] = None,
) -> None:
    """Does the paper's claim hold? Run a method's study and judge it."""
    method = _find(name)
    if not method.studied:
        _refuse(f"{method.name} has no study yet; `minimand list --studied` shows the methods that have one")
    import importlib

    study: Study = importlib.import_module(f"minimand.studies.{method.module}").study
    record = _run(
        lambda: study, kind="reproduce", problem=method.name, out=out, seeds=seeds, engine=engine, jobs=jobs,
        store=store, as_json=as_json,
    )  # fmt: skip
    if evidence is not None:
        from .bench import write_evidence

        write_evidence(record, evidence / f"{method.name}.json")


@compare.command()
def classify(
    data: Annotated[
        str | None, typer.Argument(help="CSV, TSV, Parquet, JSON lines or NPZ. Default: digits with 30 % label noise.")
    ] = None,
    target: Annotated[str | None, typer.Option("--target", help="The label column.")] = None,
    drop: Annotated[
        list[str] | None, typer.Option("--drop", help="Columns to leave out, separated by commas; may be repeated.")
    ] = None,
    group: Annotated[str | None, typer.Option("--group", help="Column whose groups no fold may split.")] = None,
    model: Annotated[str, typer.Option("--model", help="linear, mlp or package.module:factory.")] = "mlp",
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the training data.")] = 30,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Examples a step.")] = 64,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate.")] = 2e-3,
    folds: Annotated[int, typer.Option("--folds", help="Folds of the cross-validation.")] = 5,
    repeats: Annotated[int, typer.Option("--repeats", help="How often the folds are drawn anew.")] = 2,
    tune: Annotated[int, typer.Option("--tune", help="Trials of tuning for each contender.")] = 0,
    noise: Annotated[
        float | None, typer.Option("--noise", help="Share of training labels made wrong, for a what-if.")
    ] = None,
    metric: Annotated[str, typer.Option("--metric", help="What decides.")] = "accuracy",
    contenders: Annotated[
        str | None, typer.Option("--contenders", help="Names, separated by commas; default: all.")
    ] = None,
    engine: Engine = "local",
    jobs: Jobs = None,
    seed: Seed = 0,
    store: StorePath = None,
    as_json: Json = False,
    out: Out = DEFAULT_OUT,
) -> None:
    """Which training objective is best on my table, and is the difference real?"""

    def build() -> Study:
        from .bench.classify import classify_study

        names = _names(contenders)
        return classify_study(
            data, target=target, drop=drop or [], group=group, model=model, epochs=epochs, batch_size=batch_size,
            lr=lr, folds=folds, repeats=repeats, tune=tune, noise=noise, metric=metric, contenders=names, seed=seed,
        )  # fmt: skip

    sys.path.insert(0, "")  # so that --model finds a module beside the data, as `python -m` would
    _run(build, problem="classify", out=out, engine=engine, jobs=jobs, store=store, as_json=as_json)


@compare.command()
def calibrate(
    data: Annotated[
        str | None,
        typer.Argument(help="NPZ with logits (rows, classes) and target (rows,). Default: a network on digits."),
    ] = None,
    test_fraction: Annotated[
        float, typer.Option("--test-fraction", help="Share of rows that test a calibrator.")
    ] = 0.5,
    repeats: Annotated[int, typer.Option("--repeats", help="How often the rows are split anew.")] = 10,
    engine: Engine = "local",
    jobs: Jobs = None,
    store: StorePath = None,
    as_json: Json = False,
    out: Out = DEFAULT_OUT,
) -> None:
    """Which calibrator makes my classifier's confidence true?"""

    def build() -> Study:
        from .bench.calibration import calibrate_study

        return calibrate_study(data, test_fraction=test_fraction)

    _run(build, problem="calibrate", out=out, engine=engine, jobs=jobs, store=store, as_json=as_json, seeds=repeats)


@compare.command()
def bags(
    data: Annotated[
        str | None, typer.Argument(help="CSV, TSV, Parquet, JSON lines or NPZ. Default: diabetes in bags of four.")
    ] = None,
    target: Annotated[str | None, typer.Option("--target", help="Column of the bag's average response.")] = None,
    bag: Annotated[str | None, typer.Option("--bag", help="Column that says which bag a row is in.")] = None,
    drop: Annotated[list[str] | None, typer.Option("--drop", help="Columns to leave out; may be repeated.")] = None,
    model: Annotated[str, typer.Option("--model", help="linear or mlp.")] = "linear",
    loss: Annotated[str, typer.Option("--loss", help="mse, bce, or auto.")] = "auto",
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the training data, for mlp.")] = 60,
    folds: Annotated[int, typer.Option("--folds", help="Folds of the cross-validation, over bags.")] = 5,
    repeats: Annotated[int, typer.Option("--repeats", help="How often the folds are drawn anew.")] = 2,
    engine: Engine = "local",
    jobs: Jobs = None,
    seed: Seed = 0,
    store: StorePath = None,
    as_json: Json = False,
    out: Out = DEFAULT_OUT,
) -> None:
    """Which loss learns best from responses known only as averages over bags of rows?"""

    def build() -> Study:
        from .bench.bags import bags_study

        if data is not None and (target is None or bag is None):
            raise ValueError("--target and --bag are needed: the column of responses and the column of bags")
        return bags_study(
            data, target=target, bag=bag, drop=drop or [], model=model, epochs=epochs, folds=folds, repeats=repeats,
            loss=loss, seed=seed,
        )  # fmt: skip

    _run(build, problem="bags", out=out, engine=engine, jobs=jobs, store=store, as_json=as_json)


@compare.command()
def bounds(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder saved by ObjectiveClassifier.save, or package.module:factory of a trained network. Default: "
            "networks on noisy digits."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Argument(help="The rows that trained it: CSV, TSV, Parquet, JSON lines or NPZ.")
    ] = None,
    target: Annotated[str | None, typer.Option("--target", help="The label column.")] = None,
    drop: Annotated[list[str] | None, typer.Option("--drop", help="Columns to leave out; may be repeated.")] = None,
    test: Annotated[str | None, typer.Option("--test", help="Rows that the model has not seen.")] = None,
    test_fraction: Annotated[
        float | None,
        typer.Option("--test-fraction", help="Instead: the share of DATA's last rows that it was not trained on."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Safetensors file to load into a factory's network.")
    ] = None,
    initial: Annotated[
        str | None, typer.Option("--initial", help="Safetensors file of the weights that training started from.")
    ] = None,
    factory: Annotated[
        str | None, typer.Option("--factory", help="What builds a saved classifier's custom network.")
    ] = None,
    delta: Annotated[float, typer.Option("--delta", help="Probability with which a bound may be wrong.")] = 0.05,
    repeats: Annotated[int, typer.Option("--repeats", help="How often the unseen rows are halved anew.")] = 10,
    engine: Engine = "local",
    jobs: Jobs = None,
    store: StorePath = None,
    as_json: Json = False,
    out: Out = DEFAULT_OUT,
) -> None:
    """What do bounds promise of my trained model's error, and why not trust them alone?"""

    def build() -> Study:
        from .bench.promises import bounds_study

        return bounds_study(
            model, data, target=target, drop=drop or [], test=test, test_fraction=test_fraction, weights=weights,
            initial=initial, factory=factory, delta=delta,
        )  # fmt: skip

    sys.path.insert(0, "")  # so that a factory is found in a module beside the data, as `python -m` would
    _run(build, problem="bounds", out=out, engine=engine, jobs=jobs, store=store, as_json=as_json, seeds=repeats)


@compare.command()
def survival(
    folder: Annotated[
        str | None,
        typer.Argument(
            help="Folder of one feature file a slide, NAME.h5, .npz or .safetensors. Default: generated bags."
        ),
    ] = None,
    table: Annotated[str | None, typer.Option("--table", help="Table of times and events, one slide a row.")] = None,
    slide: Annotated[str | None, typer.Option("--id", help="Column of the slides' names.")] = None,
    time: Annotated[str | None, typer.Option("--time", help="Column of the times.")] = None,
    event: Annotated[str | None, typer.Option("--event", help="Column that is 1 where the event was seen.")] = None,
    patient: Annotated[
        str | None, typer.Option("--patient", help="Column of the patients, whose slides no fold splits.")
    ] = None,
    key: Annotated[str | None, typer.Option("--key", help="Name of the array within a file.")] = None,
    loss: Annotated[str, typer.Option("--loss", help="cox or hazards.")] = "cox",
    dim: Annotated[int | None, typer.Option("--dim", help="Features of an encoded instance.")] = None,
    prototypes: Annotated[int | None, typer.Option("--prototypes", help="Prototypes of OTSurv.")] = None,
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the training slides.")] = 30,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Slides a step.")] = 25,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate.")] = 3e-3,
    max_instances: Annotated[
        int, typer.Option("--max-instances", help="Instances of a slide in a training step.")
    ] = 2000,
    folds: Annotated[int, typer.Option("--folds", help="Folds of the cross-validation.")] = 5,
    repeats: Annotated[int, typer.Option("--repeats", help="How often the folds are drawn anew.")] = 2,
    engine: Engine = "local",
    jobs: Jobs = None,
    seed: Seed = 0,
    store: StorePath = None,
    as_json: Json = False,
    out: Out = DEFAULT_OUT,
) -> None:
    """Which way to pool a slide's tiles ranks my patients' survival best?"""

    def build() -> Study:
        from .bench.survival import survival_study

        return survival_study(
            folder, table=table, slide=slide, time=time, event=event, patient=patient, key=key, loss=loss, dim=dim,
            prototypes=prototypes, epochs=epochs, batch_size=batch_size, lr=lr, max_instances=max_instances,
            folds=folds, repeats=repeats, seed=seed,
        )  # fmt: skip

    _run(build, problem="survival", out=out, engine=engine, jobs=jobs, store=store, as_json=as_json)


@compare.command()
def preferences(
    pairs: Annotated[
        str | None,
        typer.Argument(
            help="JSON lines, a folder of datasets or a data set's name, with prompt, chosen and rejected. Default: "
            "questions of fact."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="A folder or a name on the hub of any causal language model.")
    ] = "smollm2-135m",
    train: Annotated[str, typer.Option("--train", help="last:BLOCKS, lora:RANK or all.")] = "last:2",
    steps: Annotated[int, typer.Option("--steps", help="Steps of training.")] = 15,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pairs a step.")] = 4,
    lr: Annotated[
        list[float] | None, typer.Option("--lr", help="A learning rate to try; may be given again. Default: two.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="Most tokens in a prompt and one answer; default: up to 1,024.")
    ] = None,
    most: Annotated[int, typer.Option("--pairs", help="How many pairs to draw from a larger file.")] = 400,
    objective: Annotated[
        list[str] | None,
        typer.Option("--objective", help="Only this one, or all; may be given again. Default: one of each kind."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="How many splits.")] = 4,
    engine: Engine = "local",
    jobs: Jobs = None,
    seed: Seed = 0,
    store: StorePath = None,
    as_json: Json = False,
    out: Out = DEFAULT_OUT,
) -> None:
    """Which objective makes my language model prefer what I prefer, and what goes wrong on the way?"""

    def build() -> Study:
        from .bench.preferences import preferences_study

        return preferences_study(
            pairs, model=model, train=train, steps=steps, batch_size=batch_size, rates=tuple(lr or (1e-4, 3e-4)),
            max_length=max_length, pairs=most, objectives=tuple(objective or ()), seeds=seeds, seed=seed,
        )  # fmt: skip

    _run(build, problem="preferences", out=out, engine=engine, jobs=jobs, store=store, as_json=as_json)


@compare.command()
def policy(
    dataset: Annotated[
        str | None,
        typer.Argument(
            help="A log: .npz or .parquet of transitions, a Minari data set on disk, or ENVIRONMENT/QUALITY. "
            "Default: Pendulum-v1/random-expert, made on first use."
        ),
    ] = None,
    env: Annotated[
        str | None, typer.Option("--env", help="Gymnasium id to try policies in; default: the data set's own.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Gradient steps of each learner.")] = 6_000,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Transitions a step.")] = 128,
    hidden: Annotated[
        list[int] | None,
        typer.Option("--hidden", help="Width of a hidden layer; may be given again. Default: two of 64."),
    ] = None,
    discount: Annotated[float, typer.Option("--discount", help="Of later rewards.")] = 0.99,
    episodes: Annotated[int, typer.Option("--episodes", help="Episodes that measure a policy.")] = 50,
    contenders: Annotated[
        str | None, typer.Option("--contenders", help="Names, separated by commas; default: all.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Learners trained anew.")] = 5,
    engine: Engine = "local",
    jobs: Jobs = None,
    seed: Seed = 0,
    store: StorePath = None,
    as_json: Json = False,
    out: Out = DEFAULT_OUT,
) -> None:
    """Which offline learner makes the best policy of my logged decisions?"""

    def build() -> Study:
        from .bench.policies import policy_study

        names = _names(contenders)
        return policy_study(
            dataset, environment=env, steps=steps, batch_size=batch_size, hidden=hidden or (64, 64),
            discount=discount, episodes=episodes, contenders=names, seeds=seeds, seed=seed,
        )  # fmt: skip

    _run(build, problem="policy", out=out, engine=engine, jobs=jobs, store=store, as_json=as_json)


@compare.command()
def graph(
    data: Annotated[
        str | None,
        typer.Argument(help="CSV, TSV, Parquet or JSON lines, a column a node. Default: random linear models."),
    ] = None,
    drop: Annotated[list[str] | None, typer.Option("--drop", help="Columns to leave out; may be repeated.")] = None,
    forbid: Annotated[
        list[str] | None, typer.Option("--forbid", help="Edge FROM:TO that there is not; may be repeated.")
    ] = None,
    require: Annotated[
        list[str] | None, typer.Option("--require", help="Edge FROM:TO that there is; may be repeated.")
    ] = None,
    tiers: Annotated[
        str | None, typer.Option("--tiers", help='Earliest first: "a,b;c", or a file with a tier a line.')
    ] = None,
    truth: Annotated[str | None, typer.Option("--truth", help="Table of the true edges: from, to.")] = None,
    score: Annotated[str, typer.Option("--score", help="least_squares, or logistic for zeros and ones.")] = (
        "least_squares"
    ),
    standardize: Annotated[
        bool, typer.Option("--standardize", help="Divide columns by their standard deviation.")
    ] = False,
    folds: Annotated[int, typer.Option("--folds", help="Folds of the cross-validation.")] = 5,
    repeats: Annotated[int, typer.Option("--repeats", help="How often the folds are drawn anew.")] = 1,
    contenders: Annotated[
        str | None, typer.Option("--contenders", help="Names, separated by commas; default: all.")
    ] = None,
    engine: Engine = "local",
    jobs: Jobs = None,
    seed: Seed = 0,
    store: StorePath = None,
    as_json: Json = False,
    out: Out = DEFAULT_OUT,
) -> None:
    """Which directed graph explains the columns of my table, and which way of learning it is best?"""

    def build() -> Study:
        from .bench.graph import graph_study

        names = _names(contenders)
        return graph_study(
            data, drop=drop or [], forbid=forbid or [], require=require or [], tiers=tiers, truth=truth,
            score=score, standardize=standardize, folds=folds, repeats=repeats, contenders=names, seed=seed,
        )  # fmt: skip

    _run(build, problem="graph", out=out, engine=engine, jobs=jobs, store=store, as_json=as_json)


def _names(text: str | None) -> list[str] | None:
    """Split names at commas; None, which stands for all, stays."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _run(
    build: Callable[[], Study],
    *,
    problem: str,
    out: pathlib.Path,
    engine: str,
    jobs: int | None,
    store: pathlib.Path | None,
    as_json: bool,
    kind: str = "compare",
    seeds: int | None = None,
) -> dict[str, Any]:
    """Run a study, show it, and write its report."""
    from rich.console import Console

    console = Console(stderr=True)
    start = time.perf_counter()
    try:
        _check_out(out)
        with console.status("reading") as status:
            study = build()
            from . import bench, report

            shown = study.presentation
            if shown.prepare is not None:
                study = shown.prepare(study, status.update)
        with bench.Store(store) as kept:
            results = _with_progress(study, kept, console, seeds=seeds, engine=engine, jobs=jobs)
    except KeyboardInterrupt:
        console.print("stopped; what is done is kept, and the same command goes on from there")
        raise typer.Exit(130) from None
    except (ValueError, OSError, RuntimeError) as error:
        _refuse(str(error))
    if not results.cells:
        failure = results.failures[0]
        _refuse(f"every cell failed; the first, of {failure.contender}: {failure.error}")
    record = bench.make_record(study, results, kind=kind, problem=problem, seconds=time.perf_counter() - start)
    if shown.code is not None and record["metrics"]:
        record["code"] = shown.code(study, record["recommended"])
    if shown.figures is not None and record["metrics"]:
        record["figures"] = shown.figures(study, record)
    summary = shown.summary(study, record) if shown.summary is not None else {}
    path = out / (f"{problem}.html" if kind == "reproduce" else f"compare-{problem}.html")
    try:
        out.mkdir(parents=True, exist_ok=True)
        report.write(record, path)
    except OSError as error:
        _refuse(f"--out: cannot write {path}: {error.strerror}")
    if as_json:
        from .bench.record import short_json

        print(json.dumps(short_json(record, str(path)) | summary, indent=1))
    else:
        _show(record, path)
        if shown.lines is not None:
            print("", *shown.lines(summary), sep="\n")
    for name in dict.fromkeys(failure.contender for failure in results.failures):
        failed = [failure for failure in results.failures if failure.contender == name]
        console.print(f"{name} failed in {len(failed)} cells: {failed[0].error}", style="red", highlight=False)
    if results.failures:
        raise typer.Exit(1)
    return record


def _with_progress(study: Study, kept: Any, console: Any, **options: Any) -> Any:
    import signal

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from . import bench

    stopped = False

    def stop(*_: Any) -> NoReturn:
        # An exception raised in a callback of another library may be swallowed there: the flag is not.
        nonlocal stopped
        stopped = True
        raise KeyboardInterrupt

    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    previous = signal.signal(signal.SIGINT, stop)
    try:
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("starting", total=None)

            def advance(done: int, total: int, contender: str) -> None:
                bar.update(task, completed=done, total=total, description=contender or "training")
                if stopped:
                    raise KeyboardInterrupt

            return bench.run(study, store=kept, progress=advance, **options)
    finally:
        signal.signal(signal.SIGINT, previous)


def _show(record: dict[str, Any], path: pathlib.Path) -> None:
    from rich.console import Console

    from .report import terminal

    console = Console()
    console.print(f"\n{record['data']}; {record['about']}", style="dim", highlight=False)
    console.print(terminal.leaderboard(record))
    if record["claims"]:
        console.print(terminal.claims(record))
    console.print(f"\n[bold]{record['sentence']}[/bold]\n", highlight=False)
    if record["code"]:
        console.print(f"Train {record['recommended']}:\n", style="dim", highlight=False)
        print("\n".join("    " + line for line in record["code"].splitlines()) + "\n")
    console.print(f"report: {path}", highlight=False, soft_wrap=True)


def _check_out(out: pathlib.Path) -> None:
    """Refuse a folder that the report could not be written to, before an hour of work."""
    import os

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file, not a folder")
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--out: no permission to write in {existing}")


def _find(name: str) -> Method:
    try:
        return find(name)
    except KeyError as error:
        _refuse(str(error.args[0]))


def _listed(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "room": method.room,
        "parts": list(method.parts),
        "card": method.card,
        "title": method.title,
        "arxiv": method.arxiv,
        "purpose": method.purpose,
        "claim": method.claim,
        "built": method.built,
        "proofs": method.state(),
        "verdict": method.verdict(),
    }


def _refuse(sentence: str) -> NoReturn:
    """End with one sentence and exit code 2."""
    print(f"minimand: {sentence}", file=sys.stderr)
    raise typer.Exit(2)
