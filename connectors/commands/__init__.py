"""Subcommands of `kvlane` that move KV."""
