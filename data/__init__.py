"""Data preparation: from a Wikipedia dump and books to HDF5 shards of training samples.

bertPrep.py is the command; each module beside it has one job.  No module here imports torch.
"""
