"""OpenAI-compatible HTTP over the engine; needs the extra `serve`, but for what `flextron.Engine` shares with it.

Life of a request: `http` reads the body, `bodies` checks it, `targets` chooses the sub-network, `session` queues it,
`worker` runs it in the engine's own thread, and `completions` or `chat` put its pieces into OpenAI's words.
"""
