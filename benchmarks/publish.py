"""Where measured tables go: a file of their own and, word for word, the page that shows them.

Every benchmark takes `--small`, with which it only shows in seconds that it works, and `--output=FOLDER`.
"""

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs" / "results").glob("*.md")))


class Parser(argparse.ArgumentParser):
    """The arguments that all benchmarks share."""

    def __init__(self, docstring):
        """Adds them; the first line of the docstring is what `--help` says."""
        super().__init__(description=docstring.splitlines()[0])
        self.add_argument("--small", action="store_true", help="tiny sizes: shows in seconds that it works, measures nothing")
        self.add_argument("--output", type=Path, metavar="FOLDER", help="of tables; benchmarks/results, with --small runs/small")

    def parse_known_args(self, *args):
        """Parses, and makes the folder."""
        parsed, rest = super().parse_known_args(*args)
        parsed.output = parsed.output or (ROOT / "runs" / "small" if parsed.small else RESULTS)
        parsed.output.mkdir(parents=True, exist_ok=True)
        return parsed, rest


def processor():
    """Name of the processor, with the numbers that tell apart what virtual machines call the same."""
    facts = dict(re.findall(r"^([\w ]+?)\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M))
    return f"{facts.get('model name', '')} (family {facts.get('cpu family')}, model {facts.get('model')})"


def publish(name, results, table, output=RESULTS):
    """Writes `<name>.json` and `.md`; those in `RESULTS` also go between the markers of that name on the pages."""
    (output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / f"{name}.md").write_text(table)
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    for page in PAGES if output.resolve() == RESULTS else ():
        before, found, rest = page.read_text().partition(begin)
        if found:
            page.write_text(before + begin + table + end + rest.partition(end)[2])
    print(table)
