"""From what happened to what is learned: transcripts in, training jobs out, and a guard on what they do.

A plain client of the served model (OpenAI API) and of `/train`; nothing of it runs in vLLM or in the worker.

    read -> strip -> flag -> judge -> review -> score -> choose -> train -> watch
"""
