#!/usr/bin/env python3
"""Runs the whole demo three times and compares the runs to the bit: with one thread, with two, and
with two while it is killed with SIGKILL at random moments and resumed.

Equal means: every step of metrics.jsonl holds the same text for every metric but timing/* and
performance/*; sync/weight_checksum, which covers all weights that the rollout reads, is one of
them. Each run must have policy and rollout agree to the bit in every step, with preemption. Ends
with 0 when all of that holds. `make check-demo` calls it; it takes about four times the demo.
"""
import argparse
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time


def read_steps(folder):
    """step -> {metric: text of its value}, in the order of the file."""
    steps = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line, parse_float=str, parse_int=str)
        step = row.pop("step")
        if step in steps:
            sys.exit(f"{folder}/metrics.jsonl holds step {step} twice")
        steps[step] = {name: value for name, value in row.items()
                       if not name.startswith(("timing/", "performance/"))}
    return steps


def differences(a, b):
    if list(a) != list(b):
        return [f"the steps are {len(a)} and {len(b)}"]
    return [f"step {step} {name}: {a[step].get(name)} against {b[step].get(name)}"
            for step in a for name in sorted(a[step].keys() | b[step].keys())
            if a[step].get(name) != b[step].get(name)]


class Demo:
    def __init__(self, args, name, overrides):
        self.folder = args.work / name
        self.log = args.work / (name + ".log")
        self.command = [str(args.binary), "rl", "--config", str(args.config), "--resume", "auto",
                        f"logger.log_dir={self.folder}", *overrides, *args.overrides]

    def start(self):
        with open(self.log, "a") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT,
                                    env={**os.environ, "OMP_WAIT_POLICY": "passive"})

    def finish(self):
        code = self.start().wait()
        if code != 0:
            tail = "\n".join(self.log.read_text().splitlines()[-5:])
            sys.exit(f"exit code {code}: {' '.join(self.command)}\n{tail}")
        return read_steps(self.folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", type=pathlib.Path, default=pathlib.Path("build/lockstep"))
    parser.add_argument("--config", type=pathlib.Path, default=pathlib.Path("configs/demo.yaml"))
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/check_demo"),
                        help="folder of the runs, emptied first")
    parser.add_argument("--kills", type=int, default=6, help="most kills of the third run")
    parser.add_argument("--seed", type=int, default=None, help="of the moments of the kills")
    parser.add_argument("overrides", nargs="*", help="dotted overrides for all runs")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)

    def timed(name, overrides):
        start = time.monotonic()
        steps = Demo(args, name, overrides).finish()
        seconds = time.monotonic() - start
        print(f"{name}: {len(steps)} steps in {seconds:.1f} s", flush=True)
        return steps, seconds

    one, _ = timed("one_thread", ["num_threads=1"])
    two, seconds = timed("two_threads", ["num_threads=2"])

    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(2**32)
    moments = random.Random(seed)
    demo = Demo(args, "killed", ["num_threads=2", "checkpointing.save_period=5"])
    kills = []
    for _ in range(args.kills):
        process = demo.start()
        after = moments.uniform(0, seconds / 3)
        try:
            process.wait(timeout=after)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills.append(f"{after:.1f}")
    killed = demo.finish()
    print(f"killed: {len(killed)} steps, SIGKILL after {', '.join(kills)} s (--seed {seed})")

    failures = []
    for name, other in (("two_threads", two), ("killed", killed)):
        found = differences(one, other)
        failures += [f"one_thread against {name}: {line}" for line in found[:10]]
        if len(found) > 10:
            failures.append(f"... and {len(found) - 10} more")
    if args.kills > 0 and not kills:
        failures.append("the third run was over before its first kill")
    for step, row in one.items():
        if row["train/logprobs_different"] != "0" or row["train/token_mult_prob_error"] != "1.0":
            failures.append(f"step {step}: policy and rollout differ")

    def total(name):
        return sum(int(row[name]) for row in one.values())

    if total("rollout/preemptions") == 0:
        failures.append("no sequence was preempted")
    accuracy = [row["validation/accuracy"] for row in one.values() if "validation/accuracy" in row]
    values = sum(len(row) for row in one.values())
    print(f"{total('train/logprobs_different')} of {total('train/logprobs_compared')} "
          f"log-probabilities differ, {total('rollout/preemptions')} preemptions, "
          f"{total('train/optimizer_steps')} optimizer steps, held-out accuracy "
          f"{accuracy[0]} -> {accuracy[-1]}, last checksum "
          f"{list(one.values())[-1]['sync/weight_checksum']}")
    if failures:
        print("\n".join(failures))
        return 1
    print(f"equal in all {len(one)} steps: {values} values of metrics.jsonl, three runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
