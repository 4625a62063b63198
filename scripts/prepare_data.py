"""Prepare a large set from its published archives: images (resized once, if asked for), labels and counts.

    python scripts/prepare_data.py inaturalist2018 --root data --resize 256
    python scripts/prepare_data.py inaturalist2018 --root data --download       # fetches 120 GB first
    python scripts/prepare_data.py imagenet --root data --archives downloads

Archives are looked for in <root>/archives. Where some are missing, they are listed with size and address, and fetched
only with --download. Checksums, the published counts and the imbalance factor are checked. May be killed and started
again at any time. What is written is described in cbl/data/index.py.
"""

import argparse
from pathlib import Path

from command_line import one_line

from cbl import config
from cbl.data import prepare
from cbl.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=config.LARGE)
    parser.add_argument("--root", default="data", type=Path, help="prepared under <root>/<dataset> (default: data)")
    parser.add_argument("--archives", type=Path, help="folder of the archives (default: <root>/archives)")
    parser.add_argument(
        "--resize",
        type=int,
        metavar="PIXELS",
        help="resize larger images to this short side, JPEG quality 95, so that training decodes less; 256 or more for "
        "224-pixel and 366 or more for 320-pixel training keep the crops sharp (default: leave the files as they are)",
    )
    parser.add_argument("--download", action="store_true", help="fetch missing archives (iNaturalist), resumable")
    parser.add_argument("--workers", type=int, help="threads (default: one per core)")
    arguments = parser.parse_args()
    for name in ("resize", "workers"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}, but it must be 1 or more.")

    found = prepare.prepare(
        arguments.dataset,
        arguments.root,
        archive_folder=arguments.archives,
        short_side=arguments.resize,
        download=arguments.download,
        workers=arguments.workers,
    )
    print(prepare.describe(found))


if __name__ == "__main__":
    with one_line():
        main()
