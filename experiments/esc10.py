"""ESC-10 as a table for training: ten kinds of sound, 80 clips of 5 s in each of folds 1 to 4.

    python experiments/esc10.py ESC-50-master        writes esc10/clips.csv: path, caption, fold

ESC-10 is a part of ESC-50 (github.com/karolpiczak/ESC-50, to be unpacked here). Fold 5 is left out, to be
kept back for a last examination; of the others fold 4, the last one, validates.
"""

import csv
import os

from common import D

CAPTIONS = {"dog": "dog bark", "crying_baby": "baby cry", "sneezing": "person sneeze"}
CAPTIONS |= {"crackling_fire": "fire crackling"}  # those that are not the category's own name


def main(folder: str) -> None:
    """Write the table."""
    with open(os.path.join(folder, "meta", "esc50.csv"), newline="") as source:
        rows = list(csv.DictReader(source))
    os.makedirs("esc10", exist_ok=True)
    path = os.path.join("esc10", "clips.csv")
    if os.path.exists(path):
        raise D.UserError(f"{path}: exists already; move it away first")
    with open(path, "w", newline="") as target:
        table = csv.writer(target)
        table.writerow(["path", "caption", "fold"])
        for row in rows:
            if row["esc10"] == "True" and row["fold"] != "5":
                caption = CAPTIONS.get(row["category"], row["category"].replace("_", " "))
                path = os.path.abspath(os.path.join(folder, "audio", row["filename"]))
                table.writerow([path, caption, row["fold"]])


if __name__ == "__main__":
    with D.one_line_errors():
        parser = D.Parser(description=__doc__.split("\n")[0])
        parser.add_argument("folder", help="what ESC-50 was unpacked to")
        main(parser.parse_args().folder)
