"""The convolutional network behind `classifier.py`, and its training; it prints no table of its own.

It sees 5 s of sound as 156 frames of 64 mel bands. It is trained with Muon: with Adam alone it needs several
times the steps.
"""

import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data as D
from codec import Conv2d, MelLoss

FRAMES, BANDS = 156, 64  # a frame is 32 ms
MEL = MelLoss([10], n_mels=BANDS)


def mel_spectra(waves):
    """Waves (B, T) to mel magnitudes (B, frames, BANDS)."""
    mel = MEL.mel(waves, 1024)
    return mel[:, : mel.shape[1] // 2 * 2].unflatten(1, (-1, 2)).mean(2)


def at_equal_loudness(mel):
    """Mel magnitudes (..., frames, BANDS), scaled so that the greatest of each clip is 1."""
    return mel / mel.amax((-2, -1), keepdim=True).clamp(min=1e-6)


class Network(nn.Module):
    """Mel magnitudes (B, FRAMES, BANDS) to the logits of each category and the features they are made of."""

    def __init__(self, categories: int, channels=(2, 16, 32, 64, 128)):
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out in zip(channels, channels[1:]):
            layers += [
                Conv2d(c_in, c_out, 3, padding=1, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(2 * channels[-1], categories)

    def forward(self, mel):
        x = ((at_equal_loudness(mel) + 1e-4).log() + 6) / 2.5
        height = torch.linspace(-1, 1, BANDS).expand_as(x)  # or convolutions could not tell high from low
        x = self.body(torch.stack((x, height), 1).contiguous(memory_format=torch.channels_last)).mean(3)
        features = torch.cat((x.mean(2), x.amax(2)), 1)  # (B, 256)
        return self.head(F.dropout(features, 0.4, self.training)), features


# ----------------------------------------------------------------------------------------------------------
# Training


def draw(spectra: list, chance, rng):
    """5 s of a random clip, moved and filtered a little (FRAMES, BANDS), and the number of its category."""
    k = rng.choice(len(spectra), p=chance)
    mel = spectra[k][rng.integers(len(spectra[k]))]
    spare = len(mel) - FRAMES
    begin = int(rng.integers(abs(spare) + 1)) if spare > 0 or rng.random() < 0.5 else 0
    mel = mel[begin : begin + FRAMES] if spare > 0 else F.pad(mel, (0, 0, begin, -spare - begin))
    tone = torch.from_numpy(rng.normal(0, 0.25, (1, 1, 5))).float()
    tone = F.interpolate(tone, size=BANDS, mode="linear", align_corners=True)[0].exp()
    return at_equal_loudness(mel.roll(int(rng.integers(-1, 2)), 1) * tone), k


def example(spectra: list, chance, rng):
    """A training example, and how much of each category it holds (categories,): three in ten are mixed, all
    have some noise, and a few frames and bands are hidden (SpecAugment, arXiv 1904.08779)."""
    (mel, k), (other, j) = draw(spectra, chance, rng), draw(spectra, chance, rng)
    share = float(rng.uniform(0, 0.5)) if rng.random() < 0.3 else 0.0
    mel = mel + other * share / (1 - share) + 10 ** rng.uniform(-4.5, -2) * torch.rand_like(mel)
    target = torch.zeros(len(spectra)).index_add(0, torch.tensor([k, j]), torch.tensor([1 - share, share]))
    frame, band, typical = rng.integers(FRAMES - 16), rng.integers(BANDS - 8), mel.log().mean().exp()
    mel[frame : frame + rng.integers(17)] = typical
    mel[:, band : band + rng.integers(9)] = typical
    return mel, target


def train_network(spectra: list, steps: int, seed: int) -> Network:
    """A network trained on the mel magnitudes of clips, given as one list for each category."""
    torch.manual_seed(seed)
    rng, network = np.random.default_rng(seed), Network(len(spectra)).train()
    # Halfway between drawing every clip and drawing every category equally often.
    chance = np.sqrt([len(clips) for clips in spectra])
    chance /= chance.sum()
    matrices = [p for p in network.body.parameters() if p.dim() == 2]
    others = [p for p in network.body.parameters() if p.dim() == 1] + list(network.head.parameters())
    optimizers = [D.Muon(matrices, 1e-2, 0.05), torch.optim.AdamW(others, 3e-3, weight_decay=0.05)]
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    schedules = [
        one_cycle(o, o.defaults["lr"], steps, pct_start=0.1, cycle_momentum=False) for o in optimizers
    ]
    for step in range(steps):
        mel, target = map(torch.stack, zip(*[example(spectra, chance, rng) for _ in range(16)]))
        loss = F.cross_entropy(network(mel)[0], target)
        network.zero_grad()
        loss.backward()
        for part in optimizers + schedules:
            part.step()
        if (step + 1) % 100 == 0:
            print(f"network {seed + 1} of 2, step {step + 1} of {steps}, loss {loss.item():.2f}", flush=True)
    return network.eval()
