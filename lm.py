"""The audio language model: words become K streams of codes.

    text ids --TextEncoder--> u ;   Z = [u, v]   --causal transformer with cross-attention to u--> codes

AudioGen (arXiv 2209.15352), section 3.2 and 3.3; guidance from section 3.2, eq. of the sampling distribution.
Trained by `train_lm.py`; this file needs PyTorch alone and can be copied into another project.

- The K codes of a frame are embedded by K tables, whose mean is one vector; K heads predict the codes of the
  next frame independently of each other.
- Text reaches the sound twice, as in the paper: as a prefix of the sequence and through cross-attention.
- Every text is brought to exactly `window` places. The text encoder looks at words only, but writes to all
  places, so that each u says something. The decoder then needs no mask and always runs the fused kernel, and
  the empty caption (for guidance) is a text too.
- Frame j is predicted from a learnt start vector and the frames before j.

Letters: B batch, N text tokens, K streams, F frames, V codes per book, d width, H heads, S cache places.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {  # decoder layers, heads, width, text encoder layers; parameters at K = 4, vocabulary 8000
    "tiny": (4, 4, 256, 2),  # 9 M (7 M with a small vocabulary), for a CPU
    "base": (24, 12, 768, 7),  # 285 M, as the paper's base
    "large": (36, 20, 1280, 3),  # 1 B, as the paper's large
}


@dataclass
class LMConfig:
    """Everything needed to rebuild a model; it is stored in every checkpoint."""

    streams: int = 4
    size: str = "tiny"
    vocab: int = 8000  # text tokens, 0 is padding
    window: int = 64  # text tokens per caption
    frames: int = 0  # audio frames per training example; 0 means five seconds
    dropout: float = 0.0  # of what enters the residual stream; in attention it would cost the fused kernel

    def __post_init__(self):
        if self.streams not in (1, 2, 4, 8):
            raise ValueError(f"streams is {self.streams}, but must be one of 1, 2, 4, 8: type --streams 4")
        if self.size not in SIZES:
            raise ValueError(f"model size {self.size!r} is unknown: type --size " + " or ".join(SIZES))
        self.frames = self.frames or -(-2500 // self.streams)  # rounded up, as the codec does
        self.layers, self.heads, self.width, self.text_layers = SIZES[self.size]
        self.codes = 2048 // self.streams  # per book, V


def turns(places: int, size: int):
    """(2, places, size): the cosine and sine of the angles by which `rotate` turns the pairs of a head."""
    angle = torch.arange(places)[:, None] / 10000 ** (torch.arange(0, size, 2) / size)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)))


def rotate(x, turn):
    """Queries and keys (2, B, H, T, d / H), each pair turned by an angle that grows with its place (RoPE,
    arXiv 2104.09864): a product of the two then knows how far apart they are, which a table of learnt
    positions has to find out for every pair of places. (2, T, d / H) are the `turns` of these places;
    with a place of its own for each clip they are (2, B, 1, T, d / H)."""
    cos, sin = turn.to(x.dtype)
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin  # the pairs are the two halves of a head


class SelfAttention(nn.Module):
    def __init__(self, cfg: LMConfig, causal: bool):
        super().__init__()
        self.heads, self.causal = cfg.heads, causal
        self.c_attn = nn.Linear(cfg.width, 3 * cfg.width)
        self.c_proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x, turn=None, cache=None, step=None, mask=None):
        """x (B, T, d), whose places have these `turns`. With a cache (2, B, H, S, d / H), keys and values are
        kept; `step` is then None for the first T places at once, or for a single one its place (1,), and
        `mask` says what it may see."""
        B, T, d = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # (B, H, T, d / H) each
        if turn is not None:
            q, k = rotate(qkv[:2], turn)
        if step is None:
            if cache is not None:
                cache[:, :, :, :T] = torch.stack((k, v))
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)
        else:
            cache.index_copy_(3, step, torch.stack((k, v)).to(cache.dtype))
            y = F.scaled_dot_product_attention(q.to(cache.dtype), *cache, attn_mask=mask).to(x.dtype)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, d))


class CrossAttention(nn.Module):
    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.heads = cfg.heads
        self.c_q = nn.Linear(cfg.width, cfg.width)
        self.c_kv = nn.Linear(cfg.width, 2 * cfg.width)
        self.c_proj = nn.Linear(cfg.width, cfg.width)

    def keys(self, u):
        """Text (B, N, d) to keys and values (2, B, H, N, d / H): once per prompt, not once per frame."""
        B, N, _ = u.shape
        return self.c_kv(u).view(B, N, 2, self.heads, -1).permute(2, 0, 3, 1, 4)

    def forward(self, x, keys):
        B, T, d = x.shape
        q = self.c_q(x).view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, d / H)
        y = F.scaled_dot_product_attention(q.to(keys.dtype), *keys).to(x.dtype)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, d))


class MLP(nn.Module):
    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.c_fc = nn.Linear(cfg.width, 4 * cfg.width)
        self.c_proj = nn.Linear(4 * cfg.width, cfg.width)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class TextBlock(nn.Module):
    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(cfg.width), SelfAttention(cfg, causal=False)
        self.ln_2, self.mlp = nn.LayerNorm(cfg.width), MLP(cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x, mask):
        x = x + self.drop(self.attn(self.ln_1(x), mask=mask))
        return x + self.drop(self.mlp(self.ln_2(x)))


class Block(nn.Module):
    """A GPT-2 block with the paper's addition: cross-attention from sound to text."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(cfg.width), SelfAttention(cfg, causal=True)
        self.ln_2, self.cross = nn.LayerNorm(cfg.width), CrossAttention(cfg)
        self.ln_3, self.mlp = nn.LayerNorm(cfg.width), MLP(cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x, keys, turn, cache=None, step=None, mask=None):
        x = x + self.drop(self.attn(self.ln_1(x), turn, cache, step, mask))
        x = x + self.drop(self.cross(self.ln_2(x), keys))
        return x + self.drop(self.mlp(self.ln_3(x)))


class TextEncoder(nn.Module):
    """Text ids (B, N) to u (B, window, d): a small bidirectional transformer, in place of the paper's T5."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.window = cfg.window
        self.wte = nn.Embedding(cfg.vocab, cfg.width)
        self.wpe = nn.Embedding(cfg.window, cfg.width)
        self.drop = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(TextBlock(cfg) for _ in range(cfg.text_layers))
        self.ln_f = nn.LayerNorm(cfg.width)

    def forward(self, text):
        if text.shape[1] > self.window:
            raise ValueError(f"the text has {text.shape[1]} tokens of at most {self.window}: use fewer words")
        text = F.pad(text, (0, self.window - text.shape[1]))
        x = self.drop(self.wte(text) + self.wpe.weight)  # (B, window, d)
        words = text != 0
        words[:, 0] = True  # of an empty text the padding itself is read
        for block in self.blocks:
            x = block(x, words[:, None, None])
        return self.ln_f(x)


class PackedLinear(nn.Module):
    """A linear layer for sampling on a CPU, its weight in the order in which the kernel reads it. Put so anew
    at every call, as `nn.Linear` does, it takes half as long again in bfloat16 and twice as long in float32.
    torch.compile uses these operators, too, after half a minute; they have no gradient."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Replay:
    """A function of tensors as one CUDA graph: a single launch instead of one for each of its kernels, which
    are small and would be over before the next is launched."""

    def __init__(self, function, *inputs):
        self.inputs, device = [x.clone() for x in inputs], inputs[0].device  # need not be the current one
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # at its first call a library sets itself up, which is not for a graph
            for _ in range(3):
                function(*self.inputs)
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
            self.output = function(*self.inputs)

    def __call__(self, *inputs):
        """Its results; the next call overwrites them."""
        for mine, x in zip(self.inputs, inputs):
            mine.copy_(x)
        self.graph.replay()
        return self.output


class AudioLM(nn.Module):
    """GPT over [text, codes]. `tokenizer` (its bytes) and `codec_hash` are what it was trained with."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.cfg = cfg
        self.tokenizer, self.codec_hash = None, None
        self.text_encoder = TextEncoder(cfg)
        self.wte = nn.Embedding(cfg.streams * cfg.codes, cfg.width)  # the K tables, one after the other
        self.start = nn.Parameter(0.02 * torch.randn(cfg.width))
        self.drop = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.ln_f = nn.LayerNorm(cfg.width)
        self.heads = nn.Linear(cfg.width, cfg.streams * cfg.codes, bias=False)  # K heads in one product
        self.first = nn.Buffer(torch.arange(cfg.streams) * cfg.codes, persistent=False)  # row of each table
        self.turn = nn.Buffer(turns(cfg.window + cfg.frames, cfg.width // cfg.heads), persistent=False)
        # GPT-2: normal(.02), and what is added to the residual stream is scaled by the number of additions.
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                branches = 2 * cfg.text_layers if name.startswith("text_encoder") else 3 * cfg.layers
                nn.init.normal_(p, std=0.02 / (math.sqrt(branches) if name.endswith("c_proj.weight") else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @torch.no_grad()
    def start_from(self, books):
        """Let tables and heads begin as the codec's vectors (K, V, D), turned at random into d dimensions.

        The mean of a frame's K embeddings is then its quantised latent, and codes that sound alike are alike
        from the first step on. In a run of 450 steps that is worth a third of the steps."""
        books = books - books.mean(1, keepdim=True)
        turn = torch.randn(books.shape[2], self.cfg.width, device=books.device) / math.sqrt(books.shape[2])
        tables = books / books.square().mean().sqrt() @ turn  # louder books stay louder
        heads = books / books.square().mean((1, 2), keepdim=True).sqrt() @ turn  # each is its own softmax
        self.wte.weight.copy_(0.04 * tables.flatten(0, 1))
        self.heads.weight.copy_(0.02 * heads.flatten(0, 1))

    def embed(self, codes):
        """Codes (B, K, F) to the mean of their K embeddings (B, F, d) (section 3.3)."""
        return self.wte(codes.transpose(1, 2) + self.first).mean(2)

    def to_logits(self, x):
        """(B, F, d) to (B, K, F, V)."""
        return self.heads(self.ln_f(x)).unflatten(2, (self.cfg.streams, -1)).transpose(1, 2)

    def forward(self, codes, text, heard=None, begin=None):
        """Codes (B, K, F), text ids (B, N) padded with 0 -> logits (B, K, F, V), loss (): the mean
        cross-entropy over streams and audio frames; text is never predicted. F is at most `cfg.frames`. Where
        `heard` (B,) is 0 instead of 1, every frame has to be predicted from the words alone. `begin` (B,) is
        the place of the first frame in its clip, 0 if not given, at most `cfg.frames` - F."""
        if codes.shape[2] > self.cfg.frames:
            raise ValueError(f"{codes.shape[2]} frames, the model reads {self.cfg.frames}: cut the clip")
        u = self.text_encoder(text)  # (B, N, d)
        logits = self.predict(u, codes, heard, begin)
        loss = F.cross_entropy(logits.flatten(0, 2).float(), codes.flatten())
        return logits, loss

    def predict(self, u, codes, heard=None, begin=None):
        """Logits (B, K, F, V) of every frame given the text u and the frames before it."""
        x = self.drop(self.inputs(codes[:, :, :-1], heard))  # (B, F, d)
        x = torch.cat((u, x), 1)  # (B, N + F, d)
        turn = self.turn[:, : x.shape[1]]
        if begin is not None:  # the sound is as far from its text as it will be in a whole clip
            place = torch.arange(x.shape[1], device=x.device)
            place = place + (place >= u.shape[1]) * begin[:, None]  # (B, N + F)
            turn = self.turn[:, place][:, :, None]  # (2, B, 1, N + F, d / H)
        for block, keys in zip(self.blocks, self.keys(u)):
            x = block(x, keys, turn)
        return self.to_logits(x[:, u.shape[1] :])

    def keys(self, u):
        """What the cross-attention of each block reads of the text u."""
        return [block.cross.keys(u) for block in self.blocks]

    def inputs(self, codes, heard=None):
        """The start vector and the given frames: (B, 1 + F, d)."""
        start, v = self.start.expand(len(codes), 1, -1), self.embed(codes)
        if heard is not None:
            v = v * heard[:, None, None]
        return torch.cat((start, v), 1)

    # ------------------------------------------------------------------------------------------------------
    # Sampling

    @torch.no_grad()
    def generate(self, text, frames: int, **options):
        """Text ids (B, N) to codes (B, K, frames); options as in `generate_stream`."""
        return torch.cat(list(self.generate_stream(text, frames, **options)), 2)

    @torch.no_grad()
    def generate_stream(self, text, frames: int, seeds=None, guidance: float = 3.0, temperature: float = 1.0,
                        top_k: int = 0, top_p: float = 0.0, negative=None, prefix=None, block: int = 25):
        """Text ids (B, N) to an iterator of code blocks (B, K, up to `block`), `frames` in all.

        A prompt's result depends on its own seed, not on the batch. Guidance g samples from
        g log p(v | text) + (1 - g) log p(v), where `negative` (B, N) may stand in for "no text". `prefix`
        (B, K, P) is continued and not repeated. Past the trained length the window slides: the model goes on
        from the second half of what it can see."""
        B = len(text)
        seeds = range(B) if seeds is None else seeds
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        guided = guidance != 1
        if guided:
            without = torch.zeros_like(text) if negative is None else negative
            width = max(text.shape[1], without.shape[1])
            text = torch.cat([F.pad(t, (0, width - t.shape[1])) for t in (text, without)])  # (2 B, N)
        u = self.text_encoder(text)
        # One query at a time, a CPU's attention in bfloat16 takes six times as long as in float32.
        kept = torch.float32 if u.device.type == "cpu" else u.dtype
        keys = [k.to(kept) for k in self.keys(u)]
        cfg, places = self.cfg, u.shape[1] + self.cfg.frames
        on_device = torch.arange(places, device=u.device)
        kept_places = -(-places // 8) * 8  # GPU kernels want masks of such lengths
        shape = (cfg.layers, 2, len(u), cfg.heads, kept_places, cfg.width // cfg.heads)
        cache = torch.zeros(shape, dtype=kept, device=u.device)

        def tick(logits, noise, place, cache=cache):
            """Choose a frame (B, K), and read it: what it says of the next (2 B, K, V)."""
            code = choose(guide(logits, guidance), noise, temperature, top_k, top_p)
            return code, self.step(code.repeat(len(u) // B, 1), place, keys, cache)

        if u.is_cuda:
            noise = torch.zeros(B, cfg.streams, cfg.codes, device=u.device)
            tick = Replay(tick, noise.to(u.dtype).repeat(len(u) // B, 1, 1), noise, on_device[:1])

        history = text.new_zeros(B, cfg.streams, 0) if prefix is None else prefix
        made = 0
        while made < frames:
            history = history[:, :, -(cfg.frames // 2) :]
            seen = history.repeat(len(u) // B, 1, 1)  # both halves hear the same sound
            x = torch.cat((u, self.inputs(seen)), 1)
            for layer, k, c in zip(self.blocks, keys, cache):
                x = layer(x, k, self.turn[:, : x.shape[1]], c)
            logits = self.to_logits(x[:, -1:])[:, :, 0]  # (2 B, K, V)
            given = history.shape[2]
            room = min(cfg.frames - given, frames - made)
            for first in range(0, room, block):
                n = min(block, room - first)
                draws = (n, cfg.streams, cfg.codes)
                noise = torch.stack([torch.rand(draws, generator=g) for g in generators]).to(u.device)
                chosen = []
                for i in range(n):
                    place = min(u.shape[1] + given + first + i + 1, places - 1)  # beyond it nothing is read
                    # A CPU looks at only so much of the cache as is filled, in few different shapes.
                    visible = [] if u.is_cuda else [cache[:, :, :, :, : place // 64 * 64 + 64]]
                    code, logits = tick(logits, noise[:, i], on_device[place : place + 1], *visible)
                    chosen.append(code.clone())
                codes = torch.stack(chosen, 2)
                yield codes
                made += n
                history = torch.cat((history, codes), 2)

    def pack(self):
        """Ready the model for sampling, in place: on an x86 its matrices are packed once and for all. It can
        then no longer be trained or saved."""
        x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
        if x86 and torch.backends.mkldnn.is_available() and self.start.device.type == "cpu":
            for parent in [self, *self.blocks.modules()]:
                for name, layer in list(parent.named_children()):
                    if isinstance(layer, nn.Linear):
                        setattr(parent, name, PackedLinear(layer))
        return self

    def step(self, codes, place, keys, cache):
        """One frame (B, K) at `place` (1,) of the sequence to the logits of the next (B, K, V). Nothing in it
        waits for a transfer, so that a GPU can replay it."""
        x, turn = self.embed(codes[:, :, None]), self.turn[:, place]  # (B, 1, d)
        mask = torch.arange(cache.shape[4], device=x.device)[None] <= place  # (1, S)
        for layer, k, c in zip(self.blocks, keys, cache):
            x = layer(x, k, turn, c, place, mask)
        return self.to_logits(x)[:, :, 0]

    # ------------------------------------------------------------------------------------------------------
    # Accounting and files

    def flops_per_frame(self) -> float:
        """Of training: 6 per weight that a frame passes, and 12 d per frame that attention looks at."""
        weights = sum(p.numel() for p in self.blocks.parameters()) + self.heads.weight.numel()
        cfg = self.cfg
        attention = 12 * cfg.layers * cfg.width * ((cfg.window + cfg.frames) / 2 + cfg.window)
        text = 6 * sum(p.numel() for p in self.text_encoder.blocks.parameters()) * cfg.window / cfg.frames
        prefix = 1 + cfg.window / cfg.frames  # the decoder runs over the text, too
        return (6 * weights + attention) * prefix + text

    def checkpoint(self) -> dict:
        """What `load` reads; the scripts add what they need beside it."""
        return {"kind": "nanoaudiogen lm", "config": asdict(self.cfg), "model": self.state_dict(),
                "tokenizer": self.tokenizer, "codec_hash": self.codec_hash}

    @staticmethod
    def load(path, device="cpu", codec_hash=None) -> "AudioLM":
        """The model in a checkpoint, in evaluation mode and float32. ValueError where the file is not one, or
        where it was trained on the codes of another codec than the one with this hash."""
        checkpoint = load_checkpoint(path, "nanoaudiogen lm")
        try:
            lm = AudioLM(LMConfig(**checkpoint["config"]))
            lm.load_state_dict(checkpoint["model"])
            lm.tokenizer, lm.codec_hash = checkpoint["tokenizer"], checkpoint["codec_hash"]
        except (KeyError, TypeError, RuntimeError) as e:
            reason = str(e).splitlines()[0]
            raise ValueError(f"{path}: of another version ({reason}): train it again") from None
        if codec_hash and codec_hash != lm.codec_hash:
            raise ValueError(f"{path} learnt the codes of codec {lm.codec_hash}, not of {codec_hash}: name "
                             "the codec it was trained with by --codec, or train it again")
        return lm.to(device).eval()


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


def guide(logits, guidance: float):
    """Classifier-free guidance on normalised log-probabilities: (2 B, K, V), text first, to (B, K, V)."""
    logp = logits.float().log_softmax(-1)
    if guidance == 1:
        return logp
    given, free = logp.chunk(2)
    return guidance * given + (1 - guidance) * free


def choose(logp, noise, temperature: float = 1.0, top_k: int = 0, top_p: float = 0.0):
    """One code for each stream: scores (B, K, V) and uniform noise of the same shape to codes (B, K).

    argmax(p / q) with q exponential is a draw from p (the Gumbel trick): no loop over rows, no wait for the
    GPU, and the noise can come from a generator of each prompt's own."""
    if temperature == 0:
        return logp.argmax(-1)
    logp = (logp / temperature).log_softmax(-1)
    if top_k:
        kth = logp.topk(min(top_k, logp.shape[-1]))[0][..., -1:]
        logp = logp.masked_fill(logp < kth, -math.inf)
    if top_p:
        ordered, order = logp.softmax(-1).sort(-1, descending=True)
        beyond = (ordered.cumsum(-1) - ordered) >= top_p  # the first code always stays
        logp = logp.masked_fill(beyond.gather(-1, order.argsort(-1)), -math.inf)
    return (logp - torch.log(-torch.log(noise.clamp(1e-10, 1 - 1e-7)))).argmax(-1)
