"""Serving without HTTP: requests get a sub-network and an adapter, and run in the engine's own thread.

Life of a request: `targets` chooses the adapter and the sub-network (within the cap that `adaptive` sets), `adapters`
holds the adapter in memory, `service` and `session` queue the request, and `worker` runs it. Jobs train between the
engine's iterations, and `adapters` is told of what comes out.
"""
