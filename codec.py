"""The neural codec: a wave becomes K streams of codes, and codes become a wave again.

    wave --Encoder--> z --ResidualVQ--> codes --(look up, sum)--> z_q --Decoder--> wave

AudioGen (arXiv 2209.15352), section 3.1 and table of streams; EnCodec (arXiv 2210.13438) for the balancer.
Trained by `train_codec.py`; this file needs PyTorch alone and can be copied into another project.

What differs from the reference code (facebookresearch/encodec and audiocraft):
- a code that has died is really used again: it is replaced after the moving average is updated, not before;
- after k-means the averages hold sums, as the update expects, not means;
- "dead" is relative to the mean use of a code, so that it means the same for 64 codes and for 2048;
- LayerNorm acts on the channels of each time step: a clip's codes do not depend on what is encoded with it;
- every tensor between layers is (B, T, C): channels last is three times faster on a CPU.

Letters: B batch, T samples, F frames, C channels, D latent size, K streams, V codes per book.
"""

import hashlib
import itertools
import math
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

SAMPLE_RATE = 16000

# The paper's multi-stream table: more streams, a lower frame rate and smaller books, about the same bit rate.
STRIDES = {1: (2, 2, 2, 4), 2: (2, 2, 4, 4), 4: (2, 4, 4, 4), 8: (4, 4, 4, 4)}
CHANNELS = {"tiny": 16, "paper": 32}
LOUDNESS = 0.1  # the usual RMS of a clip; inside the networks it counts as 1
HUSH = 2**-13  # four steps of a 16-bit file, -78 dB: decoded sound is so much nearer to 0, or silent


@dataclass
class CodecConfig:
    """Everything needed to rebuild a codec; it is stored in every checkpoint."""

    streams: int = 4
    size: str = "tiny"
    dim: int = 128

    def __post_init__(self):
        if self.streams not in STRIDES:
            raise ValueError(f"streams is {self.streams}, but must be one of 1, 2, 4, 8: type --streams 4")
        if self.size not in CHANNELS:
            raise ValueError(f"codec size {self.size!r} is unknown: type --size tiny or --size paper")
        self.channels, self.strides = CHANNELS[self.size], STRIDES[self.streams]
        self.hop = math.prod(self.strides)  # samples per frame
        self.frame_rate = SAMPLE_RATE / self.hop  # frames per second
        self.codes = 2048 // self.streams  # per book, V
        self.kbps = self.streams * math.log2(self.codes) * self.frame_rate / 1000  # of the codes, in kbit/s


# ----------------------------------------------------------------------------------------------------------
# Encoder and decoder (section 3.1: C = 32, B = 4 blocks, two-layer LSTM, ELU, LayerNorm)


class Conv(nn.Conv2d):
    """1-d convolution over (B, T, C). T must be a multiple of the stride; the result has T / stride steps.

    It runs as a 2-d convolution of height 1: PyTorch has channels-last kernels for images only. The weight is
    kept as a matrix (C', C * kernel), which is how its optimizer sees it."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1):
        super().__init__(c_in, c_out, (1, kernel), (1, stride), padding=(0, (kernel - stride + 1) // 2))
        self.weight = nn.Parameter(self.weight.flatten(1))

    def forward(self, x):
        weight = self.weight.view(self.out_channels, -1, *self.kernel_size)
        y = F.conv2d(x.transpose(1, 2)[:, :, None], weight, self.bias, self.stride, self.padding)
        return y[:, :, 0].transpose(1, 2)


class ConvTranspose(nn.ConvTranspose2d):
    """The mirror of a strided `Conv`: (B, T, C) to (B, T * stride, C'), kernel 2 * stride."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__(c_in, c_out, (1, 2 * stride), (1, stride), padding=(0, stride // 2))
        self.weight = nn.Parameter(self.weight.transpose(0, 1).flatten(1))  # (C', C * kernel)

    def forward(self, x):
        weight = self.weight.view(self.out_channels, -1, *self.kernel_size).transpose(0, 1)
        y = F.conv_transpose2d(x.transpose(1, 2)[:, :, None], weight, self.bias, self.stride, self.padding)
        return y[:, :, 0].transpose(1, 2)


class ResidualUnit(nn.Module):
    """Two convolutions and a skip. The norm stands inside the branch: the skip has to carry loudness."""

    def __init__(self, c: int):
        super().__init__()
        wide, narrow = Conv(c, c // 2, 3), nn.Linear(c // 2, c)
        self.block = nn.Sequential(nn.LayerNorm(c), nn.ELU(), wide, nn.ELU(), narrow)

    def forward(self, x):
        return x + self.block(x)


class LSTM(nn.LSTM):
    """Two layers over time with a skip. Looking back only, it lets a stream be decoded in pieces."""

    def __init__(self, c: int):
        super().__init__(c, c, num_layers=2, batch_first=True)

    def forward(self, x, state=None):
        y, state = super().forward(x, state)
        return x + y, state


class Encoder(nn.Module):
    """Wave (B, T, 1) to latents z (B, T / hop, D)."""

    def __init__(self, cfg: CodecConfig):
        super().__init__()
        c = cfg.channels
        blocks: list[nn.Module] = [Conv(1, c, 7)]
        for s in cfg.strides:
            blocks += [ResidualUnit(c), nn.ELU(), Conv(c, 2 * c, 2 * s, s)]
            c *= 2
        self.down = nn.Sequential(*blocks)
        self.lstm = LSTM(c)
        self.out = nn.Sequential(nn.LayerNorm(c), nn.ELU(), Conv(c, cfg.dim, 7))

    def forward(self, x):
        x = self.down(x / LOUDNESS)  # (B, F, 16 C)
        x, _ = self.lstm(x)
        return self.out(x)  # (B, F, D)


class Decoder(nn.Module):
    """Latents z_q (B, F, D) to wave (B, F * hop, 1): the encoder's mirror, strides reversed."""

    def __init__(self, cfg: CodecConfig):
        super().__init__()
        c = cfg.channels * 2 ** len(cfg.strides)
        self.inp = Conv(cfg.dim, c, 7)
        self.lstm = LSTM(c)
        blocks = []
        for s in reversed(cfg.strides):
            blocks += [nn.ELU(), ConvTranspose(c, c // 2, s), ResidualUnit(c // 2)]
            c //= 2
        self.up = nn.Sequential(*blocks, nn.ELU(), Conv(c, 1, 7))

    def forward(self, z_q):
        x, _ = self.lstm(self.inp(z_q))  # (B, F, 16 C)
        return self.to_wave(x)

    def to_wave(self, x):
        """What comes out of the LSTM (B, F, 16 C) to wave (B, F * hop, 1)."""
        wave = LOUDNESS * self.up(x)
        return wave if self.training else F.softshrink(wave, HUSH)


# ----------------------------------------------------------------------------------------------------------
# Vector quantization


class VectorQuantizer(nn.Module):
    """One codebook of V vectors, learnt by exponential moving averages instead of by gradients.

    `total` and `count` average, over the steps, the sum and the number of the vectors that chose each code in
    a batch; the code is their ratio. The average is quick at first and slows down to `decay`: a young encoder
    moves its latents faster than a hundred-step memory can follow, and whole books die behind it (measured:
    perplexity 149 of 512 after 54 steps instead of 3).

    A code whose count falls under `revive` times the mean count is dead: it moves to a random vector of the
    batch. It starts with twice the threshold: a wrong guess is seen 70 steps later (2 * .99**69 = 1)."""

    def __init__(self, codes: int, dim: int, decay: float = 0.99, revive: float = 0.1):
        super().__init__()
        self.decay, self.revive = decay, revive
        self.embed = nn.Buffer(torch.randn(codes, dim))  # (V, D)
        self.total = nn.Buffer(self.embed.clone())  # (V, D)
        self.count = nn.Buffer(torch.ones(codes))  # (V,)
        self.steps, self.started = nn.Buffer(torch.tensor(0.0)), nn.Buffer(torch.tensor(False))
        self.is_started = False  # `started` as Python knows it: no wait for the GPU at every step

    def nearest(self, x):
        """(N, D) to the index of the nearest code (N,); |x|^2 is the same for all codes and left out."""
        return (x @ self.embed.T - self.embed.square().sum(1) / 2).argmax(1)

    def tally(self, x, index):
        """How many of x chose each code (V,), and their sum (V, D), over all processes."""
        count = torch.zeros_like(self.count).index_add_(0, index, torch.ones_like(x[:, 0]))
        total = torch.zeros_like(self.embed).index_add_(0, index, x)
        if dist.is_initialized():
            dist.all_reduce(count)
            dist.all_reduce(total)
        return count, total

    def draw(self, x):
        """V random vectors (V, D) of the whole batch, of which each process holds a part."""
        parts = dist.get_world_size() if dist.is_initialized() else 1
        pick = torch.randint(parts * len(x), self.count.shape, device=x.device)
        if parts == 1:
            return x[pick]
        dist.broadcast(pick, 0)
        mine = pick // len(x) == dist.get_rank()
        drawn = torch.where(mine[:, None], x[pick % len(x)], 0)
        dist.all_reduce(drawn)
        return drawn

    def start(self, x, rounds: int = 10):
        """K-means on the first batch. The averages hold counts and sums, as every later update expects."""
        self.embed.copy_(self.draw(x))
        for _ in range(rounds):
            count, total = self.tally(x, self.nearest(x))
            means = total / count[:, None].clamp(min=1)
            self.embed.copy_(torch.where(count[:, None] > 0, means, self.draw(x)))
        self.count.copy_(count)
        self.total.copy_(self.embed * count[:, None])
        self.replace_dead(x)
        self.started.fill_(True)

    def update(self, x, index):
        """One EMA step towards the batch; only then are dead codes replaced, so that they stay replaced."""
        count, total = self.tally(x, index)
        self.steps += 1
        rate = 1 - torch.clamp(self.steps / (9 + self.steps), max=self.decay)
        self.count.lerp_(count, rate)
        self.total.lerp_(total, rate)
        self.embed.copy_(self.total / self.count[:, None].clamp(min=1e-9))
        self.replace_dead(x)

    def replace_dead(self, x):
        threshold = self.revive * self.count.mean()
        dead = self.count < threshold  # (V,)
        self.count.copy_(torch.where(dead, 2 * threshold, self.count))
        self.embed.copy_(torch.where(dead[:, None], self.draw(x), self.embed))
        self.total.copy_(torch.where(dead[:, None], self.embed * self.count[:, None], self.total))

    @torch.no_grad()
    def forward(self, x, learn: bool = True):
        """(N, D) to quantized (N, D) and index (N,); in training mode the book may then learn from x."""
        learn = learn and self.training
        if learn:
            x = torch.nan_to_num(x, 0, 0, 0)  # one bad step must not poison the book for ever
            if not self.is_started:
                if not self.started:
                    self.start(x)
                self.is_started = True
        index = self.nearest(x)
        quantized = self.embed[index]
        if learn:
            self.update(x, index)
        return quantized, index


class ResidualVQ(nn.Module):
    """K books in a row, each coding what the ones before it left over; K = 1 is plain VQ (section 3.3)."""

    def __init__(self, streams: int, codes: int, dim: int = 128, decay: float = 0.99, revive: float = 0.1):
        super().__init__()
        self.books = nn.ModuleList(VectorQuantizer(codes, dim, decay, revive) for _ in range(streams))

    def forward(self, z, learn: bool = True):
        """z (B, F, D) -> z_q (B, F, D) with straight-through gradient, codes (B, K, F), commitment loss ().

        All in float32: squared distances of nearby vectors drown in the rounding of 16-bit floats."""
        B, F_, D = z.shape
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            residual = z.reshape(-1, D)  # (N, D)
            codes, commitment = [], z.new_zeros(())
            for book in self.books:
                quantized, index = book(residual, learn)
                commitment = commitment + F.mse_loss(residual, quantized)
                residual = residual - quantized
                codes.append(index.view(B, F_))
            # Straight through, once, on the sum: the value is z_q, the gradient is that of z.
            z_q = z - residual.view_as(z).detach()
        return z_q, torch.stack(codes, 1), commitment / len(self.books)

    def decode(self, codes):
        """Codes (B, K, F) to the sum of their vectors (B, F, D)."""
        return sum(book.embed[codes[:, k]] for k, book in enumerate(self.books))


# ----------------------------------------------------------------------------------------------------------
# The codec


class Codec(nn.Module):
    """Encoder, residual quantizer and decoder. In training mode a forward pass also updates the codebooks."""

    def __init__(self, cfg: CodecConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.quantizer = ResidualVQ(cfg.streams, cfg.codes, cfg.dim)
        self.decoder = Decoder(cfg)
        # Biases start at 0. PyTorch draws them at random, louder than most sounds: behind the norm all frames
        # then look alike, the decoder learns to do without them, and some runs stay there for long.
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)

    def latents(self, wave):
        """Wave (B, T) to z (B, F, D), F = ceil(T / hop): the end is padded with silence to a whole frame."""
        wave = F.pad(wave, (0, -wave.shape[1] % self.cfg.hop))
        return self.encoder(wave[:, :, None])

    def forward(self, wave):
        """Wave (B, T) -> wave_hat (B, T), codes (B, K, F), commitment loss ()."""
        z_q, codes, commitment = self.quantizer(self.latents(wave))
        wave_hat = self.decoder(z_q)[:, : wave.shape[1], 0].float()
        return wave_hat, codes, commitment

    @torch.no_grad()
    def encode(self, wave):
        """Wave (B, T) in [-1, 1] at 16 kHz to codes (B, K, F) int64, F = ceil(T / hop). Never learns."""
        with torch.autocast(wave.device.type, enabled=False):
            return self.quantizer(self.latents(wave), learn=False)[1]

    @torch.no_grad()
    def decode(self, codes):
        """Codes (B, K, F) to wave (B, F * hop)."""
        return self.decoder(self.quantizer.decode(codes))[:, :, 0]

    @torch.no_grad()
    def decode_stream(self, chunks):
        """Chunks of codes (B, K, f) to pieces of the wave, which together equal `decode` of the whole.

        Convolutions see a few frames to each side, so sound comes out `2 * margin` frames after its codes;
        the LSTM only looks back and keeps its state. Nothing is ever decoded twice but the margins."""
        margin, hop = 3, self.cfg.hop  # of `Decoder.inp` (7 // 2); of `Decoder.up` it is under 2 frames
        z, x, state = None, None, None  # latents and LSTM outputs from which the next frames will be made
        x_past = 0  # how many of the latter are context only
        for chunk in itertools.chain(chunks, [None]):  # None: that was the last
            new = 0 * z[:, :margin] if chunk is None else self.quantizer.decode(chunk)
            z = F.pad(new, (0, 0, margin, 0)) if z is None else torch.cat((z, new), 1)  # as `inp` pads
            if z.shape[1] > 2 * margin:
                y, state = self.decoder.lstm(self.decoder.inp(z)[:, margin:-margin], state)
                x, z = y if x is None else torch.cat((x, y), 1), z[:, -2 * margin :]
            if x is None:
                continue
            ready = x.shape[1] - (0 if chunk is None else margin)
            if ready > x_past:
                yield self.decoder.to_wave(x)[:, x_past * hop : ready * hop, 0]
                x, x_past = x[:, max(ready - margin, 0) :], min(ready, margin)

    def hash(self) -> str:
        """A fingerprint of what makes the codes, encoder and books: a language model remembers whose codes it
        learnt. The decoder may learn on without it."""
        digest = hashlib.sha256(repr(sorted(asdict(self.cfg).items())).encode())
        for name, tensor in sorted(self.state_dict().items()):
            if name.startswith("encoder") or name.endswith("embed"):
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def checkpoint(self) -> dict:
        """What `load` reads; the scripts add what they need beside it."""
        return {"kind": "nanoaudiogen codec", "config": asdict(self.cfg), "model": self.state_dict()}

    @staticmethod
    def load(path, device="cpu") -> "Codec":
        """The codec in a checkpoint, in evaluation mode and float32. ValueError where the file is not one."""
        checkpoint = load_checkpoint(path, "nanoaudiogen codec")
        try:
            codec = Codec(CodecConfig(**checkpoint["config"]))
            codec.load_state_dict(checkpoint["model"])
        except (KeyError, TypeError, RuntimeError) as e:
            reason = str(e).splitlines()[0]
            raise ValueError(f"{path}: of another version ({reason}): train it again") from None
        return codec.to(device).eval()


def load_checkpoint(path, kind: str) -> dict:
    """A checkpoint of this kind, loaded without running code from the file; ValueError for anything else.
    (codec.py and lm.py have the same one, for each can be copied alone.)"""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint: train one first, or name another") from None
    except Exception as e:  # noqa: BLE001 (torch.load raises a dozen types for broken files)
        reason = (str(e).splitlines() or [type(e).__name__])[0][:80]
        raise ValueError(f"{path}: truncated, or not a checkpoint ({reason}): name another file") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != kind:
        found = checkpoint.get("kind") if isinstance(checkpoint, dict) else None
        raise ValueError(f"{path}: expected a {kind}, found {found or 'another project'}: name another file")
    return checkpoint


# ----------------------------------------------------------------------------------------------------------
# Losses of the reconstruction


def mel_filters(n_fft: int, n_mels: int):
    """Triangular filters, centres evenly spaced on the mel scale 2595 log10(1 + f / 700) from 0 to 8 kHz.

    Returns (n_fft // 2 + 1, M). The outermost centres lie on the edges, so that the weights of every bin sum
    to 1: the usual bank is deaf to 0 Hz and to 8 kHz, where strided decoders leave tones. Where a window
    has too few bins for 64 bands, some triangles would fall between two bins and stay silent for ever; M is
    then the largest number of bands that each hear something."""
    bins = torch.linspace(0, SAMPLE_RATE / 2, n_fft // 2 + 1, dtype=torch.float64)
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    while True:
        mels = top * torch.arange(-1, n_mels + 1, dtype=torch.float64) / (n_mels - 1)
        edges = 700 * (10 ** (mels / 2595) - 1)
        low, mid, high = edges[:-2], edges[1:-1], edges[2:]
        rising = (bins[:, None] - low) / (mid - low)
        falling = (high - bins[:, None]) / (high - mid)
        filters = torch.minimum(rising, falling).clamp(min=0)  # (bins, M)
        if filters.sum(0).min() > 0:
            return filters.float()
        n_mels -= 1


class MelLoss(nn.Module):
    """l_f of section 3.1: mel spectra at windows 2^5 .. 2^11, hop a quarter of the window.

    Mean over scales of  mean |S(x) - S(y)|  +  alpha * mean over frames of ||L(x) - L(y)|| / sqrt(M), where
    L = log(S + floor). alpha is 1 at every scale, as EnCodec chose: the balancer rescales the whole anyway,
    and what is left of an alpha that grows with the window is a preference for long windows, which blurs
    attacks. Long windows have more bands than the paper's 64, up to a quarter of the window: 64 would hear
    the harmonics of a voice above 2 kHz as one, and could not teach a codec to tell them from noise. The L2
    norm is taken over the bands of each frame, so that one bad frame cannot outweigh all others. The gradient
    of a log is one over its argument: with a floor of 1e-5 the loudest bands hear next to nothing of the loss
    and come out 10 dB too quiet. At 1e-3 all three held-out measures are better."""

    def __init__(self, exponents=range(5, 12), n_mels: int = 0, floor: float = 1e-3):
        super().__init__()
        self.windows, self.floor = [2**i for i in exponents], floor
        for n in self.windows:
            self.register_buffer(f"window{n}", torch.hann_window(n), persistent=False)
            self.register_buffer(f"filters{n}", mel_filters(n, n_mels or max(64, n // 4)), persistent=False)

    def mel(self, wave, n: int):
        """Wave (B, T) to its mel spectrum (B, frames, M) at window n."""
        window = getattr(self, f"window{n}")
        spectrum = torch.stft(wave, n, n // 4, window=window, pad_mode="constant", return_complex=True)
        magnitude = spectrum.abs().transpose(1, 2) / window.norm()  # white noise reads alike at all windows
        return magnitude @ getattr(self, f"filters{n}")

    def forward(self, target, estimate):
        """Both (B, T) -> loss (). Gradient flows to the estimate only."""
        loss = 0.0
        for n in self.windows:
            with torch.no_grad():
                x = self.mel(target, n)
            y = self.mel(estimate, n)
            per_frame = ((y + self.floor).log() - (x + self.floor).log()).square().mean(-1)  # (B, frames)
            loss = loss + (y - x).abs().mean() + (per_frame + 1e-12).sqrt().mean()
        return loss / len(self.windows)


# ----------------------------------------------------------------------------------------------------------
# The adversary (section 3.1; EnCodec section 3.4)


def fold(x):
    """(B, C, frames, bins) to (B, 2 C, frames, bins / 2): pairs of bins side by side as channels, where a
    kernel of 4 sees what one of 8 sees that moves by 2. GPUs are slow at the gradient of a stride."""
    return x.unflatten(3, (-1, 2)).permute(0, 4, 1, 2, 3).flatten(1, 2)


class ScaleDiscriminator(nn.Module):
    """Judges one complex STFT, real and imaginary part as two channels."""

    def __init__(self, n_fft: int, filters: int):
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        conv = lambda *args, **kw: nn.utils.parametrizations.weight_norm(nn.Conv2d(*args, **kw))
        self.convs = nn.ModuleList([conv(2, filters, (3, 8), padding=(1, 4))])
        for d in (1, 2, 4):  # 3 x 8 with stride 2, see `fold`
            self.convs.append(conv(2 * filters, filters, (3, 4), dilation=(d, 1), padding=(d, 2)))
        self.convs.append(conv(filters, filters, (3, 3), padding=(1, 1)))
        self.logit = conv(filters, 1, (3, 3), padding=(1, 1))

    def forward(self, wave):
        """Wave (B, T) -> logits (B, 1, frames, bands), and the features of every layer."""
        n = self.n_fft
        spectrum = torch.stft(wave, n, n // 4, window=self.window, pad_mode="constant", return_complex=True)
        x = torch.view_as_real(spectrum / self.window.norm()).permute(0, 3, 2, 1)  # (B, 2, frames, bins)
        features = []
        for layer in self.convs:
            if layer.in_channels > x.shape[1]:
                x = fold(x)
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.logit(x).float(), features


class STFTDiscriminator(nn.Module):
    """MS-STFT discriminator: five windows, one judge each."""

    def __init__(self, filters: int = 32, windows=(2048, 1024, 512, 256, 128)):
        super().__init__()
        self.scales = nn.ModuleList(ScaleDiscriminator(n, filters) for n in windows)

    def forward(self, wave):
        """Wave (B, T) -> list of logits, list of lists of features."""
        logits, features = zip(*(scale(wave) for scale in self.scales))
        return list(logits), list(features)


def discriminator_loss(real, fake):
    """Hinge loss of the judges, mean over the K scales: real above 1, fake below -1."""
    return sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake)) / len(real)


def generator_loss(fake):
    """Hinge loss of the codec, mean over the K scales: its sound should be called real."""
    return sum(F.relu(1 - f).mean() for f in fake) / len(fake)


def feature_loss(real, fake):
    """Feature matching: mean over K scales and L layers of the L1 distance of their features."""
    pairs = [(r, f) for R, F_ in zip(real, fake) for r, f in zip(R, F_)]
    return sum((f - r.detach()).abs().mean(dtype=torch.float32) for r, f in pairs) / len(pairs)


class Balancer(nn.Module):
    """Makes a loss's weight its share of the gradient, whatever its scale (EnCodec section 3.4).

        g = sum_i  w_i / (sum_j w_j) * g_i / max(||g_i||, <||g_i||>)      for every clip

    g_i is the gradient of loss i at a clip's output, ||.|| its norm (times B: the clip's own, not its part in
    the batch's mean), <.> the mean over clips and a moving average over steps, corrected for its start. The
    maximum is ours: no clip pulls harder than the average one. A logarithm's slope is 1 / loudness, so that
    the few nearly silent clips of a batch would else own its gradient. The averages are buffers: they belong
    in the checkpoint."""

    def __init__(self, names, decay: float = 0.999):
        super().__init__()
        self.names, self.decay = list(names), decay
        self.norm, self.steps = (nn.Buffer(torch.zeros(len(self.names))) for _ in range(2))

    def forward(self, losses: dict, weights: dict, output):
        """Losses and their weights by name, output (B, T) -> gradient (B, T) to send back from there."""
        active = [name for name in losses if weights[name] > 0]
        gradient = torch.zeros_like(output)
        for name in active:
            i = self.names.index(name)
            (g,) = torch.autograd.grad(losses[name], output, retain_graph=True)
            norms = len(g) * g.norm(dim=1, keepdim=True)  # (B, 1)
            norm = norms.mean()
            if dist.is_initialized():
                dist.all_reduce(norm, op=dist.ReduceOp.SUM)
                norm = norm / dist.get_world_size()
            if torch.isfinite(norm):  # one bad step must not poison the average for ever
                self.norm[i] = self.decay * self.norm[i] + (1 - self.decay) * norm
                self.steps[i] += 1
            average = self.norm[i] / (1 - self.decay ** self.steps[i])
            share = weights[name] / sum(weights[n] for n in active)
            gradient += share * g / torch.maximum(norms, average + 1e-12)
        return gradient


# ----------------------------------------------------------------------------------------------------------
# Measures of a codec, all on waves (B, T), one value per clip (B,)


def si_snr(target, estimate):
    """Scale-invariant signal-to-noise ratio in dB; higher is better."""
    target = target - target.mean(1, keepdim=True)
    estimate = estimate - estimate.mean(1, keepdim=True)
    scale = (target * estimate).sum(1, keepdim=True) / (target.square().sum(1, keepdim=True) + 1e-8)
    signal = scale * target
    noise = estimate - signal
    return 10 * torch.log10((signal.square().sum(1) + 1e-8) / (noise.square().sum(1) + 1e-8))


def log_mel_distance(target, estimate, floor: float = 1e-5):
    """Mean absolute difference of log10 mel magnitude, 64 bands at window 1024; lower is better."""
    mel = MelLoss([10], n_mels=64).to(target.device)
    x, y = (mel.mel(wave, 1024).clamp(min=floor).log10() for wave in (target, estimate))
    return (x - y).abs().mean((1, 2))


def log_spectrum_distance(target, estimate, windows=(256, 512, 1024, 2048), floor: float = 1e-4):
    """Mean absolute difference of log10 |STFT|, mean over four windows; lower is better.

    It hears fine structure that a mel spectrum averages away: two noises of one spectrum are .30 apart."""
    total = torch.zeros(len(target), device=target.device)
    for n in windows:
        window = torch.hann_window(n, device=target.device)
        x, y = (torch.stft(wave, n, n // 4, window=window, pad_mode="constant", return_complex=True).abs()
                for wave in (target, estimate))
        total = total + (x.clamp(min=floor).log10() - y.clamp(min=floor).log10()).abs().mean((1, 2))
    return total / len(windows)


def effective_codes(count) -> float:
    """How often each code of a book was used (V,) -> the effective number in use (exp of the entropy)."""
    return math.exp(torch.special.entr(count / count.sum()).sum())


def perplexity(codes, size: int):
    """Codes (B, K, F) -> for each stream the effective number of codes in use (exp of the entropy), and the
    share of the book that is used at all; two lists of K floats."""
    counts = [torch.bincount(stream.flatten(), minlength=size).float() for stream in codes.unbind(1)]
    return [effective_codes(c) for c in counts], [float((c > 0).float().mean()) for c in counts]
