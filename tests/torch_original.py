"""The original repository's AST in PyTorch, written from its description with its parameter names and its eps values.

It shares no code with `ast_jax`, so that what reads the original's checkpoints has something to be compared with.
Shapes: B batch, T frames, F mel bins, f x t the grid of patches, N = 2 + f * t tokens, D width, H heads.
"""

import torch
from torch import nn

PATCH = 16
PREFIX = 2  # the CLS token and the distillation token
AUDIOSET_GRID = (12, 101)  # 128 bins and 1024 frames at strides 10
IMAGENET_CLASSES = 1000
BODY_EPS = 1e-6  # of the blocks and the final norm
HEAD_EPS = 1e-5


def grid_of(input_fdim, input_tdim, fstride, tstride):
    """Return how many patches lie along frequency and along time."""
    return (input_fdim - PATCH) // fstride + 1, (input_tdim - PATCH) // tstride + 1


def resized_positions(pos_embed, old_grid, new_grid):
    """Return positions [1, 2 + f't', D] for a new grid from those [1, 2 + ft, D] of an old one.

    Time first, then frequency: an axis that does not grow is cut from its middle, one that grows is interpolated.
    """
    prefix, patches = pos_embed[:, :PREFIX], pos_embed[:, PREFIX:]
    grid = patches.transpose(1, 2).unflatten(2, old_grid)  # [1, D, f, t]
    for axis in (3, 2):
        have, want = grid.shape[axis], new_grid[axis - 2]
        if want <= have:
            grid = grid.narrow(axis, have // 2 - want // 2, want)
        else:
            size = (grid.shape[2], want) if axis == 3 else (want, grid.shape[3])
            grid = nn.functional.interpolate(grid, size=size, mode="bilinear")
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)


class PatchEmbed(nn.Module):
    """Overlapping patches [B, C, F, T] -> [B, f * t, D], all times of the lowest frequency first."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=PATCH, stride=stride)

    def forward(self, image):
        return self.proj(image).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention whose queries, keys and values are one linear layer."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, N, D/H]
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * query.shape[-1] ** -0.5
        mixed = torch.einsum("bhqk,bhkd->bqhd", scores.softmax(dim=-1), value)
        return self.proj(mixed.flatten(2))


class Mlp(nn.Module):
    """Two linear layers around the exact (erf) GELU."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="none"))


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=BODY_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=BODY_EPS)
        self.mlp = Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DistilledViT(nn.Module):
    """The parts of DeiT's distilled vision transformer under timm's names; its two ImageNet heads are never called."""

    def __init__(self, channels, patches, stride, width, depth, heads):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.dist_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, PREFIX + patches, width))
        for parameter in (self.cls_token, self.dist_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.patch_embed = PatchEmbed(channels, width, stride)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=BODY_EPS)
        self.head = nn.Linear(width, IMAGENET_CLASSES)
        self.head_dist = nn.Linear(width, IMAGENET_CLASSES)


class OriginalAST(nn.Module):
    """The original's classifier of spectrograms [B, T, F].

    Its sizes are tiny (width 192, 3 heads), small (384, 6) and base (768, 12), each 12 blocks deep.
    """

    def __init__(
        self,
        label_dim=527,
        fstride=10,
        tstride=10,
        input_fdim=128,
        input_tdim=1024,
        width=192,
        depth=12,
        heads=3,
    ):
        super().__init__()
        self.grid = grid_of(input_fdim, input_tdim, fstride, tstride)
        self.v = DistilledViT(1, self.grid[0] * self.grid[1], (fstride, tstride), width, depth, heads)
        self.mlp_head = nn.Sequential(nn.LayerNorm(width, eps=HEAD_EPS), nn.Linear(width, label_dim))

    def features(self, x):
        """Return every stage of x [B, T, F] by name: tokens [B, N, D], "pooled" [B, D] and "logits" [B, labels]."""
        patches = self.v.patch_embed(x.transpose(1, 2).unsqueeze(1))
        prefix = torch.cat([self.v.cls_token, self.v.dist_token], dim=1).expand(len(x), -1, -1)
        tokens = torch.cat([prefix, patches], dim=1) + self.v.pos_embed
        stages = {"embeddings": tokens}
        for index, block in enumerate(self.v.blocks):
            tokens = block(tokens)
            stages[f"block {index}"] = tokens
        stages["norm"] = self.v.norm(tokens)
        stages["pooled"] = (stages["norm"][:, 0] + stages["norm"][:, 1]) / 2
        stages["logits"] = self.mlp_head(stages["pooled"])
        return stages

    def forward(self, x):
        return self.features(x)["logits"]

    @classmethod
    def from_imagenet(cls, deit_state, **arguments):
        """Start from a DeiT-distilled state dict (names without `v.`, square grid, 3 channels), in its dtype."""
        positions = deit_state["pos_embed"]
        side = round((positions.shape[1] - PREFIX) ** 0.5)
        kernel = deit_state["patch_embed.proj.weight"].sum(dim=1, keepdim=True)
        return cls._started({**deit_state, "patch_embed.proj.weight": kernel}, (side, side), arguments)

    @classmethod
    def from_audioset(cls, audioset_state, **arguments):
        """Start from an AudioSet model's state dict (grid 12 x 101, with or without `module.`), in its dtype."""
        names = {name.removeprefix("module."): name for name in audioset_state}
        body = {name[2:]: audioset_state[full] for name, full in names.items() if name.startswith("v.")}
        return cls._started(body, AUDIOSET_GRID, arguments)

    @classmethod
    def _started(cls, body, old_grid, arguments):
        model = cls(**arguments).to(body["pos_embed"].dtype)
        positions = resized_positions(body["pos_embed"], old_grid, model.grid)
        model.v.load_state_dict({**body, "pos_embed": positions})
        return model.eval()


def drawn(name, shape, generator):
    """Return a float64 tensor of unit-like scale: the kind of parameter is told by its name and rank."""
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if len(shape) in (2, 4):
        return noise * 1.5 * shape[1:].numel() ** -0.5
    if name.endswith("bias"):
        return 0.3 * noise
    if name.endswith("weight"):  # of a norm
        return 1 + 0.3 * noise
    return noise  # tokens and positions


def randomized(model, seed=0):
    """Draw every parameter anew and return the model, evaluating."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn(name, parameter.shape, generator))
    return model.eval()


def deit_state(width=192, depth=12, heads=3, hw=24, seed=0):
    """Return a random float32 state dict of a DeiT-distilled ViT of hw x hw patches, ImageNet heads included."""
    return randomized(DistilledViT(3, hw * hw, PATCH, width, depth, heads), seed).state_dict()
