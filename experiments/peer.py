"""AudioCraft's own modules, timed in the shapes of ours: `speed.py` prints them as a column beside ours.

AudioCraft 1.3.0 pins old packages, so it goes into an environment of its own, without what it asks for:

    python -m venv peer
    peer/bin/pip install -r requirements.txt einops omegaconf julius flashy num2words hydra-core colorlog
    peer/bin/pip install retrying submitit treetable
    peer/bin/pip install --no-deps audiocraft==1.3.0 encodec dora-search
    peer/bin/python experiments/speed.py

Weights are random, and what it imports without using it here is replaced by stand-ins.
"""
# ruff: noqa: E402 (the stand-ins have to be there before AudioCraft is imported)

import importlib.util
import os
import sys
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from codec import mel_filters


class Spectrogram(torch.nn.Module):
    """torchaudio's, for where that is missing."""

    def __init__(self, n_fft, hop_length, power=None, **_):
        super().__init__()
        self.n_fft, self.hop, self.power = n_fft, hop_length, power
        self.window = torch.nn.Buffer(torch.hann_window(n_fft))

    def forward(self, x):
        waves = x.flatten(0, -2)
        z = torch.stft(waves, self.n_fft, self.hop, window=self.window, center=False, return_complex=True)
        z = (z / self.window.norm()).unflatten(0, x.shape[:-1])
        return z if self.power is None else z.abs() ** self.power


class MelSpectrogram(Spectrogram):
    """torchaudio's, with our filters."""

    def __init__(self, n_fft, n_mels, **options):
        super().__init__(n_fft, power=2, **options)
        self.filters = torch.nn.Buffer(mel_filters(n_fft, n_mels).T.contiguous())

    def forward(self, x):
        return self.filters @ super().forward(x)


if importlib.util.find_spec("audiocraft") is None:
    raise ImportError("audiocraft is not installed")
stand_ins = "xformers xformers.ops transformers huggingface_hub spacy av librosa torchmetrics"
if importlib.util.find_spec("torchaudio") is None:
    stand_ins += " torchaudio torchaudio.transforms"
sys.modules |= {name: MagicMock(__spec__=None) for name in stand_ins.split()}
sys.modules["torchmetrics"].Metric = torch.nn.Module
sys.modules["xformers"].ops.unbind = torch.unbind
if "torchaudio.transforms" in stand_ins:
    for transforms in (sys.modules["torchaudio.transforms"], sys.modules["torchaudio"].transforms):
        transforms.Spectrogram, transforms.MelSpectrogram = Spectrogram, MelSpectrogram
from audiocraft.adversarial.discriminators.msstftd import MultiScaleSTFTDiscriminator
from audiocraft.losses.specloss import MultiScaleMelSpectrogramLoss
from audiocraft.models.lm import LMModel
from audiocraft.modules.codebooks_patterns import ParallelPatternProvider
from audiocraft.modules.conditioners import ConditionFuser, ConditioningAttributes
from audiocraft.modules.seanet import SEANetDecoder, SEANetEncoder
from audiocraft.quantization.vq import ResidualVectorQuantizer

STRIDES = {1: [4, 2, 2, 2], 2: [4, 4, 2, 2], 4: [4, 4, 4, 2]}  # of the decoder


def build_codec(streams: int, device):
    """Encoder, decoder and quantizer of the size `paper`, as AudioCraft's encodec/default.yaml has them."""
    options = {
        "n_filters": 32,
        "n_residual_layers": 1,
        "ratios": STRIDES[streams],
        "norm": "weight_norm",
        "lstm": 2,
        "pad_mode": "constant",
    }
    vq = {"dimension": 128, "n_q": streams, "bins": 2048 // streams, "threshold_ema_dead_code": 2}
    parts = SEANetEncoder(**options), SEANetDecoder(**options), ResidualVectorQuantizer(**vq)
    return [part.to(device) for part in parts]


def coder(streams: int, device):
    """Two functions: encode a wave (1, T), and decode latents (1, F, 128)."""
    encoder, decoder, vq = (part.eval().requires_grad_(False) for part in build_codec(streams, device))
    return lambda wave: vq.encode(encoder(wave[:, None])), lambda z: decoder(z.transpose(1, 2))


def codec_step(streams: int, wave):
    """A function that does one training step, with its discriminator, on waves (B, T)."""
    encoder, decoder, vq = build_codec(streams, wave.device)
    n = [1024, 2048, 512, 256, 128]
    disc = MultiScaleSTFTDiscriminator(32, n_ffts=n, win_lengths=n, hop_lengths=[i // 4 for i in n]).to(
        wave.device
    )
    mel = MultiScaleMelSpectrogramLoss(16000, range_start=5, normalized=True).to(wave.device)
    adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 3e-4)
    disc_adam, x = torch.optim.Adam(disc.parameters(), 3e-4), wave[:, None]

    def step():
        quantized = vq(encoder(x), frame_rate=16000)
        y = decoder(quantized.x)[..., : x.shape[2]]
        (fake, _), (real, _) = disc(y.detach()), disc(x)
        disc_adam.zero_grad()
        sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake)).backward()
        disc_adam.step()
        (fake, heard), (_, wanted) = disc(y), disc(x)
        loss = 0.1 * F.l1_loss(y, x) + mel(y, x) + sum(F.relu(1 - f).mean() for f in fake) + quantized.penalty
        loss = loss + sum(F.l1_loss(a, b.detach()) for A, B in zip(heard, wanted) for a, b in zip(A, B))
        adam.zero_grad()
        loss.backward()
        adam.step()

    return step


class Text(torch.nn.Module):
    """In place of T5: 16 vectors for each caption."""

    tokenize = len

    def __init__(self, width: int):
        super().__init__()
        self.width, self.device_of = width, torch.nn.Parameter(torch.zeros(1))

    def forward(self, n):
        u = torch.randn(n, 16, self.width, device=self.device_of.device, dtype=self.device_of.dtype)
        return {"description": (u, torch.ones(n, 16, device=u.device))}


def build_lm(n_layer: int, n_head: int, width: int, device):
    """A language model of four streams, parallel codes and text by cross-attention, the rest as AudioCraft's
    audiogen_lm.yaml has it."""
    fuser = ConditionFuser({"cross": ["description"], "prepend": [], "sum": [], "input_interpolate": []})
    options = {"n_q": 4, "card": 512, "dim": width, "num_heads": n_head, "num_layers": n_layer}
    options |= {"norm_first": True, "causal": True, "cross_attention": True, "dropout": 0.0}
    options |= {"memory_efficient": True, "bias_proj": False, "bias_ff": False, "bias_attn": False}
    return LMModel(ParallelPatternProvider(4), Text(width), fuser, **options).to(device)


def lm_step(shape: tuple, clips: int, device):
    """A function that does one training step on clips of 5 s."""
    lm, text = build_lm(*shape, device), clips * [ConditioningAttributes(text={"description": "rain"})]
    optimizer, codes = (
        torch.optim.AdamW(lm.parameters(), 1e-4),
        torch.randint(0, 512, (clips, 4, 625), device=device),
    )

    def step():
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            logits = lm.compute_predictions(codes, text).logits
        optimizer.zero_grad()
        F.cross_entropy(logits.float().flatten(0, 2), codes.flatten()).backward()
        optimizer.step()

    return step


def sampler(shape: tuple, device):
    """A function that samples so many frames, guidance on; in float16 on a GPU, as AudioCraft does it."""
    lm = build_lm(*shape, device).eval()
    if device.type == "cuda":
        lm = lm.half()
        lm.autocast = torch.autocast("cuda", torch.float16)
    conditions = [ConditioningAttributes(text={"description": "rain"})]
    return lambda frames: lm.generate(conditions=conditions, max_gen_len=frames, top_k=250, cfg_coef=3.0)
