#!/usr/bin/env python
"""The README's tables of results, made from the CSVs that the runs wrote: no figure there is typed by hand.

    python results/readme.py            # rewrite the tables in README.md
    python results/readme.py --check    # exit code 1 when they differ (the tests ask so)

A table stands between `<!-- FILE -->`, which names its CSV, and `<!-- end -->`.
"""

import argparse
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd

ROOT = Path(__file__).parent.parent
TABLE = re.compile(r"<!-- (?P<file>results/\S+\.csv) -->\n.*?<!-- end -->", re.DOTALL)


def load_script(name: str) -> ModuleType:
    """A numbered script as a module; its name is none that `import` could read."""
    sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def with_tables(text: str) -> str:
    """The README's text with each marked table made anew from its CSV."""
    as_markdown = load_script("05_benchmark").as_markdown

    def table(found: re.Match) -> str:
        made = as_markdown(pd.read_csv(ROOT / found["file"])).strip()
        return f"<!-- {found['file']} -->\n{made}\n<!-- end -->"

    return TABLE.sub(table, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; tell whether README.md is up to date")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    made = with_tables(text)
    if check:
        return int(made != text)
    readme.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
