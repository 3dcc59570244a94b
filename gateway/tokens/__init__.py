"""From a request's bytes to the token ids that the engine will see."""
