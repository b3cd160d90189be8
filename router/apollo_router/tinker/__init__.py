"""Tinker's API at /train/tinker/api/v1: the `tinker` SDK trains and samples the model that is served."""
