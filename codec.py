"""The neural codec: a wave becomes K streams of codes, and codes become a wave again.

    wave --Encoder--> z --ResidualVQ--> codes --(look up, sum)--> z_q --Decoder--> wave_hat

AudioGen (arXiv 2209.15352), section 3.1, and 3.2 for the streams. From elsewhere: VQ-VAE (1711.00937) for the
straight-through estimator and codebooks learnt by moving averages, SoundStream (2107.03312) for residual
quantization, EnCodec (2210.13438) for the discriminator and the balancer.
Trained by `train_codec.py`; this file needs PyTorch and NumPy alone and can be copied into another project.

Every tensor between layers is (B, T, C): channels last is three times faster on a CPU with AVX-512.
README.md lists what differs from the paper, and why.

Letters: B batch, T samples, F frames, C channels, D latent size, K streams, V codes in a codebook.
"""

import functools
import hashlib
import itertools
import math
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

SAMPLE_RATE = 16000

# The paper's table of streams: more streams, a lower frame rate, smaller codebooks, about the same bit rate.
STRIDES = {1: (2, 2, 2, 4), 2: (2, 2, 4, 4), 4: (2, 4, 4, 4), 8: (4, 4, 4, 4)}
CHANNELS = {"tiny": 16, "paper": 32}
TYPICAL_RMS = 0.1  # of a clip: inside the networks, waves are divided by it
NOISE_FLOOR = 2**-13  # -78 dB, four steps of a 16-bit file: decoded samples are pulled towards 0 by this much


class CodecError(ValueError):
    """An error that the user can fix: a wrong setting, a file that is not a checkpoint."""


@dataclass
class CodecConfig:
    """Everything needed to rebuild a codec; it is stored in every checkpoint."""

    streams: int = 4
    size: str = "tiny"
    dim: int = 128

    def __post_init__(self):
        if self.streams not in STRIDES:
            raise CodecError(f"streams is {self.streams}, but must be one of 1, 2, 4, 8: type --streams 4")
        if self.size not in CHANNELS:
            raise CodecError(f"codec size {self.size!r} is unknown: type --size tiny or --size paper")
        self.channels, self.strides = CHANNELS[self.size], STRIDES[self.streams]
        self.hop = math.prod(self.strides)  # samples per frame
        self.frame_rate = SAMPLE_RATE / self.hop  # frames per second
        self.codebook_size = 2048 // self.streams  # V
        bits_per_frame = self.streams * math.log2(self.codebook_size)
        self.kbps = bits_per_frame * self.frame_rate / 1000  # kbit/s


# ----------------------------------------------------------------------------------------------------------
# Encoder and decoder (section 3.1: C = 32, B = 4 blocks, two-layer LSTM, ELU, LayerNorm)


class Conv2d(nn.Conv2d):
    """(B, C, H, W) -> (B, C', H', W'). The weight is kept as a matrix (C', C * kernel), which is how the
    optimizer Muon sees it."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.weight = nn.Parameter(self.weight.flatten(1))

    def forward(self, x):
        weight = self.weight.view(self.out_channels, -1, *self.kernel_size)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


class Conv(Conv2d):
    """1-d convolution over (B, T, C) -> (B, T / stride, C'). T must be a multiple of the stride.

    It runs as a 2-d convolution of height 1: PyTorch has channels-last kernels for images only."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1):
        super().__init__(c_in, c_out, (1, kernel), (1, stride), padding=(0, (kernel - stride + 1) // 2))

    def forward(self, x):
        y = super().forward(x.transpose(1, 2)[:, :, None])
        return y[:, :, 0].transpose(1, 2)


class ConvTranspose(nn.ConvTranspose2d):
    """The mirror of a strided `Conv`: (B, T, C) -> (B, T * stride, C'), kernel 2 * stride."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__(c_in, c_out, (1, 2 * stride), (1, stride), padding=(0, stride // 2))
        self.weight = nn.Parameter(self.weight.transpose(0, 1).flatten(1))  # (C', C * kernel)

    def forward(self, x):
        weight = self.weight.view(self.out_channels, -1, *self.kernel_size).transpose(0, 1)
        y = F.conv_transpose2d(x.transpose(1, 2)[:, :, None], weight, self.bias, self.stride, self.padding)
        return y[:, :, 0].transpose(1, 2)


class ResidualUnit(nn.Module):
    """(B, T, C) -> (B, T, C): two convolutions and a skip.

    The norm is inside the branch: on the skip path it would erase how loud the sound is."""

    def __init__(self, c: int):
        super().__init__()
        self.block = nn.Sequential(
            nn.LayerNorm(c), nn.ELU(), Conv(c, c // 2, 3), nn.ELU(), nn.Linear(c // 2, c)
        )  # the linear layer is a convolution of kernel 1

    def forward(self, x):
        return x + self.block(x)


class LSTM(nn.LSTM):
    """A two-layer LSTM over time, (B, T, C) -> (B, T, C), with a skip connection.

    It runs forwards only, so that a stream of codes can be decoded piece by piece."""

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
        x = self.down(x / TYPICAL_RMS)  # (B, F, 16 C)
        x, _ = self.lstm(x)
        return self.out(x)  # (B, F, D)


class Decoder(nn.Module):
    """Latents z_q (B, F, D) to wave (B, F * hop, 1): the encoder's mirror, strides reversed."""

    def __init__(self, cfg: CodecConfig):
        super().__init__()
        c = cfg.channels * 2 ** len(cfg.strides)
        self.inp = Conv(cfg.dim, c, 7)
        self.lstm = LSTM(c)
        blocks: list[nn.Module] = []
        for s in reversed(cfg.strides):
            blocks += [nn.ELU(), ConvTranspose(c, c // 2, s), ResidualUnit(c // 2)]
            c //= 2
        self.up = nn.Sequential(*blocks, nn.ELU(), Conv(c, 1, 7))

    def forward(self, z_q):
        x, _ = self.lstm(self.inp(z_q))  # (B, F, 16 C)
        return self.to_wave(x)

    def to_wave(self, x):
        """What comes out of the LSTM (B, F, 16 C) to wave (B, F * hop, 1).

        Outside training all samples are pulled towards 0 by the noise floor, so that silence becomes exactly
        0, which no network reaches by itself."""
        wave = TYPICAL_RMS * self.up(x)
        return wave if self.training else F.softshrink(wave, NOISE_FLOOR)


# ----------------------------------------------------------------------------------------------------------
# Vector quantization


class VectorQuantizer(nn.Module):
    """One codebook of V vectors, learnt by exponential moving averages (VQ-VAE, appendix A.1), not gradients.

        cluster_size = decay * cluster_size + (1 - decay) * (how many vectors of the batch chose the code)
        embed_sum    = decay * embed_sum    + (1 - decay) * (the sum of these vectors)
        embed        = embed_sum / cluster_size

    The decay grows from 0.1 to `decay` over the first 891 steps: early in training the latents move faster
    than an average over a hundred steps can follow. With a constant `decay` the codes lag behind (after 54
    steps the perplexity was 3 of 512 codes, instead of 149).

    A code is dead if its cluster_size is below `dead_code_threshold` times the mean. It is then moved to a
    random vector of the batch, and its cluster_size set to twice the threshold: if no vector chooses it
    there, it is dead again within 70 steps (2 * .99^69 = 1)."""

    decay = 0.99
    dead_code_threshold = 0.1

    def __init__(self, codebook_size: int, dim: int):
        super().__init__()
        self.embed = nn.Buffer(torch.randn(codebook_size, dim))  # (V, D)
        self.embed_sum = nn.Buffer(self.embed.clone())  # (V, D)
        self.cluster_size = nn.Buffer(torch.ones(codebook_size))  # (V,)
        self.steps, self.inited = nn.Buffer(torch.tensor(0.0)), nn.Buffer(torch.tensor(False))
        self.is_inited = False  # a copy of `inited` in Python: reading the buffer would wait for the GPU

    def nearest(self, x):
        """(N, D) to the index of the nearest code (N,); |x|^2 is the same for all codes and left out."""
        return (x @ self.embed.T - self.embed.square().sum(1) / 2).argmax(1)

    def count(self, x, index):
        """How many of x chose each code (V,), and the sum of these (V, D), over all processes."""
        counts = torch.zeros_like(self.cluster_size).index_add_(0, index, torch.ones_like(x[:, 0]))
        sums = torch.zeros_like(self.embed).index_add_(0, index, x)
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        return counts, sums

    def random_vectors(self, x):
        """V random vectors (V, D) of the whole batch, of which each process holds a part."""
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        chosen = torch.randint(world_size * len(x), self.cluster_size.shape, device=x.device)
        if world_size == 1:
            return x[chosen]
        dist.broadcast(chosen, 0)
        mine = chosen // len(x) == dist.get_rank()
        vectors = torch.where(mine[:, None], x[chosen % len(x)], 0)
        dist.all_reduce(vectors)
        return vectors

    def kmeans_init(self, x, iterations: int = 10):
        """K-means on the first batch. The averages hold counts and sums, as every later update expects."""
        self.embed.copy_(self.random_vectors(x))
        for _ in range(iterations):
            counts, sums = self.count(x, self.nearest(x))
            means = sums / counts[:, None].clamp(min=1)
            self.embed.copy_(torch.where(counts[:, None] > 0, means, self.random_vectors(x)))
        self.cluster_size.copy_(counts)
        self.embed_sum.copy_(self.embed * counts[:, None])
        self.replace_dead_codes(x)
        self.inited.fill_(True)

    def update(self, x, index):
        """One step of the averages. Dead codes are replaced after it, or it would move them back."""
        counts, sums = self.count(x, index)
        self.steps += 1
        weight = 1 - torch.clamp(self.steps / (9 + self.steps), max=self.decay)
        self.cluster_size.lerp_(counts, weight)
        self.embed_sum.lerp_(sums, weight)
        self.embed.copy_(self.embed_sum / self.cluster_size[:, None].clamp(min=1e-9))
        self.replace_dead_codes(x)

    def replace_dead_codes(self, x):
        """Move every dead code to a random vector of x (N, D): embed, embed_sum and cluster_size alike."""
        threshold = self.dead_code_threshold * self.cluster_size.mean()
        dead = self.cluster_size < threshold  # (V,)
        self.cluster_size.copy_(torch.where(dead, 2 * threshold, self.cluster_size))
        self.embed.copy_(torch.where(dead[:, None], self.random_vectors(x), self.embed))
        new_sum = self.embed * self.cluster_size[:, None]
        self.embed_sum.copy_(torch.where(dead[:, None], new_sum, self.embed_sum))

    @torch.no_grad()
    def forward(self, x, update: bool = True):
        """(N, D) to quantized (N, D) and index (N,); in training mode the codebook may then learn from x."""
        update = update and self.training
        if update:
            x = torch.nan_to_num(x, 0, 0, 0)  # a single NaN would stay in the averages for ever
            if not self.is_inited:
                if not self.inited:
                    self.kmeans_init(x)
                self.is_inited = True
        index = self.nearest(x)
        quantized = self.embed[index]
        if update:
            self.update(x, index)
        return quantized, index


class ResidualVQ(nn.Module):
    """K codebooks in a row, each coding what the ones before it left over (SoundStream, section III-C).

    K = 1 is plain vector quantization. More streams are the paper's section 3.2."""

    def __init__(self, streams: int, codebook_size: int, dim: int = 128):
        super().__init__()
        self.codebooks = nn.ModuleList(VectorQuantizer(codebook_size, dim) for _ in range(streams))

    def forward(self, z, update: bool = True):
        """z (B, F, D) -> z_q (B, F, D) with straight-through gradient, codes (B, K, F), commitment loss ().

        The commitment loss is the mean over codebooks, vectors and dimensions of (residual - quantized)^2.
        `quantized` has no gradient, so every residual has that of z: all codebooks train the encoder. With
        the straight-through estimator inside the loop, the residuals after the first would have none.
        Everything is in float32: in 16 bits, rounding hides the differences between similar distances."""
        B, n_frames, D = z.shape
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            residual = z.reshape(-1, D)  # (N, D)
            codes, commitment, z_q = [], z.new_zeros(()), torch.zeros_like(residual)
            for codebook in self.codebooks:
                quantized, index = codebook(residual, update)
                commitment = commitment + F.mse_loss(residual, quantized)
                residual = residual - quantized
                z_q = z_q + quantized
                codes.append(index.view(B, n_frames))
            z_q = z + (z_q.view_as(z) - z).detach()  # straight through: z_q, with z's gradient
        return z_q, torch.stack(codes, 1), commitment / len(self.codebooks)

    def decode(self, codes):
        """Codes (B, K, F) to the sum of their vectors (B, F, D)."""
        return sum(codebook.embed[codes[:, k]] for k, codebook in enumerate(self.codebooks))


# ----------------------------------------------------------------------------------------------------------
# The codec


class Codec(nn.Module):
    """Encoder, residual quantizer and decoder. In training mode a forward pass also updates the codebooks."""

    def __init__(self, cfg: CodecConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.quantizer = ResidualVQ(cfg.streams, cfg.codebook_size, cfg.dim)
        self.decoder = Decoder(cfg)
        # Biases start at 0. PyTorch's random ones are larger than most sounds: after the LayerNorm all frames
        # would look alike, and the decoder would learn to ignore them (after 100 steps 9 to 42 % of each
        # codebook were in use, instead of 83 to 95 %).
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)

    def latents(self, wave):
        """Wave (B, T) to z (B, F, D), F = ceil(T / hop): the end is padded with silence to a whole frame."""
        if wave.dim() != 2 or not wave.is_floating_point():
            what = f"expected floats (B, T), got {wave.dtype} {tuple(wave.shape)}"
            raise CodecError(f"{what}: for one wave in [-1, 1], give wave[None]")
        wave = F.pad(wave, (0, -wave.shape[1] % self.cfg.hop))
        return self.encoder(wave[:, :, None])

    def forward(self, wave):
        """Wave (B, T) -> wave_hat (B, T), codes (B, K, F), commitment loss ()."""
        z_q, codes, commitment = self.quantizer(self.latents(wave))
        wave_hat = self.decoder(z_q)[:, : wave.shape[1], 0].float()
        return wave_hat, codes, commitment

    @torch.no_grad()
    def encode(self, wave):
        """Wave (B, T) in [-1, 1] at 16 kHz to codes (B, K, F) int64, F = ceil(T / hop). Never trains."""
        with torch.autocast(wave.device.type, enabled=False):
            return self.quantizer(self.latents(wave), update=False)[1]

    @torch.no_grad()
    def decode(self, codes):
        """Codes (B, K, F) to wave (B, F * hop)."""
        return self.decoder(self.quantizer.decode(codes))[:, :, 0]

    @torch.no_grad()
    def decode_stream(self, chunks):
        """Chunks of codes (B, K, f) to pieces of the wave, which together equal `decode` of the whole.

        A convolution needs `margin` frames on both sides of what it computes; the LSTM only looks back, and
        keeps its state. So sound comes out 2 * margin frames after its codes went in:

            codes that have gone in     0 ---------------------------------------- now
            through `inp` and the LSTM  0 ------------------------- now - margin
            played                      0 ---------- now - 2 margin

        Kept for the next chunk are the last 2 * margin latents and the last 2 * margin outputs of the LSTM:
        half of each is the past, half the future, of what is computed next."""
        margin = 3  # `Decoder.inp` has a kernel of 7: 3 frames on each side; `Decoder.up` needs only 2
        hop = self.cfg.hop
        z, x, state = None, None, None  # latents and LSTM outputs from which the next frames will be made
        x_past = 0  # how many frames of x have been played, and are kept as the past of the others
        for chunk in itertools.chain(chunks, [None]):  # None: that was the last
            is_last = chunk is None
            if is_last and z is None:  # there were no codes at all
                return
            new = torch.zeros_like(z[:, :margin]) if is_last else self.quantizer.decode(chunk)
            z = F.pad(new, (0, 0, margin, 0)) if z is None else torch.cat((z, new), 1)  # as `inp` pads
            if z.shape[1] > 2 * margin:
                y, state = self.decoder.lstm(self.decoder.inp(z)[:, margin:-margin], state)
                x = y if x is None else torch.cat((x, y), 1)
                z = z[:, -2 * margin :]
            if x is None:
                continue
            ready = x.shape[1] if is_last else x.shape[1] - margin
            if ready > x_past:
                yield self.decoder.to_wave(x)[:, x_past * hop : ready * hop, 0]
                x, x_past = x[:, max(ready - margin, 0) :], min(ready, margin)

    def hash(self) -> str:
        """A fingerprint of encoder and codebooks, which decide what the codes mean.

        A language model remembers its codec's hash. Training the decoder alone does not change it."""
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
        """The codec in a checkpoint, in evaluation mode and float32. CodecError: the file is not one."""
        checkpoint = load_checkpoint(path, "nanoaudiogen codec")
        try:
            codec = Codec(CodecConfig(**checkpoint["config"]))
            codec.load_state_dict(checkpoint["model"])
        except (KeyError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise CodecError(f"{path}: of another version ({reason}): train it again") from None
        return codec.to(device).eval()


def load_checkpoint(path, kind: str) -> dict:
    """A checkpoint of this kind, loaded without running code from the file; CodecError for anything else.
    (codec.py and lm.py have the same one, for each can be copied alone.)"""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CodecError(f"{path}: no such checkpoint: train one first, or name another") from None
    except Exception as e:  # noqa: BLE001 (torch.load raises a dozen types for broken files)
        reason = (str(e).splitlines() or [type(e).__name__])[0][:80]
        raise CodecError(f"{path}: truncated, or not a checkpoint ({reason}): name another file") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != kind:
        found = checkpoint.get("kind") if isinstance(checkpoint, dict) else None
        raise CodecError(f"{path}: expected a {kind}, found {found or 'another project'}: name another file")
    return checkpoint


# ----------------------------------------------------------------------------------------------------------
# Losses of the reconstruction


@functools.lru_cache
def hann_window(n_fft: int, device: torch.device):
    """A Hann window (n_fft,) of norm 1: white noise is equally loud at every length of the window."""
    window = torch.hann_window(n_fft, device=device)
    return window / window.norm()


def stft(wave, n_fft: int):
    """Wave (B, T) to its complex spectrum (B, n_fft / 2 + 1, frames), hop a quarter of the window."""
    window = hann_window(n_fft, wave.device)
    return torch.stft(wave, n_fft, n_fft // 4, window=window, pad_mode="constant", return_complex=True)


def mel_filters(n_fft: int, n_mels: int):
    """Triangular filters, centres evenly spaced on the mel scale 2595 log10(1 + f / 700) from 0 to 8 kHz.

    Returns (n_fft // 2 + 1, M). The outermost centres lie on the edges, so that the weights of every bin sum
    to 1: usual filter banks ignore 0 Hz and 8 kHz, where strided decoders leave tones. A window with too few
    bins for n_mels bands would leave bands that lie between two bins and always read 0; M is then the largest
    number of bands that each contain a bin."""
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
    """l_f of section 3.1: L1 and L2 distance of mel spectra S at windows 2^5 .. 2^11, hop a quarter of it.

    `n_mels` is the number of bands at every window; 0: a quarter of the window, at least 64.

        mean over windows of  mean |S(x) - S(y)|  +  mean over frames of ||log S(x) - log S(y)||_2 / sqrt(M)

    What differs from the paper, each settled by measurement (experiments/README.md):
    - both terms weigh 1 at every window, as in EnCodec: weights that grow with the window blur attacks;
    - windows from 512 on have about a quarter of their length as bands, not 64, which cannot tell harmonics
      above 2 kHz from noise; shorter ones have fewer than 64, as many as their bins allow (`mel_filters`);
    - the L2 norm is that of each frame's bands: one bad frame must not outweigh all others;
    - log S is log(S + floor) with a floor of 1e-3: the gradient of a logarithm is one over its argument, and
      with 1e-5 what is loud has no weight beside what is nearly silent, and comes out 10 dB too quiet."""

    def __init__(self, exponents=range(5, 12), n_mels: int = 0, floor: float = 1e-3):
        super().__init__()
        self.windows, self.floor = [2**i for i in exponents], floor
        for n in self.windows:
            self.register_buffer(f"filters{n}", mel_filters(n, n_mels or max(64, n // 4)), persistent=False)

    def mel(self, wave, n: int):
        """Wave (B, T) to its mel spectrum (B, frames, M) at window n."""
        return stft(wave, n).abs().transpose(1, 2) @ getattr(self, f"filters{n}")

    def forward(self, target, estimate):
        """Both (B, T) -> loss (). Gradient flows to the estimate only."""
        loss = 0.0
        for n in self.windows:
            with torch.no_grad():
                x = self.mel(target, n)
            y = self.mel(estimate, n)
            squares = ((y + self.floor).log() - (x + self.floor).log()).square().mean(-1)  # (B, frames)
            loss = loss + (y - x).abs().mean() + (squares + 1e-12).sqrt().mean()
        return loss / len(self.windows)


# ----------------------------------------------------------------------------------------------------------
# The adversary (section 3.1; EnCodec, section 3.4)


def fold(x):
    """(B, C, frames, bins) to (B, 2 C, frames, bins / 2): pairs of neighbouring bins become channels.

    A kernel of 4 folded bins covers what a kernel of 8 bins with a stride of 2 covers, whose gradient is slow
    on GPUs."""
    return x.unflatten(3, (-1, 2)).permute(0, 4, 1, 2, 3).flatten(1, 2)


def compress(spectrum, exponent: float = 0.3, floor: float = 1e-3):
    """Complex x to about x |x|^(exponent - 1): the phase stays, and 60 dB of magnitude become 18.

    What a decoder gets wrong is quiet (harmonics above 2 kHz, hiss), and a convolution hears what is loud."""
    return spectrum * (spectrum.abs().square() + floor**2) ** ((exponent - 1) / 2)


class DiscriminatorSTFT(nn.Module):
    """One scale: 2-d convolutions over a compressed STFT, its real and imaginary part as two channels."""

    def __init__(self, n_fft: int, filters: int):
        super().__init__()
        self.n_fft = n_fft
        self.convs = nn.ModuleList([Conv2d(2, filters, (3, 8), padding=(1, 4))])
        for dilation in (1, 2, 4):  # the paper's 3 x 8 with stride 2, see `fold`
            layer = Conv2d(2 * filters, filters, (3, 4), dilation=(dilation, 1), padding=(dilation, 2))
            self.convs.append(layer)
        self.convs.append(Conv2d(filters, filters, (3, 3), padding=(1, 1)))
        self.conv_post = Conv2d(filters, 1, (3, 3), padding=(1, 1))

    def forward(self, wave):
        """Wave (B, T) -> logits (B, 1, frames, bands), and the features of every layer."""
        spectrum = compress(stft(wave, self.n_fft))  # (B, bins, frames)
        x = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # (B, 2, frames, bins)
        features = []
        for layer in self.convs:
            if layer.in_channels > x.shape[1]:  # the three layers in the middle take pairs of bins
                x = fold(x)  # from n / 2 + 1 bins, one more after the even kernel, to n / 4 + 1, and so on
            x = F.leaky_relu(layer(x), 0.2)  # (B, filters, frames, bins of this layer)
            features.append(x)
        return self.conv_post(x).float(), features


class MultiScaleSTFTDiscriminator(nn.Module):
    """MS-STFT discriminator (EnCodec, section 3.4): the same network at five windows."""

    def __init__(self, filters: int = 32, windows=(2048, 1024, 512, 256, 128)):
        super().__init__()
        self.scales = nn.ModuleList(DiscriminatorSTFT(n, filters) for n in windows)

    def forward(self, wave):
        """Wave (B, T) -> the logits of each scale, and the lists of its features."""
        logits, features = zip(*(scale(wave) for scale in self.scales))
        return logits, features


def discriminator_loss(real, fake):
    """l_d of section 3.1, a hinge: mean over the scales of max(0, 1 - D(x)) + max(0, 1 + D(x_hat))."""
    losses = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake)]
    return sum(losses) / len(losses)


def generator_loss(fake):
    """l_g of section 3.1, a hinge: mean over the scales of max(0, 1 - D(x_hat))."""
    return sum(F.relu(1 - f).mean() for f in fake) / len(fake)


def feature_loss(real, fake):
    """l_feat of section 3.1: mean over scales and layers of the L1 distance of their features."""
    distances = []
    for real_layers, fake_layers in zip(real, fake):
        for r, f in zip(real_layers, fake_layers):
            distances.append((f - r.detach()).abs().mean(dtype=torch.float32))
    return sum(distances) / len(distances)


class Balancer(nn.Module):
    """Makes a loss's weight its share of the gradient, whatever its scale (EnCodec, section 3.4).

        g = sum_i  w_i / (sum_j w_j) * g_i / max(||g_i||, <||g_i||>)      for every clip

    g_i is the gradient of loss i with respect to one clip's output, ||.|| its norm (times B, since losses are
    means over the batch), <.> the mean over clips and a moving average over steps, bias-corrected as in Adam.
    The maximum is ours (EnCodec divides by the average): no clip's gradient exceeds the loss's share.
    Nearly silent clips would otherwise dominate, for the slope of a logarithm is one over the magnitude.
    The averages are buffers, so that checkpoints hold them."""

    def __init__(self, names, decay: float = 0.999):
        super().__init__()
        self.names, self.decay = list(names), decay
        self.average_norm = nn.Buffer(torch.zeros(len(self.names)))
        self.steps = nn.Buffer(torch.zeros(len(self.names)))

    def forward(self, losses: dict, weights: dict, output):
        """Losses and their weights by name, output (B, T) -> gradient (B, T) to send back from there."""
        active = [name for name in losses if weights[name] > 0]
        gradient = torch.zeros_like(output)
        for name in active:
            i = self.names.index(name)
            (g,) = torch.autograd.grad(losses[name], output, retain_graph=True)
            clip_norms = len(g) * g.norm(dim=1, keepdim=True)  # (B, 1)
            batch_norm = clip_norms.mean()
            if dist.is_initialized():
                dist.all_reduce(batch_norm)
                batch_norm = batch_norm / dist.get_world_size()
            if torch.isfinite(batch_norm):  # one bad step must not stay in the average for ever
                self.average_norm[i].lerp_(batch_norm, 1 - self.decay)
                self.steps[i] += 1
            average = self.average_norm[i] / (1 - self.decay ** self.steps[i])
            share = weights[name] / sum(weights[n] for n in active)
            gradient += share * g / torch.maximum(clip_norms, average + 1e-12)
        return gradient


# ----------------------------------------------------------------------------------------------------------
# Measures of a codec: waves (B, T) to one value for each clip (B,), and of the use of its codebooks


def si_snr(target, estimate):
    """Scale-invariant signal-to-noise ratio in dB (arXiv 1811.02508); higher is better.

    10 log10(|a x|^2 / |a x - y|^2)  with  a = <x, y> / <x, x>,  both without their mean"""
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

    It sees fine structure that a mel spectrum averages away: two noises of one spectrum are .30 apart."""
    distances = []
    for n in windows:
        least = floor / math.sqrt(3 * n / 8)  # the floor is meant for a plain Hann window, of this norm
        x, y = (stft(wave, n).abs().clamp(min=least).log10() for wave in (target, estimate))
        distances.append((x - y).abs().mean((1, 2)))
    return torch.stack(distances).mean(0)


def perplexity(counts) -> float:
    """How often each code was used (V,) -> how many codes are effectively in use: exp of the entropy."""
    return math.exp(torch.special.entr(counts / counts.sum()).sum())


def code_counts(codes, codebook_size: int):
    """Codes (B, K, F) -> for each stream how often each of its codes was used (K, V)."""
    counts = [torch.bincount(stream.flatten(), minlength=codebook_size) for stream in codes.unbind(1)]
    return torch.stack(counts).float()
