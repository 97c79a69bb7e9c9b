"""OpenAI-compatible HTTP over `flextron.serving`; needs the extra `serve`.

Life of a request: `connection` waits for it, `http` reads its body, `bodies` checks that, `completions` or `chat` have
it run by `flextron.serving` and put its pieces into OpenAI's words.

`files` and `finetuning` put `flextron.jobs` into OpenAI's words, on a server that was given jobs.
"""
