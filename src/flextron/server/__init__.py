"""OpenAI-compatible HTTP over the engine; needs the extra `serve`, but for what `flextron.Engine` shares with it.

Life of a request: `connection` waits for it, `http` reads its body, `bodies` checks that, `targets` chooses the adapter
and the sub-network (within the cap that `adaptive` sets), `adapters` holds the adapter in memory, `service` and
`session` queue the request, `worker` runs it in the engine's own thread, and `completions` or `chat` put its pieces
into OpenAI's words.

`files` and `finetuning` put `flextron.jobs` into OpenAI's words, on a server that was given jobs. They train between
the engine's iterations, and `adapters` is told of what comes out.
"""
