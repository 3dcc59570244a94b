"""The vLLM side: the KV connector, and `kvlane serve`."""
