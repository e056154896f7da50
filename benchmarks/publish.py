"""Where measured tables go: a file of their own and, word for word, the README."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def publish(name, results, table):
    """Writes `results/<name>.json` and `.md`, and puts the table between the README's markers of that name."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(table)
    readme = ROOT / "README.md"
    text = readme.read_text()
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    if begin in text:
        before, _, rest = text.partition(begin)
        readme.write_text(before + begin + table + end + rest.partition(end)[2])
    print(table)
