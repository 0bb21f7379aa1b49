"""A language model moves to the codes of another codec, and keeps what it knows.

    python experiments/carry_over.py pretrained out/codec.pt moved
    python train_lm.py --finetune moved --out better

What it knows of words and of time does not depend on the codec; its tables and heads do. Both codecs hear the
same training clips. The new tables are fitted so that a frame's vectors have nearly the same mean as before,
the new heads so that they find the new codes in what the model computes of the old ones. Then train it on.
"""

import math
import os

import torch
import torch.nn.functional as F
from common import LENGTH, new_folder

import data as D
import train_lm
from codec import Codec, CodecError
from lm import AudioLM, LMError


def pieces(clips, most: int = 500):
    """So many pieces of the clips, evenly spaced: waves (n, LENGTH), and a caption for each."""
    cuts = [(clip, begin) for clip in clips for begin in range(0, clip.length, LENGTH)]
    cuts = cuts[:: math.ceil(len(cuts) / most)]
    waves = torch.stack([D.read_crop(clip, LENGTH, begin) for clip, begin in cuts])
    return waves, [clip.captions[0] for clip, _ in cuts]


def fit_tables(vectors, codes, codebook_size: int):
    """Tables (K V, d) whose rows at codes (N, K) have means near the vectors (N, d).

    Least squares, one table after the other, twelve times: each explains what the others leave over."""
    K = codes.shape[1]
    tables, rest = torch.zeros(K, codebook_size, vectors.shape[1]), vectors.clone()
    for _ in range(12):
        for table, index in zip(tables, codes.T):
            rest += table[index] / K
            sums = torch.zeros_like(table).index_add_(0, index, rest)
            uses = torch.bincount(index, minlength=codebook_size)[:, None]
            table.copy_(K * sums / (uses + 3))  # a rare code stays near zero
            rest -= table[index] / K
    explained = 1 - (rest.var(0).sum() / vectors.var(0).sum()).item()
    print(f"new tables: the means have {100 * explained:.0f} % of the variance they had", flush=True)
    return tables.flatten(0, 1)


@torch.no_grad()
def hidden_states(lm, captions: list[str], codes):
    """What the heads read: captions and codes (n, K, F) to (n, F, d). One caption in ten is left out."""
    states = []
    hook = lm.ln_f.register_forward_hook(lambda module, inputs, output: states.append(output.bfloat16()))
    tokenizer = D.Tokenizer(lm.tokenizer)
    for i in range(0, len(codes), 8):
        told = [caption if (i + k) % 10 else "" for k, caption in enumerate(captions[i : i + 8])]
        text = tokenizer.batch(told, lm.cfg.max_text_len)
        with D.autocast(torch.device("cpu")):
            lm.predict(lm.text_encoder(text), codes[i : i + 8])
    hook.remove()
    return torch.cat(states)


def fit_heads(heads, states, codes, steps: int = 600):
    """Train heads (K V, d), in place, to find codes (N, K) in the states (N, d)."""
    K, rng = codes.shape[1], torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([heads], 4e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.1)
    for step in range(steps):
        drawn = torch.randint(len(states), (2048,), generator=rng)
        logits = F.linear(states[drawn].float(), heads).unflatten(1, (K, -1))  # (n, K, V)
        loss = F.cross_entropy(logits.flatten(0, 1), codes[drawn].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"new heads: step {step + 1} of {steps}, loss {loss.item():.2f}", flush=True)


def main():
    """Read three paths."""
    parser = D.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="folder of a trained pair, codec.pt and lm.pt")
    parser.add_argument("codec", help="the other codec")
    parser.add_argument("target", help="folder to write to")
    parser.add_argument("--data", default=D.SOUNDS, help="what both codecs hear")
    args = parser.parse_args()
    old, new = Codec.load(os.path.join(args.source, "codec.pt")), Codec.load(args.codec)
    lm = AudioLM.load(os.path.join(args.source, "lm.pt"), codec_hash=old.hash())
    if old.cfg.streams != new.cfg.streams:
        raise D.UserError(f"{args.codec}: has {new.cfg.streams} streams, not {old.cfg.streams}: name another")
    new_folder(args.target)
    waves, captions = pieces(D.AudioData([args.data], args.target).train)
    before, after = (train_lm.encode(codec, waves, "cpu") for codec in (old, new))  # (n, K, F)
    codes = after.transpose(1, 2).flatten(0, 1)  # (N, K)
    with torch.no_grad():
        tables = fit_tables(lm.embed(before).flatten(0, 1), codes, lm.cfg.codebook_size)
    states = hidden_states(lm, captions, before).flatten(0, 1)  # (N, d)
    lm.init_from_codebooks(torch.stack([codebook.embed for codebook in new.quantizer.codebooks]))
    lm.wte.weight.data.copy_(tables)
    fit_heads(lm.lm_heads.weight, states, codes)
    lm.codec_hash = new.hash()
    for name, model in (("lm.pt", lm), ("codec.pt", new)):
        D.save_atomic(model.checkpoint(), os.path.join(args.target, name))
    print(f"saved in {args.target}; next: python train_lm.py --finetune {args.target} --out better")


if __name__ == "__main__":
    with D.one_line_errors(CodecError, LMError):
        main()
