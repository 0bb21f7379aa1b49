"""The paper's three claims on the recordings in sounds/, as one table: mixing, guidance, and streams.

    python experiments/ablate.py                     with the default steps of `tiny`: many hours on a CPU
    python experiments/ablate.py --steps 1500 --codec_steps 1000
    python experiments/ablate.py --size base --codec_size paper --steps 5000 --codec_steps 5000

It runs train_codec.py and train_lm.py for each row, below --out (1 GB); a run that was interrupted goes on.
The judge of `classifier.py train` has to be there. Fewer streams mean more frames for the same sound: their
language models get fewer steps, so that all see as many frames, which takes about as long.
"""

import contextlib
import glob
import os
import subprocess
import sys

from classifier import Judge
from common import by_category, from_words, gather, prompt

import data as D
import train_lm
from codec import Codec, CodecError
from lm import AudioLM, LMError


def run(script: str, out: str, *flags) -> None:
    """One of the project's commands, from its beginning or from where it stopped; not if it is done."""
    begun, done = (os.path.join(out, f"{script}.{state}") for state in ("begun", "done"))
    path = os.path.join(os.path.dirname(D.__file__), script)
    command = [sys.executable, path, "--out", out, *map(str, flags)]
    os.makedirs(out, exist_ok=True)
    if os.path.exists(begun) and open(begun).read() != str(command):
        raise D.UserError(f"{out}: was begun with other flags; choose another --out, or delete it")
    if os.path.exists(done):
        return
    D.write_atomic(str(command).encode(), begun)
    resume = ["--resume"] if glob.glob(os.path.join(out, "*_train.pt")) else []
    print("\n" + " ".join(command + resume), flush=True)
    process, code = subprocess.Popen(command + resume), None
    while code is None:
        with contextlib.suppress(KeyboardInterrupt):  # the command has heard it, too: let it save
            code = process.wait()
    if code:  # it has said why
        sys.exit(code)
    D.write_atomic(b"", done)


def train(args, streams: int, mix: float) -> tuple[str, str]:
    """Train what is not trained yet; returns the paths of the codec and of the language model."""
    codec_name = f"codec{streams}-{args.codec_size}-{args.codec_steps}"
    codec_out = os.path.join(args.out, codec_name)
    lm_out = os.path.join(args.out, f"lm{streams}-{args.size}-mix{mix:g}-{codec_name}")
    codec, steps = os.path.join(codec_out, "codec.pt"), max(1, args.steps * streams // 4)
    common = ["--data", args.data, "--streams", streams, "--seed", args.seed]
    run("train_codec.py", codec_out, *common, "--steps", args.codec_steps, "--size", args.codec_size)
    run("train_lm.py", lm_out, *common, "--steps", steps, "--size", args.size, "--codec", codec, "--mix", mix)
    return codec, os.path.join(lm_out, "lm.pt")


def measure(args, judge, data, paths: tuple[str, str], guidances: tuple[int, ...]):
    """The cells of a row for each guidance: loss, caption accuracies, recognised, Fréchet distance."""
    device = D.pick_device()
    codec = Codec.load(paths[0], device)
    lm = AudioLM.load(paths[1], device, codec.hash())
    held_out = train_lm.make_held_out(data, codec, device)
    measures = train_lm.evaluate(lm, D.Tokenizer(lm.tokenizer), held_out, final=True)
    found = "caption accuracy"
    keys = ("loss", found, f"{found} of seen pairs", f"{found} of held-out pairs")
    train, val = (by_category(clips, judge.categories) for clips in (data.train, data.val))
    names = [name for name in judge.categories for _ in range(args.each)]
    comparable = [bool(val[name]) for name in names]
    real, _ = gather(val, {name: args.each for name in judge.categories if val[name]})
    lm = lm.to(D.fast_dtype(device)).pack()
    for guidance in guidances:
        made = from_words(lm, codec, [prompt(train, name) for name in names], guidance=guidance)
        numbers = [measures.get(key, float("nan")) for key in keys]
        numbers.append(judge.recognised(made, names).mean())
        yield guidance, [f"{x:.3f}" for x in numbers] + [f"{judge.distance(real, made[comparable]):.1f}"]


def main():
    """Read the flags, train everything, print the table."""
    parser = D.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", default="out_ablate", help="folder for everything")
    add("--steps", type=D.positive, default=train_lm.RECIPES["tiny"]["steps"], help="of the language models")
    add("--codec_steps", type=D.positive, default=2000)
    add("--size", default="tiny", choices=sorted(train_lm.RECIPES))
    add("--codec_size", default="tiny", choices=["tiny", "paper"])
    add("--data", default=D.SOUNDS)
    add("--classifier", default="out/classifier.pt")
    add("--each", type=D.positive, default=4, help="sounds for each category")
    add("--seed", type=D.whole_number, default=0)
    args = parser.parse_args()
    judge = Judge.load(args.classifier)
    plan = {(4, 0.5): (1, 2, 3, 4), (4, 0.0): (3,), (2, 0.5): (3,), (1, 0.5): (3,)}
    models = {key: train(args, *key) for key in plan}
    data = D.AudioData([args.data], os.path.dirname(args.classifier) or ".")
    measures = "loss | caption found | of seen pairs | of held-out pairs | recognised | Fréchet distance"
    print(f"\n| streams | mixed | guidance | {measures} |\n|" + 9 * "--|")
    for (streams, mix), guidances in plan.items():
        for guidance, cells in measure(args, judge, data, models[streams, mix], guidances):
            print("| " + " | ".join([f"{streams} | {mix:g} | {guidance}", *cells]) + " |", flush=True)


if __name__ == "__main__":
    with D.one_line_errors(CodecError, LMError):
        main()
