"""Moving KV between engines and tiers; imported by the vLLM plugin."""
