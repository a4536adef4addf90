"""Structured pruning of whole model zoos with no configuration: success, MACs, proof, time and memory, beside torch-pruning where it is installed.

Every network runs in a process of its own, on one thread, at its own input size, with random weights (what is checked does not depend on them).

    python benchmarks/pruning_zoo.py --suite torchvision --tool gossamer --tool torch-pruning
    python benchmarks/pruning_zoo.py --suite timm --jobs 2 --results zoo.jsonl
    python benchmarks/pruning_zoo.py --results zoo.jsonl --table docs/zoo.md        # writes the table again from kept results
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _zoo import SUITES, names, table

HERE = Path(__file__).parent


def run_one(suite: str, name: str, tool: str, timeout: float) -> dict[str, object]:
    """One network in a process of its own."""
    started = time.perf_counter()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, str(HERE / "_zoo.py"), suite, name, tool],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=env,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"suite": suite, "name": name, "tool": tool, "status": "timeout", "error": f"over {timeout:.0f} s"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line) | {"wall_s": time.perf_counter() - started}
    error = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {"suite": suite, "name": name, "tool": tool, "status": "crash", "error": f"exit {done.returncode}: {error}"[:300]}


def main() -> None:
    """Run, keep every result as a line of JSON, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", action="append", choices=SUITES, default=None)
    parser.add_argument("--tool", action="append", choices=["gossamer", "torch-pruning"], default=None)
    parser.add_argument("--names", nargs="*", help="only these networks")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; 1 for timings")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one network")
    parser.add_argument("--results", type=Path, default=Path("zoo.jsonl"), help="results are appended; what is there is not run again")
    parser.add_argument("--table", type=Path, help="write the table as Markdown")
    given = parser.parse_args()
    kept = [json.loads(line) for line in given.results.read_text().splitlines()] if given.results.exists() else []
    have = {(r["suite"], r["name"], r["tool"]) for r in kept}
    todo = [
        (suite, name, tool)
        for suite in given.suite or ([] if given.table else ["torchvision"])
        for name in names(suite)
        if not given.names or name in given.names
        for tool in given.tool or ["gossamer"]
        if (suite, name, tool) not in have
    ]
    with given.results.open("a") as out, ThreadPoolExecutor(given.jobs) as pool:
        for i, result in enumerate(pool.map(lambda job: run_one(*job, given.timeout), todo)):
            kept.append(result)
            out.write(json.dumps(result) + "\n")
            out.flush()
            after = result.get("macs_after")
            left = f"{after / result['macs_before']:.2f} of the MACs" if after else str(result.get("error", ""))[:110]
            print(f"{i + 1:4d}/{len(todo)} {result['tool']:13} {result['name']:38} {result['status']:8} {left}", flush=True)
    if given.table:
        given.table.write_text(table(kept))
        print(f"wrote {given.table}")


if __name__ == "__main__":
    main()
