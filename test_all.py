"""Tests of nanoAudioGen: python -m pytest -q test_all.py

They make their own sounds in temporary folders and need no network and no GPU. In the order of the files:
data.py, codec.py, lm.py, the functions of the trainers; then commands as typed: the pipeline, resuming, two
processes, sample.py, and bad input.
"""

import contextlib
import copy
import csv
import errno
import functools
import gzip
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pytest import approx, raises
from torch.testing import assert_close

import codec as codec_py
import data as D
import lm as lm_py
import sample
import train_codec
import train_lm
from codec import Balancer, Codec, CodecConfig, CodecError, MelLoss, ResidualVQ, VectorQuantizer
from lm import AudioLM, LMConfig, LMError, sample_next

torch.set_num_threads(1)  # the models here are small: more threads would only wait for each other
HERE = Path(__file__).resolve().parent
RATE, CPU = D.SAMPLE_RATE, torch.device("cpu")
SCRIPTS = {f"{script.__name__}.py": script for script in (train_codec, train_lm, sample)}

# `--size test` takes seconds instead of minutes. The codec meets its discriminator at step 2 of 6.
codec_py.CHANNELS["test"] = 4
lm_py.SIZES["test"] = (2, 2, 32, 1)  # layers, heads, width, text layers
train_codec.RECIPES["test"] = {"steps": 6, "batch": 2, "seconds": 0.25, "lr": 4e-3}
train_codec.RECIPES["test"] |= {"disc_start": 0.34, "disc_filters": 2}
train_lm.RECIPES["test"] = {"steps": 4, "batch": 2, "micro": 1, "lr": 4e-3, "vocab_size": 300}
train_lm.RECIPES["test"] |= {"text_len": (8, 32), "dropout": 0.1, "shard": False}
train_lm.SECONDS = 1


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def sine(frequency, seconds=1.0, rate=RATE, amplitude=0.5):
    t = np.arange(int(seconds * rate)) / rate
    return (amplitude * np.sin(2 * np.pi * frequency * t)).astype(np.float32)


def rng(seed=0):
    return np.random.default_rng(seed)


def hiss(seconds=1.0, seed=0, amplitude=0.1):
    wave = amplitude * rng(seed).standard_normal(round(seconds * RATE))
    return wave.clip(-1, 1).astype(np.float32)


def hisses(seconds, *seeds, amplitude=0.1):
    return torch.from_numpy(np.stack([hiss(seconds, seed, amplitude) for seed in seeds or (0,)]))  # (B, T)


def write_wav(path, wave=None, rate=RATE, **options):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    soundfile.write(path, hiss(0.1) if wave is None else wave, rate, **options)
    return str(path)


def write_text(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_table(folder, *clips, **options):
    """Clips are (file, wave, caption, perhaps category and split) -> path of a CSV beside the sounds."""
    rows = [("path", "caption", "category", "split")[: len(clips[0]) - 1]]
    for file, wave, *about in clips:
        write_wav(folder / file, wave, **options)
        rows.append((file, *about))
    return write_text(folder / "clips.csv", "".join(",".join(row) + "\n" for row in rows))


def audio_data(folder, *clips, **options):
    said = []
    data = D.AudioData([write_table(folder, *clips, **options)], str(folder / "out"), said.append)
    data.said = "\n".join(said)
    return data


def quiet(*_, **__):
    """A log for those who do not want to read it."""


def raising(error):
    """A function that always fails, as a full disk makes it fail."""

    def fail(*_):
        raise error

    return fail


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------------------------------------------------
# data.py: audio files

RATES = [(rate, RATE) for rate in (8000, 11025, 22050, 44100, 44101, 48000, 96000)] + [(RATE, 44100)]


@pytest.mark.parametrize("rate_in, rate_out", RATES)
def test_resampler_keeps_what_the_lower_rate_can_hold_and_stops_the_rest(rate_in, rate_out):
    frequencies = np.array([0.05, 0.3, 0.6, 0.9]) * min(rate_in, rate_out) / 2
    x = torch.from_numpy(np.stack([sine(f, 0.5, rate_in) for f in frequencies]))
    y = D.resample(x, rate_in, rate_out).double().numpy()
    middle = slice(y.shape[1] // 4, 3 * y.shape[1] // 4)  # the ends hear the silence around the clip
    t = np.arange(y.shape[1])[middle] / rate_out
    for f, row in zip(frequencies, y[:, middle]):
        basis = np.stack([np.sin(2 * np.pi * f * t), np.cos(2 * np.pi * f * t)], 1)
        (a, b), *_ = np.linalg.lstsq(basis, row, rcond=None)
        assert math.hypot(a, b) == approx(0.5, rel=0.01) and abs(b / a) < 0.01  # its loudness, and no delay
        assert (row - basis @ [a, b]).std() < 0.001 * 0.5 / 2**0.5  # -60 dB of images, aliases, rounding
    for f in (8050, 9000, 15000, 20000, 40000):
        if rate_out < rate_in and f < 0.98 * rate_in / 2:
            y = D.resample(torch.from_numpy(sine(f, 0.5, rate_in)), rate_in, rate_out)[2000:6000]
            assert y.std() < 0.001 * 0.5 / 2**0.5


@pytest.mark.parametrize("rate_in, rate_out", [(8000, RATE), (44100, RATE), (RATE, 44100)])
def test_resampled_length_is_rounded_up_and_blocks_make_no_difference(rate_in, rate_out):
    for n in (1, 2, 999, 16001):
        assert len(D.resample(torch.zeros(n), rate_in, rate_out)) == math.ceil(n * rate_out / rate_in)
    x = hisses(1.5)
    y = torch.cat(list(D.resample_blocks(x.split([1, 5, 700, 12000, 3, 11291], 1), rate_in, rate_out)), 1)
    assert_close(y, D.resample(x, rate_in, rate_out), rtol=0, atol=1e-6)
    with raises(D.UserError, match="sample rate of 1 Hz"):  # of a damaged header
        D.resample(x, 1, rate_out)


@pytest.mark.parametrize("left, right, loudness", [(1, 0, 0.5), (1, 1, 1), (1, -1, 1)])
def test_stereo_becomes_mono_at_16_khz_and_opposite_channels_are_not_silent(left, right, loudness, tmp_path):
    stereo = sine(440, 1, 44100)[:, None] * [left, right]
    wave = D.load_audio(write_wav(tmp_path / "stereo.flac", stereo, 44100, subtype="PCM_24"))
    assert wave.dtype == torch.float32 and wave.shape == (RATE,)
    expected = loudness * torch.from_numpy(sine(440))
    assert_close(wave[2000:-2000], expected[2000:-2000], rtol=0, atol=2e-3)


@pytest.mark.parametrize("gain, peak", [(4.0, 1.0), (0.5, 0.25)])
def test_a_loud_sound_is_saved_turned_down_and_not_clipped(gain, peak, tmp_path):
    D.save_wav(gain * torch.from_numpy(sine(300)), str(tmp_path / "a.wav"))
    expected = torch.from_numpy(peak * sine(300) / np.abs(sine(300)).max())
    assert_close(D.load_audio(str(tmp_path / "a.wav")), expected, rtol=0, atol=1e-3)


def test_a_file_of_which_only_a_part_can_be_decoded_is_refused_but_tags_behind_a_sound_are_no_damage(
    tmp_path,
):
    """Two Ogg files in a row are one, by its standard; libsndfile reads the first."""
    ogg, other = (write_wav(tmp_path / f"{seed}.ogg", hiss(20.0, seed), format="OGG") for seed in (0, 1))
    wav, tags = write_wav(tmp_path / "a.wav", hiss(0.1)), b"cover picture " * 10000
    assert len(D.load_audio(ogg)) == 20 * RATE
    with open(ogg, "ab") as file, open(other, "rb") as second:
        file.write(second.read())
    with raises(D.UserError, match="only its first part can be decoded"):
        D.load_audio(ogg)
    with open(wav, "ab") as file:
        file.write(b"id3 " + len(tags).to_bytes(4, "little") + tags)
    assert len(D.load_audio(wav)) == 0.1 * RATE
    with open(wav, "r+b") as file:  # as ffmpeg writes to a pipe, not knowing how long it will be
        file.seek(4)
        file.write(b"\xff\xff\xff\xff")
    assert len(D.load_audio(wav)) == 0.1 * RATE
    soundfile.write(tmp_path / "big.wav", np.full(70000, 0.1), RATE, endian="BIG", format="WAV")  # RIFX
    assert len(D.load_audio(str(tmp_path / "big.wav"))) == 70000
    os.truncate(write_wav(tmp_path / "cut.wav", hiss(0.1)), 2000)
    with raises(D.UserError, match="only 2000 of its 3236 bytes are there"):
        D.load_audio(str(tmp_path / "cut.wav"))


# ----------------------------------------------------------------------------------------------------------
# data.py: tables and folders


def lay_out(folder, sounds, files):
    for path in [*sounds, *files]:
        os.makedirs((folder / path).parent, exist_ok=True)
    for path in sounds:
        kind = path.rpartition(".")[2].upper()
        kind = {"OGA": "OGG", "WAVE": "WAV", "AIFC": "AIFF"}.get(kind, kind)
        soundfile.write(os.fsencode(folder / path), 0.3 * np.ones(160), 16000, format=kind)
    for path, text in files.items():
        (folder / path).write_bytes(text if isinstance(text, bytes) else text.encode(errors="replace"))


def read(folder, sounds, texts, source="t.csv", **flags):
    """({sound: captions}, {sound: split}, log) of a source; `texts` may be that of t.csv alone."""
    lay_out(folder, sounds, texts if isinstance(texts, dict) else {"t.csv": texts})
    log = []
    entries = D.read_entries(str(folder / source), log.append, **flags)
    captions = {os.path.relpath(entry.path, folder): entry.captions for entry in entries}
    return captions, dict(zip(captions, [entry.split for entry in entries])), "\n".join(log)


def refusal(*args, **flags):
    with raises(D.UserError) as error:
        read(*args, **flags)
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)
    return str(error.value)


BOTH = {"a.wav": ["rain falls"], "b.wav": ["wind blows"]}
TABLES_OF_BOTH = [  # columns of any name, any delimiter, comments, blanks, no header, JSON of any shape
    "sound_i_recorded,what_you_hear\na.wav,rain falls\nb.wav,wind blows\n",
    "path\tcaption\ta,b,c\na.wav\train falls\t1\nb.wav\twind blows\t2\n",
    "a.wav|rain falls\nb.wav|wind blows\n",
    "a.wav: rain falls\nb.wav - wind blows\n",
    "x,beschreibung,ort\n\"{'path': 'a.wav'}\",rain falls,here\nb.wav (https://x.org/1),wind blows,there\n",
    "# by hand\n\n# path;caption\r\na;rain falls\r\nb;wind blows\r\n",
    'path, caption\n a.wav, "rain falls"\n b.wav, "wind blows"\n',
    ",path,caption,id\n0,a.mp4,rain falls,/m/0abc\n1,b.mp4,wind blows,/m/0abd\n2,c.wav,nan,/m/0abe\n",
    "path,caption\na.wav,rain falls\nb.wav,wind blows\n".encode("utf-16"),
    '{"path": "a.wav", "caption": "rain falls"}\n{"path": "b.wav", "caption": "wind blows"}',
    '{"v": 1, "all": [{"path": "a.wav", "text": "rain falls"}, {"path": "b.wav", "text": "wind blows"}]}',
    '{"path": ["a.wav", "b.wav"], "caption": ["rain falls", "wind blows"]}',
    '{"a.wav": "rain falls", "b.wav": ["wind blows"]}',
    '{"a": "rain falls", "b": "wind blows"}',
    '{"a": {"title": "a.wav", "text": "rain falls"}, "b": {"title": "x", "text": "wind blows"}}',
    '{"columns": ["file", "text"], "data": [["a.wav", "rain falls"], ["b.wav", "wind blows"]]}',
    '{"train": {"a.wav": "rain falls"}, "test": {"b.wav": "wind blows"}}',
    "My sounds,,\nfile,caption,\na.wav,rain falls,\nb.wav,wind blows,\n",
    "folder,file,caption\n.,a.wav,rain falls\n.,b.wav,wind blows\n",
    '[{"x": {"path": "a.wav"}, "text": "rain falls"}, {"x": {"path": "b.wav"}, "text": "wind blows"}]',
]
TABLES_OF_ONE = {  # what is read for a.wav
    "file,caption\na.wav,rain, then wind\n": ["rain, then wind"],
    "file,caption\na.wav,\"['it rains', 'drops']\"\n": ["it rains", "drops"],
    'file,caption\na.wav,"two\nlines, and commas"\n': ["two lines, and commas"],
    "file,caption\na.wav,rain\u2028&amp; w\u200bind cafe\u0301 \U0001f600\n": [
        "rain & wind caf\u00e9 \U0001f600"
    ],
    "file,caption_1,caption_2\na.wav,rain,drops\na.wav,wind,\n": ["rain", "drops", "wind"],
    "file,title,description,caption\na.wav,x y,raw text,rain falls\n": ["rain falls"],
    "file,caption,tags\na.wav,,\"['Rain', 'heavy_drops']\"\n": ["rain heavy drops"],
    'file,mids,labels\na.wav,"/m/02sgy,/m/0342h","Electric_guitar,Music"\n': ["electric guitar music"],
    "file,label\na.wav,कुत्ता เสียงน้ำ\n": ["कुत्ता เสียงน้ำ"],
    '{"path": {"0": "a.wav"}, "caption": {"0": "rain falls"}}': ["rain falls"],
    '[{"path": "a.wav", "sentences": [{"id": 1, "raw": "rain falls"}]}]': ["rain falls"],
    'file,choice\na.wav,"{""choices"": [""Rain"", ""Wind""]}"\n': ["rain wind"],
    "file,caption,caption_source\na.wav,rain,a human\n": ["rain"],
    "file,recorded,label\na.wav,May 3 2021,rain\n": ["rain"],
    "file,name,label\na.wav,a,rain\nb.wav,b,wind\n": ["rain"],
    "file,class,order,family,species\na.wav,Aves,x y,y z,a crow\n": ["a crow"],
    "file,fold,label\na.wav,1,rain\n": ["rain"],
    "file,prompt,response\na.wav,describe this sound,rain falls\n": ["rain falls"],
    "output,prompt,negative\na.wav,rain falls,a voice\nb.wav,wind,noise\n": ["rain falls"],
    "file,label\na.wav,stage 0\nb.wav,stage 1\n": ["stage 0"],
    "file,caption\nb.wav,NA\na.wav,rain\n": ["rain"],
    '[{"x": ["a.wav"], "m": [{"role": "user", "t": "what?"}, {"role": "model", "t": "rain"}]}]': ["rain"],
    '[{"path": "a.wav", "p": [{"score": 0.2, "label": "wind"}, {"score": 0.7, "label": "rain"}]}]': ["rain"],
    '[{"x": "/d/a.wav", "a": [{"r": [{"value": {"choices": ["rain"]}, "type": "y"}], "id": 1}]}]': ["rain"],
    '[{"x": "a.wav", "m": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "rain"}]}]': [
        "rain"
    ],
    "file,transcript,sound_description\na.wav,hello,rain <br>falls\n": ["rain falls"],
    "file,label\na.wav,002_Boeing 747\n": ["boeing 747"],
    "file,caption\na.wav,#REF!\na.wav,rain\n": ["rain"],
    'file,caption\na.wav,"she says \\"hello, you\\""\n': ['she says "hello, you"'],
    "file,true_caption,false_caption\na.wav,rain falls,wind blows\n": ["rain falls"],
    "file,query,response\na.wav,what is heard?,rain falls\n": ["rain falls"],
    "file,label\na.wav,CarHorn\nb.wav,TVNoise\n": ["car horn"],
    "file,caption,exclude\na.wav,rain falls,\nb.wav,wind blows,x\n": ["rain falls"],
    "file,caption,is_valid\na.wav,rain falls,True\nb.wav,wind blows,False\nc.wav,hail,True\n": ["rain falls"],
    "file,caption,review_status\na.wav,rain falls,done\nb.wav,wind blows,Rejected\n": ["rain falls"],
    ",path,fold\n0,a.wav,rain falls\n": ["rain falls"],
    "file,label_1,label_2\na.wav,rain,old_dog\n": ["rain old dog"],
    "file,species,description\na.wav,crow,\nb.wav,owl,of mine\nc.wav,tit,\n": ["crow"],
    '[{"audio": "a.wav", "text": "a", "transcript": "it rains"}, {"audio": "b.wav", "text": "b"}]': [
        "it rains"
    ],
    "url,Description,Answer.text\nh/a.wav,write,it rains\nh/b.wav,write,\nh/c.wav,write,\n": ["it rains"],
}
REFUSED_TABLES = {
    'path,caption\na.wav,"rain falls\nb.wav,wind blows\n': "quote",
    'path,caption\na.wav,"rain falls\nb.wav,wind blows"\n': "quote",
    "path,caption,split\na.wav,rain, and wind,train\nb.wav,wind,test\n": "quotes",
    "path,positive_labels\na.wav,/m/01b_21\nb.wav,/m/01b_22\n": "class_labels_indices.csv",
    "path,caption_en,caption_fr\na.wav,rain,la pluie\nb.wav,wind,le vent\n": "--words",
    "one,two,caption\na.wav,b.wav,rain\nb.wav,a.wav,wind\n": "--files",
    "path,onset,event\na.wav,0.1,dog\na.wav,0.9,cat\nb.wav,0,dog\n": "moments",
    "a.wav\t0.1\t0.5\tdog\na.wav\t0.9\t1.5\tcat\n": "moments",
    "Start (s),End (s),Common name,Confidence,File\n0,3,Barred Owl,0.9,a.wav\n": "moments",
    "path,dog,rain\na.wav,0,1\nb.wav,1,0\n": "names of the columns with 1",
    "path,what,where\na.wav,rain,here\nb.wav,wind,there\n": "--words",
    "path,question,answer,category\na.wav,what falls?,rain,logic\nb.wav,what blows?,wind,recall\n": "--words",
    "path,foo,number\na.wav,rain,1\nb.wav,wind,2\n": "--words",
    '{"audio": [{"file": "a.wav"}], "categories": [{"name": "dog"}]}': "several tables",
    '[{"x": "a.wav", "a": [{"r": [{"value": {"start": 0.1, "labels": ["dog"]}}]}]}]': "moments",
    b"PAR1\0\0\0": "not text",
    "path,caption\na_long_name.wav,идёт дождь\nb.wav,ветер\n".encode("cp1251"): "UTF-8",
    "path,caption\na.wav,trzask drzwi w łazience\n".encode("cp1250"): "UTF-8",
    "path,caption\na.wav,une forêt\n".encode("mac_roman"): "UTF-8",
    "path,place,celsius\na.wav,Zilker Park,12\nb.wav,Lake Ella,13\n": "--words",
    "file_name, caption\nclip_1.wav, rain falls\nclip_2.wav, wind blows\n": "of 'file_name', 'caption'",
}


@pytest.mark.parametrize("table", [*TABLES_OF_BOTH, *TABLES_OF_ONE, *REFUSED_TABLES])
def test_a_table_is_read_as_meant_or_refused_with_advice(table, tmp_path):
    if table in REFUSED_TABLES:
        assert REFUSED_TABLES[table] in refusal(tmp_path, ["a.wav", "b.wav"], table)
    else:
        expected = {"a.wav": TABLES_OF_ONE[table]} if table in TABLES_OF_ONE else BOTH
        assert read(tmp_path, sorted(expected), table)[0] == expected


def test_a_number_beside_the_column_of_files_names_no_sound(tmp_path):
    sounds = ["x/bed/0.wav", "x/cat/0.wav", "x/bed/1.wav", "x/cat/1.wav"]
    table = ",path,fold,label\n0,x/bed/1.wav,1,bed\n1,x/cat/0.wav,1,cat\n"
    assert read(tmp_path, sounds, table)[0] == {"x/bed/1.wav": ["bed"], "x/cat/0.wav": ["cat"]}
    ids = "id,caption\n7.0,rain falls\n8.0,wind blows\n"  # as pandas writes them
    assert read(tmp_path / "c", ["7.wav", "8.wav"], ids)[0] == {
        "7.wav": ["rain falls"],
        "8.wav": ["wind blows"],
    }
    vocabulary = {"classes.csv": "id,name\n0,old dog\n1,old cat\n"}
    captions = read(tmp_path / "b", ["bed/0.wav", "cat/1.wav", "cat/2.wav", "bed/3.wav"], vocabulary, "")[0]
    assert sorted(captions.values()) == [["bed"], ["bed"], ["cat"], ["cat"]]


def test_the_ids_of_audioset_are_named_by_its_list_of_classes(tmp_path):
    files = {
        "class_labels_indices.csv": 'index,mid,display_name\n0,/m/0b,"Dog, big"\n1,/t/dd1,Rain\n',
        "x/t.csv": '# made by hand\n# id, labels\na, "/m/0b,/t/dd1"\nb, "/t/dd1"\n',
    }
    captions = read(tmp_path, ["x/a.wav", "x/b.wav"], files, "x/t.csv")[0]
    assert captions == {"x/a.wav": ["dog big rain"], "x/b.wav": ["rain"]}


def test_words_that_lie_unread_beside_class_folders_are_refused(tmp_path):
    sounds = ["bed/a.wav", "cat/b.wav"]
    unread = [
        "bed/a.lab",
        "captions.docx",
        "bed/a.normalized.txt",
        "bed/a.jams",
        "bed/a.yaml",
        "text",
        "captions.xlsx",
        "captions.csv",
        "mine.parquet",
    ]
    for i, name in enumerate(unread):
        text = {name: "x,y\nfar.wav,rain falls\n" if name == "captions.csv" else "bed/a.wav\n"}
        assert os.path.basename(name) in refusal(tmp_path / str(i), sounds, text, "")
    text = {"bed/description.txt": "rain falls\n", "cat/b_label.txt": "wind blows\n"}
    assert "bed/description.txt" in refusal(tmp_path / "described", sounds, text, "")
    text = {"bed/A.TXT": "rain falls\n", "cat/b.txt": "wind blows\n", "readme.txt": "of mine"}
    captions = read(tmp_path / "upper", sounds, text, "")[0]
    assert captions == {"bed/a.wav": ["rain falls"], "cat/b.wav": ["wind blows"]}
    text = {"bed/a.txt": "0.0\t1.5\tbig_bark\n2.0\t2.5\train\n", "cat/b.txt": "0\t1\twind\n"}  # of Audacity
    captions = read(tmp_path / "events", sounds, text, "")[0]
    assert captions == {"bed/a.wav": ["big bark", "rain"], "cat/b.wav": ["wind"]}
    text = dict.fromkeys(["bed/a.csv", "cat/b.csv"], "description,rate\nrain falls,3\n")
    assert "bed/a.csv" in refusal(tmp_path / "tables", sounds, text, "")
    for name in ("birds.csv", "birds.list", "birds.html"):
        text = {name: "rec,species\n1,owl\n2,jay\n"}
        assert f"{name} is not read" in refusal(tmp_path / name, ["bird set/1_x.wav"], text, "")
    assert "left out, not understood: my.zip" in read(tmp_path / "named", sounds, {"my.zip": "x"}, "")[2]


def test_what_the_scripts_write_into_a_folder_of_sounds_is_not_read(tmp_path):
    made = {"out/.lock": "", "out/x.txt": "a", "bed-1/audio.i16": "", "bed-1/index.json": '[{"path": "a"}]'}
    sounds = ["bed/a.wav", "cat/b.wav", "codec_wavs/c.wav", "out/d.wav"]
    assert sorted(read(tmp_path, sounds, made, "")[0]) == sounds[:2]


def test_flags_overrule_every_guess(tmp_path):
    table = "one,two,foo,bar,part\na.wav,b.wav,big rain,old dog,fold1\nb.wav,a.wav,low wind,young dog,fold2\n"
    flags = {"files": "two", "words": "bar", "split_column": "part"}
    captions, splits, _ = read(tmp_path, ["a.wav", "b.wav"], table, **flags)
    assert [*captions.items()] == [("b.wav", ["old dog"]), ("a.wav", ["young dog"])]
    assert [*splits.values()] == ["", "val"]
    for flag in flags:
        assert "no column 'x'" in refusal(tmp_path, [], table, **(flags | {flag: "x"}))


def test_a_missing_file_is_never_taken_from_elsewhere(tmp_path):
    here, far = ["data/train/1.wav", "data/train/2.wav"], ["data/test/3.wav", "data/test/4.wav"]
    for row in ["train/{}.wav", "{}.wav", "{}", "/me/train/{}.flac", "C:\\x\\train\\{}.wav"]:
        table = "file,caption\n" + "".join(f"{row.format(i)},sound of rain\n" for i in (1, 2, 3))
        captions, _, log = read(tmp_path, here + far, {"data/train.csv": table}, "data/train.csv")
        assert sorted(captions) == here and "left out, no such sound" in log and log.count("left out") == 1
    table = "number,id,caption\n3,r1nicOVtvkQ,rain\n70,UDGBjjwyaqE,wind\n71,3eJ9RynJzP8,dogs\n"
    assert "number" in refusal(tmp_path / "b", ["o/3.wav", "o/4.wav"], {"c/t.csv": table}, "c/t.csv")
    sounds = ["x/bed/1.flac", "x/cat/1.flac"]  # folders decide between equal names
    for table in ["file,label\nbed/1.wav,dog\ncat/1.wav,dog\n", "file,label\nbed/1,dog\ncat/1,dog\n"]:
        assert sorted(read(tmp_path / "c", sounds, table)[0]) == sounds
    assert "'x/bed' and in 'x/cat'" in refusal(tmp_path / "c", sounds, "file,text\n1.wav,rain falls\n")


@pytest.mark.parametrize("name", ["{}.wav", "Y{}.wav", "{}_30.wav"])
def test_films_that_are_gone_are_named_and_the_others_read(name, tmp_path):
    """AudioCaps as one has it years later. Many rows without a sound are not many moments in one."""
    films = {"r1nicOVtvkQ": 60, "UDGBjjwyaqE": 50, "3eJ9RynJzP8": 30, "3eK62q7SnVU": 30, "tw76HGONaKg": 30}
    rows = [f"{91139 + i},{film},{start},rain {i}" for i, (film, start) in enumerate(films.items())]
    table = "\n".join(["audiocap_id,youtube_id,start_time,caption", *rows])
    gone, there = [*films][:2], [*films][2:]
    captions, _, log = read(tmp_path, [f"audio/{name.format(film)}" for film in there], {"t.csv": table})
    assert captions == {f"audio/{name.format(film)}": [f"rain {i}"] for i, film in enumerate(there, 2)}
    assert all(f"left out, no such sound: {film}" in log for film in gone) and log.count("left out") == 2


NAMES = {
    "x/YAbc4efgh1jk.wav": "id,start,label\nAbc4efgh1jk,30,",
    "x/Abc4efgh1jk_000030.wav": "Abc4efgh1jk,30,",
    "x/[Abc4efgh1jk]-[30-40].wav": "id,s,label\nAbc4efgh1jk,30,",
    "x/123__me__dog.wav": "id,label\n123,",
    "x/XC123 - A Blackbird.wav": "id,label\n123,",
    "x/dog.flac": "file,label\n/data/upload/1/9a3e12d4-dog.wav,",
    "x/Dog.WAV": "file,label\ndog.wav,",
    "x/dog.wav": "file,label\nDog.WAV,",
    "x/cafe\u0301.wav": "file,label\ncaf\u00e9.wav,",
    "x/rec_12:30.oga": "file,label\nrec_12:30.wav,",
    "x/my dog.wav": "file,label\nx%20y/my%20dog.wav,",
    os.fsdecode(b"x/caf\xe9.wav"): "file,label\ncaf\u00e9.wav,",
}


def test_names_are_found_as_data_sets_and_disks_write_them(tmp_path):
    for i, (sound, table) in enumerate(NAMES.items()):
        found = read(tmp_path / str(i), [sound], f"{table}big dog\n".encode("cp1252"))
        assert found[0] == {sound: ["big dog"]}
    # Of two clips of one film, the one that begins elsewhere is not taken.
    table = "id,start,label\nAbc4efgh1jk,30,dog\nXbc4efgh1jk,60,cat\n"
    found = read(tmp_path / "film", ["x/Abc4efgh1jk_30.wav", "x/Xbc4efgh1jk_90.wav"], table)
    assert found[0] == {"x/Abc4efgh1jk_30.wav": ["dog"]}


SPLITS = """
subset training testing -> train val   | Split train-x test-x -> train val | set train dev -> train val
partition train valid_set -> train val | is_train True False -> train val  | set dev eval -> train val
x train test -> train val              | is_test 0 1 -> train val          | split test test -> val val
Menge Training Validierung -> train val | split tr tt -> train val          | Set dev testen -> train val
fold 1.0 2.0 -> - val                  | fold 5 5 -> - -                   | split fold9 fold10 -> - val
train True False -> train val          | is_valid 1 1 -> - -               | is_valid 0 1 -> train val
set trn tst -> train val               | x trainset testset -> train val   | in_test_set no yes -> train val
x held-out training -> val train       | x Trainingsdaten Testdaten -> train val | eval 4 1 -> - -
"""  # a column's name and two of its cells
FOLDERS = [
    ("", ["train/dog/1.wav", "test/dog/1.wav"], ["val", "train"]),
    ("", ["train/dog/1.wav", "valid/cat/1.wav"], ["train", "val"]),
    ("", ["train/dog/1.wav", "X.eval_audio/dog/1.wav"], ["val", "train"]),
    ("", ["data/X.dev_audio/dog/1.wav", "data/X.eval_audio/cat/2.wav"], ["train", "val"]),
    ("", ["train/1.wav", "dog/2.wav"], ["", ""]),  # ESC-50 has a class called train
    ("", ["train horn/1.wav", "train station/2.wav"], ["", ""]),
    ("test", ["train/dog/1.wav", "test/dog/1.wav"], ["val"]),
    ("", ["dev_data/fan/test/1.wav", "dev_data/fan/train/2.wav"], ["val", "train"]),
    ("", ["entraînement/chien/1.wav", "validation/chien/2.wav"], ["train", "val"]),
    ("", ["tr/dog/1.wav", "tt/dog/2.wav", "cv/dog/3.wav"], ["val", "train", "val"]),
    ("", ["de/a/1.wav", "te/a/1.wav", "tr/a/1.wav"], ["", "", ""]),  # languages
    ("", ["TrainSet/dog/1.wav", "TestSet/dog/2.wav"], ["val", "train"]),
    ("", ["test recordings/dog/1.wav"], [""]),
]


def test_splits_are_columns_or_names_of_tables_or_folders_whose_siblings_are_splits(tmp_path):
    for case in re.split(r"[|\n]", SPLITS.strip()):
        column, first, second, _, *splits = case.split()
        table = f"path,caption,{column}\na.wav,rain falls,{first}\nb.wav,wind blows,{second}\n"
        found = read(tmp_path, ["a.wav", "b.wav"], table)[1].values()
        assert [split or "-" for split in found] == splits
    for i, (source, sounds, splits) in enumerate(FOLDERS):
        assert list(read(tmp_path / str(i), sounds, {}, source)[1].values()) == splits
    files = {"train.csv": "path,caption\na.wav,rain falls\n", "test.csv": "path,caption\nb.wav,wind blows\n"}
    assert read(tmp_path / "names", ["a.wav", "b.wav"], files, "")[1] == {"a.wav": "train", "b.wav": "val"}
    files = {"tr.ndjson": '{"path": "a.wav", "text": "rain"}', "te.json": '{"path": "b.wav", "text": "wind"}'}
    assert read(tmp_path / "short", ["a.wav", "b.wav"], files, "")[1] == {"a.wav": "train", "b.wav": "val"}
    files = {"hearing test.csv": "path,caption\na.wav,rain falls\n"}
    assert read(tmp_path / "phrase", ["a.wav"], files, "hearing test.csv")[1] == {"a.wav": ""}


def test_a_sound_that_tables_of_several_splits_name_is_read_once(tmp_path):
    files = {"train.csv": "file,caption\na.wav,rain\nb.wav,wind\n", "test.csv": "file,caption\nb.wav,gusts\n"}
    captions, splits, log = read(tmp_path, ["a.wav", "b.wav"], files, "")
    assert captions == {"a.wav": ["rain"], "b.wav": ["gusts", "wind"]}
    assert splits == {"a.wav": "train", "b.wav": "train"} and "named by several tables" in log


@pytest.mark.parametrize("above", ["", "/me/set/"])
def test_a_missing_sound_is_not_taken_from_the_folder_of_other_rows(above, tmp_path):
    sounds = ["train/0.wav", "train/1.wav", "test/2.wav"]  # train/2.wav is missing
    rows = {"train/0.wav": "rain", "train/1.wav": "wind", "train/2.wav": "fire", "test/2.wav": "dogs"}
    table = "file,caption\n" + "".join(f"{above}{path},sound of {text}\n" for path, text in rows.items())
    assert read(tmp_path, sounds, table)[0] == {path: [f"sound of {rows[path]}"] for path in sounds}


def test_a_missing_sound_is_not_taken_from_the_folder_above(tmp_path):
    table = "file,caption\n" + "".join(f"bed/{i}.wav,sound of thing {i}\n" for i in (1, 2, 3))
    assert sorted(read(tmp_path, ["bed/1.wav", "bed/2.wav", "3.wav"], table)[0]) == ["bed/1.wav", "bed/2.wav"]


def test_headers_that_are_rows_lost_zeros_remarks_and_marks_are_told_from_what_is_meant(tmp_path):
    folders = itertools.count()

    def read(sounds, text):
        folder = tmp_path / str(next(folders))
        for sound in sounds:
            write_wav(folder / f"{sound}.wav", hiss(0.1, 0))
        entries = D.read_entries(write_text(folder / "table.csv", text), log=lambda *_: None)
        return {D.stem(os.path.basename(entry.path)): entry.captions for entry in entries}

    two = {"clip_0": ["a dog"], "clip_1": ["a cat"]}
    assert read(two, "clip_0,a dog\nclip_1,a cat\n") == two
    two = {"clip_0": ["a dog, far off"], "clip_1": ["a cat, near by"]}
    assert read(two, "clip_0|a dog, far off|\nclip_1|a cat, near by|\n") == two
    two = {"dog": ["it barks"], "cat": ["it meows"]}
    assert read(two, "dog,it barks\ncat,it meows\n") == two
    assert read([*two, "sound"], "sound,text\ndog,it barks\ncat,it meows\n") == two
    two = {"007": ["it barks"], "012": ["it meows"]}
    assert read(two, "id,caption\n7,it barks\n12,it meows\n") == two
    three = {"a": ["dog"], "b": ["cat"], "c": ["cow"]}
    rows = [f"{name},{words[0]},made in Kenya" for name, words in three.items()]
    assert read(three, "\n".join(["file,label,description", *rows])) == three
    marks = "".join(f"sound #{i},{i % 3 + 1},the sound of {i}\n" for i in range(6))
    with raises(D.UserError, match="no column names sounds"):
        read("123456", "clip,rating,description\n" + marks)


def test_lists_of_names_are_splits_beside_captions_texts_and_class_folders(tmp_path):
    lists = {"testing_list.txt": "yes/1.wav\n", "validation_list.txt": "no/3.wav\nno/4.wav\n"}
    sounds = ["yes/1.wav", "yes/2.wav", "no/3.wav", "no/4.wav", "no/5.wav"]  # Speech Commands
    captions, splits, log = read(tmp_path / "classes", sounds, lists, "")
    assert captions == {sound: [sound.split("/")[0]] for sound in sounds} and "splits from the lists" in log
    assert [splits[sound] for sound in sounds] == ["val", "train", "val", "val", "train"]
    lists = {"splits/train": "a\n", "splits/test": "b\n"}
    for words in ({"t.csv": "file,caption\na.wav,rain\nb.wav,wind\n"}, {"a.txt": "rain", "b.txt": "wind"}):
        found = read(tmp_path / str(len(words)), ["a.wav", "b.wav"], words | lists, "")
        assert found[:2] == ({"a.wav": ["rain"], "b.wav": ["wind"]}, {"a.wav": "train", "b.wav": "val"})
    texts = ["file,split\nyes/1.wav,train\nno/2.wav,test\n", '{"train": ["yes/1.wav"], "test": ["no/2.wav"]}']
    for i, text in enumerate([*texts, '{"yes/1.wav": "train", "no/2.wav": "test"}']):
        name = f"split{i}.{'json' if i else 'csv'}"
        splits = read(tmp_path / name, ["yes/1.wav", "no/2.wav"], {name: text}, "")[1]
        assert splits == {"yes/1.wav": "train", "no/2.wav": "val"}
    unread = {"split.txt": "these train\nyes/1.wav\n"}
    assert "seems to list a split" in refusal(tmp_path / "x", ["yes/1.wav", "no/2.wav"], unread, "")


def test_tables_of_a_folder_are_joined_where_each_adds_sounds_or_splits(tmp_path):
    sounds = ["audio/1.wav", "audio/2.wav", "audio/3.wav", "audio/4.wav"]
    all_four = "".join(f"{sound},{'rain' if '1' in sound else 'wind'}\n" for sound in sounds)
    words = {sound: ["rain" if "1" in sound else "wind"] for sound in sounds}
    meta, (first, rest) = {"meta.csv": "file,label\n" + all_four}, all_four.split("\n", 1)
    fold = {
        "setup/fold1_train.csv": f"file,label\n{rest}",
        "setup/fold1_evaluate.csv": f"file,label\n{first}\n",
    }
    lists = {f"setup/fold{i}_test.txt": f"audio/{i}.wav\n" for i in (1, 2)}  # fold 1 counts
    for i, files in enumerate((fold, lists, fold | lists)):  # DCASE
        found = read(tmp_path / str(i), sounds, meta | files, "")
        assert found[0] == words and [found[1][sound] for sound in sounds] == ["val"] + 3 * ["train"]
    own = {f"{i}/t.csv": f"file,caption\n{i}.wav,rain {i}\n" for i in (1, 2)}
    found = read(tmp_path / "own", ["1/1.wav", "2/2.wav"], own, "")
    assert found[0] == {"1/1.wav": ["rain 1"], "2/2.wav": ["rain 2"]}
    lines = {
        f"{name}/x/{i}.trans.txt": f"{i} GO ON\n" for i, name in ((1, "train"), (2, "test"))
    }  # LibriSpeech
    found = read(tmp_path / "lines", ["train/x/1.wav", "test/x/2.wav"], lines, "")
    assert found[0] == {"train/x/1.wav": ["GO ON"], "test/x/2.wav": ["GO ON"]}
    assert found[1] == {"train/x/1.wav": "train", "test/x/2.wav": "val"}
    both = {"train_val.csv": "file,caption\na.wav,rain falls\nb.wav,wind blows\n"}
    found = read(tmp_path / "both", ["train/a.wav", "val/b.wav"], both, "train_val.csv")
    assert found[1] == {"train/a.wav": "train", "val/b.wav": "val"}
    halves = {"b_noisy.csv": f"file,label\n{rest}", "a_curated.csv": f"file,label\n{first}\n"}
    assert read(tmp_path / "halves", sounds, halves, "")[0] == words
    names = {"c_development.csv": rest, "c_evaluation.csv": f"{first}\n"}  # Clotho
    clotho = {name: "file,caption\n" + text for name, text in names.items()}
    clotho |= {
        f"metadata_{name}": f"file,keywords\n{text}".replace("wind", "air") for name, text in names.items()
    }
    found = read(tmp_path / "clotho", sounds, clotho, "")
    assert found[0] == words and [found[1][sound] for sound in sounds] == ["val"] + 3 * ["train"]
    other = {"old.csv": f"file,label\n{first}\n"}  # adds nothing
    for i, files in enumerate(
        (other, fold | {"setup/fold1_train.csv": f"file,label\n{rest}".replace("wind", "air")})
    ):
        assert "give one, or several" in refusal(tmp_path / f"x{i}", sounds, meta | files, "")


AB = ["a.wav", "b.wav"]
MISLEADING = [  # sounds, files or the table t.csv, what is read of the sounds in this order
    (AB, ",0,1\n0,a.wav,rain\n1,b.wav,wind\n", ["rain", "wind"]),  # pandas' names of columns
    (AB, "url,caption\nhttps://x.org/f/a.wav?dl=1,rain\nhttps://x.org/b.wav,wind\n", ["rain", "wind"]),
    (["my dog.wav"], "url,caption\nhttps://x.org/f/my%20dog.wav,barking\n", ["barking"]),
    (AB, "file,label\na.wav,12 - dog bark\nb.wav,3 cat\n", ["dog bark", "cat"]),
    (["a_2.wav", "b_3.wav"], "file,x,y\na_2.wav,a_2,big dog\nb_3.wav,b_3,low sea\n", ["big dog", "low sea"]),
    (["12 dog/a.wav", "13 cat/b.wav"], {}, ["dog", "cat"]),
    (AB, {"train.csv": "rain,a.wav\nwind,b.wav\n"}, ["rain", "wind"]),  # a table, and no list of names
    (["a.wav"], {"a.txt": "0.0\t1.5\tbark\n"}, ["bark"]),
]
NOT_GUESSED = [
    (["audio/cat/1.wav"], "file,caption\naudio/dog/1.wav,a dog barks\n", "no column names sounds"),
    (AB, "file,name\na.wav,clip_1\nb.wav,clip_2\n", "which column holds captions"),
    (["dog_2.wav", "cat_3.wav"], "file,name\ndog_2.wav,dog_2\ncat_3.wav,cat_3\n", "which column holds"),
    (["Actor_01/a.wav", "Actor_02/b.wav"], {}, "no words for its 2 sounds"),
    (["1.wav", "2.wav"], "file,stars,text\nx.wav,1,rain\ny.wav,2,wind\nz.wav,2,sea\n", "no column names"),
]


def test_what_looks_like_something_else_is_read_as_meant_or_refused(tmp_path):
    for i, (sounds, files, words) in enumerate(MISLEADING):
        source = "" if isinstance(files, dict) else "t.csv"
        captions = read(tmp_path / str(i), sounds, files, source)[0]
        assert captions == {sound: [caption] for sound, caption in zip(sounds, words)}
    for i, (sounds, files, why) in enumerate(NOT_GUESSED):
        source = "" if isinstance(files, dict) else "t.csv"
        assert why in refusal(tmp_path / f"x{i}", sounds, files, source)
    train, test = ({"file": sound, "caption": "rain"} for sound in AB)
    found = read(tmp_path / "rows", AB, {"t.json": json.dumps({"clips": {"a": train, "b": test}})}, "t.json")
    assert found[1] == {"a.wav": "", "b.wav": ""}
    found = read(tmp_path / "sides", AB, {"t.json": json.dumps({"train": [train], "test": [test]})}, "t.json")
    assert found[1] == {"a.wav": "train", "b.wav": "val"}
    sounds = ["train/1.wav", "test/2.wav", "noise/3.wav"]
    table = "file,caption\ntrain/1.wav,rain\ntest/2.wav,wind\nnoise/3.wav,hiss\n"
    assert list(read(tmp_path / "split", sounds, table)[1].values()) == ["train", "val", ""]
    table, sounds = f"file,caption\n{tmp_path}/far/a/b/c.wav,rain\n", ["a/b/c.wav", "x/y/z/d.wav"]
    assert list(read(tmp_path / "far", sounds, {"x/y/z/t.csv": table}, "x/y/z/t.csv")[0]) == ["a/b/c.wav"]
    first, second = "file,label\n1.wav,rain\n", "file,label\n2.wav,wind\n"
    folds = {"fold1_test.csv": first, "fold1_train.csv": second}  # of several folds the first counts
    folds |= {"fold2_test.csv": second, "fold2_train.csv": first}
    found = read(tmp_path / "folds", ["1.wav", "2.wav"], folds, "")
    assert found[1] == {"1.wav": "val", "2.wav": "train"}


def test_sounds_of_another_project_are_not_found_by_bare_names(tmp_path):
    sounds, table = ["b/deep/1.wav", "b/deep/2.wav"], "file,caption\n1.wav,rain falls\n2.wav,wind blows\n"
    missing = {"a/meta/t.csv": table + "3.wav,dogs bark\n"}
    assert "no column names sounds" in refusal(tmp_path / "x", sounds, missing, "a/meta/t.csv")
    assert len(read(tmp_path / "y", sounds, {"a/meta/t.csv": table}, "a/meta/t.csv")[0]) == 2


def test_a_table_of_something_else_does_not_take_the_place_of_class_folders(tmp_path):
    sounds = ["dog/1.wav", "cat/2.wav", "cat/3.wav", "cow/4.wav", "cow/5.wav"]
    classes = {sound: [sound.split("/")[0]] for sound in sounds}
    tables = {
        "sample_submission.csv": "file,label\ncat/2.wav,silence\n",
        "predictions.csv": "file,pred\ndog/1.wav,cat\ncat/2.wav,cow\n",
        "durations.csv": "file,seconds\ndog/1.wav,1.5\ncat/2.wav,2.5\n",
    }
    for name, text in tables.items():
        assert read(tmp_path / name, sounds, {name: text}, "")[0] == classes
    errata = {"errata.csv": "file,caption\ncat/2.wav,too quiet\n"}
    assert "words for 1 of 5 sounds" in refusal(tmp_path / "errata", sounds, errata, "")


def test_what_a_column_of_splits_says_and_nobody_knows_is_told(tmp_path):
    table = "path,caption,split\na.wav,rain falls,train\nb.wav,wind blows,Extra\nc.wav,a dog,cv\n"
    _, splits, log = read(tmp_path, ["a.wav", "b.wav", "c.wav"], table)
    assert [*splits.values()] == ["train", "", "val"] and "says 'Extra': no split" in log


def test_in_a_folder_texts_beat_tables_and_both_beat_names_of_classes(tmp_path):
    sounds, text = ["dog/a.wav"], {"dog/a.txt": "Rain falls\n\nit rains\n", "t.csv": "f,g\ndog/a.wav,no\n"}
    assert read(tmp_path, sounds, text, "")[0] == {"dog/a.wav": ["Rain falls", "it rains"]}
    text = {"dog/a.json": '{"title": "x", "description": "wind blows"}'}
    assert read(tmp_path / "json", sounds, text, "")[0] == {"dog/a.wav": ["wind blows"]}
    names = {"dog/a.json": '{"title": "take one"}', "cat/b.json": '{"title": "take two"}'}
    found = read(tmp_path / "titles", ["dog/a.wav", "cat/b.wav"], names, "")[0]
    assert found == {"dog/a.wav": ["dog"], "cat/b.wav": ["cat"]}
    few = ["dog/a.wav", "cat/b.wav", "cow/c.wav"]
    assert "1 of 3 sounds" in refusal(tmp_path / "few", few, {"dog/a.txt": "rain falls"}, "")
    text["dog/a.json"] = '{"one": "rain falls", "two": "wind blows"}'
    assert read(tmp_path / "json", [], text, "", words="two")[0] == {"dog/a.wav": ["wind blows"]}
    text = {"metadata.csv": "file_name,text\ndog/a.wav,from the table\n"}
    assert read(tmp_path, [], text, "")[0] == {"dog/a.wav": ["from the table"]}
    sounds = ["001 - Dog_bark/audio/1.WAV", "कुत्ता/1.aifc", "train/1.wave", "rain/fold1/2.oga"]
    files = {"rain/._2.oga": "x", "rain/3.m4a": "x", "001 - Dog_bark/audio/1.txt": "0.0\t1.5\tbark\n"}
    lay_out(folder := tmp_path / "classes", sounds, files)
    os.symlink(folder / "train", folder / "loop")
    captions, _, log = read(folder, [], {}, "")
    expected = ["dog bark", "rain", "कुत्ता"]  # and "train" or, by the link to it, "loop"
    assert sorted(caption for [caption] in captions.values() if caption not in ("train", "loop")) == expected
    assert "ffmpeg" in log and "3.m4a" in log
    table = {"a/x/y/meta/t.csv": "file,label\n1.wav,dog\n"}
    assert "give " in refusal(tmp_path, ["a/x/y/audio/1.wav"], table, "a/x/y/audio")
    assert "no usable sound" in refusal(tmp_path, [], {"b/x/y/1.m4a": "x"}, "b/x/y")
    assert "parquet" in refusal(tmp_path, ["c/1.wav"], {"c/metadata.parquet": "x"}, "c")
    for name in ["t.parquet", "t.xlsx", "t.yaml", "t.tar", "t.pkl", "a.m4a", "a.wav"]:
        assert "give" in refusal(tmp_path, [], {name: "x"}, name)


def test_sounds_of_a_format_that_is_not_read_are_told(tmp_path):
    files = {"a.txt": "rain falls", "b.txt": "wind blows", "b.m4a": "x"}
    table = {"b.m4a": "x", "t.csv": "path,caption\na.wav,rain falls\nb.m4a,wind blows\n"}
    for source, texts in (("", files), ("t.csv", table)):
        captions, _, log = read(tmp_path / source, ["a.wav"], texts, source)
        assert [*captions.values()] == [["rain falls"]] and "ffmpeg" in log and "b.m4a" in log
    files = {"t.csv": table["t.csv"], "a.m4a": "x", "b.m4a": "x"}
    log = read(tmp_path / "once", ["a.wav"], files, "")[2]
    assert log.count("b.m4a") == 1 and "a.m4a" not in log  # which is the sound in another format
    log = read(tmp_path / "classes", ["bed/a.wav", "cat/a.wav"], {"bed/a.m4a": "x", "cat/c.m4a": "x"}, "")[2]
    assert log.count("c.m4a") == 1 and "a.m4a" not in log


TEXTS = {  # beside a.wav, and what is read
    "Title: take 1\nDescription: rain falls\nLicense: CC0\n": ["rain falls"],
    "a.wav|rain falls\n": ["rain falls"],
    "[00:00.000 --> 00:01.000]  rain falls\n": ["rain falls"],
    "rain falls\n\nhttps://x.org/1\nCC-BY 4.0\n": ["rain falls"],
    "it says: no\nrain falls": ["it says: no", "rain falls"],
    "a, then rain falls on a, b\n": ["a, then rain falls on a, b"],
}
NO_CAPTIONS = ["Dog 0.85\nRain 0.11\n", "onset,offset,event\n0.1,0.2,dog\n", "{\\rtf1 rain falls}"]


def test_a_text_beside_a_sound_may_name_its_lines_and_may_be_no_caption(tmp_path):
    for name in ("a.txt", "a.wav.txt", "a.caption"):
        for i, (text, captions) in enumerate(TEXTS.items()):
            assert read(tmp_path / f"{name}{i}", ["a.wav"], {name: text}, "")[0] == {"a.wav": captions}
    for i, text in enumerate(NO_CAPTIONS):
        assert "no caption that can be read" in refusal(tmp_path / str(i), ["a.wav"], {"a.txt": text}, "")


def test_numbers_are_no_names_where_a_table_gives_others_and_dogs_are_not_taken_for_cats(tmp_path):
    tables = {"sounds.csv": "id,file\n1,2.wav\n2,1.wav\n", "words.csv": "sound,caption\n1,rain\n2,wind\n"}
    assert "sounds.csv gives other numbers" in refusal(tmp_path, ["1.wav", "2.wav"], tables, "words.csv")
    assert "which column holds captions" in refusal(tmp_path, [], {}, "")
    tables = {"t.csv": "id,caption\n1,rain\n2,wind\n", "meta.csv": "file,freesound_id\n1.wav,71\n2.wav,55\n"}
    found = read(tmp_path / "other", ["1.wav", "2.wav"], tables)[0]
    assert found == {"1.wav": ["rain"], "2.wav": ["wind"]}
    sounds, table = ["dogs/0.wav", "dogs/1.wav"], "file,caption\ncats/0.wav,a cat\ncats/1.wav,a tomcat\n"
    assert "'cats', which is not here" in refusal(tmp_path / "cats", sounds, table)
    assert len(read(tmp_path / "cats", sounds, table, files="file")[0]) == 2
    renamed = table.replace("cats", "D:/work/wav")  # says nothing of what sounds
    assert len(read(tmp_path / "renamed", sounds, renamed)[0]) == 2
    two = "folder,file,caption\ncity,1.wav,traffic\nforest,1.wav,birds\n"
    found = read(tmp_path / "two", ["city/1.wav", "forest/1.wav"], two)[0]
    assert found == {"city/1.wav": ["traffic"], "forest/1.wav": ["birds"]}
    case = "file,caption\nA,rain falls\na,wind blows\n"
    assert read(tmp_path / "case", ["A.wav", "a.wav"], case)[0]["A.wav"] == ["rain falls"]


def test_texts_may_lie_in_a_folder_beside_that_of_sounds(tmp_path):
    for i, (sounds, texts) in enumerate((("a/{}.wav", "b/{}.txt"), ("a/{}/x.wav", "b/{}/x.txt"))):
        captions = {texts.format("one"): "rain falls", texts.format("two"): "wind blows"}
        found = read(tmp_path / str(i), [sounds.format("one"), sounds.format("two")], captions, "")[0]
        assert found == {sounds.format("one"): ["rain falls"], sounds.format("two"): ["wind blows"]}
    composed, decomposed = "T\u00fcr", "Tu\u0308r"  # as Windows and macOS write it
    found = read(tmp_path / "t", [f"{decomposed}.wav"], {f"{composed}.txt": "a door"}, "")[0]
    assert found == {f"{decomposed}.wav": ["a door"]}


def test_a_class_that_lies_in_several_is_named_with_them(tmp_path):
    sounds = ["dog/indoor/1.wav", "cat/indoor/2.wav", "cat/outdoor/3.wav", "cow/wav/4.wav"]
    captions = [caption for [caption] in read(tmp_path, sounds, {}, "")[0].values()]
    assert sorted(captions) == ["cat indoor", "cat outdoor", "cow", "dog indoor"]
    sounds = ["fan/id_00/normal/1.wav", "pump/id_02/normal/2.wav"]
    captions = [caption for [caption] in read(tmp_path / "machines", sounds, {}, "")[0].values()]
    assert sorted(captions) == ["fan normal", "pump normal"]
    captions, _, log = read(tmp_path / "coughs", ["coughs/cough/1.wav", "coughs/unknown/2.wav"], {}, "")
    assert captions == {"coughs/cough/1.wav": ["cough"]} and "no words: " in log
    sounds = ["set-a/1.wav", "set-b/2.wav"]
    assert "no words" in refusal(tmp_path / "parts", sounds, {}, "")


def test_the_command_shows_and_saves_what_is_read_back_identically(tmp_path, monkeypatch, capsys):
    sounds = ["audio/a.wav", "audio/b.wav", os.fsdecode(b"audio/caf\xe9.wav")]
    rows = ['a;Dog_bark;test;rain, "falls";wind', "b;cat;train;dogs;", "caf\u00e9;cat;;two;"]
    lay_out(tmp_path, sounds, {"t.csv": "\n".join(["file;category;split;caption 1;caption 2", *rows])})
    table, saved = str(tmp_path / "t.csv"), str(tmp_path / "clips.csv")
    monkeypatch.setattr(sys, "argv", ["data.py", table, "--save", saved])
    D.main()
    assert re.search("'file'(.|\n)*3 clips(.|\n)*0.0 s", capsys.readouterr().out)
    assert D.read_entries(saved, str) == D.read_entries(table, str)
    one = tmp_path / "one"  # of which one caption is that of all
    lay_out(one, ["a.wav", "b.wav", "c.wav"], {f"{name}.txt": f"{name * 3} rain\nwater" for name in "abc"})
    D.save_entries(D.read_entries(str(one), str), str(tmp_path / "one.csv"))
    assert D.read_entries(str(tmp_path / "one.csv"), str) == D.read_entries(str(one), str)
    for flags in ({"files": "x"}, {"words": "x"}):
        with raises(D.UserError, match="has no column 'x', it has 'path', 'caption'"):
            D.read_entries(str(one), str, **flags)
    for flags, said in ((["--words", "x"], "category"), (["--save", table], "exists already")):
        monkeypatch.setattr(sys, "argv", ["data.py", table, *flags])
        with raises(D.UserError, match=said):
            D.main()
    assert "Dog_bark" in (tmp_path / "t.csv").read_text()


def test_damaged_tables_end_in_an_error_of_the_user_or_not_at_all(tmp_path):
    rng = random.Random(0)
    rows = [{"path": "a.wav", "tags": ["x", {"y": 1}], "text": "rain \u0915"}, {"audio": {"path": "b"}}]
    texts = ['path,caption,split\na.wav,rain falls,train\nb.wav,"wind, blows",test\n', json.dumps(rows)]
    texts += ["# x\na|rain\nb|wind\n", json.dumps({"train": {"a": rows[0]}, "n": 1, "b": [[1, "b.wav"]]})]
    for i in range(300):
        damaged = list(rng.choice(texts))
        for _ in range(rng.randrange(1, 8)):
            at = rng.randrange(len(damaged))
            damaged[at : at + rng.randrange(4)] = rng.choice([*'",[\n\t\0\ud83d', "{}", "null", "9" * 30])
        with contextlib.suppress(D.UserError):
            read(tmp_path, [] if i else ["a.wav", "b.wav"], "".join(damaged))


def test_tables_of_something_else_and_other_formats_of_a_clip_are_named_and_not_read(tmp_path):
    captions, credits = "path,caption\ndog/a.wav,rain falls\n", "path,author,site\ndog/a.wav,Ann,Home\n"
    cases = [
        ("CREDITS.csv", {"clips.csv": captions, "CREDITS.csv": credits}, ["dog/a.wav"], "rain falls"),
        ("a.flac", {}, ["dog/a.wav", "dog/a.flac"], "dog"),
    ]
    for unread, files, sounds, caption in cases:
        found, _, log = read(tmp_path / unread, sounds, files, "")
        assert found == {"dog/a.wav": [caption]} and unread in log
    readings = {"readings.csv": "city,degrees\nRome,31\nOslo,12\n"}
    found, _, log = read(tmp_path / "readings", ["dog/a.wav", "cat/b.wav"], readings, "")
    assert found == {"dog/a.wav": ["dog"], "cat/b.wav": ["cat"]} and "readings.csv" in log


def test_nothing_is_listed_by_the_thousand(tmp_path):
    lay_out(tmp_path, ["audio/a.wav"], {})
    for i in range(1000):
        os.link(tmp_path / "audio/a.wav", tmp_path / f"audio/{i}.wav")
    table = "id,text\n" + "".join(f"{i % 1500},rain {i}\n" for i in range(9000))
    captions, _, log = read(tmp_path, [], table)
    assert len(captions) == 1000
    assert "left out, no such sound: 2990 more" in log and log.count("\n") < 15


def test_a_table_may_be_gzipped_and_a_damaged_one_says_so(tmp_path):
    packed = gzip.compress(b"path,caption,phase\na.wav,rain falls,testing\n")
    captions, splits, _ = read(tmp_path, ["a.wav"], {"t.csv.gz": packed}, "t.csv.gz")
    assert captions == {"a.wav": ["rain falls"]} and splits == {"a.wav": "val"}  # all rows are for testing
    assert "cannot be unpacked" in refusal(tmp_path, [], {"b.csv.gz": packed[:30]}, "b.csv.gz")


# ----------------------------------------------------------------------------------------------------------
# data.py: preparation


def test_sounds_are_prepared_again_where_one_or_its_caption_changed_and_else_reused(tmp_path, monkeypatch):
    b = ("b.wav", hiss(0.3), "wind")
    for a in (("a.wav", hiss(0.2), "rain"), ("a.wav", hiss(0.4), "rain"), ("a.wav", hiss(0.4), "snow")):
        clips = audio_data(tmp_path, a, b).clips
        assert clips[0].length == len(a[1]) and clips[0].captions == [a[2]]
    monkeypatch.setattr(D, "read_blocks", lambda path: pytest.fail("decoded again"))
    again = D.prepare(str(tmp_path / "clips.csv"), str(tmp_path / "out"), quiet)
    assert [clip.samples.tolist() for clip in again] == [clip.samples.tolist() for clip in clips]


@pytest.mark.parametrize("name, kept", [("index.json", 50), ("index.json", 0), ("audio.i16", 3200)])
def test_a_damaged_preparation_is_noticed_and_one_that_died_never_taken_for_whole(name, kept, tmp_path):
    table = write_table(tmp_path, ("a.wav", hiss(0.2), "rain"), ("b.wav", hiss(0.3), "wind"))
    with pytest.MonkeyPatch.context() as patch, raises(ZeroDivisionError):
        patch.setattr(D.json, "dump", lambda *_: 1 / 0)
        D.prepare(table, str(tmp_path / "out"), quiet)
    assert len(D.prepare(table, str(tmp_path / "out"), quiet)) == 2
    (folder,) = os.listdir(tmp_path / "out")
    os.truncate(tmp_path / "out" / folder / name, kept)
    with raises(D.UserError, match=f"{folder}: was damaged; delete this folder"):
        D.prepare(table, str(tmp_path / "out"), quiet)


BAD_SOUNDS = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "corrupt": lambda path: path.write_bytes(b"RIFF, but not really" * 50),
    "no_samples": lambda path: write_wav(path, np.zeros(0, np.float32)),
    "not_a_number": lambda path: write_wav(path, np.full(1600, np.nan, np.float32), subtype="FLOAT"),
    "silent": lambda path: write_wav(path, np.zeros(1600, np.float32)),
    "pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
}


def test_unreadable_files_are_named_and_do_not_stop_the_good_ones(tmp_path):
    write_wav(tmp_path / "good.wav", hiss(0.2))
    for name, make in BAD_SOUNDS.items():
        make(tmp_path / f"{name}.wav")
    rows = "".join(f"{name}.wav,sound\n" for name in ["good", *BAD_SOUNDS])
    table, said = write_text(tmp_path / "t.csv", "path,caption\n" + rows), []
    clips = D.prepare(table, str(tmp_path / "out"), said.append)
    assert [(clip.name, clip.length) for clip in clips] == [("good.wav", 3200)]
    assert all(f"{name}.wav" in "\n".join(said) for name in BAD_SOUNDS) and "git lfs pull" in "\n".join(said)


def test_ten_files_of_a_kind_are_listed_and_loud_ones_are_turned_down_as_a_whole(tmp_path):
    rising = np.linspace(0, 5, 8000, dtype=np.float32) * sine(300, 0.5)
    clips = [(f"silent_{i}.wav", np.zeros(800, np.float32), "nothing") for i in range(13)]
    clips += [(f"loud_{i}.wav", rising, "a tone") for i in range(12)]
    data = audio_data(tmp_path, *clips, subtype="FLOAT")
    (path,) = tmp_path.glob("out/*/left_out.txt")
    for name, count in (("silent_", 13), ("loud_", 12)):
        assert data.said.count(name) == 10 and f": {count - 10} more" in data.said
        assert path.read_text().count(name) == count
    again = []
    D.AudioData([str(tmp_path / "clips.csv")], str(tmp_path / "out"), again.append)
    assert "13 left out, 12 turned down" in "\n".join(again) and ".wav" not in "\n".join(again)
    for clip in data.clips:  # as a whole, by one factor
        np.testing.assert_allclose(clip.samples / 32767, rising / np.abs(rising).max(), atol=2e-5)


def test_where_the_source_does_not_say_it_a_tenth_validates_drawn_by_name(tmp_path):
    clips = [(f"{i}.wav", hiss(0.05, i), "rain") for i in range(20)]
    a, b = (audio_data(tmp_path / folder, *rows) for folder, rows in (("a", clips), ("b", clips[::-1])))
    assert {clip.name for clip in a.val} == {clip.name for clip in b.val} and len(a.val) == 2
    assert {clip.name for clip in a.train} == {name for name, *_ in clips} - {clip.name for clip in a.val}
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    for folder in ("a", "copy"):  # the folder that holds the table, under whatever name
        same = D.AudioData([str(tmp_path / folder)], str(tmp_path / "out"), quiet)
        assert {clip.name for clip in same.val} == {clip.name for clip in a.val}
    alone = audio_data(tmp_path / "c", clips[0])  # a single clip serves both
    assert len(alone.train) == len(alone.val) == 1 and "does both" in alone.said


def test_the_splits_of_a_source_are_honoured_and_one_of_which_all_clips_validate_never_trains(tmp_path):
    def source(name, *splits):
        clips = [(f"{i}.wav", hiss(0.1), f"{name} {split}", "", split) for i, split in enumerate(splits)]
        return write_table(tmp_path / name, *clips)

    mixed = source("mixed", "train", "training", "test", "validation", "valid", "train")
    data = D.AudioData([mixed], str(tmp_path / "out"), quiet)
    assert [clip.name[0] for clip in data.val] == ["2", "3", "4"] and len(data.train) == 3
    unsaid = source("unsaid", *["train"] * 9, "", "", "")  # what is not said to train validates first
    data = D.AudioData([unsaid], str(tmp_path / "out"), quiet)
    assert [clip.captions for clip in data.val] == [["unsaid"]]
    train, test = source("a", *["train"] * 12), source("b", *["test"] * 12)
    for both in ([train, test], [f"{train}:1", f"{test}:2"]):
        data = D.AudioData(both, str(tmp_path / "out"), quiet)
        assert [clip.captions for clip in data.train] == [["a train"]] * 12
        assert [clip.captions for clip in data.val] == [["b test"]] * 12
        assert {crop.caption for crop in data.batch(50, 100, rng())} == {"a train"}
    with raises(D.UserError, match=re.escape(test)):
        D.AudioData([test], str(tmp_path / "out"), quiet)


def test_the_recordings_that_ship_are_whole_and_credited():
    entries, folder = D.read_entries(D.SOUNDS, quiet), os.path.dirname(D.SOUNDS)
    assert len(entries) == 932 and {entry.split for entry in entries} == {"train", "val"}
    assert all(os.path.isfile(entry.path) and entry.captions for entry in entries)
    categories = {entry.category for entry in entries}
    assert len(categories) == 59 and categories >= set().union(*D.HELD_OUT_PAIRS)
    credited = {row["path"] for row in read_csv(os.path.join(folder, "CREDITS.csv"))}
    assert {os.path.relpath(entry.path, folder).replace(os.sep, "/") for entry in entries} <= credited


# ----------------------------------------------------------------------------------------------------------
# data.py: crops and mixing


@pytest.mark.parametrize("snr_db, offset", [(-5.0, -300), (0.0, 0), (3.3, 300), (5.0, 2000)])
@pytest.mark.parametrize("amplitude", [0.02, 0.5])  # the second is turned down to avoid clipping
def test_mix_keeps_its_snr_and_its_offset_and_does_not_clip(snr_db, offset, amplitude):
    a, b = hisses(0.1, 1, 2, amplitude=amplitude)
    added = torch.zeros(len(a) + 4000)
    added[2000 + offset :][: len(b)] = b * a.norm() / b.norm() / 10 ** (snr_db / 20)
    both = a + added[2000:][: len(a)]
    assert_close(D.mix(a, b, snr_db, offset), both / max(1, both.abs().max()))
    assert torch.equal(D.mix(a, torch.zeros(1600), snr_db, offset), a)  # silence changes nothing


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three clips, one of them held out, of every category in HELD_OUT_PAIRS and of one more."""
    numbers = {"one": "train", "two": "train", "three": "val"}
    names = sorted(set().union(*D.HELD_OUT_PAIRS, {"alarm"}))
    clips = [(f"{a}_{b}.wav", hiss(0.2), f"{a} {b}", a, numbers[b]) for a in names for b in numbers]
    return audio_data(tmp_path_factory.mktemp("world"), *clips)


def test_training_joins_any_two_clips_but_held_out_pairs_and_a_clip_with_itself(world):
    category = {clip.captions[0]: clip.category for clip in world.train}
    crops = world.batch(3000, 400, rng(), mix_share=0.5)
    joined = [crop.caption.split(" and ") for crop in crops if " and " in crop.caption]
    assert len(joined) / len(crops) == approx(0.5, abs=0.04) and {len(two) for two in joined} == {2}
    assert all(a != b for a, b in joined) and max(crop.wave.abs().max() for crop in crops) <= 1
    pairs = {frozenset((category[a], category[b])) for a, b in joined}
    all_pairs = {frozenset(two) for two in itertools.combinations(set(category.values()), 2)}
    assert {pair for pair in pairs if len(pair) == 2} == all_pairs - D.HELD_OUT_PAIRS


@pytest.mark.parametrize("held_out", [False, True])
def test_mixtures_for_the_test_of_composition(held_out, world):
    category = {clip.captions[0]: clip.category for clip in world.val}
    made, again, other = (D.mixtures(world.val, 1600, held_out, 40, seed) for seed in (0, 0, 1))
    assert [m[1:] for m in made] == [m[1:] for m in again] != [m[1:] for m in other]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(made, again))
    for wave, *captions in made:
        true, wrong = ([category[part] for part in caption.split(" and ")] for caption in captions)
        assert wave.shape == (1600,) and (frozenset(true) in D.HELD_OUT_PAIRS) == held_out
        assert sum(a != b for a, b in zip(true, wrong)) == 1 and len(set(true + wrong)) == 3
    assert not D.mixtures([clip for clip in world.val if clip.category in ("dog", "rain")], 1600, held_out, 9)


def test_batches_depend_on_the_generator_alone_and_draw_one_of_several_captions(world):
    batches = [world.batch(8, 1000, rng(seed), 0.5) for seed in (1, 1, 2)]
    first, again, other = ([(c.wave.tolist(), c.begin, c.caption) for c in crops] for crops in batches)
    assert first == again != other
    several = copy.copy(world)
    several.train = [replace(clip, captions=["one", "two", "three"]) for clip in world.train]
    assert {crop.caption for crop in several.batch(50, 100, rng())} == {"one", "two", "three"}


def test_a_crop_knows_its_place_and_a_short_clip_is_drawn_whole_and_as_often_as_if_it_filled_one(tmp_path):
    data = audio_data(tmp_path, ("long.wav", hiss(0.9), "rain"), ("short.wav", hiss(0.1), "knock"))
    data.train, data.sources = data.clips, [(data.clips, 1.0)]
    for length, share in ((100, 0.1), (RATE * 3 // 10, 0.25), (RATE, 0.5)):
        crops = data.batch(2000, length, rng())
        assert [crop.caption for crop in crops].count("knock") / 2000 == approx(share, abs=0.045)
        assert len({crop.begin for crop in crops[:60]}) > 40
        for crop in crops[:60]:
            padded = np.pad(crop.clip.samples / 32767, length).astype(np.float32)
            assert_close(crop.wave, torch.from_numpy(padded[length + crop.begin :][:length]))
            assert -length // 10 <= crop.begin <= max(0, crop.clip.length - length)


def test_a_category_with_four_times_as_many_clips_is_drawn_twice_as_often(tmp_path):
    clips = [(f"{i}.wav", hiss(0.1), "rain", "rain" if i < 4 else "wind", "train") for i in range(5)]
    data = audio_data(tmp_path, *clips, ("v.wav", hiss(0.1), "rain", "rain", "val"))
    drawn = [crop.clip.category for crop in data.batch(2000, 100, rng())]
    assert drawn.count("wind") / 2000 == approx(1 / 3, abs=0.045)


@pytest.mark.parametrize("quiet_part, min_level, limit", [(0.0, 0.0, D.SILENCE), (0.1, 0.5, 0.2)])
def test_silent_and_too_quiet_crops_are_drawn_again(quiet_part, min_level, limit, tmp_path):
    data = audio_data(tmp_path, ("a.wav", np.concatenate([quiet_part * hiss(2), hiss(1)]), "rain"))
    crops = data.batch(50, 1000, rng(), min_level=min_level)  # two places in three are too quiet
    assert sum(crop.wave.abs().max().item() > limit for crop in crops) >= 48


@pytest.mark.parametrize("silence", [0, 0.03, 0.5, 1.7])
def test_silence_before_a_sound_is_cut_off(silence, tmp_path):
    sound = np.concatenate([np.zeros(int(silence * RATE)), hiss(0.5)])
    (clip,) = audio_data(tmp_path, ("a.wav", sound, "rain")).clips
    kept = min(silence, 0.05) * RATE + 0.5 * RATE
    assert clip.length == approx(kept, abs=30)  # noise may begin with some quiet samples
    assert abs(clip.samples[-RATE // 4 :] / 32767 - hiss(0.5)[-RATE // 4 :]).max() < 1e-4


@pytest.mark.parametrize("a, b, share", [(":2", "", 2 / 3), (":0.5", ":1.5", 1 / 4), ("", "", 1 / 5)])
def test_sources_are_drawn_by_their_weights_or_else_by_their_length(a, b, share, tmp_path):
    a = write_table(tmp_path / "a", ("a.wav", hiss(0.2), "rain")) + a
    b = write_table(tmp_path / "b", ("b.wav", hiss(0.8), "wind")) + b
    data = D.AudioData([a, b], str(tmp_path / "out"), quiet)
    captions = [crop.caption for crop in data.batch(2000, 100, rng())]
    assert captions.count("rain") / 2000 == approx(share, abs=0.045)  # more than four standard deviations
    for weight in ("0", "-1", "nan", "1e"):  # no weight, but a part of a name that does not exist
        with raises((D.UserError, FileNotFoundError), match=f":{weight}"):
            D.AudioData([f"{a}:{weight}"], str(tmp_path), quiet)


# ----------------------------------------------------------------------------------------------------------
# data.py: the tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return D.Tokenizer.train(["a dog barks", "rain falls", "a bell rings while wind blows"], 300)


def test_tokenizer_knows_every_word_pads_with_zero_cuts_at_the_window_and_notices_damage(tokenizer):
    tiny = D.Tokenizer.train(["a dog barks \u2585"], 500)  # a single caption is enough, odd letters or not
    ids = tiny.encode("Zürich 東京 dog")
    assert ids and 1 not in ids and max(ids) < tiny.vocab_size  # 1 is "unknown": bytes stand in for it
    assert tokenizer.encode("A Dog Barks") == tokenizer.encode("a dog barks")
    many = [chr(0x4E00 + i) for i in range(600)]  # more letters than pieces
    assert all(len(D.Tokenizer.train(many, 300).encode(letter)) <= 2 for letter in many[::60])
    batch, ids = tokenizer.batch(["a dog", "", "rain falls " * 20], 12), tokenizer.encode("a dog")
    assert batch.shape == (3, 12) and batch.dtype == torch.int64
    assert batch[0].tolist() == ids + [0] * (12 - len(ids)) and 0 not in ids
    assert not batch[1].any() and batch[2].all()
    model = tokenizer.model
    for harmed in (model[:99], model[:-9] + b"x" + model[-8:], b"", b"not a model"):
        with raises(D.UserError, match="damaged"):
            D.Tokenizer(harmed)


# ----------------------------------------------------------------------------------------------------------
# data.py: what the three scripts share


@pytest.mark.parametrize("asked, slow, chosen", [(None, 2, 1), (None, 1, 2), (2, 2, 2), (1, 1, 1)])
def test_a_cpu_uses_the_threads_asked_for_or_one_where_that_is_faster(asked, slow, chosen):
    said = []

    def work():
        time.sleep(0.02 * (torch.get_num_threads() == slow))

    torch.set_num_threads(2)
    try:
        D.choose_threads(asked, CPU, work, said.append)
        assert torch.get_num_threads() == chosen and len(said) == (chosen == 1 and not asked)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_muon_takes_the_steps_of_pytorchs_own(shape, monkeypatch):
    monkeypatch.setattr(D, "fast_dtype", lambda device: torch.float32)
    first = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(first.clone()) for _ in range(2))
    muon = D.Muon([ours], lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for g in torch.randn(4, *shape):
        ours.grad, theirs.grad = g.clone(), g.clone()
        muon.step()
        reference.step()
    way = (theirs.data - first).abs().max().item()  # which PyTorch goes in bfloat16
    assert_close(ours.data, theirs.data, rtol=0, atol=0.03 * way)


def test_saving_that_fails_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = str(tmp_path / "x.pt")
    D.save_atomic({"a": 1}, path)
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
    with raises(D.UserError, match="x.pt: cannot save .No space left"):
        D.save_atomic({"a": 2}, path)
    assert torch.load(path) == {"a": 1} and os.listdir(tmp_path) == ["x.pt"]


BUGS = [
    lambda _: np.zeros(3) + np.zeros(4),
    lambda _: torch.zeros(2, 3) @ torch.zeros(2, 3),
    lambda _: os.read(-1, 1),  # an OSError without a name
]
OUT_OF_MEMORY = "out of memory; to train, lower --batch"
MISHAPS = {
    D.UserError("--mix 2: expected\n a share"): "--mix 2: expected a share",
    MemoryError(): OUT_OF_MEMORY,
    torch.OutOfMemoryError("CUDA out of memory. Tried"): OUT_OF_MEMORY,
    RuntimeError("[enforce fail] can't allocate memory: you tried"): OUT_OF_MEMORY,
    FileNotFoundError(2, "No such file or directory", "x.txt"): "x.txt: No such file or directory",
    CodecError("codec.pt: truncated"): "codec.pt: truncated",
    LMError("lm.pt: truncated"): "lm.pt: truncated",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bug_keeps_its_traceback_and_what_the_user_can_mend_is_one_line(script, monkeypatch, capsys):
    def run_as_a_command(action):  # which happens inside main()
        monkeypatch.setattr(D, "pick_device", action)
        monkeypatch.setattr(sys, "argv", [script] + ["--prompt", "rain"] * (script == "sample.py"))
        runpy.run_path(str(HERE / script), run_name="__main__")

    for bug in BUGS:
        with raises((ValueError, RuntimeError, OSError)) as caught:
            run_as_a_command(bug)
        assert not isinstance(caught.value, D.UserError)
    for error, words in MISHAPS.items():
        if isinstance(error, LMError) and script == "train_codec.py":
            continue  # it reads no language model
        with raises(SystemExit) as stop:
            run_as_a_command(raising(error))
        assert stop.value.code == 2
        assert re.fullmatch(f"error: {re.escape(words)}.*\n", capsys.readouterr().err)


def test_a_closed_standard_output_and_braces_in_a_caption_are_no_mishap(monkeypatch):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, None)
    with D.one_line_errors():
        print("to nobody", file=sys.stderr)
        assert [D.parsed(text) for text in ("{{}}", "{['rain']}")] == ["{{}}", "{['rain']}"]


def test_a_folder_that_cannot_be_locked_is_used_all_the_same(tmp_path, monkeypatch):
    unsupported = OSError(errno.ENOTSUP, "Operation not supported")
    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", raising(unsupported))
    with D.lock_folder(str(tmp_path)):
        D.lock_folder(str(tmp_path)).close()


def test_a_closed_terminal_stops_a_run_but_not_one_under_nohup():
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    before = [signal.getsignal(number) for number in numbers]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        D.Stopper()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stopper = D.Stopper()
        for _ in range(2):  # the shell sends one, and the system another
            os.kill(os.getpid(), signal.SIGHUP)
        assert stopper.asked(CPU) and stopper.signal == "SIGHUP"
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def test_a_run_is_not_overwritten_because_resume_was_forgotten(tmp_path):
    checkpoint, product = str(tmp_path / "codec_train.pt"), str(tmp_path / "codec.pt")
    anew, on = (SimpleNamespace(resume=resume, eval_only=False) for resume in (False, True))
    with raises(D.UserError, match="no run to go on with"):
        D.check_run(on, product, checkpoint)
    D.check_run(anew, product, checkpoint)
    with raises(D.UserError, match="codec.pt: no such checkpoint"):
        D.check_run(SimpleNamespace(resume=False, eval_only=True), product, checkpoint)
    write_text(tmp_path / "codec.pt", "all that is left of a run")
    for _ in ("without a checkpoint", "beside one that is damaged"):
        with raises(D.UserError, match="codec.pt: would be overwritten"):
            D.check_run(anew, product, checkpoint)
        write_text(tmp_path / "codec_train.pt", "no checkpoint")
    D.save_atomic({"step": 100}, checkpoint)
    D.check_run(anew, product, checkpoint)  # of so short a run not much is lost
    D.save_atomic({"step": 101}, checkpoint)
    D.check_run(on, product, checkpoint)
    with raises(D.UserError, match="101 steps; go on with it by --resume"):
        D.check_run(anew, product, checkpoint)
    path = write_text(tmp_path / "codec.csv", "step;loss\n101;2,5\n")  # as some spreadsheets save it
    D.Log(path, 101).write({"step": 102})
    assert [row["step"] for row in D.log_rows(path)] == ["102"]


@pytest.mark.parametrize("name", ["codec", "lm", "data"])
def test_a_file_needs_none_of_the_others(name):
    code = (HERE / f"{name}.py").read_text(encoding="utf-8")
    imported = re.findall(r"^(?:import|from) (\w+)(?=[\w.]*$|[\w.]* import | as )", code, re.M)
    allowed = {"torch", "numpy", "soundfile", "sentencepiece", "tqdm"} if name == "data" else {"torch"}
    assert set(imported) <= allowed | sys.stdlib_module_names


# ----------------------------------------------------------------------------------------------------------
# codec.py: the quantizer. The reference code has three known faults; these tests show that ours has none.


def test_latents_become_the_sum_of_nearest_codes_straight_through_with_a_commitment_on_every_stage():
    quantizer, z, g = ResidualVQ(3, 16, 8).eval(), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    z.requires_grad_()
    z_q, codes, commitment = quantizer(z)
    assert codes.shape == (2, 3, 5) and codes.dtype == torch.int64
    assert_close(z_q, quantizer.decode(codes))
    residual, pulls = z.detach(), []
    for k, codebook in enumerate(quantizer.codebooks):
        assert torch.equal(codes[:, k], torch.cdist(residual, codebook.embed).argmin(-1))
        residual = residual - codebook.embed[codes[:, k]]
        pulls.append(2 * residual / z.numel() / 3)
    assert torch.equal(torch.autograd.grad(z_q, z, g)[0], g)  # as if nothing had been in between
    assert_close(torch.autograd.grad(commitment, z)[0], sum(pulls))


@pytest.mark.parametrize("steps", [0, 3, 10**6])
def test_averages_begin_with_counts_and_sums_of_k_means_and_follow_their_closed_form(steps):
    x, codebook = 3 + torch.randn(1024, 8), VectorQuantizer(16, 8).train()
    codebook.dead_code_threshold = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codebook, "update", quiet)
        codebook(x)
    assert codebook.inited and codebook.cluster_size.sum() == 1024
    assert_close(codebook.embed_sum, codebook.embed * codebook.cluster_size[:, None])
    assert_close(codebook.embed_sum.sum(0), x.sum(0), rtol=1e-3, atol=1e-3)
    x, size, total = 3 + torch.randn(64, 8), codebook.cluster_size.clone(), codebook.embed_sum.clone()
    chosen = F.one_hot(torch.cdist(x, codebook.embed).argmin(1), 16).float()  # (N, V)
    codebook.steps.fill_(steps)
    codebook(x)
    decay = min(0.99, (steps + 1) / (steps + 10))  # quick at first, then as slow as the paper's
    size = decay * size + (1 - decay) * chosen.sum(0)
    total = decay * total + (1 - decay) * chosen.T @ x
    assert_close(codebook.cluster_size, size)
    assert_close(codebook.embed_sum, total, rtol=1e-4, atol=1e-5)
    assert_close(codebook.embed, total / size[:, None], rtol=1e-4, atol=1e-5)


def test_a_dead_code_is_replaced_for_good_and_used_again_but_a_rare_one_is_not_dead():
    """With fewer vectors in a batch than codes, most codes are rarely used."""
    codebook, x = VectorQuantizer(256, 4).train(), torch.randn(64, 4)
    codebook.is_inited = True  # it is past its k-means start and the quick first steps of its averages
    codebook.steps.fill_(10**6)
    codebook.cluster_size.fill_(0.25)
    codebook.embed_sum.copy_(codebook.embed * 0.25)
    codebook.embed[3], codebook.cluster_size[3], codebook.embed_sum[3] = 1000.0, 0.0, 0.0
    before = codebook.embed.clone()
    _, index = codebook(x)
    assert torch.cdist(codebook.embed[3:4], x).min() < 1e-5  # it is one of the batch now
    assert_close(codebook.embed_sum[3] / codebook.cluster_size[3], codebook.embed[3])
    rare = sorted(set(range(256)) - {3, *index.tolist()})
    assert_close(codebook.embed[rare], before[rare])
    assert (torch.cat([codebook(torch.randn(64, 4))[1] for _ in range(70)]) == 3).any()


# ----------------------------------------------------------------------------------------------------------
# codec.py: losses


def test_mel_filters_are_the_triangles_of_the_definition_and_none_is_empty():
    mels = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 64)
    bins, centres = np.linspace(0, 8000, 513), 700 * (10 ** (mels / 2595) - 1)
    expected = np.stack([np.interp(bins, centres, band) for band in np.eye(64)], 1)
    np.testing.assert_allclose(codec_py.mel_filters(1024, 64), expected, rtol=1e-4, atol=1e-5)
    for window in (2**i for i in range(5, 12)):
        filters = codec_py.mel_filters(window, 64)
        assert filters.sum(0).min() > 0 and filters.shape[0] == window // 2 + 1
        assert filters.shape[1] == 64 or window // 5 <= filters.shape[1] < 64


def test_mel_loss_is_its_formula_and_moves_the_estimate_only():
    loss, (x, y) = MelLoss(exponents=[8]), hisses(0.2, 0, 1, 2, 3).split(2)
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    value = loss(x, y)
    a, b = loss.mel(x, 256), loss.mel(y, 256)
    norm = ((a + 1e-3).log() - (b + 1e-3).log()).norm(dim=-1) / a.shape[-1] ** 0.5
    assert_close(value, (a - b).abs().mean() + norm.mean())
    value.backward()
    assert x.grad is None and y.grad.abs().sum() > 0
    equal = MelLoss()(x, z := x.detach().clone().requires_grad_())
    equal.backward()
    assert equal < 1e-4 and z.grad.isfinite().all()


def test_hinge_and_feature_losses_are_their_formulas():
    real, fake = ([2 * torch.randn(2, 1, 3, n, requires_grad=True) for n in (4, 7)] for _ in range(2))
    pairs = [(r.detach().numpy(), f.detach().numpy()) for r, f in zip(real, fake)]
    hinge = np.mean([np.maximum(0, 1 - r).mean() + np.maximum(0, 1 + f).mean() for r, f in pairs])
    assert codec_py.discriminator_loss(real, fake).item() == approx(hinge, rel=1e-5)
    fooled = np.mean([np.maximum(0, 1 - f).mean() for _, f in pairs])
    assert codec_py.generator_loss(fake).item() == approx(fooled, rel=1e-5)
    loss = codec_py.feature_loss([real], [fake])
    assert loss.item() == approx(np.mean([np.abs(r - f).mean() for r, f in pairs]), rel=1e-5)
    assert torch.autograd.grad(loss, [*fake, *real], allow_unused=True)[2:] == (None, None)  # real ones stay


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_balancer_gives_each_loss_its_share_whatever_its_scale(scale):
    decay, a, b = 0.9, torch.randn(2, 3, 50), torch.randn(2, 3, 50)  # gradients: steps, clips, samples
    a[:, 0] *= 5  # a clip whose gradient is above the average
    balancer, norms = Balancer(["a", "b", "none"], decay), []
    for step in range(2):
        y = torch.zeros(3, 50, requires_grad=True)
        losses = {"a": (y * a[step]).sum(), "b": scale * (y * b[step]).sum(), "none": y.sum()}
        gradient = balancer(losses, {"a": 1.0, "b": 3.0, "none": 0.0}, y)
        norms.append([3 * g[step].norm(dim=1, keepdim=True) for g in (a, b)])  # of a clip's own: B times
        weights = [(1 - decay) * decay ** (step - i) for i in range(step + 1)]
        expected = 0
        for i, (g, share) in enumerate(((a[step], 0.25), (b[step], 0.75))):
            average = sum(w * n[i].mean() for w, n in zip(weights, norms)) / sum(weights)
            expected = expected + share * g / torch.maximum(norms[step][i], average)  # no clip pulls harder
        assert_close(gradient, expected)


# ----------------------------------------------------------------------------------------------------------
# codec.py: the codec


@pytest.fixture(scope="session")
def codecs():
    """Untrained codecs by number of streams; their codebooks suit the latents: many codes are in use."""
    made = {}
    for streams in (1, 2, 4, 8):
        torch.manual_seed(streams)
        codec = made[streams] = Codec(CodecConfig(streams, "test")).eval()
        with torch.no_grad():
            z = codec.latents(hisses(0.5))[0]
        for k, codebook in enumerate(codec.quantizer.codebooks):
            codebook.embed.mul_(z.std(0) / 2**k).add_(z.mean(0) if k == 0 else 0)
    return made


def same(a, b):
    """Nearly all codes are; rounding may tip one that lies between two, on some machine, some day."""
    return (a == b).float().mean() > 0.99


TABLE = [(1, 32, 500, 2048, 5.5), (2, 64, 250, 1024, 5.0), (4, 128, 125, 512, 4.5), (8, 256, 62.5, 256, 4.0)]


def test_the_papers_table_of_streams_and_sizes():
    for streams, *row in TABLE:
        cfg = CodecConfig(streams)
        assert [cfg.hop, cfg.frame_rate, cfg.codebook_size, cfg.kbps] == row
    with torch.device("meta"):
        models = [Codec(CodecConfig(size=size)) for size in ("paper", "tiny")]
        models += [AudioLM(LMConfig(size=size)) for size in ("base", "large")]
    paper, tiny, base, large = (sum(p.numel() for p in model.parameters()) for model in models)
    assert 11e6 < paper < 14e6 and 0.2 < tiny / paper < 0.3
    assert base == approx(285e6, rel=0.02) and large == approx(1e9, rel=0.05)
    for config, error in ((CodecConfig, CodecError), (LMConfig, LMError)):
        for wrong, words in (({"streams": 3}, "1, 2, 4, 8"), ({"size": "huge"}, "--size")):
            with raises(error, match=words):
                config(**wrong)


def test_convolutions_with_matrices_for_weights_or_folded_bins_are_those_of_pytorch():
    x = torch.randn(2, 24, 3)  # (B, T, C)
    conv, up = codec_py.Conv(3, 5, 8, stride=4), codec_py.ConvTranspose(3, 5, 4)
    assert_close(conv(x), F.conv1d(x.mT, conv.weight.view(5, 3, 8), conv.bias, 4, 2).mT)
    assert_close(up(x), F.conv_transpose1d(x.mT, up.weight.view(5, 3, 8).transpose(0, 1), up.bias, 4, 2).mT)
    x, weight = torch.randn(2, 3, 5, 10), torch.randn(4, 3, 3, 8)  # of the discriminator
    strided = F.conv2d(x, weight, stride=(1, 2), padding=(2, 4), dilation=(2, 1))
    folded = torch.cat((weight[..., 0::2], weight[..., 1::2]), 1)  # even bins, then odd ones
    assert_close(F.conv2d(codec_py.fold(x), folded, padding=(2, 2), dilation=(2, 1)), strided)
    conv = codec_py.Conv2d(3, 4, (3, 8), dilation=(2, 1), padding=(2, 4))
    weight = conv.weight.view(4, 3, 3, 8)
    assert_close(conv(x), F.conv2d(x, weight, conv.bias, padding=(2, 4), dilation=(2, 1)))


def test_the_discriminator_hears_phases_as_they_are_and_quiet_partials_beside_loud_ones():
    spectrum = torch.tensor([1 + 1j, -300j, 0.01, 0], dtype=torch.complex64)
    heard = codec_py.compress(spectrum)
    assert_close(heard[:3].angle(), spectrum[:3].angle())
    assert_close(heard[:3].abs(), spectrum[:3].abs() ** 0.3, rtol=0.01, atol=0)
    assert heard[3] == 0


def test_what_is_quieter_than_four_steps_of_a_16_bit_file_decodes_to_silence():
    decoder, wave = codec_py.Decoder(CodecConfig(4)), torch.tensor([5e-5, -1.2e-4, 0.0, 1e-3, -0.5])
    decoder.up = torch.nn.Identity()
    assert_close(decoder.to_wave(wave / codec_py.TYPICAL_RMS), wave)  # training hears all of it
    heard = decoder.eval().to_wave(wave / codec_py.TYPICAL_RMS)
    assert_close(heard, torch.tensor([0, 0, 0, 1e-3 - 2**-13, -0.5 + 2**-13]))


@pytest.mark.parametrize("loudness", [0.1, 0.001])
def test_an_untrained_codec_already_tells_frames_apart_however_quiet(loudness):
    """Where all frames look alike at first, they may do so for ever: the codebooks collapse."""
    wave = loudness * torch.randn(1, 8000) * torch.sin(torch.linspace(0, 20, 8000))
    z = Codec(CodecConfig(4, "tiny")).latents(wave)
    assert z.std(1).square().mean() > 0.3 * z.square().mean()


@pytest.mark.parametrize("streams", [1, 2, 4, 8])
def test_any_length_can_be_coded_and_comes_back(streams, codecs):
    codec, hop = codecs[streams], codecs[streams].cfg.hop
    for length in (1, 2, hop - 1, hop, hop + 1, 5000):
        wave, frames = hisses(0.4, 0, 1)[:, :length], math.ceil(length / hop)
        codes = codec.encode(wave)
        assert codes.shape == (2, streams, frames) and codes.dtype == torch.int64
        assert 0 <= codes.min() and codes.max() < codec.cfg.codebook_size
        with torch.no_grad():
            wave_hat, same_codes, _ = codec(wave)
        assert wave_hat.shape == wave.shape and same(codes, same_codes)
        assert codec.decode(codes).shape == (2, frames * hop)
    assert_close(wave_hat, codec.decode(same_codes)[:, :length], rtol=0, atol=1e-5)


@pytest.mark.parametrize("streams", [1, 8])
def test_codes_depend_neither_on_the_rest_of_the_batch_nor_on_what_follows_later(streams, codecs):
    codec = codecs[streams]
    waves = hisses(1.0, 0, 1, 2) * torch.tensor([0.1, 1, 5])[:, None]
    together = codec.encode(waves)
    assert len(together.unique()) > 20  # else there would be nothing to see
    assert same(together, torch.cat([codec.encode(wave[None]) for wave in waves]))
    part = codec.encode(waves[:, : 20 * codec.cfg.hop])
    assert same(part[:, :, :14], together[:, :, :14])


@pytest.mark.parametrize("streams", [1, 4, 8])
@pytest.mark.parametrize("chunks", [[1] * 46, [1, 2, 7, 1, 13, 3, 19], [45, 1]], ids=len)
def test_decoding_in_pieces_equals_decoding_the_whole(streams, chunks, codecs):
    codec, generator = codecs[streams], torch.Generator().manual_seed(0)
    codes = torch.randint(codec.cfg.codebook_size, (2, streams, 46), generator=generator)
    pieces, whole = torch.cat(list(codec.decode_stream(iter(codes.split(chunks, 2)))), 1), codec.decode(codes)
    assert whole.abs().mean() > 1e-3  # else there would be nothing to compare
    assert_close(pieces, whole, rtol=0, atol=1e-5)
    left = iter(codes.split(5, 2))
    next(codec.decode_stream(left))
    assert len(list(left)) > 6  # the first piece comes out before the last code went in


def test_only_training_mode_changes_the_codebooks():
    codec, wave = Codec(CodecConfig(4, "test")), hisses(0.5)
    before = copy.deepcopy(codec.state_dict())
    codec.eval()(wave)
    codec.train().encode(wave)
    assert all(torch.equal(tensor, before[name]) for name, tensor in codec.state_dict().items())
    codec.train()(wave)
    for k, codebook in enumerate(codec.quantizer.codebooks):
        assert not torch.equal(codebook.embed, before[f"quantizer.codebooks.{k}.embed"])


def test_measures_of_a_codec():
    x, noise = torch.from_numpy(np.stack([sine(400), sine(1000, amplitude=0.05)]))[:, None]
    for scale in (1, 3):  # the scale is no matter
        assert codec_py.si_snr(x, scale * (x + noise)).item() == approx(20, abs=0.01)
    x, y = hisses(0.3, 0, 1).split(1)
    assert codec_py.log_spectrum_distance(x, x).item() == codec_py.log_mel_distance(x, x).item() == 0
    assert codec_py.log_spectrum_distance(x, y).item() == approx(0.3, abs=0.05)  # its docstring says
    assert codec_py.log_mel_distance(x, 10 * x).item() == approx(1, abs=0.02)
    codes = torch.stack([torch.arange(64), torch.arange(64) % 4, torch.zeros(64, dtype=torch.long)])[None]
    counts = codec_py.code_counts(codes, 64)
    assert counts.shape == (3, 64) and counts[1].tolist() == [16] * 4 + [0] * 60
    assert [codec_py.perplexity(c) for c in counts] == approx([64, 4, 1], rel=1e-4)


def test_codec_and_its_hash_survive_a_checkpoint(codecs, tmp_path):
    codec, wave = codecs[2], hisses(0.3)
    torch.save(codec.checkpoint(), tmp_path / "codec.pt")
    again = Codec.load(tmp_path / "codec.pt")
    assert again.hash() == codec.hash() != codecs[4].hash() and not again.training
    assert torch.equal(again.encode(wave), codec.encode(wave))
    with torch.no_grad():
        again.decoder.inp.bias[0] += 1e-3  # codes stay what they are
        assert again.hash() == codec.hash()
        again.encoder.out[2].bias[0] += 1e-3
    assert again.hash() != codec.hash()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("marker",)  # a folder that is made when this is unpickled


KIND = {"kind": "nanoaudiogen codec"}
BAD_CHECKPOINTS = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "code": lambda path: torch.save(KIND | {"config": Evil()}, path),
    "other project": lambda path: torch.save({"state_dict": {"weight": torch.zeros(3)}}, path),
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "other weights": lambda path: torch.save(KIND | {"config": {"streams": 4}, "model": {}}, path),
    "other version": lambda path: torch.save(KIND | {"config": {"books": 4}, "model": {}}, path),
    "truncated": lambda path: (torch.save(KIND | {"model": torch.zeros(999)}, path), os.truncate(path, 2000)),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_in_one_line_that_names_it_and_runs_no_code(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    BAD_CHECKPOINTS[kind](tmp_path / "bad.pt")
    for load, expected in ((Codec.load, CodecError), (AudioLM.load, LMError)):
        with raises(expected) as error:
            load(tmp_path / "bad.pt")
        assert str(tmp_path / "bad.pt") in str(error.value) and "\n" not in str(error.value)
    assert not os.path.exists("marker")
    loader = inspect.getsource(codec_py.load_checkpoint)  # two files have the same one, but for its error
    assert loader.replace("CodecError", "LMError") == inspect.getsource(lm_py.load_checkpoint)


# ----------------------------------------------------------------------------------------------------------
# lm.py

TEXT = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 0, 0, 0]])


def random_codes(frames=24, seed=0):
    return torch.randint(1024, (2, 2, frames), generator=torch.Generator().manual_seed(seed))


CODES = random_codes()


def small_lm(size="test"):
    return AudioLM(LMConfig(2, size, vocab_size=50, max_text_len=8, max_frames=24)).eval()


def made_louder(lm):
    """Larger weights, and biases: words, seeds and all parts of the model matter."""
    with torch.no_grad():
        for p in lm.parameters():
            p.copy_(6 * p if p.dim() >= 2 else p + 0.1 * torch.randn_like(p))
    return lm


@pytest.fixture
def lm():
    return made_louder(small_lm())


def next_logits(lm, codes, text=TEXT):
    """The definition of sampling: what the whole model says of the frame after these codes (B, K, V)."""
    with torch.no_grad():
        return lm.predict(lm.text_encoder(text), F.pad(codes, (0, 1)))[:, :, -1]


def test_codes_are_about_equally_likely_before_training_and_what_sounds_alike_is_alike():
    lm, codebooks = small_lm("tiny"), torch.randn(2, 1024, 16) * torch.tensor([2.0, 0.5])[:, None, None]
    assert lm(CODES, TEXT)[1].item() == approx(math.log(1024), rel=0.05)
    for books in (0 * codebooks, codebooks):  # a codec of a single step has codebooks of nothing
        lm.init_from_codebooks(books)
        assert lm(CODES, TEXT)[1].item() == approx(math.log(1024), rel=0.05)
    codes = random_codes(50)[:1]
    latents = codebooks[0][codes[0, 0]] + codebooks[1][codes[0, 1]]  # (50, 16)
    heads = lm.lm_heads.weight.view(2, 1024, -1)[1]
    for a, b in ((latents, lm.embed(codes)[0]), (codebooks[1][:50], heads[:50])):
        assert torch.corrcoef(torch.stack([torch.pdist(a), torch.pdist(b)]))[0, 1] > 0.9


def test_turned_queries_and_keys_know_how_far_apart_they_are_and_nothing_else():
    q, k = hisses(0.004, 0, 1, amplitude=1).view(2, 1, 1, 1, 64)
    rope = lm_py.rope_table(600, 64)

    def product(i, j):
        a, b = (lm_py.apply_rotary_emb(x, rope[:, n : n + 1]) for x, n in ((q, i), (k, j)))
        return (a * b).sum()

    assert_close(product(7, 3), product(504, 500), rtol=1e-3, atol=1e-4)
    assert abs(product(7, 3) - product(7, 6)) > 1e-2


@pytest.mark.parametrize("causal, masked", [(True, False), (False, True), (False, False)])
def test_attention_written_out_has_the_result_and_the_gradient_of_pytorchs_kernel(causal, masked):
    qkv = torch.randn(3, 2, 2, 9, 8)
    mask = torch.arange(9)[None] < 5 if masked else None  # (1, S)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        x = qkv.to(dtype).requires_grad_()
        y = lm_py.attention(*x, mask, causal)
        y.float().square().sum().backward()
        results.append((y.float(), x.grad.float()))
    for written_out, kernel in zip(*results):
        assert_close(written_out, kernel, rtol=0.05, atol=0.05)


def test_text_reaches_the_sound_by_the_prefix_and_by_cross_attention_and_may_be_padded(lm):
    u, other = lm.text_encoder(TEXT), lm.text_encoder(TEXT.flip(0))
    both = lm.predict(u, CODES)
    assert torch.equal(both, lm.predict(lm.text_encoder(F.pad(TEXT, (0, 3))), CODES))
    for prefix, crossed in ((other, lm.cross_kv(u)), (u, lm.cross_kv(other))):
        lm.cross_kv = lambda _, crossed=crossed: crossed
        assert (lm.predict(prefix, CODES) - both).abs().max() > 1e-3


def test_streams_are_embedded_by_their_mean_and_the_loss_is_the_mean_of_their_cross_entropies(lm):
    tables = lm.wte.weight.view(2, 1024, -1)
    assert_close(lm.embed(CODES), (tables[0][CODES[:, 0]] + tables[1][CODES[:, 1]]) / 2)
    logits, loss = lm(CODES, TEXT)
    assert logits.shape == (2, 2, 24, 1024)  # no logits for text: nothing else could be in the loss
    assert_close(loss, -logits.log_softmax(-1).gather(-1, CODES[..., None]).mean())
    misread, loss = lm(CODES, TEXT, input_codes=CODES.flip(2))
    assert torch.equal(misread, lm(CODES.flip(2), TEXT)[0])
    assert_close(loss, -misread.log_softmax(-1).gather(-1, CODES[..., None]).mean())
    with raises(LMError, match="9 tokens"):  # more than it has places for
        lm(CODES, torch.ones(2, 9, dtype=torch.long))
    with raises(LMError, match="25 frames"):
        lm(random_codes(25), TEXT)


def test_without_its_history_a_clip_is_told_from_words_alone_and_a_crop_knows_its_place(lm):
    history_mask = torch.tensor([False, True])
    a, b = (lm(codes, TEXT, history_mask)[0] for codes in (CODES, CODES.flip(2)))
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])
    assert_close(a[1], lm(CODES, TEXT)[0][1])
    n, crop = lm.cfg.max_text_len, CODES[:, :, :19]  # a crop is as far from its text as in its clip
    logits = lm(crop, TEXT, first_frame=torch.tensor([0, 5]))[0]
    assert_close(logits[:1], lm(crop[:1], TEXT[:1])[0])
    lm.rope = torch.cat((lm.rope[:, :n], lm.rope[:, n + 5 :]), 1)
    assert_close(logits[1:], lm(crop[1:], TEXT[1:])[0])


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])  # of words: none, as learnt, more
def test_cached_greedy_decoding_equals_the_guided_full_forward(guidance, lm):
    made = lm.generate(TEXT, 24, temperature=0, guidance=guidance)
    for i in range(24):
        cond, uncond = (next_logits(lm, made[:, :, :i], text).log_softmax(-1) for text in (TEXT, 0 * TEXT))
        assert torch.equal(made[:, :, i], (guidance * cond + (1 - guidance) * uncond).argmax(-1))


@pytest.mark.parametrize("dtype", {torch.float32, D.fast_dtype(CPU)})
def test_weights_of_8_bits_predict_nearly_the_same_whatever_the_batch(dtype, lm):
    text, codes = TEXT.repeat(3, 1), CODES[:, :, :9].repeat(3, 1, 1)
    expected = next_logits(lm.to(dtype), codes, text)
    few, many = next_logits(lm.pack(), codes[:2], TEXT), next_logits(lm, codes, text)  # 34 and 102 rows
    assert_close(few, many[:2], rtol=0, atol=1e-4)
    for logits in (few, many[:2]):
        assert (logits - expected[:2]).float().std() < 0.02 * expected.float().std()
    frames = [lm.generate(TEXT[:n], 12, seeds=[7, 8][:n], guidance=3.0) for n in (1, 2)]
    assert torch.equal(frames[0], frames[1][:1])
    with raises(LMError, match="1 seeds for 2 texts"):
        lm.generate(TEXT[:2], 12, seeds=[7])


P, LIKELIEST = torch.tensor([[0.05, 0.4, 0.1, 0.3, 0.15], [0, 1, 0, 0, 0]])
DRAWS = [
    ({}, P),
    ({"temperature": 0.5}, P**2),
    ({"top_k": 2}, P * torch.tensor([0, 1, 0, 1, 0])),
    ({"top_p": 0.75}, P * torch.tensor([0, 1, 0, 1, 1])),  # .4 + .3 is less than .75, one more is needed
    ({"temperature": 0}, LIKELIEST),
    ({"top_k": 1}, LIKELIEST),
    ({"top_p": 1e-6}, LIKELIEST),
]


@pytest.mark.parametrize("options, expected", DRAWS)
def test_draws_follow_softmax_temperature_top_k_and_top_p_and_survive_the_ends_of_noise(options, expected):
    noise = torch.rand(20000, 2, 5, generator=torch.Generator().manual_seed(0))
    drawn = sample_next(P.log().expand(20000, 2, 5), noise, **options)
    share = torch.bincount(drawn.flatten(), minlength=5) / 40000
    assert_close(share, expected / expected.sum(), rtol=0, atol=0.012)
    assert not share[expected == 0].any()
    for value in (0.0, 1.0):
        assert sample_next(torch.tensor([[[0.0, -1.0, -math.inf]]]), torch.full((1, 1, 3), value)).item() == 0


def test_a_sound_depends_on_its_seed_and_a_negative_prompt_but_not_on_the_batch(lm):
    both, alone = lm.generate(TEXT, 24, seeds=[5, 7]), lm.generate(TEXT[1:], 24, seeds=[7])
    assert torch.equal(both[1:], alone)
    assert not torch.equal(lm.generate(TEXT[1:], 24, seeds=[8]), alone)
    assert torch.equal(lm.generate(TEXT, 24, seeds=[5, 7], negative=0 * TEXT), both)  # no text
    assert not torch.equal(lm.generate(TEXT, 24, seeds=[5, 7], negative=TEXT.flip(0)), both)
    assert torch.autograd.grad(lm(both, TEXT)[1], lm.bos)[0].any()  # what was made can be learnt from


def test_output_longer_than_the_model_was_trained_for_comes_in_blocks_and_prefixes_are_not_repeated(lm):
    blocks = list(lm.generate_stream(TEXT, 61, block_frames=10))
    codes = torch.cat(blocks, 2)
    assert codes.shape == (2, 2, 61) and 0 <= codes.min() and codes.max() < 1024
    assert max(block.shape[2] for block in blocks) == 10
    assert torch.equal(codes[:, :, :24], lm.generate(TEXT, 24, block_frames=10))
    greedy = lm.generate(TEXT, 25, temperature=0, guidance=1)  # after 24 frames it goes on from the last 12
    assert torch.equal(greedy[:, :, 24], next_logits(lm, greedy[:, :, 12:24]).argmax(-1))
    for prefix in (random_codes(length, seed=1) for length in (5, 12, 40)):
        made = lm.generate(TEXT, 3, prefix=prefix, temperature=0, guidance=1)
        assert made.shape == (2, 2, 3)
        assert torch.equal(made[:, :, 0], next_logits(lm, prefix[:, :, -12:]).argmax(-1))


def test_evidence_of_a_text_is_its_likelihood_over_that_of_no_text(lm):
    codes, words, near = random_codes(20), TEXT.flip(0), {"rtol": 1e-4, "atol": 1e-3}
    scores = [lm(codes, text)[0].log_softmax(-1).gather(-1, codes[..., None]) for text in (words, 0 * words)]
    evidence = lm.text_evidence(words, codes)
    assert_close(evidence, (scores[0] - scores[1]).sum((1, 2, 3)), **near)
    assert_close(lm.text_evidence(words[1:], codes[1:]), evidence[1:], **near)  # whatever the company
    assert_close(lm.text_evidence(words, codes, negative=words), torch.zeros(2), **near)
    longer = random_codes(44)  # two windows, of which the first is full
    windows = [lm.text_evidence(words, part) for part in longer.split(24, 2)]
    assert_close(lm.text_evidence(words, longer), sum(windows), **near)


def test_lm_and_all_it_carries_survive_a_checkpoint(lm, tokenizer, tmp_path):
    lm.tokenizer, lm.words, lm.codec_hash = tokenizer.to_tensor(), ["dog"], "abc"
    torch.save(lm.checkpoint(), tmp_path / "lm.pt")
    again = AudioLM.load(tmp_path / "lm.pt", codec_hash="abc")
    assert torch.equal(again(CODES, TEXT)[0], lm(CODES, TEXT)[0]) and not again.training
    assert D.Tokenizer(again.tokenizer).encode("a dog barks") == tokenizer.encode("a dog barks")
    assert again.codec_hash == "abc" and again.words == ["dog"] and again.cfg == lm.cfg
    with raises(LMError, match="codec abc, not of xyz"):
        AudioLM.load(tmp_path / "lm.pt", codec_hash="xyz")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with a GPU")
def test_a_gpu_computes_what_the_cpu_computes(codecs, lm):
    wave, here, there = hisses(0.5), codecs[4], copy.deepcopy(codecs[4]).cuda()
    assert (there.encode(wave.cuda()).cpu() == here.encode(wave)).float().mean() > 0.95
    expected, made = lm(CODES, TEXT)[0], lm.generate(TEXT, 24, temperature=0)
    assert_close(lm.cuda()(CODES.cuda(), TEXT.cuda())[0].cpu(), expected, rtol=0, atol=0.05)
    assert (lm.generate(TEXT.cuda(), 24, temperature=0).cpu() == made).float().mean() > 0.9


# ----------------------------------------------------------------------------------------------------------
# train_codec.py and train_lm.py: functions


def test_learning_rates_rise_fall_and_end_at_nothing():
    one = SimpleNamespace(recipe={"lr": 1.0, "steps": 2000}, disc_start=2000)
    for rate in (lambda s: train_codec.learning_rate(one, s), lambda s: train_lm.learning_rate(1.0, s, 2000)):
        rates = [rate(step) for step in range(2000)]
        top = int(np.argmax(rates))
        assert rates[0] < 0.02 and 50 < top <= 210 and 0.9 < rates[top] <= 1 and 0 < rates[-1] < 0.01
        assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    two = SimpleNamespace(recipe={"lr": 1.0, "steps": 3000}, disc_start=2000)  # each stage has its own
    rates = [train_codec.learning_rate(two, step) for step in range(3000)]
    assert max(rates[1999], rates[2000], rates[2999]) < 0.011 and rates[2099] > 0.9
    # Between warm-up and cool-down the language model's is an inverse square root: the paper's schedule.
    assert train_lm.learning_rate(1.0, 11999, 50000) == approx(0.5)
    assert train_lm.learning_rate(1.0, 1249, 2000) == approx(0.4)


@pytest.fixture
def training():
    return train_codec.Training(CodecConfig(4, "test"), dict(train_codec.RECIPES["test"]), CPU, {})


def test_every_parameter_has_one_optimizer_and_muon_the_matrices(lm, training):
    optimizers = train_lm.make_optimizers(lm, 1e-3, cuda=False, shard=False)
    lm_owns, codec_owns = (optimizers["muon"], optimizers["adamw"]), (training.muon, training.adam)
    for model, both in ((lm, lm_owns), (training.codec, codec_owns)):
        muon, adam = ([p for group in o.param_groups for p in group["params"]] for o in both)
        assert sorted(map(id, muon + adam)) == sorted(map(id, model.parameters()))
        assert {p.dim() for p in muon} == {2}
    assert {p.dim() for p in adam} == {1}  # of the codec; a language model's tables are no maps
    tables = map(id, optimizers["adamw"].param_groups[0]["params"])
    assert {id(lm.wte.weight), id(lm.lm_heads.weight)} <= set(tables)


def test_against_the_discriminator_codebooks_stay_and_a_step_that_is_not_finite_is_skipped(training):
    states, wave = [], hisses(0.25, 0, 1)
    for step in range(4):
        before = copy.deepcopy(list(training.codec.parameters()))
        *_, finite = train_codec.train_step(training, math.nan * wave, step)
        assert not finite and all(map(torch.equal, before, training.codec.parameters()))
        losses, _, finite = train_codec.train_step(training, wave, step)  # nothing has been poisoned
        assert finite and ("adversarial" in losses) == (step >= 2)
        states.append(copy.deepcopy(training.ema.state_dict()))
    for name, tensor in states[3].items():
        assert torch.equal(tensor, states[1][name]) == name.startswith("quantizer"), name
    said, bad = [], 0  # and ten of them in a row end the run
    with raises(D.UserError, match="10 steps in a row were not finite: lower lr"):
        for step in range(20):
            bad = D.count_bad_steps(bad, step, "nowhere.pt", said.append)
    assert len(said) == bad == 9


def test_the_wave_loss_has_a_share_while_the_codec_is_young_and_none_against_the_discriminator(training):
    shares, balance = [], training.balancer.forward
    training.balancer.forward = lambda losses, weights, *rest: (
        shares.append(weights["wave"]) or balance(losses, weights, *rest)
    )
    for step in range(3):  # the second stage begins at step 2
        train_codec.train_step(training, hisses(0.25, 0, 1), step)
    assert shares == approx([train_codec.WEIGHTS["wave"], train_codec.WEIGHTS["wave"] / 2, 0])


def test_more_steps_move_the_discriminators_start_but_never_back_to_the_first_stage(training, tmp_path):
    for step, disc_start in ((1, 6), (4, 2)):  # of 6 steps, and then of 18
        torch.save(training.checkpoint(step), tmp_path / "t.pt")
        resumed = train_codec.Training(training.config, training.recipe | {"steps": 18}, CPU, {})
        saved = codec_py.load_checkpoint(tmp_path / "t.pt", "nanoaudiogen codec training")
        assert resumed.load(saved, "t.pt") == step and resumed.disc_start == disc_start
    other = train_codec.Training(training.config, training.recipe | {"disc_filters": 4}, CPU, {})
    del saved["disc_muon"]
    for broken in (resumed, other):  # a part is missing, or of another shape
        with raises(D.UserError, match="of another version"):
            broken.load(saved, "t.pt")


def test_collapse_and_a_winning_discriminator_are_said_in_words():
    def said(used, disc_accuracy, grad_norm, done=2000):
        usage = (torch.arange(512) < torch.tensor([300, used])[:, None]).float()
        t = SimpleNamespace(usage=usage, disc_accuracy=disc_accuracy)
        return " ".join(train_codec.health(t, done, grad_norm))

    assert not said(200, 0.8, 1.0) and "streams [1] (the first is 0) use less than a tenth" in said(
        3, 0.8, 1.0
    )
    assert "it has won" in said(200, 0.99, 1.0) and "unstable" in said(200, 0.8, 1e4)
    assert not said(200, 0.8, 1e4, done=1)  # so the first steps often are, and it means nothing


def a_clip(*captions, category=""):
    return SimpleNamespace(captions=list(captions), category=category)


def test_wrong_captions_say_something_else():
    clips = [a_clip(name) for name in ["rain", "rain", "wind", "rain", "bell"] * 10]
    wrong = train_lm.wrong_captions(clips, clips)
    assert all(clip.captions[0] != caption for clip, caption in zip(clips, wrong))
    assert wrong == train_lm.wrong_captions(clips, clips)
    dogs = [a_clip("a dog barks", category="dog"), a_clip("barking", category="dog")]
    assert train_lm.wrong_captions(dogs, dogs) is None
    assert train_lm.wrong_captions(dogs, [*dogs, a_clip("rain", category="rain")]) == ["rain"] * 2


def test_caption_accuracy_is_how_often_the_true_caption_is_likelier(monkeypatch):
    losses = {"rain": 1.0, "wind": 2.0, "bell": 4.5}

    def caption_losses(lm, tokenizer, codes, captions):
        return torch.tensor([[losses[c] - 0.5, losses[c] + 0.5] for c in captions])

    monkeypatch.setattr(train_lm, "caption_losses", caption_losses)
    clips = [a_clip(name) for name in losses]
    mixtures = {"held-out pairs": (None, ["rain", "wind", "bell"], ["wind", "bell", "rain"])}
    held_out = train_lm.HeldOut(clips, None, clips, mixtures)
    measures = train_lm.evaluate(None, None, held_out)
    assert (measures["loss"], measures["loss0"], measures["loss1"]) == (2.5, 2.0, 3.0)
    wrong = train_lm.wrong_captions(clips, clips)
    right = [losses[clip.captions[0]] < losses[caption] for clip, caption in zip(clips, wrong)]
    assert measures["caption accuracy"] == approx(np.mean(right))
    composed = train_lm.evaluate(None, None, held_out, final=True)["caption accuracy of held-out pairs"]
    assert composed == approx(2 / 3)
    alike = train_lm.HeldOut(clips[:1], None, clips[:1], {})  # nothing is claimed where all sound alike
    assert "caption accuracy" not in train_lm.evaluate(None, None, alike)


def test_the_silence_after_short_clips_is_not_measured_by_the_codec_and_told_by_the_model(world):
    data, said = copy.copy(world), []
    data.val = [replace(world.val[0], samples=np.ones(n, np.int16), length=n) for n in (800, 24000, 99999)]
    train_lm.warn_of_silence(data.val, said.append)
    assert said[0].startswith("32 % of the held-out examples of 1 s")  # train_lm.SECONDS in these tests
    waves = train_codec.held_out_waves(data, CPU)
    assert [wave.shape for wave in waves] == [(1, 16000), (1, 24000), (1, 80000)]


def test_a_model_is_measured_on_clips_and_mixtures_that_it_has_not_heard(world, codecs, monkeypatch):
    monkeypatch.setattr(train_lm, "SECONDS", 1)
    data = copy.copy(world)
    data.val = [replace(clip, samples=clip.samples[:1600]) for clip in world.val]
    monkeypatch.setattr(D, "SAMPLE_RATE", 1600)  # a tenth of the work
    held_out = train_lm.make_held_out(data, codecs[4], CPU)
    assert held_out.codes.shape == (len(world.val), 4, 13) and held_out.clips == data.val
    assert [len(held_out.mixtures[name][0]) for name in ("seen pairs", "held-out pairs")] == [64, 64]


def test_training_examples_lose_captions_and_histories_misread_codes_and_know_their_place(
    world, codecs, tokenizer
):
    cfg = LMConfig(4, "test", vocab_size=tokenizer.vocab_size, max_text_len=16, max_frames=18)
    drawn = train_lm.draw_batch(world, codecs[4], tokenizer, cfg, 200, 1280, 0.0, rng())
    codes, text, history_mask, first_frame, input_codes = drawn
    crops, given = world.batch(200, 1280, rng(), 0.0, train_lm.MIN_LEVEL), text.any(1)
    assert same(codes, codecs[4].encode(torch.stack([crop.wave for crop in crops])))
    assert torch.equal(text[given], tokenizer.batch([crop.caption for crop in crops], 16)[given])
    assert [x.float().mean().item() for x in (given, history_mask)] == approx([0.9, 0.9], abs=0.07)
    assert first_frame.tolist() == [min(max(crop.begin // 128, 0), 8) for crop in crops]
    assert (input_codes != codes).float().mean().item() == approx(0.075, abs=0.01)


def test_the_text_window_fits_captions_and_mixtures_or_the_share_that_is_cut_is_said(tokenizer):
    long, short = "a dog barks while rain falls and a bell rings", "rain"
    data, said = SimpleNamespace(train=[a_clip(short), a_clip(short), a_clip(short), a_clip(long)]), []
    alone, mixed = (len(tokenizer.encode(text)) for text in (long, f"{long} and {long}"))
    for mix, longest in ((0.0, alone), (0.5, mixed)):
        counts = train_lm.token_counts(tokenizer, data, mix)
        assert len(counts) == 4 and counts.max() == longest
        assert train_lm.text_window(counts, 8, 256) == math.ceil(longest / 8) * 8
        assert train_lm.text_window(counts, 200, 256) == 200
        assert train_lm.text_window(counts, 8, 16) == 16
        train_lm.warn_of_cut_captions(counts, longest, said.append)
    assert not said
    train_lm.warn_of_cut_captions(counts, mixed - 1, said.append)
    assert said[0].startswith("! 25.0 % of the captions") and f"more than {mixed - 1} text tokens" in said[0]


def test_a_batch_is_shared_by_processes_and_micro_batches():
    args = SimpleNamespace(steps=None, batch=12, micro=4)

    def run(world_size, **saved):
        return SimpleNamespace(saved=saved, device=CPU, world_size=world_size)

    for world_size, micro, accumulate in ((1, 4, 3), (2, 3, 2), (4, 3, 1)):
        recipe = train_lm.choose_recipe(args, "test", run(world_size))
        assert (recipe["micro"], recipe["accumulate"]) == (micro, accumulate)
    args.micro = 10**12
    assert train_lm.choose_recipe(args, "test", run(1))["micro"] == 12
    for script in (train_lm, train_codec):
        with raises(D.UserError, match="--batch 12: cannot be shared by 5 processes"):
            script.choose_recipe(args, "test", run(5))
        for steps, total in ((None, 18), (24, 24)):  # a resumed run has as many steps as it had, or more
            args.steps = steps
            assert script.choose_recipe(args, "test", run(1, steps=18))["steps"] == total


# ----------------------------------------------------------------------------------------------------------
# The pipeline: the three commands, as typed


def call_main(script, *args):
    """A script's main() with these flags, through the same door as its own; what a process ends, ends."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as undo:
        lock_folder = D.lock_folder
        patch.setattr(D, "lock_folder", lambda folder: undo.enter_context(lock_folder(folder)))
        for number in (signal.SIGINT, signal.SIGTERM):
            undo.callback(signal.signal, number, signal.getsignal(number))
        patch.setattr(sys, "argv", [f"{script.__name__}.py", "--device", "cpu", *map(str, args)])
        with D.one_line_errors(CodecError, LMError):
            script.main()


def next_command(said):
    """The script and the flags of the command that a script says to type next."""
    script, *args = shlex.split(re.search("next: python (.+)", said)[1])
    return SCRIPTS[script], args


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Eight captioned clips of one second: the table's path."""
    names = ["rain", "hum", "whistle", "wind", "low hum", "high whistle", "rain far away", "hiss"]
    waves = [hiss(1, i) if i % 2 == 0 else sine(200 * i) for i in range(8)]
    return write_table(tmp_path_factory.mktemp("clips"), *zip((f"{i}.wav" for i in range(8)), waves, names))


@pytest.fixture(scope="session")
def made(clips, tmp_path_factory):
    """What three commands leave behind, each told by the one before, and what they said."""
    folder, said, script, args = tmp_path_factory.mktemp("project"), [], train_codec, ["--out", "it's new"]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        patch.chdir(folder)
        patch.setattr(D, "SOUNDS", clips)  # the default data
        for more in (["--size", "test"], ["--size", "test"], ["--seconds", 0.5]):
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                call_main(script, *args, *more)
            said.append(out.getvalue())
            assert "warning" not in err.getvalue().lower() and not caught
            script, args = next_command(said[-1]) if script is not sample else (None, None)
    return SimpleNamespace(out=folder / "it's new", samples=folder / "samples", said=said)


def test_the_three_commands_leave_their_files_prepare_the_sounds_once_and_say_what_they_did(made):
    names = os.listdir(made.out)
    assert {f"{a}{b}" for a in ("codec", "lm") for b in (".pt", "_train.pt", ".csv", "_wavs")} <= set(names)
    assert len([name for name in names if name.startswith("clips-")]) == 1
    assert not [name for name in names if ".tmp" in name or ".part" in name]
    assert any(made.out.glob("codec_wavs/*.wav")) and any(made.out.glob("lm_wavs/*.wav"))
    codec, lm, sound = made.said
    assert "8 clips" in codec and "4.5 kbit/s" in codec and re.search("held out: .*SI-SNR", codec)
    assert re.search("held out: loss .*caption accuracy", lm)
    assert "x real time" in sound and "ms per frame" in sound


def test_logs_hold_one_row_for_each_logged_step_and_all_its_losses(made):
    rows = read_csv(made.out / "codec.csv")
    assert [row["step"] for row in rows] == list("123456")
    assert all(math.isfinite(float(rows[-1][name])) for name in ("wave", "mel", "commitment", "grad_norm"))
    assert [bool(row["adversarial"]) for row in rows] == [False] * 2 + [True] * 4
    rows = read_csv(made.out / "lm.csv")
    assert [row["step"] for row in rows] == list("1234")
    assert float(rows[0]["loss"]) == approx(np.mean([float(rows[0][f"loss{k}"]) for k in range(4)]), rel=1e-4)
    assert float(rows[0]["loss"]) == approx(math.log(512), rel=0.15)  # almost nothing is known yet


def test_a_sound_has_the_length_that_was_asked_for_and_a_page_that_needs_nothing_else(made):
    (path,) = made.samples.glob("*.wav")
    wave, rate = soundfile.read(path)
    assert rate == RATE and len(wave) == 62 * 128 and np.isfinite(wave).all() and wave.any()
    page = (made.samples / "index.html").read_text(encoding="utf-8")
    assert "data:audio/wav;base64," in page and "data:image/png;base64," in page
    assert not re.search(r"(src|href)=(?!['\"]?data:)", page)


# Most of what follows runs inside this process.


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(script, *args): main() with these flags, in an empty folder; evaluation is cut short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_codec, "evaluate", lambda *_: "held out")
    monkeypatch.setattr(train_lm, "save_samples", quiet)
    return call_main


def test_eval_only_measures_and_changes_nothing(run, made, clips, capsys):
    files = [made.out / name for name in ("codec.pt", "lm.pt", "codec.csv", "lm.csv")]
    before = [file.read_bytes() for file in files]
    for script in (train_codec, train_lm):
        run(script, "--data", clips, "--out", made.out, "--eval_only")
        assert "held out" in capsys.readouterr().out
    assert before == [file.read_bytes() for file in files]


def test_one_clip_is_soon_learnt_and_its_codebooks_are_used(run, tmp_path, monkeypatch):
    """What the README tells people to try first on their own sounds, at a smaller budget."""
    siren = np.sin(np.cumsum(0.2 + 0.15 * np.sin(np.arange(RATE) / 800))) / 2
    monkeypatch.setitem(train_codec.RECIPES["test"], "disc_start", 1.0)
    table = write_table(tmp_path, ("siren.wav", siren, "a siren"))
    run(train_codec, "--data", table, "--size", "test", "--steps", 40)
    rows = read_csv("out/codec.csv")
    assert float(rows[-1]["mel"]) < 0.75 * float(rows[0]["mel"]) and float(rows[-1]["perplexity0"]) > 20


# ----------------------------------------------------------------------------------------------------------
# Resuming


def flatten(thing, name=""):
    """All tensors and numbers of a checkpoint by name."""
    if isinstance(thing, (dict, list, tuple)):
        pairs = thing.items() if isinstance(thing, dict) else enumerate(thing)
        return {k: v for key, value in pairs for k, v in flatten(value, f"{name}/{key}").items()}
    return {name: thing}


def assert_same_run(a, b, name):
    """The model, all that a resumed run reads, and the log are the same, bit for bit."""
    for file in (f"{name}.pt", f"{name}_train.pt"):
        x, y = (flatten(torch.load(folder / file) | {"flags": {}}) for folder in (a, b))
        assert x.keys() == y.keys()
        for key in x:
            assert torch.equal(x[key], y[key]) if torch.is_tensor(x[key]) else x[key] == y[key], key
    assert read_csv(a / f"{name}.csv") == read_csv(b / f"{name}.csv")


@contextlib.contextmanager
def stop_at(call_number):
    """SIGTERM arrives while the batch of this number is drawn, and the script leaves after that step."""
    batch, calls = D.AudioData.batch, itertools.count(1)

    def counted(self, *args, **options):
        if next(calls) == call_number:
            signal.raise_signal(signal.SIGTERM)
        return batch(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(D.AudioData, "batch", counted)
        with raises(SystemExit) as stopped:
            yield
    # Or `train_codec.py && train_lm.py` would go on; torchrun would report a crash.
    assert stopped.value.code == (0 if dist.is_initialized() else 130)


STOPS = {"codec": (train_codec, 1, 1), "codec, against its discriminator": (train_codec, 4, 4)}
STOPS |= {"lm": (train_lm, 5, 3)}  # --micro 1 draws twice in a step


@pytest.mark.parametrize("stop", STOPS)
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(
    stop, run, made, clips, tmp_path, monkeypatch, capsys
):
    (script, batch, step), flags = STOPS[stop], ["--size", "test"]
    name, examples = script.__name__.removeprefix("train_"), ["--data", clips]
    if script is train_lm:
        flags += ["--codec", made.out / "codec.pt"]
        examples += ["--micro", 1]
        monkeypatch.setitem(train_lm.RECIPES["test"], "micro", 2)
    with stop_at(batch):
        run(script, *flags, *examples)
    assert re.search(rf"SIGTERM: saved step {step} to .*{name}_train\.pt.*--resume", capsys.readouterr().out)
    run(script, *flags, "--resume")  # it knows its examples
    assert_same_run(made.out, tmp_path / "out", name)


def test_finished_runs_go_on_and_the_next_command_names_their_data(run, made, clips, tmp_path, capsys):
    flags = ["--data", clips]
    for script in (train_codec, train_lm):
        name = script.__name__.removeprefix("train_")
        shutil.copytree(made.out, "out")
        if script is train_codec:  # with more steps its codes change
            with raises(SystemExit):
                run(script, *flags, "--size", "test", "--resume", "--steps", 8)
            assert "lm.pt: learnt the codes of the codec in out" in capsys.readouterr().err
            os.remove("out/lm.pt")
            os.remove("out/lm_train.pt")
        log = tmp_path / "out" / f"{name}.csv"
        rows = log.read_text().splitlines()
        log.write_text("\n".join([*rows, "7" + rows[-1][1:]]))  # of a step that was never saved
        run(script, "--size", "test", "--resume")
        assert re.search(r"has done its \d steps; --eval_only", capsys.readouterr().out)
        run(script, *flags, "--size", "test", "--resume", "--steps", 8)
        old, new = (torch.load(out / f"{name}_train.pt") for out in (made.out, tmp_path / "out"))
        assert new["step"] == new["steps"] == 8 > old["step"]
        assert [row["step"] for row in read_csv(log)] == list("12345678")
        old, new = (torch.load(out / f"{name}.pt")["model"] for out in (made.out, tmp_path / "out"))
        assert any(not torch.equal(old[key], new[key]) for key in old)
        script, flags = next_command(capsys.readouterr().out)
        if script is train_lm:
            assert flags[flags.index("--data") + 1] == clips
            shutil.rmtree("out")
    run(sample, *flags, "--seconds", 0.1)  # the two still belong together


def test_a_finetuned_model_keeps_its_words_stops_resumes_and_is_sampled(run, made, clips, tmp_path, capsys):
    flags = ["--data", clips, "--finetune", made.out, "--steps", 3]
    run(train_lm, *flags, "--out", "out/whole")
    with stop_at(3):
        run(train_lm, *flags, "--out", "out/halves")
    run(train_lm, *flags, "--out", "out/halves", "--resume")
    assert_same_run(tmp_path / "out" / "whole", tmp_path / "out" / "halves", "lm")
    old, new = (torch.load(out / "lm.pt") for out in (made.out, tmp_path / "out" / "whole"))
    moved = [(new["model"][name] - old["model"][name]).abs().max().item() for name in old["model"]]
    assert 0 < max(moved) <= 5 * train_lm.RECIPES["test"]["lr"]  # a few steps away
    # New words do not change the old ones; captions that are too long for the window are counted.
    flags[1] = write_table(tmp_path / "new", *((f"{i}.wav", hiss(1, i), "a zebra " * 60) for i in range(2)))
    capsys.readouterr()
    run(train_lm, *flags[:-1], 4, "--out", "out/halves", "--resume")
    assert "! 100.0 % of the captions" in capsys.readouterr().out
    new = torch.load("out/halves/lm.pt")
    assert all(str(new[name]) == str(old[name]) for name in ("tokenizer", "codec_hash", "config"))
    run(sample, "--prompt", "rain", "--seconds", 0.1)
    assert os.path.join("out", "halves", "lm.pt") in capsys.readouterr().out  # the newest below out/


# Two processes, as torchrun starts them: that takes longer than all they do, so they do it in one go.


def train_both(patch, clips, codec, shard):
    """A codec and a language model, whose batches do not depend on the number of processes."""
    default_rng = np.random.default_rng

    def shared_rng(seed):  # of (..., rank, micro batch): two ranks draw what one draws in two goes
        return default_rng((*seed[:-2], sum(seed[-2:])) if np.size(seed) == 5 else seed)

    patch.setattr(np.random, "default_rng", shared_rng)
    patch.setattr(D, "fast_dtype", lambda device: torch.float32)
    patch.setattr(train_codec, "evaluate", lambda *_: "held out")
    patch.setattr(train_lm, "save_samples", quiet)
    patch.setitem(train_lm.RECIPES, "test", train_lm.RECIPES["test"] | {"dropout": 0.0, "shard": shard})
    call_main(train_codec, "--data", clips, "--size", "test", "--batch", "4", "--out", "codec")
    if shard:
        patch.setattr(dist, "init_process_group", quiet)  # once is enough
    flags = ["--data", clips, "--size", "test", "--codec", codec]
    call_main(train_lm, *flags, "--out", "lm")
    return flags


def in_two_processes(clips, codec):
    """What each of the two does; language models keep their optimizers in shards."""
    with pytest.MonkeyPatch.context() as patch:
        flags = train_both(patch, clips, codec, shard=True)
        with stop_at(3) if dist.get_rank() == 1 else raises(SystemExit):
            call_main(train_lm, *flags, "--out", "halves")
        dist.barrier()  # the first one has saved
        call_main(train_lm, *flags, "--out", "halves", "--resume")
    dist.destroy_process_group()


def start(script, *args, cwd, torchrun=False):
    """A script in a process of its own, or in two."""
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # works on a machine without a network, too
    command += [str(HERE / script), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=240)


def test_two_processes_train_the_models_of_one_and_resume_their_shards(clips, made, tmp_path, monkeypatch):
    """Equal within rounding at an equal batch, through the step at which the discriminator enters."""
    code = f"import sys\nsys.path.insert(0, {str(HERE)!r})\nfrom test_all import in_two_processes\n"
    driver = write_text(tmp_path / "two" / "driver.py", code + "in_two_processes(*sys.argv[1:])\n")
    done = start(driver, clips, made.out / "codec.pt", cwd=tmp_path / "two", torchrun=True)
    assert done.returncode == 0, done.stderr.decode()[-6000:]
    said = done.stdout.decode()
    assert said.count("codec saved to") == 1 and "saved step 3" in said  # one process speaks
    assert_same_run(tmp_path / "two" / "lm", tmp_path / "two" / "halves", "lm")

    monkeypatch.chdir(tmp_path)
    train_both(monkeypatch, clips, made.out / "codec.pt", shard=False)
    for one, two in zip(read_csv("codec/codec.csv"), read_csv("two/codec/codec.csv"), strict=True):
        for name in ("wave", "mel", "adversarial", "feature", "commitment"):
            near = approx(float(one[name] or 0), rel=1e-2, abs=1e-6)
            assert float(two[name] or 0) == near, (one["step"], name)
    for one, two in zip(read_csv("lm/lm.csv"), read_csv("two/lm/lm.csv"), strict=True):
        assert float(two["grad_norm"]) == approx(float(one["grad_norm"]), rel=1e-3), one["step"]
    one, two = (torch.load(path)["model"] for path in ("lm/lm.pt", "two/lm/lm.pt"))
    assert_close(one, two, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------
# sample.py


@pytest.mark.parametrize("length", [1, 100, 8000])
def test_a_spectrogram_shows_a_sine_where_it_is_and_pictures_can_be_made_of_any_sound(length):
    low, high = (sample.spectrogram(torch.from_numpy(sine(f)), 100) for f in (300, 3000))
    assert low.mean(1).argmax() < high.mean(1).argmax()
    assert low.shape == (64, 100) and 0 <= low.min() and low.max() == 1
    for wave in (torch.zeros(length), torch.ones(length)):
        assert sample.png(sample.spectrogram(wave)).startswith(b"\x89PNG")
        assert len(sample.in_characters(wave).splitlines()) == 10
    assert sample.spectrogram(torch.zeros(length)).max() == 0  # silence is black


def test_a_picture_of_a_minute_shows_every_event():
    seconds = torch.zeros(60, RATE)
    seconds[:, :160] = 0.5  # 10 ms in each
    picture = sample.spectrogram(seconds.flatten(), 60 * 3).mean(0).reshape(60, 3)
    assert (picture.max(1) > picture.min(1) + 0.2).all()


def test_a_continuation_sounds_as_it_does_after_its_prefix(codecs):
    codec, codes = codecs[4], torch.randint(512, (1, 4, 30), generator=torch.Generator().manual_seed(0))
    prefix, new = codes.split([20, 10], 2)
    whole, heard = codec.decode(codes)[:, 20 * 128 :], torch.rand(100)
    assert not torch.allclose(whole, codec.decode(new), atol=1e-3)  # there would be a step
    for length in (4, 10):
        pieces = sample.decode_after(codec, heard[:0], prefix, new.split(length, 2))
        assert_close(torch.cat(list(pieces), 1), whole, rtol=0, atol=1e-5)
    pieces = sample.decode_after(codec, heard, prefix[:, :, :0], new.split(4, 2))
    assert_close(torch.cat(list(pieces), 1)[0], torch.cat((heard, codec.decode(new)[0])), rtol=0, atol=1e-5)


@pytest.mark.parametrize("samples, frames", [(10 * 128 + 50, 10), (30 * 128, 20), (30, 1)])
def test_the_codes_that_are_continued_end_where_the_recording_ends(samples, frames, codecs, tmp_path):
    path = write_wav(tmp_path / "a.wav", hiss(samples / RATE))
    heard, prefix = sample.load_prefix(path, codecs[4], SimpleNamespace(cfg=LMConfig(max_frames=20)), CPU)
    assert heard.shape == (samples,) and prefix.shape == (1, 4, frames)
    end = torch.nn.functional.pad(heard, (128, 0))[-frames * 128 :]  # silence comes before, not after
    assert torch.equal(prefix, codecs[4].encode(end[None]))
    loud = write_wav(tmp_path / "b.wav", 1e4 * hiss(samples / RATE), subtype="FLOAT")
    heard, _ = sample.load_prefix(loud, codecs[4], SimpleNamespace(cfg=LMConfig(max_frames=20)), CPU)
    assert heard.abs().max() == approx(1)


@pytest.fixture(scope="session")
def weights(codecs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.save(codecs[4].checkpoint(), folder / "codec.pt")
    torch.manual_seed(0)
    tokenizer = D.Tokenizer.train(["rain", "wind", "a dog barks"], 300)
    lm = made_louder(AudioLM(LMConfig(4, "test", vocab_size=tokenizer.vocab_size)))
    lm.tokenizer, lm.codec_hash = tokenizer.to_tensor(), codecs[4].hash()
    lm.words = D.words_of("Rain, wind; a dog barks")
    torch.save(lm.checkpoint(), folder / "lm.pt")
    return folder


@pytest.fixture
def make(run, weights, tmp_path):
    """make(*flags): a little sound by these weights -> list of waves."""
    count = itertools.count()

    def call(*args):
        out = tmp_path / f"samples{next(count)}"
        run(sample, "--lm", weights / "lm.pt", "--seconds", 0.32, "--out", out, "--top_k", 50, *args)
        return [soundfile.read(path, dtype="float32")[0] for path in sorted(out.glob("*.wav"))]

    return call


def test_several_sounds_are_made_in_batches_each_by_its_seed_and_none_is_lost(make, monkeypatch, tmp_path):
    prompts = write_text(tmp_path / "prompts.txt", "wind\n\nein Vögelchen\n")
    monkeypatch.setattr(sample, "batch_size", lambda *_: 2)
    several = make("--prompt", "rain", "--prompts", prompts, "--num_samples", 3, "--seed", 3)
    assert len(several) == 9 and len({wave.tobytes() for wave in several}) == 9
    make("--prompt", "wind", "--seed", 4, "--out", tmp_path / "samples0")  # the last --out counts
    *before, path = sorted(tmp_path.glob("samples0/*.wav"))
    assert len(before) == 9 and path.name == "009_wind_4.wav"
    np.testing.assert_allclose(soundfile.read(path)[0], several[4], rtol=0, atol=1e-3)


def test_the_best_of_several_sounds_is_the_one_with_the_most_evidence(make, monkeypatch, capsys):
    monkeypatch.setattr(sample, "batch_size", lambda *_: 5)  # two sounds of two candidates at once
    evidence = lambda lm, text, *_: torch.tensor([0.0, 1.0, 1.0, 0.0])[: len(text)]  # noqa: E731
    monkeypatch.setattr(AudioLM, "text_evidence", evidence)
    best = make("--prompt", "rain", "--num_samples", 3, "--best_of", 2, "--seed", 4)
    assert re.findall(r"rain \(seed (\d)\)", capsys.readouterr().out) == ["5", "6", "9"]
    np.testing.assert_allclose(best[1], make("--prompt", "rain", "--seed", 6)[0], rtol=0, atol=1e-3)


def test_samplers_in_one_folder_take_no_name_twice_and_a_failed_one_gives_it_back(tmp_path, monkeypatch):
    numbers = iter((0, 0, 1, 2))  # the second sampler looks before the first has written
    monkeypatch.setattr(sample, "next_number", lambda _: next(numbers))
    paths = [sample.save_new(torch.zeros(160), str(tmp_path), "rain", 0) for _ in range(2)]
    assert list(map(os.path.basename, paths)) == ["000_rain_0.wav", "001_rain_0.wav"]
    with raises(D.UserError, match="expected one wave"):
        sample.save_new(torch.zeros(2, 160), str(tmp_path), "rain", 0)
    assert sorted(map(str, tmp_path.iterdir())) == paths


def test_the_pair_that_ships_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert os.path.exists(D.file_in("pretrained", "lm.pt"))
    (tmp_path / "pretrained").mkdir()
    assert D.file_in("pretrained", "lm.pt") == os.path.join("pretrained", "lm.pt")  # one's own comes first


def test_words_that_no_caption_had_are_named_with_those_like_them(make, capsys):
    make("--prompt", "Dogs, rain and xylophones")
    said = capsys.readouterr().out
    assert "'dogs': the nearest are dog" in said and "'xylophones': none is spelled like it" in said
    assert "'rain'" not in said and "'and'" in said


def test_sample_obeys_its_flags_and_continues_a_recording_with_or_without_words(make, tmp_path):
    start = ["--continue_from", write_wav(tmp_path / "start.wav", hiss(0.32))]
    flags = [start, [], ["--negative", "wind"], ["--guidance", 1], ["--temperature", 0], ["--seed", 1]]
    waves = [make("--prompt", "rain", *some)[0] for some in flags] + make(*start)
    assert len({wave.tobytes() for wave in waves}) == len(waves) == 7
    assert {len(wave) for wave in waves} == {0.32 * RATE}
    (kept,) = make("--prompt", "rain", *start, "--keep_prefix")  # before its continuation
    np.testing.assert_allclose(kept, np.concatenate([hiss(0.32), waves[0]]), rtol=0, atol=1e-4)


def test_a_stream_to_a_file_is_the_plain_result_and_its_header_true(make, tmp_path):
    (plain,), (kept,) = make("--prompt", "rain"), make("--prompt", "rain", "--stream", tmp_path / "live.wav")
    live, _ = soundfile.read(tmp_path / "live.wav", dtype="float32")
    assert os.path.getsize(tmp_path / "live.wav") == 44 + 2 * len(live)
    for wave in (live, kept):
        np.testing.assert_allclose(wave, plain, rtol=0, atol=1e-4)  # three units of 16 bits


def test_of_a_stream_that_is_stopped_the_header_is_true(tmp_path):
    def pieces():
        yield torch.zeros(1, 500)
        raise KeyboardInterrupt

    with raises(KeyboardInterrupt):
        sample.write_stream(pieces(), str(tmp_path / "live.wav"))
    assert soundfile.info(tmp_path / "live.wav").frames == 500


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
@pytest.mark.parametrize("reader", ["cat", "head -c 44"])  # the second goes away after the header
def test_a_stream_can_go_into_a_named_pipe(reader, make, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen([*reader.split(), tmp_path / "pipe"], stdout=subprocess.PIPE)
    try:
        (wave,) = make("--prompt", "rain", "--stream", tmp_path / "pipe")
        heard = len(reader.communicate(timeout=9)[0])
        assert len(wave) == 0.32 * RATE and heard in (44, 44 + 2 * len(wave))
    finally:
        reader.kill()


@pytest.mark.parametrize("flags", [["--num_samples", 2], ["--stream"]], ids=["plain", "stream"])
def test_whoever_reads_the_output_may_go_away_and_no_sound_is_lost(flags, make):
    closed = SimpleNamespace(write=raising(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    with contextlib.redirect_stdout(
        SimpleNamespace(write=closed.write, flush=quiet, buffer=closed, isatty=bool)
    ):
        waves = make("--prompt", "rain", *flags)
    assert [len(wave) for wave in waves] == [0.32 * RATE] * len(flags)


def test_the_weights_that_ship_stream_a_wav_to_stdout_and_nothing_else(tmp_path):
    done = start("sample.py", "--prompt", "a dog barking", "--seconds", 0.4, "--stream", cwd=tmp_path)
    assert done.returncode == 0 and os.path.join("pretrained", "codec.pt") in done.stderr.decode()
    (path,) = tmp_path.glob("samples/*.wav")
    wave, _ = soundfile.read(path)
    assert done.stdout.startswith(b"RIFF") and len(done.stdout) == 44 + 2 * len(wave) == 44 + 0.8 * RATE
    assert wave.std() > 1e-3
    assert sum(path.stat().st_size for path in (HERE / "pretrained").iterdir()) < 40e6


# ----------------------------------------------------------------------------------------------------------
# Bad input: one line that names the thing, exit code 2, no traceback, and nothing already made is lost

REFUSED = """
train_codec --data nowhere.csv --out new                nowhere.csv
train_codec --data hollow --out new                     hollow
train_codec --data hollow:0 --out new                   a weight above 0
train_codec --data notes.pdf --out new                  notes.pdf
train_codec --data wordless.csv --out new               wordless.csv
train_codec --data silence/clips.csv --out new          a.wav
train_codec --steps 0                                   --steps
train_codec --device tpu --out new                      not a device of this machine
train_codec --out file                                  file
train_codec --out busy                                  another run is writing there
train_codec --out made                                  lm.pt
train_codec --out learnt                                lm_train.pt
train_codec --out new --resume                          codec_train.pt
train_codec --out old --resume                          another version
train_codec --out made --resume --size test --streams 2  with --streams 4
train_codec --out alone                                 codec.pt
train_lm --out alone                                    lm.pt
train_lm --out new                                      codec.pt
train_lm --codec bad.pt --out new                       bad.pt
train_lm --out made --streams 8                         type --streams 4
train_lm --out made --mix 2                             --mix 2
train_lm --out made --batch 0                           --batch
train_lm --out made --codec out/codec.pt                another codec
train_lm --out busy --codec out/codec.pt                another run is writing there
train_lm --finetune made --out new --codec out/codec.pt  made
train_lm --finetune hollow --out new                    folder of a trained pair
train_lm --finetune '' --out new                        --finetune is empty
train_lm --finetune made/codec.pt --out new             a folder that holds lm.pt
train_lm --finetune made --size test                    --size is that of
train_lm --out old --resume                             another version
train_lm --out learnt --codec out/codec.pt --resume     another codec
train_lm --out made --size tiny --resume                leave --size out
sample --prompt ' '                                     empty
sample --seconds 1                                      --prompt
sample --prompt rain --wat 3                            --wat
sample --prompt a dog                                   typed as --prompt
sample --prompt rain --lm ''                            --lm is empty
sample --prompt rain --num-samples 0                    --num_samples
sample --prompt rain --stream latin1.txt                exists already
sample --prompts latin1.txt                             UTF-8
sample --prompt rain --seconds nan                      --seconds
sample --prompt rain --top_p 2                          --top_p
sample --prompt rain --top_k -1                         --top_k
sample --prompt rain --guidance nan                     --guidance
sample --prompt rain --seed -1                          --seed
sample --prompt rain --seed 18446744073709551616        --seed
sample --prompt rain --best_of 0                        --best_of
sample --prompt rain --best_of 2 --stream               --best_of
sample --continue_from no_samples.wav --best_of 2       give a --prompt
sample --prompt rain --prompt wind --stream             --stream
sample --prompt rain --negative wind --guidance 1       --negative
sample --prompt rain --keep_prefix                      --keep_prefix
sample --continue_from no_samples.wav                   holds no samples
sample --continue_from not_a_number.wav                 NaN
sample --prompts long.txt                               tokens
sample --prompt rain --out file                         file
sample --prompt rain --stream no/folder/x.wav           no/folder/x.wav
sample --prompt rain --lm nowhere.pt                    nowhere.pt
sample --prompt rain --lm bad.pt --codec out/codec.pt   bad.pt
sample --prompt rain --lm made/lm.pt --codec out/codec.pt  learnt the codes of codec
"""
CASES = [re.split(r"\s{2,}", line) for line in REFUSED.strip().splitlines()]


@pytest.fixture(scope="module")
def precious(made, weights, tmp_path_factory):
    """A folder with all that the commands above name, and its files with their bytes."""
    folder = tmp_path_factory.mktemp("precious")
    shutil.copytree(weights, folder / "out")
    shutil.copytree(made.out, folder / "made")
    shutil.copytree(made.out, folder / "learnt", ignore=shutil.ignore_patterns("lm.pt"))
    shutil.copytree(made.out, folder / "alone", ignore=shutil.ignore_patterns("*_train.pt"))
    write_table(folder / "silence", ("a.wav", np.zeros(1600, np.float32), "rain"))
    for kind in ("no_samples", "not_a_number"):
        BAD_SOUNDS[kind](folder / f"{kind}.wav")
    (folder / "hollow").mkdir()
    lay_out(folder, [], {"old/codec.pt": (made.out / "codec.pt").read_bytes()})
    for name in ("codec", "lm"):
        torch.save({"kind": f"nanoaudiogen {name} training"}, folder / "old" / f"{name}_train.pt")
    BAD_CHECKPOINTS["truncated"](folder / "bad.pt")
    texts = {"file": "", "notes.pdf": "words", "wordless.csv": "length\n3\n"}
    lay_out(folder, [], texts | {"latin1.txt": b"Gr\xfc\xdfe", "long.txt": "a dog barks " * 99})
    return folder, {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command, words", CASES, ids=[command for command, _ in CASES])
def test_bad_input_is_refused_and_nothing_is_lost(command, words, run, precious, clips, monkeypatch, capsys):
    folder, before = precious
    monkeypatch.chdir(folder)
    monkeypatch.setattr(D, "SOUNDS", clips)
    monkeypatch.setitem(codec_py.CHANNELS, "tiny", 4)
    for recipes in (train_codec.RECIPES, train_lm.RECIPES):  # what is not refused is soon over
        monkeypatch.setitem(recipes["tiny"], "steps", 1)
    script, *flags = shlex.split(command)
    with D.lock_folder("busy"), raises(SystemExit) as stop:
        run(SCRIPTS[f"{script}.py"], *flags)
    lines = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.strip()]
    (line,) = [line for line in lines if not re.search(r"\d+%\||it/s|clip/s", line)]  # progress
    assert stop.value.code == 2 and line.startswith("error: ") and words in line
    assert "leave out --resume" not in line  # it would overwrite what was learnt
    assert all(path.read_bytes() == content for path, content in before.items())


# ----------------------------------------------------------------------------------------------------------
# What is told to readers


def test_the_walk_through_the_code_names_what_is_there():
    modules = {script.__name__: script for script in (D, codec_py, lm_py, train_codec, train_lm, sample)}
    text = (HERE / "HOW_IT_WORKS.md").read_text(encoding="utf-8")
    names = re.findall(rf"`((?:{'|'.join(modules)})\.(?!py)[\w.]+)`", text)
    assert len(names) > 30
    for module, *path in (name.split(".") for name in names):
        assert functools.reduce(getattr, path, modules[module])
