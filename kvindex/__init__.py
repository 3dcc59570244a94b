"""The global KV index: which worker holds which block, kept in Redis."""
