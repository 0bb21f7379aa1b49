"""Opus beside a codec of ours: the same validation clips, the same measures.

    python experiments/opus.py --codec pretrained/codec.pt
    python experiments/opus.py --codec out/codec.pt --data esc10/clips.csv --classifier out/esc10.pt

Prints a row for the codec and one for Opus at 6 and at 12 kbit/s, its lowest rate and twice that: the bit
rate that the packets really had (silence takes less), SI-SNR (median over clips, higher is better), the two
distances (means over clips, lower is better) and, where there is a classifier, what it recognises.
"""

import io
import os

import soundfile
import torch
from classifier import Judge
from common import LENGTH, category, through

import data as D
from codec import Codec, CodecError, log_mel_distance, log_spectrum_distance, si_snr


def opus(wave, kbps: float):
    """Wave (T,) through Ogg Opus, and how many bits its packets have."""
    file = io.BytesIO()
    level = (256 - kbps) / 250  # libsndfile's scale: 0 is 256 kbit/s, 1 is 6
    soundfile.write(file, wave.numpy(), D.SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=level)
    decoded, _ = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")
    return torch.from_numpy(decoded)[: len(wave)], 8 * packet_bytes(file.getvalue())


def packet_bytes(ogg: bytes) -> int:
    """The size of the packets in an Ogg file: without the pages' headers, and without its first two pages."""
    begin, page, total = 0, 0, 0
    while begin < len(ogg):
        segments = ogg[begin + 26]
        size = sum(ogg[begin + 27 : begin + 27 + segments])
        total += size if page > 1 else 0
        begin, page = begin + 27 + segments + size, page + 1
    return total


def main():
    """Read the flags, decode everything, print the rows."""
    parser = D.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--codec", default="pretrained/codec.pt")
    add("--data", default=D.SOUNDS, help="table or folder; its validation clips are coded")
    add("--classifier", default="out/classifier.pt", help="the judge, where there is one")
    args = parser.parse_args()
    data = D.AudioData([args.data], os.path.dirname(args.classifier) or ".")
    judge = Judge.load(args.classifier) if os.path.exists(args.classifier) else None
    waves, clips = data.held_out(LENGTH)
    names, codec = [category(clip) for clip in clips], Codec.load(args.codec)

    rows = {"the codec": (through(codec, waves), f"{codec.cfg.kbps:.1f}")}
    for kbps in (6, 12):
        decoded, bits = zip(*[opus(wave, kbps) for wave in waves])
        rows[f"Opus at {kbps}"] = (
            torch.stack(decoded),
            f"{sum(bits) / waves.numel() * D.SAMPLE_RATE / 1000:.1f}",
        )
    print(f"{len(waves)} validation clips of {args.data}")
    print("| | kbit/s | SI-SNR, dB | log-mel | log-spectrum | recognised | Fréchet distance |")
    print("|--|--|--|--|--|--|--|")
    if judge:
        print(f"| real | | | | | {judge.recognised(waves, names).mean():.3f} | 0.0 |")
    for title, (y, rate) in rows.items():
        measures = si_snr(waves, y).median(), log_mel_distance(waves, y).mean()
        cells = [f"{x:.3f}" for x in (*measures, log_spectrum_distance(waves, y).mean())]
        if judge:
            cells += [f"{judge.recognised(y, names).mean():.3f}", f"{judge.distance(waves, y):.1f}"]
        print("| " + " | ".join([title, rate, *cells]) + " |", flush=True)


if __name__ == "__main__":
    with D.one_line_errors(CodecError):
        main()
