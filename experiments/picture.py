"""Pictures for people: spectrograms with labels, and loss curves. It needs `pip install matplotlib`.

    python experiments/picture.py --out assets/sounds.png
    python experiments/picture.py --words "dog,rain,bell" --codec out/codec.pt --lm out/lm.pt --out sounds.png
    python experiments/picture.py --log out/lm.csv out2/lm.csv --out loss.png

The first two draw a column for each word: a real validation clip, the same through the codec, and what the
words alone make. The third draws every loss of the logs that training writes, one line for each log.
"""

import csv
import math

import matplotlib.pyplot as plt
import numpy as np
from common import three_versions

import data as D
from codec import CodecError
from lm import LMError
from sample import spectrogram


def draw_sounds(args) -> None:
    """The grid of spectrograms: 80 dB, mel scale."""
    _, prompts, versions = three_versions(args)
    rows = dict(zip(("real", "through the codec", "from words"), versions))
    figure, axes = plt.subplots(3, len(prompts), figsize=(2 * len(prompts) + 0.7, 5), squeeze=False)
    khz = [0.5, 1, 2, 4, 8]
    heights = [63 * math.log1p(f / 0.7) / math.log1p(8 / 0.7) for f in khz]
    for i, (title, waves) in enumerate(rows.items()):
        for j, (wave, text) in enumerate(zip(waves, prompts)):
            picture, axis = spectrogram(wave, 300), axes[i][j]
            axis.imshow(picture, origin="lower", aspect="auto", cmap="inferno", extent=(0, 5, 0, 63))
            axis.set_title(f'"{text}"' if i == 0 else "", fontsize=11)
            axis.set_yticks(heights if j == 0 else [], khz if j == 0 else [])
            axis.set_xticks(range(6) if i == 2 else [])
        axes[i][0].set_ylabel(f"{title}\nkHz")
    axes[-1][0].set_xlabel("seconds")
    figure.tight_layout(pad=0.5)
    figure.savefig(args.out, dpi=80)


def draw_losses(args) -> None:
    """One panel for each loss: what was logged, faint, and its average over nine neighbours."""
    logs = {}
    for path in args.log:
        with open(path, newline="") as file:
            logs[path] = list(csv.DictReader(file))
    left_out = ("step", "grad_norm", "disc_accuracy")
    rows = [row for log in logs.values() for row in log]
    filled = dict.fromkeys(key for row in rows for key in row if row[key])
    names = [key for key in filled if key not in left_out and "perpl" not in key]
    figure, axes = plt.subplots(1, len(names), figsize=(3.5 * len(names), 3), squeeze=False)
    for name, axis in zip(names, axes[0]):
        for path, log in logs.items():
            logged = [(int(row["step"]), float(row[name])) for row in log if row.get(name)]
            if not logged:
                continue
            steps, losses = np.array(logged).T
            (line,) = axis.plot(steps, losses, linewidth=1, alpha=0.3)
            window = np.ones(min(9, len(losses)))
            means = np.convolve(losses, window, "same") / np.convolve(np.ones(len(losses)), window, "same")
            axis.plot(steps, means, label=path, color=line.get_color())
        axis.set_title(name)
        axis.set_xlabel("steps")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout(pad=0.5)
    figure.savefig(args.out, dpi=80)


def main():
    """Read the flags."""
    parser = D.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", required=True, help="a PNG")
    add("--log", nargs="+", help="logs (codec.csv or lm.csv) whose losses are drawn instead of sounds")
    add("--words", default="dog,baby cry,rooster,clock tick,laugh,sea waves", help="categories")
    add("--data", default=D.SOUNDS, help="table or folder with the real clips")
    add("--codec", default="pretrained/codec.pt")
    add("--lm", default="pretrained/lm.pt")
    add("--guidance", type=float, default=3.0)
    args = parser.parse_args()
    draw_losses(args) if args.log else draw_sounds(args)
    print(args.out)


if __name__ == "__main__":
    with D.one_line_errors(CodecError, LMError):
        main()
