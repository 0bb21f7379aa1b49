"""Sounds and words: from files and tables to batches of crops with their captions.

    sound files ------- load_audio ---\
                                       prepare --> clips in one memory map --> AudioData.batch --> crops
    tables, folders --- read_entries --/           captions ---------------> Tokenizer ---------> text ids

AudioGen (arXiv 2209.15352): the sentence made of tags is section 4.1, the mixing augmentation section 3.2.
This file needs the five packages alone and can be copied into another project.
"""

import argparse
import ast
import atexit
import collections
import contextlib
import csv
import datetime
import errno
import functools
import gc
import glob
import gzip
import hashlib
import html
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import unicodedata
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NoReturn

import numpy as np
import sentencepiece
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

SAMPLE_RATE = 16000
SILENCE = 1e-3  # a sound whose peak is below this (-60 dB of full scale) teaches nothing but silence


class UserError(ValueError):
    """An error that the user can fix: the scripts print it as one line. All other errors are bugs.

    The line says what is wrong with which file or flag, what was expected, and what to type."""

    def __init__(self, message: str):
        line = " ".join(printable(message).split())
        super().__init__(line if len(line) <= 300 else f"{line[:140]} ... {line[-150:]}")


# ----------------------------------------------------------------------------------------------------------
# Audio files: any sample rate and number of channels in, 16 kHz mono out, block by block.

ZERO_CROSSINGS = 45  # of the sinc, on either side: flat up to .9 of the lower Nyquist, -70 dB from 1.0 on
KAISER_BETA = 6.76  # Kaiser's window for 70 dB


@functools.lru_cache(maxsize=16)
def sinc_bank(orig: int, new: int) -> tuple[torch.Tensor, int]:
    """Windowed-sinc filters for a resampler that makes `new` outputs from every `orig` inputs.

    Returns the filters (new, 1, taps), one for each output, and how many samples before the first of the
    `orig` inputs they begin."""
    slower = min(1.0, new / orig)  # the lower of the two rates decides where to cut
    half = math.ceil(ZERO_CROSSINGS / slower)
    phase = torch.arange(new)
    tap = (phase * orig // new)[:, None] + torch.arange(-half, half + 1)  # the samples around each output
    t = tap - (phase * orig).double()[:, None] / new
    kaiser = torch.i0(KAISER_BETA * (1 - (t / half) ** 2).clamp(min=0).sqrt()) / float(np.i0(KAISER_BETA))
    filters = 0.95 * slower * torch.sinc(0.95 * slower * t) * kaiser * (t.abs() < half)
    bank = torch.zeros(new, orig + 2 * half).scatter_(1, tap + half, filters.float())
    return bank[:, None], half


def resample_blocks(blocks: Iterable[torch.Tensor], rate_in: int, rate_out: int) -> Iterator[torch.Tensor]:
    """Resample a stream of blocks (B, T); together they give ceil(T * rate_out / rate_in) samples.

    How the stream is cut into blocks makes no difference. UserError: a rate that no recording has."""
    for rate in (rate_in, rate_out):
        if not 1000 <= rate <= 768000:
            raise UserError(f"a sample rate of {rate} Hz; expected 1000 to 768000, is the header damaged?")
    if rate_in == rate_out:
        yield from blocks
        return

    # Exact for the usual rates, and to a tenth of a cent for odd ones such as 44101 Hz.
    new, orig = Fraction(rate_out, rate_in).limit_denominator(2500).as_integer_ratio()
    bank, half = sinc_bank(orig, new)
    buffer: torch.Tensor | None = None
    samples_in = samples_out = 0
    for block in itertools.chain(blocks, [None]):
        if block is not None:
            buffer = F.pad(block, (half, 0)) if buffer is None else torch.cat([buffer, block], 1)
            samples_in += block.shape[1]
        elif buffer is not None:  # the end: silence, until no filter lacks a sample
            buffer = F.pad(buffer, (0, bank.shape[-1]))
        if buffer is None or buffer.shape[1] < bank.shape[-1]:
            continue
        frames = F.conv1d(buffer[:, None], bank.to(buffer), stride=orig)  # (B, new, frames)
        buffer = buffer[:, frames.shape[2] * orig :]  # what the next block still needs
        missing = math.ceil(Fraction(samples_in * rate_out, rate_in)) - samples_out
        samples_out += min(missing, frames[0].numel())
        yield frames.transpose(1, 2).flatten(1)[:, :missing]


def resample(x: torch.Tensor, rate_in: int, rate_out: int) -> torch.Tensor:
    """Windowed-sinc resampling of float audio (T,) or (B, T); T becomes ceil(T * rate_out / rate_in)."""
    rows = x if x.dim() == 2 else x[None]
    y = torch.cat([rows[:, :0], *resample_blocks([rows], rate_in, rate_out)], 1)
    return y if x.dim() == 2 else y[0]


def decode_blocks(file: soundfile.SoundFile) -> Iterator[torch.Tensor]:
    """An open sound file as mono blocks (1, T) at its own rate: a header may give a false length."""
    while True:
        block = file.read(2**21 // file.channels, dtype="float32", always_2d=True)  # (T, channels)
        if not len(block):
            return
        if not np.isfinite(block).all():
            raise UserError("contains NaN or infinite samples")
        mono = block.mean(1, dtype=np.float32)
        if np.square(mono).mean() < 1e-4 * np.square(block).mean():  # two channels of opposite sign
            mono = block[:, 0].copy()
        yield torch.from_numpy(mono)[None]


def why_unread(error: Exception) -> str:
    """The message of libsndfile or of the system, without the name of the file."""
    return re.sub("^Error opening .*?>: ", "", str(error))


def read_blocks(path: str) -> Iterator[torch.Tensor]:
    """The sound in `path` as float32 blocks (T,) at 16 kHz mono. UserError: it cannot be decoded."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such sound file; check its path")
    try:
        with open(path, "rb") as raw, soundfile.SoundFile(raw) as file:
            if file.frames == 0:
                raise UserError("holds no samples")
            for block in resample_blocks(decode_blocks(file), file.samplerate, SAMPLE_RATE):
                yield block[0]
            # In joined Oggs, and in MP3s of variable rate without a header, libsndfile stops early.
            size = os.path.getsize(path)
            unread = size - raw.tell()
            if file.format in ("OGG", "MP3") and unread > max(2**16, 0.1 * size):
                raise UserError("only its first part can be decoded")
            # A WAV says how long it is; what is written to a pipe says some enormous number.
            raw.seek(0)
            kind, length = raw.read(4), raw.read(4)
            said = int.from_bytes(length, "big" if kind == b"RIFX" else "little")
            if file.format in ("WAV", "WAVEX") and size < 0.9 * said < 2**30:
                raise UserError(f"only {size} of its {said} bytes are there")
    except (UserError, soundfile.LibsndfileError, OSError) as error:
        advice = "export it again as WAV, FLAC or OGG"
        with contextlib.suppress(OSError), open(path, "rb") as raw:
            if raw.read(20) == b"version https://git-":
                advice = "it is a pointer of Git LFS: type git lfs pull"
        raise UserError(f"{path}: cannot be read ({why_unread(error)}); {advice}") from None


def load_audio(path: str) -> torch.Tensor:
    """The sound in `path`, whatever its rate and channels: (T,) float32, 16 kHz. Errors: `read_blocks`."""
    return torch.cat(list(read_blocks(path)))


def turned_down(wave: torch.Tensor) -> torch.Tensor:
    """Wave (T,); one that exceeds full scale (1) is scaled down as a whole, not clipped."""
    return wave / wave.abs().max().clamp(min=1)


def wav_bytes(wave: torch.Tensor) -> bytes:
    """A WAV file of 16 bits that holds wave (T,), `turned_down`."""
    buffer = io.BytesIO()
    samples = turned_down(torch.as_tensor(wave).float())
    if samples.dim() != 1:
        raise UserError(f"expected one wave (T,), got {tuple(samples.shape)}: of a batch, give one row")
    soundfile.write(buffer, samples.cpu().numpy(), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def save_wav(wave: torch.Tensor, path: str):
    """Write wave (T,) to `path`. UserError: it cannot be written."""
    write_atomic(wav_bytes(wave), path, f"{path}.{os.getpid()}.tmp")  # others may save there at the same time


# ----------------------------------------------------------------------------------------------------------
# Captions: tables and folders. Every data set has a format of its own, so we look at what the cells hold: a
# column is the one of files if sounds of these names exist, and one of words if its cells can be read aloud.
# The names of columns only break ties. Every guess is logged; where there is no safe guess, a UserError says
# what to type. Any function below may raise it.

AUDIO = {".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf"}
AUDIO |= {".w64", ".rf64", ".snd", ".mp2"}
OTHER_MEDIA = {".m4a", ".aac", ".wma", ".mp4", ".webm", ".mkv", ".mov", ".avi"}  # not for libsndfile
OTHER_MEDIA |= {".amr", ".ape", ".wv", ".3gp", ".mka", ".m4b", ".ac3", ".dts", ".ra"}
UNREADABLE = "not read; ffmpeg -i X.m4a X.wav makes such files readable"
MEDIA = tuple(AUDIO | OTHER_MEDIA)
NO_TABLE = "a table that names no sound here, or is not understood"
TABLES = {".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".jl"}
LISTS = {".txt", ".lst", ".list"}  # tables, lists of names, or notes
TEXTS = {".txt", ".lab", ".json", ".srt", ".vtt", ".textgrid", ".jams", ".eaf"}
TEXTS |= {".xml", ".md", ".yaml", ".yml", ".caption", ".cls", ".ann", ".m3u", ".m3u8", ".htm", ".html"}
SHEETS = {".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".ods", ".numbers", ".db", ".sqlite"}
NO_TABLES = SHEETS | set(".pkl .yaml .yml .tar .tgz .zip .docx .doc .odt .rtf .pdf".split())

# What columns of words are called, as patterns: of captions as they are, of one class, of tags to be joined.
# Where several columns hold words, the first pattern decides.
CAPTIONS = "(main_)?captions?|.*caption.*|sound_descri.*|audio_descri.*|sentences?|text|.*_value_text"
CAPTIONS += "|answer_text|(.*_)?transcri.*|descriptions?|prompts?|summary|words|.*description.*"
CAPTIONS += "|beschreibung|descripci[oó]n|descrição|légende|descrizione|описание|描述|説明"
CLASSES = "category|class|class_name|class_string|classname|labels?"
TAGS = f"common_names?|english_names?|common|display_names?|scientific_name|{CLASSES}"
TAGS += "|.*category.*|.*class.*|.*label.*|tags?"
TAGS += "|keywords?|.*event.*|.*scene.*|choice|.*_value_choices|name|species|genre|title"
FIRST_TAG = len(CAPTIONS.split("|"))
WORDS = f"{CAPTIONS}|{TAGS}"
PATTERNS = WORDS.split("|")  # the names of columns of words, the best first
RANKS = {"phylum", "order", "family", "genus"}  # of animals: a "class" beside them is one, such as "aves"
# Columns about who made a recording, and how: their words are taken only if they are asked for.
PEOPLE = "author|artist|speaker|annotator|recordist|recorder|uploader|user|username|captioner|transcriber"
MEANS = "licen[cs]e|device|microphone|manufacturer|format|gender|sex|language|locale|country|status|by"
MEANS += "|classifier|identifier|verifier|model|dataset|collection|site|url|link|credits?|date|time|reward"
MEANS += "|city|weather|channel_?layout|quality|problem|comments?|remarks?|predict(ed|ions?)|preds?"
ABOUT = rf"((.*_)?({PEOPLE})|{MEANS})(_(name|type))?|.*_(by|id|idx|index|code)"
ABOUT += "|((caption|label|text|tag|annotation)_)?source|super_?(category|class)"
ABOUT += "|(false|wrong|negative|foil|old|rejected)_(captions?|text|description)"
# What a language model was asked is no caption where its answer stands beside it.
ASKED = "prompt|question|instruction|input|query"
ANSWERED = "responses?|(.*_)?outputs?|answers?|generated_texts?|completions?"
# Rows that somebody has marked as useless: by 'exclude: 1', by 'keep: no', or by 'status: rejected'.
BAD = "(is_)?((exclude|reject|skip|ignore|discard|delete|remove|corrupt)(e?d)?|bad|broken|invalid|unusable)"
GOOD = "(is_)?((keep|use|include|accept|approve)(e?d)?|valid|usable|good|ok)"
VERDICT = "(.*_)?(status|answer|review|verdict|decision|qc)"
REJECTED = r"bad( ?[-:(].*)?|(invalid|unusable|(reject|exclude|discard|ignore|delete)(e?d)?)\b.*"
# Columns of splits, and of the numbers of folds and classes, which name no sounds: fold 1 is not 1.wav.
SPLITS = "(data_?|dataset_)?(split|subset|set|partition)s?|(cv_?|k_?)?folds?(_?(id|index|number|nr|no))?"
USED_FOR = "(is|in|(used_)?for)_"
SPLITS += f"|{USED_FOR}(train|test|val|valid|eval)(ing|idation|uation)?(_set|_split)?"
CLASS_IDS = "(.*_)?(class|label|target|category)(_?(id|index|idx|code))?"
MEASURES = "dur(ation)?(_.*)?|len(gth)?(_.*)?|(.*_)?(seconds?|rate|rating|score|year|age|count|size|channels)"
SAID_SPLITS = {  # in English, German, French, Spanish, Portuguese, Dutch, Russian, Chinese and Japanese
    "train": "train training trainieren entraînement entrainement apprentissage entrenamiento treino"
    " treinamento trainen обучение обучающая 训练 训练集 学習",
    "dev": "dev development",
    "val": "val valid validation validate validating validierung validieren validación validacion validação"
    " validacao validatie валидация 验证 验证集 検証",
    "test": "test testing eval evaluation evaluate holdout heldout testen prueba teste тест тестовая"
    " 测试 测试集 テスト",
}
SPLIT_WORDS = {word: split for split, words in SAID_SPLITS.items() for word in words.split()}
ENDINGS = ("set", "data", "daten", "sdaten")  # 'trainset'; in German 'Trainingsdaten'
SPLIT_WORDS |= {word + end: SPLIT_WORDS[word] for word in SPLIT_WORDS if word.isascii() for end in ENDINGS}
YES, NO = {"1", "1.0", "true", "yes", "x"}, {"0", "0.0", "false", "no"}
# Splits, too, in columns of splits, or where one of them stands beside one that trains:
SHORT_SPLITS = {"tr": "train", "trn": "train", "va": "val", "cv": "val"}
SHORT_SPLITS |= {"te": "test", "tt": "test", "tst": "test", "blind": "test"}
# Folders that are called so are no class of sounds.
STRUCTURE = set("audio audios wav wavs flac mp3 ogg mono stereo raw clip clips sound sounds samples".split())
STRUCTURE |= set("rec recs recording recordings file files data dataset fold folder subfolder disc".split())
STRUCTURE |= set("all my new untitled misc unsorted output export imported backup temp tmp final".split())
STRUCTURE |= set("processed normalized denoised resampled trimmed segments chunks stems loops".split())
STRUCTURE |= set("soundscapes recorded consolidate freeze bounces media takes download downloads".split())

# Files that are called so say nothing of single sounds.
NO_WORDS_IN = r"readme|licen[cs]e|submission|\berrors?\.|\b(invalidated|rejected|reported)\."
WRITTEN = ("codec_wavs", "lm_wavs")  # folders that the training scripts write into --out
SHOWN = 10  # lines of one kind that are printed; the others are counted

csv.field_size_limit(2**31 - 1)  # Python's own limit is shorter than some captions


class NoSounds(UserError):
    """No column of a table names sounds: it may be about something else."""


class NoWords(UserError):
    """A table names sounds, but has no words for them: it may be about something else, too."""


@dataclass
class Entry:
    """A sound and what its source says of it."""

    path: str
    captions: list[str]
    split: str = ""  # 'train', 'val', or '': the source does not say
    category: str = ""  # the class of the sound in words, where the source names exactly one


Flags = collections.namedtuple("Flags", "files words split")  # columns that the user gave


def read_entries(source, log=print, files=None, words=None, split_column=None, left_out=None) -> list[Entry]:
    """What a table or a folder holds. Names of columns (`files`, `words`, `split_column`) overrule guesses.

    Every guess, and the first files of all that is left out, are told to `log`; the list `left_out` gets all
    of the latter."""
    if not os.path.exists(source):
        raise UserError(f"{source}: does not exist; expected a table or a folder")
    understand = folder_entries if os.path.isdir(source) else table_entries
    said = [name.strip() for name in (words or "").split(",") if name]
    notes: list[tuple[str, str]] = []  # (why something is left out, or '' for a guess; what)
    gc.disable()  # a long table is many objects and no cycles: looking for them takes a third of the time
    try:
        entries = understand(os.path.abspath(source), Flags(files, said, split_column), notes)
    finally:
        gc.enable()
    for why in sorted({why for why, _ in notes}):
        lines = [what for reason, what in notes if reason == why]
        for line in shortened(f"left out, {why}" if why else "read", lines):
            log(printable(line))
        if why and left_out is not None:
            left_out += [f"{why}: {line}" for line in lines]
    return entries


def printable(text: str) -> str:
    r"""Names of files may hold bytes that are no text and cannot be printed: these are shown as \udcff."""
    return text.encode("utf-8", "backslashreplace").decode()


def listed(names: Iterable[str]) -> str:
    """Names for an error message, with quotes and commas, as many as one line holds."""
    return textwrap.shorten(", ".join(map(repr, names)), 110, placeholder=" ...")


def shortened(what: str, lines: list[str]) -> list[str]:
    """The first lines of a kind, indented, and a count of the others."""
    shown = [f"  {what}: {line}" for line in lines[:SHOWN]]
    if len(lines) > SHOWN:
        shown.append(f"  {what}: {len(lines) - SHOWN} more; training lists all in left_out.txt, below --out")
    return shown


def kind_of(path: str) -> str:
    """The extension of a file's name in small letters: 'a.WAV' -> '.wav', 'b.csv.gz' -> '.csv'."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def stem(name: str) -> str:
    """A name without its extension, if that is one of sounds or films: other dots belong to the name."""
    return name[: name.rindex(".")] if name.lower().endswith(MEDIA) else name


HUMP = "(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"  # where a word begins in 'CarHorn' and 'TVNoise'


def family(name: str) -> str:
    """A column's name without numbers: 'Caption-2', 'caption[1]' -> 'caption'; 'isTrain' -> 'is_train'."""
    return re.sub(rf"[\W\d_]+|{HUMP}", "_", name).strip("_").lower()


# Words: what a cell says, and whether that can be a caption.

OF_DATES = "jan(uary)?|feb(ruary)?|mar(ch)?|apr(il)?|may|june?|july?|aug(ust)?|sept?(ember)?|oct(ober)?"
OF_DATES += "|nov(ember)?|dec(ember)?|mon(day)?|tue(s(day)?)?|wed(nesday)?|thu(rs(day)?)?|fri(day)?"
OF_DATES += "|sat(urday)?|sun(day)?|[ap]m|gmt|utc"
# 'Car-Horn-02' has eleven characters, as the ids of YouTube's films have, but is none.
NAMELIKE = r"([A-Z]?[a-z]+|\d+)([-_]([A-Z]?[a-z]+|\d+))*\Z"
MISSING = r"nan|none|null|n/a|(?-i:NA)"  # what programs write into empty cells
UNKNOWN = f"{MISSING}|unknown|unlabell?ed"  # folders that are called so hold sounds of no class
NO_WORDS = re.compile(
    rf"true|false|{MISSING}|unknown|untitled|no caption|todo|tbd|\[?inaudible\]?|missing"
    r"|cc[ -](by|0)[\w .-]*"  # licences
    r"|#(ref|value|name|null|num|div/0)[!?]"  # errors of spreadsheets
    r"|(/[mgt]/\w+[ ,;]*)+|\w+://\S+|www\.\S+|/\S*|\S+\.[a-z]\w{1,3}"  # ids, addresses, paths, files
    rf"|(?=(\D*\d){{3}})([\d\W_]|(?<=\d)[tz]|({OF_DATES})(?![a-z]))+"  # dates
    r"|[0-9a-f-]{16,}"  # hashes
    rf"|(?-i:(?!{NAMELIKE})(?=[\w-]{{11}}\Z)(?=.*\d)(?=.*[A-Z]).*[a-z].*)",  # YouTube's ids
    re.IGNORECASE,
)
A_WORD = re.compile(r"(?<![^\W_])([^\W\d_]{2,}|[^\W\d_a-zA-Z])(?![^\W_])")  # letters that touch no digit


def clean_caption(text: str) -> str:
    """One line of text without HTML, control characters, zero-width characters and halves of emojis."""
    text = unicodedata.normalize("NFC", html.unescape(text))
    text = re.sub(r"</?[A-Za-z][^<>]*>", " ", text)  # <br>, as in Freesound's descriptions
    if not text.isprintable():  # most are
        for char in set(text):
            kind = unicodedata.category(char)
            if kind[0] == "C":
                text = text.replace(char, " " if kind == "Cc" else "")
    return " ".join(text.split())


def parsed(cell: str) -> object:
    """What a cell holds that is written as a list or as JSON; if it is neither, the cell itself."""
    commas = re.sub(r"(['\"])\s+(?=['\"])", r"\1, ", cell)  # NumPy writes lists without them
    for read, text in ((ast.literal_eval, commas), (json.loads, cell)):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return read(text)
    return cell


def cell_texts(cell: object) -> list[str]:
    """The texts in a cell, cleaned: of a string, of a list of strings, of the values of a dictionary, or of
    one of these written as a string."""
    if isinstance(cell, str) and cell[:1] + cell[-1:] in ("[]", "{}"):
        cell = parsed(cell)
    if isinstance(cell, dict):
        return [text for value in cell.values() for text in cell_texts(value)]
    if isinstance(cell, list):
        return [text for item in cell if isinstance(item, str) for text in cell_texts(item)]
    text = clean_caption(cell) if isinstance(cell, str) else ""
    return [text] if text else []


def is_words(text: str) -> bool:
    """Can this be read aloud? Ids, numbers, times, hashes, addresses and names of files cannot."""
    return bool(A_WORD.search(text)) and not NO_WORDS.fullmatch(text) and stem(text) == text


def pseudo_sentence(tags: str | list) -> str:
    """The paper's sentence of tags: 'dog, bark' -> 'dog bark', '001 - Dog_bark' -> 'dog bark'.

    Numbers that come first or begin with 0, as 01, count files; in 'Boeing 747' they belong to the name."""
    text = re.sub(HUMP, " ", " ".join(cell_texts(tags))).lower().replace("’", "'")
    # Letters, digits and marks: Hindi and Thai write vowels as marks, which \w would take for gaps.
    kept = "".join(char if char == "'" or unicodedata.category(char)[0] in "LNM" else " " for char in text)
    words = list(filter(None, (word.strip("'") for word in kept.split())))
    words = list(itertools.dropwhile(str.isdecimal, words))
    return " ".join(word for word in words if not re.fullmatch(r"0\d+", word))


# Splits: what trains and what validates, as columns, names of files, and folders say it.


def split_word(name: str) -> str:
    """'train', 'dev', 'val' or 'test' if a name such as 'test-clean' or 'FSD50K.dev_audio' says so, or ''.

    Of a path the deepest folder with such words counts; 'train_val' says nothing."""
    for part in reversed(unicodedata.normalize("NFC", name).split("/")):
        words = re.findall(r"[^\W\d_]+", re.sub(HUMP, " ", part).lower())
        splits = {SPLIT_WORDS[word] for word in [*words, "".join(words)] if word in SPLIT_WORDS}
        if splits:
            return splits.pop() if len(splits) == 1 else ""
    return ""


def split_words(names: Iterable[str]) -> dict[str, str]:
    """{name: as `split_word`} for names side by side; 'te' is such a word if 'tr' or 'train' is beside it."""
    long = {name: split_word(name) for name in names}
    stems = {name: os.path.basename(name).split(".")[0].lower() for name in long}
    words = {name: SHORT_SPLITS.get(stems[name], long[name]) for name in long}
    said = set(words.values()) - {""}
    return words if "train" in said and len(said) > 1 else long


def train_or_val(names: Iterable[str]) -> dict[str, str]:
    """{name: 'train', 'val' or ''} for names side by side: values of a column, folders, or files.

    What a 'dev' is depends on the others: it validates beside 'train', and trains beside 'test' alone."""
    words = split_words(names)
    dev = "val" if "train" in words.values() else "train"
    return {name: {"test": "val", "dev": dev}.get(word, word) for name, word in words.items()}


def column_splits(name: str, cells: list) -> list[str]:
    """'train', 'val' or '' for each cell of a column. Of numbered folds the last validates, as in ESC-50."""
    texts = ["" if cell is None else str(cell).strip().lower() for cell in cells]
    if re.fullmatch(SPLITS, family(name)):
        texts = [SHORT_SPLITS.get(text, text) for text in texts]
    splits = train_or_val(set(texts))
    folds = {text: re.fullmatch(r"(fold|set|split)?[ _-]?(\d+)(\.0)?", text) for text in splits}
    numbers = {text: int(match[2]) for text, match in folds.items() if match}
    if re.match(USED_FOR, family(name)) or family(name) in SPLIT_WORDS:
        yes = train_or_val([family(name)])[family(name)]  # is_train, test: yes or no
        marks = {""} if {*texts} <= {"", *YES} else set()  # a cross, or nothing
        # But a 'valid' that is mostly yes says which files are not damaged, and an 'eval' of 4 is a grade.
        mostly = 2 * sum(text in YES for text in texts) > len(texts)
        if not ("valid" in name.lower() and mostly) and {0, 1} >= {*numbers.values()}:
            splits |= dict.fromkeys(YES, yes)
            splits |= dict.fromkeys(NO | marks, "val" if yes == "train" else "train")
    elif len(numbers) > 1 or any(splits.values()):
        last = max(numbers.values(), default=0)
        splits |= {text: "val" if number == last else "" for text, number in numbers.items()}
    return [splits[text] for text in texts]


def folders_of(path: str) -> list[str]:
    """The folders above a file, from the top: 'a/b/c.wav' -> ['a', 'a/b']."""
    return [path[: slash.start()] for slash in re.finditer("/", path)]


def folder_splits(paths: Iterable[str]) -> dict[str, str]:
    """{folder: 'train' or 'val'} for folders in relative paths that are called like splits.

    Their siblings must be splits, too: in ESC-50 'train' is a class, and has other classes beside it."""
    siblings = collections.defaultdict(set)  # {folder: the names of the folders in it}
    for folder in {folder for path in paths for folder in folders_of(path)}:
        siblings[os.path.dirname(folder)].add(os.path.basename(folder))
    splits: dict[str, str] = {}
    for above, names in siblings.items():
        words = set(split_words(names).values())
        exact = {split_word(name) for name in names if name.lower() in SPLIT_WORDS}
        # Alone, 'train/' is a split, but 'test recordings/' may be any.
        all_splits = "" not in words and (len(words) > 1 or (len(names) == 1 and " " not in [*names][0]))
        if all_splits or ("train" in exact and len(exact) > 1):
            splits |= {os.path.join(above, name): side for name, side in train_or_val(names).items() if side}
    return splits


def place_splits(source: str, paths: list[str]) -> list[str]:
    """'train', 'val' or '' for each of a source's sounds, as names say it: of the table, or of folders.

    The name of a table always counts, that of its folder if the folders beside it are splits, too."""
    said = ""
    if os.path.isfile(source):
        source, name = os.path.split(source)
        known = train_or_val([name, *os.listdir(source)])
        alone = not any(side for other, side in known.items() if other != name)
        said = "" if " " in name and alone else known[name]  # 'hearing test.csv' says nothing
    above, name = os.path.split(os.path.abspath(source))
    near = [f"{entry.name}/" for entry in os.scandir(above) if entry.is_dir() and entry.name[0] != "."]
    if not said and len(near) > 1:
        said = folder_splits(near).get(name, "")
    splits = folder_splits(paths)
    # The deepest counts: dev/ may hold a train/ and a test/ of its own.
    deepest = [filter(None, map(splits.get, reversed(folders_of(path)))) for path in paths]
    return [said or next(found, "") for found in deepest]


# Tables: CSV with any delimiter and JSON of any shape become columns of cells.


@dataclass
class Table:
    """A table by its columns: a cell for each row. A CSV without a header calls them '1', '2', ..."""

    path: str
    columns: dict[str, list]
    delimiter: str = ""  # '' if it was JSON
    what: str = ""  # what it was made of, if not of a file

    def cells(self, name: str) -> list:
        """A column, which a flag may have named wrongly."""
        if name not in self.columns:
            raise UserError(f"{self.path}: has no column {name!r}, it has {listed(self.columns)}")
        return self.columns[name]


def read_text(path: str, notes: list) -> str:
    """The text of a table, or of a caption's file."""
    if kind_of(path) in NO_TABLES or stem(path) != path:
        advice = "move it away, or give a folder, or a table saved as CSV or JSON"
        if kind_of(path) == ".parquet":
            advice += ", as by pandas.read_parquet(...).to_csv('clips.csv')"
        raise UserError(f"{path}: {kind_of(path)} is not read as a table; {advice}")
    try:
        with (gzip.open if path.lower().endswith(".gz") else open)(path, "rb") as file:
            data = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as why:
        raise UserError(f"{path}: cannot be unpacked ({why}); get this file again") from None
    if data.startswith(b"{\\rtf"):
        raise UserError(f"{path}: is a document; save it as plain text")
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    if b"\0" in data and not wide:
        raise UserError(f"{path}: is not text; expected a table as CSV, TSV, JSON or JSON lines")
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")
        runs = re.findall(r"[^\0-\x7f]+", text)
        # In Western languages few such letters follow each other; Polish has letters where superscripts are.
        if wide or len("".join(runs)) > 2 * len(runs) or re.search("[¹³][a-z]|\ufffd", text):
            raise UserError(f"{path}: its letters are in an unknown encoding; save it as UTF-8") from None
        notes.append(("", f"{path}: is not UTF-8; its letters are read as Windows-1252"))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_table(path: str, notes: list) -> Table:
    """A CSV, TSV or JSON table, known by its first character."""
    text = read_text(path, notes)
    try:
        if text.lstrip()[:1] in ("[", "{"):
            # JSON lines are objects without commas between them: with commas, in brackets, they are a list.
            data = json.loads("[" + re.sub(r"\}\s*\n\s*\{", "},{", text) + "]")
            table = rows_table(path, json_rows(path, data[0] if len(data) == 1 else data))
        else:
            table = csv_table(path, text)
    except csv.Error as why:
        raise UserError(f"{path}: {why}; close that quote, or double it inside a cell") from None
    except (json.JSONDecodeError, RecursionError) as why:
        raise UserError(f"{path}: is no JSON ({why}); expected a list of objects, or one a line") from None
    if not any(table.columns.values()):
        raise NoSounds(f"{path}: holds no usable row; expected a column of files and one of captions")
    return table


def csv_rows(text: str, delimiter: str, **options) -> list[list[str]]:
    """Lines of text as rows of cells. csv.Error: a quote is not closed."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, **options)
    try:
        return [row for row in reader if any(row)]
    except csv.Error as why:
        raise csv.Error(f"line {reader.line_num}: {why}") from None


def csv_table(path: str, text: str) -> Table:
    """Lines of text as a table, with or without comments above, with or without a header."""
    comments = re.match(r"(sep=.*\n)?((#.*)?\n)*", text)[0]
    text = text[len(comments) :]
    head = "\n".join(text.split("\n", 200)[:200])

    def evenness(delimiter: str) -> tuple:
        """The share of lines with as many cells as the first; among equals, one with names of files is it."""
        rows = csv_rows(head, delimiter)
        widths = list(map(len, rows))
        even = widths.count(widths[0]) / len(widths) if rows and widths[0] > 1 else 0
        return even, any(stem(cell) != cell for row in rows[-1:] for cell in row)

    delimiter = max("\t|,;", key=evenness)  # captions hold the last two
    try:
        rows = csv_rows(text, delimiter, strict=True)
    except csv.Error:
        if delimiter in "\t|":  # where a quote is often just a quote
            rows = csv_rows(text, delimiter, quoting=csv.QUOTE_NONE)
        elif '\\"' in text:
            rows = csv_rows(text, delimiter, strict=True, escapechar="\\")
        else:
            raise
    if len(rows) > 2 and rows[0][0] and len(rows[0]) > 1 and not any(rows[0][1:]) and any(rows[1][1:]):
        rows.pop(0)  # a title above the header
    above = csv_rows(comments.rpartition("#")[2].strip() if "#" in comments else "", delimiter)
    if rows and above and len(above[0]) == len(rows[0]) > 1:
        rows = above + rows  # AudioSet's header is its last comment
    if looks_headless(rows[:50]):  # its columns are called '1', '2', ..., as many as most rows have
        widths = collections.Counter(sorted(map(len, rows)))
        rows.insert(0, [str(i + 1) for i in range(widths.most_common(1)[0][0])])
    columns: dict[str, list] = {}
    for name, *cells in itertools.zip_longest(*even_rows(path, rows, delimiter), fillvalue=""):
        name = clean_caption(name)
        columns[f"{name}_{len(columns)}" if name in columns else name] = cells
    return Table(path, columns, delimiter)


def looks_headless(rows: list[list[str]]) -> bool:
    """Is the first row data already? Then it holds a number, a file, a sentence, or an id as below."""
    first = [cell for row in rows[:1] for cell in row if cell]
    if first == [str(i) for i in range(len(first))]:  # pandas calls nameless columns 0, 1, ...
        return False
    below = {re.sub(r"\d", "0", cell) for row in rows[1:] for cell in row}
    for cell in first:
        shape = re.sub(r"\d", "0", cell)
        is_number = re.fullmatch(r"-?0+(\.0+)?", shape)
        number_or_id = is_number or (shape in below and re.search(r"\d", cell))
        if number_or_id or stem(cell) != cell or len(cell) > 60:
            return True
    return False


def even_rows(path: str, rows: list[list[str]], delimiter: str) -> list[list[str]]:
    """The rows, none with more cells than the header."""
    width = len(rows[0]) if rows else 0
    for number, row in enumerate(rows):
        while len(row) > width and not row[-1]:
            row.pop()
        if len(row) > width > 2:
            what = f"row {number} has {len(row)} cells, expected {width} ({' | '.join(row)[:80]})"
            raise UserError(f"{path}: {what}; put quotes around cells that contain {delimiter!r}")
        if len(row) > width:  # a caption with unquoted commas
            row[width - 1 :] = [f"{delimiter} ".join(row[width - 1 :])]
    return rows


def json_rows(path: str, data: list | dict) -> list[dict]:
    """The rows in JSON of any shape."""
    if isinstance(data, list):
        return [row if isinstance(row, dict) else {} for row in data]
    if data.keys() >= {"columns", "data"}:  # as pandas writes it with orient="split"
        return [dict(zip(data["columns"], cells)) for cells in data["data"]]
    tables = {}  # what lies below a key and is a list or a dictionary of rows
    for key, part in data.items():
        inner = list(part.values()) if isinstance(part, dict) else part
        if isinstance(inner, list) and inner and all(isinstance(row, dict) for row in inner):
            tables[key] = part
    if len(tables) > 1 and not all(map(split_word, tables)):
        raise UserError(f"{path}: holds several tables ({listed(tables)}); save the one with captions")
    rows = []
    for key, part in tables.items():  # {'version': 1, 'clips': [rows]}, or {'train': [rows], 'test': [rows]}
        rows += [row | ({"split": key} if split_word(key) else {}) for row in json_rows(path, part)]
    kinds = set() if tables else set(map(type, data.values()))
    if kinds == {dict} and all(map(split_word, data)):  # {'train': {'a.wav': 'rain falls'}, 'test': {...}}
        rows = [row | {"split": key} for key, part in data.items() for row in json_rows(path, part)]
    elif kinds == {dict}:  # {'a.wav': row, 'b.wav': row}
        rows = [{"key": key} | row for key, row in data.items()]
        if all(name.isdecimal() for row in data.values() for name in row):  # {'path': {'0': 'a.wav'}}
            numbers = dict.fromkeys(number for column in data.values() for number in column)
            rows = [{name: column.get(n) for name, column in data.items()} for n in numbers]
    elif kinds and kinds <= {str, list} and names_texts(data):  # {'a.wav': 'rain falls'}
        rows = [{"key": key, "caption": cell} for key, cell in data.items()]
    elif kinds == {list} and all(map(split_word, data)):  # {'train': ['a.wav', 'b.wav'], 'test': ['c.wav']}
        rows = [{"key": name, "split": key} for key, names in data.items() for name in names]
    elif kinds == {list} and len(set(map(len, data.values()))) == 1:  # {'path': [cells], 'caption': [cells]}
        rows = [dict(zip(data, cells)) for cells in zip(*data.values())]
    return rows or [data]  # none of these: it is a row itself, as JSON beside a sound is


def names_texts(data: dict) -> bool:
    """Are the keys of a dictionary names of sounds and its values captions, not those of a single row?"""
    if all(stem(key) != key for key in data):
        return True
    texts = [text for cell in data.values() for text in cell_texts(cell)]
    usual = any(re.fullmatch(WORDS, family(key)) for key in data)
    return bool(texts) and all(map(is_words, texts)) and not usual


SPEAKER = ("role", "from")  # the keys that say who speaks in a chat


def is_asked(part: dict) -> bool:
    """In a chat, is this a question or an instruction, not an answer?"""
    return any(part.get(key) in ("user", "human", "system") for key in SPEAKER)


def rows_table(path: str, rows: list[dict]) -> Table:
    """Rows as a table; {'audio': {'path': 'a.wav'}} fills a column called audio.path, and so does a list of
    such dictionaries, with a list if they are several."""

    def flat(row: dict, above: str = "") -> dict:
        cells: dict = {}
        for name, cell in row.items():
            if name in SPEAKER and above:
                continue
            if isinstance(cell, dict):
                cells |= flat(cell, f"{above}{name}.")
            elif isinstance(cell, list) and cell and all(isinstance(part, dict) for part in cell):
                cell = [part for part in cell if not is_asked(part)]
                if len(cell) > 1 and all(isinstance(part.get("score"), float) for part in cell):
                    cell = [max(cell, key=lambda part: part["score"])]  # the best of several guesses
                parts = [flat(part, f"{above}{name}.") for part in cell]
                for key in dict.fromkeys(itertools.chain(*parts)):
                    values = [part[key] for part in parts if key in part]
                    lists = [value if isinstance(value, list) else [value] for value in values]
                    cells[key] = values[0] if len(values) == 1 else list(itertools.chain(*lists))
            else:
                cells[above + name] = cell
        return cells

    rows = [flat(row) for row in rows]
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(path, {name: [row.get(name) for row in rows] for name in names})


# Sounds: one walk of a folder, and an index of what it holds by name.


def name_key(name: str) -> str:
    """Names to compare by: without extension, an accent and its letter as one, odd bytes as Windows-1252."""
    if not name.isascii():
        name = re.sub("[\udc80-\udcff]", lambda byte: os.fsencode(byte[0]).decode("cp1252", "replace"), name)
        name = unicodedata.normalize("NFC", name)
    return stem(name)


CLIP_NAME = re.compile(
    # The id of a YouTube film, after a Y in AudioCaps, and perhaps where the clip begins and ends.
    r"\[?Y?(?P<id>[\w-]{11})\]?([-_ .]+\[?(?P<start>\d+(\.\d+)?)([-_]\d+(\.\d+)?)?\]?)?"
    r"|(?P<number>\d+)__.+"  # as Freesound names its downloads
    r"|(XC|ML)(?P<recording>\d+)( - .+)?"  # as xeno-canto and the Macaulay Library do
)


class Sounds:
    """What lies below the folder `root`: `paths` of sounds and of `others`, relative to it and with /.

    `media` are full paths of those others that hold sound in a format that is not read."""

    def __init__(self, root: str, files: Iterable[str]):
        files = sorted(path.replace(os.sep, "/") for path in files)
        self.root, self.is_far = root, False
        self.paths = [path for path in files if kind_of(path) in AUDIO]
        self.others = [path for path in files if kind_of(path) not in AUDIO]
        self.media = [os.path.join(root, path) for path in self.others if kind_of(path) in OTHER_MEDIA]
        self.sizes = collections.Counter(map(os.path.dirname, self.paths))  # of the folders
        self.index = collections.defaultdict(list)  # {name: [path, ...]}
        self.numbers = collections.defaultdict(list)  # {number without leading zeros: [path, ...]}
        self.clips = collections.defaultdict(list)  # {the id that a name begins with: [(path, second), ...]}
        for path in self.paths:
            key = name_key(os.path.basename(path))
            for one in {key, key.casefold()}:
                self.index[one].append(path)
            if key.isdecimal():
                self.numbers[key.lstrip("0")].append(path)
            if match := CLIP_NAME.fullmatch(key):
                number = match["id"] or match["number"] or match["recording"]
                self.clips[number].append((path, match["start"]))

    def find(self, name: str, table: Table, i: int) -> list[str]:
        """The sounds of this name. Of clips from one film, row i of the table holds where they begin."""
        key = name_key(name)
        # The last two are how Label Studio renames files, and how Notion writes their names.
        for one in (key, key.casefold(), re.sub("^[0-9a-f]{8}-", "", key), urllib.parse.unquote(key)):
            if found := self.index.get(one):
                if len(found) == 1:
                    return found
                exact = [path for path in found if name_key(os.path.basename(path)) == one]
                return exact or found
        if key.isdecimal() and key.lstrip("0") in self.numbers:  # spreadsheets turn 007 into 7
            return self.numbers[key.lstrip("0")]
        # 'barking-dog.wav' has as many letters as a film's id.
        clips = self.clips.get(key, []) if key == name or not is_words(key) else []
        cells = [str(column[i]).strip() for column in table.columns.values()] if clips else []
        numbers = {float(cell) for cell in cells if re.fullmatch(r"\d+(\.\d+)?", cell)}
        seconds = numbers | {1000 * number for number in numbers}  # some names give milliseconds
        return [path for path, start in clips if not (start and numbers) or float(start) in seconds]

    def share(self, paths: set[str]) -> float:
        """The share that these sounds are of all in their folders."""
        return len(paths) / sum(self.sizes[folder] for folder in set(map(os.path.dirname, paths)))


def walk_links(root: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk that follows links, but into no folder twice: one to a folder above would lead in circles."""
    visited = set()
    for where, below, names in os.walk(root, followlinks=True):
        if os.path.realpath(where) in visited:
            below.clear()
            continue
        visited.add(os.path.realpath(where))
        yield where, below, names


def walk(root: str) -> Sounds:
    """All that lies in a folder and below, but what is hidden."""
    files = []
    for where, below, names in walk_links(root):
        if "audio.i16" in names or (".lock" in names and where != root):  # written by these scripts
            below.clear()
            continue
        hidden = (".", "__MACOSX")
        below[:] = sorted(name for name in below if name not in WRITTEN and not name.startswith(hidden))
        files += [os.path.relpath(os.path.join(where, name), root) for name in names if name[0] != "."]
    return Sounds(root, files)


def look(root: str, written: Iterable[str]) -> Sounds:
    """What lies in the folders of paths that are written as seen from `root`."""
    folders = {os.path.join(root, split_path(path)[0], "") for path in written}
    found = [path for folder in folders for path in glob.glob(glob.escape(folder) + "*")]
    return Sounds(root, [path.removeprefix(os.path.join(root, "")) for path in found])


# A match: the column of a table that names sounds, and which.


@dataclass
class Match:
    """The sounds that a column names."""

    column: str
    sounds: Sounds
    paths: list[str]  # for each row, relative to the folder of the sounds; '' where there is none
    exact: int = 0  # how many rows give the name with its extension
    distinct: int = 0  # how many sounds are named


def split_path(cell: object) -> tuple[str, str]:
    r"""The folder and the name in a cell, also of an address or with \; ('', '') if it is no name."""
    if isinstance(cell, str) and cell[:1] == "{" and isinstance(row := parsed(cell), dict):
        cell = row.get("path")  # as Hugging Face's tables become CSV
    if isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    if type(cell) not in (str, int) and not (isinstance(cell, float) and cell.is_integer()):
        return "", ""
    text = re.sub(r"^(\d+)\.0$", r"\1", str(cell).strip().replace("\\", "/"))  # 12.0, as pandas writes ids
    text = re.sub(r" \(https?://\S+\)$", "", text)  # Airtable's attachments
    if "://" in text:
        text = urllib.parse.unquote(re.sub(r"\w+://|[?#].*", "", text))
    folder, _, name = text.rpartition("/")
    return folder.removeprefix("./").strip("/"), name


Place = collections.namedtuple("Place", "ignored base path")  # see `places_of`


def places_of(cell: tuple[str, str], table: Table, i: int, sounds: Sounds) -> list[Place]:
    """Where the sound in a cell (folder, name) of row i may be, with as few folders ignored as possible.

    If there is a sounds/dog/1.wav, 'x/dog/1' may mean it: one folder of the cell is ignored (x), and the
    base, below which the rest of the cell is right, is sounds. A file with the same extension comes first."""

    def upwards(folder: str) -> list[str]:
        """Its folders as they are compared, the deepest first."""
        return [name_key(part).casefold() for part in reversed(folder.split("/")) if part]

    folder, name = cell
    wanted = upwards(folder)
    places = []
    for path in sounds.find(name, table, i):
        there = upwards(os.path.dirname(path))
        same = len(os.path.commonprefix([wanted, there]))
        ignored, above = wanted[same:], there[same:]
        # 'audio/dog/1' is not audio/cat/1.wav: what both lie in does not count where the next folder differs
        if not ignored or ignored[0] in above or set(above).isdisjoint(ignored):
            base = "/".join(path.split("/")[: len(above)])
            places.append(Place(len(ignored), base, path))
    places.sort(key=lambda place: (place.ignored, os.path.basename(place.path) != name))
    return [place for place in places if place.ignored == places[0].ignored]


def below_one_base(table: Table, places: list[list[Place]], sounds: Sounds) -> list[list[Place]]:
    """For each row its places below one base for the whole table, or below several full of its sounds.

    So a missing file is never taken from a neighbour's folder."""
    used = collections.defaultdict(set)
    for place in itertools.chain(*places):
        used[place.base].add(place.path)
    said = split_word(os.path.basename(table.path))
    if said:  # what is called train.csv has nothing in a folder called test
        best = said if said in map(split_word, used) else ""
        used = {base: paths for base, paths in used.items() if split_word(base) == best}
    share = {base: sounds.share(paths) for base, paths in used.items()}
    most = max(share.values(), default=0)
    kept = {base for base in used if share[base] >= 0.8 * most}
    result = []
    for row in places:
        bases = sorted({place.base for place in row if place.base in kept})
        if len(bases) > 1 and bases[0]:  # '' is first: in the folder itself, a name is where it should be
            where = f"one lies in {bases[0]!r} and in {bases[1]!r} of {sounds.root}"
            advice = "write folders into the column of files, or move the table away if it is about others"
            raise UserError(f"{table.path}: of its sounds {where}; {advice}")
        result.append([place for place in row if place.base in bases[:1]])
    return result


def own_folders(cells: list[tuple[str, str]], places: list[list[Place]]) -> list[list[Place]]:
    """Of each row's places those that are no neighbour's: a missing sound is not found in another folder.

    A row ignores no folder to find a sound in one that other rows name, nor more folders than usual."""
    folders = [set(folder.casefold().split("/")) for folder, _ in cells]
    theirs = set.union(*folders) - set.intersection(*folders)
    theirs.discard("")  # no folder at all
    kept = []
    for row in places:
        kept.append([p for p in row if not p.ignored or theirs.isdisjoint(p.base.casefold().split("/"))])
    ignored = sorted(row[0].ignored for row in kept if row)
    return [row if row and row[0].ignored <= ignored[len(ignored) // 2] else [] for row in kept]


NAMELESS = "|index|idx|unnamed"  # what columns are called that number the rows


def is_chance(match: Match, cells: list[tuple]) -> bool:
    """May it be chance that a column's cells (folder, name) name sounds? It is none if most rows have their
    sound or, but for mere numbers, most sounds have a row."""
    sounds, found = match.sounds, set(match.paths) - {""}
    rows_found, rows = sum(map(bool, match.paths)), sum(bool(name) for _, name in cells)
    # Far above the table another project may have sounds of some of these names.
    if sounds.is_far and not any(folder for folder, _ in cells) and rows_found < 0.9 * rows:
        return True
    stems = [stem(os.path.basename(path)) for path in found]
    numbers = not match.exact and all(map(str.isdecimal, stems))
    repeated = rows_found > len(found)
    if numbers and (repeated or re.fullmatch(f"{NAMELESS}|id|number", family(match.column))):
        # A few numbers that begin at 0 or 1 count something else than the many sounds there: classes, marks.
        if max(map(int, stems)) <= len(found) and 2 * len(found) <= len(sounds.paths):
            return True
    return 2 * rows_found < rows and (numbers or sounds.share(found) < 0.5)


def match_column(table: Table, column: str, sounds: Sounds, given: bool) -> Match | None:
    """Which sounds a column names; None: none, or, unless the user gave it, so few that it may be chance."""
    cells = table.columns[column]
    if not given and re.fullmatch(f"{SPLITS}|{CLASS_IDS}|{MEASURES}", family(column)):
        if all(stem(str(cell)) == str(cell) for cell in cells):
            return None
    # Most columns name no sound. A few cells show it, so many that ten hit one if each sound has a row.
    step = max(1, min(len(cells) // 1000, len(sounds.paths) // 10))
    some = range(0, len(cells), step) if sounds.paths else []
    if not any(places_of(split_path(cells[i]), table, i, sounds) for i in some):
        return None
    cells = [split_path(cell) for cell in cells]
    places = own_folders(cells, [places_of(cell, table, i, sounds) for i, cell in enumerate(cells)])
    paths = [row[0].path if row else "" for row in below_one_base(table, places, sounds)]
    exact = sum(os.path.basename(path) == name for path, (_, name) in zip(paths, cells) if path)
    match = Match(column, sounds, paths, exact, len(set(paths) - {""}))
    if not match.distinct or (not given and is_chance(match, cells)):
        return None
    return match


def likely_folders(table: Table, written: set[str]) -> Iterator[Sounds]:
    """Where the sounds may lie, the likeliest first: at full paths as they are written; below the table's
    folder; at paths as seen from the current folder; below the two folders above the table's."""
    folder = os.path.dirname(os.path.abspath(table.path))
    home = os.path.join(os.path.expanduser("~"), "")
    yield look("/", [path for path in written if path.startswith("/")])
    for above in range(3):
        sounds = walk(folder)
        sounds.is_far = above == 2
        yield sounds
        if above == 0:
            yield look(os.getcwd(), written)
        folder = os.path.dirname(folder)
        # If it has sounds, those further up are a neighbour's. Never walk a whole disk, nor all of a home.
        if sounds.paths or home.startswith(os.path.join(folder, "")):
            return


def find_files(table: Table, files: str | None) -> Match:
    """The column that names sounds: of several the one with most names as they are written; or `files`."""
    written = {}
    for name in [files] if files else table.columns:
        written[name] = {cell for cell in table.cells(name) if isinstance(cell, str) and stem(cell) != cell}
    most, paths = max(map(len, written.values())), set().union(*written.values())
    hint = f", such as {min(paths)!r}" if paths else ""
    for sounds in likely_folders(table, paths):
        matches, unclear = [], {}
        for name in written:
            try:
                match = match_column(table, name, sounds, bool(files))
            except UserError as error:
                unclear[name] = error
                continue
            # Beside a column of file names, one whose few cells happen to be names of sounds is not it.
            if match and (match.exact or len(set(map(str, table.columns[name]))) >= most):
                matches.append(match)
        named = [m for m in matches if m.exact or not re.fullmatch(NAMELESS, family(m.column))]
        matches = named or matches  # if there is another, not pandas' numbers of rows
        for name, error in unclear.items():  # a numbering may be unclear where another column names files
            if len(written[name]) == most > 0 or not any(match.exact for match in matches):
                raise error
        if matches:
            return best_match(table, matches)
        if sounds.media:
            hint = ": there are .m4a or films, which ffmpeg -i X.m4a X.wav makes readable"
    what = f"no column names sounds that exist, of {listed(written)}{hint}"
    raise NoSounds(f"{table.path}: {what}; put the table beside its sounds, or choose with --files COLUMN")


def best_match(table: Table, matches: list[Match]) -> Match:
    """The match that names most sounds as they are written, if no other names as many, but others."""
    most = max(match.distinct for match in matches)
    best = max(matches, key=lambda match: (2 * match.distinct > most, match.exact, match.distinct))
    for other in matches:
        differ = any(a and b and a != b for a, b in zip(best.paths, other.paths))
        if differ and (other.exact, other.distinct) == (best.exact, best.distinct):
            what = f"columns {best.column!r} and {other.column!r} both name sounds, but not the same"
            raise UserError(f"{table.path}: {what}; say which with --files COLUMN")
    return best


# Which columns hold words and splits.


def holds_words(cells: list) -> bool:
    """Are most cells of a column words, and not just a numbering such as clip_1, clip_2?"""
    texts = [text for cell in cells[:: max(1, len(cells) // 1000)] for text in cell_texts(cell)]
    texts = [text for text in texts if not re.fullmatch(MISSING, text, re.IGNORECASE)]
    kinds = {re.sub(r"\d+", "", text) for text in texts}
    numbering = len(kinds) == 1 < len(set(texts)) and " " not in texts[0]
    return texts != [] and not numbering and 2 * sum(map(is_words, texts)) >= len(texts)


def is_constant(cells: list) -> bool:
    """Do three rows or more all say the same?"""
    return len(cells) > 2 and len(set(map(str, cells))) == 1


def is_rare(cells: list) -> bool:
    """Is most of a column empty?"""
    return 2 * sum(bool(cell_texts(cell)) for cell in cells) < len(cells)


def rank_words(table: Table, taken: set) -> dict[str, int]:
    """{column: the place of the first pattern that its name fits} of the columns that hold words.

    A column whose cells all say the same, and a description that few rows have, are remarks: they give way
    to columns of known names. Of an unknown name, the former is never a caption."""
    ranks = {}
    answered = any(re.fullmatch(ANSWERED, family(name)) for name in table.columns.keys() - taken)
    quizzed = "question" in map(family, table.columns)  # then 'category' is one of questions
    animals = len(RANKS.intersection(map(family, table.columns))) > 1
    for name, cells in table.columns.items():
        asked = answered and re.fullmatch(ASKED, family(name))
        asked = asked or (quizzed and re.fullmatch("category|type|task", family(name)))
        if name in taken or asked or re.fullmatch(ABOUT, family(name)) or not holds_words(cells):
            continue
        known = [] if animals and family(name) == "class" else PATTERNS
        fitting = [i for i, pattern in enumerate(known) if re.fullmatch(pattern, family(name))]
        if fitting or not is_constant(cells):
            ranks[name] = min(fitting, default=len(PATTERNS))
    rare = [name for name in ranks if "description" in family(name) and is_rare(table.columns[name])]
    varied = {family(name) for name in ranks if not is_constant(table.columns[name])}
    constant = [name for name in ranks if is_constant(table.columns[name]) and family(name) not in varied]
    for remarks in (rare, constant):
        others = {name: rank for name, rank in ranks.items() if name not in remarks}
        if any(rank < len(PATTERNS) for rank in others.values()):
            ranks = others
    return ranks


def find_words(table: Table, taken: set) -> tuple[list[str], list[str]]:
    """The columns of captions, and, best first, those of tags for rows without one; either may be none."""
    ranks = rank_words(table, taken)
    best = [name for name in ranks if ranks[name] == min(ranks.values())]
    rows = list(zip(*(table.columns[name] for name in best)))
    known = bool(best) and ranks[best[0]] < len(PATTERNS)
    ambiguous = len(best) > 1 and not (known and len(set(map(family, best))) == 1)
    # Between columns that mostly agree any will do: LJSpeech writes numbers as digits and again as words.
    if ambiguous and 2 * sum(len(set(map(str, row))) == 1 for row in rows) < len(rows):
        raise UserError(f"{table.path}: columns {listed(best)} all hold words; choose with --words COLUMN")
    if not known:  # a column of any name may hold sentences; single words and names may say anything
        plain = len(table.columns) == 2 or all(map(str.isdecimal, best))  # a file and a word, or no header
        gaps = [text for row in rows for cell in row for text in cell_texts(cell) if " " in text]
        if gaps and (plain or 2 * sum(text != text.title() for text in gaps) >= len(gaps)):
            return best, []
        return [], best if plain else []
    tags = [name for name in sorted(ranks, key=ranks.get) if FIRST_TAG <= ranks[name] < len(PATTERNS)]
    if best[0] in tags:
        return [], tags
    return best, [name for name in tags if not is_constant(table.columns[name])]


def find_splits(table: Table, taken: set) -> str:
    """The column that says what trains and validates, or ''. Words count for more than numbered folds."""
    found = ""
    for name, cells in table.columns.items():
        if name in taken or family(found) == "split":
            continue
        values = {str(cell).strip().lower() for cell in cells if cell}
        # Whatever a column is called, if it holds 'train' and 'test' and nothing else, it is one; also if it
        # holds 'test' alone. ('train' alone may be what sounds.)
        sides_named = set()
        for value in values:  # of captions, the first shows that they are no splits
            sides_named.add(SPLIT_WORDS.get(re.sub(r"[\W_]", "", value), ""))
            if "" in sides_named:
                break
        plain = "" not in sides_named and sides_named - {"train", "dev"}
        named = family(name) in SPLIT_WORDS or re.fullmatch(SPLITS, family(name))
        named = named and any(column_splits(name, cells))
        if (plain or named) and (not found or any(map(split_word, values))):
            found = name
    return found


def unknown_splits(table: Table, split: str, splits: list[str]) -> list[tuple[str, str]]:
    """Notes on what a column of splits says where the `splits` of the rows do not say it."""
    columns = [split] if split else [name for name in table.columns if re.fullmatch(SPLITS, family(name))]
    columns = [name for name in columns if not re.fullmatch(GOOD, family(name))]  # 'is_valid: False'
    notes = []
    for name in columns:
        unknown = {str(cell) for cell, side in zip(table.columns[name], splits) if cell and not side}
        unknown = sorted(value for value in unknown if not re.search(r"\d", value))  # folds have numbers
        if unknown:
            what = f"column {name!r} says {listed(unknown)}: no split that is known, so these train"
            notes.append(("", f"{table.path}: {what}"))
    return notes


# Entries: what the rows of a table say of its sounds.


def row_captions(table: Table, i: int, columns: list[str]) -> list[str]:
    """What the columns of captions say in row i, each text once."""
    texts = [text for name in columns for text in cell_texts(table.cells(name)[i]) if is_words(text)]
    return list(dict.fromkeys(text.replace("_", " ") for text in texts))


def row_tags(table: Table, i: int, columns: list[str]) -> list[str]:
    """The tags of row i as one sentence: those of the first column that has any; else an empty list."""
    tags: dict[str, dict] = collections.defaultdict(dict)  # {family: tags}: label_1 and label_2 are one
    for name in columns:
        tags[family(name)] |= dict.fromkeys(filter(is_words, cell_texts(table.columns[name][i])))
    sentences = [pseudo_sentence(list(words)) for words in tags.values()]
    return [sentence for sentence in sentences if sentence][:1]


def rejected_rows(table: Table, taken: set) -> set[int]:
    """The rows that some column marks as useless; none, if that were all."""
    rejected, rows = set(), len(next(iter(table.columns.values())))
    for name in table.columns.keys() - taken:
        if not re.fullmatch(f"{VERDICT}|{BAD}|{GOOD}", family(name)):
            continue
        texts, marks = [str(cell).strip().lower() for cell in table.columns[name]], set()
        if re.fullmatch(VERDICT, family(name)):
            marks = {text for text in texts if re.fullmatch(REJECTED, text)}
        elif {*texts} <= {*YES, *NO, "", "none", "nan"}:
            marks = YES if re.fullmatch(BAD, family(name)) else NO
        rejected |= {i for i, text in enumerate(texts) if text in marks}
    return rejected if len(rejected) < rows else set()


def check_moments(table: Table, match: Match):
    """UserError if rows are about moments: several rows of one file with different times."""
    columns = list(map(family, table.columns))
    limits = [name for name in columns if re.match("start|begin|end", name)]
    detections = "confidence" in columns and len(limits) > 1
    for name, cells in table.columns.items():
        times = re.search("(^|_)(onset|offset|start|begin|end|stop)(s|time)?(_|$)", family(name))
        # Without a header, a column of numbers such as 2.5 is one of seconds.
        times = times or (name.isdecimal() and all(re.fullmatch(r"\d+\.\d+", str(cell)) for cell in cells))
        moments = {(path, str(cell)) for path, cell in zip(match.paths, cells) if path and times and cell}
        # Even one is, where Label Studio marked it or a detector says how sure it is.
        region = moments and (family(name).endswith("_value_start") or detections)
        if region or len(moments) > match.distinct:
            what = f"its rows are about moments in the files (column {name!r}), not about whole sounds"
            advice = "cut the files there, or name the columns of words with --words"
            raise UserError(f"{table.path}: {what}; {advice}")


def check_numbers(table: Table, match: Match):
    """Refuse numbers for names where a table beside this one gives other numbers to the sounds: ids."""
    found = {str(cell) for path, cell in zip(match.paths, table.columns[match.column]) if path}
    if match.exact or not all(map(str.isdecimal, found)):
        return
    for path in glob.glob(os.path.join(glob.escape(os.path.dirname(table.path)), "*")):
        if kind_of(path) in TABLES and path != table.path and gives_numbers(path, found, table, match.sounds):
            what = f"{match.column!r} holds numbers, but {path} gives other numbers to the sounds"
            raise UserError(f"{table.path}: {what}; write one table of files and words")


def gives_numbers(path: str, found: set[str], table: Table, sounds: Sounds) -> bool:
    """Does the table at `path` name sounds in one column, and in another give them numbers that are no names:
    those `found` in `table`, or those of a column that both have?"""
    columns: dict[str, list] = {}
    with contextlib.suppress(UserError):
        columns = read_table(path, []).columns
    for cells in columns.values():
        names = [split_path(cell)[1] for cell in cells]
        if not all(stem(name) != name and name_key(name) in sounds.index for name in names):
            continue
        stems = list(map(stem, names))
        for column, ids in columns.items():
            ids = list(map(str, ids))
            numbered = all(map(str.isdecimal, ids)) and len(set(ids)) == len(ids)
            if numbered and ids != stems and (found <= {*ids} or column in table.columns):
                return True
    return False


def check_folders(table: Table, match: Match):
    """Refuse to take dogs/1.wav for cats/1.wav: where files have mere numbers, folders say which they are."""

    def speaks(folder: str) -> bool:
        """Is it called by words that mean something?"""
        words = pseudo_sentence(folder).split()
        return bool(words) and not split_word(folder) and STRUCTURE.isdisjoint(words)

    kinds = {re.sub(r"\d", "", stem(os.path.basename(path))) for path in match.paths if path}
    if len(kinds) > 1 or match.distinct == 1:
        return
    folders = {
        (os.path.basename(split_path(cell)[0]), os.path.basename(os.path.dirname(path)))
        for cell, path in zip(table.columns[match.column], match.paths)
        if path
    }
    differ = all(name_key(a).casefold() != name_key(b).casefold() for a, b in folders)
    if differ and all(speaks(a) and speaks(b) for a, b in folders):
        wanted, there = min(folders)
        what = f"its sounds are in {wanted!r}, which is not here, as if {there!r} were it"
        raise UserError(f"{table.path}: {what}; rename the folder, or say so by --files {match.column}")


def check_quotes(table: Table, match: Match):
    """UserError if a cell holds whole rows, because a quote before them is not closed."""
    place = list(table.columns).index(match.column)
    for cell in itertools.chain(*table.columns.values()) if table.delimiter else []:
        for line in cell.split("\n")[1:]:
            name = split_path((line.split(table.delimiter) + [""] * place)[place])[1]
            if stem(name) != name or name_key(name) in match.sounds.index:
                raise UserError(f"{table.path}: a quote is not closed before the row of {name!r}; close it")


def repeats_names(table: Table, match: Match) -> set[str]:
    """The columns that mostly repeat the sounds' names: 'dog_bark_2' beside dog_bark_2.wav is no caption."""
    names = [name_key(os.path.basename(path)) for path in match.paths]
    known = "|".join(set(PATTERNS) - {"name", "title"})
    usual = {name for name in table.columns if re.fullmatch(known, family(name))}
    repeating = set()
    for column, cells in table.columns.items():
        same = sum(name == str(cell) and " " not in name for name, cell in zip(names, cells) if name)
        if 2 * same > sum(map(bool, names)) > 1:
            repeating.add(column)
    others = any(holds_words(table.columns[name]) for name in usual - repeating)
    return repeating if others else repeating - usual  # a caption may be the name, if there is no other


def name_classes(table: Table, taken: set) -> bool:
    """Write the names of classes over AudioSet's ids, such as /m/0bt9lr, in place; False: nothing says them.

    class_labels_indices.csv does, which lies beside the table or in the folder above."""
    here, names = os.path.dirname(table.path), {}
    for folder in (os.path.dirname(here), here):
        for path in glob.glob(os.path.join(glob.escape(folder), "class_labels_indices*.csv")):
            known = read_table(path, []).columns
            names |= dict(zip(known.get("mid", []), known.get("display_name", [])))
    for column, cells in table.columns.items():
        ids = [re.findall(r"/[mgt]/\w+", str(cell)) for cell in cells]
        if names and any(ids) and column not in taken:
            table.columns[column] = [[names.get(one, "") for one in row] for row in ids]
    return bool(names)


# 'a b.wav: rain falls', or '84-12-3 GO ON' as LibriSpeech has it
NAME_WORDS = re.compile(rf"(?i)\s*(.+?(?:{'|'.join(map(re.escape, AUDIO))})|\S*[\d_]\S*?)\s*[:-]?\s+(.+)")


def with_folders(table: Table) -> Table:
    """Where a column of folders stands beside one of names of files, these with their folders."""
    folders = [name for name in table.columns if re.fullmatch("(sub_?)?(folder|dir|directory)", family(name))]
    columns = dict(table.columns)
    for name, cells in table.columns.items() if len(folders) == 1 else ():
        if all(isinstance(cell, str) and stem(cell) != cell and "/" not in cell for cell in cells):
            columns[name] = [f"{above}/{cell}" for above, cell in zip(table.columns[folders[0]], cells)]
    return replace(table, columns=columns)


def is_row(table: Table, match: Match) -> bool:
    """Is the header a row? Then the column of files is called as a sound of which there is no row, and no
    other column is called as such columns are."""
    if match.column.isdecimal():  # so `csv_table` calls columns that have no header
        return False
    named = match.sounds.index.get(name_key(split_path(match.column)[1]), [])
    usual = any(re.fullmatch(f"{WORDS}|{SPLITS}", family(name)) for name in table.columns)
    return bool(table.delimiter and named) and not usual and not set(named) & set(match.paths)


def table_entries(path: str, flags: Flags, notes: list) -> list[Entry]:
    """The entries of a table; what is left out, and why, goes to notes."""
    try:
        table = with_folders(read_table(path, notes))
        match = find_files(table, flags.files)
    except NoSounds as error:
        lines = [NAME_WORDS.fullmatch(line) for line in read_text(path, []).split("\n") if line.strip()]
        if flags.files or not all(lines):
            raise
        table = Table(path, {"1": [line[1] for line in lines], "2": [line[2] for line in lines]})
        try:
            match = find_files(table, None)
        except NoSounds:
            raise error from None  # which names the table's own columns
    if not flags.files and is_row(table, match):  # then number its columns, as `csv_table` does
        rows = enumerate(table.columns.items(), 1)
        table = Table(path, {str(i): [name, *cells] for i, (name, cells) in rows}, table.delimiter)
        match = find_files(table, None)
    check_quotes(table, match)
    if not flags.files:
        check_numbers(table, match)
        check_folders(table, match)
    if not flags.words:
        check_moments(table, match)
    return join_rows(table, match, flags, notes)


def no_words(table: Table) -> NoWords:
    """What to type, or to write, where no column of a table holds words."""
    cells = map(str, itertools.chain(*table.columns.values()))
    numbers = [name for name in table.columns if re.fullmatch(CLASS_IDS, family(name))]
    hint = ""
    if any(re.search(r"/[mgt]/\w", cell) for cell in cells):
        hint = " (class_labels_indices.csv beside it names ids such as /m/0a)"
    elif sum(set(map(str, cells)) == {"0", "1"} for cells in table.columns.values()) > 1:
        hint = " (0 and 1 are no words: write the names of the columns with 1 into one column, as 'dog;rain')"
    elif numbers:
        hint = f" ({numbers[0]!r} holds no words: write names of classes)"
    what = f"which column holds captions, of {listed(table.columns)}? choose with --words COLUMN"
    return NoWords(f"{table.path}: {what}{hint}")


def join_rows(table: Table, match: Match, flags: Flags, notes: list) -> list[Entry]:
    """An entry for each sound, with the captions of all its rows."""
    split = flags.split or find_splits(table, {match.column, *flags.words})
    splits = column_splits(split, table.cells(split)) if split else place_splits(table.path, match.paths)
    if flags.split and not any(splits):
        raise UserError(f"{table.path}: column {split!r} has no train, val or test, and no folds")
    notes += unknown_splits(table, split, splits)
    words = table
    taken = {match.column, split, *repeats_names(table, match)}
    captions, tags = (flags.words, []) if flags.words else find_words(table, taken)
    if not (captions or tags) and name_classes(table, taken):
        captions, tags = find_words(table, taken)
    if not (captions or tags):  # they may lie beside the sounds
        words = beside_table(match.sounds, match.paths, notes)
        captions, tags = find_words(words, set())
    if not (captions or tags):
        raise no_words(table)
    classes = [name for name in captions + tags if re.fullmatch(CLASSES, family(name))]
    if len(classes) > 1 and family(classes[0]) == family(classes[1]):  # label_1, label_2
        classes = []
    rejected = rejected_rows(table, {match.column, split, *captions, *tags})
    entries: dict[str, Entry] = {}
    by_tags = 0
    media = {os.path.basename(path): path for path in match.sounds.media}
    for i, sound in enumerate(match.paths):
        path, spoken = os.path.join(match.sounds.root, sound), row_captions(words, i, captions)
        texts = spoken or row_tags(words, i, tags)
        if not sound or not texts:
            cell = table.columns[match.column][i]
            unreadable = media.get(split_path(cell)[1])
            missing = (UNREADABLE, unreadable) if unreadable else ("no such sound", str(cell))
            notes.append(("no words", path) if sound else missing)
            continue
        if i in rejected:
            notes.append(("marked as rejected", path))
            continue
        by_tags += bool(captions and not spoken)
        if path not in entries:
            category = str(words.columns[classes[0]][i] or "") if classes else ""
            one = is_words(category) and not re.search(r"[,;|\[]", category)
            entries[path] = Entry(path, [], splits[i], pseudo_sentence(category) if one else "")
        known = entries[path].captions
        known += [text for text in texts if text not in known]
    if not entries:
        what = f"no usable row among {len(splits)}: {listed(captions + tags)} hold no words where a sound is"
        raise UserError(f"{table.path}: {what}; expected captions, or names of classes")
    where = os.path.commonpath(list(map(os.path.dirname, entries)))
    files = f"{table.path}: files from {match.column!r}" if os.path.isfile(table.path) else "sounds"
    columns = captions or tags[:1]
    source = words.what or listed(columns)
    if words.what and columns not in (["caption"], ["category"]):
        source += f", {listed(columns)}"
    said = f"{files} in {where}, words from {source}"
    said += f" (of {by_tags} rows from {listed(tags)})" if by_tags else ""
    told = repr(split) if split else "names" if any(splits) else "nothing"
    notes.append(("", f"{said}, splits from {told}"))
    return list(entries.values())


# Folders: words beside each sound, a table inside, or folders that are classes.

BESIDE = (".caption", ".txt", ".json")  # what is read beside a.wav as a.txt or a.wav.txt

METADATA = re.compile(r"(^|/)metadata\.\w+$")  # Hugging Face: a table of the folder that it lies in

# When an event begins and ends: as Audacity writes it, or as two numbers of samples.
MOMENT = re.compile(r"(\d+[.,]\d+\s+\d+[.,]\d+|\d+\t\d+|0\s+\d{4,}|\[[\d:.,]+ --> [\d:.,]+\])\s+")

# 'Title: rain at night', or 'Rain 0.85' as a classifier writes it.
NAMED_LINE = re.compile(r"([^\W\d_][\w ]{0,20}?)\s*(?:[:=]\s+|[:=]?\s*(?=\d*\.\d+$))(.+)")


def text_row(text: str, name: str) -> dict:
    """The cells in a text beside the sound of this name: captions, what events are called, or named lines."""
    own_name = rf"(?i)^({re.escape(name)}\s*[|\t:,]|{re.escape(stem(name))}\s*[|\t])\s*"
    lines = [re.sub(own_name, "", line) for line in text.split("\n") if line]
    named = [NAMED_LINE.fullmatch(line) for line in lines]
    if lines and all(MOMENT.match(line) for line in lines):
        events = [MOMENT.sub("", line, count=1) for line in lines]
        return {"captions of events": [] if any("\t" in event for event in events) else events}
    if any(line.count("\t") > 1 or re.match(r"\d+(\.\d+)?[,;|]\s*\d", line) for line in lines):
        return {}  # a table is no caption
    if all(named) and len({match[1] for match in named}) == len(named) > 1:
        return {match[1]: match[2] for match in named}
    return {"caption": list(filter(is_words, lines)) or lines} if lines else {}


def places_of_texts(path: str) -> list[tuple]:
    """Keys under which a sound meets its text: beside it, or where one folder is called otherwise.

    So audio/train/a.wav has a text in audio/train/a.txt or in captions/train/a.txt."""
    *folders, name = unicodedata.normalize("NFC", path).casefold().split("/")
    return [(*folders, name), *((i, *folders[:i], *folders[i + 1 :], name) for i in range(len(folders)))]


def beside_table(sounds: Sounds, paths: list[str], notes: list) -> Table:
    """A row for each sound: what a text (a caption a line) or .json of its name says that lies beside it, or
    in a folder of texts beside that of sounds."""
    rows, texts = [], {}
    for path in sounds.others:
        keys = places_of_texts(path) if kind_of(path) in BESIDE else []
        elsewhere = kind_of(path) == ".txt" and not sounds.sizes[os.path.dirname(path)]
        texts |= dict.fromkeys(keys if elsewhere else keys[:1], os.path.join(sounds.root, path))

    def text_of(path: str, kind: str) -> str:
        """The text of this kind that belongs to a sound, or ''."""
        names = (stem(path) + kind, path + kind)
        found = [texts[key] for name in names for key in places_of_texts(name) if key in texts]
        return read_text(found[0], notes) if found else ""

    for path in paths:
        row = {"path": path}
        try:
            said = text_row(text_of(path, ".caption") or text_of(path, ".txt"), os.path.basename(path))
            row |= said or json.loads(text_of(path, ".json") or "{}")
        except (UserError, ValueError, TypeError) as why:
            notes.append(("the text beside it cannot be read", f"{path} ({why})"))
        rows.append(row)
    table = replace(rows_table(sounds.root, rows), what="texts beside them")
    if not all(table.columns.get("captions of events", [])):  # of some sounds: then other words say more
        del table.columns["captions of events"]
    return table


def numbered_folders(paths: Iterable[str]) -> set[str]:
    """Folders that differ from their siblings, or from all that lie as deep, in digits, signs and letters of
    an alphabet only: Actor_01/ and Actor_02/ are no classes, nor are part-a/ and part-b/."""
    groups = collections.defaultdict(set)
    for folder in {folder for path in paths for folder in folders_of(path)}:
        groups[os.path.dirname(folder)].add(folder)
        groups[folder.count("/")].add(folder)
    numbered = set()
    mark = r"[\W_][A-Za-z]$|\d+"
    for folders in groups.values():
        names = list(map(os.path.basename, folders))
        kinds = {re.sub(rf"{mark}|[\W_]", "", name) for name in names}
        if len(kinds) == 1 < len(names) and all(re.search(mark, name) for name in names):
            numbered |= folders
    return numbered


def class_names(paths: list[str]) -> list[str]:
    """For each sound the deepest folder that is called by a word, and not train/, audio/ or fold1/, or ''.

    Where that name lies in several classes, as indoor/ does in dog/ and in cat/, theirs is put before it."""
    no_classes = {*folder_splits(paths), *numbered_folders(paths)}

    def named(folder: str) -> str:
        words = pseudo_sentence(name_key(os.path.basename(folder))).split()
        spoken = [word for word in words if not re.search(r"\d", word) and word not in STRUCTURE]
        is_class = is_words(re.sub("[_.]", " ", os.path.basename(folder))) and spoken
        return " ".join(words) if is_class and folder not in no_classes else ""

    names = {folder: named(folder) for folder in {folder for path in paths for folder in folders_of(path)}}
    unknown = {folder for folder in names if re.fullmatch(UNKNOWN, os.path.basename(folder))}

    def names_above(path: str) -> list[str]:
        """The classes that a sound lies in, the deepest first; below 'unknown' there are none."""
        found = []
        for folder in reversed(folders_of(path)):
            if folder in unknown:
                break
            found.append(names[folder])
        return list(filter(None, found))

    chains = list(map(names_above, paths))
    above = collections.defaultdict(set)  # {the deepest name: the names above it}
    for deepest, *others in filter(None, chains):
        above[deepest] |= set(others[:1])
    divided = set().union(*(parents for parents in above.values() if len(parents) > 1))
    classes = []
    for chain in chains:
        depth = 2 if divided.intersection(chain[1:2]) else 1
        classes.append(" ".join(reversed(chain[:depth])))
    return classes


def table_of_splits(path: str) -> dict[str, str]:
    """{path of a sound: 'train', 'val' or ''} if a table has a column of splits and no words; or {}."""
    with contextlib.suppress(UserError):
        table = read_table(path, [])
        match, column = find_files(table, None), find_splits(table, set())
        if column and find_words(table, {match.column, column}) == ([], []):
            paths = [os.path.join(match.sounds.root, sound) for sound in match.paths]
            return dict(zip(paths, column_splits(column, table.columns[column])))
    return {}


def listed_splits(sounds: Sounds, notes: list) -> tuple[dict[str, str], set[str]]:
    """{path: 'train' or 'val'} of the sounds that lists such as testing_list.txt name, and these lists.

    A list holds a name in each line and nothing else, or is called splits.csv and has no words. What none
    names trains, unless one says what does. Of fold1_test.txt, fold2_test.txt and so on the first counts."""
    splits, lists, first = {}, set(), {}
    files = [path for path in sounds.others if kind_of(path) in TABLES | LISTS | {""}]
    for path in files:
        if kind_of(path) in TABLES and re.search("split|partition|fold", os.path.basename(path).lower()):
            if said := table_of_splits(os.path.join(sounds.root, path)):
                splits |= said
                lists.add(path)
                first[path] = path
    for path, side in train_or_val(path for path in files if split_word(os.path.basename(path))).items():
        full = os.path.join(sounds.root, path)
        with contextlib.suppress(UserError):
            lines = [line for line in read_text(full, []).split("\n") if line.strip()]
            if re.search(r"[,;|\t{]", "".join(lines[:50])):  # a table
                continue
            match = find_files(Table(full, {"name": lines}), "name")
            named = [os.path.join(match.sounds.root, sound) for sound in match.paths if sound]
            if 2 * len(named) >= len(lines):
                lists.add(path)
                if first.setdefault(re.sub(r"fold[ _-]?\d+", "", path.lower()), path) == path:
                    splits |= dict.fromkeys(named, side)
    if lists:
        notes.append(("", f"{sounds.root}: splits from the lists {listed(first.values())}"))
    return splits, lists


def tables_entries(folder: str, tables: list[str], classes: bool, flags: Flags, notes: list) -> list[Entry]:
    """The entries of those tables in a folder that name sounds.

    Where the folders are `classes`, a table without words is about something else, too."""
    read, failed = {}, {}
    for path in tables:
        try:
            read[path] = table_entries(os.path.join(folder, path), flags, notes)
        except UserError as error:
            failed[path] = error
    for path, error in failed.items():
        other = isinstance(error, NoSounds) or (classes and isinstance(error, NoWords))
        other = other or kind_of(path) in LISTS  # such as notes
        if not other and (not read or split_word(path)):
            raise error
        notes.append((NO_TABLE, f"{path} ({error})"))
    words = set(split_words(read).values())
    if all(map(METADATA.search, read)) or ("" not in words and len(words) == len(read)):
        return each_once(folder, list(itertools.chain(*read.values())), notes)
    return joined(folder, read, flags)


def each_once(folder: str, entries: list[Entry], notes: list) -> list[Entry]:
    """The entries of train.csv, test.csv and so on; a sound that several of them name trains only."""
    known: dict[str, Entry] = {}
    twice = set()
    for entry in entries:
        first = known.setdefault(entry.path, entry)
        if first is not entry:
            first.captions += [text for text in entry.captions if text not in first.captions]
            first.split = "train" if "train" in (first.split, entry.split) else first.split
            twice.add(entry.path)
    if twice:
        what = f"{len(twice)} sounds, such as {min(twice)}, are named by several tables"
        notes.append(("", f"{folder}: {what}: if one of these trains, they train only"))
    return list(known.values())


def joined(folder: str, read: dict[str, list[Entry]], flags: Flags) -> list[Entry]:
    """One list of what several tables say, each of which adds sounds or splits. Those whose names differ by a
    word such as 'train' count as one; tags in metadata give way to other words.

    UserError: they do not, or say different things of the same sounds."""

    def kind(path: str) -> str:
        """What a table is called, but for words such as 'train'."""
        return re.sub(r"[^\W\d_]+", lambda word: "" if word[0] in SPLIT_WORDS else word[0], path.lower())

    def holds_tags(path: str) -> bool:
        """Is it metadata without a column of captions?"""
        if flags.words or "metadata" not in path.lower():
            return False
        return not find_words(read_table(os.path.join(folder, path), []), set())[0]

    rows, gives_way = collections.defaultdict(list), {}
    for path, entries_of_path in read.items():
        rows[kind(path)] += entries_of_path
        gives_way[kind(path)] = gives_way.get(kind(path), True) and holds_tags(path)
    says_splits = {name: any(entry.split for entry in part) for name, part in rows.items()}
    places = {path: os.path.join(folder, os.path.dirname(path), "") for path in read}
    # Tables side by side, or each with sounds of its own folder, may be about other sounds each.
    may_differ = len(set(places.values())) == 1 or all(
        entry.path.startswith(places[path]) for path in read for entry in read[path]
    )
    entries: dict[str, Entry] = {}
    for name in sorted(rows, key=lambda name: (gives_way[name], says_splits[name], -len(rows[name]))):
        new = [entry for entry in rows[name] if entry.path not in entries]
        pairs = [(entries[entry.path], entry) for entry in rows[name] if entry.path in entries]
        agree = all(known.captions == entry.captions for known, entry in pairs)
        if pairs:
            fits = not new and (gives_way[name] or (agree and says_splits[name]))
        else:
            fits = may_differ
        if len({entry.path for entry in rows[name]}) < len(rows[name]) or (entries and not fits):
            what = f"holds {len(read)} tables of sounds, {listed(read)}, that do not fit together"
            raise UserError(f"{folder}: {what}; give one, or several")
        for known, entry in pairs:
            known.split = known.split or entry.split
        entries |= {entry.path: entry for entry in new}
    return list(entries.values())


def refuse_unread_words(sounds: Sounds, paths: list[str], others: list[str], classes: list[str]):
    """UserError: a folder holds a file that would say more than the names of folders, and was not read."""
    stems = {stem(path).casefold() for path in paths}
    own = [path for path in sounds.others if path.lower().endswith((".txt", ".csv", ".tsv"))]
    own = [path for path in own if path[:-4].casefold() in stems]
    if 2 * len(own) > len(paths):  # such as tables of events
        raise UserError(f"{sounds.root}: {own[0]} holds no caption that can be read; write one, or a table")
    for path in sounds.others:
        dots = [dot.start() for dot in re.finditer(r"\.", path)]
        if kind_of(path) in BESIDE:
            dots.pop()  # a.txt beside a.wav has been read
        if kind_of(path) in TEXTS and not stems.isdisjoint(path[:dot].casefold() for dot in dots):
            what = f"{path} lies beside a sound, but is not read"
            raise UserError(f"{sounds.root}: {what}; write what it says into a .txt called as the sound")
    texts = [path for path in others if not re.search(NO_WORDS_IN, path.lower())]
    texts = [path for path in texts if kind_of(path) in TEXTS | TABLES | LISTS | NO_TABLES]
    near = [path for path in texts if kind_of(path) in TEXTS and os.path.dirname(path) in sounds.sizes]
    most = 2 * len(set(map(os.path.dirname, near))) > len(sounds.sizes)  # of the folders with sounds have one
    if most or (texts and len(set(classes)) == 1):
        what = f"{(near or texts)[0]} is not read, and may say more than the names of folders"
        raise UserError(f"{sounds.root}: {what}; write a table of files and words, or move it away")
    for path in others:
        name, full = os.path.basename(path).lower(), os.path.join(sounds.root, path)
        has_words = re.search("caption|transcri", name) or METADATA.search(path)
        if name == "text":
            raise UserError(f"{full}: texts as Kaldi has them are not read; write a table of files and texts")
        if kind_of(path) in SHEETS or (kind_of(path) in NO_TABLES and (has_words or not any(classes))):
            read_text(full, [])  # its error says what to do with it
        if kind_of(path) not in TABLES | LISTS:
            continue
        if split_word(name) or "split" in name:  # testing_list.txt
            listed_names = map(name_key, re.split(r"[\s,;|\"'/\\]+", read_text(full, [])))
            if not sounds.index.keys().isdisjoint(listed_names):
                what = f"{path} seems to list a split"
                raise UserError(f"{sounds.root}: {what}; save a table of path, label and split")
        if has_words:
            raise UserError(f"{full} is not understood; python data.py {shell_quote(full)} says why")


def folder_entries(folder: str, flags: Flags, notes: list) -> list[Entry]:
    """The entries of a folder, and what lists of names in it say of their splits."""
    sounds = walk(folder)
    splits, lists = listed_splits(sounds, notes)
    sounds.others = [path for path in sounds.others if path not in lists]
    entries = described_entries(sounds, flags, notes)
    heard = [os.path.join(folder, path) for path in sounds.paths]
    known = {*map(stem, heard), *(stem(what) for why, what in notes if why == UNREADABLE)}
    notes += [(UNREADABLE, path) for path in sounds.media if stem(path) not in known]
    unlisted = "" if "train" in splits.values() or not splits else "train"
    places = place_splits(folder, [entry.path.removeprefix(os.path.join(folder, "")) for entry in entries])
    for entry, place in zip(entries, places):
        entry.split = splits.get(entry.path) or entry.split or unlisted or place
    return entries


def described_entries(sounds: Sounds, flags: Flags, notes: list) -> list[Entry]:
    """The entries of a folder: metadata.csv counts for more than words beside the sounds, these for more than
    other tables, and tables for more than the names of folders."""
    folder = sounds.root
    paths = list({stem(path): path for path in sounds.paths}.values())
    notes += [("the same clip in another format", path) for path in sorted(set(sounds.paths) - set(paths))]
    described = set(map(stem, paths))
    others = [path for path in sounds.others if os.path.splitext(path)[0] not in described]
    tables = [path for path in others if kind_of(path) in TABLES | LISTS]
    tables = [path for path in tables if not re.search(NO_WORDS_IN, path.lower())]
    metadata = [path for path in tables if METADATA.search(path)]
    entries = tables_entries(folder, metadata, False, flags, notes)
    if not entries:
        beside = beside_table(sounds, paths, notes)
        words = flags.words or sum(find_words(beside, {"path"}), [])
        classes, rest = class_names(paths), [path for path in tables if path not in metadata]
        several = len(set(classes) - {""}) > 1
        # Beside folders of classes, what is called a name or a title is one of a file.
        told = not (several and all(classes) and {"name", "title"}.issuperset(map(family, words)))
        here = told and not beside.columns.keys().isdisjoint(words)
        if here:
            entries = join_rows(beside, Match("path", sounds, paths), flags, notes)
        else:
            entries = tables_entries(folder, rest, several, flags, notes)
        if here or (not entries and len(beside.columns) > 1):
            for name in {flags.files, *flags.words} - {None, "path", "category"}:
                beside.cells(name)  # UserError: it is not there
        if not entries:
            return class_entries(sounds, paths, others, classes, flags, notes)
        # Words for a few sounds only may be about something else, such as the sounds that are damaged.
        have_words = {entry.path for entry in entries}
        silent = [name for path, name in zip(paths, classes) if os.path.join(folder, path) not in have_words]
        if 2 * len(entries) < len(paths) and all(silent) and several:
            what = f"there are words for {len(entries)} of {len(paths)} sounds"
            advice = "give their table or folder as the source, or move them elsewhere"
            raise UserError(f"{folder}: {what}, but folders are called like classes; {advice}")
    have_rows = {entry.path for entry in entries}
    left = {os.path.join(folder, path) for path in paths} - have_rows - {what for _, what in notes}
    notes += [("no row of a table", path) for path in sorted(left)]
    return entries


def class_entries(
    sounds: Sounds, paths: list[str], others: list[str], classes: list[str], flags: Flags, notes: list
) -> list[Entry]:
    """The entries of a folder in which nothing but the names of folders, `classes`, says what sounds."""
    refuse_unread_words(sounds, paths, others, classes)
    told = {path for path in others if kind_of(path) in TABLES | LISTS}
    unread = [path for path in sounds.others if kind_of(path) not in OTHER_MEDIA and path not in told]
    notes += [("not understood", path) for path in unread]
    if not any(classes):
        what = f"no words for its {len(classes)} sounds" if classes else "no usable sound"
        unread = [what for why, what in notes if why == NO_TABLE]
        what += f" ({unread[0]})" if unread else ""
        what += "; expected clip.txt beside clip.wav, folders of classes"
        raise UserError(f"{sounds.root}: {what}, or a table; if it lies elsewhere, give it as the source")
    what = "no table of sounds and no texts that are understood, so the names of folders are categories"
    what += f"; all sounds are called {classes[0]!r}" if len(set(classes)) == 1 else ""
    notes.append(("", f"{sounds.root}: {what}"))
    table = Table(sounds.root, {"path": paths, "category": classes}, what="names of folders")
    return join_rows(table, Match("path", sounds, paths), flags, notes)


def read_captions(source: str) -> list[tuple[str, list[str]]]:
    """[(path, [caption, ...]), ...] of a table or folder."""
    return [(entry.path, entry.captions) for entry in read_entries(source)]


# ----------------------------------------------------------------------------------------------------------
# Preparation: decode everything once into one file of int16 samples that training maps into memory.

FORMAT = 8  # raise it when what is written changes: everything is then prepared anew


@dataclass
class Clip:
    """One prepared recording and what is known of it."""

    name: str  # its path, seen from the folder that holds all sounds of the source
    captions: list[str]
    category: str  # the class of its sound, or '' where the source does not say
    split: str  # 'train', 'val', or '' where the source does not say; see `choose_splits`
    length: int  # samples
    peak: float  # of the whole clip, 0 to 1
    samples: np.ndarray  # (T,) int16, a part of the memory map: read from disk when it is used


def prepare(source: str, folder: str, log: Callable = print, **columns) -> list[Clip]:
    """Decode `source` into a folder of its own below `folder`, or find it there if nothing has changed since.

    `columns` are the options of `read_entries`. UserError: nothing can be read, or there is no space."""
    left_out: list[str] = []
    try:
        entries = read_entries(source, log, **columns, left_out=left_out)
    except UserError as error:
        shows = f"; python data.py {shell_quote(source)} shows how it is read"
        raise UserError(f"{error}{shows if os.path.exists(source) else ''}") from None
    name = f"{os.path.basename(os.path.abspath(source)).split('.')[0][:40]}-{fingerprint(entries)}"
    final, part = os.path.join(folder, name), os.path.join(folder, name + ".part")
    if not os.path.exists(final):
        began = time.time()
        try:
            os.makedirs(part, exist_ok=True)  # a run that was killed may have left it
            details = decode_all(entries, part, source, left_out)
            os.rename(part, final)
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"{folder}: {why}; make space or choose another --out") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
        log("\n".join([*details, f"{source}: prepared in {time.time() - began:.0f} s"]))
    said, clips = read_prepared(final)
    log(said)
    return clips


def fingerprint(entries: list[Entry]) -> str:
    """A hash of all that preparation depends on: the entries, and size and time of every file."""
    stats = [os.stat(entry.path) if os.path.exists(entry.path) else None for entry in entries]
    files = [stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]
    return hashlib.sha256(ascii((FORMAT, entries, files)).encode()).hexdigest()[:12]


def write_samples(path: str, file) -> tuple[int, float]:
    """Append the sound in `path` to an open binary file as int16; returns its length and its peak.

    Some float files are louder than full scale: these are turned down as a whole, not clipped, for which
    they are decoded a second time. UserError: it cannot be decoded, or is silent."""
    begin, gain = file.tell(), 1.0
    while True:
        peak = 0.0
        for block in without_opening_silence(read_blocks(path)):
            peak = max(peak, block.abs().max().item())
            file.write((gain * block).clamp(-1, 1).mul(32767).round().short().numpy())
        if gain * peak <= 1:
            break
        gain = 1 / peak
        file.truncate(file.seek(begin))
    if peak < SILENCE:
        raise UserError(f"{path}: silent")
    return (file.tell() - begin) // 2, peak


def without_opening_silence(blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Blocks (T,) of a sound from 50 ms before its first sample that is not silent.

    Files are padded with silence; a model would learn that its word begins so, and stay silent."""
    before = torch.zeros(0)
    for block in blocks:
        before = torch.cat((before, block))
        heard = (before.abs() >= SILENCE).nonzero()
        if len(heard):
            yield before[max(0, heard[0].item() - SAMPLE_RATE // 20) :]
            break
        before = before[-(SAMPLE_RATE // 20) :]
    yield from blocks


def decode_all(entries: list[Entry], folder: str, source: str, unread: list[str]) -> list[str]:
    """Write into `folder` the samples of all clips, their index, and a list of what is left out, after what
    was `unread` before. Returns lines about what is left out or turned down."""
    root = os.path.commonpath([os.path.dirname(entry.path) for entry in entries])
    clips: list[dict] = []
    left_out, loud = [], []
    with open(os.path.join(folder, "audio.i16"), "wb") as audio:
        for entry in tqdm(entries, f"preparing {source}", unit="clip", disable=None):
            begin = audio.tell()
            try:
                length, peak = write_samples(entry.path, audio)
            except UserError as error:  # a full disk is none: it ends the loop
                left_out.append(str(error))
                audio.truncate(audio.seek(begin))
                continue
            if peak > 1.12:  # by more than 1 dB: decoded MP3 and Ogg files often exceed it by a little
                loud.append(f"{entry.path}: {20 * math.log10(peak):.1f} dB above full scale")
            about = {"name": os.path.relpath(entry.path, root), "captions": entry.captions}
            about |= {"category": entry.category, "split": entry.split}
            clips.append(about | {"length": length, "peak": min(1, peak)})
    if not clips:
        raise UserError(f"{source}: none of its {len(entries)} sounds can be used; the first: {left_out[0]}")
    said = summary(source, clips)
    if unread + left_out + loud:
        said += f"; {len(unread + left_out)} left out, {len(loud)} turned down: see left_out.txt, below --out"
    with open(os.path.join(folder, "left_out.txt"), "w", encoding="utf-8") as file:
        file.writelines(printable(line) + "\n" for line in unread + left_out + loud)
    with open(os.path.join(folder, "index.json"), "w") as file:
        json.dump({"summary": said, "clips": clips}, file)
    return [*shortened("left out", left_out), *shortened("turned down", loud)]


def as_time(seconds: float) -> str:
    """As people say it: '1.3 s', '12.5 minutes', '3.2 hours'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def summary(source: str, clips: list[dict]) -> str:
    """One line: how much there is, and how long the clips are."""
    seconds = sorted(clip["length"] / SAMPLE_RATE for clip in clips)
    captions = {caption for clip in clips for caption in clip["captions"]}
    return (
        f"{source}: {as_time(sum(seconds))}, {len(clips)} clips, {len(captions)} distinct captions, "
        f"{seconds[0]:.1f} / {seconds[len(clips) // 2]:.1f} / {seconds[-1]:.1f} s shortest / median / longest"
    )


def read_prepared(folder: str) -> tuple[str, list[Clip]]:
    """The summary and the clips of a prepared folder. UserError: something has damaged it since."""
    try:
        with open(os.path.join(folder, "index.json")) as file:
            index = json.load(file)
        ends = np.cumsum([clip["length"] for clip in index["clips"]])
        samples = np.asarray(np.memmap(os.path.join(folder, "audio.i16"), np.int16, "r"))
        if len(samples) != ends[-1]:
            raise ValueError("the length of audio.i16 is not the sum of its clips")
    except (OSError, KeyError, ValueError):
        raise UserError(f"{folder}: was damaged; delete this folder, and it is prepared anew") from None
    parts = np.split(samples, ends[:-1])
    return index["summary"], [Clip(**clip, samples=part) for clip, part in zip(index["clips"], parts)]


# ----------------------------------------------------------------------------------------------------------
# Crops and mixing: what training hears.

# Eight pairs of everyday sounds that no training example joins: a model that can play them together has
# learnt to compose. Each of these categories has plenty of clips in sounds/ to be learnt from alone.
PAIRS = "dog & clock tick, dog & sea waves, rain & baby cry, fire & helicopter, bird & chainsaw"
PAIRS += ", rooster & sea waves, rooster & helicopter, sneeze & footsteps"
HELD_OUT_PAIRS = {frozenset(pair.split(" & ")) for pair in PAIRS.split(", ")}


def mix(a: torch.Tensor, b: torch.Tensor, snr_db: float, offset: int) -> torch.Tensor:
    """Lay b over a, `offset` samples later (or earlier), scaled so that a's mean power is snr_db above b's.

    Waves (T,) in [-1, 1]; the result is as long as a. What b has before and after a is cut off; a sum beyond
    [-1, 1] is turned down as a whole (section 3.2)."""
    power_a, power_b = a.square().mean(), b.square().mean()
    if power_a > 0 and power_b > 0:  # silence has no SNR
        b = b * (power_a / power_b * 10 ** (-snr_db / 10)).sqrt()
    y, start, end = a.clone(), max(0, offset), min(len(a), offset + len(b))
    if end > start:
        y[start:end] += b[start - offset : end - offset]
    return turned_down(y)


def may_mix(a: Clip, b: Clip) -> bool:
    """Not a clip with itself, and not the categories of HELD_OUT_PAIRS."""
    return a is not b and frozenset((a.category, b.category)) not in HELD_OUT_PAIRS


@dataclass
class Crop:
    """A piece of a clip, as training hears it."""

    clip: Clip
    begin: int  # sample of the clip at which it begins; below 0 where silence comes first
    wave: torch.Tensor  # (T,) float32
    caption: str


def read_crop(clip: Clip, length: int, begin: int = 0) -> torch.Tensor:
    """(length,) float32 of a clip from sample `begin` on; zeros lie before and after it."""
    samples = clip.samples[max(0, begin) : max(0, begin + length)]
    front = min(length, max(0, -begin))
    wave = np.pad(samples, (front, length - front - len(samples)))
    return torch.from_numpy(wave.astype(np.float32)).div_(32767)


class AudioData:
    """All sources as one list of clips, from which training draws crops.

    Of 'a.csv:2' and 'b.csv' the first is drawn twice as often; without weights, each by what it holds. Within
    a source, see `drawing_chances`."""

    def __init__(self, sources: list[str], folder: str, log: Callable = print, **columns):
        sources = [sources] if isinstance(sources, (str, os.PathLike)) else sources
        names, weights = zip(*map(split_weight, sources))
        parts = [prepare(name, folder, log, **columns) for name in names]
        choose_splits(parts)
        self.clips = [clip for part in parts for clip in part]
        self.train = [clip for clip in self.clips if clip.split != "val"]
        self.val = [clip for clip in self.clips if clip.split != "train"]
        if not self.train:
            raise UserError(f"{' '.join(sources)}: all clips are for testing; name training clips as well")
        both = any(clip.split == "both" for clip in self.clips)
        note = " (the only clip of a source does both)" if both else ""
        log(f"clips: {len(self.train)} train, {len(self.val)} validate{note}")
        self.sources = [(self.train, 1.0)]  # lists of clips, and how often each is drawn
        if any(weights):
            train = [[clip for clip in part if clip.split != "val"] for part in parts]
            self.sources = [(part, weight or 1.0) for part, weight in zip(train, weights)]
        self.cumulative: dict[int, np.ndarray] = {}  # by the length of the crops, see `chances`

    @classmethod
    def from_flags(cls, args, log: Callable = print) -> "AudioData":
        """What `add_training_flags` asked for, prepared below --out."""
        return cls(args.data, args.out, log, **{name: getattr(args, name) for name in COLUMN_FLAGS})

    def chances(self, length: int) -> np.ndarray:
        """For crops of `length` samples, the chance that one of the first n training clips is drawn (n,)."""
        if length not in self.cumulative:
            parts = [weight * drawing_chances(clips, length) for clips, weight in self.sources if clips]
            chance = np.concatenate(parts)
            self.cumulative[length] = np.cumsum(chance / chance.sum())
        return self.cumulative[length]

    def draw(self, length: int, rng: np.random.Generator, min_level: float = 0.0, partner=None) -> Crop:
        """A random crop of a random training clip, and one of the clip's captions. A short clip sounds within
        the first tenth of its crop, and silence follows: a word is not to be answered by silence first.

        It is drawn again, up to 19 times, if it is silent, if it may not be mixed with the clip `partner`, or
        if it stays below `min_level` times the peak of its clip: the event that the caption names is then
        likely elsewhere in the clip."""
        for _ in range(20):
            clip = self.train[np.searchsorted(self.chances(length)[:-1], rng.random(), "right")]
            spare = clip.length - length
            least = 0 if spare >= 0 else max(spare, -(length // 10))
            begin = int(rng.integers(least, max(0, spare) + 1))
            wave = read_crop(clip, length, begin)
            allowed = partner is None or may_mix(clip, partner)
            if allowed and wave.abs().max() >= max(SILENCE, min_level * clip.peak):
                break
        return Crop(clip, begin, wave, pick(clip.captions, rng))

    def batch(self, n: int, length: int, rng: np.random.Generator, mix_share: float = 0.0, min_level=0.0):
        """n random crops of `length` samples as a list of `Crop`; a share of them is mixed in pairs.

        The paper's augmentation (section 3.2): at a random offset, at least half overlapping, at an SNR of -5
        to 5 dB, with the captions joined."""
        crops = []
        for _ in range(n):
            crop = self.draw(length, rng, min_level)
            if rng.random() < mix_share:
                other = self.draw(length, rng, min_level, partner=crop.clip)
                if may_mix(crop.clip, other.clip):  # else twenty draws found no partner
                    offset = int(rng.integers(-(length // 2), length // 2 + 1))
                    wave = mix(crop.wave, other.wave, rng.uniform(-5, 5), offset)
                    crop = replace(crop, wave=wave, caption=f"{crop.caption} and {other.caption}")
            crops.append(crop)
        return crops

    def held_out(self, length: int, limit: int | None = None) -> tuple[torch.Tensor, list[Clip]]:
        """The same validation clips at every call, from their beginning: waves (n, length), and the clips.

        With a limit that many of them, evenly spaced."""
        n = min(limit or len(self.val), len(self.val))
        clips = [self.val[i * len(self.val) // n] for i in range(n)]
        return torch.stack([read_crop(clip, length) for clip in clips]), clips


def drawing_chances(clips: list[Clip], length: int) -> np.ndarray:
    """How likely each clip of a source is drawn for crops of `length` samples (n,).

    A clip counts as many times as it fills a crop, but at least once: by length alone, doors and knocks would
    hardly ever be drawn beside rain. Within a source, a category is drawn by the square root of its count:
    with four times as many crops twice as often, so that rare categories are learnt, too."""
    crops = np.maximum([clip.length for clip in clips], length) / length
    _, category = np.unique([clip.category for clip in clips], return_inverse=True)
    chance = crops / np.sqrt(np.bincount(category, crops))[category]
    return chance / chance.sum()


def choose_splits(parts: list[list[Clip]]) -> None:
    """Set `split` of every clip of every source to 'train' or 'val' ('both' for a single clip), in place.

    If a source says nothing, a tenth of it validates; so, too, if all of it trains and no other source
    validates. The tenth depends on names and lengths of the clips only, not on --seed or folders: neither
    model may validate on clips that the other one is trained on."""

    def lot(clip: Clip) -> list[bytes]:
        """Hashes to sort by: an order that is as good as random, but the same in every run."""
        known = ((os.path.basename(clip.name), clip.length), clip.name)
        return [hashlib.sha256(ascii(each).encode()).digest() for each in known]

    validates = [any(clip.split == "val" for clip in part) for part in parts]
    for part, said in zip(parts, validates):
        by_lot = sorted(part, key=lot)
        by_lot.sort(key=lambda clip: clip.split == "train")  # what is said to train validates last of all
        all_train = all(clip.split == "train" for clip in part)
        tenth = 0 if said or (all_train and any(validates)) else max(1, round(len(part) / 10))
        for i, clip in enumerate(by_lot):
            clip.split = "val" if clip.split == "val" or i < tenth else "train"
        if tenth == len(part):
            part[0].split = "both"


def split_weight(source: str) -> tuple[str, float | None]:
    """'a.csv:2' to ('a.csv', 2.0); without a weight, or where a file of that whole name exists, None."""
    source = os.fspath(source)
    match = re.fullmatch(r"(.+):(-?\d*\.?\d+)", source)
    if not match or os.path.exists(source):
        return source, None
    if float(match[2]) <= 0:
        raise UserError(f"{source}: expected a weight above 0 after the colon")
    return match[1], float(match[2])


def mixtures(clips: list[Clip], length: int, held_out: bool, n: int, seed: int = 0) -> list[tuple]:
    """Test of composition: n mixtures of two validation clips whose categories are in HELD_OUT_PAIRS or not.

    Returns [(wave (length,), true caption, wrong caption), ...]; the wrong caption names another sound in
    place of one of the two. An empty list where there are no such clips."""
    names = sorted({name for pair in HELD_OUT_PAIRS for name in pair})
    by_name = {name: [clip for clip in clips if clip.category == name] for name in names}
    names = [name for name in names if by_name[name]]
    pairs = [p for p in itertools.permutations(names, 2) if (frozenset(p) in HELD_OUT_PAIRS) == held_out]
    if not pairs or len(names) < 3:
        return []
    rng, made = np.random.default_rng(seed), []
    for _ in range(n):
        pair = pick(pairs, rng)
        absent = [name for name in names if name not in pair]
        first, second, other = (pick(by_name[name], rng) for name in (*pair, pick(absent, rng)))
        offset = int(rng.integers(-(length // 4), length // 4 + 1))
        wave = mix(read_crop(first, length), read_crop(second, length), rng.uniform(-5, 5), offset)
        said = [first.captions[0], second.captions[0]]
        true = " and ".join(said)
        said[rng.integers(2)] = other.captions[0]
        made.append((wave, true, " and ".join(said)))
    return made


def pick(items: list, rng: np.random.Generator):
    """One of the items, all as likely."""
    return items[rng.integers(len(items))]


# ----------------------------------------------------------------------------------------------------------
# The tokenizer


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case and in their order, each once."""
    words = re.sub(r"[\d_']", " ", pseudo_sentence(text)).split()
    return list(dict.fromkeys(words))


class Tokenizer:
    """Captions to ids: SentencePiece's BPE, lower case, bytes for what it has never seen; 0 is padding.

    BPE, since SentencePiece's unigram model never grows to whole words on a few captions."""

    def __init__(self, model: bytes | torch.Tensor):
        """model: what `train` made, or the uint8 tensor of `to_tensor`. UserError: it is damaged."""
        self.model = bytes(model.tolist()) if isinstance(model, torch.Tensor) else model
        # SentencePiece may crash over damaged bytes instead of complaining: a checksum goes before the model.
        if len(self.model) < 5 or zlib.crc32(self.model[4:]) != int.from_bytes(self.model[:4], "little"):
            raise UserError("the tokenizer's model is damaged; take the checkpoint from its source again")
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=self.model[4:])
        self.vocab_size, self.encode = self.pieces.vocab_size(), self.pieces.encode

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn about `vocab_size` pieces from captions: fewer if these are few, more if they have more
        characters, and always all 256 bytes."""
        # SentencePiece takes no line that holds U+2585, its mark of what is unknown.
        lines = sorted({" ".join(c.replace("\u2585", " ").split())[:1000] for c in captions})
        characters = set(unicodedata.normalize("NFKC", "".join(lines)).casefold())
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            byte_fallback=True,
            vocab_size=max(vocab_size, 300 + len(characters)),
            hard_vocab_limit=False,
            normalization_rule_name="nmt_nfkc_cf",
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            num_threads=1,
            minloglevel=2,
        )
        return cls(zlib.crc32(model.getvalue()).to_bytes(4, "little") + model.getvalue())

    def batch(self, captions: list[str], max_len: int) -> torch.Tensor:
        """Captions -> (B, max_len) int64 ids, padded with 0; what is longer than that is cut."""
        captions = [captions] if isinstance(captions, str) else captions
        rows = [self.encode(caption)[:max_len] for caption in captions]
        return torch.tensor([row + [0] * (max_len - len(row)) for row in rows])

    def to_tensor(self) -> torch.Tensor:
        """The model as bytes in a tensor, which a checkpoint can hold: (bytes,) uint8."""
        return torch.tensor(list(self.model), dtype=torch.uint8)


# ----------------------------------------------------------------------------------------------------------
# What the three scripts share. It lives here because nothing imports a script.

SOUNDS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sounds", "clips.csv")  # the default data
COLUMN_FLAGS = ("files", "words", "split_column")  # they overrule what is guessed of a table


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like all others; --num-samples is --num_samples, too."""

    def parse_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        for i, word in enumerate(words):
            if word.startswith("--"):
                flag, equals, value = word.partition("=")
                words[i] = "--" + flag[2:].replace("-", "_") + equals + value
        parsed_args = super().parse_args(words, namespace)
        for name, value in vars(parsed_args).items():
            if value == "" != self.get_default(name):
                raise UserError(f"--{name} is empty: is a variable of the shell not set?")
        return parsed_args

    def error(self, message):
        is_word = "sample" in self.prog and re.match("unrecognized arguments: [^-]", message)
        quotes = '; a prompt is typed as --prompt "a dog barks"' if is_word else ""
        raise UserError(f"{message}{quotes}; type python {self.prog} --help for all flags")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that both training scripts have: on what to train, how long, and where."""
    add = parser.add_argument
    what = "tables or folders, each with an optional :WEIGHT (default: the recordings in sounds/)"
    add("--data", nargs="+", action="extend", help=what)
    add_column_flags(parser)
    add("--seed", type=whole_number, help="of all that is random (default: 0)")
    add("--steps", type=positive, help="training steps (default: by size)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--threads", type=positive, help="of a CPU (default: all, or one where that is faster)")
    add("--resume", action="store_true", help="go on with the run in --out, with --steps for longer")
    add("--eval_only", action="store_true", help="measure the model in --out and stop")


def add_column_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that overrule what is guessed of a table."""
    add = parser.add_argument
    add("--files", metavar="COLUMN", help="column that names the sound files (default: found by content)")
    add("--words", metavar="COLUMN[,COLUMN]", help="columns of captions (default: found by name and content)")
    add("--split_column", metavar="COLUMN", help="column that says train, val or test (default: found)")


def recall_flags(args, saved: dict) -> dict:
    """What a run trains on: flags as they are typed, else as in the run whose checkpoint was `saved`, else by
    default. They are set in args. Returns those that were not left out, for the next checkpoint."""
    if saved and "flags" not in saved:
        raise UserError(f"{args.out}: its run is of another version: choose another --out for a new one")
    if saved and args.steps and args.steps < saved["step"]:
        raise UserError(f"--steps {args.steps}: {saved['step']} are done already; type more")
    before = saved.get("flags", {})
    if args.data:  # of other data, other columns
        before = {name: value for name, value in before.items() if name not in COLUMN_FLAGS}
    defaults = {"data": [SOUNDS], "seed": 0, "mix": 0.5} | dict.fromkeys(("batch", "micro", *COLUMN_FLAGS))
    typed = {name: value for name, value in vars(args).items() if value is not None}
    flags = {name: value for name, value in (before | typed).items() if name in defaults}
    vars(args).update(defaults | flags)
    for source in () if "data" in typed else args.data:
        if not os.path.exists(split_weight(source)[0]):
            raise UserError(f"{source}: the run in {args.out} trains on this, which is not here; type --data")
    return flags


def data_command(args) -> str:
    """The flags that name the data and --out, as they have to be typed for another script."""
    said = [] if args.data == [SOUNDS] else ["--data", *args.data]
    for name in COLUMN_FLAGS:
        if vars(args)[name]:
            said += ["--" + name.replace("_", "-"), vars(args)[name]]
    said += [] if args.out == "out" else ["--out", args.out]
    return "".join(" " + shell_quote(word) for word in said)


def file_name(text: str) -> str:
    """A text as part of a file's name: letters and digits, at most 60."""
    return "".join(c if c.isalnum() else "_" for c in text)[:60]


def shell_quote(text: str) -> str:
    """A word as it has to be typed."""
    return shlex.quote(text) if os.name == "posix" else f'"{text}"'


def whole_number(text: str, least: int = 0) -> int:
    """An argparse type: a whole number from `least` to 2^62."""
    if not text.isdecimal() or not least <= int(text) < 2**62:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least} and below 2^62")
    return int(text)


positive = functools.partial(whole_number, least=1)  # likewise: 1, 2, ...


# No space, quota used up, file too large, damaged disk: Python does not say which file it was.
DISK_ERRORS = [getattr(errno, name, -1) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO")]


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception]):
    """Around main(): errors that the user can fix end in one line and exit code 2, bugs in a traceback.

    The former are UserError, the `kinds` given, lack of memory, and OSErrors that name a file."""
    for name in ("stdout", "stderr"):
        # There is none under pythonw, and after >&-.
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 (until the program ends)
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):  # a letter that a terminal lacks is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()  # here, where a reader that has gone away is no traceback yet
        return
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has gone away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, *kinds) as error:
        text = " ".join(str(error).split())
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate", str(error)):
            raise
        text = "out of memory; to train, lower --batch (train_lm.py: --micro) or --size, to sample --seconds"
    except OSError as error:
        if not error.filename and error.errno not in DISK_ERRORS:
            raise
        text = f"{error.filename or 'writing'}: {error.strerror}"
    rank = int(os.environ.get("RANK", "0"))  # of this process, under torchrun
    print(f"error{f' in process {rank}' if rank else ''}: {text}", file=sys.stderr)
    sys.exit(2)


def pick_device(name: str = "auto") -> torch.device:
    """'auto', 'cpu', 'cuda', 'cuda:1' or 'mps' -> a device that exists here. UserError: it does not."""
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.cuda.is_available():
        there.append("cuda")
    if torch.backends.mps.is_available():
        there.append("mps")
    if name == "auto":
        name = "cuda" if "cuda" in there else "cpu"
    if name not in there:
        raise UserError(f"--device {name}: not a device of this machine; it has {', '.join(there)}")
    return torch.device(name)


def now(device: torch.device) -> float:
    """The time in seconds, once the device has done all that it was told to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs (from Ampere on) and processors that multiply it natively, else float32."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and native and native()
    return torch.bfloat16 if fast else torch.float32


def choose_threads(asked: int | None, device: torch.device, work: Callable, say: Callable) -> None:
    """Set how many threads a CPU uses: as many as asked; else all, or one where `work` is done sooner by one.

    Threads wait for each other after every operation. Where another program holds one of the cores, all of
    them wait for that core: two threads then took thirteen times as long as one."""
    every = torch.get_num_threads()
    if asked or every == 1 or device.type != "cpu":
        torch.set_num_threads(min(asked or every, max(every, os.cpu_count() or 1)))
        return
    work()  # the first call sets things up
    seconds = {every: 0.0, 1: 0.0}
    for n in (every, 1, every, 1):
        torch.set_num_threads(n)
        began = time.perf_counter()
        work()
        seconds[n] += time.perf_counter() - began
    best = min(seconds, key=seconds.get)
    torch.set_num_threads(best)
    if seconds[every] > 1.5 * seconds[1]:  # less may be a small model, or chance
        say(f"! one thread is {seconds[every] / seconds[1]:.1f} times as fast as {every}: the cores are busy")


def can_compile(device: torch.device) -> bool:
    """Does torch.compile work here? It wants Triton, which Windows lacks, and a GPU from Volta on."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (7, 0)


def autocast(device: torch.device) -> torch.autocast:
    """Around a model's forward pass: the fast number format for what tolerates it."""
    dtype = fast_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices: momentum, then a step of the same size in all its directions.

        m = .95 m + .05 g;    w = (1 - lr * weight_decay) w - lr * .2 sqrt(max(rows, columns)) * U V^T

    where U S V^T is the nesterov momentum .95 m + .05 g. The factor gives the step the size of Adam's
    (arXiv 2502.16982). Written out, for PyTorch's own (torch.optim.Muon) always multiplies in bfloat16, which
    takes 80 times as long on a processor that cannot: a step of the codec took 9.5 s there instead of 2."""

    def __init__(self, params, lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One step for every matrix (rows, columns) that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                direction = orthogonalize(p.grad.lerp(momentum, 0.95))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonalize(g: torch.Tensor) -> torch.Tensor:
    """About U V^T of g = U S V^T (rows, columns), by five Newton-Schulz steps: singular values near 1.

        x <- a x + b (x x^T) x + c (x x^T)^2 x      with a = 3.4445, b = -4.7750, c = 2.0315

    Of a long matrix, all five are one polynomial of the small x x^T, times x: far fewer products. In 16 bits
    their rounding would add up to more than the smallest singular values."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = (x / x.norm().clamp(min=1e-7)).to(fast_dtype(g.device))
    long = x.dtype == torch.float32 and x.shape[1] >= 2 * x.shape[0]
    y, gram = (torch.eye(len(x), device=x.device) if long else x), x @ x.T
    for i in range(5):
        step = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        y = torch.addmm(y, step, y, beta=3.4445)
        if long:
            step.diagonal().add_(3.4445)
        if i < 4:
            gram = step @ gram @ step if long else y @ y.T
    x = y @ x if long else y
    return (x.T if g.shape[0] > g.shape[1] else x).to(g.dtype)


def set_lr(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Give all groups of all optimizers the same learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def file_in(path: str, name: str) -> str:
    """The path, or where it is a folder the file of this name in it. `pretrained` is found from anywhere."""
    if path.rstrip("/") == "pretrained" and not os.path.exists(path):
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pretrained")
    return os.path.join(path, name) if os.path.isdir(path) else path


def lock_folder(folder: str):
    """Make `folder` and hold it for as long as what is returned is kept: two runs would undo each other."""
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, ".lock"), "a")  # noqa: SIM115 (it stays open)
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror}); choose another --out") from None
    try:
        import fcntl  # not on Windows, where nobody is stopped

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another run is writing there; wait, or choose another --out") from None
    except (ImportError, OSError):  # some network drives cannot lock: nobody is stopped there either
        pass
    return file


def save_atomic(obj: object, path: str) -> None:
    """torch.save by way of `write_atomic`."""
    whole = io.BytesIO()
    torch.save(obj, whole)  # not to the file: torch reports a full disk as if it were a bug
    write_atomic(whole.getbuffer(), path)


def write_atomic(content: bytes | memoryview, path: str, part: str = "") -> None:
    """Write a file by way of a temporary one, `part`: whatever happens, `path` holds the old or the new."""
    part = part or path + ".tmp"
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(part)
        why = error.strerror or "is the disk full?"
        raise UserError(f"{path}: cannot save ({why}); free some space or choose another folder") from None


def start_processes(device_name: str) -> tuple[torch.device, int, int]:
    """(device, rank, world size): this process among those that torchrun started, or (device, 0, 1)."""
    device, world_size = pick_device(device_name), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # The others wait while the first one prepares the data, however long that takes.
    patience = datetime.timedelta(days=1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    atexit.register(dist.destroy_process_group)  # else its threads may abort a process that ends
    return device, dist.get_rank(), world_size


def mean_over_processes(tensors) -> None:
    """Replace each tensor by its mean over all processes, in place."""
    if not dist.is_initialized():
        return
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([x.numel() for x in tensors])
    for x, mean in zip(tensors, parts):
        x.copy_(mean.view_as(x))


def first_then_all(make: Callable):
    """make() in process 0 and only then in the others, which find on disk what it prepared.

    If it fails by the user's fault, all raise that, and `one_line_errors` lets process 0 alone say it."""
    if not dist.is_initialized():
        return make()
    result, failed = None, [None]
    if dist.get_rank() == 0:
        try:
            result = make()
        except UserError as error:
            failed = [error]
    dist.broadcast_object_list(failed, 0)
    if failed[0]:
        raise failed[0]
    return result or make()


class Say:
    """print() to one stream, above a progress bar. If whoever reads it has gone away, the rest is dropped."""

    def __init__(self, stream):
        self.stream = stream

    def __call__(self, text: str):
        try:
            tqdm.write(text, file=self.stream)
            self.stream.flush()
        except OSError:
            self.stream = open(os.devnull, "w")  # noqa: SIM115 (until the program ends)


class Stopper:
    """Turns Ctrl-C, SIGTERM and a closed terminal into a flag: the loop ends its step, saves, says where. A
    second one kills."""

    def __init__(self):
        self.signal = None
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks for
                signal.signal(number, self.catch)

    def catch(self, number, frame):
        """The signal handler."""
        if self.signal and number != getattr(signal, "SIGHUP", None):  # which comes twice
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def end(self, step: int, resume_path: str, say: Callable) -> NoReturn:
        """Say where the run was saved, and leave with an exit code that keeps `&&` from going on. (Under
        torchrun with 0: it would report anything else as a crash.)"""
        how = "to go on, type the same command and --resume"
        say(f"{self.signal or 'stopped'}: saved step {step} to {resume_path}; {how}")
        sys.exit(0 if dist.is_initialized() else 130)

    def asked(self, device: torch.device) -> bool:
        """Has any process been asked to stop? All must know, or they would wait for the one that left."""
        flag = torch.tensor(float(self.signal is not None), device=device)
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


def count_bad_steps(bad: int, step: int, resume_path: str, say: Callable) -> int:
    """One more step whose gradient was not finite: how many in a row. UserError: ten are enough."""
    if bad + 1 == 10:
        then = f"--resume from {resume_path}" if os.path.exists(resume_path) else "start again"
        raise UserError(f"{bad + 1} steps in a row were not finite: lower lr in RECIPES and {then}")
    say(f"step {step}: the gradient is not finite; step skipped ({bad + 1} in a row)")
    return bad + 1


class Clock:
    """Measures the speed of training; evaluation and saving are left out."""

    def __init__(self, step: int):
        self.step, self.began = step, time.time()

    def steps_per_second(self, step: int) -> float:
        """Since the last call."""
        speed = (step - self.step) / (time.time() - self.began)
        self.step, self.began = step, time.time()
        return speed

    @contextlib.contextmanager
    def paused(self):
        """Around what is not training."""
        paused_at = time.time()
        yield
        self.began += time.time() - paused_at


def log_rows(path: str) -> list[dict]:
    """The rows of a log; none where there is no log, or a spreadsheet has saved it in a format of its own."""
    if not os.path.exists(path):
        return []
    with open(path, newline="", errors="replace") as file:
        rows = csv.DictReader(file)
        return [row for row in rows if None not in row and (row.get("step") or "").isdecimal()]


class Log:
    """A CSV with one row per logged step. A resumed run first drops the rows later than its checkpoint."""

    def __init__(self, path: str, from_step: int = 0):
        self.path = path
        kept = [row for row in log_rows(path) if int(row["step"]) <= from_step]
        text = io.StringIO()
        if kept:
            writer = csv.DictWriter(text, kept[0])
            writer.writeheader()
            writer.writerows(kept)
        write_atomic(text.getvalue().encode(), path)

    def write(self, row: dict) -> None:
        """Append a row; the first one names the columns."""
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)


def share_of(batch: int, processes: int) -> int:
    """How many clips of a batch each process takes. UserError: it cannot be shared."""
    if batch % processes:
        what = f"cannot be shared by {processes} processes, type a multiple of that"
        raise UserError(f"--batch {batch}: {what}")
    return batch // processes


def is_done(resume_path: str, step: int, steps: int, say: Callable) -> bool:
    """Has a resumed run nothing left to do? Then what to type instead is said."""
    if step >= steps:
        say(f"{resume_path}: has done its {step} steps; --eval_only measures it, --steps TOTAL goes on")
    return step >= steps


def check_run(args, path: str, resume_path: str) -> None:
    """UserError: there is no run to resume, or a new one would overwrite one of more than a hundred steps, or
    a model at `path` of which nothing else is left."""
    if args.resume and not os.path.exists(resume_path):
        raise UserError(f"{resume_path}: no run to go on with; type its --out, or begin one without --resume")
    if args.eval_only and not os.path.exists(path):
        raise UserError(f"{path}: no such checkpoint: name the --out of one that is trained")
    if args.resume or args.eval_only:
        return
    done = None
    with contextlib.suppress(Exception):  # there is none, or it is damaged
        done = torch.load(resume_path, weights_only=True, mmap=True)["step"]
    if done is None and os.path.exists(path):
        raise UserError(f"{path}: would be overwritten; choose another --out, or move it away first")
    if done is not None and done > 100:
        advice = f"go on with it by --resume; or choose another --out, or move it and {path} away"
        raise UserError(f"{resume_path}: is a run of {done} steps; {advice}")


class Run:
    """A training in the folder --out: its files, its processes, and what an earlier run left there.

    `load` reads checkpoints of `kind`. UserError: see `check_run`; a folder in which another one trains."""

    def __init__(self, args, kind: str, load: Callable):
        names = (f"{kind}.pt", f"{kind}_train.pt", f"{kind}.csv", f"{kind}_wavs")
        paths = [os.path.join(args.out, name) for name in names]
        self.path, self.resume_path, self.log_path, self.wavs = paths
        check_run(args, self.path, self.resume_path)
        # Measuring, too, takes the data and the seed of the run: the same clips are held out.
        has_run = args.resume or (args.eval_only and os.path.exists(self.resume_path))
        self.saved = load(self.resume_path, f"nanoaudiogen {kind} training") if has_run else {}
        self.flags = recall_flags(args, self.saved)
        self.device, self.rank, self.world_size = start_processes(args.device)
        self.is_main = self.rank == 0
        self.say = Say(sys.stdout) if self.is_main else lambda *_: None
        self.lock = lock_folder(args.out) if self.is_main else None  # held until the process ends


# ----------------------------------------------------------------------------------------------------------
# python data.py SOURCE: what training would read, before anyone waits for it.


def save_entries(entries: list[Entry], path: str):
    """Write a plain table that `read_entries` reads back: wrong guesses can be corrected in it."""
    folder = os.path.join(os.path.dirname(os.path.abspath(path)), "")
    most = max(len(entry.captions) for entry in entries)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["path", "category", "split", *(f"caption_{i + 1}" for i in range(most))])
    for entry in entries:
        name = entry.path.removeprefix(folder)
        if not name.isprintable():  # bytes that are no text: by this name it is found, too
            name = name_key(name) + kind_of(name)
        writer.writerow([name, entry.category, entry.split, *entry.captions])
    write_atomic(text.getvalue().encode(), path)


def show_entries(entries: list[Entry]):
    """Print the clips of each split, their length, the commonest and the longest captions, and five pairs."""
    captions = collections.Counter(caption for entry in entries for caption in entry.captions)
    splits = collections.Counter(entry.split for entry in entries)
    unsaid = "of no split" if splits["val"] else "of no split: a tenth will validate"
    told = ", ".join(f"{n} {split or unsaid}" for split, n in sorted(splits.items()))
    print(f"{len(entries)} clips ({told}), {captions.total()} captions, {len(captions)} of them distinct")
    sample, seconds, broken = entries[:: math.ceil(len(entries) / 2000)], 0.0, []
    for entry in sample:
        try:
            if not os.path.isfile(entry.path):  # a pipe would keep us waiting
                raise OSError("is no file")
            with open(entry.path, "rb") as file:
                seconds += soundfile.info(file).duration
        except (RuntimeError, OSError) as error:
            broken.append(printable(f"  {entry.path}: {why_unread(error)}"))
    in_all = as_time(seconds * len(entries) / len(sample))
    print(in_all + (f", as {len(sample)} clips have it" if len(sample) < len(entries) else ""))
    if broken:
        print(f"{len(broken)} of these cannot be opened:", *broken[:10], sep="\n")
    print("commonest captions:", *(f"  {n:6} {caption}" for caption, n in captions.most_common(10)), sep="\n")
    print("longest captions:")
    for caption in sorted(captions, key=len, reverse=True)[:3]:
        print(f"  {len(caption.split()):6} words: {textwrap.shorten(caption, 90, placeholder=' ...')}")
    print("for example:")
    for entry in entries[:: math.ceil(len(entries) / 5)]:
        print(printable(f"  {entry.path}: {' | '.join(entry.captions)}"))


def main():
    """Show what training would read, and save it as a plain table if asked to."""
    parser = Parser(description="Shows what training would read from a table or a folder.")
    parser.add_argument("source", help="CSV, TSV, JSON (lines), or a folder with a table, texts, or classes")
    add_column_flags(parser)
    parser.add_argument("--save", metavar="CSV", help="write it as a plain table, to correct it by hand")
    args = parser.parse_args()
    if args.save and os.path.exists(args.save):
        raise UserError(f"--save {args.save}: exists already; name another file, or delete it")
    source, _ = split_weight(args.source)
    entries = read_entries(source, print, args.files, args.words, args.split_column)
    show_entries(entries)
    if args.save:
        save_entries(entries, args.save)
        print(f"saved as {args.save}; train on it with --data {shell_quote(args.save)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
