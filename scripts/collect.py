"""Publish runs: gather run folders, of any number of machines, or a W&B project into results/.

    python scripts/collect.py                              # outputs/runs -> results/runs.csv
    python scripts/collect.py outputs/runs other/runs      # and another machine's
    python scripts/collect.py --wandb entity/project       # rebuilt from W&B, without any folder

Runs that are published already stay as they are; runs under way are left out. What the files hold is described in
results/README.md.
"""

import argparse
import sys
from pathlib import Path

from command_line import one_line

from cbl import store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="folders of runs (default: outputs/runs)")
    parser.add_argument("--results", default="results", type=Path, help="where to publish (default: results)")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="take the runs of this W&B project too")
    arguments = parser.parse_args()

    folders = arguments.folders or ([] if arguments.wandb else ["outputs/runs"])
    found = store.read_folders(folders)
    if arguments.wandb:
        found = store.merge(found, store.from_wandb(arguments.wandb))
    published = store.publish(found, arguments.results)

    for warning in published.store.warnings:
        print(f"Warning: {warning}", file=sys.stderr)
    print(
        f"{arguments.results / 'runs.csv'}: {published.added} new, {published.changed} changed, {published.kept} kept, "
        f"{published.unfinished} unfinished and left out; {len(published.store.runs)} runs in all."
    )


if __name__ == "__main__":
    with one_line():
        main()
