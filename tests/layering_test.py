#!/usr/bin/env python3
"""Levels of the rooms in src/ (docs/architecture.md).

A file includes only its own room and rooms of a lower level, by their path from src/ ("ops/gemm.h").
The host-only rooms data and rl see even less. The environment is read in base/ alone.

    layering_test.py SRC          walk a tree; exit code 1 and one line a breach
    layering_test.py --self-test  show on small trees that each kind of breach is found
"""
import pathlib
import re
import sys
import tempfile

LEVEL = {"base": 0, "numerics": 1, "tensor": 2, "ops": 3, "comm": 3, "data": 3, "model": 4,
         "policy": 5, "rollout": 5, "rl": 5, "sync": 5, "serve": 6, "loop": 6, "apps": 7,
         "bindings": 7}
ONLY = {"data": {"base"}, "rl": {"base", "data"}}  # host only: no tensor, no device
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
GETENV = re.compile(r"\b(?:secure_)?getenv\s*\(")
SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}


def breaches(src):
    """One line for every breach below the folder src."""
    found = []
    for path in sorted(p for p in src.rglob("*") if p.suffix in SUFFIXES):
        room = path.relative_to(src).parts[0]
        where = f"{path.relative_to(src.parent)}"
        if room not in LEVEL:
            found.append(f"{where}: {room} is no room (docs/architecture.md)")
            continue
        text = path.read_text()
        if room != "base" and GETENV.search(text):
            found.append(f"{where}: reads the environment outside base/")
        for target in INCLUDE.findall(text):
            other = target.split("/")[0]
            if ".." in pathlib.PurePosixPath(target).parts:
                found.append(f'{where}: "{target}" goes up; write the path from src/')
            elif "/" not in target or other not in LEVEL:
                found.append(f'{where}: "{target}" is no path from src/')
            elif other != room and LEVEL[other] >= LEVEL[room]:
                found.append(f'{where}: "{target}" is of level {LEVEL[other]}, '
                             f"{room} of level {LEVEL[room]}")
            elif other != room and other not in ONLY.get(room, {other}):
                found.append(f'{where}: "{target}": {room} sees only {sorted(ONLY[room])}')
    return found


def self_test():
    """(file, text, whether it is a breach)"""
    cases = [
        ("ops/gemm.cpp", '#include "tensor/tensor.h"\n#include "ops/gemm.h"\n', False),
        ("apps/main.cpp", '#include "loop/rl_loop.h"\n#include <CLI/CLI.hpp>\n', False),
        ("base/env.cpp", 'const char* v = std::getenv("X");\n', False),
        ("tensor/tensor.h", '#include "ops/gemm.h"\n', True),
        ("policy/policy.h", '#include "rollout/engine.h"\n', True),
        ("rl/loss.h", '#include "tensor/tensor.h"\n', True),
        ("data/trajectory.h", '#include "numerics/formats.h"\n', True),
        ("ops/gemm.cpp", '#include "../tensor/tensor.h"\n', True),
        ("ops/gemm.cpp", '#include "gemm.h"\n', True),
        ("loop/session.cpp", 'auto v = getenv("HOME");\n', True),
        ("utils/text.h", "", True),
    ]
    for file, text, breach in cases:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "src" / file
            path.parent.mkdir(parents=True)
            path.write_text(text)
            found = breaches(pathlib.Path(folder) / "src")
            if bool(found) != breach:
                print(f"self-test: {file} with {text!r}: found {found}, breach expected: {breach}")
                return 1
    print(f"{len(cases)} cases as expected")
    return 0


def main(arguments):
    if arguments == ["--self-test"]:
        return self_test()
    if len(arguments) != 1 or not pathlib.Path(arguments[0]).is_dir():
        print(__doc__)
        return 2
    found = breaches(pathlib.Path(arguments[0]))
    print("\n".join(found) if found else "no breach")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
