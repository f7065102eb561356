"""How much there is to read: lines of code, the longest functions, what a method imports.

    python benchmarks/size.py                      # of this checkout
    python benchmarks/size.py --root OTHER_CHECKOUT

Lines of code are those with a token that is neither a comment nor a docstring.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

CORE = ("batch", "dist", "checks", "jsonable", "config", "assemble", "memory", "nn", "losses",
        "models", "data", "train")  # fmt: skip
SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What to measure."""

    root: Path = Path(__file__).resolve().parents[1]
    """A checkout."""
    longest: int = 5
    """How many functions to list."""


def docstrings(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                lines |= set(range(statement.lineno, (statement.end_lineno or 0) + 1))
    return lines


def code_lines(source: str) -> int:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings(ast.parse(source)))


def functions(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield (node.end_lineno or 0) - node.lineno + 1, f"{path}:{node.name}"


def closure(root: Path, module: str) -> set[str]:
    """Modules of the package that importing `module` imports."""
    code = f"import sys, {module}; print(*[n for n in sys.modules if n.startswith('memseg_dist')])"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def main(size: Size) -> None:
    package = size.root / "memseg_dist"
    counts: Counter[str] = Counter()
    for path in sorted(package.rglob("*.py")):
        counts[path.relative_to(package).parts[0].removesuffix(".py")] += code_lines(
            path.read_text()
        )
    for name, count in sorted(counts.items()):
        print(f"{name:16} {count:6}{'  core' if name in CORE else ''}")
    print(f"{'core':16} {sum(counts[name] for name in CORE):6}")
    print(f"{'package':16} {sum(counts.values()):6}")
    for path in sorted((size.root / "jobs").glob("*.py")):
        text = path.read_text()
        print(f"jobs/{path.name:24} {code_lines(text):4} code {len(text.splitlines()):4} all")
    found = (item for path in package.rglob("*.py") for item in functions(path))
    for length, name in sorted(found, reverse=True)[: size.longest]:
        print(f"{length:4} lines  {Path(name).relative_to(size.root)}")
    for path in sorted((package / "methods").rglob("*.py")):
        if path.stem in ("method", "larvseg", "rca", "segment", "classify"):
            module = ".".join(path.relative_to(size.root).with_suffix("").parts)
            print(f"{module:40} imports {len(closure(size.root, module))} modules")


if __name__ == "__main__":
    main(tyro.cli(Size, description=__doc__))
