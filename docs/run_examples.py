"""Run the Python blocks of README.md and of the pages in docs, each page in a namespace of its own.

A block that raises fails the run and names its page and line.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
import types
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run(page: Path) -> int:
    """Execute the blocks of one page; return how many there were."""
    text, module = page.read_text(), types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    # a real module, so that classes defined on the page can be pickled
    sys.modules[module.__name__] = module
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        # newlines in front keep the line numbers of tracebacks those of the page
        exec(compile("\n" * line + block[1], str(page), "exec"), module.__dict__)
    return len(blocks)


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    failed = 0
    os.chdir(tempfile.mkdtemp())  # what examples write goes there
    for page in [root / "README.md", *sorted((root / "docs").glob("**/*.md"))]:
        try:
            print(f"{page.relative_to(root)}: {run(page)} block(s)")
        except Exception:
            traceback.print_exc()
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
