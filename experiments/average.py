"""The mean of two language models, one of which was trained on from the other.

    python experiments/average.py before/lm.pt after/lm.pt mean/lm.pt

Weights that lie between two ends of training are often better than both (model soups, arXiv 2203.05482).
"""

import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data as D
from lm import LMError, load_checkpoint


def average(first: str, second: str, target: str) -> None:
    """Write the second checkpoint with the mean of both's weights. UserError: they are not of one kind, or
    there is a target already."""
    if os.path.exists(target):
        raise D.UserError(f"{target}: exists already: name another file")
    one, two = (load_checkpoint(path, "nanoaudiogen lm") for path in (first, second))
    alike = all(one[key] == two[key] for key in ("config", "codec_hash"))
    if not alike or not torch.equal(one["tokenizer"], two["tokenizer"]):
        raise D.UserError(
            f"{first} and {second}: neither was trained on from the other; name two such models"
        )
    for name, tensor in two["model"].items():
        if tensor.is_floating_point():
            two["model"][name] = tensor.lerp(one["model"][name].to(tensor.dtype), 0.5)
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    D.save_atomic(two, target)
    print(f"saved as {target}")


def main():
    """Read three paths."""
    parser = D.Parser(description="The mean of two language models.")
    for name in ("first", "second", "target"):
        parser.add_argument(name)
    args = parser.parse_args()
    average(args.first, args.second, args.target)


if __name__ == "__main__":
    with D.one_line_errors(LMError):
        main()
