"""The judgement to stop: a held-out set and canary prompts, measured before, during and after bulk jobs.

measure (heldout, canaries) -> keep (history) -> compare (thresholds) -> stop, restore, undo (monitor)
                                              -> show (report, charts)
"""
