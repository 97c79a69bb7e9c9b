"""HTTP around `flextron.protocols`; needs the extra `serve`.

Life of a request: `connection` waits for it, `http` lets it in and reads its body, `app` knows which protocol answers
its path. `files` and `finetuning` put `flextron.jobs` into OpenAI's words, on a server that was given jobs.
"""
