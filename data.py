"""
Sound and words for AudioGen (Kreuk et al., "AudioGen: Textually Guided Audio Generation", arXiv 2209.15352).

From files to batches, top to bottom: read and resample audio -> find the captions -> prepare once into a
memory map -> draw random crops, mixed in pairs (section 4). Without files the built-in sound world stands in.

A source is 'world', a folder, or a table:
    folder     clip.wav + clip.txt (one caption a line), class folders (dog_bark/1.wav), or a metadata.csv
    .csv .tsv  ESC-50, Clotho, FSD50K, AudioCaps, ..., or any table with a column of files and one of captions
    .json(l)   the same as objects, also gzipped; AudioCraft manifests with their .json beside each sound
"""
import argparse
import contextlib
import csv
import functools
import glob
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import sentencepiece
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

SAMPLE_RATE = 16000
SILENCE = 1e-3  # a crop whose peak is below this (-60 dB of full scale) teaches nothing but silence

# ----------------------------------------------------------------------------------------------------------
# Reading audio: any rate and channel count in, 16 kHz mono out, half a minute at a time.

ZEROS = 45  # zero crossings of the sinc on either side: flat to .9 of the lower Nyquist, -70 dB from 1.0 on
BETA = 6.76  # Kaiser's window for 70 dB
PHASES = 160  # rows of the filter bank that are computed at once


@functools.lru_cache(maxsize=16)
def sinc_bank(orig: int, new: int, first: int) -> tuple[torch.Tensor, int]:
    """Filters for outputs `first`, `first + 1`, ... of a frame in which `orig` samples become `new`.

    Output i lies at input time i * orig / new, between two samples: each has a windowed sinc of its own.
    Returns the filters (phases, 1, taps) and where their first tap lies, from the frame's padded start.
    """
    slow = min(1.0, new / orig)  # the lower of the two rates decides where to cut
    half = math.ceil(ZEROS / slow)
    phase = torch.arange(first, min(first + PHASES, new))
    start, end = first * orig // new, int(phase[-1]) * orig // new
    tap = torch.arange(start - half, end + half + 2)
    t = tap.double() - (phase * orig).double()[:, None] / new  # of each tap from its output (phases, taps)
    window = torch.i0(BETA * (1 - (t / half) ** 2).clamp(min=0).sqrt()) / float(np.i0(BETA))
    bank = 0.95 * slow * torch.sinc(0.95 * slow * t) * window * (t.abs() < half)
    return bank.float()[:, None], start


def resample_blocks(blocks: Iterable[torch.Tensor], rate_in: int, rate_out: int) -> Iterator[torch.Tensor]:
    """Resample a stream of blocks (B, T), carrying over the samples that the filter still needs.

    The blocks put out add up to ceil(T * rate_out / rate_in) samples, however the input was cut. The ratio is
    exact up to 50 kHz (44101 Hz merely takes more filters than 44100), and beyond to .05 of a cent.
    ValueError: a rate below 1 kHz or above 768 kHz.
    """
    for rate in (rate_in, rate_out):
        if not 1000 <= rate <= 768000:
            raise ValueError(f"a sample rate of {rate} Hz; expected 1000 to 768000, is the header damaged?")
    if rate_in == rate_out:
        yield from blocks
        return
    new, orig = Fraction(rate_out, rate_in).limit_denominator(50000).as_integer_ratio()
    half = math.ceil(ZEROS / min(1.0, new / orig))

    def run(buffer, frames):
        out = []
        for first in range(0, new, PHASES):
            bank, start = sinc_bank(orig, new, first)
            need = start + bank.shape[-1] + (frames - 1) * orig
            out.append(F.conv1d(buffer[:, None, start:need], bank.to(buffer), stride=orig))
        return torch.cat(out, 1).transpose(1, 2).flatten(1)  # (B, new, frames) -> (B, frames * new)

    buffer, seen, made = None, 0, 0
    for block in blocks:
        buffer = F.pad(block, (half, 0)) if buffer is None else torch.cat([buffer, block], 1)
        seen += block.shape[1]
        frames = (buffer.shape[1] - 2 * half - 2) // orig
        if frames > 0:
            yield run(buffer, frames)
            buffer, made = buffer[:, frames * orig:], made + frames * new
    rest = -(-seen * rate_out // rate_in) - made  # rounded up
    if rest > 0:
        frames = -(-rest // new)
        buffer = F.pad(buffer, (0, max(0, frames * orig + 2 * half + 2 - buffer.shape[1])))
        yield run(buffer, frames)[:, :rest]


def resample(x: torch.Tensor, rate_in: int, rate_out: int) -> torch.Tensor:
    """Windowed-sinc resampling of float audio (T,) or (B, T); T becomes ceil(T * rate_out / rate_in)."""
    rows = x if x.dim() == 2 else x[None]
    y = torch.cat([rows[:, :0], *resample_blocks([rows], rate_in, rate_out)], 1)
    return y if x.dim() == 2 else y[0]


def read_blocks(path: str) -> Iterator[torch.Tensor]:
    """Yield the sound in `path` as float32 blocks (T,) at 16 kHz mono, about 30 s each: hours fit in memory.

    FileNotFoundError, or ValueError for whatever cannot be decoded: one line, what is wrong and what to do.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; check its path, or where the table lies")
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        raise ValueError(f"{path}: expected a sound, this is empty or no file; copy it again")

    def decoded(file):
        size = max(1, min(30 * file.samplerate, 2**24 // file.channels))  # a header may lie about its length
        while len(block := file.read(size, dtype="float32", always_2d=True)):
            if not np.isfinite(block).all():
                raise ValueError("contains NaN or infinite samples")
            yield torch.from_numpy(block.mean(1, dtype=np.float32))[None]  # (1, T)

    total = 0
    try:
        with soundfile.SoundFile(path) as file:
            for block in resample_blocks(decoded(file), file.samplerate, SAMPLE_RATE):
                total += block.shape[1]
                yield block[0]
    except (RuntimeError, TypeError, ValueError, OSError) as error:  # libsndfile raises RuntimeErrors
        why = " ".join(str(error).replace(f"Error opening {path!r}: ", "").split())
        raise ValueError(f"{path}: cannot be read ({why}); export it again as WAV, FLAC or OGG") from None
    if total == 0:
        raise ValueError(f"{path}: holds no samples; delete it or export it again")


def load_audio(path: str) -> torch.Tensor:
    """The sound in `path`, whatever its rate and channels: (T,) float32, 16 kHz. Errors: `read_blocks`."""
    return torch.cat(list(read_blocks(path)))


# ----------------------------------------------------------------------------------------------------------
# Captions. Data sets agree on nothing: we look for a column that can name a file and for columns of words.

AUDIO = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64"}
PATHS = ["path", "file_name", "filename", "file", "audio", "audio_path", "audio_file", "wav", "location",
         "fname", "slice_file_name", "youtube_id", "ytid", "audiocap_id", "id"]
WORDS = re.compile(r"(raw_)?(captions?|text|description|sentence|prompt)(_?\d+)?")
TAGS = ["category", "class_name", "class", "labels", "label", "tags", "keywords"]
TRAIN = {"train", "training", "dev", "development"}
VAL = {"val", "valid", "validation", "test", "eval", "evaluation"}


@dataclass
class Entry:
    path: str
    captions: list[str]
    split: str | None = None  # 'train', 'val', or None: not said


def pseudo_sentence(tags: str | list) -> str:
    """The paper's sentence of tags: 'dog, bark, park' -> 'dog bark park', '001 - Dog_bark' -> 'dog bark'."""
    tags = tags if isinstance(tags, list) else [tags]
    return " ".join(re.sub(r"[^\w']|[\d_]", " ", " ".join(map(str, tags))).lower().split())


def row_captions(row: dict) -> list[str]:
    """Every caption in a row, as written; if it has none, the first column of tags that contains a word."""
    cells = [row[key] for key in row if WORDS.fullmatch(key)]
    texts = [text for cell in cells for text in (cell if isinstance(cell, list) else [cell])]
    captions = [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]
    tags = [sentence for key in TAGS if (sentence := pseudo_sentence(row.get(key) or ""))]
    return captions or tags[:1]


def open_text(path: str):
    return (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", newline="")


def read_rows(path: str) -> Iterator[dict]:
    """Rows of a CSV, TSV, JSON or JSON-lines file as dictionaries, lower-case keys. ValueError: not one."""
    def tidy(row):
        return {re.sub("[ -]", "_", str(key).strip().lower()): row[key] for key in row if key}

    try:
        with open_text(path) as file:
            kind = os.path.splitext(path.removesuffix(".gz"))[1].lower()
            if kind in (".csv", ".tsv", ".txt"):
                head = file.readline()
                file.seek(0)
                yield from map(tidy, csv.DictReader(file, delimiter=max(",\t;", key=head.count)))
            elif kind in (".json", ".jsonl"):
                text = file.read()
                try:
                    rows = json.loads(text)
                except json.JSONDecodeError:  # one object a line, then
                    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
                if isinstance(rows, dict):  # {"data": [{...}, ...]}, or a file of a single line
                    lists = [v for v in rows.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
                    rows = lists[0] if lists else [rows]
                yield from map(tidy, rows)
            else:
                raise ValueError("expected a folder, .csv, .tsv, .json, .jsonl (or .gz of these)")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; save the table again with the encoding UTF-8") from None
    except (csv.Error, TypeError, ValueError, EOFError, RecursionError, zlib.error, gzip.BadGzipFile) as why:
        raise ValueError(f"{path}: cannot read this table ({why}); repair it or export it again") from None


def stem(name: str) -> str:
    """A name without its audio extension, if it has one: the ids of videos may contain dots, too."""
    return os.path.splitext(name)[0] if os.path.splitext(name)[1].lower() in AUDIO else name


class Finder:
    """Where is the file that a table names, with or without folder and extension? Where it says, or else by
    name below the table's folder, then below the folder around that; each is walked once, if need be."""

    def __init__(self, root: str):
        self.root, self.walks, self.index = root, [root, os.path.dirname(root)], {}

    def __call__(self, names: list[str]) -> str:
        for name in names:
            if os.path.isfile(path := os.path.join(self.root, name)):
                return path
        while True:
            for name in names:
                base = os.path.basename(name.replace("\\", "/"))
                if hits := self.index.get(base) or self.index.get(stem(base)):
                    # Of several, the one whose folders agree with the table's for longest.
                    return max(hits, key=lambda hit: len(os.path.commonprefix([hit[::-1], name[::-1]])))
            if not self.walks or (folder := self.walks.pop(0)) == os.path.dirname(folder):
                return os.path.join(self.root, names[0])  # it does not exist: whoever opens it will say so
            for path in audio_below(folder):
                for key in (os.path.basename(path), stem(os.path.basename(path))):
                    self.index.setdefault(key, []).append(path)


def audio_below(folder: str) -> Iterator[str]:
    for where, folders, files in os.walk(folder):
        folders.sort()  # the order of a walk depends on the disk
        yield from (os.path.join(where, f) for f in sorted(files) if os.path.splitext(f)[1].lower() in AUDIO)


def split_named(name: str) -> str | None:
    return "val" if name.lower() in VAL else "train" if name.lower() in TRAIN else None


def read_table(path: str, log: Callable) -> list[Entry]:
    find, entries, seen, empty = Finder(os.path.dirname(os.path.abspath(path))), {}, {}, 0
    rows = list(read_rows(path))
    folds = [float(row["fold"]) for row in rows if re.fullmatch(r"\s*\d+\s*", str(row.get("fold")))]
    for row in rows:
        seen.update(row)
        cells = [row[key] for key in PATHS if row.get(key)]
        cells = [cell.get("path") if isinstance(cell, dict) else str(cell).strip() for cell in cells]
        names = [name for cell in cells if cell for name in (cell, "Y" + cell)]  # as AudioCaps does it
        if not names:
            continue
        file, captions = find(names), row_captions(row)
        if not captions and os.path.isfile(sidecar := stem(file) + ".json"):  # AudioCraft
            captions = [text for beside in read_rows(sidecar) for text in row_captions(beside)]
        if not captions:
            empty += 1
            continue
        split = row.get("split") and ("val" if split_named(str(row["split"]).strip()) == "val" else "train")
        if not split and len(set(folds)) > 1:  # as with ESC-50, the last fold validates
            split = "val" if str(row["fold"]).strip() == f"{max(folds):.0f}" else "train"
        entries.setdefault(file, (split, {}))[1].update(dict.fromkeys(captions))  # each once, in order
    if empty:
        log(f"{path}: skipped {empty} of {len(rows)} rows: no caption in them")
    if not entries:
        raise ValueError(f"{path}: no usable row among {len(rows)}, columns {', '.join(seen) or 'none'}; "
                         "expected one of files (path, filename, ...), one of words (caption, category, ...)")
    return [Entry(file, list(captions), split) for file, (split, captions) in entries.items()]


def read_folder(folder: str, log: Callable) -> list[Entry]:
    for name in ("metadata.csv", "metadata.jsonl", "metadata.tsv"):
        if os.path.isfile(table := os.path.join(folder, name)):
            return read_table(table, log)
    entries, bare = [], []
    for path in audio_below(folder):
        parts = os.path.relpath(path, folder).split(os.sep)[:-1]
        try:
            with open(stem(path) + ".txt", encoding="utf-8-sig") as file:
                captions = [line.strip() for line in file if line.strip()]
        except FileNotFoundError:  # the deepest folder names the class, unless it names the split
            captions = [pseudo_sentence(part) for part in parts if not split_named(part)][-1:]
        except UnicodeDecodeError:
            captions = []
        split = next((split for part in parts[:1] if (split := split_named(part))), None)
        if captions := [caption for caption in captions if caption]:
            entries.append(Entry(path, captions, split))
        else:
            bare.append(path)
    if bare:
        log(f"{folder}: skipped {len(bare)} sounds, their .txt missing, empty or not UTF-8: {bare[0]} ...")
    if not entries:
        raise ValueError(f"{folder}: no captioned sound in this folder; expected clip.wav beside clip.txt, "
                         "class folders, or metadata.csv (or name the table: --data folder/table.csv)")
    return entries


def read_entries(source: str, log: Callable = print) -> list[Entry]:
    if not os.path.exists(source):
        raise FileNotFoundError(f"{source}: does not exist; --data takes 'world', a folder or a table")
    return (read_folder if os.path.isdir(source) else read_table)(source, log)


def read_captions(source: str) -> list[tuple[str, list[str]]]:
    """Every sound of a folder or table, with captions: [(path, [caption, ...]), ...]; a path need not exist.

    ValueError: no usable row (it names the columns seen), not UTF-8, not a table. OSError: cannot be opened.
    """
    return [(entry.path, entry.captions) for entry in read_entries(source)]


# ----------------------------------------------------------------------------------------------------------
# The sound world: twenty-one sources, put together from noise, tones and struck resonances. A source is a
# function of (rng, n, high, fast): n samples, pitch and speed as factors around 1. New ones go into SOURCES.

def noise(rng, n, low, high):
    """Noise between two frequencies, unit power."""
    f = np.fft.rfftfreq(n, 1 / SAMPLE_RATE) + 1e-3
    x = np.fft.irfft(np.fft.rfft(rng.standard_normal(n)) / (1 + (low / f) ** 4) / (1 + (f / high) ** 4), n)
    return x / (x.std() + 1e-9)

def drift(rng, n, rate):
    """A smooth random curve between 0 and 1 that turns about `rate` times a second."""
    points = rng.random(int(n / SAMPLE_RATE * rate) + 3)
    where = np.linspace(0, len(points) - 1.001, n)
    k = where.astype(int)
    return points[k] + (points[k + 1] - points[k]) * (1 - np.cos(np.pi * (where - k))) / 2

def tone(f, weights, n):
    """A harmonic tone of frequency f, a number or a curve (n,), without what 16 kHz audio cannot hold."""
    f = np.broadcast_to(f, n)
    phase = 2 * np.pi * np.cumsum(f) / SAMPLE_RATE
    return sum(w * np.sin(k * phase) * (k * f < 7500) for k, w in enumerate(weights, 1))

def ring(modes, seconds=0.5):
    """What a struck thing does: decaying sinusoids, modes = [(Hz, decay in seconds, amplitude), ...]."""
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return sum(a * np.exp(-t / decay) * np.sin(2 * np.pi * f * t) for f, decay, a in modes)

def puff(rng, seconds, low, high):
    """A short burst of noise that decays within `seconds`."""
    n = int(seconds * SAMPLE_RATE)
    return noise(rng, n, low, high) * np.exp(-np.arange(n) * 5 / n)

def every(rng, n, rate, jitter=0.0):
    """Times in samples of events that come `rate` times a second, each off by a share of the interval."""
    at = (np.arange(0.1 + 0.3 * rng.random(), n / SAMPLE_RATE * rate) + jitter * rng.standard_normal()) / rate
    return np.clip((at + jitter / rate * rng.standard_normal(len(at))) * SAMPLE_RATE, 0, n - 1).astype(int)

def anywhen(rng, n, rate):
    """Times in samples of events that know nothing of each other, such as drops of rain."""
    return rng.integers(0, n, 1 + rng.poisson(rate * n / SAMPLE_RATE))

def place(n, at, loud, grain):
    """The sound `grain` at each of the times `at`: one convolution, however many there are."""
    x = np.zeros(n)
    np.add.at(x, at, loud)
    size = 2 ** math.ceil(math.log2(n + len(grain)))
    return np.fft.irfft(np.fft.rfft(x, size) * np.fft.rfft(grain, size), size)[:n]

def gate(n, rate, share, edge=0.005):
    """On and off `rate` times a second, on for `share` of the time, with soft edges (in seconds)."""
    phase = np.arange(n) / SAMPLE_RATE * rate % 1 / rate
    return np.clip(np.minimum(phase, share / rate - phase) / edge, 0, 1)

def voice(f0, seconds, formants, rng):
    """A throat: pulses at f0 = (from, to) Hz through resonances [(Hz, strength), ...], with some breath."""
    n = int(seconds * SAMPLE_RATE)
    x = tone(np.linspace(*f0, n), 1 / np.arange(1, 25), n) + 0.1 * rng.standard_normal(n)
    f = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
    shape = 0.05 + sum(a / (1 + ((f - centre) / (60 + 0.1 * centre)) ** 2) for centre, a in formants)
    return np.fft.irfft(np.fft.rfft(x) * shape, n) * np.sin(np.pi * np.linspace(0, 1, n) ** 0.6) ** 0.7

def rain(rng, n, high, fast):
    drops = sum(place(n, at := anywhen(rng, n, 30), rng.random(len(at)), ring([(f, 0.003, 1)], 0.03))
                for f in rng.uniform(1500, 5500, 6))
    return noise(rng, n, 600, 6000) * (0.7 + 0.3 * drift(rng, n, 1)) + 3 * drops

def wind(rng, n, high, fast):
    bands = [(120, 350, 1), (250, 600, 0.8), (450, 900, 0.6), (700, 1300, 0.5)]
    return sum(a * noise(rng, n, low * high, top * high) * drift(rng, n, 0.8) ** 3 for low, top, a in bands)

def thunder(rng, n, high, fast):
    start = int(n * rng.uniform(0.02, 0.15))
    t = np.maximum(np.arange(n) - start, 0) / SAMPLE_RATE
    rumble = noise(rng, n, 35, 160) * np.exp(-t / 1.3) * (0.2 + drift(rng, n, 7)) * (1 - np.exp(-t / 0.08))
    at = start + (rng.random(12) * 0.35 * SAMPLE_RATE).astype(int)
    cracks = place(n, np.minimum(at, n - 1), rng.random(12), puff(rng, 0.5, 80, 1500))
    return 4 * rumble + 0.4 * cracks

def waves(rng, n, high, fast):
    swell = (0.5 + 0.5 * np.sin(2 * np.pi * (np.arange(n) / SAMPLE_RATE * 0.35 * fast + rng.random()))) ** 2
    foam = noise(rng, n, 900, 5000) * np.roll(swell, n // 25) ** 3
    return noise(rng, n, 80, 700) * (0.1 + swell) + 0.8 * foam

def stream(rng, n, high, fast):
    def bubble(f):  # the pitch of a bubble rises as it comes up
        m = 800
        return tone(f * (1 + 0.5 * np.arange(m) / m), [1], m) * np.exp(-np.arange(m) / 180)
    x = 0.06 * noise(rng, n, 300, 3000)
    for f in rng.uniform(350, 1800, 14):
        x += place(n, at := anywhen(rng, n, 9), rng.random(len(at)), bubble(f))
    return x

def fire(rng, n, high, fast):
    cracks = sum(place(n, at := anywhen(rng, n, 5), rng.exponential(1, len(at)), puff(rng, 0.012, low, 6000))
                 for low in (500, 1000, 1500, 2500))
    return cracks + 0.5 * noise(rng, n, 60, 400) * (0.3 + drift(rng, n, 6))

def siren(rng, n, high, fast):
    wail = np.sin(2 * np.pi * (np.arange(n) / SAMPLE_RATE * 0.4 * fast + rng.random()))
    return tone(750 * high * 2 ** (0.55 * wail), [1, 0.5, 0.35, 0.15, 0.1], n)

def alarm(rng, n, high, fast):
    return tone(1100 * high, [1, 0, 0.4, 0, 0.2], n) * gate(n, 2 * fast, 0.5)

def bell(rng, n, high, fast):
    partials = [(0.5, 1.2, 0.4), (1, 0.9, 1), (1.2, 0.7, 0.6), (1.5, 0.5, 0.4), (2, 0.5, 1), (2.7, 0.3, 0.4)]
    strike = ring([(520 * high * f, decay, a) for f, decay, a in partials], 3)
    return place(n, at := every(rng, n, 0.9 * fast, 0.02), rng.uniform(0.8, 1, len(at)), strike)

def engine(rng, n, high, fast):
    f = 42 * high * (1 + 0.06 * (drift(rng, n, 2) - 0.5))
    weights = rng.uniform(0.3, 1, 24) / np.arange(1, 25) ** 0.6
    return tone(f, weights, n) + 0.5 * noise(rng, n, 100, 1500) * (1 + 0.8 * tone(f, [1], n))

def helicopter(rng, n, high, fast):
    chop = np.exp(-(np.arange(n) / SAMPLE_RATE * 11 * fast % 1) * 4)
    thump = place(n, every(rng, n, 11 * fast), 1.0, ring([(70, 0.02, 1), (110, 0.015, 0.6)], 0.15))
    return noise(rng, n, 80, 900) * chop + 2 * thump

def footsteps(rng, n, high, fast):
    at, heel = every(rng, n, 1.8 * fast, 0.05), ring([(95, 0.03, 1), (170, 0.02, 0.7), (420, 0.01, 0.4)], 0.2)
    left, right = (place(n, at[foot::2], 0.25, puff(rng, 0.07, 400, 3000)) for foot in (0, 1))
    return place(n, at, rng.uniform(0.8, 1, len(at)), heel) + left + 0.8 * right

def clock(rng, n, high, fast):
    at = every(rng, n, 2 * fast)
    tick, tock = (ring([(f, 0.006, 1), (1.8 * f, 0.004, 0.6)], 0.06) for f in (2900, 2300))
    return place(n, at[::2], 1.0, tick) + place(n, at[1::2], 0.8, tock)

def knocking(rng, n, high, fast):
    at = (every(rng, n, 0.6, 0.05)[:, None] + np.arange(3) * int(SAMPLE_RATE / 4 / fast)).ravel()
    knock = ring([(170, 0.03, 1), (330, 0.025, 0.8), (620, 0.015, 0.5), (1400, 0.004, 0.5)], 0.25)
    return place(n, (at := at[at < n]), rng.uniform(0.7, 1, len(at)), knock)

def bird(rng, n, high, fast):
    x = np.zeros(n)
    for start in every(rng, n, 1.1 * fast, 0.1):
        m, low, bend = int(0.09 * SAMPLE_RATE), rng.uniform(2600, 3200) * high, rng.uniform(0.15, 0.5)
        chirp = tone(low * (1 + bend * np.sin(np.linspace(0, np.pi, m) ** 1.3)), [1, 0.15], m) * np.hanning(m)
        at = start + np.arange(rng.integers(2, 5)) * int(0.12 / fast * SAMPLE_RATE)
        x += place(n, at[at < n], 1.0, chirp)
    return x

def cricket(rng, n, high, fast):
    return tone(4200 * high**0.7, [1], n) * gate(n, 34, 0.6, 0.006) * gate(n, 2.4 * fast, 0.45)

def dog(rng, n, high, fast):
    bark = voice((520 * high, 300 * high), 0.2, [(750, 1), (1300, 0.8), (2600, 0.4)], rng)
    return place(n, at := every(rng, n, 1.5 * fast, 0.08), rng.uniform(0.7, 1, len(at)), bark)

def phone(rng, n, high, fast):
    clapper = gate(n, 20, 0.5, 0.008)  # swings between two bells
    trill = tone(1250 * high, [1, 0.3], n) * clapper + tone(1560 * high, [1, 0.3], n) * (1 - clapper)
    return trill * gate(n, 0.55, 0.6, 0.02)

def applause(rng, n, high, fast):
    return sum(place(n, at := anywhen(rng, n, 22), rng.uniform(0.3, 1, len(at)), puff(rng, 0.03, f, 2 * f))
               for f in rng.uniform(700, 2200, 8))

def frog(rng, n, high, fast):
    croak = voice((95 * high, 80 * high), 0.35, [(500 * high, 0.7), (1300 * high, 1), (2100, 0.3)], rng)
    croak *= gate(len(croak), 28, 0.7)
    return place(n, at := every(rng, n, 1.1 * fast, 0.06), rng.uniform(0.7, 1, len(at)), croak)

def whistle(rng, n, high, fast):
    trill = 2300 * high * (1 + 0.03 * np.sin(2 * np.pi * 28 * np.arange(n) / SAMPLE_RATE))
    return (tone(trill, [1, 0.1], n) + 0.05 * noise(rng, n, 1500, 6000)) * gate(n, 0.9 * fast, 0.6, 0.03)


SOURCES = {  # name: (function, article, verb, the attributes that change it)
    "rain": (rain, "", "falls", ""), "wind": (wind, "", "blows", "pitch"),
    "thunder": (thunder, "", "rumbles", ""), "waves": (waves, "", "roll in", "rate"),
    "stream": (stream, "a", "flows", ""), "fire": (fire, "a", "crackles", ""),
    "siren": (siren, "a", "wails", "pitch rate"), "alarm": (alarm, "a", "beeps", "pitch rate"),
    "bell": (bell, "a", "rings", "pitch rate"), "engine": (engine, "a", "runs", "pitch"),
    "helicopter": (helicopter, "a", "flies", "rate"), "footsteps": (footsteps, "", "pass", "rate"),
    "clock": (clock, "a", "ticks", "rate"), "knocking": (knocking, "", "is heard", "rate"),
    "bird": (bird, "a", "chirps", "pitch rate"), "cricket": (cricket, "a", "chirps", "pitch rate"),
    "dog": (dog, "a", "barks", "pitch rate"), "phone": (phone, "a", "rings", "pitch"),
    "applause": (applause, "", "breaks out", ""), "frog": (frog, "a", "croaks", "pitch rate"),
    "whistle": (whistle, "a", "blows", "pitch rate"),
}

# Training never hears these two together: a model that can play them has learnt to compose.
HELD_OUT_PAIRS = [{"siren", "rain"}, {"dog", "clock"}, {"bell", "wind"}, {"bird", "engine"},
                  {"footsteps", "fire"}, {"alarm", "waves"}, {"frog", "thunder"}, {"phone", "helicopter"}]


def is_held_out(caption: str) -> bool:
    return any(pair <= set(re.findall(r"[a-z]+", caption)) for pair in HELD_OUT_PAIRS)


def synth(name: str, rng: np.random.Generator, seconds: float = 5.0, pitch: str | None = None,
          rate: str | None = None, distance: str | None = None) -> np.ndarray:
    """One source, float32 (T,): pitch 'high' or 'low', rate 'fast' or 'slow', distance 'near' or 'far'."""
    n = int(seconds * SAMPLE_RATE)
    factors = {"low": 0.6, "high": 1.6, "slow": 0.55, "fast": 1.9, None: 1.0}
    high, fast = (factors[word] * rng.uniform(0.93, 1.07) for word in (pitch, rate))
    x = SOURCES[name][0](rng, n, high, fast)
    if distance == "far":  # air takes the treble and the walls give an echo
        size = 2 * n
        f = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
        room = puff(rng, 0.9, 50, 8000) * 0.03
        room[0] = 1
        x = np.fft.irfft(np.fft.rfft(x, size) * np.fft.rfft(room, size) / (1 + (f / 1000) ** 2), size)[:n]
    edge = np.minimum(1, np.minimum(np.arange(n), np.arange(n)[::-1]) / (0.01 * SAMPLE_RATE))
    level = {"near": 0.9, None: 0.45, "far": 0.12}[distance] / max(np.abs(x).max(), 4 * x.std(), 1e-9)
    return (x * edge * level).astype(np.float32)


def make_world(n: int, seconds: float = 5.0, seed: int = 0) -> Iterator[tuple[np.ndarray, str, str]]:
    """Yield n times (wave (T,) float32, caption, split). A sixth are 'val', a quarter of these held out.

    Half the clips are single sources, half two: one after the other ('then') or together ('and', 'while').
    """
    for i in range(n):
        rng = np.random.default_rng([seed, i])  # a clip does not depend on how many come before it
        held, pick = i % 24 == 23, lambda items, rng=rng: items[rng.integers(len(items))]
        names = sorted(pick(HELD_OUT_PAIRS)) if held else list(SOURCES)
        names = [names[k] for k in rng.permutation(len(names))[: 2 if held or rng.random() < 0.5 else 1]]
        if set(names) in HELD_OUT_PAIRS and not held:
            names.pop()
        how = pick(["and", "while", "then", "followed by"]) if len(names) == 2 else ""
        together = how in ("", "and", "while")
        sounds, phrases = [], []
        for name in names:
            _, article, verb, follows = SOURCES[name]
            pitch = pick([None, "high", "low"]) if "pitch" in follows else None
            rate = pick([None, "fast", "slow"]) if "rate" in follows else None
            distance, behind = pick([None, None, "near", "far"]), rng.random() < 0.4
            sounds.append(synth(name, rng, seconds if together else seconds / 2, pitch, rate, distance))
            words = " ".join(word for word in (None if behind else distance, rate, pitch, name) if word)
            words = f"{article and ('an' if words[0] in 'aeiou' else 'a')} {words}".strip()
            words += f" {verb}" if how == "while" or (how != "followed by" and rng.random() < 0.5) else ""
            words += {"far": " far away", "near": " close by"}.get(distance, "") if behind else ""
            phrases.append(words)
        wave = sum(sounds) if together else np.concatenate(sounds)
        caption = (f", {how} " if how == "then" else f" {how} ").join(phrases)
        yield wave / max(1, np.abs(wave).max()), caption, "val" if i % 6 == 5 else "train"


# ----------------------------------------------------------------------------------------------------------
# Preparation: decode everything once into one file of int16 that training maps into memory, and an index.

FORMAT = 1  # raise it when what is written changes, the sound world included, and everything is prepared anew
WORLD_CLIPS = 720  # an hour of 5 s clips: 600 to train on and 120 to validate on, 30 of these held-out pairs


@dataclass
class Clips:
    """A prepared source. Clip i is audio[start[i] : start[i] + length[i]]; split: train, val or both."""

    audio: np.ndarray  # (samples,) int16, mapped
    start: np.ndarray
    length: np.ndarray
    names: list[str]
    captions: list[list[str]]
    split: np.ndarray


def prepare(source: str, folder: str, seed: int = 0, log: Callable = print) -> Clips:
    """Decode `source` into `folder`, unless that was done and nothing changed since; report what it holds.

    Files that cannot be read, or hold only silence, are named and left out. ValueError: nothing is left.
    OSError: the folder cannot be written. What a dying run leaves behind is never taken for whole.
    """
    if source == "world":
        entries, name = [Entry(f"world/{i:04d}", []) for i in range(WORLD_CLIPS)], "world"
        world = make_world(WORLD_CLIPS, seed=seed)
    else:
        entries, name = read_entries(source, log), os.path.basename(os.path.abspath(source)).split(".")[0]
    digest = hashlib.sha256(f"{FORMAT} {seed}".encode())
    for entry in entries:
        stat = os.stat(entry.path) if os.path.exists(entry.path) else None
        state = (entry.path, stat and (stat.st_size, stat.st_mtime_ns), entry.captions, entry.split)
        digest.update(repr(state).encode("utf-8", "replace"))
    final = os.path.join(folder, f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:40]}-{digest.hexdigest()[:12]}")
    if not os.path.exists(os.path.join(final, "index.json")):
        for stale in glob.glob(glob.escape(folder) + "/*.part-*"):  # whoever still writes one holds its lock
            with contextlib.suppress(OSError):
                lock_folder(stale).close()
                shutil.rmtree(stale)
        part = f"{final}.part-{os.getpid()}"
        try:
            with lock_folder(part), open(os.path.join(part, "audio.i16"), "wb") as out:
                index = decode_all(entries, world if source == "world" else None, out, source, seed)
            with open(os.path.join(part, "index.json"), "w") as file:
                json.dump(index, file)
            os.remove(os.path.join(part, ".lock"))
            os.rename(part, final)
        except OSError as error:
            if error.strerror is None:  # said in words already
                raise
            if not os.path.exists(os.path.join(final, "index.json")):  # else another run was faster: fine
                raise OSError(f"{folder}: cannot write prepared audio there ({error.strerror}); free some "
                              "space or choose another --out") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    with open(os.path.join(final, "index.json")) as file:
        index = json.load(file)
    clips = Clips(np.memmap(os.path.join(final, "audio.i16"), np.int16, "r"), np.array(index["start"]),
                  np.array(index["length"]), index["names"], index["captions"], np.array(index["split"]))
    for line in index["report"]:
        log(line)
    return clips


def decode_all(entries: list[Entry], world: Iterator | None, out, source: str, seed: int) -> dict:
    """Write every clip to the open file `out`; return the index, with the report that `prepare` prints."""
    index = {"start": [], "length": [], "names": [], "captions": [], "split": []}
    root, skipped = os.path.dirname(os.path.abspath(source)), []
    for entry in tqdm(entries, desc=f"preparing {source}", unit="clip", disable=None):
        begin, peak, blocks = out.tell(), 0, read_blocks(entry.path)
        if world:
            wave, caption, entry.split = next(world)
            entry.captions, blocks = [caption], iter([torch.from_numpy(wave)])
        while True:
            try:  # around the reading only: a full disk is not the clip's fault
                block = next(blocks, None)
            except (ValueError, FileNotFoundError) as error:
                skipped.append(str(error))
                peak = None
                break
            if block is None:
                break
            peak = max(peak, block.abs().max().item())
            out.write((block.clamp(-1, 1) * 32767).round().short().numpy())
        if peak is not None and peak < SILENCE:
            skipped.append(f"{entry.path}: silent")
        if peak is None or peak < SILENCE:
            out.seek(begin)
            out.truncate()
            continue
        index["start"].append(begin // 2)
        index["length"].append((out.tell() - begin) // 2)
        index["names"].append(entry.path if world else os.path.relpath(entry.path, root))
        index["captions"].append(entry.captions)
        index["split"].append(entry.split)
    n = len(index["names"])
    if n == 0:
        raise ValueError(f"{source}: none of its {len(entries)} sounds can be used; the first: {skipped[0]}")
    if set(index["split"]) != {"train", "val"}:  # not given, or one side only: a tenth validates
        lot = [hashlib.sha256(ascii((seed, name)).encode()).digest() for name in index["names"]]
        val = set(sorted(range(n), key=lot.__getitem__)[: max(1, round(n / 10))])
        index["split"] = ["both"] if n == 1 else ["val" if i in val else "train" for i in range(n)]
    length = np.sort(index["length"]) / SAMPLE_RATE
    distinct = {caption for captions in index["captions"] for caption in captions}
    count = index["split"].count
    index["report"] = [(
        f"{source}: {length.sum() / 3600:.2f} hours, {n} clips ({count('train')} train, {count('val')} val), "
        f"{len(distinct)} distinct captions, "
        f"{length[0]:.1f} / {length[n // 2]:.1f} / {length[-1]:.1f} s shortest / median / longest")]
    index["report"] += [f"{source}: its only clip both trains and validates"] * (n == 1)
    index["report"] += [f"  left out {line}" for line in skipped[:20]]
    index["report"] += [f"  and {len(skipped) - 20} more left out"] * (len(skipped) > 20)
    return index


# ----------------------------------------------------------------------------------------------------------
# What training reads.

def mix(a: torch.Tensor, b: torch.Tensor, snr_db: float, offset: int) -> torch.Tensor:
    """Lay b over a (section 4): b begins `offset` samples after a, before it if negative, and is cut to a.

    b is scaled so that the mean power of a is snr_db above that of b, each over its own whole length.
    (T_a,), (T_b,) -> (T_a,). Should the sum leave [-1, 1], all of it is turned down, which keeps the SNR.
    """
    power_a, power_b = a.square().mean(), b.square().mean()
    if power_a > 0 and power_b > 0:  # silence has no SNR
        b = b * (power_a / power_b * 10 ** (-snr_db / 10)).sqrt()
    y, start, end = a.clone(), max(0, offset), min(len(a), offset + len(b))
    if end > start:
        y[start:end] += b[start - offset : end - offset]
    return y / y.abs().max().clamp(min=1)


class AudioData:
    """Prepared sources behind one interface: random batches for training, fixed ones for evaluation.

    sources: as in the module's docstring, with ':WEIGHT' if wanted: of 'a.csv:2' and 'b.csv' the first is
    drawn twice as often (no number counts as 1). Without any weight each is drawn by its length in seconds.
    """

    def __init__(self, sources: list[str], folder: str, seed: int = 0, log: Callable = print):
        weights, self.parts = [], []
        for source in sources:
            match = None if os.path.exists(source) else re.fullmatch(r"(.+):([\d.eE+-]+)", source)
            try:
                weights.append(float(match[2]) if match else None)
            except ValueError:
                weights.append(-1.0)
            if match and not 0 < weights[-1] < math.inf:
                raise ValueError(f"--data {source}: expected a positive weight after the colon: a.csv:2")
            self.parts.append(prepare(match[1] if match else source, folder, seed, log))
        seconds = [part.length.sum() / SAMPLE_RATE for part in self.parts]
        self.hours = sum(seconds) / 3600
        weights = [w or 1.0 for w in weights] if any(weights) else seconds
        if len(sources) > 1:
            for source, weight in zip(sources, weights):
                log(f"{source}: {weight / sum(weights):.1%} of the draws")
        # One list of all clips and, per split, the cumulative chance of each: by weight, then by length.
        self.where = [(part, i) for part in self.parts for i in range(len(part.names))]
        self.order, self.chance = {}, {}
        for split in ("train", "val"):
            inside = [np.isin(part.split, (split, "both")) for part in self.parts]
            sizes = [mask * part.length for mask, part in zip(inside, self.parts)]
            chance = np.concatenate([w * size / size.sum() for w, size in zip(weights, sizes)])
            self.order[split] = np.flatnonzero(np.concatenate(inside))
            self.chance[split] = np.cumsum(chance[self.order[split]] / sum(weights))

    def read(self, k: int, length: int, rng: np.random.Generator | None = None) -> torch.Tensor:
        """(length,) float32 of clip k: its beginning, or a random crop, padded with zeros."""
        part, i = self.where[k]
        begin, size = int(part.start[i]), int(part.length[i])
        free = int(rng.integers(abs(size - length) + 1)) if rng else 0  # where the crop, or the clip, begins
        skip, pad = (free, 0) if size > length else (0, free)
        y, size = np.zeros(length, np.float32), min(size, length)
        y[pad : pad + size] = part.audio[begin + skip : begin + skip + size]
        return torch.from_numpy(y).div_(32767)

    def draw(self, rng, split, length, but=-1) -> tuple[int, torch.Tensor]:
        """A clip, by weight and length, and a crop of it: not silent, not clip `but`, if it can be helped."""
        for _ in range(20):
            k = np.searchsorted(self.chance[split][:-1], rng.random(), "right")  # the last takes what is left
            k = int(self.order[split][k])
            wave = self.read(k, length, rng)
            if k != but and wave.abs().max() >= SILENCE:
                break
        return k, wave

    def batch(self, n: int, length: int, rng: np.random.Generator, mix_share: float = 0.0,
              split: str = "train") -> tuple[torch.Tensor, list[str]]:
        """n random crops of `length` samples, (n, length) float32, and their captions; rng alone decides.

        A share of them are mixes of two clips (section 4): at least half of the time together, SNR uniform in
        [-5, 5] dB, captions joined by ' and '.
        """
        waves, captions = [], []
        for _ in range(n):
            k, wave = self.draw(rng, split, length)
            words = self.caption(k, rng)
            if rng.random() < mix_share:
                other, second = self.draw(rng, split, length, but=k)
                offset = int(rng.integers(-(length // 2), length // 2 + 1))
                if other != k:
                    wave = mix(wave, second, rng.uniform(-5, 5), offset)
                    words = f"{words} and {self.caption(other, rng)}"
            waves.append(wave)
            captions.append(words)
        return torch.stack(waves), captions

    def caption(self, k: int, rng: np.random.Generator | None = None) -> str:
        part, i = self.where[k]
        return part.captions[i][int(rng.integers(len(part.captions[i]))) if rng else 0]

    def select(self, split: str, limit: int | None = None) -> np.ndarray:
        """The clips of a split in their order; with a limit that many of them, evenly spaced."""
        order = self.order[split]
        limit = min(limit or len(order), len(order))
        return order[np.arange(limit) * len(order) // limit]

    def name(self, k: int) -> str:
        part, i = self.where[k]
        return part.names[i]

    def clips(self, split: str, length: int,
              limit: int | None = None) -> tuple[torch.Tensor, list[str], list[str]]:
        """Always the same clips, from their beginning: (n, length) float32, first captions, names."""
        ks = self.select(split, limit)
        waves = torch.stack([self.read(k, length) for k in ks])
        return waves, [self.caption(k) for k in ks], [self.name(k) for k in ks]

    def held_out(self, split: str, limit: int | None = None) -> np.ndarray:
        """Which of `clips(split, ..., limit)` join sources that the sound world holds apart: (n,) bool."""
        ks = self.select(split, limit)
        return np.array([self.name(k).startswith("world/") and is_held_out(self.caption(k)) for k in ks])

    def captions(self, split: str = "train") -> list[str]:
        """Every caption of every clip in a split."""
        return [caption for k in self.order[split] for caption in self.where[k][0].captions[self.where[k][1]]]


class Tokenizer:
    """Words to ids: SentencePiece, unigram, lower case, bytes for what it has never seen. 0 is padding."""

    def __init__(self, model: bytes | torch.Tensor):
        """model: what `train` made, or the uint8 tensor of `to_tensor`. ValueError if it is damaged."""
        self.model = bytes(model.cpu().numpy()) if isinstance(model, torch.Tensor) else bytes(model)
        # SentencePiece itself may crash, not complain, over damaged bytes: a checksum goes before the model.
        if len(self.model) < 5 or zlib.crc32(self.model[4:]) != int.from_bytes(self.model[:4], "little"):
            raise ValueError("the tokenizer's model is damaged; take the checkpoint from its source again")
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=self.model[4:])
        self.vocab_size = self.pieces.vocab_size()

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn about `vocab_size` pieces from captions: fewer if these are few, but always all 256 bytes."""
        lines, out = sorted({" ".join(caption.split())[:1000] for caption in captions} - {""}), io.BytesIO()
        if not lines:
            raise ValueError("no caption to learn words from; expected at least one that is not empty")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=out, model_type="unigram", byte_fallback=True,
            vocab_size=max(vocab_size, 300), hard_vocab_limit=False, normalization_rule_name="nmt_nfkc_cf",
            pad_id=0, unk_id=1, bos_id=2, eos_id=3, num_threads=1, minloglevel=2)
        return cls(zlib.crc32(out.getvalue()).to_bytes(4, "little") + out.getvalue())

    def encode(self, text: str) -> list[int]:
        return self.pieces.encode(text)

    def batch(self, captions: list[str], window: int) -> torch.Tensor:
        """Captions -> (B, window) int64 ids, padded with 0; what is longer than the window is cut."""
        rows = [self.encode(caption)[:window] for caption in captions]
        return torch.tensor([row + [0] * (window - len(row)) for row in rows]).reshape(len(rows), window)

    def to_tensor(self) -> torch.Tensor:
        return torch.tensor(list(self.model), dtype=torch.uint8)


# ----------------------------------------------------------------------------------------------------------
# Manners that the three scripts share. They live here because nothing imports a script.

@contextlib.contextmanager
def one_line_errors():
    """Around main(): what the user can mend ends in one line and exit code 2, a bug keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if memory or "out of memory" in text or "can't allocate memory" in text:
            text = "out of memory; lower --batch or --seconds, or take a smaller --size"
        elif isinstance(error, RuntimeError):
            raise
        elif isinstance(error, OSError) and error.filename:
            text = f"{error.filename}: {error.strerror}"
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)


def pick_device(name: str = "auto") -> torch.device:
    """'auto', 'cpu', 'cuda', 'cuda:1' or 'mps' -> a device that exists here. ValueError: it does not."""
    there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in there and not (name == "cuda" and "cuda:0" in there):
        raise ValueError(f"--device {name}: not a device of this machine; it has {', '.join(there)}")
    return torch.device(name)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs and on processors that multiply it natively, else float32.

    Measured on cores with AVX512-BF16: a training step of the codec takes .63, of the language model .70 of
    its time in float32. A rule and no stopwatch: the same command must give the same sound."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)  # bool() is False: unknown to PyTorch
    fast = device.type == "cuda" or (device.type == "cpu" and native())
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """Around a model's forward pass: the fast number format for what tolerates it."""
    fast = fast_dtype(device)
    return torch.autocast(device.type, fast, enabled=fast != torch.float32)


def lock_folder(folder: str):
    """Make `folder`, see that it can be written, and hold it: two runs in one would undo each other.

    Keep what is returned: the lock goes with it, or with the process. OSError: taken already, or read-only.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, ".lock"), "a")  # noqa: SIM115 (it stays open)
    except OSError as error:
        raise OSError(f"{folder}: cannot write there ({error.strerror}); choose another --out") from None
    with contextlib.suppress(ImportError):  # Windows has no fcntl, and there nobody is stopped
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise OSError(f"{folder}: another run is writing there; wait, or choose another --out") from None
    return file


def save_atomic(obj: object, path: str) -> None:
    """torch.save by way of a temporary file: whatever happens, `path` holds the old or the new, and whole."""
    part = path + ".tmp"
    try:
        with open(part, "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(part)
        why = getattr(error, "strerror", None) or "is the disk full?"
        raise OSError(f"{path}: cannot save ({why}); free some space or choose another --out") from None


def start_processes(device_name: str):
    """(device, rank, world): this process's place among those that torchrun started, or (device, 0, 1)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return pick_device(device_name), 0, 1
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    device = pick_device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, rank, world


def first_then_all(make: Callable):
    """make() in process 0 and only then in the others, which find on disk what it prepared."""
    ours = not dist.is_initialized() or dist.get_rank() == 0
    result = make() if ours else None
    if dist.is_initialized():
        dist.barrier()
    return result if ours else make()


class Parser(argparse.ArgumentParser):
    """Flags whose errors are one line, like all others."""

    def error(self, message):
        raise ValueError(f"{message}; type python {self.prog} --help for all flags")


def positive(text: str) -> int:
    """A flag's value that counts something."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


class Stopper:
    """Turns Ctrl-C and SIGTERM into a flag: the loop ends its step, saves, says where. A second one kills."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def asked(self, device: torch.device) -> bool:
        """Has any process been asked to stop? All must know, or they would wait for the one that left."""
        flag = torch.tensor(float(self.signal is not None), device=device)
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


class Log:
    """A CSV with one row per logged step. A resumed run first drops the rows later than its checkpoint."""

    def __init__(self, path: str, from_step: int = 0):
        self.path, self.fields = path, None
        if from_step and os.path.exists(path):
            with open(path, newline="") as f:
                rows = list(csv.DictReader(f))
            kept = [row for row in rows if row["step"].isdigit() and int(row["step"]) <= from_step]
            self.fields = list(rows[0]) if rows else None
            self.write(kept, "w")
        elif os.path.exists(path):
            os.remove(path)

    def write(self, rows, mode="a"):
        if not rows and mode == "a":
            return
        self.fields = self.fields or list(rows[0])
        with open(self.path, mode, newline="") as f:
            writer = csv.DictWriter(f, self.fields, extrasaction="ignore")
            if f.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)
