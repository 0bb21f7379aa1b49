"""The audio language model: words become K streams of codes.

    text ids       --TextEncoder-->  u
    codes so far   --embed-->        v
    Z = [u, v]     --causal transformer, with cross-attention to u-->  codes of the next frame

AudioGen (arXiv 2209.15352), section 3.2. From elsewhere: rotary positions (RoFormer, 2104.09864) and
classifier-free guidance (2207.12598). Trained by `train_lm.py`; this file needs PyTorch alone and can be
copied into another project.

- Each of the K codes of a frame is looked up in a table of its own, and the mean of the K vectors is the
  frame's input; K heads predict the codes of the next frame independently of each other.
- Text reaches the sound twice, as in the paper: as a prefix of the sequence and through cross-attention.
- Every text is padded to `max_text_len` positions. The text encoder looks at words only, but writes to all
  positions, so that each u says something: the GPT needs no mask for padding and always runs the fused
  kernel, and the empty caption, for guidance, is a text too.
- Frame j is predicted from a learnt start vector (`bos`) and the frames before j.

Letters: B batch, N text tokens (in u always max_text_len), K streams, F frames, V codes in a codebook,
d width, D the codec's width, H heads, L layers, T positions of any sequence, S those of the cache.
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


class LMError(ValueError):
    """An error that the user can fix: a wrong setting, a text too long, a file that is not a checkpoint."""


@dataclass
class LMConfig:
    """Everything needed to rebuild a model; it is stored in every checkpoint."""

    streams: int = 4
    size: str = "tiny"
    vocab_size: int = 8000  # of the text; 0 is padding
    max_text_len: int = 64  # text tokens per caption
    max_frames: int = 0  # most audio frames that are read at once; 0 means five seconds
    dropout: float = 0.0  # of what enters the residual stream; in attention it would cost the fused kernel

    def __post_init__(self):
        if self.streams not in (1, 2, 4, 8):
            raise LMError(f"streams is {self.streams}, but must be one of 1, 2, 4, 8: type --streams 4")
        if self.size not in SIZES:
            raise LMError(f"model size {self.size!r} is unknown: type --size " + " or ".join(SIZES))
        if self.max_frames == 1:
            raise LMError("max_frames is 1, but half a window is what sampling goes on from: take 2 or more")
        # As in codec.py: 500 / K frames a second, so that this is five seconds; 2048 / K codes per stream.
        self.max_frames = self.max_frames or math.ceil(2500 / self.streams)
        self.n_layer, self.n_head, self.n_embd, self.n_text_layer = SIZES[self.size]
        self.codebook_size = 2048 // self.streams  # V


# ----------------------------------------------------------------------------------------------------------
# The transformer


def rope_table(positions: int, size: int):
    """(2, positions, size): cosine and sine of the angles by which `apply_rotary_emb` turns pairs."""
    angle = torch.arange(positions)[:, None] / 10000 ** (torch.arange(0, size, 2) / size)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)))


def apply_rotary_emb(x, rope):
    """Turn each pair of a query or key (2, B, H, T, d / H) by an angle that grows with its position.

    The product of a query and a key then knows how far apart they are, which a table of learnt positions has
    to find out for every pair of positions. rope: rows of `rope_table` for these positions, (2, T, d / H), or
    (2, B, 1, T, d / H) where each clip has positions of its own."""
    cos, sin = rope.to(x.dtype)
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin  # the pairs are the two halves of a head


def attention(q, k, v, mask=None, is_causal=False):
    """Each query (B, H, T, d / H) gathers the values whose keys (B, H, S, d / H) it fits:

        softmax(q k^T / sqrt(d / H)) v

    It sees all keys, or with `is_causal` those up to its own position, or those where `mask` is True. Without
    gradients `mask` may also hold numbers, which are added to the scores."""
    if q.requires_grad and q.is_cpu and q.dtype == torch.bfloat16:
        # Written out: here the backward pass of PyTorch's kernel takes two to four times as long.
        scores = q @ k.mT / math.sqrt(q.shape[3])  # (B, H, T, S)
        if is_causal:
            scores = scores + torch.full(scores.shape[2:], -math.inf, dtype=q.dtype).triu(1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return scores.softmax(3) @ v
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)


class SelfAttention(nn.Module):
    """Multi-head self-attention, with rotary positions and a cache where they are given."""

    def __init__(self, cfg: LMConfig, causal: bool):
        super().__init__()
        self.n_head, self.causal = cfg.n_head, causal
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd)

    def forward(self, x, rope=None, cache=None, input_pos=None, mask=None):
        """x (B, T, d) -> (B, T, d). `mask` says which keys may be seen: booleans (B, 1, 1, T) for padded
        text; with `input_pos` numbers (1, S), added to the scores: 0, or -inf where a key may not be seen.

        With a cache (2, B, H, S, d / H), keys and values are kept in it: those of the first T positions, or,
        with `input_pos` (1,), those of this one (T = 1)."""
        B, T, d = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # (B, H, T, d / H) each
        if rope is not None:
            q, k = apply_rotary_emb(qkv[:2], rope)
        if input_pos is None:
            if cache is not None:
                cache[:, :, :, :T] = torch.stack((k, v))
            y = attention(q, k, v, mask, self.causal)
        else:
            cache.index_copy_(3, input_pos, torch.stack((k, v)).to(cache.dtype))
            y = attention(q.to(cache.dtype), *cache, mask).to(x.dtype)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, d))


class CrossAttention(nn.Module):
    """Multi-head attention from sound to text."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.n_head = cfg.n_head
        self.c_q = nn.Linear(cfg.n_embd, cfg.n_embd)
        self.c_kv = nn.Linear(cfg.n_embd, 2 * cfg.n_embd)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd)

    def kv(self, u):
        """Text u (B, N, d) to keys and values (2, B, H, N, d / H): once per prompt, not once per frame."""
        B, N, _ = u.shape
        return self.c_kv(u).view(B, N, 2, self.n_head, -1).permute(2, 0, 3, 1, 4)

    def forward(self, x, kv):
        """Sound x (B, T, d) and what `kv` made of the text -> (B, T, d)."""
        B, T, d = x.shape
        q = self.c_q(x).view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, d / H)
        y = attention(q.to(kv.dtype), *kv).to(x.dtype)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, d))


class MLP(nn.Module):
    """GPT-2's: four times as wide inside, with GELU."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class TextBlock(nn.Module):
    """A GPT-2 block without a causal mask."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(cfg.n_embd), SelfAttention(cfg, causal=False)
        self.ln_2, self.mlp = nn.LayerNorm(cfg.n_embd), MLP(cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x, mask):
        x = x + self.drop(self.attn(self.ln_1(x), mask=mask))
        return x + self.drop(self.mlp(self.ln_2(x)))


class Block(nn.Module):
    """A GPT-2 block with the paper's addition: cross-attention from sound to text."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(cfg.n_embd), SelfAttention(cfg, causal=True)
        self.ln_2, self.cross = nn.LayerNorm(cfg.n_embd), CrossAttention(cfg)
        self.ln_3, self.mlp = nn.LayerNorm(cfg.n_embd), MLP(cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x, cross_kv, rope, cache=None, input_pos=None, mask=None):
        x = x + self.drop(self.attn(self.ln_1(x), rope, cache, input_pos, mask))
        x = x + self.drop(self.cross(self.ln_2(x), cross_kv))
        return x + self.drop(self.mlp(self.ln_3(x)))


class TextEncoder(nn.Module):
    """Text ids (B, N) to u (B, max_text_len, d): a small bidirectional transformer, in place of T5."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.max_text_len = cfg.max_text_len
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.max_text_len, cfg.n_embd)
        self.drop = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(TextBlock(cfg) for _ in range(cfg.n_text_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd)

    def forward(self, text):
        n = text.shape[1]
        if n > self.max_text_len:
            raise LMError(f"the text has {n} tokens of at most {self.max_text_len}: use fewer words")
        text = F.pad(text, (0, self.max_text_len - n))
        x = self.drop(self.wte(text) + self.wpe.weight)  # (B, max_text_len, d)
        is_token = text != 0
        is_token[:, 0] = True  # of an empty text one padding token is read: softmax needs a key
        for block in self.blocks:
            x = block(x, is_token[:, None, None])
        return self.ln_f(x)


# ----------------------------------------------------------------------------------------------------------
# The language model


def cross_entropy(logits, codes):
    """How surprising each code is, in nats: logits (B, K, F, V) and codes (B, K, F) to (B, K, F)."""
    logits = logits.flatten(0, 2).float()  # with V in the last place, or it takes several times as long
    return F.cross_entropy(logits, codes.flatten(), reduction="none").view_as(codes)


class AudioLM(nn.Module):
    """GPT over [text, codes]. It keeps what it was trained with: `tokenizer` (a tensor of its bytes), `words`
    (all words of the training captions) and `codec_hash` (see `Codec.hash`)."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.cfg = cfg
        self.tokenizer, self.words, self.codec_hash = None, [], None
        self.text_encoder = TextEncoder(cfg)
        self.wte = nn.Embedding(cfg.streams * cfg.codebook_size, cfg.n_embd)  # K tables, one after the other
        self.bos = nn.Parameter(0.02 * torch.randn(cfg.n_embd))
        self.drop = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd)
        self.lm_heads = nn.Linear(cfg.n_embd, cfg.streams * cfg.codebook_size, bias=False)  # K heads in one
        codebook_offset = torch.arange(cfg.streams) * cfg.codebook_size  # the first row of each table
        self.codebook_offset = nn.Buffer(codebook_offset, persistent=False)  # (K,)
        rope = rope_table(cfg.max_text_len + cfg.max_frames, cfg.n_embd // cfg.n_head)
        self.rope = nn.Buffer(rope, persistent=False)  # (2, max_text_len + max_frames, d / H)
        # As in GPT-2: a standard deviation of .02. For the layers that write to the residual stream (c_proj)
        # it is divided by the square root of their number.
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                additions = 2 * cfg.n_text_layer if name.startswith("text_encoder") else 3 * cfg.n_layer
                scale = 1 / math.sqrt(additions) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @torch.no_grad()
    def init_from_codebooks(self, codebooks):
        """Start embeddings and heads from the codec's vectors (K, V, D), randomly projected to d dimensions.

        The mean of a frame's K embeddings is then its quantized latent, up to centring, projection and scale:
        codes that sound alike have similar embeddings from the first step on."""
        codebooks = codebooks - codebooks.mean(1, keepdim=True)
        D = codebooks.shape[2]
        vectors = codebooks @ torch.randn(D, self.cfg.n_embd, device=codebooks.device) / math.sqrt(D)
        scale = codebooks.square().mean().sqrt() + 1e-9  # one for all: early streams stay larger
        self.wte.weight.copy_(0.04 * (vectors / scale).flatten(0, 1))
        scale = codebooks.square().mean((1, 2), keepdim=True).sqrt() + 1e-9  # (K, 1, 1): all heads are alike
        self.lm_heads.weight.copy_(0.02 * (vectors / scale).flatten(0, 1))

    def embed(self, codes):
        """Codes (B, K, F) to the mean of their K embeddings (B, F, d) (section 3.2)."""
        return self.wte(codes.transpose(1, 2) + self.codebook_offset).mean(2)  # over K of (B, F, K, d)

    def inputs(self, codes, history_mask=None):
        """The start vector and the given frames (B, K, F): (B, 1 + F, d).

        Where `history_mask` (B,) is 0, all frames of the clip become zeros: the model cannot read them."""
        bos, v = self.bos.expand(len(codes), 1, -1), self.embed(codes)
        if history_mask is not None:
            v = v * history_mask[:, None, None]
        return torch.cat((bos, v), 1)

    def cross_kv(self, u):
        """What the cross-attention of each block reads of the text u (B, N, d): a list, block by block."""
        return [block.cross.kv(u) for block in self.blocks]

    def logits(self, x):
        """(B, F, d) to (B, K, F, V)."""
        return self.lm_heads(self.ln_f(x)).unflatten(2, (self.cfg.streams, -1)).transpose(1, 2)

    def forward(self, codes, text, history_mask=None, first_frame=None, input_codes=None):
        """Codes (B, K, F), text ids (B, N) padded with 0 -> logits (B, K, F, V), loss ().

        The loss is the paper's L_LM (section 3.2), as a mean over streams and audio frames; text is never
        predicted. F is at most `cfg.max_frames`. Where `history_mask` (B,) is 0 instead of 1, every frame has
        to be predicted from the words alone. `first_frame` (B,) says which frame of its clip is the first,
        0 if not given, at most `cfg.max_frames` - F. `input_codes` (B, K, F) are what the model reads of the
        past, if not the codes themselves. LMError: the clip or the text is too long."""
        if codes.shape[2] > self.cfg.max_frames:
            raise LMError(f"{codes.shape[2]} frames, the model reads {self.cfg.max_frames}: cut the clip")
        u = self.text_encoder(text)  # (B, N, d)
        past = codes if input_codes is None else input_codes
        logits = self.predict(u, past, history_mask, first_frame)
        return logits, cross_entropy(logits, codes).mean()

    def predict(self, u, codes, history_mask=None, first_frame=None):
        """Logits (B, K, F, V) of every frame given the text u (B, N, d) and the frames before it."""
        x = self.drop(self.inputs(codes[:, :, :-1], history_mask))  # (B, F, d)
        x = torch.cat((u, x), 1)  # (B, N + F, d)
        rope = self.rope[:, : x.shape[1]]
        if first_frame is not None:  # a late crop is as far from the text as it is in its whole clip
            position = torch.arange(x.shape[1], device=x.device)
            position = position + (position >= u.shape[1]) * first_frame[:, None]  # (B, N + F)
            rope = self.rope[:, position][:, :, None]  # (2, B, 1, N + F, d / H)
        for block, kv in zip(self.blocks, self.cross_kv(u)):
            x = block(x, kv, rope)
        return self.logits(x[:, u.shape[1] :])

    # ------------------------------------------------------------------------------------------------------
    # Sampling

    def prefill(self, u, codes, cross_kv, cache):
        """Read text u (B, N, d) and the frames so far (B, K, F) into the cache, from its start on;
        logits of the next frame (B, K, V). Later entries, left by an earlier window, stay masked until they
        are overwritten."""
        x = torch.cat((u, self.inputs(codes)), 1)
        for block, kv, layer_cache in zip(self.blocks, cross_kv, cache):
            x = block(x, kv, self.rope[:, : x.shape[1]], layer_cache)
        return self.logits(x[:, -1:])[:, :, 0]

    def decode_one_frame(self, codes, input_pos, cross_kv, cache):
        """Read one frame (B, K) at position `input_pos` (1,) of the sequence; logits of the next (B, K, V).

        It reads nothing back from the GPU, so that it can be recorded as a CUDA graph."""
        x, rope = self.embed(codes[:, :, None]), self.rope[:, input_pos]  # (B, 1, d)
        # Numbers (0 or -inf), for attention would convert a boolean mask again in every layer.
        is_seen = torch.arange(cache.shape[4], device=x.device)[None] <= input_pos  # (1, S)
        mask = torch.where(is_seen, 0.0, -math.inf).to(cache.dtype)
        for block, kv, layer_cache in zip(self.blocks, cross_kv, cache):
            x = block(x, kv, rope, layer_cache, input_pos, mask)
        return self.logits(x)[:, :, 0]

    @torch.no_grad()
    def generate(self, text, frames: int, **options):
        """Text ids (B, N) to codes (B, K, frames); options as in `generate_stream`."""
        return torch.cat(list(self.generate_stream(text, frames, **options)), 2)

    @torch.no_grad()
    def generate_stream(
        self,
        text,
        frames: int,
        seeds=None,
        guidance: float = 3.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.0,
        negative=None,
        prefix=None,
        block_frames: int = 25,
    ):
        """Text ids (B, N) to an iterator of codes (B, K, up to `block_frames`), `frames` in all.

        Each prompt has a random generator of its own, with one of the `seeds` (0 to B - 1 if not given), so
        that its result does not depend on the batch (but for rounding in bfloat16). `guidance` is the gamma
        of `classifier_free_guidance`, `temperature` divides log p (0: the likeliest code), `top_k` and
        `top_p` leave only the likeliest codes. LMError: one of these is out of range, there is not one seed
        for each text, or a text is too long.
        `negative` (B, N) takes the place of "no text" in guidance. `prefix` (B, K, P) is continued and not
        repeated. Whenever the window of `cfg.max_frames` is full, the model starts afresh from the last half
        window of frames; of a longer prefix, too, it reads no more than that."""
        B, cfg = len(text), self.cfg
        generators = [torch.Generator().manual_seed(int(s)) for s in (range(B) if seeds is None else seeds)]
        if len(generators) != B:
            raise LMError(f"{len(generators)} seeds for {B} texts: give one for each")
        if not (temperature >= 0 and top_k >= 0 and top_p >= 0 and math.isfinite(guidance)):
            raise LMError("temperature, top_k and top_p must be 0 or more, and guidance a finite number")
        u, cross_kv, cache = self.read_text(text, guidance, negative)
        copies = len(u) // B  # of every clip: with its text and, for guidance, without
        positions = torch.arange(u.shape[1] + cfg.max_frames, device=u.device)
        step = self.sampling_step(cross_kv, cache, copies, guidance, temperature, top_k, top_p)
        history = text.new_zeros(B, cfg.streams, 0) if prefix is None else prefix
        made = 0
        while made < frames:
            history = history[:, :, -(cfg.max_frames // 2) :]
            logits = self.prefill(u, history.repeat(copies, 1, 1), cross_kv, cache)  # (2 B, K, V)
            pos = u.shape[1] + history.shape[2]  # the last position read: text, bos, history
            room = min(cfg.max_frames - history.shape[2], frames - made)  # frames until the window is full
            while room > 0:
                n = min(block_frames, room)
                draws = (n, cfg.streams, cfg.codebook_size)
                noise = torch.stack([torch.rand(draws, generator=g) for g in generators]).to(u.device)
                block = []
                for i in range(n):
                    # The last frame of a full window has no position left: its logits are not used.
                    pos = min(pos + 1, len(positions) - 1)
                    # A CPU reads only so much of the cache as is filled, in steps of 64 positions.
                    filled = [] if u.is_cuda else [cache[:, :, :, :, : pos // 64 * 64 + 64]]
                    codes, logits = step(logits, noise[:, i], positions[pos : pos + 1], *filled)
                    block.append(codes.clone())
                history = torch.cat((history, torch.stack(block, 2)), 2)
                made, room = made + n, room - n
                yield history[:, :, -n:]

    def sampling_step(self, cross_kv, cache, copies: int, guidance, temperature, top_k, top_p):
        """A function that chooses a frame and reads it; on a GPU it is recorded as one graph."""

        @torch.inference_mode()  # a tenth faster than no_grad in a small model
        def step(logits, noise, input_pos, filled=cache):
            """Logits (2 B, K, V) and noise (B, K, V) to a frame (B, K), and the logits of the next."""
            logp = classifier_free_guidance(logits, guidance)
            codes = sample_next(logp, noise, temperature, top_k, top_p)
            return codes, self.decode_one_frame(codes.repeat(copies, 1), input_pos, cross_kv, filled)

        if not cache.is_cuda:
            return step
        shape = (cache.shape[2] // copies, self.cfg.streams, self.cfg.codebook_size)
        noise = torch.zeros(shape, device=cache.device)
        position = torch.zeros(1, dtype=torch.long, device=cache.device)
        return CUDAGraph(step, noise.to(cache.dtype).repeat(copies, 1, 1), noise, position)

    def read_text(self, text, guidance: float, negative=None):
        """What sampling needs of the texts (B, N), once: u (2 B, N, d), with text and, for guidance, without;
        what each block's cross-attention reads of it; and an empty cache (L, 2, 2 B, H, S, d / H)."""
        cfg, texts = self.cfg, [text]
        if guidance != 1:
            texts.append(torch.zeros_like(text) if negative is None else negative)
        u = torch.cat([self.text_encoder(t) for t in texts])  # (2 B, N, d)
        # One query at a time, a CPU's attention in bfloat16 takes six times as long as in float32.
        dtype = torch.float32 if u.device.type == "cpu" else u.dtype
        cross_kv = [kv.to(dtype) for kv in self.cross_kv(u)]
        cache_len = math.ceil((u.shape[1] + cfg.max_frames) / 8) * 8  # GPU kernels want masks of such lengths
        shape = (cfg.n_layer, 2, len(u), cfg.n_head, cache_len, cfg.n_embd // cfg.n_head)
        return u, cross_kv, torch.zeros(shape, dtype=dtype, device=u.device)

    @torch.no_grad()
    def text_evidence(self, text, codes, negative=None):
        """log p(codes | text) - log p(codes | no text) of codes (B, K, F) and texts (B, N), in nats: (B,).

        This is their pointwise mutual information. `negative` (B, N) takes the place of "no text". Codes
        longer than the model reads are scored window by window."""
        uncond = torch.zeros_like(text) if negative is None else negative
        u, u_uncond = self.text_encoder(text), self.text_encoder(uncond)
        evidence = torch.zeros(len(codes), device=codes.device)
        for window in codes.split(self.cfg.max_frames, 2):
            for sign, condition in ((1, u), (-1, u_uncond)):
                evidence -= sign * cross_entropy(self.predict(condition, window), window).sum((1, 2))
        return evidence

    def pack(self):
        """Ready the model for sampling, in place: on an x86 the GPT's matrices are rounded to 8 bits, but not
        the text encoder's. It can then no longer be trained or saved."""
        x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
        if x86 and hasattr(torch, "_weight_int8pack_mm") and self.bos.device.type == "cpu":
            for parent in [self, *self.blocks.modules()]:
                for name, layer in list(parent.named_children()):
                    if isinstance(layer, nn.Linear):
                        setattr(parent, name, Int8Linear(layer))
        return self

    # ------------------------------------------------------------------------------------------------------
    # Files

    def checkpoint(self) -> dict:
        """What `load` reads; the scripts add what they need beside it."""
        return {
            "kind": "nanoaudiogen lm",
            "config": asdict(self.cfg),
            "model": self.state_dict(),
            "tokenizer": self.tokenizer,
            "words": self.words,
            "codec_hash": self.codec_hash,
        }

    @staticmethod
    def from_checkpoint(checkpoint: dict, path, codec_hash=None) -> "AudioLM":
        """The model in a checkpoint of this path. LMError: it is of another version of this file, or learnt
        the codes of another codec than the one with this hash."""
        try:
            lm = AudioLM(LMConfig(**checkpoint["config"]))
            lm.load_state_dict(checkpoint["model"])
            lm.tokenizer, lm.words = checkpoint["tokenizer"], checkpoint["words"]
            lm.codec_hash = checkpoint["codec_hash"]
        except (KeyError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise LMError(f"{path}: of another version ({reason}): train it again") from None
        if codec_hash not in (None, lm.codec_hash):
            raise LMError(
                f"{path} learnt the codes of codec {lm.codec_hash}, not of {codec_hash}: name "
                "the codec it was trained with by --codec, or train it again"
            )
        return lm

    @staticmethod
    def load(path, device="cpu", codec_hash=None) -> "AudioLM":
        """The model in a file, in evaluation mode and float32. LMError: it is no checkpoint, or it cannot be
        used with this codec."""
        checkpoint = load_checkpoint(path, "nanoaudiogen lm")
        return AudioLM.from_checkpoint(checkpoint, path, codec_hash).to(device).eval()


def load_checkpoint(path, kind: str) -> dict:
    """A checkpoint of this kind, loaded without running code from the file; LMError for anything else.
    (codec.py and lm.py have the same one, for each can be copied alone.)"""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise LMError(f"{path}: no such checkpoint: train one first, or name another") from None
    except Exception as e:  # noqa: BLE001 (torch.load raises a dozen types for broken files)
        reason = (str(e).splitlines() or [type(e).__name__])[0][:80]
        raise LMError(f"{path}: truncated, or not a checkpoint ({reason}): name another file") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != kind:
        found = checkpoint.get("kind") if isinstance(checkpoint, dict) else None
        raise LMError(f"{path}: expected a {kind}, found {found or 'another project'}: name another file")
    return checkpoint


# ----------------------------------------------------------------------------------------------------------
# Parts of sampling


def classifier_free_guidance(logits, guidance: float):
    """gamma log p(c | u) + (1 - gamma) log p(c), the paper's sampling distribution (section 3.2).

    (2 B, K, V), first with text and then without, to (B, K, V); at gamma = 1 the logits are (B, K, V)."""
    logp = logits.float().log_softmax(-1)
    if guidance == 1:
        return logp
    cond, uncond = logp.chunk(2)
    return uncond.lerp(cond, guidance)


def sample_next(logp, noise, temperature: float = 1.0, top_k: int = 0, top_p: float = 0.0):
    """One code for each stream: scores (B, K, V) and uniform noise of the same shape to codes (B, K).

    argmax(log p - log(-log(noise))) is a sample from p (the Gumbel-max trick). It needs no loop over rows and
    never waits for the GPU, and each prompt can have its own random generator for the noise."""
    if temperature < 1e-6:  # divided by less, scores would be infinite
        return logp.argmax(-1)
    logp = logp / temperature  # no longer normalised, which argmax does not notice
    if top_k:
        kth = logp.topk(min(top_k, logp.shape[-1]))[0][..., -1:]
        logp = logp.masked_fill(logp < kth, -math.inf)
    if top_p:
        ordered, order = logp.softmax(-1).sort(-1, descending=True)
        beyond = (ordered.cumsum(-1) - ordered) >= top_p  # the first code always stays
        logp = logp.masked_fill(beyond.gather(-1, order.argsort(-1)), -math.inf)
    return (logp - torch.log(-torch.log(noise.clamp(1e-10, 1 - 1e-7)))).argmax(-1)


class Int8Linear(nn.Module):
    """A linear layer for sampling on a CPU: weights of 8 bits, and a scale for each output.

    A frame takes as long as reading the weights, and these are a quarter of float32's. The kernel is the one
    of gpt-fast. It has no gradient, and rounds what comes in and goes out to bfloat16. It is made for one
    position at a time: for more, such as a prompt's, floats are faster. (Positions decide, not rows: a sound
    must not depend on how many others are made with it.)"""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()  # (out, in)
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-9).bfloat16()  # (out,)
        weight = (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.weight, self.scale, self.bias = nn.Buffer(weight), nn.Buffer(scale), linear.bias

    def forward(self, x):
        if x.shape[-2] > 1:
            return F.linear(x, self.weight.to(x.dtype) * self.scale[:, None], self.bias)
        y = torch._weight_int8pack_mm(x.bfloat16().view(-1, x.shape[-1]), self.weight, self.scale)
        y = y.view(*x.shape[:-1], -1)
        return y.to(x.dtype) if self.bias is None else y + self.bias


class CUDAGraph:
    """A function of tensors, recorded once and replayed as one CUDA graph.

    A frame is hundreds of kernels, each over before the next can be launched; replaying launches them all at
    once."""

    def __init__(self, function, *inputs):
        self.inputs = [x.clone() for x in inputs]
        device = inputs[0].device  # need not be the current one
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # at its first call a library sets itself up, which is not recorded
            for _ in range(3):
                function(*self.inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.output = function(*self.inputs)

    def __call__(self, *inputs):
        """Its results; the next call overwrites them."""
        for mine, x in zip(self.inputs, inputs):
            mine.copy_(x)
        self.graph.replay()
        return self.output
