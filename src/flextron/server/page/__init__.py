"""The web page: its files, what they need to know of the model, and a stream of live figures.

The files are plain modules without a build step, and load nothing from elsewhere.
"""
