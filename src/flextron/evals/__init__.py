"""Evaluation tasks of the field on sub-networks, through EleutherAI's lm-eval; needs the extra `eval`.

`model` is what lm-eval asks for likelihoods and texts, `tasks` reads its tasks from local files, and `run` puts the
two together for several sub-networks.
"""
