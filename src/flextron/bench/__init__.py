"""The load generator: requests at given times against any OpenAI-compatible server, and what its clients saw.

It uses nothing of the models, and neither torch nor transformers, so that it measures our server and others alike.
"""
