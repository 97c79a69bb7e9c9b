"""Texts for training and calibration: documents, text that is on every machine, blocks of tokens."""
