#!/usr/bin/env python3
"""Arithmetic word problems as conversations, for configs/smollm2_grpo.yaml.

Usage: tools/word_problems.py FOLDER   writes FOLDER/train.jsonl (4096 problems) and FOLDER/validation.jsonl (256, other
numbers). One or two steps with numbers from 2 to 40; the same files every time. A line:
{"messages": [{"role": "user", "content": ...}], "label": "17"}.
"""
import json
import pathlib
import random
import sys

NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Finn", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo"]
THINGS = ["apples", "books", "coins", "stickers", "marbles", "pencils", "cards", "shells", "cookies", "stamps"]


def problem(rng):
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    a, b, c = rng.randint(2, 40), rng.randint(2, 40), rng.randint(2, 12)
    low, high = min(a, b), max(a, b)
    kind = rng.randrange(6)
    if kind == 0:
        return f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?", a + b
    if kind == 1:
        return f"{name} has {high} {things} and gives {low} of them to {other}. How many {things} does {name} have left?", high - low
    if kind == 2:
        return f"{name} has {a} {things}, and {other} has {b} {things}. How many {things} do they have together?", a + b
    if kind == 3:
        return f"There are {c} boxes with {a % 9 + 2} {things} each. How many {things} are there in all?", c * (a % 9 + 2)
    if kind == 4:
        return (f"{name} has {high} {things}, loses {low} of them and then finds {c}. "
                f"How many {things} does {name} have now?"), high - low + c
    return f"{name} has {a} {things}. {other} has {c} more than {name}. How many {things} does {other} have?", a + c


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(2026)
    seen, problems = set(), []
    while len(problems) < 4096 + 256:
        text, answer = problem(rng)
        if text in seen:
            continue
        seen.add(text)
        content = text + " Answer with the number only."
        problems.append({"messages": [{"role": "user", "content": content}], "label": str(answer)})
    for file, part in (("validation.jsonl", problems[:256]), ("train.jsonl", problems[256:])):
        (folder / file).write_text("".join(json.dumps(p) + "\n" for p in part))


if __name__ == "__main__":
    main()
