"""Write a run's final weights as one safetensors file that describes itself, with a model card, ready to be published.

    python scripts/export.py run=outputs/runs/<run_id>                      # into exports/<run_id>
    python scripts/export.py run=outputs/runs/<run_id> --out elsewhere

Nothing is sent anywhere. What the two files hold is described in cbl/export.py; scripts/evaluate.py reads them.
"""

import argparse
from pathlib import Path

from command_line import one_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run that is done, or its model.pt; run= may be left out")
    parser.add_argument("--out", type=Path, help="folder to write to (default: exports/<run_id>)")
    parser.add_argument(
        "--data",
        metavar="ROOT",
        help="where the training images are, needed only for recipe.input_scaling=mean_std (default: dataset.root)",
    )
    arguments = parser.parse_args()
    from cbl import export  # after the command line: torch takes seconds to import

    folder = Path(arguments.run.removeprefix("run="))
    if folder.name == "model.pt":
        folder = folder.parent
    out = arguments.out or Path("exports") / folder.resolve().name
    facts = export.write(folder, out, arguments.data)
    size = (out / export.WEIGHTS).stat().st_size / 1e6
    print(
        f"{out / export.WEIGHTS}: {facts['parameters']:,} parameters, {size:.1f} MB, test error "
        f"{facts['error_last']:.2f} %; beside it {export.CARD}."
    )


if __name__ == "__main__":
    with one_line():
        main()
