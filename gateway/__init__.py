"""The Envoy side: reads a request, asks the index, sends it to the worker that answers soonest."""
