"""Low rank: what each method loses for its multiply-adds, of single layers and of whole networks, with and without data, and what it gains in time.

python benchmarks/lowrank.py layers --out runs/lowrank           # dense 3x3 layers of a ResNet on Fashion-MNIST; tensorly beside them, where installed
python benchmarks/lowrank.py network --out runs/lowrank          # the whole ResNet, before and after an epoch of distillation
python benchmarks/lowrank.py pointwise --network efficientnet_lite0   # pretrained, photographs: errors of pointwise layers
python benchmarks/lowrank.py photographs --network mobilenet_v2       # pretrained, photographs: the whole network, before and after an epoch
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gossamer as gs
from distillation import accuracy
from gossamer.calibration import Batches, Moments, second_moments
from gossamer.decoupling import FORMS, cost, sizes_of, unfit
from gossamer.decoupling import fit_layer as fit_decoupled
from gossamer.exchange import canonical
from gossamer.lowrank import METHODS, Site, find_sites, fit_layer, full_ranks
from gossamer.lowrank.options import largest
from gossamer.profiling.chains import chain, time_chains
from gossamer.profiling.runtime import evaluating
from gossamer.run_folder import processor
from sparsity import Fashion

Data = Sequence[Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layers", "network", "pointwise", "photographs"])
    parser.add_argument("--out", type=Path, default=Path("runs/lowrank"))
    parser.add_argument("--samples", type=int, help="of Fashion-MNIST to train on; default: all")
    parser.add_argument("--macs", type=float, nargs="*", help="fractions to keep")
    parser.add_argument("--methods", nargs="*", help="those to run; default: all")
    parser.add_argument("--network", choices=["mobilenet_v2", "efficientnet_lite0"], default="mobilenet_v2")
    parser.add_argument("--limit", type=int, default=200, help="photographs to evaluate on")
    parser.add_argument("--epochs", type=int, default=1, help="of distillation; 0 for none")
    return parser.parse_args()


def methods() -> dict[str, Callable[..., gs.Result]]:
    """Name -> (network, example inputs, fraction of the MACs, calibration batches) -> result."""

    def low_rank(method: Any, data: bool = True) -> Callable[..., gs.Result]:
        def run(network: nn.Module, inputs: Any, macs: float, calibration: Data) -> gs.Result:
            return gs.factorize(network, inputs, method=method, macs=macs, calibration=calibration if data else None, runtime=None)

        return run

    def auto(network: nn.Module, inputs: Any, macs: float, calibration: Data) -> gs.Result:
        return gs.factorize(network, inputs, macs=macs, calibration=calibration)

    def uniform(network: nn.Module, inputs: Any, macs: float, calibration: Data) -> gs.Result:
        return at_one_fraction(network, inputs, macs, calibration)

    def prune(network: nn.Module, inputs: Any, macs: float, calibration: Data) -> gs.Result:
        return gs.prune(network, inputs, macs=macs, calibration=calibration, round_to=8)

    found = {
        "svd, weights only": low_rank("svd", data=False),
        "svd, same fraction of each layer": uniform,
        "svd": low_rank("svd"),
        "spatial svd": low_rank("spatial_svd"),
        "tucker-2": low_rank("tucker2"),
        "cp": low_rank("cp"),
        "auto": auto,
        "pruning": prune,
    }

    def decoupled(form: Any) -> Callable[..., gs.Result]:
        def run(network: nn.Module, inputs: Any, macs: float, calibration: Data) -> gs.Result:
            return gs.decouple(network, inputs, form=form, macs=macs, calibration=calibration, runtime=None)

        return run

    return found | {f"decoupled, {form.replace('_', ' ')}": decoupled(form) for form in FORMS}


def at_one_fraction(network: nn.Module, inputs: Any, macs: float, calibration: Data) -> gs.Result:
    """SVD of every layer at one fraction of its MACs, which is searched for."""
    sites, _ = find_sites(network, inputs)
    total = gs.profile(network, inputs).macs
    low, high = 0.0, 1.0
    best: dict[str, Any] = {}
    for _ in range(12):
        part = (low + high) / 2
        ranks = {s.name: largest(s, "svd", full_ranks("svd", s.dims), part * s.macs, 1) for s in sites}
        picks = {n: r for n, r in ranks.items() if r is not None}
        saved = sum(s.macs - s.cost("svd", picks[s.name])[0] for s in sites if s.name in picks)
        if total - saved <= macs * total:
            low, best = part, picks
        else:
            high = part
    return gs.factorize(network, inputs, method="svd", rank=best, calibration=calibration, runtime=None)


def output_errors(model: nn.Module, sites: Sequence[Site], modules: Sequence[Sequence[nn.Module]], batches: Data) -> list[list[float]]:
    """Root mean square errors of the outputs of layers' stand-ins on some batches, relative to the outputs' standard deviation."""
    lost = [[0.0] * len(m) for m in modules]
    count = [0] * len(sites)
    sums: list[list[Any]] = [[0.0, 0.0] for _ in sites]

    def rows(t: Tensor) -> Tensor:
        return t.movedim(1, -1).flatten(0, -2)[::5] if t.dim() > 2 else t

    def compare(i: int) -> Callable[..., None]:
        def hook(layer: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
            want = rows(out)
            sums[i][0], sums[i][1] = sums[i][0] + want.sum(0), sums[i][1] + want.square().sum(0)
            count[i] += len(want)
            for j, other in enumerate(modules[i]):
                lost[i][j] += float((rows(other(given[0])) - want).square().sum())

        return hook

    handles = [site.layer.register_forward_hook(compare(i)) for i, site in enumerate(sites)]
    with evaluating(model):
        for batch in batches:
            model(batch[0])
    for handle in handles:
        handle.remove()
    spread = [float((s[1] - s[0].square() / n).sum()) for s, n in zip(sums, count, strict=True)]
    return [[(v / whole) ** 0.5 for v in row] for row, whole in zip(lost, spread, strict=True)]


def moments_of(model: nn.Module, sites: Sequence[Site], batches: Data) -> dict[str, Moments]:
    return second_moments(model, {s.name: s.layer for s in sites}, Batches(batches, (batches[0][0],), model))


def peers(site: Site, method: str, ranks: tuple[int, ...]) -> tuple[float, float] | None:
    """tensorly on the same weight at the same ranks: relative error of the weight and seconds; None where it is absent or has no such method."""
    if importlib.util.find_spec("tensorly") is None or method not in ("tucker2", "cp"):
        return None
    import tensorly as tl
    from tensorly.decomposition import parafac, partial_tucker

    tl.set_backend("pytorch")
    w = site.layer.weight.detach()
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == "cp":
            made = tl.cp_to_tensor(parafac(w, rank=ranks[0], init="random", random_state=0, n_iter_max=100))
        else:
            (core, factors), _ = partial_tucker(w, rank=[ranks[1], ranks[0]], modes=[0, 1])
            made = tl.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    return float((made - w).norm() / w.norm()), time.perf_counter() - started


def layers(options: argparse.Namespace) -> None:
    """Dense 3x3 layers of a trained ResNet: errors on held-out inputs, seconds, and latency in ONNX Runtime."""
    fashion = Fashion(options.out, options.samples)
    model = fashion.trained("resnet", 0).eval()
    calibration = [b for _, b in zip(range(8), fashion.loader(), strict=False)]
    held = [b for _, b in zip(range(4), fashion.val, strict=False)]
    sites = [s for s in find_sites(model, (torch.zeros(1, 1, 28, 28),))[0] if s.dims.taps == 9 and s.dims.ins >= 16]
    moments = moments_of(model, sites, calibration)
    header()
    print("| MACs | method | weight | outputs, weights only | outputs, fitted | seconds | latency | tensorly: weight, seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for part in options.macs or (0.5, 0.25):
        for method in chosen(METHODS, options):
            rows = []
            for site in sites:
                ranks = largest(site, method, full_ranks(method, site.dims), part * site.macs, 8)
                if ranks is None:
                    continue
                started = time.perf_counter()
                fitted = fit_layer(site.layer, method, ranks, moments=moments[site.name])
                took = time.perf_counter() - started
                plain = fit_layer(site.layer, method, ranks)
                (errors,) = output_errors(model, [site], [[plain.module, fitted.module]], held)
                one, many = time_chains([site.chain(), site.chain(method, ranks)], site.shapes[0])
                rows.append((plain.error, *errors, took, many / one, *(peers(site, method, ranks) or ())))
            _row(part, method, rows)
        for form in chosen(FORMS, options):
            rows = [r for site in sites if (r := decoupled_row(model, site, form, part, moments[site.name], held))]
            _row(part, form.replace("_", " "), rows)
    print(f"\n{len(sites)} layers of {', '.join(f'{s.dims.ins}->{s.dims.outs}' for s in sites)}; means, and the range over layers")


def chosen(names: Sequence[str], options: argparse.Namespace) -> list[str]:
    return [n for n in names if options.methods is None or n in options.methods]


def _row(part: float, name: str, rows: Sequence[tuple[float, ...]]) -> None:
    columns = [(statistics.mean(c), min(c), max(c)) for c in zip(*rows, strict=True)]
    cells = [f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in columns]
    few = f" ({len(rows)} layers)" if len(rows) > 0 else " (no layer)"
    print(f"| {part} | {name}{few} | " + " | ".join(cells[:5]) + f" | {', '.join(cells[5:])} |", flush=True)


def decoupled_row(model: nn.Module, site: Site, form: str, part: float, moments: Moments, held: Data) -> tuple[float, ...] | None:
    """Errors, seconds and latency of a layer decoupled to the most MACs within a fraction of its own; None where no size is within it."""
    fits = [(cost(site.layer, form, s, site.shapes)[0], s) for s in sizes_of(form, site.dims) if unfit(form, site.dims, s) is None]
    within = [f for f in fits if f[0] <= part * site.macs * 1.001]
    if not within:
        return None
    sizes = max(within)[1]
    started = time.perf_counter()
    fitted = fit_decoupled(site.layer, form, sizes, moments=moments)
    took = time.perf_counter() - started
    plain = fit_decoupled(site.layer, form, sizes)
    (errors,) = output_errors(model, [site], [[plain.module, fitted.module]], held)
    one, many = time_chains([site.chain(), chain(fitted.module)], site.shapes[0])
    return plain.error, *errors, took, many / one


def pointwise(options: argparse.Namespace) -> None:
    """Pointwise layers of a pretrained compact network at fractions of their break-even rank: errors on photographs not fitted to."""
    task = _task(options)
    sites = [
        s for s in find_sites(task.model, (task.evaluation[0][0][:1],))[0] if s.dims.taps == 1 and s.dims.groups == 1 and s.dims.kernel
    ]
    moments = moments_of(task.model, sites, task.calibration)
    header()
    print(
        "| rank, of the break-even one | weights only | weights only, means made up for | fitted | fitted lower in |\n|---|---|---|---|---|"
    )
    for part in options.macs or (1.0, 0.5):
        made = []
        for site in sites:
            d = site.dims
            ranks = (max(1, int(part * d.ins * d.outs / (d.ins + d.outs))),)
            plain = fit_layer(site.layer, "svd", ranks)
            fitted = fit_layer(site.layer, "svd", ranks, moments=moments[site.name])
            mean = moments[site.name].mean.double()
            missing = (canonical(site.layer).double().flatten(2) - _matrix(plain.module)) @ mean[:, :, None]
            made.append([plain.module, nn.Sequential(plain.module, _Shift(missing.flatten().float())), fitted.module])
        found = output_errors(task.model, sites, made, task.evaluation[:2])
        means = [statistics.mean(c) for c in zip(*found, strict=True)]
        better = sum(r[2] < min(r[:2]) for r in found)
        print(f"| {part} | " + " | ".join(f"{m:.3f}" for m in means) + f" | {better} of {len(found)} layers |", flush=True)


class _Shift(nn.Module):
    """Adds a constant to each channel."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        return x + self.values[:, None, None]


def _matrix(module: nn.Sequential) -> Tensor:
    first, last = (canonical(m).double().flatten(2) for m in module)  # type: ignore[arg-type]
    return last @ first


def network(options: argparse.Namespace) -> None:
    """The ResNet whole: top-1 before and after distillation, and latency in ONNX Runtime beside the MACs."""
    fashion = Fashion(options.out, options.samples)
    model = fashion.trained("resnet", 0).eval()
    calibration = [b for _, b in zip(range(8), fashion.loader(), strict=False)]
    inputs = (torch.zeros(1, 1, 28, 28),)
    header()
    print(f"dense: {accuracy(model, fashion.val):.2%}, {gs.profile(model, inputs).params} parameters")
    print(
        f"\n| MACs | method | reached | top-1 | after {options.epochs} epoch | latency (10th to 90th percentile) | seconds |\n|---|---|---|---|---|---|---|"
    )
    for part, name, result, took in _results(options, model, inputs, calibration, (0.6, 0.4)):
        before = accuracy(result.model, fashion.val)
        after = ""
        if options.epochs:
            tuned = gs.distill(result, model, fashion.loader(), epochs=options.epochs, lr=2e-3)
            after = f"{accuracy(tuned.model, fashion.val):.2%}"
        _line(part, name, result, took, model, f"{before:.2%} | {after}")


def photographs(options: argparse.Namespace) -> None:
    """A pretrained compact network whole: top-1 and agreement, before and after distillation on the calibration photographs."""
    task = _task(options)
    with torch.no_grad():
        dense = [task.model(x).argmax(1) for x, _ in task.evaluation]
    right = sum(int((a == y).sum()) for a, (_, y) in zip(dense, task.evaluation, strict=True))
    n = sum(len(y) for _, y in task.evaluation)
    header()
    print(f"dense: {right / n:.1%} of {n} photographs; {sum(len(b[0]) for b in task.calibration)} others for calibration")
    print(
        f"\n| MACs | method | reached | top-1, agreement | after {options.epochs} epoch | latency (10th to 90th percentile) | seconds |\n"
        "|---|---|---|---|---|---|---|"
    )

    def quality(model: nn.Module) -> str:
        with torch.no_grad():
            got = [model(x).argmax(1) for x, _ in task.evaluation]
        top1 = sum(int((a == y).sum()) for a, (_, y) in zip(got, task.evaluation, strict=True)) / n
        same = sum(int((a == b).sum()) for a, b in zip(got, dense, strict=True)) / n
        return f"{top1:.1%}, {same:.1%}"

    for part, name, result, took in _results(options, task.model, (task.evaluation[0][0][:1],), task.calibration, (0.9, 0.8)):
        before, after = quality(result.model), ""
        if options.epochs:
            after = quality(gs.distill(result, task.model, task.calibration, epochs=options.epochs, lr=1e-4).model.eval())
        _line(part, name, result, took, task.model, f"{before} | {after}")


def _results(
    options: argparse.Namespace, model: nn.Module, inputs: Any, calibration: Data, parts: Sequence[float]
) -> Iterator[tuple[float, str, gs.Result, float]]:
    """Every method at every fraction; one that cannot reach it says so."""
    from gossamer.errors import BudgetError, NothingToDo

    for part in options.macs or parts:
        for name, run in methods().items():
            if options.methods and name not in options.methods:
                continue
            started = time.perf_counter()
            try:
                result = run(model, inputs, part, calibration)
            except (BudgetError, NothingToDo) as e:
                print(f"| {part} | {name} | {e} | | | | |", flush=True)
                continue
            yield part, name, result, time.perf_counter() - started


def _line(part: float, name: str, result: gs.Result, took: float, model: nn.Module, quality: str) -> None:
    _, t = gs.benchmark(model, result, example_inputs=result.example_inputs, runs=40).rows
    reached = result.after.macs / result.before.macs
    print(
        f"| {part} | {name} | {reached:.2f} | {quality} | {t.ratio:.2f} ({t.ratio_p10:.2f} to {t.ratio_p90:.2f}) | {took:.0f} |", flush=True
    )


def _task(options: argparse.Namespace) -> Any:
    import _photographs

    sys.argv = [sys.argv[0], "--limit", str(options.limit), "--network", options.network]
    return _photographs.load(_photographs.arguments(__doc__ or ""))


def header() -> None:
    import onnxruntime

    print(f"{processor()}, 1 thread, torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}\n")


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    {"layers": layers, "network": network, "pointwise": pointwise, "photographs": photographs}[options.what](options)


if __name__ == "__main__":
    main()
