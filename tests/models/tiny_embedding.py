"""A tiny Qwen3 with random weights in the form that Qwen3-Embedding has: last-token pooling, a query prompt."""

import json
from pathlib import Path

from workers.smoke import TINY_SHAPE, build_tokenizer


def build(folder: Path) -> Path:
    """A sentence-transformers folder of 128 dimensions. What it says of meaning is noise."""
    import torch
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    config = Qwen3Config(**TINY_SHAPE, max_position_embeddings=512)
    Qwen3Model(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    pooling = {"word_embedding_dimension": 128, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    prompts = {"query": "Instruct: find it\nQuery:", "document": ""}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return folder
