"""Tests of nanoAudioGen: python -m pytest -q test_all.py

They make their own sounds in temporary folders and need no network and no GPU. Grouped by file:
data.py, codec.py, lm.py, then the three scripts: functions, the pipeline as typed, resuming, bad input.
"""

import copy
import csv
import gc
import gzip
import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

import codec as codec_py
import data as D
import lm as lm_py
import sample
import train_codec
import train_lm
from codec import Balancer, Codec, CodecConfig, MelLoss, ResidualVQ, STFTDiscriminator, VectorQuantizer
from lm import AudioLM, LMConfig, choose, guide

torch.set_num_threads(1)  # the models here are small: more threads would only wait for each other
HERE = os.path.dirname(os.path.abspath(__file__))
RATE = D.SAMPLE_RATE
lm_py.SIZES["test"] = (2, 2, 32, 1)  # layers, heads, width, text layers


def sine(frequency, seconds=1.0, rate=RATE, amplitude=0.5):
    t = np.arange(int(seconds * rate)) / rate
    return (amplitude * np.sin(2 * np.pi * frequency * t)).astype(np.float32)


def hiss(seconds=1.0, seed=0, amplitude=0.1):
    wave = amplitude * np.random.default_rng(seed).standard_normal(int(seconds * RATE))
    return wave.clip(-1, 1).astype(np.float32)


def write_wav(path, wave=None, rate=RATE, **options):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    soundfile.write(path, hiss(0.1) if wave is None else wave, rate, **options)
    return str(path)


def write_text(path, text, **options):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", **({"encoding": "utf-8"} | options)) as file:
        file.write(text)
    return str(path)


def write_table(folder, clips, name="clips.csv"):
    """clips: [(file name, wave, caption), ...] -> path of a CSV beside the WAVs."""
    for file, wave, _ in clips:
        write_wav(folder / file, wave)
    return write_text(folder / name, "path,caption\n" + "".join(f"{f},{c}\n" for f, _, c in clips))


def quiet(*_):
    """A log for those who do not want to read it."""


# ----------------------------------------------------------------------------------------------------------
# data.py: the resampler

RATES = [(r, RATE) for r in (8000, 11025, 22050, 24000, 32000, 44100, 44101, 48000, 96000)] + [(RATE, 44100)]


@pytest.mark.parametrize("rate_in, rate_out", RATES)
def test_resampler_passes_sines_up_to_nine_tenths_of_the_lower_nyquist(rate_in, rate_out):
    frequencies = np.array([0.05, 0.3, 0.6, 0.9]) * min(rate_in, rate_out) / 2
    x = torch.from_numpy(np.stack([sine(f, 0.5, rate_in) for f in frequencies]))
    y = D.resample(x, rate_in, rate_out).double().numpy()
    middle = slice(y.shape[1] // 4, 3 * y.shape[1] // 4)  # the ends hear the silence around the clip
    t = np.arange(y.shape[1])[middle] / rate_out
    for f, row in zip(frequencies, y[:, middle]):
        basis = np.stack([np.sin(2 * np.pi * f * t), np.cos(2 * np.pi * f * t)], 1)
        (a, b), *_ = np.linalg.lstsq(basis, row, rcond=None)
        assert abs(20 * math.log10(math.hypot(a, b) / 0.5)) < 0.1
        assert abs(b / a) < 0.01  # no delay
        left = row - basis @ [a, b]  # images, aliases, rounding
        assert 20 * math.log10(left.std() / (0.5 / 2**0.5)) < -60


@pytest.mark.parametrize("rate_in", [22050, 24000, 32000, 44100, 44101, 48000, 96000])
def test_resampler_stops_what_the_lower_rate_cannot_hold(rate_in):
    frequencies = [f for f in (8050, 9000, 10500, 15000, 20000, 40000) if f < 0.98 * rate_in / 2]
    x = torch.from_numpy(np.stack([sine(f, 0.5, rate_in) for f in frequencies]))
    y = D.resample(x, rate_in, RATE)[:, 2000:6000]
    for row in y:
        assert 20 * math.log10(row.std().item() / (0.5 / 2**0.5)) < -60


@pytest.mark.parametrize("rate_in, rate_out", [(8000, RATE), (11025, RATE), (44100, RATE), (RATE, 44100)])
def test_resampled_length_is_rounded_up(rate_in, rate_out):
    for n in (1, 2, 999, 16001):
        assert len(D.resample(torch.zeros(n), rate_in, rate_out)) == math.ceil(n * rate_out / rate_in)


@pytest.mark.parametrize("rate_in, rate_out", [(44100, RATE), (8000, RATE), (RATE, 44100)])
def test_resampling_in_blocks_equals_resampling_the_whole(rate_in, rate_out):
    x = torch.from_numpy(hiss(1.5))[None]
    blocks = x.split([1, 5, 700, 12000, 3, x.shape[1] - 12709], 1)
    y = torch.cat(list(D.resample_blocks(blocks, rate_in, rate_out)), 1)
    torch.testing.assert_close(y, D.resample(x, rate_in, rate_out), rtol=0, atol=1e-6)


def test_resampler_refuses_rates_of_damaged_headers():
    with pytest.raises(ValueError, match="sample rate of 1 Hz"):
        D.resample(torch.zeros(10), 1, RATE)


def test_audio_of_any_rate_and_channel_count_becomes_mono_at_16_khz(tmp_path):
    stereo = np.stack([sine(440, 1, 44100), np.zeros(44100, np.float32)], 1)
    wave = D.load_audio(write_wav(tmp_path / "stereo.flac", stereo, 44100, subtype="PCM_24"))
    assert wave.dtype == torch.float32 and wave.shape == (RATE,)
    expected = torch.from_numpy(sine(440)) / 2
    torch.testing.assert_close(wave[2000:-2000], expected[2000:-2000], rtol=0, atol=2e-3)


# ----------------------------------------------------------------------------------------------------------
# data.py: mixing


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 3.3, 5.0])
@pytest.mark.parametrize("loud", [0.02, 0.5])  # the second is turned down to avoid clipping
def test_mix_keeps_its_snr_and_does_not_clip(snr_db, loud):
    a, b = (torch.from_numpy(hiss(1, seed, loud)).double() for seed in (1, 2))
    y = D.mix(a, b, snr_db, 0)
    assert y.abs().max() <= 1
    share = torch.linalg.lstsq(torch.stack((a, b), 1), y[:, None]).solution[:, 0]  # y = share @ (a, b)
    power = (share[:, None] * torch.stack((a, b))).square().mean(1)
    assert abs(10 * math.log10(power[0] / power[1]) - snr_db) < 0.1


@pytest.mark.parametrize("offset", [-300, 0, 300, 2000])
def test_mix_begins_the_second_sound_at_the_offset(offset):
    a, b = torch.from_numpy(hiss(0.1, 1, 0.02)), torch.from_numpy(hiss(0.1, 2, 0.02))
    scale = (a.square().mean() / b.square().mean()).sqrt()
    added = torch.zeros_like(a)
    for i in range(len(a)):
        if 0 <= i - offset < len(b):
            added[i] = scale * b[i - offset]
    torch.testing.assert_close(D.mix(a, b, 0.0, offset), a + added)


def test_mix_with_silence_changes_nothing():
    a = torch.from_numpy(hiss(0.1))
    assert torch.equal(D.mix(a, torch.zeros(1600), 0.0, 0), a)


# ----------------------------------------------------------------------------------------------------------
# data.py: captions

LAYOUTS = {  # name: (sounds, {text file: content}, source, {sound: captions})
    "ESC-50": (
        ["ESC/audio/1-100032-A-0.wav", "ESC/audio/5-9032-A-39.wav"],
        {"ESC/meta/esc50.csv": "filename,fold,target,category,esc10,src_file,take\n"
         "1-100032-A-0.wav,1,0,dog,True,100032,A\n5-9032-A-39.wav,5,39,glass_breaking,False,9032,A\n"},
        "ESC/meta/esc50.csv",
        {"ESC/audio/1-100032-A-0.wav": ["dog"], "ESC/audio/5-9032-A-39.wav": ["glass breaking"]},
    ),
    "Clotho": (
        ["clotho/development/Rain, then thunder.wav"],
        {"clotho/clotho_captions_development.csv":
         "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
         '"Rain, then thunder.wav",It rains.,"Rain, rain.",Thunder rolls.,A storm.,Water falls.\n'},
        "clotho/clotho_captions_development.csv",
        {"clotho/development/Rain, then thunder.wav":
         ["It rains.", "Rain, rain.", "Thunder rolls.", "A storm.", "Water falls."]},
    ),
    "FSD50K": (
        ["FSD50K.dev_audio/64760.wav"],
        {"FSD50K.ground_truth/dev.csv":
         'fname,labels,mids,split\n64760,"Electric_guitar,Guitar,Music","/m/02sgy,/m/0342h",train\n'},
        "FSD50K.ground_truth/dev.csv",
        {"FSD50K.dev_audio/64760.wav": ["electric guitar guitar music"]},
    ),
    "AudioCaps": (
        ["caps/audio/Yr1nicOVtvkQ.wav"],
        {"caps/train.csv": "audiocap_id,youtube_id,start_time,caption\n91139,r1nicOVtvkQ,130,A woman talks\n"
         "91140,r1nicOVtvkQ,130,Someone speaks\n"},
        "caps/train.csv",
        {"caps/audio/Yr1nicOVtvkQ.wav": ["A woman talks", "Someone speaks"]},
    ),
    "AudioCraft manifest": (
        ["craft/a.wav", "craft/b.wav"],
        {"craft/data.jsonl": '{"path": "a.wav", "duration": 0.1, "sample_rate": 16000, "amplitude": null}\n'
         '{"path": "b.wav", "duration": 0.1, "sample_rate": 16000, "amplitude": null}\n',
         "craft/a.json": '{"description": "A dog barks.", "keywords": "dog, bark"}',
         "craft/b.json": '{"description": null, "keywords": "dog, bark, park"}'},
        "craft/data.jsonl",
        {"craft/a.wav": ["A dog barks."], "craft/b.wav": ["dog bark park"]},
    ),
    "Hugging Face audio folder": (
        ["hf/train/a.wav"],
        {"hf/metadata.csv": "file_name,text\ntrain/a.wav,A bell rings\n"},
        "hf",
        {"hf/train/a.wav": ["A bell rings"]},
    ),
    "folder with texts": (
        ["texts/a.wav", "texts/b.flac"],
        {"texts/a.txt": "A bell rings.\n\nA church far away.\n", "texts/b.txt": "Grüße, ein Vogel"},
        "texts",
        {"texts/a.wav": ["A bell rings.", "A church far away."], "texts/b.flac": ["Grüße, ein Vogel"]},
    ),
    "class folders": (
        ["classes/001 - Dog_bark/1.wav", "classes/002 - Rain/1.wav"],
        {},
        "classes",
        {"classes/001 - Dog_bark/1.wav": ["dog bark"], "classes/002 - Rain/1.wav": ["rain"]},
    ),
    "semicolons and upper case": (
        ["semi/a.wav"],
        {"semi/t.csv": "File Name;Caption\na.wav;one, two\n"},
        "semi/t.csv",
        {"semi/a.wav": ["one, two"]},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captions_are_found_in_the_layout_of(layout, tmp_path):
    sounds, texts, source, expected = LAYOUTS[layout]
    for sound in sounds:
        write_wav(tmp_path / sound)
    for name, text in texts.items():
        write_text(tmp_path / name, text)
    found = {os.path.relpath(path, tmp_path): captions for path, captions in
             D.read_captions(str(tmp_path / source))}
    assert found == expected


def test_captions_are_found_in_a_gzipped_manifest(tmp_path):
    with gzip.open(tmp_path / "data.jsonl.gz", "wt") as file:
        file.write(json.dumps({"path": write_wav(tmp_path / "a.wav"), "caption": "rain"}) + "\n")
    assert D.read_captions(str(tmp_path / "data.jsonl.gz")) == [(str(tmp_path / "a.wav"), ["rain"])]


def test_a_damaged_file_of_captions_costs_its_clip_only(tmp_path):
    rows = [{"path": write_wav(tmp_path / name)} for name in ("a.wav", "b.wav")]
    write_text(tmp_path / "data.jsonl", "\n".join(map(json.dumps, rows)))
    write_text(tmp_path / "a.json", '{"descri')
    write_text(tmp_path / "b.json", '{"description": "rain"}')
    assert D.read_captions(str(tmp_path / "data.jsonl")) == [(str(tmp_path / "b.wav"), ["rain"])]


def test_a_folder_is_not_mistaken_for_one_of_its_name_in_its_parent(tmp_path, monkeypatch):
    for folder, caption in (("data/mine", "rain"), ("data/data/mine", "wind")):
        write_wav(tmp_path / folder / "a.wav")
        write_text(tmp_path / folder / "a.txt", caption)
    monkeypatch.chdir(tmp_path)
    assert D.read_captions("data/mine") == [(str(tmp_path / "data/mine/a.wav"), ["rain"])]


@pytest.mark.parametrize("column, values, expected", [
    ("fold", "1 2 3 5 5", ["train"] * 3 + ["val"] * 2),  # as with ESC-50, the last one validates
    ("fold", "08 09 10 10 09", ["train", "train", "val", "val", "train"]),
    ("split", "train dev test valid train", ["train", "train", "val", "val", "train"]),
])
def test_a_split_in_the_table_is_honoured(column, values, expected, tmp_path):
    rows = [f"{i}.wav,sound,{value}\n" for i, value in enumerate(values.split())]
    for i in range(5):
        write_wav(tmp_path / f"{i}.wav")
    table = write_text(tmp_path / "t.csv", f"path,caption,{column}\n" + "".join(rows))
    assert list(D.prepare(table, str(tmp_path / "out"), log=quiet).split) == expected


def test_without_a_split_a_tenth_validates_by_clip_and_always_the_same(tmp_path):
    table = write_table(tmp_path, [(f"{i}.wav", hiss(0.1, i), f"sound {i}") for i in range(20)])
    first, second = (D.prepare(table, str(tmp_path / out), log=quiet).split.tolist() for out in "ab")
    assert first == second and first.count("val") == 2


@pytest.mark.parametrize("tags, sentence", [
    ("dog, bark, park", "dog bark park"), ("001 - Dog_bark", "dog bark"), (["Rain", "Sea"], "rain sea"),
    ("glass_breaking", "glass breaking"), ("['dog', 'park']", "'dog' 'park'"), ("42", ""),
])
def test_tags_become_a_pseudo_sentence(tags, sentence):
    assert D.pseudo_sentence(tags).replace("'", "") == sentence.replace("'", "")


# ----------------------------------------------------------------------------------------------------------
# data.py: preparation


def test_preparation_is_reused_while_nothing_changed(tmp_path, monkeypatch):
    table = write_table(tmp_path, [("a.wav", hiss(0.2), "rain"), ("b.wav", hiss(0.3), "wind")])
    first = D.prepare(table, str(tmp_path / "out"), log=quiet)
    monkeypatch.setattr(D, "read_blocks", lambda path: pytest.fail("decoded again"))
    second = D.prepare(table, str(tmp_path / "out"), log=quiet)
    assert np.array_equal(first.audio, second.audio) and first.captions == second.captions


@pytest.mark.parametrize("change", ["sound", "caption"])
def test_preparation_is_redone_when_the_source_changed(change, tmp_path):
    clips = [("a.wav", hiss(0.2), "rain"), ("b.wav", hiss(0.3), "wind")]
    D.prepare(write_table(tmp_path, clips), str(tmp_path / "out"), log=quiet)
    clips[0] = ("a.wav", hiss(0.4), "rain") if change == "sound" else ("a.wav", hiss(0.2), "snow")
    again = D.prepare(write_table(tmp_path, clips), str(tmp_path / "out"), log=quiet)
    assert again.length[0] == len(clips[0][1]) and again.captions[0] == [clips[0][2]]


@pytest.mark.parametrize("name, harm", [("index.json", lambda b: b[:90] + b"x" + b[91:]),
                                        ("index.json", lambda b: b[:50]), ("index.json", lambda b: b""),
                                        ("audio.i16", lambda b: b[:-3200]), ("audio.i16", lambda b: b"")])
def test_a_damaged_preparation_is_noticed(name, harm, tmp_path):
    table = write_table(tmp_path, [("a.wav", hiss(0.2), "rain"), ("b.wav", hiss(0.3), "wind")])
    made = D.prepare(table, str(tmp_path / "out"), log=quiet).name
    path = tmp_path / "out" / made / name
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{made}: was damaged; delete this folder"):
        D.prepare(table, str(tmp_path / "out"), log=quiet)


BAD_SOUNDS = {
    "missing": lambda path: None,
    "empty": lambda path: write_text(path, ""),
    "corrupt": lambda path: write_text(path, "RIFF, but not really" * 50),
    "truncated header": lambda path: write_text(path, "RIFF"),
    "no samples": lambda path: write_wav(path, np.zeros(0, np.float32)),
    "NaN": lambda path: write_wav(path, np.full(1600, np.nan, np.float32), subtype="FLOAT"),
    "silent": lambda path: write_wav(path, np.zeros(1600, np.float32)),
}


def test_unreadable_files_are_named_and_do_not_stop_the_good_ones(tmp_path):
    write_wav(tmp_path / "good.wav", hiss(0.2))
    for name, make in BAD_SOUNDS.items():
        make(tmp_path / f"{name}.wav")
    rows = "".join(f"{name}.wav,sound\n" for name in ["good", *BAD_SOUNDS])
    table, report = write_text(tmp_path / "t.csv", "path,caption\n" + rows), []
    clips = D.prepare(table, str(tmp_path), log=report.append)
    assert clips.names == ["good.wav"] and clips.length.tolist() == [3200]
    for name in BAD_SOUNDS:
        assert sum(f"{name}.wav" in line for line in report) == 1


@pytest.mark.parametrize("kind", BAD_SOUNDS)
def test_a_source_without_any_good_sound_is_an_error_that_names_it(kind, tmp_path):
    BAD_SOUNDS[kind](tmp_path / "bad.wav")
    table = write_text(tmp_path / "t.csv", "path,caption\nbad.wav,rain\n")
    with pytest.raises(ValueError, match=r"bad\.wav"):
        D.prepare(table, str(tmp_path / "out"), log=quiet)


def test_a_preparation_that_died_is_never_taken_for_whole(tmp_path, monkeypatch):
    table = write_table(tmp_path, [("a.wav", hiss(0.2), "rain"), ("b.wav", hiss(0.3), "wind")])

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(D.json, "dumps", die)
        with pytest.raises(KeyboardInterrupt):
            D.prepare(table, str(tmp_path / "out"), log=quiet)
    assert len(D.prepare(table, str(tmp_path / "out"), log=quiet).names) == 2


# ----------------------------------------------------------------------------------------------------------
# data.py: batches


def test_batches_depend_on_the_generator_alone(tmp_path):
    table = write_table(tmp_path, [(f"{i}.wav", hiss(0.5, i), f"sound {i}") for i in range(4)])
    data = D.AudioData([table], str(tmp_path / "out"), log=quiet)
    first, same, other = (data.batch(8, 1000, np.random.default_rng(seed), 0.5) for seed in (1, 1, 2))
    assert torch.equal(first[0], same[0]) and first[1] == same[1]
    assert not torch.equal(first[0], other[0])


def test_a_batch_says_where_in_its_clip_each_crop_begins(tmp_path):
    data = D.AudioData([write_table(tmp_path, [("a.wav", hiss(2), "rain")])], str(tmp_path), log=quiet)
    waves, _, places = data.batch(20, 1000, np.random.default_rng(0))
    assert len(set(places)) > 15
    for wave, (k, begin) in zip(waves, places):
        assert k == 0 and torch.equal(wave, data.read(0, 1000, begin))


def test_silent_crops_are_drawn_again(tmp_path):
    wave = np.concatenate([np.zeros(2 * RATE, np.float32), hiss(1)])  # two crops in three would be silent
    data = D.AudioData([write_table(tmp_path, [("a.wav", wave, "rain")])], str(tmp_path), log=quiet)
    waves, _, _ = data.batch(50, 1000, np.random.default_rng(0))
    assert waves.abs().amax(1).min() > D.SILENCE


def test_crops_reach_a_share_of_the_peak_of_their_clip(tmp_path):
    wave = np.concatenate([0.1 * hiss(2), hiss(1)])  # two crops in three are far quieter than the clip
    data = D.AudioData([write_table(tmp_path, [("a.wav", wave, "rain")])], str(tmp_path), log=quiet)
    for loud, seldom in ((0.0, False), (0.5, True)):
        waves, _, _ = data.batch(50, 1000, np.random.default_rng(0), loud=loud)
        assert ((waves.abs().amax(1) < 0.5 * np.abs(wave).max()).sum() < 5) == seldom


def test_short_clips_are_padded_at_random_places(tmp_path):
    table = write_table(tmp_path, [("a.wav", sine(440, 0.1) + 0.1, "a")])
    data = D.AudioData([table], str(tmp_path), log=quiet)
    waves, _, _ = data.batch(20, 8000, np.random.default_rng(0))
    starts = {int(wave.nonzero()[0]) for wave in waves}
    assert waves.shape == (20, 8000) and len(starts) > 10
    assert all(1500 < (wave != 0).sum() <= 1600 for wave in waves)


def test_weights_set_how_often_a_source_is_drawn(tmp_path):
    a = write_table(tmp_path / "a", [("a.wav", hiss(0.2), "rain")])
    b = write_table(tmp_path / "b", [("b.wav", hiss(2.0), "wind")])
    data = D.AudioData([a + ":2", b], str(tmp_path / "out"), log=quiet)
    _, captions, _ = data.batch(3000, 100, np.random.default_rng(0))
    assert abs(captions.count("rain") / 3000 - 2 / 3) < 0.04  # more than four standard deviations


def test_without_weights_sources_are_drawn_by_their_length(tmp_path):
    a = write_table(tmp_path / "a", [("a.wav", hiss(0.5), "rain")])
    b = write_table(tmp_path / "b", [("b.wav", hiss(2.0), "wind")])
    data = D.AudioData([a, b], str(tmp_path / "out"), log=quiet)
    _, captions, _ = data.batch(3000, 100, np.random.default_rng(0))
    assert abs(captions.count("rain") / 3000 - 1 / 5) < 0.04


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "1e"])
def test_a_weight_that_is_no_positive_number_is_an_error(weight, tmp_path):
    table = write_table(tmp_path, [("a.wav", hiss(0.1), "rain")])
    with pytest.raises((ValueError, FileNotFoundError)):
        D.AudioData([f"{table}:{weight}"], str(tmp_path / "out"), log=quiet)


def test_mixed_batches_join_two_captions_and_never_a_clip_with_itself(tmp_path):
    words = ("rain", "wind", "fire")
    table = write_table(tmp_path, [(f"{c}.wav", hiss(0.5, i), c) for i, c in enumerate(words)])
    data = D.AudioData([table], str(tmp_path / "out"), log=quiet)
    waves, captions, _ = data.batch(40, 2000, np.random.default_rng(0), mix_share=1.0)
    assert all(re.fullmatch(r"\w+ and \w+", caption) for caption in captions)
    assert all(len(set(caption.split(" and "))) == 2 for caption in captions)
    assert waves.abs().max() <= 1


def test_one_of_several_captions_is_drawn(tmp_path):
    write_wav(tmp_path / "x" / "a.wav", hiss(0.2))
    write_text(tmp_path / "x" / "a.txt", "one\ntwo\nthree\n")
    data = D.AudioData([str(tmp_path / "x")], str(tmp_path / "out"), log=quiet)
    assert set(data.batch(50, 100, np.random.default_rng(0))[1]) == {"one", "two", "three"}


# ----------------------------------------------------------------------------------------------------------
# data.py: the sound world


def test_the_world_is_made_by_its_seed():
    first, same, other = (list(D.make_world(8, 1.0, seed=seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(first, same))
    assert not any(np.array_equal(a[0], b[0]) for a, b in zip(first, other))


def test_held_out_pairs_are_never_in_training_and_some_validate():
    clips = [(caption, split) for _, caption, split in D.make_world(240, 1.0, seed=0)]
    held = [split for caption, split in clips if D.is_held_out(caption)]
    assert len(held) >= 5 and set(held) == {"val"}
    assert {split for _, split in clips} == {"train", "val"}


@pytest.mark.parametrize("name", D.SOURCES)
def test_every_source_of_the_world_is_audible_and_does_not_clip(name):
    wave = D.synth(name, np.random.default_rng(0), 2.0)
    assert wave.shape == (2 * RATE,) and wave.dtype == np.float32
    assert np.isfinite(wave).all() and 0.05 < np.abs(wave).max() <= 1


@pytest.mark.parametrize("name", D.SOURCES)
def test_every_source_of_the_world_can_be_short(name):
    for seconds in (0.02, 0.2):
        assert np.isfinite(D.synth(name, np.random.default_rng(0), seconds, distance="far")).all()


def centroid(wave):
    """The mean frequency of the power."""
    power = np.abs(np.fft.rfft(wave)) ** 2
    return (power * np.fft.rfftfreq(len(wave), 1 / RATE)).sum() / power.sum()


def pitch_of(wave):
    """The fundamental frequency of the loudest 50 ms, by autocorrelation."""
    peak = np.abs(wave).argmax()
    part = wave[max(0, peak - 400) : peak + 400]
    spectrum = np.abs(np.fft.rfft(part, 4096)) ** 2
    same = np.fft.irfft(spectrum)[16:107]  # 1000 to 150 Hz
    return RATE / (16 + same.argmax())


@pytest.mark.parametrize("name", [name for name, source in D.SOURCES.items() if "pitch" in source[3]])
def test_high_sounds_lie_above_low_ones(name):
    measure = pitch_of if name == "dog" else centroid  # its throat keeps its size, its voice is what rises
    high, low = (np.median([measure(D.synth(name, np.random.default_rng(seed), 3.0, pitch=pitch))
                            for seed in range(3)]) for pitch in ("high", "low"))
    assert high > 1.3 * low


def onsets(wave):
    """How often the loudness rises through a fifth of its maximum."""
    frame = RATE // 100
    loudness = np.abs(wave[: len(wave) // frame * frame]).reshape(-1, frame).max(1)
    loudness = np.array([loudness[max(0, i - 3) : i + 1].max() for i in range(len(loudness))])
    above = loudness > 0.2 * loudness.max()
    return int((above[1:] & ~above[:-1]).sum())


@pytest.mark.parametrize("name", ["footsteps", "clock", "alarm", "whistle", "dog"])
def test_fast_sounds_come_more_often_than_slow_ones(name):
    fast, slow = (sum(onsets(D.synth(name, np.random.default_rng(seed), 8.0, rate=rate)) for seed in range(2))
                  for rate in ("fast", "slow"))
    assert fast > 2 * slow > 0


def test_far_sounds_are_quieter_and_duller_than_near_ones():
    near, far = (D.synth("rain", np.random.default_rng(0), 2.0, distance=d) for d in ("near", "far"))
    assert near.std() > 2 * far.std() and centroid(near) > centroid(far)


# ----------------------------------------------------------------------------------------------------------
# data.py: the tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return D.Tokenizer.train(["a dog barks", "rain falls", "a bell rings while wind blows"], 300)


def test_tokenizer_learns_from_a_single_caption_and_knows_every_word():
    tokenizer = D.Tokenizer.train(["a dog barks"], 500)
    ids = tokenizer.encode("Zürich 東京 dog")
    assert ids and 1 not in ids and max(ids) < tokenizer.vocab_size  # 1 is "unknown": bytes stand in for it


def test_tokenizer_ignores_case(tokenizer):
    assert tokenizer.encode("A Dog Barks") == tokenizer.encode("a dog barks")


def test_tokenizer_pads_with_zero_and_cuts_at_the_window(tokenizer):
    batch = tokenizer.batch(["a dog", "", "rain falls " * 20], 12)
    assert batch.shape == (3, 12) and batch.dtype == torch.int64
    ids = tokenizer.encode("a dog")
    assert batch[0].tolist() == ids + [0] * (12 - len(ids)) and 0 not in ids
    assert not batch[1].any() and batch[2].all()


def test_tokenizer_survives_the_way_through_a_tensor(tokenizer):
    again = D.Tokenizer(tokenizer.to_tensor())
    assert again.encode("a dog barks in the rain") == tokenizer.encode("a dog barks in the rain")
    assert again.vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize("damage", [lambda m: m[: len(m) // 2], lambda m: m[:-9] + b"x" + m[-8:],
                                    lambda m: b"", lambda m: b"not a model"])
def test_a_damaged_tokenizer_is_a_value_error(damage, tokenizer):
    with pytest.raises(ValueError, match="damaged"):
        D.Tokenizer(damage(tokenizer.model))


# ----------------------------------------------------------------------------------------------------------
# data.py: manners of the scripts


def test_saving_that_fails_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = str(tmp_path / "x.pt")
    D.save_atomic({"a": 1}, path)

    def full_disk(obj, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        D.save_atomic({"a": 2}, path)
    assert torch.load(path) == {"a": 1} and os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried"),
                                   RuntimeError("[enforce fail] can't allocate memory: you tried")])
def test_running_out_of_memory_says_which_flag_to_lower(error, capsys):
    with pytest.raises(SystemExit) as stop, D.one_line_errors():
        raise error
    assert stop.value.code == 2
    assert re.fullmatch("error: out of memory; halve --batch.*\n", capsys.readouterr().err)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shape"), D.one_line_errors():
        raise RuntimeError("shape mismatch")


def test_a_resumed_log_drops_the_rows_after_its_checkpoint(tmp_path):
    path = str(tmp_path / "log.csv")
    D.Log(path).write([{"step": s, "loss": s / 2} for s in (10, 20, 30)])
    D.Log(path, 20).write([{"step": 30, "loss": 7}])
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["loss"]) for row in rows] == [("10", "5.0"), ("20", "10.0"), ("30", "7")]


def test_a_log_resumed_from_before_its_first_row_starts_anew(tmp_path):
    path = str(tmp_path / "log.csv")
    D.Log(path).write([{"step": s} for s in (10, 20)])
    D.Log(path, 5).write([{"step": 10}])
    with open(path, newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["10"]


# ----------------------------------------------------------------------------------------------------------
# codec.py: quantizer. The reference code has three known faults; tests below show that ours has none of them.


def started_book(codes=8, dim=4, seed=0, **options):
    """A book in training mode that is past its k-means start."""
    torch.manual_seed(seed)
    book = VectorQuantizer(codes, dim, **options).train()
    book.started.fill_(True)
    book.is_started = True
    return book


def test_straight_through_gradient_is_the_identity():
    torch.manual_seed(0)
    z = torch.randn(2, 5, 8, requires_grad=True)
    z_q, _, _ = ResidualVQ(3, 16, 8).eval()(z)
    g = torch.randn_like(z)
    z_q.backward(g)
    assert torch.equal(z.grad, g)


def test_quantized_value_is_the_sum_of_the_chosen_vectors():
    torch.manual_seed(0)
    quantizer, z = ResidualVQ(3, 16, 8).eval(), torch.randn(2, 5, 8)
    z_q, codes, _ = quantizer(z)
    assert codes.shape == (2, 3, 5) and codes.dtype == torch.int64
    torch.testing.assert_close(z_q, quantizer.decode(codes))
    distance = torch.cdist(z, quantizer.books[0].embed)  # the first book by the definition of nearest
    assert torch.equal(codes[:, 0], distance.argmin(-1))


def test_after_the_k_means_start_codes_are_as_large_as_the_data():
    torch.manual_seed(0)
    x = 3 + torch.randn(1024, 8)
    book = VectorQuantizer(16, 8).train()
    book(x)  # the start and one update: means stored as sums would shrink the book by 64
    assert 0.9 < book.embed.norm(dim=1).mean() / x.norm(dim=1).mean() < 1.1


def test_after_the_k_means_start_averages_hold_counts_and_sums():
    torch.manual_seed(0)
    x = torch.randn(1024, 8)
    book = VectorQuantizer(16, 8, revive=0.0).train()
    book.start(x)
    assert book.count.sum() == 1024
    torch.testing.assert_close(book.total, book.embed * book.count[:, None])
    torch.testing.assert_close(book.total.sum(0), x.sum(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [0, 3, 10**6])
def test_moving_average_follows_its_closed_form(steps):
    book = started_book(revive=0.0)
    book.steps.fill_(steps)
    book.count.uniform_(1, 5)
    book.total.copy_(book.embed * book.count[:, None])
    x, count, total = torch.randn(64, 4), book.count.clone(), book.total.clone()
    index = torch.cdist(x, book.embed).argmin(1)
    book(x)
    decay = min(0.99, (steps + 1) / (steps + 10))  # quick at first, then as slow as the paper's
    for code in range(8):
        chosen = x[index == code]
        count[code] = decay * count[code] + (1 - decay) * len(chosen)
        total[code] = decay * total[code] + (1 - decay) * chosen.sum(0)
    torch.testing.assert_close(book.count, count)
    torch.testing.assert_close(book.total, total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(book.embed, total / count[:, None], rtol=1e-4, atol=1e-5)


def test_a_replaced_code_survives_the_same_forward():
    book = started_book()
    book.embed[3], book.count[3], book.total[3] = 1000.0, 0.0, 0.0
    x = torch.randn(64, 4)
    book(x)
    assert torch.cdist(book.embed[3:4], x).min() < 1e-5  # it is one of the batch now
    torch.testing.assert_close(book.total[3] / book.count[3], book.embed[3])  # and the next update keeps it


def test_a_dead_code_is_used_again():
    book = started_book()
    book.steps.fill_(10**6)
    book.embed[3] = 1000.0
    book.total.copy_(book.embed)
    used = False
    for _ in range(300):  # .99**230 = .1: that long its count takes to fall under the threshold
        _, index = book(torch.randn(64, 4))
        used |= bool((index == 3).any())
    assert used


def test_dead_is_relative_to_the_mean_use():
    """With fewer vectors in a batch than codes, most codes are rarely used and none of them is dead."""
    book = started_book(codes=256)
    book.steps.fill_(10**6)
    book.count.fill_(0.25)
    book.total.copy_(book.embed * 0.25)
    before = book.embed.clone()
    _, index = book(torch.randn(64, 4))
    unused = torch.ones(256, dtype=torch.bool)
    unused[index] = False
    torch.testing.assert_close(book.embed[unused], before[unused])


def test_every_stage_has_a_commitment_gradient():
    torch.manual_seed(0)
    quantizer, z = ResidualVQ(3, 16, 8).eval(), torch.randn(2, 5, 8, requires_grad=True)
    _, codes, commitment = quantizer(z)
    commitment.backward()
    residual, expected = z.detach(), []
    for k, book in enumerate(quantizer.books):
        residual = residual - book.embed[codes[:, k]]
        expected.append(2 * residual / z.numel() / 3)
    assert all(stage.abs().max() > 0 for stage in expected)
    torch.testing.assert_close(z.grad, sum(expected))
    assert not torch.allclose(z.grad, expected[0])


@pytest.mark.parametrize("young", [False, True])
def test_not_a_number_in_a_batch_does_not_poison_the_book(young):
    book = VectorQuantizer(8, 4).train() if young else started_book()
    x = torch.randn(64, 4)
    x[5] = float("nan")
    book(x)
    assert book.embed.isfinite().all() and book.total.isfinite().all()


HALVES = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {here!r})
from codec import ResidualVQ
torch.set_num_threads(1)
rank = int(sys.argv[1])
torch.manual_seed(0)
x = torch.randn(3, 2, 40, 8)  # steps, batch, frames, dim
def learn(data, revive, started):
    torch.manual_seed(1)
    q = ResidualVQ(2, 16, 8, revive=revive).train()
    for book in q.books:
        book.started.fill_(started)
    for z in data:
        q(z)
    return torch.stack([book.embed for book in q.books])
whole = learn(x, 0.0, True), learn(x, 0.1, False)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
x = x[:, rank : rank + 1]
half = learn(x, 0.0, True), learn(x, 0.1, False)
torch.save((whole, half), sys.argv[3] + str(rank))
dist.destroy_process_group()
"""


def test_two_processes_learn_the_books_of_one(tmp_path):
    script = write_text(tmp_path / "halves.py", HALVES.format(here=HERE))
    runs = [start(script, rank, tmp_path / "meet", tmp_path / "books") for rank in range(2)]
    for run in runs:
        _, err = run.communicate(timeout=120)
        assert run.returncode == 0, err
    (whole, half), (_, half2) = (torch.load(str(tmp_path / "books") + rank) for rank in "01")
    for i in range(2):  # the second also through the k-means start and the revival of codes
        torch.testing.assert_close(half[i], whole[i], rtol=1e-4, atol=1e-5)  # each saw half, both learnt all
        assert torch.equal(half[i], half2[i])


# ----------------------------------------------------------------------------------------------------------
# codec.py: losses


def test_mel_filters_are_the_triangles_of_the_definition():
    filters = codec_py.mel_filters(1024, 64)
    centres = [i * 2595 * math.log10(1 + 8000 / 700) / 63 for i in range(64)]
    centres = [700 * (10 ** (m / 2595) - 1) for m in centres]
    expected = torch.zeros(513, 64)
    for k in range(513):
        f = min(k * 16000 / 1024, 7999.999)
        m = sum(c <= f for c in centres) - 1  # f lies between these two centres, and is shared by them
        expected[k, m + 1] = (f - centres[m]) / (centres[m + 1] - centres[m])
        expected[k, m] = 1 - expected[k, m + 1]
    torch.testing.assert_close(filters, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [2**i for i in range(5, 12)])
def test_no_mel_band_is_empty(window):
    filters = codec_py.mel_filters(window, 64)
    assert filters.sum(0).min() > 0 and filters.shape[0] == window // 2 + 1
    assert filters.shape[1] == 64 or window <= 512
    assert getattr(MelLoss(), f"filters{window}").shape[1] >= max(filters.shape[1], window // 5)


def test_mel_loss_is_its_formula_and_moves_the_estimate_only():
    torch.manual_seed(0)
    loss = MelLoss(exponents=[8])
    x, y = 0.1 * torch.randn(2, 2, 3000)
    x.requires_grad_()
    y.requires_grad_()
    value = loss(x, y)
    a, b = loss.mel(x, 256), loss.mel(y, 256)
    norm = ((a + 1e-3).log() - (b + 1e-3).log()).norm(dim=-1) / a.shape[-1] ** 0.5
    torch.testing.assert_close(value, (a - b).abs().mean() + norm.mean())
    value.backward()
    assert x.grad is None and y.grad.abs().sum() > 0


def test_what_is_quieter_than_four_steps_of_a_16_bit_file_decodes_to_silence():
    decoder, wave = codec_py.Decoder(CodecConfig(4)), torch.tensor([5e-5, -1.2e-4, 0.0, 1e-3, -0.5])
    decoder.up = torch.nn.Identity()
    torch.testing.assert_close(decoder.to_wave(wave / codec_py.LOUDNESS), wave)  # training hears all of it
    heard = decoder.eval().to_wave(wave / codec_py.LOUDNESS)
    torch.testing.assert_close(heard, torch.tensor([0, 0, 0, 1e-3 - 2**-13, -0.5 + 2**-13]))


def test_convolutions_with_matrices_for_weights_are_those_of_pytorch():
    x = torch.randn(2, 24, 3)  # (B, T, C)
    conv, up = codec_py.Conv(3, 5, 8, stride=4), codec_py.ConvTranspose(3, 5, 4)
    y = F.conv1d(x.mT, conv.weight.view(5, 3, 8), conv.bias, 4, 2).mT
    torch.testing.assert_close(conv(x), y)
    y = F.conv_transpose1d(x.mT, up.weight.view(5, 3, 8).transpose(0, 1), up.bias, 4, 2).mT
    torch.testing.assert_close(up(x), y)
    assert conv(x).shape == (2, 6, 5) and up(x).shape == (2, 96, 5)


def test_mel_loss_of_equal_waves_is_nothing_and_its_gradient_finite():
    x = torch.from_numpy(hiss(0.2))[None]
    y = x.clone().requires_grad_()
    value = MelLoss()(x, y)
    value.backward()
    assert value < 1e-4 and y.grad.isfinite().all()


def test_discriminator_hears_five_scales_and_reads_five_layers_of_each():
    logits, features = STFTDiscriminator(4)(torch.randn(2, 4000))
    assert len(logits) == len(features) == 5 and all(len(scale) == 5 for scale in features)
    frames = [logit.shape[2] for logit in logits]
    assert frames == [4000 // (n // 4) + 1 for n in (2048, 1024, 512, 256, 128)]


def test_a_kernel_over_folded_bins_is_one_twice_as_wide_that_moves_by_two():
    x, weight = torch.randn(2, 3, 5, 10), torch.randn(4, 3, 3, 8)
    expected = F.conv2d(x, weight, stride=(1, 2), padding=(2, 4), dilation=(2, 1))
    folded = torch.cat((weight[..., 0::2], weight[..., 1::2]), 1)  # even bins, then odd ones
    got = F.conv2d(codec_py.fold(x), folded, padding=(2, 2), dilation=(2, 1))
    torch.testing.assert_close(got, expected)


def test_hinge_and_feature_losses_are_their_formulas():
    torch.manual_seed(0)
    real, fake = ([2 * torch.randn(2, 1, 3, n) for n in (4, 7)] for _ in range(2))
    judge = np.mean([np.maximum(0, 1 - r.numpy()).mean() + np.maximum(0, 1 + f.numpy()).mean()
                     for r, f in zip(real, fake)])
    assert codec_py.discriminator_loss(real, fake).item() == pytest.approx(judge, rel=1e-5)
    fooled = np.mean([np.maximum(0, 1 - f.numpy()).mean() for f in fake])
    assert codec_py.generator_loss(fake).item() == pytest.approx(fooled, rel=1e-5)
    matched = np.mean([np.abs(r.numpy() - f.numpy()).mean() for r, f in zip(real, fake)])
    assert codec_py.feature_loss([real], [fake]).item() == pytest.approx(matched, rel=1e-5)


def test_feature_loss_does_not_move_the_real_features():
    real, fake = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    codec_py.feature_loss([[real]], [[fake]]).backward()
    assert real.grad is None and fake.grad is not None


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_balancer_gives_each_loss_its_share_whatever_its_scale(scale):
    torch.manual_seed(0)
    decay, a, b = 0.9, torch.randn(2, 3, 50), torch.randn(2, 3, 50)  # gradients: steps, clips, samples
    a[:, 0] *= 5  # a clip whose gradient is above the average
    balancer, norms = Balancer(["a", "b"], decay), []
    for step in range(2):
        y = torch.zeros(3, 50, requires_grad=True)
        losses = {"a": (y * a[step]).sum(), "b": scale * (y * b[step]).sum()}
        gradient = balancer(losses, {"a": 1.0, "b": 3.0}, y)
        norms.append([3 * g[step].norm(dim=1, keepdim=True) for g in (a, b)])  # of a clip's own: B times
        weights = [(1 - decay) * decay ** (step - i) for i in range(step + 1)]
        expected = 0
        for i, (g, share) in enumerate(((a[step], 0.25), (b[step], 0.75))):
            average = sum(w * n[i].mean() for w, n in zip(weights, norms)) / sum(weights)
            expected = expected + share * g / torch.maximum(norms[step][i], average)  # no clip pulls harder
        torch.testing.assert_close(gradient, expected)


def test_balancer_leaves_out_a_loss_of_weight_zero():
    y = torch.randn(2, 50, requires_grad=True)
    losses = {"a": y.square().sum(), "b": (5 * y).sum()}
    alone = Balancer(["a", "b"])({"a": losses["a"]}, {"a": 2.0}, y)
    assert torch.equal(Balancer(["a", "b"])(losses, {"a": 1.0, "b": 0.0}, y), alone)


# ----------------------------------------------------------------------------------------------------------
# codec.py: the codec


@pytest.fixture(scope="session")
def codecs():
    """Untrained codecs by number of streams; the books suit the latents, so that many codes are in use."""
    made = {}
    for streams in (1, 2, 4, 8):
        torch.manual_seed(streams)
        codec = made[streams] = Codec(CodecConfig(streams)).eval()
        with torch.no_grad():
            z = codec.latents(torch.from_numpy(hiss(0.5))[None])[0]
        for k, book in enumerate(codec.quantizer.books):
            book.embed.mul_(z.std(0) / 2**k).add_(z.mean(0) if k == 0 else 0)
    return made


def same(a, b):
    """Share of equal codes; rounding may tip a code that lies between two, on some machine, some day."""
    return (a == b).float().mean().item()


@pytest.mark.parametrize("streams, hop, rate, codes, kbps",
                         [(1, 32, 500, 2048, 5.5), (2, 64, 250, 1024, 5.0), (4, 128, 125, 512, 4.5),
                          (8, 256, 62.5, 256, 4.0)])
def test_the_papers_table_of_streams(streams, hop, rate, codes, kbps):
    cfg = CodecConfig(streams)
    assert (cfg.hop, cfg.frame_rate, cfg.codes, cfg.kbps) == (hop, rate, codes, kbps)


@pytest.mark.parametrize("streams", [0, 3, 16, -1])
def test_unknown_numbers_of_streams_are_value_errors(streams):
    for config in (CodecConfig, LMConfig):
        with pytest.raises(ValueError, match="1, 2, 4, 8"):
            config(streams)


def test_unknown_sizes_are_value_errors():
    for config in (CodecConfig, LMConfig):
        with pytest.raises(ValueError, match="--size"):
            config(size="huge")


def test_the_papers_codec_has_12_million_parameters_and_tiny_a_quarter():
    with torch.device("meta"):
        codecs = [Codec(CodecConfig(size=size)) for size in ("paper", "tiny")]
    paper, tiny = (sum(p.numel() for p in codec.parameters()) for codec in codecs)
    assert 11e6 < paper < 14e6 and 0.2 < tiny / paper < 0.3


def test_an_untrained_codec_already_tells_frames_apart_however_quiet():
    """Where all frames look alike at first, they may do so for ever: the codebooks collapse."""
    torch.manual_seed(0)
    wave = torch.randn(1, 8000) * torch.sin(torch.linspace(0, 20, 8000))
    for loudness in (0.1, 0.001):
        z = Codec(CodecConfig(4, "tiny")).latents(loudness * wave)
        assert z.std(1).square().mean() > 0.3 * z.square().mean()


@pytest.mark.parametrize("streams", [1, 2, 4, 8])
def test_any_length_can_be_coded_and_comes_back(streams, codecs):
    codec = codecs[streams]
    hop = codec.cfg.hop
    for length in (1, 2, hop - 1, hop, hop + 1, 5000):
        wave = torch.from_numpy(hiss(length / RATE + 1e-6)[:length])[None].repeat(2, 1)
        codes, frames = codec.encode(wave), math.ceil(length / hop)
        assert codes.shape == (2, streams, frames) and codes.dtype == torch.int64
        assert 0 <= codes.min() and codes.max() < codec.cfg.codes
        assert codec.decode(codes).shape == (2, frames * hop)
        with torch.no_grad():
            assert codec(wave)[0].shape == wave.shape


def test_forward_and_encode_find_the_same_codes(codecs):
    wave = torch.from_numpy(hiss(0.5))[None]
    with torch.no_grad():
        wave_hat, codes, _ = codecs[4](wave)
    assert same(codes, codecs[4].encode(wave)) > 0.99
    torch.testing.assert_close(wave_hat, codecs[4].decode(codes)[:, : wave.shape[1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("streams", [1, 8])
def test_codes_do_not_depend_on_what_follows_but_for_a_few_frames(streams, codecs):
    codec = codecs[streams]
    wave = torch.from_numpy(hiss(1.0))[None]
    frames = 20
    whole, part = codec.encode(wave), codec.encode(wave[:, : frames * codec.cfg.hop])
    assert len(whole.unique()) > 20  # else there would be nothing to see
    assert same(part[:, :, : frames - 6], whole[:, :, : frames - 6]) > 0.99


def test_codes_do_not_depend_on_the_rest_of_the_batch(codecs):
    waves = torch.stack([torch.from_numpy(hiss(0.5, seed, amplitude)) for seed, amplitude in
                         enumerate((0.01, 0.1, 0.5))])
    together = codecs[4].encode(waves)
    assert same(together, torch.cat([codecs[4].encode(wave[None]) for wave in waves])) > 0.99


@pytest.mark.parametrize("streams", [1, 4, 8])
@pytest.mark.parametrize("chunks", [[46], [1] * 46, [1, 2, 7, 1, 13, 3, 19], [45, 1]])
def test_decoding_in_pieces_equals_decoding_the_whole(streams, chunks, codecs):
    codec = codecs[streams]
    torch.manual_seed(0)
    codes = torch.randint(codec.cfg.codes, (2, streams, 46))
    pieces, whole = torch.cat(list(codec.decode_stream(iter(codes.split(chunks, 2)))), 1), codec.decode(codes)
    assert whole.abs().mean() > 1e-3  # else there would be nothing to compare
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)


def test_pieces_come_out_before_the_last_code_went_in(codecs):
    given = []

    def chunks():
        for i in range(10):
            given.append(i)
            yield torch.zeros(1, 4, 5, dtype=torch.long)

    next(codecs[4].decode_stream(chunks()))
    assert len(given) < 4


def test_only_training_mode_changes_the_codebooks():
    torch.manual_seed(0)
    codec, wave = Codec(CodecConfig(4)), torch.from_numpy(hiss(0.5))[None]
    before = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
    codec.eval()(wave)
    codec.train().encode(wave)
    assert all(torch.equal(tensor, before[name]) for name, tensor in codec.state_dict().items())
    codec.train()(wave)
    for k in range(4):
        assert not torch.equal(codec.quantizer.books[k].embed, before[f"quantizer.books.{k}.embed"])


def test_si_snr_is_the_power_ratio_of_orthogonal_noise():
    x, noise = torch.from_numpy(np.stack([sine(400), sine(1000, amplitude=0.05)]))[:, None]
    assert codec_py.si_snr(x, x + noise).item() == pytest.approx(20, abs=0.01)
    assert codec_py.si_snr(x, 3 * (x + noise)).item() == pytest.approx(20, abs=0.01)  # the scale is no matter
    assert codec_py.si_snr(x, x).item() > 60


def test_spectral_distances_are_zero_for_equal_waves_only():
    x, y = (torch.from_numpy(hiss(0.3, seed))[None] for seed in (0, 1))
    assert codec_py.log_spectrum_distance(x, x).item() == codec_py.log_mel_distance(x, x).item() == 0
    assert codec_py.log_spectrum_distance(x, y).item() == pytest.approx(0.3, abs=0.05)  # its docstring says
    assert codec_py.log_mel_distance(x, 10 * x).item() == pytest.approx(1, abs=0.02)


def test_perplexity_counts_the_codes_in_use():
    codes = torch.stack([torch.arange(64), torch.arange(64) % 4, torch.zeros(64, dtype=torch.long)])[None]
    effective, used = codec_py.perplexity(codes, 64)
    assert effective == pytest.approx([64, 4, 1], rel=1e-4) and used == pytest.approx([1, 1 / 16, 1 / 64])


def test_codec_and_its_hash_survive_a_checkpoint(codecs, tmp_path):
    codec, wave = codecs[2], torch.from_numpy(hiss(0.3))[None]
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
    """An object that makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def bad_checkpoint(kind, folder):
    """Path of a file that is no checkpoint of ours, and what loading would make if it ran the file's code."""
    path, marker = str(folder / "bad.pt"), str(folder / "marker")
    if kind == "random bytes":
        with open(path, "wb") as file:
            file.write(np.random.default_rng(0).bytes(5000))
    elif kind == "empty":
        write_text(path, "")
    elif kind == "pickle with code":
        with open(path, "wb") as file:
            pickle.dump(Evil(marker), file, protocol=2)
    elif kind == "torch file with code":
        torch.save({"kind": "nanoaudiogen codec", "config": Evil(marker)}, path)
    elif kind == "other project":
        torch.save({"state_dict": {"weight": torch.zeros(3)}}, path)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "other weights":
        torch.save({"kind": "nanoaudiogen codec", "config": {"streams": 4}, "model": {}}, path)
    elif kind == "truncated":
        torch.save(Codec(CodecConfig()).checkpoint(), path)
        os.truncate(path, os.path.getsize(path) // 2)
    return path, marker


BAD_CHECKPOINTS = ["missing", "random bytes", "empty", "pickle with code", "torch file with code",
                   "other project", "tensor", "other weights", "truncated"]


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_codec_refuses_a_bad_checkpoint_in_one_line_that_names_it(kind, tmp_path):
    path, marker = bad_checkpoint(kind, tmp_path)
    for load in (Codec.load, AudioLM.load):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load(path)
        assert path in str(error.value) and "\n" not in str(error.value)
    assert not os.path.exists(marker)


# ----------------------------------------------------------------------------------------------------------
# lm.py


def small_lm(streams=2, frames=24, seed=0):
    """A language model of two layers; its weights are made larger, so that all parts matter."""
    torch.manual_seed(seed)
    lm = AudioLM(LMConfig(streams, "test", vocab=50, window=8, frames=frames)).eval()
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(6 if p.dim() >= 2 else 1)
    return lm


@pytest.fixture
def lm():
    return small_lm()


@pytest.fixture
def codes():
    return torch.randint(1024, (2, 2, 24), generator=torch.Generator().manual_seed(0))


TEXT = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 0, 0, 0]])


def test_before_training_all_codes_are_about_equally_likely():
    lm = AudioLM(LMConfig(4, "tiny", vocab=50, window=8, frames=24))
    codes = torch.randint(512, (2, 4, 24))
    assert lm(codes, TEXT)[1].item() == pytest.approx(math.log(512), rel=0.05)
    lm.start_from(torch.randn(4, 512, 16))  # and the codec's vectors leave it so for codes drawn at random
    assert lm(codes, TEXT)[1].item() == pytest.approx(math.log(512), rel=0.05)


def test_codes_that_sound_alike_start_with_embeddings_and_heads_alike():
    lm = AudioLM(LMConfig(2, "tiny", vocab=50, window=8, frames=24))
    books = torch.randn(2, 1024, 16) * torch.tensor([2.0, 0.5])[:, None, None]
    lm.start_from(books)
    codes = torch.randint(1024, (1, 2, 50))
    latents = books[0][codes[0, 0]] + books[1][codes[0, 1]]  # (50, 16)
    alike = torch.corrcoef(torch.stack([torch.pdist(latents), torch.pdist(lm.embed(codes)[0])]))
    heads = lm.heads.weight.view(2, 1024, -1)[1]
    of_heads = torch.corrcoef(torch.stack([torch.pdist(books[1][:50]), torch.pdist(heads[:50])]))
    assert alike[0, 1] > 0.9 and of_heads[0, 1] > 0.9


def test_a_frame_depends_on_all_frames_before_it_and_on_no_other(lm, codes):
    embed, seen = lm.embed, {}

    def traced(given):
        seen["x"] = embed(given).detach().requires_grad_()  # (B, F - 1, d)
        return seen["x"]

    lm.embed = traced
    logits, _ = lm(codes, TEXT)
    direction = torch.randn(logits.shape[-1])
    for t in (0, 1, 7, 23):
        (g,) = torch.autograd.grad((logits[:, :, t] @ direction).sum(), seen["x"], retain_graph=True)
        reached = g.norm(dim=-1) > 0
        assert reached[:, :t].all() and not reached[:, t:].any()


def test_turned_queries_and_keys_know_how_far_apart_they_are_and_nothing_else():
    q, k = torch.randn(2, 1, 1, 1, 64)
    turn = lm_py.turns(600, 64)
    product = lambda i, j: (lm_py.rotate(q, turn[:, i : i + 1]) * lm_py.rotate(k, turn[:, j : j + 1])).sum()
    torch.testing.assert_close(product(7, 3), product(504, 500), rtol=1e-3, atol=1e-4)
    assert abs(product(7, 3) - product(7, 6)) > 1e-2
    torch.testing.assert_close(lm_py.rotate(q, turn[:, 9:10]).norm(), q.norm())


def test_text_reaches_the_sound_by_the_prefix_and_by_cross_attention(lm, codes):
    u = lm.text_encoder(TEXT).detach()
    prefix, crossed = u.clone().requires_grad_(), u.clone().requires_grad_()
    x = torch.cat((prefix, lm.inputs(codes[:, :, :-1])), 1)
    for block in lm.blocks:
        x = block(x, block.cross.keys(crossed), lm.turn[:, : x.shape[1]])
    logits = lm.to_logits(x[:, u.shape[1] :])
    torch.testing.assert_close(logits, lm.predict(u, codes))  # so this is what the model does
    logits.square().sum().backward()
    assert prefix.grad.abs().max() > 1e-3 and crossed.grad.abs().max() > 1e-3


def test_loss_is_the_mean_cross_entropy_of_frames_and_streams(lm, codes):
    logits, loss = lm(codes, TEXT)
    assert logits.shape == (2, 2, 24, 1024)  # no logits for text: nothing else could be in the loss
    logp = logits.log_softmax(-1)
    by_hand = [-logp[b, k, f, codes[b, k, f]].item() for b in range(2) for k in range(2) for f in range(24)]
    assert loss.item() == pytest.approx(np.mean(by_hand), rel=1e-5)


def test_a_crop_is_as_far_from_its_text_as_in_its_clip(lm, codes):
    begin, window = torch.tensor([0, 5]), lm.cfg.window
    logits = lm(codes[:, :, :19], TEXT, begin=begin)[0]
    torch.testing.assert_close(logits[:1], lm(codes[:1, :, :19], TEXT[:1])[0])
    moved = copy.deepcopy(lm)
    moved.turn = torch.cat((lm.turn[:, :window], lm.turn[:, window + 5 :]), 1)
    torch.testing.assert_close(logits[1:], moved(codes[1:, :, :19], TEXT[1:])[0])


def test_frames_are_embedded_by_the_mean_of_their_streams(lm, codes):
    tables = lm.wte.weight.view(2, 1024, -1)
    expected = (tables[0][codes[:, 0]] + tables[1][codes[:, 1]]) / 2
    torch.testing.assert_close(lm.embed(codes), expected)


def test_result_does_not_depend_on_how_far_the_text_is_padded(lm, codes):
    a, b = lm(codes, TEXT)[0], lm(codes, F.pad(TEXT, (0, 3)))[0]
    assert torch.equal(a, b)


def test_text_and_sound_of_the_wrong_length_are_value_errors(lm, codes):
    with pytest.raises(ValueError, match="9 tokens"):
        lm(codes, torch.ones(2, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="25 frames"):
        lm(torch.zeros(2, 2, 25, dtype=torch.long), TEXT)


@pytest.mark.parametrize("size, parameters, tolerance", [("base", 285e6, 0.02), ("large", 1e9, 0.05)])
def test_the_papers_sizes(size, parameters, tolerance):
    with torch.device("meta"):
        lm = AudioLM(LMConfig(size=size))
    assert sum(p.numel() for p in lm.parameters()) == pytest.approx(parameters, rel=tolerance)


def test_guidance_of_one_is_conditional_of_zero_unconditional_and_else_the_formula():
    logits = torch.randn(4, 2, 10)
    given, free = logits.log_softmax(-1).chunk(2)
    torch.testing.assert_close(guide(logits[:2], 1), given)
    torch.testing.assert_close(guide(logits, 0), free)
    torch.testing.assert_close(guide(logits, 3.0), 3 * given - 2 * free)


@pytest.mark.parametrize("guidance, packed", [(1.0, False), (3.0, False), (3.0, True)])
def test_cached_greedy_decoding_equals_the_full_forward(guidance, packed, lm):
    sampler = copy.deepcopy(lm).pack() if packed else lm
    made = sampler.generate(TEXT, 24, temperature=0, guidance=guidance)
    codes = torch.zeros(2, 2, 0, dtype=torch.long)
    for _ in range(24):
        padded = F.pad(codes, (0, 1))
        with torch.no_grad():
            given, free = (lm.predict(lm.text_encoder(t), padded)[:, :, -1].log_softmax(-1)
                           for t in (TEXT, torch.zeros_like(TEXT)))
        scores = guidance * given + (1 - guidance) * free
        codes = torch.cat((codes, scores.argmax(-1)[:, :, None]), 2)
    assert torch.equal(made, codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_predict_the_same(dtype, lm):
    lm = copy.deepcopy(lm).to(dtype)
    codes = torch.randint(0, lm.cfg.codes, (2, lm.cfg.streams, 9))
    with torch.no_grad():
        expected = lm.predict(lm.text_encoder(TEXT), codes)
        torch.testing.assert_close(lm.pack().predict(lm.text_encoder(TEXT), codes), expected)


def frequencies(logp, n=40000, **options):
    noise = torch.rand(n, 1, len(logp), generator=torch.Generator().manual_seed(0))
    drawn = choose(logp.expand(n, 1, -1), noise, **options)
    return torch.bincount(drawn.flatten(), minlength=len(logp)) / n


def test_draws_follow_the_softmax_the_temperature_top_k_and_top_p():
    p = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    close = {"rtol": 0, "atol": 0.012}
    torch.testing.assert_close(frequencies(p.log()), p, **close)
    torch.testing.assert_close(frequencies(p.log(), temperature=0.5), p**2 / (p**2).sum(), **close)
    torch.testing.assert_close(frequencies(p.log(), top_k=2), torch.tensor([0, 4 / 7, 0, 3 / 7, 0]), **close)
    kept = torch.tensor([0, 0.4, 0, 0.3, 0.15]) / 0.85  # .4 + .3 is less than .75, one more is needed
    torch.testing.assert_close(frequencies(p.log(), top_p=0.75), kept, **close)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0}])
def test_the_narrowest_choice_is_the_likeliest_code(options):
    torch.manual_seed(0)
    logp, noise = torch.randn(50, 3, 20), torch.rand(50, 3, 20)
    assert torch.equal(choose(logp, noise, **options), logp.argmax(-1))


def test_the_ends_of_the_noise_are_harmless():
    logp = torch.tensor([[[0.0, -1.0, -math.inf]]])
    for value in (0.0, 1.0):
        assert choose(logp, torch.full((1, 1, 3), value)).item() == 0


def test_a_prompts_sound_does_not_depend_on_the_batch(lm):
    both, alone = lm.generate(TEXT, 24, seeds=[5, 7]), lm.generate(TEXT[1:], 24, seeds=[7])
    assert torch.equal(both[1:], alone)
    assert not torch.equal(lm.generate(TEXT[1:], 24, seeds=[8]), alone)


def test_output_may_be_longer_than_the_model_was_trained_for(lm):
    codes = lm.generate(TEXT, 61)
    assert codes.shape == (2, 2, 61) and 0 <= codes.min() and codes.max() < 1024
    assert torch.equal(codes[:, :, :24], lm.generate(TEXT, 24))
    # After 24 frames it goes on from the last 12 of them.
    prefix = torch.randint(1024, (2, 2, 12), generator=torch.Generator().manual_seed(1))
    slid = lm.generate(TEXT, 13, prefix=prefix, temperature=0, guidance=1)
    with torch.no_grad():
        logits = lm.predict(lm.text_encoder(TEXT), F.pad(slid[:, :, :12], (0, 1)))
    assert torch.equal(slid[:, :, 12], logits[:, :, -1].argmax(-1))


@pytest.mark.parametrize("length", [5, 12, 40])
def test_a_prefix_is_continued_and_not_repeated(length, lm):
    prefix = torch.randint(1024, (2, 2, length), generator=torch.Generator().manual_seed(1))
    made = lm.generate(TEXT, 3, prefix=prefix, temperature=0, guidance=1)
    assert made.shape == (2, 2, 3)
    with torch.no_grad():
        logits = lm.predict(lm.text_encoder(TEXT), F.pad(prefix[:, :, -12:], (0, 1)))
    assert torch.equal(made[:, :, 0], logits[:, :, -1].argmax(-1))


def test_a_negative_prompt_takes_the_place_of_no_text(lm):
    plain = lm.generate(TEXT, 24, seeds=[1, 2])
    assert torch.equal(lm.generate(TEXT, 24, seeds=[1, 2], negative=torch.zeros_like(TEXT)), plain)
    assert not torch.equal(lm.generate(TEXT, 24, seeds=[1, 2], negative=TEXT.flip(0)), plain)


def test_a_stream_of_codes_is_made_in_blocks(lm):
    blocks = list(lm.generate_stream(TEXT, 20, block=8))
    assert [block.shape[2] for block in blocks] == [8, 8, 4]


def test_lm_and_all_it_carries_survive_a_checkpoint(lm, codes, tokenizer, tmp_path):
    lm.tokenizer, lm.codec_hash = tokenizer.to_tensor(), "abc"
    torch.save(lm.checkpoint(), tmp_path / "lm.pt")
    again = AudioLM.load(tmp_path / "lm.pt", codec_hash="abc")
    assert torch.equal(again(codes, TEXT)[0], lm(codes, TEXT)[0]) and not again.training
    assert D.Tokenizer(again.tokenizer).encode("a dog") == tokenizer.encode("a dog")
    assert again.codec_hash == "abc" and again.cfg == lm.cfg


def test_lm_refuses_another_codec_by_name(lm, tmp_path):
    lm.codec_hash = "abc"
    torch.save(lm.checkpoint(), tmp_path / "lm.pt")
    with pytest.raises(ValueError, match="codec abc, not of xyz"):
        AudioLM.load(tmp_path / "lm.pt", codec_hash="xyz")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with a GPU")
def test_a_gpu_computes_what_the_cpu_computes(codecs, codes):
    wave, lm = torch.from_numpy(hiss(0.5))[None], small_lm()
    here, there = codecs[4], Codec(codecs[4].cfg).eval().cuda()
    there.load_state_dict(here.state_dict())
    assert same(there.encode(wave.cuda()).cpu(), here.encode(wave)) > 0.95
    expected, made = lm(codes, TEXT)[0], lm.eval().generate(TEXT, 24, temperature=0)
    torch.testing.assert_close(lm.cuda()(codes.cuda(), TEXT.cuda())[0].cpu(), expected, rtol=0, atol=0.05)
    assert same(lm.generate(TEXT.cuda(), 24, temperature=0).cpu(), made) > 0.9


@pytest.mark.parametrize("name", ["codec", "lm", "data"])
def test_a_file_can_be_copied_alone_into_another_project(name, tmp_path):
    shutil.copy(os.path.join(HERE, f"{name}.py"), tmp_path)
    subprocess.run([sys.executable, "-c", f"import {name}"], cwd=tmp_path, check=True)


def test_the_loader_that_two_files_have_stays_the_same_in_both():
    assert inspect.getsource(codec_py.load_checkpoint) == inspect.getsource(lm_py.load_checkpoint)


# ----------------------------------------------------------------------------------------------------------
# The scripts: functions


def test_learning_rates_rise_fall_and_end_at_nothing():
    for factor in (train_codec.lr_factor, train_lm.lr_factor):
        rates = [factor(step, 2000) for step in range(2001)]
        top = int(np.argmax(rates))
        assert rates[0] < 0.02 and 50 < top <= 210 and 0.9 < rates[top] <= 1
        assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
        assert 0 < rates[1999] < 0.01 and rates[2000] == pytest.approx(0, abs=1e-9)


def test_lm_learning_rate_is_an_inverse_square_root_between_warm_up_and_cool_down():
    assert train_lm.lr_factor(799, 2000) == pytest.approx(0.5)
    assert train_lm.lr_factor(1249, 2000) == pytest.approx(0.4)
    assert train_lm.lr_factor(11999, 50000) == pytest.approx(0.5)  # the paper's warm-up of 3000 steps


def test_every_parameter_has_one_optimizer_and_muon_the_matrices_of_the_blocks(lm):
    optimizers = train_lm.make_optimizers(lm, 1e-3, cuda=False, shard=False)
    owned = {k: [p for g in o.param_groups for p in g["params"]] for k, o in optimizers.items()}
    assert sorted(map(id, owned["muon"] + owned["adamw"])) == sorted(map(id, lm.parameters()))
    names = {p: name for name, p in lm.named_parameters()}
    assert all("blocks" in names[p] and p.dim() == 2 for p in owned["muon"])
    assert {"wte.weight", "heads.weight", "start"} < {names[p] for p in owned["adamw"]}


def test_frechet_distance_of_moved_and_stretched_clouds():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)).double()
    x -= x.mean(0)
    move = torch.arange(6.0)
    assert train_lm.frechet(x, x) == pytest.approx(0, abs=1e-6)
    assert train_lm.frechet(x, x + move) == pytest.approx(55, abs=1e-6)
    # tr(A + B - 2 (A B)^(1/2)) with B = 4 A is tr(A).
    assert train_lm.frechet(x, 2 * x) == pytest.approx(x.T.cov().trace().item(), rel=1e-6)


def test_wrong_captions_say_something_else():
    captions = ["rain", "rain", "wind", "rain", "bell"] * 10
    wrong = train_lm.wrong_captions(captions, captions)
    assert all(a != b for a, b in zip(captions, wrong)) and set(wrong) == {"rain", "wind", "bell"}
    assert wrong == train_lm.wrong_captions(captions, captions)
    assert wrong != train_lm.wrong_captions(captions, captions, seed=1)


def test_caption_accuracy_is_not_claimed_where_all_captions_are_one(lm, codes):
    tokenizer = SimpleNamespace(batch=lambda captions, window: TEXT)
    held_out = codes, ["rain", "rain"], torch.zeros(2, dtype=torch.bool), ["rain", "rain"]
    assert "caption_accuracy" not in train_lm.measure(lm, tokenizer, held_out, "cpu")
    held_out = codes, ["rain", "rain"], torch.zeros(2, dtype=torch.bool), ["rain", "wind"]
    assert 0 <= train_lm.measure(lm, tokenizer, held_out, "cpu")["caption_accuracy"] <= 1


def test_collapse_and_a_winning_discriminator_are_said_in_words():
    assert not list(train_codec.health([200, 300], 512, 0.8, 1.0))
    assert "collapsing" in " ".join(train_codec.health([200, 3], 512, 0.8, 1.0))
    assert "it has won" in " ".join(train_codec.health([200, 300], 512, 0.99, 1.0))
    assert "unstable" in " ".join(train_codec.health([200, 300], 512, 0.5, 1e4))


def test_spectrogram_shows_a_sine_where_it_is():
    low, high = (sample.spectrogram(torch.from_numpy(sine(f)), 100).mean(1).argmax() for f in (300, 3000))
    assert low < high
    picture = sample.spectrogram(torch.from_numpy(sine(300)), 100)
    assert picture.shape == (64, 100) and 0 <= picture.min() and picture.max() == 1


def test_a_loud_sound_is_turned_down_and_not_clipped(tmp_path):
    for gain, peak in ((4.0, 1.0), (0.5, 0.25)):
        D.save_wav(gain * torch.from_numpy(sine(300)), str(tmp_path / "a.wav"))
        wave = D.load_audio(str(tmp_path / "a.wav")).numpy()
        assert np.abs(wave).max() == pytest.approx(peak, abs=1e-2)
        np.testing.assert_allclose(wave, peak * sine(300) / np.abs(sine(300)).max(), atol=1e-2)


@pytest.mark.parametrize("length", [1, 100, 8000])
def test_pictures_can_be_made_of_any_sound(length):
    for wave in (torch.zeros(length), torch.ones(length)):
        assert sample.png(sample.spectrogram(wave)).startswith(b"\x89PNG")
        assert len(sample.in_characters(wave).splitlines()) == 10


# ----------------------------------------------------------------------------------------------------------
# The scripts: the three commands, as typed. They run once, in processes of their own.


def start(script, *args, cwd=None, torchrun=False):
    """A script in a process of its own."""
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # works on a machine without a network, too
    command += [os.path.join(HERE, script), *map(str, args)]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            encoding="utf-8", errors="surrogateescape")  # a WAV passes, too


def finish(process, timeout=240):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, out[-2000:] + err[-2000:]
    return out, err


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Eight captioned clips of one second: the table's path."""
    names = ["rain", "hum", "whistle", "wind", "low hum", "high whistle", "rain far away", "hiss"]
    waves = [hiss(1, i) if i % 2 == 0 else sine(200 * i) for i in range(8)]
    folder = tmp_path_factory.mktemp("clips")
    return write_table(folder, [(f"{i}.wav", wave, name) for i, (wave, name) in enumerate(zip(waves, names))])


@pytest.fixture(scope="session")
def made(clips, tmp_path_factory):
    """What the three commands leave behind: the folder, and what they said by name."""
    folder, said = tmp_path_factory.mktemp("project"), {}
    commands = {
        "train_codec.py": ["--data", clips, "--steps", 6, "--batch", 2],
        "train_lm.py": ["--data", clips, "--steps", 4, "--batch", 2, "--streams", 4],
        "sample.py": ["--prompt", "a dog barks", "--seconds", 0.5],
    }
    for script, args in commands.items():
        said[script] = finish(start(script, *args, "--device", "cpu", cwd=folder))
    return folder, said


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_three_commands_leave_their_files(made):
    folder, _ = made
    for name in ("codec.pt", "codec_train.pt", "codec.csv", "lm.pt", "lm_train.pt", "lm.csv"):
        assert os.path.getsize(folder / "out" / name) > 0
    assert any(name.endswith("decoded.wav") for name in os.listdir(folder / "out" / "codec_wavs"))
    assert any(name.endswith(".wav") for name in os.listdir(folder / "out" / "lm_wavs"))
    assert not [name for name in os.listdir(folder / "out") if ".tmp" in name or ".part" in name]


def test_the_three_commands_say_what_they_did(made):
    _, said = made
    assert "8 clips" in said["train_codec.py"][0] and "4.5 kbit/s" in said["train_codec.py"][0]
    assert "python train_lm.py --streams 4" in said["train_codec.py"][0]
    assert re.search("held out: loss .*caption_accuracy", said["train_lm.py"][0])
    assert "python sample.py" in said["train_lm.py"][0]
    assert "codec resynthesis" in said["train_lm.py"][0]
    assert "x real time" in said["sample.py"][0] and "ms per frame" in said["sample.py"][0]


def test_the_three_commands_give_no_warning(made):
    for out, err in made[1].values():
        assert "warning" not in (out + err).lower()


def test_logs_hold_one_row_for_each_logged_step_and_all_their_losses(made):
    folder, _ = made
    rows = read_csv(folder / "out" / "codec.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 7))
    assert all(math.isfinite(float(rows[-1][name])) for name in ("wave", "mel", "commitment", "grad_norm"))
    assert rows[0]["adversarial"] == "" and float(rows[0]["perplexity3"]) > 0
    rows = read_csv(folder / "out" / "lm.csv")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    streams = [float(rows[0][f"loss{k}"]) for k in range(4)]
    assert float(rows[0]["loss"]) == pytest.approx(np.mean(streams), rel=1e-4)
    # Almost nothing is known yet, only that neighbours are alike: the codec's vectors say so.
    assert float(rows[0]["loss"]) == pytest.approx(math.log(512), rel=0.15)


def test_a_sound_has_the_length_that_was_asked_for(made):
    folder, _ = made
    (name,) = [name for name in os.listdir(folder / "samples") if name.endswith(".wav")]
    wave, rate = soundfile.read(folder / "samples" / name)
    assert rate == RATE and abs(len(wave) - RATE // 2) <= 64 and np.isfinite(wave).all() and wave.any()


def test_the_page_holds_its_sounds_and_pictures_and_needs_nothing_else(made):
    page = (made[0] / "samples" / "index.html").read_text(encoding="utf-8")
    assert "data:audio/wav;base64," in page and "data:image/png;base64," in page and "a dog barks" in page
    assert not re.search(r"(src|href)=(?!['\"]?data:)", page)


# The rest of the scripts runs inside this process, through the same doors: main() under one_line_errors().


@pytest.fixture
def run(monkeypatch, tmp_path, request):
    """run(script, *args): main() with these flags, in an empty folder; signal handlers are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)

    def call(script, *args):
        gc.collect()  # a run that failed before holds its folder as long as its traceback lives
        monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, args), "--device", "cpu"])
        with D.one_line_errors():
            script.main()

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def weights(codecs, tmp_path_factory):
    """Untrained weights that are louder than at their start: words, seeds and flags all change the sound."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(codecs[4].checkpoint(), folder / "codec.pt")
    torch.manual_seed(0)
    tokenizer = D.Tokenizer.train(["rain", "wind", "a dog barks"], 300)
    lm = AudioLM(LMConfig(4, vocab=tokenizer.vocab_size))
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(3 if p.dim() >= 2 else 1)
    lm.tokenizer, lm.codec_hash = tokenizer.to_tensor(), codecs[4].hash()
    torch.save(lm.checkpoint(), folder / "lm.pt")
    return folder


@pytest.fixture
def make(run, weights, tmp_path):
    """make(*flags): a little sound by these weights -> list of waves."""
    count = [0]

    def call(*args):
        count[0] += 1
        out = tmp_path / f"samples{count[0]}"
        flags = ["--lm", weights / "lm.pt", "--seconds", 0.4, "--out", out, "--top_k", 50]
        run(sample, *flags, *args)
        return [soundfile.read(out / name)[0] for name in sorted(os.listdir(out)) if name.endswith(".wav")]

    return call


def test_sample_makes_several_sounds_each_by_its_own_seed(make):
    several = make("--prompt", "rain", "--prompt", "wind", "--num_samples", 2, "--seed", 3)
    assert len(several) == 4 and not np.array_equal(several[0], several[1])
    (alone,) = make("--prompt", "wind", "--seed", 4)
    np.testing.assert_allclose(several[3], alone, rtol=0, atol=1e-3)


def test_sample_reads_prompts_from_a_file(make, tmp_path):
    assert len(make("--prompts", write_text(tmp_path / "prompts.txt", "rain\n\nein Vögelchen\n"))) == 2


def test_sample_obeys_negative_guidance_and_temperature(make):
    plain = make("--prompt", "rain")[0]
    for flags in (["--negative", "wind"], ["--guidance", 1], ["--temperature", 0]):
        assert not np.array_equal(make("--prompt", "rain", *flags)[0], plain)


def test_sample_continues_a_recording_with_or_without_words(make, tmp_path):
    start = write_wav(tmp_path / "start.wav", hiss(0.3))
    with_words, without = make("--prompt", "rain", "--continue_from", start), make("--continue_from", start)
    assert len(with_words) == len(without) == 1
    assert not np.array_equal(with_words[0], make("--prompt", "rain")[0])


def test_a_stream_to_a_file_is_the_plain_result(make, tmp_path):
    plain, kept = make("--prompt", "rain")[0], make("--prompt", "rain", "--stream", tmp_path / "live.wav")[0]
    live = np.frombuffer((tmp_path / "live.wav").read_bytes()[44:], "<i2") / 32768
    assert len(live) == len(plain) == len(kept)
    np.testing.assert_allclose(live, plain, rtol=0, atol=1e-4)  # three units of 16 bits
    np.testing.assert_allclose(kept, plain, rtol=0, atol=1e-4)
    assert len(soundfile.read(tmp_path / "live.wav")[0]) == len(plain)


def test_a_stream_to_stdout_is_a_wav_and_nothing_else(made):
    run = start("sample.py", "--prompt", "rain", "--seconds", 0.3, "--stream", "--device", "cpu", cwd=made[0])
    out, err = finish(run)
    sound = out.encode("utf-8", "surrogateescape")
    assert sound.startswith(b"RIFF") and "first sound after" in err


def test_sample_finds_the_newest_weights_in_out(run, made, tmp_path, capsys):
    for name, age in (("new", 0), ("old", 1000)):
        for part in ("codec.pt", "lm.pt"):
            os.makedirs(tmp_path / "out" / name, exist_ok=True)
            shutil.copy(made[0] / "out" / part, tmp_path / "out" / name)
            os.utime(tmp_path / "out" / name / part, (time.time() - age,) * 2)
    run(sample, "--prompt", "rain", "--seconds", 0.1)
    assert os.path.join("out", "new", "lm.pt") in capsys.readouterr().out


def test_the_weights_that_ship_speak_and_differ_by_prompt(run, tmp_path, capsys):
    run(sample, "--prompt", "dog bark", "--prompt", "rain", "--seconds", 0.5)
    assert os.path.join("pretrained", "codec.pt") in capsys.readouterr().out
    dog, rain = (soundfile.read(path)[0] for path in sorted((tmp_path / "samples").glob("*.wav")))
    assert np.isfinite(dog).all() and dog.std() > 0 and rain.std() > 0.001 and not np.allclose(dog, rain)
    shipped = os.path.join(HERE, "pretrained")
    assert sum(os.path.getsize(os.path.join(shipped, name)) for name in os.listdir(shipped)) < 40e6


@pytest.mark.parametrize("script", [train_codec, train_lm], ids=["codec", "lm"])
def test_eval_only_measures_and_changes_nothing(script, run, made, clips, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_lm, "listen", quiet)
    out = made[0] / "out"
    before = {name: (out / name).read_bytes() for name in ("codec.pt", "lm.pt", "codec.csv", "lm.csv")}
    run(script, "--data", clips, "--out", out, "--eval_only")
    assert "held out" in capsys.readouterr().out
    assert before == {name: (out / name).read_bytes() for name in before}


# ----------------------------------------------------------------------------------------------------------
# The scripts: resuming


def flatten(thing, name=""):
    """All tensors and numbers of a checkpoint by name."""
    if isinstance(thing, (dict, list, tuple)):
        pairs = thing.items() if isinstance(thing, dict) else enumerate(thing)
        return {k: v for key, value in pairs for k, v in flatten(value, f"{name}/{key}").items()}
    return {name: thing}


def assert_same_checkpoint(a, b):
    a, b = (flatten(torch.load(path, weights_only=True)) for path in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        equal = torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name]
        assert equal, name


def stop_at(call_number, monkeypatch):
    """SIGTERM arrives while the batch of this step is drawn."""
    batch, calls = D.AudioData.batch, [0]

    def counted(self, *args, **options):
        calls[0] += 1
        if calls[0] == call_number:
            signal.raise_signal(signal.SIGTERM)
        return batch(self, *args, **options)

    monkeypatch.setattr(D.AudioData, "batch", counted)


@pytest.fixture
def small_recipes(monkeypatch):
    """Short crops, and a discriminator from step 2 on, so that its state has to survive as well."""
    codec_recipe = train_codec.RECIPES["tiny"] | {"seconds": 0.25, "judge_from": 0.2, "judge": 2}
    monkeypatch.setitem(train_codec.RECIPES, "tiny", codec_recipe)
    monkeypatch.setattr(train_lm, "SECONDS", 1)
    monkeypatch.setattr(train_lm, "listen", quiet)


def test_the_sound_worlds_words_are_heard_in_its_own_sounds(monkeypatch):
    def play(phrase, seconds):
        *words, name = phrase.split()
        how = {"high": "pitch", "low": "pitch", "fast": "rate", "slow": "rate"}
        how = {how[word]: word for word in words if word in how}
        return torch.from_numpy(D.synth(name, np.random.default_rng(2), seconds, **how))

    def obey(lm, codec, tokenizer, prompts, guidance):
        parts = [prompt.split(", then ") for prompt in prompts]
        return torch.stack([torch.cat([play(part, 5 / len(some)) for part in some]) for some in parts])

    said = []
    monkeypatch.setattr(train_lm, "make_sounds", obey)
    train_lm.check_words(None, None, None, 2.0, said.append)
    shares = [float(re.search(r"heard .*? in ([.\d]+) of", line)[1]) for line in said]
    assert len(shares) == 3 and min(shares) > 0.9


@pytest.mark.parametrize("script, judge_from", [(train_codec, 0.2), (train_codec, 1.0), (train_lm, 1.0)],
                         ids=["codec", "codec without discriminator", "lm"])
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(
        script, judge_from, run, made, clips, small_recipes, monkeypatch, tmp_path, capsys):
    name = script.__name__.removeprefix("train_")
    monkeypatch.setitem(train_codec.RECIPES["tiny"], "judge_from", judge_from)
    flags = ["--data", clips, "--steps", 6, "--batch", 2, "--size", "tiny"]
    if script is train_lm:
        flags += ["--codec", made[0] / "out" / "codec.pt", "--micro", 1]
    run(script, *flags, "--out", "whole")
    with monkeypatch.context() as patch:
        stop_at(4 if script is train_codec else 7, patch)  # the fourth step: --micro 1 draws twice in a step
        run(script, *flags, "--out", "halves")
    said = capsys.readouterr().out
    assert re.search(rf"SIGTERM: saved step 4 to .*{name}_train\.pt.*--resume", said)
    assert torch.load(tmp_path / "halves" / f"{name}_train.pt", weights_only=True)["step"] == 4
    run(script, *flags, "--out", "halves", "--resume")
    for file in (f"{name}.pt", f"{name}_train.pt"):
        assert_same_checkpoint(tmp_path / "whole" / file, tmp_path / "halves" / file)
    assert read_csv(tmp_path / "whole" / f"{name}.csv") == read_csv(tmp_path / "halves" / f"{name}.csv")


def test_a_resumed_model_keeps_its_words(run, made, small_recipes, monkeypatch, tmp_path):
    tables = [write_table(tmp_path / word, [(f"{i}.wav", hiss(1, i), f"{word} {i}") for i in range(3)])
              for word in ("rain", "wind")]  # as many pieces
    flags = ["--steps", 3, "--batch", 2, "--codec", made[0] / "out" / "codec.pt", "--out", "halves"]
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        run(train_lm, "--data", tables[0], *flags)
    before = torch.load(tmp_path / "halves" / "lm.pt", weights_only=True)
    run(train_lm, "--data", tables[1], *flags, "--resume")
    after = torch.load(tmp_path / "halves" / "lm.pt", weights_only=True)
    assert torch.equal(before["tokenizer"], after["tokenizer"]) and before["config"] == after["config"]


def test_one_clip_is_soon_learnt_and_its_books_are_used(run, tmp_path, monkeypatch, capsys):
    """What the README tells people to try first on their own sounds, at a smaller budget."""
    monkeypatch.setitem(train_codec.RECIPES, "tiny", train_codec.RECIPES["tiny"] | {"seconds": 0.25})
    write_wav(tmp_path / "one" / "siren.wav", D.synth("siren", np.random.default_rng(0), 2.0))
    write_text(tmp_path / "one" / "siren.txt", "a siren")
    run(train_codec, "--data", tmp_path / "one", "--size", "tiny", "--steps", 80, "--batch", 4)
    said = capsys.readouterr().out
    assert float(re.search(r"SI-SNR (\S+) dB", said)[1]) > -12  # -45 where the codebooks collapse
    assert float(read_csv(tmp_path / "out" / "codec.csv")[-1]["perplexity0"]) > 20


def test_sigterm_to_the_process_saves_says_where_and_ends_well(clips, tmp_path):
    args = ["--data", clips, "--steps", 1000, "--batch", 2, "--device", "cpu"]
    run, line = start("train_codec.py", *args, cwd=tmp_path), ""
    while " no discriminator" not in line:  # the last line before the loop
        line = run.stdout.readline()
        assert line, run.stderr.read()
    time.sleep(1)
    run.send_signal(signal.SIGTERM)
    out, _ = finish(run)
    assert re.search(r"SIGTERM: saved step \d+ to .*codec_train\.pt; go on with --resume", out)
    assert Codec.load(tmp_path / "out" / "codec.pt").cfg.streams == 4
    assert os.path.getsize(tmp_path / "out" / "codec_train.pt") > 0


def test_finetuning_goes_on_from_trained_weights_and_its_sounds_can_be_sampled(
        run, made, clips, small_recipes, tmp_path, capsys):
    run(train_lm, "--data", clips, "--out", "out", "--finetune", made[0] / "out", "--steps", 1, "--batch", 1)
    old, new = (torch.load(folder / "out" / "lm.pt", weights_only=True) for folder in (made[0], tmp_path))
    for name in ("tokenizer", "codec_hash", "config"):
        assert str(new[name]) == str(old[name])
    moved = [(new["model"][name] - old["model"][name]).abs().max().item() for name in old["model"]]
    assert 0 < max(moved) <= 1.5 * train_lm.RECIPES["tiny"]["lr"]  # one step
    run(sample, "--prompt", "rain", "--seconds", 0.1)
    assert os.path.join("out", "codec.pt") in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(train_lm, "--data", clips, "--finetune", made[0] / "out", "--size", "tiny")
    assert "--size is that of" in capsys.readouterr().err


def test_without_mixing_all_codes_are_computed_once(run, made, clips, small_recipes, monkeypatch, tmp_path):
    flags = ["--data", clips, "--codec", made[0] / "out" / "codec.pt", "--steps", 2, "--batch", 2, "--mix", 0]
    run(train_lm, *flags, "--out", "out")
    (name,) = [name for name in os.listdir("out") if name.startswith("codes-")]
    before, codec = os.stat(os.path.join("out", name)), Codec.load(made[0] / "out" / "codec.pt")
    assert codec.hash() in name
    data = D.AudioData([str(clips)], "out", log=quiet)
    cached = train_lm.CachedCodes(codec, data, "out", quiet)
    _, _, places = data.batch(6, 8000, np.random.default_rng(5))  # half of each clip
    codes = cached.crops(places, 8000)
    assert codes.shape == (6, 4, 63)
    for crop, (k, begin) in zip(codes, places):
        whole, first = codec.encode(data.read(k, 16000)[None])[0], min(begin // 128, 125 - 63)
        assert torch.equal(crop, whole[:, first : first + 63])
    run(train_lm, *flags, "--out", "out")
    assert os.stat(os.path.join("out", name)).st_mtime_ns == before.st_mtime_ns


def test_against_the_discriminator_the_decoder_learns_and_codes_stay(run, clips, small_recipes, monkeypatch):
    monkeypatch.setitem(train_codec.RECIPES, "tiny", train_codec.RECIPES["tiny"] | {"judge_from": 0.5})
    flags = ["--data", clips, "--steps", 4, "--batch", 2, "--size", "tiny"]
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        run(train_codec, *flags)
    before = Codec.load("out/codec.pt").state_dict()
    run(train_codec, *flags, "--resume")
    after = Codec.load("out/codec.pt").state_dict()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != name.startswith("decoder"), name


def test_every_parameter_of_the_codec_has_one_optimizer_and_muon_the_matrices():
    codec = Codec(CodecConfig(4))
    optimizers = train_codec.make_optimizers(codec, 1e-3)
    owned = {k: [p for g in o.param_groups for p in g["params"]] for k, o in optimizers.items()}
    assert sorted(map(id, owned["muon"] + owned["adam"])) == sorted(map(id, codec.parameters()))
    assert {p.dim() for p in owned["muon"]} == {2} and {p.dim() for p in owned["adam"]} == {1}


def test_resuming_with_other_settings_is_refused(made, run, clips, capsys):
    for script in (train_codec, train_lm):
        with pytest.raises(SystemExit):
            run(script, "--data", clips, "--out", made[0] / "out", "--steps", 99, "--resume")
        assert "other settings" in capsys.readouterr().err


def test_resuming_with_another_discriminator_is_refused(made, run, clips, monkeypatch, capsys):
    monkeypatch.setitem(train_codec.RECIPES["tiny"], "judge_from", 0.5)
    with pytest.raises(SystemExit):
        run(train_codec, "--data", clips, "--out", made[0] / "out", "--steps", 6, "--resume")
    assert "other settings" in capsys.readouterr().err


def test_two_processes_train_the_codec_of_one(clips, tmp_path):
    """Equal within rounding at an equal batch, through the step at which the discriminator enters."""
    small = {"seconds": 0.5, "judge_from": 0.5, "judge": 2}
    driver = write_text(
        tmp_path / "driver.py",
        f"import sys\nsys.path.insert(0, {HERE!r})\nimport torch, data, train_codec\n"
        "data.fast_dtype = lambda device: torch.float32\n"
        f"train_codec.RECIPES['tiny'] |= {small}\ntrain_codec.main()\n",
    )
    args = ["--data", clips, "--size", "tiny", "--steps", 4, "--batch", 4, "--device", "cpu"]
    rows = []
    for processes in (1, 2):
        cwd = tmp_path / str(processes)
        cwd.mkdir()
        out, _ = finish(start(driver, *args, cwd=cwd, torchrun=processes > 1), timeout=150)
        assert out.count("codec saved to") == 1  # one process speaks
        rows.append(read_csv(cwd / "out" / "codec.csv"))
        state = Codec.load(cwd / "out" / "codec.pt").state_dict()
        assert all(tensor.isfinite().all() for tensor in state.values())
    assert [row["step"] for row in rows[0]] == ["1", "2", "3", "4"] and float(rows[0][-1]["adversarial"]) > 0
    for one, two in zip(*rows):
        for name in ("wave", "mel", "adversarial", "feature", "commitment"):
            if one[name]:
                assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-2), (one["step"], name)


# ----------------------------------------------------------------------------------------------------------
# The scripts: bad input. One line that names the thing, exit code 2, no traceback.


@pytest.fixture
def refused(run, capsys):
    """refused(script, *args) -> the one line that the script says before it ends."""

    def call(script, *args):
        gc.collect()  # an earlier exception may still hold the lock of the folder, which a process would not
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(script, *args)
        lines = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.strip()]
        lines = [line for line in lines if not re.search(r"\d+%\||\dit/s|\?it/s|\?clip/s|clip/s\]", line)]
        assert stop.value.code == 2
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return call


@pytest.mark.parametrize("kind", BAD_SOUNDS)
def test_refused_bad_sound_as_the_only_data(kind, refused, tmp_path):
    BAD_SOUNDS[kind](tmp_path / "bad.wav")
    table = write_text(tmp_path / "t.csv", "path,caption\nbad.wav,rain\n")
    assert "bad.wav" in refused(train_codec, "--data", table)


@pytest.mark.parametrize("kind", ["missing", "empty", "corrupt", "no samples", "NaN"])
def test_refused_bad_sound_to_continue_from(kind, refused, made, tmp_path):
    BAD_SOUNDS[kind](tmp_path / "bad.wav")
    line = refused(sample, "--lm", made[0] / "out" / "lm.pt", "--continue_from", tmp_path / "bad.wav")
    assert "bad.wav" in line


@pytest.mark.parametrize("content, words", [
    (b"path,length\na.wav,3\n", "length"),  # names the columns that it saw
    (b"name,caption\n,rain\n", "name"),
    (b"path,caption\na.wav,\n", "no usable row"),
    (b"path,caption\na.wav,Gr\xfc\xdfe\n", "UTF-8"),
    (b"", "no usable row"),
    (b"\x00\x01\x02" * 100, "t.csv"),
])
def test_refused_table(content, words, refused, tmp_path):
    write_wav(tmp_path / "a.wav")
    (tmp_path / "t.csv").write_bytes(content)
    line = refused(train_codec, "--data", tmp_path / "t.csv")
    assert "t.csv" in line and words in line


def test_refused_data_that_does_not_exist_or_is_no_data(refused, tmp_path):
    assert "nowhere.csv" in refused(train_codec, "--data", "nowhere.csv")
    os.makedirs(tmp_path / "hollow")
    assert "hollow" in refused(train_codec, "--data", "hollow")
    write_text(tmp_path / "notes.pdf", "words")
    assert "notes.pdf" in refused(train_codec, "--data", "notes.pdf")


@pytest.mark.parametrize("flags, words", [
    (["--prompt", ""], "empty"),
    (["--prompt", "   "], "empty"),
    ([], "--prompt"),
    (["--prompt", "a dog barks " * 100], "tokens"),
    (["--prompt", "rain", "--negative", "a dog barks " * 100], "tokens"),
    (["--prompts", "nowhere.txt"], "nowhere.txt"),
    (["--prompt", "rain", "--seconds", "0"], "--seconds"),
    (["--prompt", "rain", "--seconds", "nan"], "--seconds"),
    (["--prompt", "rain", "--top_p", "2"], "--top_p"),
    (["--prompt", "rain", "--guidance", "nan"], "--guidance"),
    (["--prompt", "rain", "--seed", "-1"], "--seed"),
    (["--prompt", "rain", "--seed", str(2**64)], "--seed"),
    (["--prompt", "rain", "--prompt", "wind", "--stream"], "--stream"),
    (["--prompt", "rain", "--lm", "nowhere.pt"], "nowhere.pt"),
    (["--prompt", "rain", "--codec", "nowhere.pt"], "nowhere.pt"),
    (["--prompt", "rain", "--stream", "no/folder/x.wav"], "no/folder/x.wav"),
])
def test_refused_flags_of_sample(flags, words, refused, made):
    assert words in refused(sample, "--lm", made[0] / "out" / "lm.pt", *flags)


def test_refused_prompts_that_are_not_utf8(refused, made, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"Gr\xfc\xdfe\n")
    line = refused(sample, "--lm", made[0] / "out" / "lm.pt", "--prompts", "p.txt")
    assert "p.txt" in line and "UTF-8" in line


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_refused_checkpoints_of_sample(kind, refused, made, tmp_path):
    path, _ = bad_checkpoint(kind, tmp_path)
    assert path in refused(sample, "--prompt", "rain", "--lm", path, "--codec", made[0] / "out" / "codec.pt")
    assert path in refused(sample, "--prompt", "rain", "--codec", path, "--lm", made[0] / "out" / "lm.pt")


def test_refused_lm_with_another_codec(refused, made, codecs, tmp_path):
    torch.save(codecs[4].checkpoint(), tmp_path / "other.pt")
    line = refused(sample, "--prompt", "rain", "--lm", made[0] / "out" / "lm.pt", "--codec", "other.pt")
    assert "lm.pt" in line and codecs[4].hash() in line


@pytest.mark.parametrize("script", [train_codec, train_lm, sample])
def test_refused_unknown_device(script, run, capsys, monkeypatch):
    prompt = ["--prompt", "rain"] if script is sample else []
    monkeypatch.setattr(sys, "argv", ["script", "--device", "tpu", *prompt])
    with pytest.raises(SystemExit) as stop, D.one_line_errors():
        script.main()
    assert stop.value.code == 2
    assert re.fullmatch("error: --device tpu: not a device of this machine.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("script", [train_codec, train_lm, sample])
@pytest.mark.parametrize("out", ["file", "file/below"])
def test_refused_file_where_the_output_folder_should_be(script, out, refused, made, clips, tmp_path):
    write_text(tmp_path / "file", "precious")
    flags = ["--prompt", "rain", "--seconds", 0.1, "--lm", made[0] / "out" / "lm.pt"]
    if script is not sample:
        flags = ["--data", clips, "--steps", 1]
    assert "file" in refused(script, *flags, "--out", out)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("script", [train_codec, train_lm])
def test_refused_second_training_into_one_folder(script, refused, clips, tmp_path):
    lock = D.lock_folder(str(tmp_path / "out"))
    assert "another run is writing there" in refused(script, "--data", clips, "--steps", 1)
    lock.close()


def test_refused_resume_with_nothing_there(refused, made, clips):
    assert "codec_train.pt" in refused(train_codec, "--data", clips, "--resume")
    codec = made[0] / "out" / "codec.pt"
    assert "lm_train.pt" in refused(train_lm, "--data", clips, "--codec", codec, "--resume")


def test_refused_training_an_lm_without_a_codec_or_with_another(refused, made, clips):
    assert "codec.pt" in refused(train_lm, "--data", clips, "--streams", 4)
    line = refused(train_lm, "--data", clips, "--streams", 8, "--codec", made[0] / "out" / "codec.pt")
    assert "python train_codec.py --streams 8" in line


def test_refused_shares_beyond_one_and_another_codec_in_out(refused, made, clips, codecs, tmp_path):
    codec = made[0] / "out" / "codec.pt"
    assert "--mix 2" in refused(train_lm, "--data", clips, "--codec", codec, "--mix", 2)
    (tmp_path / "out").mkdir(exist_ok=True)
    torch.save(codecs[4].checkpoint(), tmp_path / "out" / "codec.pt")
    assert "another codec" in refused(train_lm, "--data", clips, "--codec", codec)


def test_refused_number_of_streams(refused, clips):
    assert "1, 2, 4, 8" in refused(train_codec, "--data", clips, "--streams", 3)


@pytest.mark.parametrize("command", [["train_codec.py", "--data", "nowhere.csv"], ["sample.py", "--prompt="]])
def test_refused_by_the_real_command(command, tmp_path):
    process = start(*command, cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and re.fullmatch("error: [^\n]+\n", err)
