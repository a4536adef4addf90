"""Integer networks in ONNX Runtime: gossamer beside other tools in one run, on the files that ship (`table`); where the noise is (`ablation`).

python benchmarks/quantization.py --rows "w8a8 vnni,nncf,torchao"
python benchmarks/quantization.py ablation --rows "w4a8 gptq" --limit 100
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _peers
import onnx
import torch
from _ablation import ablation
from _photographs import Task, load, parser

import gossamer as gs
from gossamer.exporting import runtime_ops
from gossamer.profiling import evaluate

EXAMPLE = (torch.zeros(1, 3, 224, 224),)
ENDS = {"mobilenet_v2": ("features.0.0", "classifier.1"), "efficientnet_lite0": ("_conv_stem", "_fc")}
"""The first and the last layer, which keep 8 bits where the others have 4."""
INTEGER = ("QLinearConv", "QGemm", "MatMulInteger", "QLinearMatMul")


def settings(task: Task) -> dict[str, dict[str, Any]]:
    """What `gossamer.quantize` is asked for in each row of its own."""
    four: dict[str, Any] = {"weight_bits": {**dict.fromkeys(ENDS[task.name], 8), "*": 4}, "target": "vnni"}
    sizes = {n.removesuffix(".weight"): p.numel() for n, p in task.model.named_parameters() if p.dim() > 1}
    same = sum(n * (8 if name in ENDS[task.name] else 4) for name, n in sizes.items()) / sum(sizes.values())
    return {
        "w8a8 vnni": {"target": "vnni", "rounding": "gptq"},
        "w8a8 avx2": {"target": "avx2", "rounding": "gptq"},
        "w8a8 avx2 latency": {"target": "avx2", "prefer": "latency", "rounding": "gptq"},
        "w8a8 nearest": {"target": "vnni"},
        "w8a8 plain": {"target": "vnni", "equalize": False},
        "w8a8 gptq plain": {"target": "vnni", "rounding": "gptq", "equalize": False},
        "w4a8 nearest": four,
        "w4a8 gptq": four | {"rounding": "gptq"},
        "w4a8 gptq plain": four | {"rounding": "gptq", "equalize": False},
        "w4a8 adaround": four | {"rounding": "adaround"},
        "mixed of w4a8's size": {"target": "vnni", "average_bits": same, "rounding": "gptq", "equalize": False},
        "average 4": {"target": "vnni", "average_bits": 4, "rounding": "gptq", "equalize": False},
        "w8a16": {"target": "vnni", "activation_bits": 16, "rounding": "gptq"},
    }


def ours(task: Task, options: dict[str, Any]) -> Callable[[Path, Path], str]:
    """Writes what gossamer makes of the network; gives what it says of the choices that it measured."""

    def write(_: Path, path: Path) -> str:
        result = gs.quantize(task.model, EXAMPLE, calibration=task.calibration, **options)
        gs.export(result, path)
        return "; ".join(n for n in result.notes if n.startswith(("equalised", "weights take", "measured")))

    return write


def table(task: Task, chosen: list[str]) -> None:
    """Files side by side; then networks of peers that write none."""
    makers = {name: ours(task, options) for name, options in settings(task).items()} | _peers.files(task)
    networks = _peers.networks(task)
    chosen = chosen or [*makers, *networks]
    if unknown := [r for r in chosen if r not in makers and r not in networks]:
        sys.exit(f"unknown rows {unknown}, known are {[*makers, *networks]}")
    with tempfile.TemporaryDirectory() as folder:
        original, plain = Path(folder) / "original.onnx", Path(folder) / "plain.onnx"
        gs.export(task.model, original, example_inputs=EXAMPLE)
        stripped = onnx.load(original)
        stripped.graph.ClearField("value_info")
        onnx.save(stripped, plain)
        files = {"float32": original}
        print(f"{task.name}\n{'':22} {'top-1':>7} {'agreement':>10} {'SQNR dB':>8} {'bytes':>9} {'CPU s':>6}  integer and float kernels")
        for name in ["float32", *chosen]:
            said, started = "", time.process_time()
            path = files.setdefault(name, Path(folder) / f"{name.replace(' ', '-')}.onnx")
            try:
                artefact: Any = networks[name]() if name in networks else path
                if name in makers:
                    said = makers[name](plain, path)
                seconds = time.process_time() - started
                print(f"{name:22} {_row(artefact, task, original, seconds)}" + (f"  [{said}]" if said else ""), flush=True)
            except Exception as e:  # a peer that fails is a row of its own
                print(f"{name:22} fails: {(str(e).splitlines() or [type(e).__name__])[0][:160]}", flush=True)
            if not path.is_file():
                del files[name]
        print(gs.benchmark(*files.values(), example_inputs=EXAMPLE, seconds=2, names=list(files)))


def _row(artefact: Any, task: Task, original: Path, seconds: float) -> str:
    found = evaluate(artefact, task.evaluation, reference=original)
    assert found.accuracy is not None
    line = f"{found.accuracy.value:7.2%} {found.agreement or 0:10.1%} {found.sqnr_db or 0:8.1f}"
    if not isinstance(artefact, Path):
        return f"{line} {'':9} {seconds:6.0f}  in torch, simulated, {artefact.rounded} of {artefact.layers} layers rounded"
    ops = runtime_ops(artefact)
    floats = sum(ops[o] for o in ("Conv", "FusedConv", "Gemm", "MatMul", "NhwcFusedConv"))
    return f"{line} {artefact.stat().st_size:9} {seconds:6.0f}  {sum(ops[o] for o in INTEGER)} and {floats}"


def main() -> None:
    """Print the table, or where the noise of one row comes from."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("what", nargs="?", choices=["table", "ablation"], default="table")
    arguments.add_argument(
        "--rows", default="", help="names of rows, with commas; all where none is given; of an ablation one of gossamer's"
    )
    args = arguments.parse_args()
    task, chosen = load(args), [r for r in args.rows.split(",") if r]
    if args.what == "table":
        return table(task, chosen)
    known = settings(task)
    for name in chosen or ["w4a8 gptq plain"]:
        if name not in known:
            sys.exit(f"unknown row {name!r}, known are {list(known)}")
        print(f"{task.name}, {name}, on {sum(len(x) for x, _ in task.evaluation)} photographs")
        ablation(gs.quantize(task.model, EXAMPLE, calibration=task.calibration, **known[name]), [x for x, _ in task.evaluation])


if __name__ == "__main__":
    main()
