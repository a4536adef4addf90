"""The commands. Everything heavy is imported inside them, so that --help is immediate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Makes a trained PyTorch network small and fast, and proves it on the artefact that ships.",
    epilog="MODEL: torchvision:NAME, timm:NAME, gossamer:NAME, package.module:factory, path/file.py:factory, or a run folder. "
    "DATA: digits, fashion-mnist[:PATH], cifar10:PATH, imagefolder:PATH, package.module:factory.",
)

ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="A model specification or a run folder.")]
Weights = Annotated[Path | None, typer.Option("--weights", help="State dict: safetensors, or a torch file that loads with weights_only.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same plan and weights.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads of the runtime when latency is measured.")]
DataOption = Annotated[str, typer.Option("--data", help="Data to evaluate on, and to train on where it has a training split.")]
ParallelOption = Annotated[
    str | None, typer.Option("--parallel", help="Under torchrun: ddp, fsdp, tp or pp, with a degree (ddp,2), joined by + (ddp,2+tp,2).")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run in --out.")]
Validation = Annotated[
    str | None,
    typer.Option("--validation", help="Data to judge epochs on; default with patience: a tenth of the training samples, held back."),
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from gossamer import __version__

        print(f"gossamer {__version__}")
        raise typer.Exit


@app.command()
def inspect(
    model: ModelArg,
    shape: Annotated[str | None, typer.Option("--input", help="Input shape, for example 1,3,224,224.")] = None,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Show what a network costs, which channels belong together, and what cannot be pruned and why."""
    from gossamer.cli._console import show
    from gossamer.cli._models import open_model
    from gossamer.trace import trace

    network, inputs = open_model(model, weights=weights, shape=shape)
    traced = trace(network, inputs)
    if as_json:
        channels = traced.channels
        groups = [{"name": g.name, "channels": len(g.classes) * g.width, "frozen": g.frozen} for g in (*channels.groups, *channels.frozen)]
        show({"model": model, "profile": traced.profile, "groups": groups}, as_json=True)
    else:
        print(traced.profile)
        print(traced.channels)


@app.command()
def compress(
    model: ModelArg,
    data: DataOption,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder to write; needed unless --dry-run.")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="YAML recipe; default: quantise to 8 bits.")] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="For example latency=0.5,size=1MB,drop=1%.")] = None,
    weights: Weights = None,
    calibration: Annotated[str | None, typer.Option("--calibration", help="Data to calibrate with; default: 512 training samples.")] = None,
    validation: Validation = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    executorch: Annotated[bool, typer.Option("--executorch", help="Also write model.pte and measure it in ExecuTorch.")] = False,
    parallel: ParallelOption = None,
    resume: Resume = False,
    threads: Threads = 1,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compress a trained network, export it, and measure the artefact against the original."""
    from gossamer.cli._console import progress, show
    from gossamer.cli._train import is_first, parallel_of
    from gossamer.errors import RunFolderError
    from gossamer.flow import compress as run
    from gossamer.flow import plan_only
    from gossamer.recipe import Recipe

    options: dict[str, Any] = {
        "recipe": Recipe.load(recipe) if recipe else None,
        "budget": budget,
        "calibration": calibration,
        "validation": validation,
        "weights": weights,
        "seed": seed,
        "threads": threads,
        "executorch": executorch,
    }
    if out is None and not dry_run:
        raise RunFolderError("name the run folder with --out, or look at the plan with --dry-run")
    degrees = parallel_of(parallel)
    with progress(quiet=as_json or not is_first()) as tick:
        if dry_run:
            show(plan_only(model, data, progress=tick, **options), as_json=as_json)
            return
        result = run(model, data, out=out, resume=resume, progress=tick, parallel=degrees, **options)
    if not is_first():
        return
    _print_report(result.report, as_json=as_json, folder=out)


def _print_report(report: Any, *, as_json: bool, folder: Path | None) -> None:
    from gossamer.cli._console import show
    from gossamer.report import Report, run_table

    if as_json:
        show(report, as_json=True)
    else:
        print(run_table(Report.model_validate(report)))
        if folder is not None:
            print(f"\n{folder}/report.html has the whole report, {folder}/model.onnx is the artefact.")


@app.command()
def train(
    model: ModelArg,
    data: Annotated[str | None, typer.Option("--data", help="Labelled data to train on; needed unless --plan.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for weights, log and checkpoints; needed unless --explain-memory or --plan.")
    ] = None,
    weights: Weights = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1)] = 10,
    lr: Annotated[float, typer.Option("--lr", min=0.0, help="Peak learning rate.")] = 1e-3,
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw, sgd, adafactor or adamw8bit.")] = "adamw",
    patience: Annotated[
        int | None,
        typer.Option("--patience", help="Stop after so many epochs with no lower validation loss, and keep the best one's weights."),
    ] = None,
    validation: Validation = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 64,
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Batches of one optimiser step.")] = 1,
    precision: Annotated[str, typer.Option("--precision", help="fp32, bf16 or fp16.")] = "fp32",
    memory_budget: Annotated[str | None, typer.Option("--memory-budget", help="Peak of a training step, for example 400MB.")] = None,
    explain_memory: Annotated[
        bool, typer.Option("--explain-memory", help="Print what a step takes, block by block; train nothing.")
    ] = False,
    parallel: ParallelOption = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print memory and step time of every split over --world; train nothing.")] = False,
    world: Annotated[int, typer.Option("--world", min=1, help="Processes to plan for.")] = 8,
    device_memory: Annotated[str | None, typer.Option("--device-memory", help="Of each process, for example 16GB.")] = None,
    bandwidth: Annotated[str, typer.Option("--bandwidth", help="Between two processes, for example 25GB/s.")] = "25GB/s",
    flops: Annotated[str, typer.Option("--flops", help="That each process reaches, for example 10T.")] = "10T",
    shape: Annotated[str | None, typer.Option("--input", help="Input shape to plan for, for example 2,3,224,224.")] = None,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes that read ahead.")] = 0,
    skip_unreadable: Annotated[bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be decoded.")] = False,
    resume: Resume = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a network on labelled data; an interrupted run continues with --resume to the same weights."""
    from gossamer.cli._console import progress, show
    from gossamer.cli._train import explain, is_first, open_both, parallel_of
    from gossamer.cli._train import train as run
    from gossamer.errors import RunFolderError, UsageError

    if plan:
        from gossamer.cli._plan import machine_of, planned

        machine = machine_of(device_memory, bandwidth, flops)
        show(planned(model, weights, shape, world=world, batch_size=batch_size, optimizer=optimizer, machine=machine), as_json=as_json)
        return
    if data is None:
        raise UsageError("name what to train on with --data, or look at splits over many processes with --plan")
    if out is None and not explain_memory:
        raise RunFolderError("name the folder with --out, or look at the memory of a step with --explain-memory")
    options: dict[str, Any] = {"optimizer": optimizer, "precision": precision, "memory_budget": memory_budget}
    degrees = parallel_of(parallel)
    judged: dict[str, Any] = {"validation": validation, "hold_back": patience is not None}
    network, found, val = open_both(model, data, weights=weights, seed=seed, skip_unreadable=skip_unreadable, **judged)
    if explain_memory or out is None:
        show(explain(network, found, batch_size=batch_size, **options), as_json=as_json)
        return
    with progress(quiet=as_json or not is_first()) as tick:
        summary = run(
            network,
            found,
            out,
            val=val,
            patience=patience,
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            accumulate=accumulate,
            workers=workers,
            resume=resume,
            seed=seed,
            progress=tick,
            parallel=degrees,
            **options,
        )
    if summary is None:
        return
    if as_json:
        show(summary, as_json=True)
    else:
        best = f", best of {summary['epochs']} epochs: {summary['best_epoch']}" if "best_epoch" in summary else ""
        print(f"{summary['weights']}: top-1 {summary['accuracy']:.2%} on {summary['n']} held-out samples, {summary['seconds']:.0f} s{best}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    format_: Annotated[str, typer.Option("--format", help="onnx or executorch.")] = "onnx",
    out: Annotated[Path | None, typer.Option("--out", help="File to write; default: RUN/export.onnx, or .pte.")] = None,
    as_json: Json = False,
) -> None:
    """Export a run's network again, checked against torch before the file is kept."""
    from gossamer.cli._console import show
    from gossamer.errors import RunFolderError
    from gossamer.exporting import export as write

    path = out or run / f"export.{'pte' if format_ == 'executorch' else format_}"
    if path.exists():
        raise RunFolderError(f"{path} exists: name another file with --out")
    exported = write(run, path, format=format_)
    show(exported, as_json=as_json)


@app.command()
def bench(
    artefacts: Annotated[
        list[str], typer.Argument(metavar="A B ...", help="Models (also by bare names, resnet18), run folders, .onnx or .pte files.")
    ],
    runtime: Annotated[str, typer.Option("--runtime", help="onnxruntime, torch or executorch.")] = "onnxruntime",
    threads: Threads = 1,
    shape: Annotated[str | None, typer.Option("--input", help="Input shape, for example 1,3,224,224.")] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Time to spend on each artefact.")] = 2.0,
    data: Annotated[str | None, typer.Option("--data", help="Data to measure accuracy on, in the runtime.")] = None,
    weights: Annotated[list[str] | None, typer.Option("--weights", help="NAME=FILE: state dict of a model; may be repeated.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw accuracy or parameters against latency: .png, .svg or .pdf.")
    ] = None,
    sparse: Annotated[
        bool, typer.Option("--sparse-kernels", help="Also: from how many zeros on torch's sparse kernel wins in the linear layers.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare models, runs and files side by side: parameters, MACs, memory, bytes on disk, latency (interleaved), accuracy."""
    from gossamer.cli._bench import Readers, contestants, inputs_of, sparse_of
    from gossamer.cli._console import plain, show
    from gossamer.profiling import side_by_side
    from gossamer.report.picture import check_file, draw

    if picture is not None:
        check_file(picture)
    entered = contestants(artefacts, weights=weights or [], shape=shape)
    readers = Readers(entered, data) if data else None
    kernels = sparse_of(entered[0].artefact, threads=threads) if sparse else None
    compared = side_by_side(
        *(c.artefact for c in entered),
        example_inputs=inputs_of(entered, shape),
        data=readers,
        runtime=runtime,
        threads=threads,
        seconds=seconds,
        names=[c.name for c in entered],
        notes=readers.notes if readers else (),
    )
    if picture is not None:
        draw(compared, picture)
    if as_json:
        found = compared.to_json()
        show({"benchmark": found, "sparse_kernels": plain(kernels)} if kernels else found, as_json=True)
    else:
        print(f"{compared}\n\n{kernels}" if kernels else compared)


@app.command()
def memory(
    model: ModelArg,
    shape: Annotated[str | None, typer.Option("--input", help="Input shape, for example 1,3,224,224.")] = None,
    weights: Weights = None,
    patches: Annotated[str | None, typer.Option("--patches", help="First stage patch by patch: auto, or a grid such as 4x4.")] = None,
    ram_budget: Annotated[str | None, typer.Option("--ram-budget", help="Bytes of the arena, for example 1.5MB: patches that fit.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw time by address into this .png, .svg or .pdf file.")] = None,
    as_json: Json = False,
) -> None:
    """Plan the memory of inference: every tensor's address in one arena, with bounds; --json is the plan for other runtimes."""
    from gossamer.cli._console import show
    from gossamer.cli._models import open_model
    from gossamer.memory import plan_memory

    network, inputs = open_model(model, weights=weights, shape=shape)
    plan = plan_memory(network, inputs, patches=patches, ram_budget=ram_budget)
    if picture is not None:
        plan.picture(picture)
    show(plan.to_json() if as_json else plan, as_json=as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN ...", help="One run folder, or several to compare.")], as_json: Json = False
) -> None:
    """Print a run's report, or several side by side."""
    from gossamer.cli._console import show
    from gossamer.report import compare_table, read

    reports = [read(r) for r in runs]
    if as_json:
        show(reports[0] if len(reports) == 1 else {str(r): rep for r, rep in zip(runs, reports, strict=True)}, as_json=True)
    elif len(reports) == 1:
        _print_report(reports[0], as_json=False, folder=runs[0])
    else:
        print(compare_table({r.name: rep for r, rep in zip(runs, reports, strict=True)}))


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; default: runs/demo, or the next free runs/demo-N.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The whole flow on scikit-learn's digits: train, prune, distil, quantise, export, measure; asserts its own thresholds."""
    from gossamer.cli._console import progress
    from gossamer.demo import run_demo

    with progress(quiet=as_json) as tick:
        outcome = run_demo(out, seed=seed, progress=tick)
    _print_report(outcome.report, as_json=as_json, folder=outcome.folder)
    if not as_json:
        for line in outcome.checks:
            print(line)
    if not outcome.passed:
        raise typer.Exit(1)
