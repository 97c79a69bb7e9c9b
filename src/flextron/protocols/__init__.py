"""OpenAI's protocol and others over `flextron.serving`: bodies in, answers out; needs the extra `serve`.

`bodies` checks a request, `completions` or `chat` have it run by `flextron.serving` and put its pieces into OpenAI's
words. `dialects` makes chats of other protocols.
"""
