"""Where measured tables go: a file of their own and, word for word, the page that shows them."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")


def processor():
    """Name of the processor, with the numbers that tell apart what virtual machines call the same."""
    facts = dict(re.findall(r"^([\w ]+?)\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M))
    return f"{facts.get('model name', '')} (family {facts.get('cpu family')}, model {facts.get('model')})"


def publish(name, results, table):
    """Writes `results/<name>.json` and `.md`, and puts the table between the markers of that name on the pages."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(table)
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    for page in PAGES:
        before, found, rest = page.read_text().partition(begin)
        if found:
            page.write_text(before + begin + table + end + rest.partition(end)[2])
    print(table)
