"""Every architecture of mlx-lm in one table, and what is known of those that stand out."""

from __future__ import annotations

from integration_tests.architectures.experts import MIXTURES
from integration_tests.architectures.full_attention import FULL_ATTENTION
from integration_tests.architectures.latent_attention import LATENT_ATTENTION
from integration_tests.architectures.recurrent import RECURRENT
from integration_tests.architectures.shared import Config
from integration_tests.architectures.windows import WINDOWED
from integration_tests.architectures.wrappers import WRAPPERS

FAMILIES: dict[str, dict[str, Config]] = {
    "full-attention": FULL_ATTENTION,
    "experts": MIXTURES,
    "latent-attention": LATENT_ATTENTION,
    "windows": WINDOWED,
    "recurrent": RECURRENT,
    "wrappers": WRAPPERS,
}

# The module of mlx_lm.models, and the config.json of a tiny model of it.
ARCHITECTURES: dict[str, Config] = {name: config for family in FAMILIES.values() for name, config in family.items()}

# The modules that can't run here, and why.
NOT_TRIED: dict[str, str] = {
    "bitnet": "needs Metal: its linear layers are a Metal kernel, with nothing in its place on other devices",
    "muse_spark": "needs Metal: its attention and its router are Metal kernels, with nothing in their place elsewhere",
    "olmo": "takes no prompt: it adds mlx-lm's causal mask to the scores, and that mask is the word 'causal'; besides, "
    "its import ends the process unless ai2-olmo is installed",
}

# How far log-probabilities move, in mlx-lm itself, with the places where prefill is cut; the others are bit-identical
# on the reference BLAS. A cut before the last token is another matter: a single token takes a path of its own through
# windows and latent attention (up to 2e-5).
CUT_TOLERANCE: dict[str, float] = dict.fromkeys(
    # They scan in chunks that are counted from the start of each piece.
    ("bailing_hybrid", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "plamo2"),
    1e-5,
)

# Architectures whose tokens, in mlx-lm itself, depend on where prefill is cut.
CUT_DEPENDENT: dict[str, str] = {
    "phi3small": "its block-sparse layers add the boolean mask to the scores, so that a token also sees the later ones "
    "of its piece of the prompt",
    "plamo3": "its mask admits one token more than its window keeps, so that the first tokens of a piece see one less",
}

# Architectures whose prompt cache is of a class that no handler knows.
UNKNOWN_CACHE: dict[str, str] = {
    "deepseek_v41": "its cache class is its own, and no handler knows it",
}

# Architectures that mlx-lm answers differently, or not at all, in a batch of prompts of different lengths.
UNLIKE_ALONE_IN_BATCH: dict[str, str] = {
    "afm7": "the layers that reuse keys take their positions from the padded length",
    "deepseek_v41": "its cache class has no merge",
    "gemma2": "the mask of a batch doesn't fit the grouped scores",
    "gpt_bigcode": "it asks for the offset of the batch as one number",
    "llama4": "ChunkedKVCache has no merge",
    "minimax_m3_vl": "blocks are counted from the padded start",
    "nemotron-nas": "a layer never fills the cache that it is given, and an empty one can't be merged",
    "phi3small": "the mask of a batch doesn't fit the grouped scores",
}
