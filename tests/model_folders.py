"""Models on disk, in the layout that mlx-lm reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omlx_core.mlx_backend import mx

from mlx.utils import tree_flatten
from tiny_models import VOCAB_SIZE
from tokenizers import Tokenizer, models, pre_tokenizers


def save_model_folder(folder: Path, model: Any) -> Path:
    """Write a whole model with one token per id: ``t0``, ``t1`` and so on."""
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = {key: value for key, value in vars(model.args).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({f"t{index}": index for index in range(VOCAB_SIZE)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder
