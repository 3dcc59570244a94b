"""A LoRA adapter for the tiny model: random weights, in the form of PEFT's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

RANK = 8


def make_adapter(directory: Path, model: Path, *, seed: int) -> None:
    """Write an adapter of the query and value projections of `model` into `directory`.

    Source: PEFT 0.15 `adapter_config.json` and the names in its `adapter_model.safetensors`.
    """
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    out_features = {
        "q_proj": hidden,
        "v_proj": hidden // heads * config["num_key_value_heads"],
    }
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, size in out_features.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator)
            weights[f"{prefix}.lora_B.weight"] = torch.randn(size, RANK, generator=generator)
    directory.mkdir(parents=True)
    save_file(weights, directory / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(out_features),
    }
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
