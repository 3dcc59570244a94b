"""Who asks, what they may ask for, and what keeps one tenant's cache from another's."""
