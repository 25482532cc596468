#!/usr/bin/env python3
"""Checks how plainly the repository is written: comments and strings of Rust files, prose of Markdown files.

    python3 xtask/prose.py

Fails if more than 5 % of the sentences of an area open with a relative or back-referring word, or if it has more than 0.3 words per 1,000
of the list `AVOIDED`. Prints the places."""

import re
import subprocess
import sys
from collections import defaultdict

MAX_OPENERS = 5.0  # percent of the sentences
MAX_AVOIDED = 0.3  # per 1,000 words
SHOWN = 20  # places of an area that failed

OPENER = re.compile(
    r"(what|whatever|whether|who|whom|whose|whoever|those|the same|how|where|wherever|it|its|of|all that|that of|by"
    r"|as above|as before|does the same|in whose|for whom)\b",
    re.I,
)
AVOIDED = {
    r"nobody|somebody|whoever|whom": "name the pod, program or caller",
    r"anew": "again",
    r"(is|are|was|were|be) told|tells? of|untold": "is reported, pending",
    r"news": "event, update",
    r"(is|are|be) heard|hears? of": "receives",
    r"meanwhile": "concurrently, in the meantime",
    r"as above|the same (of|for|as) (it|them|those|that)": "repeat the noun",
    r"(comes|come|came) of": "results from",
    r"what is (denied|guarded|kept|said|known|there|asked|attached|in force|to be)": "denied traffic, protected endpoint",
    r"no (file|link)'s": "anonymous memory",
    r"(look|looks|looked) at everything": "full resync",
    r"makes? up": "generates",
    r"by hand": "manually",
    r"put right|as it should be": "repaired, reconciled",
}
AVOIDED = {re.compile(rf"\b({words})\b", re.I): better for words, better in AVOIDED.items()}


def area(path):
    if path.endswith(".md"):
        return "docs"
    if path.startswith(("tests/", "fuzz/")) or "/tests/" in path:
        return "tests"
    return "xtask" if path.startswith("xtask/") else "source"


def rust(lines):
    """Yields line number, text and kind of each block of comments and each long string."""
    block, start, kind = [], 0, None
    for number, line in enumerate([*lines, ""], 1):
        comment = re.match(r"\s*(///|//!|//)\s?(.*)", line)
        marker = comment and comment[1]
        if block and marker != kind:
            yield start, "\n".join(block), "prose"
            block = []
        if comment:
            if not comment[2].startswith("SAFETY"):
                start, kind = start if block else number, marker
                block.append(comment[2])
        else:
            for text in re.findall(r'"((?:[^"\\]|\\.){12,})"', line):
                yield number, text, "string"


def markdown(lines):
    """Yields line number, text and kind of each paragraph, list entry and table cell."""
    fenced, block, start = False, [], 0
    for number, line in enumerate([*lines, ""], 1):
        is_fence = line.startswith("```")
        fenced ^= is_fence
        if is_fence or fenced or line.startswith("    ") or re.match(r"\|[ -|:]*\|$", line):
            continue
        if line.startswith("|"):
            for cell in line.strip("|").split("|"):
                yield number, cell.strip(), "prose"
        elif line.strip():
            start = start if block else number
            block.append(re.sub(r"^\s*([-*]|\d+\.|#+)\s+", "", line))
        elif block:
            yield start, " ".join(block), "prose"
            block = []


def sentences(text):
    text = re.sub(r"`[^`]*`", "X", text)
    found = re.split(r"(?<=[.!?:;])\s+(?=[A-Z`X\[])|\n\n+", text)
    return [sentence.strip() for sentence in found if len(sentence.split()) >= 3]


def main():
    count, words = defaultdict(int), defaultdict(int)
    opened, avoided = defaultdict(list), defaultdict(list)
    files = subprocess.run(["git", "ls-files", "*.rs", "*.md"], capture_output=True, text=True, check=True).stdout
    for path in files.splitlines():
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
        of = area(path)
        for number, text, kind in (markdown if path.endswith(".md") else rust)(lines):
            words[of] += len(text.split())
            for sentence in sentences(text) if kind == "prose" else []:
                count[of] += 1
                if OPENER.match(sentence.lstrip("*_[")):
                    opened[of].append(f"{path}:{number}: {sentence[:150]}")
            for pattern, better in AVOIDED.items():
                avoided[of] += [f"{path}:{number}: “{word[0]}”: {better}" for word in pattern.finditer(text)]
    failed = False
    for of in sorted(count):
        share, rate = 100 * len(opened[of]) / count[of], 1000 * len(avoided[of]) / words[of]
        print(f"{of}: {share:.1f} % of {count[of]} sentences open with a word to avoid, {rate:.1f} avoided words per 1,000")
        for is_over, places in ((share > MAX_OPENERS, opened[of]), (rate > MAX_AVOIDED, avoided[of])):
            failed |= is_over
            for place in places[:SHOWN] if is_over else []:
                print(f"  {place}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
