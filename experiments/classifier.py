"""The judge: two small convolutional networks, trained on real recordings only, say what they hear.

    python experiments/classifier.py train                              on sounds/, 11 minutes on one core
    python experiments/classifier.py train --data esc10/clips.csv --steps 800 --out out/esc10.pt
    python experiments/classifier.py judge --codec pretrained/codec.pt
    python experiments/classifier.py judge --codec pretrained/codec.pt --lm pretrained/lm.pt --words dog,rain

`judge` prints how many sounds are recognised and how far they are from real ones (validation clips, the same
through the codec, sounds made from words), then how many of each category are recognised.
"""

import math
import os
import pickle

import numpy as np
import torch
from cnn import FRAMES, Network, mel_spectra, train_network
from common import by_category, category, from_words, gather, prompt, through

import data as D
from codec import Codec, CodecError
from lm import AudioLM, LMError

TONAL = ("baby cry", "rooster", "cat", "cow", "wolf", "car horn", "bell")  # codecs lose their harmonics first
COMPONENTS = 32  # directions of the features that Fréchet distances look at: more would need more clips


def frechet(x, y) -> float:
    """Fréchet distance of two clouds (N, D) taken as Gaussians: |m - n|^2 + tr(A + B - 2 (A B)^(1/2)).

    The formula of FID (arXiv 1706.08500) and of FAD (1812.08466)."""
    x, y = x.double(), y.double()
    A, B = x.T.cov(), y.T.cov()
    cross = torch.linalg.eigvals(A @ B).sqrt().real.sum()  # none is negative, but for rounding
    distance = (x.mean(0) - y.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross
    return distance.clamp(min=0).item()  # rounding can put it below


class Judge(torch.nn.Module):
    """Two networks, and the main directions of their features at real training clips (512, COMPONENTS), in
    units in which these clips have a variance of 100: those of the Fréchet distances."""

    def __init__(self, categories: list[str]):
        super().__init__()
        self.categories = categories
        self.networks = torch.nn.ModuleList(Network(len(categories)) for _ in range(2))
        self.axes = torch.nn.Buffer(torch.eye(512, COMPONENTS))

    @torch.no_grad()
    def hear(self, waves):
        """Waves (n, LENGTH) to the probabilities of the categories (n, C) and features (n, 512)."""
        mel = torch.cat([mel_spectra(part)[:, :FRAMES] for part in waves.split(32)])
        heard = [tuple(map(torch.cat, zip(*map(network, mel.split(32))))) for network in self.networks]
        return sum(logits.softmax(1) for logits, _ in heard) / 2, torch.cat([f for _, f in heard], 1)

    def recognised(self, waves, names: list[str], words=None):
        """Which waves (n, LENGTH) are heard as these names (n,): the likeliest of the words, or of all
        categories."""
        words = words or self.categories
        chances = self.hear(waves)[0][:, [self.categories.index(word) for word in words]]
        return np.array([words[k] == name for k, name in zip(chances.argmax(1), names)])

    def distance(self, real, waves) -> float:
        """Fréchet distance of two sets of waves (n, LENGTH)."""
        return frechet(*(self.hear(x)[1] @ self.axes for x in (real, waves)))

    @classmethod
    def load(cls, path: str) -> "Judge":
        """The judge in a file. UserError: there is none, or something else."""
        if not os.path.exists(path):
            raise D.UserError(f"{path}: no judge yet: type python experiments/classifier.py train")
        try:
            saved = torch.load(path, weights_only=True)
            judge = cls(saved["categories"]).eval()
            judge.load_state_dict(saved["model"])
        except (KeyError, TypeError, RuntimeError, pickle.UnpicklingError):
            raise D.UserError(f"{path}: is no judge of this version: train one, or name another") from None
        return judge


def train(args):
    """Train the networks on a table's training clips, save them, and try them on its validation clips."""
    data = D.AudioData([args.data], os.path.dirname(args.classifier) or ".")
    if len(data.train) < COMPONENTS:
        raise D.UserError(f"{len(data.train)} clips train, a judge needs {COMPONENTS} or more: add data")
    groups = by_category(data.train, sorted({category(clip) for clip in data.train}))
    spectra = []
    for clips in groups.values():
        waves = [D.read_crop(clip, max(clip.length, 4096)) for clip in clips]
        spectra.append([mel_spectra(wave[None])[0] for wave in waves])
    judge = Judge(list(groups))
    judge.networks = torch.nn.ModuleList(train_network(spectra, args.steps, seed) for seed in range(2))
    features = judge.hear(gather(groups, {name: len(clips) for name, clips in groups.items()})[0])[1]
    _, size, axes = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    judge.axes = axes[:COMPONENTS].T * 10 * (len(features) / size.square().sum()).sqrt()
    D.save_atomic({"categories": judge.categories, "model": judge.state_dict()}, args.classifier)
    val = by_category(data.val, groups)
    right = judge.recognised(*gather(val, {name: len(clips) for name, clips in val.items()}))
    print(f"{args.classifier}: recognises {right.mean():.3f} of {len(right)} validation clips")


def print_table(judge: Judge, rows: list, words: list[str], val: dict) -> list:
    """A line for each (title, waves, names, real waves to compare with); returns which are recognised."""
    among = f"among {len(judge.categories)} categories | among {len(words)}"
    print(f"| recognised | sounds | {among} | tonal ones | Fréchet distance |")
    print("|--|--|--|--|--|--|")
    results = []
    for title, waves, names, real in rows:
        right, right_of_words = (judge.recognised(waves, names, chosen) for chosen in (None, words))
        tonal, comparable = [name in TONAL for name in names], [bool(val[name]) for name in names]
        cells = [title, len(names), f"{right.mean():.3f}", f"{right_of_words.mean():.3f}"]
        cells.append(f"{right[tonal].mean():.3f} of {sum(tonal)}" if any(tonal) else "")
        distance = judge.distance(real, waves[comparable])
        cells.append("" if math.isnan(distance) else f"{distance:.1f}")  # one clip alone has no cloud
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        results.append(right)
    return results


def judge_sounds(args):
    """Print both tables."""
    judge, codec = Judge.load(args.classifier), Codec.load(args.codec)
    data = D.AudioData([args.data], os.path.dirname(args.classifier) or ".")
    words = [word.strip() for word in args.words.split(",")] if args.words else judge.categories
    if unknown := set(words) - set(judge.categories):
        raise D.UserError(f"--words {', '.join(unknown)}: not among {', '.join(judge.categories)}")
    train, val = by_category(data.train, words), by_category(data.val, words)
    if not any(val.values()):
        raise D.UserError(f"{args.data}: has no validation clips of these words, name others")

    counts = {word: len(val[word]) for word in words}
    (real, names), (like, _) = gather(val, counts), gather(train, counts)
    rows = [("real, validation", real, names, real), ("real, training", like, names, real)]
    rows.append(("real, through the codec", through(codec, real), names, real))
    rows.append(("training, through the codec", through(codec, like), names, like))
    if args.lm:  # so many of each word, and beside them as many real ones
        lm = AudioLM.load(args.lm, codec_hash=codec.hash()).to(D.fast_dtype(torch.device("cpu"))).pack()
        options = {"guidance": args.guidance, "temperature": args.temperature, "top_k": args.top_k}
        counts = {word: args.each for word in words if val[word]}
        (real, _), (like, names) = gather(val, counts), gather(train, counts)
        rows.append((f"real, training, {args.each} of each", like, names, real))
        names = [word for word in words for _ in range(args.each)]
        made = from_words(lm, codec, [prompt(train, name) for name in names], **options)
        rows.append((f"from words, guidance {args.guidance:g}", made, names, real))

    results = print_table(judge, rows, words, val)
    print(f"\nthe codec keeps {results[2][results[0]].mean():.3f} of the real clips that are recognised\n")
    print("| recognised | " + " | ".join(row[0] for row in rows) + " |\n|--" + len(rows) * "|--" + "|")
    for word in words:
        each = [right[[name == word for name in row[2]]] for row, right in zip(rows, results)]
        print(f"| {word} | " + " | ".join(f"{r.sum()} of {len(r)}" if len(r) else "" for r in each) + " |")


def main():
    """Read the flags."""
    parser = D.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("do", choices=["train", "judge"])
    add("--data", default=D.SOUNDS, help="table or folder; its validation clips are judged")
    add("--classifier", "--out", default="out/classifier.pt", help="the judge's file, written by train")
    add("--steps", type=D.positive, default=2400, help="of each network, 16 clips each")
    add("--codec", default="pretrained/codec.pt")
    add("--lm", help="language model, if its sounds shall be judged")
    add("--words", help="categories to judge, with commas between them (default: all)")
    add("--each", type=D.positive, default=4, help="sounds for each word")
    add("--guidance", type=float, default=3.0)
    add("--temperature", type=float, default=1.0)
    add("--top_k", type=int, default=0)
    args = parser.parse_args()
    {"train": train, "judge": judge_sounds}[args.do](args)


if __name__ == "__main__":
    with D.one_line_errors(CodecError, LMError):
        main()
